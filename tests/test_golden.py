"""Golden values: what the library computes is what it computed before it was rewritten.

`tests/golden/README.md` says what each file pins and how a difference is taken on purpose.
"""

from dataclasses import replace

import numpy as np
import pytest

from golden import adapter, measure
from golden.write import add_versions

NEAR = 1e-12  # of a probability: exp() differs in its last bits
NEAR_NETWORK = 1e-5  # processors sum float32 products in their own order


@pytest.mark.parametrize('name', measure.TRAINING_SETS)
def test_a_training_set_holds_the_golden_rows(name):
    rows = adapter.training_set(*measure.TRAINING_SETS[name])
    golden = measure.load('training_sets')[name]
    assert measure.differences(golden, measure.training_set(rows)) == {}


@pytest.mark.parametrize('day', measure.SCORED_DAYS)
def test_a_frozen_model_gives_the_golden_scores(day):
    found = measure.frozen_scores(day)
    golden = measure.load('scores')[day]
    trees = golden['trees']
    assert (found['trees']['rows'], found['trees']['sha256']) == (trees['rows'], trees['sha256'])
    np.testing.assert_allclose(found['trees']['first'], trees['first'], rtol=0, atol=NEAR)
    network = golden['network']
    assert found['network']['rows'] == network['rows']
    for what in ('first', 'mean'):
        np.testing.assert_allclose(found['network'][what], network[what], rtol=0, atol=NEAR_NETWORK)


def test_every_feature_has_its_golden_values(golden_week):
    found = measure.features(golden_week)
    assert measure.differences(measure.load('features'), found) == {}
    assert len(adapter.feature_names()) == 132
    assert set(adapter.feature_names()) <= set(found)


def test_the_week_is_what_a_training_set_of_it_holds(golden_week):
    rows = adapter.training_set(*adapter.WEEK)
    whole = np.stack([golden_week[name] for name in rows.names], axis=1)
    np.testing.assert_array_equal(rows.values, whole)


def test_every_version_is_listed_with_the_values_that_it_computes(golden_week):
    "A version that is not listed: see README; `write.py --versions` lists it if values are equal"
    table = measure.load('versions')
    found = measure.versions(measure.features(golden_week))
    assert sorted(found) == sorted(table)
    unlisted = {name: entry for name, entry in found.items() if entry not in table[name]}
    assert unlisted == {}


def test_one_changed_value_names_its_feature(golden_week):
    "A planted mistake: one value of one feature, in the last bit"
    changed = golden_week['prev_slack'].copy()
    at = np.flatnonzero(~np.isnan(changed))[0]
    changed[at] = np.nextafter(changed[at], np.float32(np.inf))
    found = measure.features({**golden_week, 'prev_slack': changed})
    assert set(measure.differences(measure.load('features'), found)) == {'prev_slack'}
    listed = measure.load('versions')
    of_parts = measure.versions(found)
    moved = {name for name, entry in of_parts.items() if entry not in listed[name]}
    assert moved == {'aircraft', 'feature set', 'feature set with its vocabularies'}


def test_one_changed_label_is_seen():
    "A planted mistake: one flight is late that was not"
    rows = adapter.training_set(*measure.TRAINING_SETS['July'])
    label = rows.label.copy()
    label[np.flatnonzero(label == 0)[0]] = 1
    found = measure.training_set(replace(rows, label=label))
    golden = measure.load('training_sets')['July']
    assert set(measure.differences(golden, found)) == {'label', 'late'}


def test_one_changed_score_is_seen():
    "A planted mistake: one score moves by a hundred-millionth"
    day = measure.SCORED_DAYS[0]
    scores = adapter.frozen_scores(day)['trees']
    scores[-1] += 1e-8
    golden = measure.load('scores')[day]['trees']
    assert set(measure.differences(golden, measure.tree_scores(scores))) == {'sha256'}


def test_a_version_that_computes_other_values_is_not_listed_by_itself():
    table = {'wind': [{'version': 'a', 'values': '1'}]}
    assert not add_versions(table, {'wind': {'version': 'b', 'values': '1'}}, anything=False)
    assert add_versions(table, {'wind': {'version': 'c', 'values': '2'}}, anything=False)
    assert [entry['version'] for entry in table['wind']] == ['a', 'b']
