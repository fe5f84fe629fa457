"""Nothing, one row, a column without a value, an infinite one: every plot, table and report answers

Either it is drawn or counted, or one sentence says what is missing; no error of NumPy or Polars.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from typing import Any

import matplotlib as mpl
import numpy as np
import polars as pl
import pytest

from mlref import (
    ab_test,
    alarm_scores,
    alarms,
    capacity,
    checks,
    compress,
    cost,
    count_metrics,
    diagnosis,
    evaluate,
    hindsight,
    monitor,
    report,
    results,
    run_report,
    sketches,
    slices,
    watch,
    workspace,
)
from mlref.arguments import MlrefError
from mlref.core import Calendar
from mlref.rollout_state import ROW_TYPES, pair_scores

mpl.use('Agg')
NONE = np.zeros(0)
ONE = np.ones(1)
DAYS = np.zeros(0, np.int64)


def table(schema: Any, *rows: tuple) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict(schema), orient='row')


METRICS = monitor.METRICS.columns
DECISIONS = workspace.DECISIONS.columns
MEASURED = monitor.metric_rows([monitor.Measurement('auc', 0.7, low=0.6)], 1440, 'v', 9, 0)
NAN = monitor.metric_rows([monitor.Measurement('auc', float('nan'))], 1440, 'v', 9, 0)
QUALITY = {
    'measured_at': pl.Int64,
    'name': pl.String,
    'action': pl.String,
    'of_rows': pl.Int64,
    'broken': pl.Int64,
}
LOAD = capacity.LoadStep(users=1, rate=10.0, p50=1.0, p99=2.0, errors=0, memory=100.0)
RULE = alarms.AlarmRule('a', 'auc', 'falls', alarms.Baseline(0.0, 1.0, 9), alarms.Cusum())
SERIES = table(alarms.ALARM_COLUMNS)
TOTALS = alarm_scores.DAY_TOTALS
FIRST = date(2013, 1, 1)
REFERENCE = pl.DataFrame(
    {
        'p': [0.1, 0.9] * 50,
        'y': [0.0, 1.0] * 50,
        'a': [1.0, 2.0] * 50,
        'c': ['x', None] * 50,
        'dark': pl.Series([None] * 100, dtype=pl.String),
        'void': pl.Series([None] * 100, dtype=pl.Float64),
    }
)
BLOCKS = np.repeat(np.arange(10), 10)
FITTED = count_metrics.fit_reference(REFERENCE, BLOCKS, ('a', 'c', 'dark', 'void'))
PREDICTED = pl.DataFrame({'id': [1, 2], 'p': [0.1, 0.2]})
SERVED = ab_test.ServedScores(DAYS, np.zeros(0, '<U1'), NONE, NONE, DAYS)
MACHINE = cost.MachineType('m', cores=1, memory=2.0, hour=0.0)
WORK = cost.Workload(worker_rate=10.0, worker_memory=0.1)
FREE = cost.Prices(core_hour=0.0, disk=0.0, network=0.0)
PAIRS = table({**ROW_TYPES, 'shadow': pl.Boolean})


def count(**columns: Any) -> sketches.Sketch:
    return sketches.count_rows(REFERENCE.with_columns(**columns), FITTED.bins)


CASES: dict[str, Callable[[], Any]] = {
    'load of no step': lambda: capacity.plot_load([]),
    'load of one step': lambda: capacity.plot_load([LOAD]),
    'a rate of no step': lambda: cost.sustained_rate([], 5),
    'growth of nothing': lambda: cost.plot_growth([]),
    'levers of what costs nothing': lambda: cost.compare_levers(WORK, [MACHINE], FREE, 1.0, 1.0),
    'reliability of no model': lambda: evaluate.plot_reliability(NONE, {}),
    'reliability of no row': lambda: evaluate.plot_reliability(NONE, {'a': NONE}),
    'reliability of one row': lambda: evaluate.plot_reliability(ONE, {'a': ONE / 2}),
    'slices, none': lambda: slices.plot_slices(table(slices.SLICE_METRICS)),
    'differences, none': lambda: slices.plot_slices(table(slices.SLICE_DIFFERENCES)),
    'differences, not known': lambda: slices.plot_slices(
        table(slices.SLICE_DIFFERENCES, ('half', 'low', 200, None, None, None))
    ),
    'origins of no model': lambda: slices.plot_rolling_origin({}),
    'origins, none': lambda: slices.plot_rolling_origin({'a': table(slices.SLICE_METRICS)}),
    'a run without a day': lambda: run_report.plot_run(table(METRICS), table(DECISIONS)),
    'a run of a day': lambda: run_report.plot_run(MEASURED, table(DECISIONS)),
    'a run without a number': lambda: run_report.plot_run(NAN, table(DECISIONS)),
    'no engine': lambda: compress.plot_engines([]),
    'an engine of none': lambda: compress.select_engine([]),
    'checks, none': lambda: checks.plot_quality(table(QUALITY)),
    'checks, one': lambda: checks.plot_quality(table(QUALITY, (5, 'a', 'warn', None, 1))),
    'rules, one': lambda: checks.plot_quality(table(QUALITY, (5, 'a', 'warn', 10, 1))),
    'a report of nothing': lambda: report.render_report('', [], []),
    'a series of no day': lambda: alarms.raise_alarms(SERIES, [RULE]),
    'alarms without a rule': lambda: alarms.raise_alarms(SERIES, []),
    'a baseline of no day': lambda: alarms.fit_baseline(NONE),
    'a baseline of one day': lambda: alarms.fit_baseline(ONE),
    'seasons without a rule': lambda: alarms.first_alarms([], []),
    'no season': lambda: alarms.first_alarms([RULE], [np.zeros((0, 5))]),
    'seasons of no day': lambda: alarms.first_alarms([RULE], [np.zeros((5, 0))]),
    'a limit of no season': lambda: alarms.limit_for(RULE, np.zeros((0, 5)), 0.1),
    'a limit of no day': lambda: alarms.limit_for(RULE, np.zeros((5, 0)), 0.1),
    'detection without a day': lambda: alarms.detection([RULE], SERIES, np.zeros((2, 3), int)),
    'a surprise of no day': lambda: alarms.with_surprise(SERIES),
    'harm of no day': lambda: alarm_scores.harm_ahead(table(TOTALS)),
    'harm of a day': lambda: alarm_scores.harm_ahead(table(TOTALS, (FIRST, 0.2, 0.3, 9))),
    'scores of no alarm': lambda: alarm_scores.score_alarms([], table(alarm_scores.HARM)).precision,
    'watched metrics, none': lambda: watch.watched_metrics(table(METRICS)),
    'rung alarms, none': lambda: watch.rung_alarms(table(METRICS), [RULE], 0),
    'surprises of no row': lambda: watch.surprises(NONE, NONE),
    'a reference of no row': lambda: count_metrics.fit_reference(
        REFERENCE.head(0), BLOCKS[:0], ('a',)
    ),
    'a reference of one row': lambda: count_metrics.fit_reference(
        REFERENCE.head(1), BLOCKS[:1], ('a',)
    ),
    'a diagnosis of columns without a value': lambda: diagnosis.diagnose(FITTED, count()),
    'a shift of a feed that was dark': lambda: [
        diagnosis.find_shift(FITTED, count(), name) for name in FITTED.bins.edges
    ],
    'a diagnosis of no row': lambda: diagnosis.diagnose(FITTED, sketches.empty_sketch(FITTED.bins)),
    'an evening of one row': lambda: watch.diagnose_evening(
        REFERENCE.select('p', 'y', 'a', 'c'), BLOCKS, REFERENCE.head(1).select('p', 'a', 'c')
    ),
    'metrics of no day': lambda: count_metrics.metrics_table(FITTED, {}),
    'metrics of a day in seconds': lambda: count_metrics.metrics_table(
        FITTED, {1_600_000_000: count()}
    ),
    'metrics of a day in words': lambda: count_metrics.metrics_table(FITTED, {'Monday': count()}),
    'groups of no row': lambda: sketches.count_groups(REFERENCE.head(0), BLOCKS[:0], FITTED.bins),
    'ids of another type': lambda: sketches.label_predictions(
        PREDICTED, pl.DataFrame({'id': ['1'], 'y': [1]})
    ),
    'labels, none and untyped': lambda: sketches.label_predictions(
        PREDICTED, pl.DataFrame({'id': [], 'y': []})
    ),
    'labels in words': lambda: sketches.label_predictions(
        PREDICTED, pl.DataFrame({'id': [1], 'y': ['late']})
    ),
    'labels in words to count': lambda: count(y=pl.lit('late')),
    'labels in words to add': lambda: sketches.count_labels(
        REFERENCE.with_columns(y=pl.lit('late')), FITTED.bins
    ),
    'lists to count': lambda: count(c=pl.concat_list('a')),
    'scores in words': lambda: count(p=pl.lit('x')),
    'no score': lambda: count(p=pl.lit(None, pl.Float64)),
    'values that no float can cut': lambda: sketches.freeze_bins(
        pl.DataFrame({'a': [1e17] * 5}), ('a',)
    ),
    'an A/B test of no row': lambda: ab_test.read_ab_test(
        SERVED, {'a': 0.5, 'b': 0.5}, Calendar(), 0, 9
    ),
    'weeks of no row': lambda: hindsight.weekly_gaps(NONE, NONE, DAYS, 0),
    'an oracle of no row': lambda: hindsight.weekly_oracle([], {}, NONE, DAYS, 0),
    'deployments, none': lambda: hindsight.replay_deployments({}, [], DAYS),
    'pairs of no row': lambda: pair_scores(
        PAIRS, table({'entity_id': pl.String, 'y': pl.Float64, 'label_time': pl.Int64})
    ),
    'pairs whose ids cannot meet': lambda: pair_scores(
        PAIRS, table({'entity_id': pl.Int64, 'y': pl.Float64, 'label_time': pl.Int64})
    ),
}


@pytest.mark.parametrize('act', CASES.values(), ids=CASES)
@pytest.mark.filterwarnings('ignore')
def test_nothing_is_an_answer_or_a_sentence(act):
    try:
        found = act()
    except MlrefError as error:
        assert str(error).startswith('expected ') and len(str(error)) < 400
        return
    if hasattr(found, 'savefig'):
        found.savefig(io.BytesIO())
        mpl.pyplot.close(found)


def test_a_card_of_no_result_says_so(tmp_path):
    assert '0 of 0 goals' in results.render_card(tmp_path)
    assert str(report.plot_section(tmp_path / 'none.png', None, None)) == ''


def test_one_infinite_day_does_not_end_a_series():
    values = np.array([1.0, np.inf, 2.0, 3.0, -np.inf, 4.0, 5.0])
    assert alarms.trailing_mean(values, 2).tolist()[-1] == 4.5
    falling = np.r_[np.zeros(9), np.inf, np.full(40, -3.0)]
    for window in (1, 7):
        rule = replace(RULE, window=window)
        assert (rule.statistic(falling)[-9:] >= rule.detector.limit).all()


def test_days_without_rows_are_not_harm():
    empty = [(date(2013, 1, day), 0.2, 0.9, 0) for day in (1, 2, 3)]
    found = alarm_scores.harm_ahead(table(TOTALS, *empty), days=1)
    assert found['harmed'].to_list() == [None, None, None]
    assert alarm_scores.harm_episodes(found) == []


@pytest.mark.parametrize('day', [1_600_000_000, 22_744_800, -1, 15_796.0, True])
def test_a_day_of_another_unit_is_refused(day):
    with pytest.raises(MlrefError, match='expected a day since 1970-01-01'):
        count_metrics.metrics_table(FITTED, {day: count()})


SPOILT = {
    'a score above 1': {'score': np.array([0.1, 1.5])},
    'a score that is none': {'score': np.array([0.1, np.nan])},
    'more positives than labels': {'positive': np.array([51, 50])},
    'counts that are no whole numbers': {'n': np.array([50.0, 50.0])},
}


@pytest.mark.parametrize('change', SPOILT.values(), ids=SPOILT)
def test_a_sketch_that_nobody_can_have_counted_is_refused(change):
    whole = count()
    assert sketches.decode_sketch(sketches.encode_sketch(whole)).rows == 100
    odd = replace(whole, scores=replace(whole.scores, **change))
    with pytest.raises(MlrefError, match='damaged or something else'):
        sketches.decode_sketch(sketches.encode_sketch(odd))


@pytest.mark.parametrize('rows', [{'a': 1.5}, {'a': -1}, {'a': True}, {'a': None}])
def test_a_sketch_with_odd_counts_of_rows_is_refused(rows):
    odd = replace(count(), missing={**count().missing, **rows})
    with pytest.raises(MlrefError, match='damaged or something else'):
        sketches.decode_sketch(sketches.encode_sketch(odd))
