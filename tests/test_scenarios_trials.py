"""Candidates beside the champion: agreement of a refit, superiority of a change, and a kill

The world is that of `test_scenarios`. The champion is a logistic regression, which orders visits
well and is shy of saying .1 or .75; trees order them alike, and are not. So a gate that asks for
AUC is left undecided, and the log-loss of more days is not.
"""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import mlref.trials
from mlref.challenger import bootstrap
from mlref.core import DAY
from mlref.verdicts import ChangePolicy
from mlref.workspace import Workspace, deliver_events
from test_scenarios import (
    BEGIN,
    POLICY,
    QUIET,
    TASK,
    VISITS,
    actions,
    live,
    visits,
)

REFITS = replace(POLICY, refresh=9, confidence=0.75)
TRIED = 37  # the evening on which a change is tried, a fortnight after the first model
CHANGES = replace(
    QUIET,
    kind='gbm',
    level=0.99,
    refresh=TRIED - BEGIN + 1,
    change=ChangePolicy(patience=16, spread=0.05),
)
LAST = 57
SCORES = 'select day, p, version from trial_predictions order by day, entity_id'


def begin(folder, kind, events):
    workspace = Workspace(folder, TASK)
    deliver_events(workspace, events, BEGIN * DAY)
    bootstrap(workspace, replace(POLICY, kind=kind), BEGIN * DAY)
    workspace.close()
    return folder


def decided(workspace, events, end, policy):
    "Live to the end of a day; the decisions but the first, those of one evening by their action"
    return sorted(live(workspace, events, end, policy), key=lambda each: each[:2])


def reopen(folder, at):
    return Workspace(shutil.copytree(folder, at), TASK)


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A run whose champion is a logistic regression, at the morning of its first day"
    return begin(tmp_path_factory.mktemp('refits') / 'home', 'logistic', visits())


@pytest.fixture(scope='module')
def tried(begun, tmp_path_factory):
    "The same, on the evening on which a refit has passed its gates; the decision that says so"
    workspace = reopen(begun, tmp_path_factory.mktemp('tried') / 'home')
    found = []
    end = BEGIN
    while 'trial' not in actions(found):
        end += 1
        found = decided(workspace, visits(), end, REFITS)
    workspace.close()
    assert actions(found) == ['retrain', 'trial']
    return workspace.folder, end, found


def served_by(workspace, day):
    query = 'select distinct version from predictions where day = ?'
    return workspace.lake.sql(query, day)['version'].to_list()


def test_a_refit_is_shadowed_for_a_day_and_promoted(tried, tmp_path):
    folder, end, before = tried
    workspace = reopen(folder, tmp_path / 'home')
    found = decided(workspace, visits(), end + 2, REFITS)
    day, action, _, evidence = found[len(before)]
    begins = before[-1][3]
    assert (day, action, evidence['days']) == (end, 'promote', 1)
    assert evidence['version'] == begins['version'] and evidence['judged']
    names = [gate['name'] for gate in evidence['gates']]
    assert names[-4:] == [
        'answers_all',
        'answers_probabilities',
        'level_as_champion',
        'order_as_champion',
    ]
    # the champion answered on that day, the candidate was written down beside it
    assert served_by(workspace, end) == [begins['instead_of']]
    assert served_by(workspace, end + 1) == [evidence['version']]
    scores = workspace.lake.sql(SCORES)
    asked = workspace.lake.sql('select count(*) as n from predictions where day = ?', end)['n'][0]
    assert (scores['day'].unique().to_list(), scores.height) == ([end], asked)
    assert scores['version'].unique().to_list() == [evidence['version']]
    workspace.close()


class Spoilt:
    "A model that answers otherwise than it was registered"

    def __init__(self, model, answer):
        self.model = model
        self.answer = answer
        self.version = model.version

    def predict(self, X):
        return self.answer(self.model.predict(X))


def answer_nan(p):
    return np.where(np.arange(len(p)) == 7, np.nan, p)


def answer_shifted(p):
    return 0.7 + 0.3 * p


def answer_alike(p):
    return np.full(len(p), p.mean())


def answer_few(p):
    return p[:-1]


def answer_nothing(p):
    raise ValueError('expected another shape')


@pytest.mark.parametrize(
    ('answer', 'gate'),
    [
        (answer_nan, 'answers_probabilities'),
        (answer_shifted, 'level_as_champion'),
        (answer_alike, 'order_as_champion'),
        (answer_few, 'answers_all'),
        (answer_nothing, 'answers_all'),
    ],
)
def test_a_refit_that_answers_nonsense_is_refused_and_the_champion_serves_on(
    tried, tmp_path, monkeypatch, answer, gate
):
    folder, end, before = tried
    load = mlref.trials.load_version
    monkeypatch.setattr(mlref.trials, 'load_version', lambda *given: Spoilt(load(*given), answer))
    workspace = reopen(folder, tmp_path / 'home')
    found = decided(workspace, visits(), end + 2, REFITS)[len(before) :]
    day, action, why, evidence = found[0]
    assert (day, action, why.split(':')[0]) == (end, 'refuse', gate)
    assert answer is not answer_nothing or 'expected another shape' in why
    assert [gate['passed'] for gate in evidence['gates']].count(False) == 1
    assert served_by(workspace, end + 1) == [before[-1][3]['instead_of']]
    workspace.close()


def test_without_shadow_days_a_refit_is_promoted_on_the_evening_it_passed(begun, tmp_path, tried):
    _, end, _ = tried
    workspace = reopen(begun, tmp_path / 'home')
    found = decided(workspace, visits(), end, replace(REFITS, shadow_days=0))
    assert actions(found) == ['promote', 'retrain']
    assert not workspace.lake.sql(SCORES).height
    workspace.close()


WORLD = visits(60)


@pytest.fixture(scope='module')
def unchanged(tmp_path_factory):
    "A run at the morning of its first day, in the world of the changes"
    return begin(tmp_path_factory.mktemp('changes') / 'home', 'logistic', WORLD)


def try_change(folder, at, policy):
    "Live until a change is tried, which is neither better nor worse so far"
    workspace = reopen(folder, at)
    found = decided(workspace, WORLD, TRIED + 1, policy)
    workspace.close()
    assert [(day, action) for day, action, *_ in found] == [(TRIED, 'retrain'), (TRIED, 'trial')]
    failed = [gate['name'] for gate in found[1][3]['gates'] if not gate['passed']]
    assert failed == ['better_than_champion']
    assert 'shows a true gain of' in str(found[1][3]['gates'])
    assert found[1][3]['terms']['patience'] == policy.change.patience
    return at


@pytest.fixture(scope='module')
def undecided(unchanged, tmp_path_factory):
    "A run on the evening on which trees are tried"
    return try_change(unchanged, tmp_path_factory.mktemp('undecided') / 'home', CHANGES)


def test_a_change_that_is_better_is_promoted_by_the_sequence_after_its_refit(undecided, tmp_path):
    workspace = reopen(undecided, tmp_path / 'home')
    found = decided(workspace, WORLD, LAST, CHANGES)[2:]
    (shown, refit, _, evidence), (promoted, last, _, final) = found[:2]
    assert (refit, last) == ('trial', 'promote')
    # twelve days with labels at least, of which the last is a day old; then a day of the refit
    assert TRIED + 13 <= shown <= TRIED + 17 and promoted == shown + 1
    gates = {gate['name']: gate for gate in evidence['gates']}
    assert gates['better_day_by_day']['passed']
    assert f'{shown - TRIED - 1} days' in gates['better_day_by_day']['why']
    assert 'refit_as_judged_on_holdout' in gates and 'better_than_champion' not in gates
    assert evidence['terms']['test'] == 'agreement'
    assert evidence['judged'] != evidence['version'] == final['version']
    assert served_by(workspace, LAST - 1) == [final['version']]
    workspace.close()


def test_a_change_that_is_not_refitted_is_promoted_as_it_was_tried(undecided, tmp_path):
    workspace = reopen(undecided, tmp_path / 'home')
    found = decided(workspace, WORLD, LAST, replace(CHANGES, refit=False))
    begins, ends = found[1], found[2]
    assert (begins[1], ends[1]) == ('trial', 'promote')
    assert ends[3]['version'] == begins[3]['version'] and ends[3]['days'] >= 13
    assert served_by(workspace, LAST - 1) == [begins[3]['version']]
    workspace.close()


def test_a_change_that_is_not_shown_to_be_better_in_time_is_refused(unchanged, tmp_path):
    "Five days are too few for any sequence of these terms, so it goes on until they are over"
    short = replace(CHANGES, change=ChangePolicy(patience=5))
    workspace = Workspace(try_change(unchanged, tmp_path / 'home', short), TASK)
    eager = replace(short, refresh=1, cooldown=1)  # while it goes on no other is trained
    found = decided(workspace, WORLD, TRIED + 7, eager)[2:]
    assert [(day, action) for day, action, *_ in found] == [(TRIED + 6, 'refuse')]
    assert found[0][2].startswith('better_day_by_day: not shown: ') and ' 5 days' in found[0][2]
    scores = workspace.lake.sql(SCORES)
    assert scores['day'].unique().sort().to_list() == [*range(TRIED + 1, TRIED + 7)]
    assert scores['version'].n_unique() == 1 and scores.height > 5 * VISITS
    workspace.close()


def test_a_person_is_asked_at_the_end_of_a_trial(tried, tmp_path):
    folder, end, before = tried
    workspace = reopen(folder, tmp_path / 'home')
    asking = replace(REFITS, approval=True, approval_days=2, silence='promote')
    found = decided(workspace, visits(), end + 3, asking)[len(before) :]
    assert [(day, action) for day, action, *_ in found] == [(end, 'wait'), (end + 2, 'promote')]
    assert found[1][3]['gates'][-1]['name'] == 'approved'
    workspace.close()


DIES = """
import os, signal, sys
from pathlib import Path
import mlref.lifecycle
from mlref.workspace import Workspace
import test_scenarios_trials as trials
from test_scenarios import TASK, live

folder, day = Path(sys.argv[1]), int(sys.argv[2])
commit = mlref.lifecycle.insert_rows

def commit_or_die(lake, tables):
    if tables['days']['day'][0] == day:
        os.kill(os.getpid(), signal.SIGKILL)
    commit(lake, tables)

mlref.lifecycle.insert_rows = commit_or_die
live(Workspace(folder, TASK), trials.WORLD, trials.LAST, trials.CHANGES)
"""


def test_killed_in_a_trial_and_resumed_it_decides_the_same(undecided, tmp_path):
    "Once in the middle, once on the evening that fits again, before the day is committed"
    whole = reopen(undecided, tmp_path / 'whole')
    decisions = decided(whole, WORLD, LAST, CHANGES)
    killed = shutil.copytree(undecided, tmp_path / 'killed')
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])
    fitted = next(day for day, action, *_ in decisions if action == 'trial' and day > TRIED)
    for day in (TRIED + 6, fitted):
        words = [sys.executable, '-c', DIES, str(killed), str(day)]
        process = subprocess.run(
            words, env={**os.environ, 'PYTHONPATH': path}, capture_output=True, text=True
        )
        assert process.returncode == -signal.SIGKILL, process.stderr[-2000:]
    again = Workspace(killed, TASK)
    assert decided(again, WORLD, LAST, CHANGES) == decisions
    for query in (SCORES, 'select id from decisions order by id'):
        assert again.lake.sql(query).equals(whole.lake.sql(query))
    for workspace in (whole, again):
        workspace.close()


def test_a_feed_that_stops_is_said_once_and_nothing_is_trained(begun, tmp_path):
    "Till reports come each hour until day 29, and again from day 36 on; a refit is due on day 32"
    schema = replace(TASK.schema, kinds=('visit', 'end', 'report'))
    task = replace(TASK, schema=schema, max_feed_lag=TASK.max_feed_lag | {'report': 240})
    hours = np.arange(0, 40 * DAY, 60)
    hours = hours[(hours < 29 * DAY) | (hours >= 36 * DAY)]
    ids = [f'r{hour}' for hour in hours]
    reports = pl.DataFrame({'event_id': ids, 'visit': ids, 'event_time': hours})
    reports = reports.with_columns(kind=pl.lit('report'), known_time='event_time')
    both = pl.concat([visits(), reports], how='diagonal')
    events = both.cast(pl.Schema(schema.columns)).sort('known_time', 'event_id')
    workspace = Workspace(shutil.copytree(begun, tmp_path / 'home'), task)
    found = decided(workspace, events, 38, replace(QUIET, refresh=9))
    workspace.close()
    assert [(day, action, why) for day, action, why, _ in found][:1] == [
        (32, 'alarm', 'challenge postponed')
    ]
    assert 'report has stopped while days judged' in found[0][3]['found']
    assert [action for _, action, *_ in found].count('alarm') == 1
    # it is tried each evening: on the one of the day on which reports come again
    assert [day for day, action, *_ in found if action == 'retrain'] == [36]
