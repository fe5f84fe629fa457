"""Edges of the monitor: a thin day, a column that is constant, empty, infinite or of a new kind

NannyML has an error of its own for most of them. What comes out here is a result that says so, or
one sentence.
"""

import numpy as np
import polars as pl
import pytest

from mlref.arguments import MlrefError
from mlref.core import DAY
from mlref.monitor import FEWEST_ROWS, METRICS, Monitor, estimate_day, find_alarms, realized_day
from small import make_table

TABLE = make_table(800)
RANDOM = np.random.default_rng(1)
P = np.clip(0.3 * TABLE.y + 0.7 * RANDOM.random(800), 0, 1).astype(float)
REFERENCE = pl.DataFrame(
    {
        'cutoff': TABLE.cutoff,
        'p': P,
        'y': TABLE.y,
        'wind': TABLE.X[:, 0],
        'shop': pl.Series(np.arange(800) % 3, dtype=pl.Int32),
        'trained_until': 0,
    }
)
TODAY = REFERENCE.filter(pl.col('cutoff') < DAY).drop('y', 'trained_until')
NO_WIND = pl.lit(None, pl.Float32).alias('wind')


@pytest.fixture(scope='module')
def watch():
    return Monitor(REFERENCE)


def values(rows: pl.DataFrame) -> dict[str, float | None]:
    "Measure -> its value"
    assert rows.schema == METRICS.columns
    return dict(rows.select('name', 'value').iter_rows())


DAYS = {
    'as ever': TODAY,
    'the fewest rows': TODAY.head(FEWEST_ROWS),
    'rows of one moment': TODAY.head(20).with_columns(cutoff=pl.lit(9, pl.Int64)),
    'one value': TODAY.with_columns(wind=pl.lit(1.0, pl.Float32)),
    'one score': TODAY.with_columns(p=pl.lit(0.5)),
    'scores of 0 and 1': TODAY.with_columns(p=(pl.col('p') > 0.5).cast(pl.Float64)),
    'scores of 0': TODAY.with_columns(p=pl.lit(0.0)),
    'far outside': TODAY.with_columns(wind=pl.lit(1e30, pl.Float32)),
    'no value': TODAY.with_columns(NO_WIND),
    'NaN': TODAY.with_columns(wind=pl.lit(np.nan, pl.Float32)),
    'hardly a value': TODAY.with_columns(
        wind=pl.when(pl.int_range(pl.len()) == 0).then(pl.col('wind'))
    ),
    'a new category': TODAY.with_columns(shop=pl.lit(77, pl.Int32)),
    'no category': TODAY.with_columns(shop=pl.lit(None, pl.Int32)),
    'another column': TODAY.with_columns(note=pl.lit('x')),
}


@pytest.mark.parametrize('rows', DAYS.values(), ids=DAYS)
def test_every_day_has_a_result(watch, rows):
    measured = values(estimate_day(watch, rows, 'v'))
    names = ('auc_estimated', 'drift:wind', 'missing:wind', 'drift:shop', 'missing:shop')
    assert tuple(measured) == names
    drifts = [measured['drift:wind'], measured['drift:shop']]
    assert all(0 <= drift <= 1 for drift in drifts)


@pytest.mark.parametrize('count', [1, 2, FEWEST_ROWS - 1])
def test_a_thin_day_says_how_thin(watch, count):
    rows = estimate_day(watch, TODAY.head(count), 'v')
    assert values(rows) == {'not_enough_rows': count}
    assert rows['low'].to_list() == [FEWEST_ROWS]
    week = pl.concat([rows.with_columns(day=pl.lit(day, pl.Int64)) for day in range(7)])
    assert list(find_alarms(week)) == ['not_enough_rows']
    labelled = REFERENCE.head(count)
    assert set(values(realized_day(watch, labelled, 'v'))) == {'auc', 'gap'}


WRONG_DAYS = {
    'no rows': (TODAY.head(0), 'score a day first'),
    'an infinite value': (TODAY.with_columns(wind=pl.lit(np.inf, pl.Float32)), 'in wind'),
    'two days': (REFERENCE.drop('y').head(150), 'got 2 days'),
    'no score': (TODAY.with_columns(p=pl.lit(None, pl.Float64)), 'outside or NaN'),
    'percentages': (TODAY.with_columns(pl.col('p') * 100), 'outside or NaN'),
    'no cut-off': (TODAY.with_columns(cutoff=pl.lit(None, pl.Int64)), 'missing'),
    'a feature less': (TODAY.drop('wind'), 'got wind not'),
    'codes as floats': (TODAY.cast({'shop': pl.Float32}), 'shop of the rows of a day as Int32'),
    'a frame of pandas': (TODAY.to_pandas(), 'polars.from_pandas'),
}


@pytest.mark.parametrize(('rows', 'words'), WRONG_DAYS.values(), ids=WRONG_DAYS)
def test_a_wrong_day_is_refused_in_words(watch, rows, words):
    with pytest.raises(MlrefError, match='^expected ') as caught:
        estimate_day(watch, rows, 'v')
    assert words in str(caught.value)


REFERENCES = {
    'a day of one row': REFERENCE.filter((pl.col('cutoff') >= DAY) | (pl.col('cutoff') == 0)),
    'a day of one outcome': REFERENCE.with_columns(
        y=pl.when(pl.col('cutoff') < DAY).then(0.0).otherwise('y')
    ),
    'fewer rows than bins': REFERENCE.gather_every(33),
    'one value': REFERENCE.with_columns(wind=pl.lit(1.0, pl.Float32)),
    'one score': REFERENCE.with_columns(p=pl.lit(0.5)),
    'scores of 0 and 1': REFERENCE.with_columns(p=(pl.col('p') > 0.5).cast(pl.Float64)),
    'labels as whole numbers': REFERENCE.cast({'y': pl.Int64}),
    'names of shops': REFERENCE.with_columns(pl.format('s{}', 'shop').alias('shop')),
    'a category with gaps': REFERENCE.with_columns(
        shop=pl.when(pl.col('shop') > 0).then(pl.col('shop'))
    ),
}


@pytest.mark.parametrize('reference', REFERENCES.values(), ids=REFERENCES)
def test_every_reference_is_learnt_from(reference):
    today = reference.filter(pl.col('cutoff') >= 7 * DAY).drop('y')
    measured = values(estimate_day(Monitor(reference), today, 'v'))
    assert 'auc_estimated' in measured or list(measured) == ['not_enough_rows']


@pytest.mark.parametrize('empty', [NO_WIND, pl.lit(np.nan, pl.Float32).alias('wind')])
@pytest.mark.parametrize('left', [(), ('shop',)])
def test_a_feature_that_never_had_a_value_has_no_drift_until_it_has_one(empty, left):
    watch = Monitor(REFERENCE.drop(left).with_columns(empty))
    today = TODAY.drop(left)
    dark = values(estimate_day(watch, today.with_columns(empty), 'v'))
    assert (dark['drift:wind'], dark['missing:wind']) == (None, 1)
    come = values(estimate_day(watch, today, 'v'))
    assert (come['drift:wind'], come['missing:wind']) == (1, 0)


WRONG_REFERENCES = {
    'no word how it was made': (REFERENCE.drop('trained_until'), 'says how it was made'),
    'in sample': (REFERENCE.with_columns(trained_until=pl.lit(DAY)), 'in-sample scores'),
    'a model of an unknown day': (
        REFERENCE.with_columns(trained_until=pl.lit(None, pl.Int64)),
        'in-sample scores',
    ),
    'random folds': (
        REFERENCE.with_columns(fold=pl.int_range(pl.len()) % 3),
        'deal whole days',
    ),
    'one fold': (REFERENCE.with_columns(fold=pl.lit(0)), 'deal whole days'),
    'no labels': (REFERENCE.drop('y'), 'got y not'),
    'a label that is not known': (
        REFERENCE.with_columns(y=pl.lit(None, pl.Float32)),
        'label is not known',
    ),
    'one outcome': (REFERENCE.with_columns(y=pl.lit(1.0)), 'both outcomes'),
    'an infinite value': (REFERENCE.with_columns(wind=pl.lit(-np.inf, pl.Float32)), 'in wind'),
    'a score of NaN': (REFERENCE.with_columns(p=pl.lit(np.nan)), 'outside or NaN'),
    'no rows': (REFERENCE.head(0), 'score a day first'),
    'three days': (REFERENCE.filter(pl.col('cutoff') < 3 * DAY), 'at least 7 days'),
    'cut-offs as times': (
        REFERENCE.with_columns(pl.from_epoch(pl.col('cutoff') * 60).alias('cutoff')),
        'cutoff of the reference as Int64',
    ),
}


@pytest.mark.parametrize(('reference', 'words'), WRONG_REFERENCES.values(), ids=WRONG_REFERENCES)
def test_a_wrong_reference_is_refused_in_words(reference, words):
    with pytest.raises(MlrefError, match='^expected ') as caught:
        Monitor(reference)
    assert words in str(caught.value)


@pytest.mark.parametrize('column', ['wind', 'shop'])
def test_values_of_a_feature_that_never_had_one_are_as_much_drift_as_their_end(column):
    dark = pl.lit(None, REFERENCE.schema[column]).alias(column)
    measured = {
        (before, now): estimate_day(Monitor(past), rows, 'v').filter(name=f'drift:{column}')
        for before, past in (('some', REFERENCE), ('none', REFERENCE.with_columns(dark)))
        for now, rows in (('some', TODAY), ('none', TODAY.with_columns(dark)))
    }
    found = {key: rows.select('value', 'high').row(0) for key, rows in measured.items()}
    assert found['none', 'some'] == found['some', 'none'] == (1.0, 0.0)
    assert found['none', 'none'] == (None, None)
    assert found['some', 'some'][0] < 0.5
