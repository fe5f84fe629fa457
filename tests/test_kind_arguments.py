"""Wrong arguments: each gives one sentence, or the right answer, and never another exception

For every public function that is listed in `CALLS` each frame, array, number, text and tuple is
replaced by wrong ones of its kind: a text for a number, a list for an array, a lazy frame, a column
under another name. An object of a class of the library is what the type checker asks for. Public
functions that are not tried stand in `EXEMPT`, each with the reason; there is no third group.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mlref import (
    arguments,
    calibration,
    confidence,
    core,
    evaluate,
    events,
    features,
    gates,
    guardrails,
    monitor,
    rollout,
    route,
    slices,
    sources,
)
from mlref.arguments import MlrefError
from mlref.calibration import Calibration, CalibrationPolicy
from mlref.contracts import Rule
from mlref.core import DAY, Calendar, TrainingSet
from mlref.evaluate import Estimate
from mlref.lifecycle import Stretch
from mlref.model import EnsemblePredictor, LightGBMPredictor, check_rows, score_rows
from mlref.monitor import AlarmPolicy, Measurement
from mlref.offline import point_in_time_join
from mlref.own_model import OwnModel, onnx_model, sklearn_model
from mlref.policy import RetrainPolicy, make_decision, retrain_reason
from mlref.recipes import cross_fit_folds, epochs_for, fit_lightgbm, fit_recipe, out_of_fold_scores
from mlref.registry import Registry, TrainingRun, register_model
from mlref.schema import EVENT_COLUMNS, EventSchema, TableSchema, check_frame
from mlref.task import Task, check_task, load_task, read_labels, select_requests, vector_task
from mlref.train import day_blocks, validate_tables
from mlref.training_set import corrupt_future, find_leaks, training_set
from mlref.training_state import TrainConfig
from small import (
    ROWS,
    SALES,
    SCHEMA,
    SHOP,
    TASK,
    WEEK,
    find_labels,
    make_events,
    make_table,
)

LIBRARY = Path(arguments.__file__).parent
EVENTS = make_events()
TABLE = make_table()
DAY_OF = np.asarray(TABLE.day)
Y = TABLE.y.astype(float)
RANDOM = np.random.default_rng(0)
P = RANDOM.random(ROWS)
Q = RANDOM.random(ROWS)
CUTS = {'half': np.where(Q < 0.5, 'low', 'high')}
SCORED = {'p': P, 'y': Y, 'cutoff': TABLE.cutoff, 'label_time': TABLE.label_time}
PAIRED = confidence.PairedScores(TABLE.cutoff, P, Q, Y, TABLE.label_time)
MAP = Calibration(shift=0.1, slope=1.0, since=0, until=9, known=9, n=4)
REFERENCE = pl.DataFrame({'cutoff': TABLE.cutoff, 'p': P, 'y': Y, 'a': TABLE.X[:, 0]})
REFERENCE = REFERENCE.with_columns(trained_until=pl.lit(0))
METRICS = monitor.metric_rows([Measurement('auc', 0.7, low=0.6)], 1440, 'v', 9, 0)
DIFFERENCES = pl.DataFrame(
    [('half', 'low', 200, 0.01, -0.01, 0.02)], schema=slices.SLICE_DIFFERENCES, orient='row'
)


def half(names: tuple[str, ...] = ('a', 'b'), until: int = 9) -> OwnModel:
    "A model that says .5"
    return OwnModel('half', lambda X: np.full(len(X), 0.5), {'half': b'1/2'}, names, until)


@dataclass(frozen=True)
class Call:
    "A public function with arguments that are right"

    function: Callable[..., Any]
    given: dict[str, Any]
    kept: tuple[str, ...] = field(default=())  # arguments that may be anything


def call(function: Callable[..., Any], *kept: str, **given: Any) -> Call:
    return Call(function, given, kept)


def of(module: Any, *names: str, **given: Any) -> list[Call]:
    "Several functions of a module with the same arguments"
    return [Call(getattr(module, name), given) for name in names]


TIME = [0.0]  # of a clock that only moves when somebody sleeps


def now() -> float:
    return TIME[0]


def forward(seconds: float) -> None:
    TIME[0] += max(seconds, 60)


PAIR = {'y': Y, 'challenger': P, 'champion': Q}
CALLS = [
    # core
    call(Calendar, day_begins=0, horizon=120, label_delay=60),
    call(
        TrainingSet,
        'categories',
        **{name: getattr(TABLE, name) for name in ('ids', 'cutoff', 'label_time', 'y', 'X')},
        names=('a', 'b'),
        categories={},
        calendar=Calendar(),
    ),
    call(core.known_by, table=TABLE, cutoff=9),
    call(core.mature_by, table=TABLE, now=9),
    call(core.split_early_stopping, past=TABLE, end=8 * DAY, days=2),
    call(core.stopping_edge, calendar=Calendar(), end=8 * DAY, days=2),
    call(core.check_predictor, model=half(), X=TABLE.X),
    # schema
    call(EventSchema, 'payload', payload={'a': pl.Int64}, kinds=('k',), entity_id='a'),
    call(TableSchema, 'columns', name='days', columns={'day': pl.Int64}, primary_key=('day',)),
    call(check_frame, 'columns', 'name', frame=EVENTS, columns=EVENT_COLUMNS, name='events'),
    # events
    call(events.sort_events, events=EVENTS, schema=SCHEMA),
    call(events.disturb_delivery, events=EVENTS, seed=0, late=0.1, minutes=9, twice=0.1),
    call(
        events.replay, 'clock', 'sleep', events=EVENTS, speed=float('inf'), sleep=forward, clock=now
    ),
    call(events.drop_feed, events=EVENTS, kind='end', start=9, schema=SCHEMA),
    call(events.encode_events, events=EVENTS, schema=SCHEMA),
    call(events.events_between, events=EVENTS, start=0, end=99),
    # contracts
    call(Rule, name='dear', holds=pl.col('price') > 1, kinds=('visit',), max_rows=1, max_share=0.1),
    # features
    call(features.Entity, name='shop', keys=('shop',)),
    call(
        features.Source,
        'values',
        name='sales',
        values={'price': 'cent'},
        rows=SALES.rows,
        columns=('shop',),
    ),
    call(sources.read_source, events=EVENTS, source=SALES),
    call(
        sources.from_table,
        'values',
        name='t',
        known='known_time',
        keys=('shop',),
        values={'a': ''},
    ),
    call(
        features.FeatureView,
        name='week',
        entity=SHOP,
        source=SALES,
        stats=('count',),
        windows=(60,),
        ahead=0,
        ttl=None,
    ),
    call(features.OnDemand, name='n', outputs=('a',), make=max, inputs=('b',), reads=('c',)),
    call(features.FeatureSet, name='visits', views=(WEEK,), only=WEEK.names),
    # task, offline, training set
    call(
        Task,
        **{name: value for name, value in vars(TASK).items() if name not in ('lookups', 'address')},
    ),
    call(vector_task, name='tumours', columns=('radius', 'texture'), entity='sample'),
    call(select_requests, task=TASK, events=EVENTS, start=0, end=DAY),
    call(read_labels, 'now', task=TASK, events=EVENTS, now=DAY),
    call(check_task, task=TASK, events=EVENTS),
    call(load_task, address='small:TASK'),
    call(
        point_in_time_join,
        requests=EVENTS.filter(kind='visit').select('shop', cutoff='known_time').head(9),
        views=(WEEK,),
        events=EVENTS,
        engine='numpy',
    ),
    call(training_set, events=EVENTS, task=TASK, start=0, end=DAY),
    call(corrupt_future, events=EVENTS, cutoff=9, schema=SCHEMA),
    call(find_leaks, events=EVENTS, task=TASK, cutoffs=[9]),
    # models
    call(check_rows, 'names', X=TABLE.X, names=('a', 'b')),
    call(score_rows, 'names', score=half().score, X=TABLE.X, names=('a', 'b')),
    call(
        OwnModel,
        'score',
        kind='half',
        score=half().score,
        files={'half': b'1'},
        names=('a',),
        trained_until=9,
    ),
    call(half().predict, X=TABLE.X),
    call(TrainConfig, seed=0, epochs=1, batch=8, rate=0.1, decay=0.0, half=False, patience=0),
    call(day_blocks, table=TABLE, k=2),
    call(validate_tables, fit=TABLE, stop=TABLE, targets=P),
    call(fit_recipe, kind='gbm', fit=TABLE, stop=TABLE, seed=0),
    call(fit_lightgbm, fit=TABLE, stop=TABLE, seed=0, trees=2, rate=0.1, leaves=4, bins=8),
    call(epochs_for, n=9),
    call(cross_fit_folds, table=TABLE, k=2),
    call(out_of_fold_scores, kind='gbm', table=TABLE, k=2, seed=0),
    # evaluate
    *of(evaluate, 'auc', 'log_loss', 'brier', 'average_precision', y=Y, p=P),
    *of(evaluate, 'reliability_table', 'ece', y=Y, p=P, groups=5),
    call(evaluate.check_scores, y=Y, p=P),
    call(evaluate.within_day_auc, y=Y, p=P, day=DAY_OF),
    call(evaluate.calibrated_ece, p=P, groups=5, n=3, seed=0),
    call(
        evaluate.decision_cost, y=Y, p=P, thresholds=np.array([0.1, 0.9]), false_alarm=1.0, miss=5.0
    ),
    call(evaluate.cheapest_threshold, y=Y, p=P, false_alarm=1.0, miss=5.0),
    call(evaluate.draw_days, day=DAY_OF, n=3, seed=0),
    call(evaluate.day_bootstrap, score=len, day=DAY_OF, n=3, seed=0),
    call(evaluate.percentile_interval, values=P, level=0.9),
    call(evaluate.paired_difference, **PAIR, day=DAY_OF, n=3, seed=0),
    call(evaluate.paired_auc_difference, **PAIR, day=DAY_OF, n=3, seed=0, level=0.9),
    call(evaluate.day_aucs, y=Y, p=P, day=DAY_OF, draws=evaluate.draw_days(DAY_OF, 3)),
    call(evaluate.delong_interval, **PAIR, deviations=2.0),
    call(evaluate.swap_by_day, challenger=P, champion=Q, day=DAY_OF, seed=0),
    # slices
    call(slices.find_slices, y=Y, cuts=CUTS),
    call(slices.slice_metrics, y=Y, p=P, day=DAY_OF, cuts=CUTS, n=3, seed=0),
    call(slices.compare_models, test=TABLE, challenger=P, champion=Q, cuts={}, n=3, seed=0),
    call(
        slices.rolling_origin,
        train=lambda past, stop: half(until=0),
        rows=TABLE,
        edges=[4 * DAY, 6 * DAY, 8 * DAY],
        stop_days=1,
    ),
    # calibration
    call(calibration.apply_calibration, p=P, shift=0.0, slope=1.0),
    call(MAP.apply, p=P),
    call(CalibrationPolicy, calendar=Calendar(), weeks=3, l2=10.0),
    call(calibration.fit_calibration, **SCORED, at=8 * DAY, policy=CalibrationPolicy()),
    call(calibration.trailing_calibration, **SCORED, policy=CalibrationPolicy()),
    # gates
    call(gates.trained_before_judged, trained_until=9, judged_from=9),
    call(gates.no_leak, rows=TABLE, judged_from=9),
    call(gates.mature_labels, 'what', what='training', rows=TABLE, as_of=9 * DAY),
    call(gates.label_age_skew, rows=TABLE, as_of=9 * DAY),
    call(gates.no_age_skew, 'what', what='training', rows=TABLE, as_of=9 * DAY, limit=0.1),
    call(gates.is_fresh, 'what', what='labels', newest=5, decided_at=9, max_age=9),
    call(gates.better_than_champion, difference=Estimate(0.1, 0.0, 0.2), level=0.9),
    call(gates.well_calibrated, **PAIR, gap=0.1),
    call(gates.no_slice_worse, differences=DIFFERENCES),
    call(gates.parity, served=P, trained=P, limit=0.1),
    call(gates.latency_within, 'record', ms=1.0, record='engines', limit=5.0),
    call(gates.size_within, size=9, limit=9),
    call(gates.no_serving_skew, served=P, rebuilt=P),
    # monitor, policy, lifecycle
    call(
        monitor.monitored_columns, X=TABLE.X, names=('a', 'b'), monitored=('a',), categorical=('b',)
    ),
    call(monitor.control_limits, values=P),
    call(monitor.realized_per_day, day=DAY_OF, y=Y, p=P),
    call(monitor.metric_rows, 'version', measurements=[], measured_at=9, version='v', n=1, day=0),
    call(monitor.find_alarms, metrics=METRICS, policy=AlarmPolicy()),
    call(AlarmPolicy, out=4, of=7),
    call(RetrainPolicy, **{**vars(RetrainPolicy()), 'kind': 'gbm'}),
    call(
        make_decision,
        'why',
        day=1,
        action='alarm',
        why='late',
        evidence={},
        calendar=Calendar(),
    ),
    call(
        retrain_reason,
        'alarms',
        alarms={},
        last_attempt=1,
        first_model=0,
        day=9,
        policy=RetrainPolicy(),
    ),
    call(Stretch, start=0, end=9, served=0),
    # routing and rollout
    call(
        confidence.PairedScores,
        cutoff=TABLE.cutoff,
        champion=P,
        candidate=Q,
        y=Y,
        label_time=TABLE.label_time,
    ),
    call(confidence.mature_rows, rows=PAIRED, calendar=Calendar(), start=0, now=9 * DAY),
    call(confidence.mature_differences, pairs=PAIRED, calendar=Calendar(), start=0, now=9 * DAY),
    call(confidence.mean_sequence, x=P, spread=0.1, alpha=0.1, weight=2.0),
    call(confidence.bounded_sequence, x=P, low=0.0, high=1.0, alpha=0.1),
    call(guardrails.excess_evidence, bad=3, others=2, share=0.1, ratio=1.0),
    call(guardrails.VariantCounts, requests=9, errors=1, slow=1, missing=1),
    call(guardrails.GuardrailPolicy, errors=1.5, slow=2.0, missing=1.5, shift=0.1, alpha=0.01),
    call(guardrails.check_shift, champion=P, candidate=Q),
    call(route.Split, shares={'candidate': 0.1}),
    call(route.RoutingPlan, salt='may', rules=(), default='champion'),
    call(route.Router(route.RoutingPlan('may', route.Split({'new': 0.5}))).assign, unit='x'),
    call(route.check_sample_ratio, counts={'a': 1}, shares={'a': 1.0}, weight=9.0),
    call(rollout.RolloutStep, share=0.1, requests=9, minutes=9),
    call(rollout.RolloutPolicy, steps=rollout.STEPS, margin=0.1, alpha=0.1, max_days=9),
    call(rollout.start_rollout, candidate='2', champion='1', now=9),
    call(rollout.decode_rollout, text=rollout.encode_rollout(rollout.start_rollout('2', '1', 9))),
]


def wrong_values(value: Any) -> Iterator[tuple[str, Any]]:
    "What could come in the place of an argument, and what it is; nothing for objects of classes"
    tried_kinds = (pl.DataFrame, np.ndarray, int, float, str, tuple)
    if not isinstance(value, tried_kinds) or isinstance(value, bool):
        return
    yield 'None', None
    yield 'something else', object()
    if isinstance(value, pl.DataFrame):
        yield from wrong_frames(value)
    elif isinstance(value, np.ndarray):
        yield from wrong_arrays(value)
    elif isinstance(value, (int, float)):
        numbers = ('2h', True, float('nan'), float('inf'), -1, 0, 1.5, [1])
        yield from ((repr(number), number) for number in numbers)
    elif isinstance(value, str):
        yield from ((repr(text), text) for text in ('', 'a/b', 7, b'text', 'no such name'))
    elif isinstance(value, tuple):
        others = ('text', (7,), (None,), value + value, [*value], ())
        yield from ((f'{other!r:.40}', other) for other in others)


def wrong_frames(frame: pl.DataFrame) -> Iterator[tuple[str, Any]]:
    yield 'a lazy frame', frame.lazy()
    yield 'a frame of pandas', frame.to_pandas()
    yield 'rows', frame.rows()
    yield 'no rows', frame.head(0)
    yield 'no columns', pl.DataFrame()
    for name in frame.columns:
        yield f'without {name}', frame.drop(name)
        yield f'{name} as lists', frame.with_columns(pl.concat_list(name))
        yield f'{name} missing', frame.with_columns(pl.lit(None).alias(name))


def wrong_arrays(array: np.ndarray) -> Iterator[tuple[str, Any]]:
    yield 'a list', array.tolist()
    yield 'one row less', array[:-1]
    yield 'another dimension', array[:, None]
    yield 'text', array.astype(str)
    yield 'objects', array.astype(object)
    yield 'nothing', array[:0]
    if array.dtype.kind == 'f':
        yield 'NaN', np.where(np.arange(len(array)) == 0, np.nan, array.T).T
        yield 'minutes', array * 1000 - 7


def tried(one: Call) -> Iterator[tuple[str, dict[str, Any]]]:
    "Every wrong argument of a call, with all arguments"
    for name, value in one.given.items():
        if name not in one.kept:
            for what, wrong in wrong_values(value):
                yield f'{name}: {what}', {**one.given, name: wrong}


def outcome(one: Call, given: dict[str, Any]) -> str:
    "'' for an answer or a sentence; what else was raised"
    try:
        found = one.function(**given)
        if isinstance(found, Iterator):
            list(found)
    except MlrefError as error:
        return '' if str(error).startswith('expected ') else f'no sentence: {error}'
    except Exception as error:
        return f'{type(error).__name__}: {error}'[:150]
    return ''


@pytest.mark.parametrize('one', CALLS, ids=lambda one: one.function.__qualname__)
@pytest.mark.filterwarnings('ignore')
def test_a_wrong_argument_is_answered_by_a_sentence(one):
    assert outcome(one, one.given) == ''
    one.function(**one.given)  # the right ones are taken
    found = {what: outcome(one, given) for what, given in tried(one)}
    assert {what: said for what, said in found.items() if said} == {}


def with_column(**columns: Any) -> pl.DataFrame:
    return EVENTS.with_columns(**columns)


def task(**other: Any) -> Task:
    return Task(**{**vars(TASK), **other})


def labels_of(frame: Any) -> Any:
    "What reading labels gives for a task whose labels are this"
    return read_labels(task(labels=lambda events, now: frame), EVENTS, DAY)


LABELS = find_labels(EVENTS.filter(kind='end'), DAY)
UNFITTED = pytest.importorskip('sklearn.linear_model').LogisticRegression()
# What a stranger tried, and the words that must be in the answer
REFUSED = {
    'horizon in words': (lambda: Calendar(horizon='2h'), "got '2h' (str)"),
    'a day that begins before midnight': (lambda: Calendar(day_begins=-5), 'from 0 to 1439'),
    'a name with a slash': (lambda: task(name='a/b'), "got 'a/b'"),
    'rules of one name': (
        lambda: task(contract=(Rule(name='a', holds=pl.lit(True)),) * 2),
        'got a more than once',
    ),
    'a feature watched twice': (lambda: task(monitored=WEEK.names[:1] * 2), 'twice'),
    'nullable that is no column': (lambda: task(nullable=('delay',)), 'got delay'),
    'a time as text': (lambda: task(request_time='shop'), 'whole minutes, got shop'),
    'an unknown recipe': (lambda: RetrainPolicy(kind='xgb'), "got 'xgb'"),
    'an unknown engine': (lambda: RetrainPolicy(engine='tpu'), "got 'tpu'"),
    'a negative refresh': (lambda: RetrainPolicy(refresh=-1), 'refresh'),
    'more days out than measured': (lambda: AlarmPolicy(out=8, of=7), 'from 1 to 7'),
    'a reversed stretch': (lambda: Stretch(DAY, 0), 'swap'),
    'a reversed stretch of events': (lambda: events.events_between(EVENTS, 9, 5), 'from 9'),
    'kinds twice': (lambda: EventSchema({'a': pl.Int64}, ('k', 'k'), 'a'), "'k' twice"),
    'no kinds': (lambda: EventSchema({'a': pl.Int64}, (), 'a'), 'got none'),
    'no payload': (lambda: EventSchema({}, ('k',), 'a'), 'got none'),
    'a type of Python': (lambda: EventSchema({'a': int}, ('k',), 'a'), 'a type among String'),
    'known_time as times': (
        lambda: events.sort_events(with_column(known_time=pl.datetime(2013, 1, 1)), SCHEMA),
        'known_time of events as Int64',
    ),
    'an event without a column': (
        lambda: events.encode_events(EVENTS.drop('price'), SCHEMA),
        'price not among',
    ),
    'a frame of pandas': (
        lambda: events.sort_events(EVENTS.to_pandas(), SCHEMA),
        'polars.from_pandas',
    ),
    'labels under another name': (lambda: labels_of(LABELS.rename({'y': 'late'})), 'got y not'),
    'labels of two kinds of id': (lambda: labels_of(LABELS.cast({'y': pl.String})), 'got String'),
    'labels twice': (lambda: labels_of(pl.concat([LABELS, LABELS])), 'several for some'),
    'labels of 2': (lambda: labels_of(LABELS.with_columns(y=pl.lit(2))), 'of 0 or 1'),
    'labels at half a minute': (
        lambda: labels_of(LABELS.cast({'label_time': pl.Float64})),
        'label_time in whole minutes UTC',
    ),
    'a reference without labels': (lambda: monitor.Monitor(REFERENCE.drop('y')), 'got y not'),
    'a reference with NaN for a score': (
        lambda: monitor.Monitor(REFERENCE.with_columns(p=pl.lit(np.nan))),
        'outside or NaN',
    ),
    'a share of NaN': (lambda: gates.well_calibrated(Y, P, Q, float('nan')), 'got nan'),
    'percentages': (lambda: evaluate.brier(Y, 100 * P), 'percentages'),
    'log-odds to calibrate': (lambda: MAP.apply(P - 2), 'log-odds'),
    'outcomes of 2': (lambda: evaluate.auc(Y + 1, P), 'neither'),
    'scores of other rows': (lambda: evaluate.auc(Y, P[:-1]), 'same rows'),
    'scores as a matrix': (lambda: evaluate.auc(Y, P[:, None]), 'shape (400, 1)'),
    'labels of a slice for other rows': (
        lambda: slices.find_slices(Y, {'half': CUTS['half'][:-1]}),
        'labels of half',
    ),
    'no resamples': (lambda: evaluate.draw_days(DAY_OF, 0), 'from 1'),
    'a negative seed': (lambda: evaluate.draw_days(DAY_OF, 3, -1), 'seed'),
    'days that were not drawn': (
        lambda: evaluate.day_aucs(Y, P, DAY_OF + 1, evaluate.draw_days(DAY_OF, 3)),
        'draw from these rows',
    ),
    'edges in the wrong order': (
        lambda: slices.rolling_origin(lambda past, stop: half(), TABLE, [9, 5]),
        'sort them',
    ),
    'columns to score': (lambda: half().predict(TABLE.X[:, :1]), 'rows of 2 features'),
    'text to score': (lambda: half().predict(TABLE.X.astype(str)), 'as numbers'),
    'one row to score': (lambda: half().predict(TABLE.X[0]), '2 dimensions'),
    'a model that was never fitted': (lambda: sklearn_model(UNFITTED, ('a',), 9), 'fitted'),
    'a file for a model that leaves its folder': (
        lambda: OwnModel('a', len, {'../a': b'1'}, ('a',), 9),
        "got '../a'",
    ),
    'trees that are none': (lambda: LightGBMPredictor('tree', ('a',), 9), 'text of a LightGBM'),
    'a file that is no ONNX': (lambda: onnx_model(b'1', ('a',), 9), 'ONNX'),
    'parts that are no models': (lambda: EnsemblePredictor(half(), P), 'each part'),
}


@pytest.mark.parametrize(('act', 'words'), REFUSED.values(), ids=REFUSED)
def test_what_was_tried_is_refused_in_words(act, words):
    with pytest.raises(MlrefError, match='^expected ') as caught:
        act()
    assert words in str(caught.value)


def test_an_empty_sample_is_refused_before_anything_is_written(tmp_path):
    registry = Registry(tmp_path / 'registry', name='half')
    before = sorted(tmp_path.rglob('*'))
    for sample, words in ((TABLE.X[:0], 'got none'), (TABLE.X.tolist(), 'as a NumPy array')):
        with pytest.raises(MlrefError, match=words):
            register_model(registry, half(), TrainingRun('none'), sample=sample)
    with pytest.raises(MlrefError, match='expected model as Predictor'):
        register_model(registry, 'half', TrainingRun('none'))
    assert sorted(tmp_path.rglob('*')) == before


def test_a_gate_that_asked_nothing_does_not_hold():
    nothing = TABLE.take(np.arange(0))
    assert not gates.no_serving_skew(P[:0], P[:0]).passed
    assert not gates.no_leak(nothing, 9).passed
    assert not gates.mature_labels('training', nothing, 9).passed
    assert not gates.no_age_skew('training', nothing, 9).passed
    undecided = DIFFERENCES.with_columns(high=pl.lit(np.nan))
    assert not gates.no_slice_worse(undecided).passed
    for refused in (
        lambda: gates.parity(P[:0], P[:0]),
        lambda: gates.no_slice_worse(DIFFERENCES.head(0)),
        lambda: gates.all_passed([]),
    ):
        with pytest.raises(MlrefError, match='got none'):
            refused()


WHOLE_MODULES = {
    'arguments': 'is the mechanism; its page tries every check',
    'balance': 'refused by name in its page',
    'balance_process': 'takes a checked fleet and the name of a program (test_balance)',
    'capacity': 'measures a server that runs; the numbers come from a step',
    'catalog': 'takes definitions and an open lake',
    'challenger': 'part of the loop: takes what `run_day` hands on, all objects of the library',
    'checkpoint': 'called by training with tensors it made',
    'checks': 'table checks: their frames are events that the contract has passed',
    'cli': 'a command; its parser answers (test_steps)',
    'cli_balance': 'a command; its parser answers (its page)',
    'cli_models': 'a command; its parser answers (test_registry)',
    'cli_rollout': 'a command; its parser answers (test_rollout)',
    'cli_serving': 'a command; its parser answers (test_serve)',
    'client': 'starts or asks a server (test_serve)',
    'compress': 'measures models that are checked when they are made',
    'cost': 'quantities and prices, refused by name in test_cost',
    'contracts': 'frames are refused by `check_column_types` (test_contracts)',
    'daily': 'part of the loop: takes what `run_day` hands on',
    'distributed': 'runs under torchrun; its settings are those of a job file',
    'doctor': 'looks at the machine',
    'documentation': 'takes any object',
    'environment': 'takes what a registry noted',
    'fleet': 'settings and traffic, refused by name in test_fleet',
    'flights': 'the worked case: its input are the files of a package, checked by digest',
    'history': 'reads a registry by its versions (test_registry)',
    'ingest': 'takes messages, an open lake and a log (test_ingest)',
    'keys': 'the types of keys have a kind of tests of their own',
    'lake': 'takes an open lake (test_ingest)',
    'judging': 'rules of the loop; what they take is checked by the gates, or refused in its page',
    'last_values': 'arrays for a store: a hot path, checked by type and shape (test_online)',
    'lmdb_store': 'a store: folders and sizes (test_online)',
    'feature_ranges': 'rows that check_predictor has checked, and a hot path (test_bundle)',
    'log': 'messages of bytes (test_ingest, test_kind_falsy)',
    'log_file': 'the file of a log, which the log opens (test_journal, test_kind_log)',
    'materialize': 'takes an open store and events of the contract',
    'model_server': 'bodies of requests (test_serve)',
    'model_versions': 'reads a registry by its versions (test_registry)',
    'modelcard': 'renders a record that the library made',
    'networks': 'modules of torch: sizes are checked when one is made',
    'observe': 'counters of a server',
    'offline': 'readers of histories; the join is tried',
    'online': 'readers of records: a hot path',
    'pipeline': 'takes steps and folders (test_steps)',
    'registry_file': 'takes the path of a file of a registry (test_kind_birth)',
    'promotion': 'takes a registry (test_registry)',
    'mlflow_protocol': 'bodies of requests (test_protocols)',
    'oip': 'bodies of requests (test_protocols)',
    'oip_metadata': 'bodies of requests (test_protocols)',
    'protocols': 'bodies of requests (test_protocols)',
    'tensors': 'bodies of requests (test_protocols)',
    'body_schemas': 'schemas of a signature that is checked (test_protocols)',
    'openapi': 'a document of a server (test_protocols)',
    'read_plan': 'a plan that the library makes',
    'records': 'bytes of a store: a hot path',
    'report': 'renders what a run left',
    'request_fields': 'bodies of requests (test_serve)',
    'refit': 'part of the loop: takes what `run_challenge` made',
    'results': 'rows that a bench made',
    'rollout_state': 'takes a registry, and rows that a server made (test_rollout)',
    'run_report': 'reads an open lake',
    'seeds': 'training with tensors it made; its seeds are checked',
    'serve': 'runs a server',
    'count_metrics': 'counts of sketches, and frames that are refused in test_sketches',
    'sketches': 'frames, bytes and bins that are refused in test_sketches',
    'snapshots': 'takes an open lake and folders (test_ingest)',
    'stream': 'takes an open store and a log (test_stream)',
    'terminal': 'a command; its parser answers',
    'train': 'steps of a loop that takes tensors it made; its tables are checked',
    'training_state': 'takes a fit that runs; its settings are checked',
    'training_step': 'a step of training: a hot path',
    'trials': 'part of the loop: takes what `run_day` hands on',
    'vectors': 'arrays of a reader: a hot path',
    'workspace': 'part of the loop: takes a task and a folder',
}
EXEMPT = {
    'check_columns': 'columns of a model that was checked and of a set of features (test_bundle)',
    'need_extra': 'takes the name of a package that the library wrote down',
    'parse_time': 'times have a kind of tests of their own',
    'format_time': 'times have a kind of tests of their own',
    'Predictor': 'a protocol',
    'ReliabilityTable': 'an answer of the library',
    'DayDraws': 'an answer of the library',
    'Estimate': 'an answer of the library',
    'Column': 'an answer of the library',
    'Slice': 'an answer of the library',
    'Comparison': 'an answer of the library',
    'Calibration': 'an answer of the library',
    'CalibrationHistory': 'made by `decode_calibrations`, which checks the digests',
    'encode_calibrations': 'refused by name in its page',
    'Gate': 'an answer of the library',
    'Decision': 'an answer of the library',
    'Attempts': 'an answer of the library',
    'open_decision': 'part of the loop: a lake, and two words that the library wrote down',
    'Measurement': 'an answer of the library',
    'same_features': 'compares whatever it is given',
    'describe_slices': 'part of gates that check the table first',
    'decode_events': 'messages have a kind of tests of their own',
    'count_unknown_fields': 'messages have a kind of tests of their own',
    'corrupt_messages': 'messages have a kind of tests of their own',
    'DecodedBatch': 'an answer of the library',
    'check_column_types': 'called with frames that `check_frame` or the contract looks at',
    'compute_offline': 'part of `training_set`',
    'join_labels': 'part of `training_set`',
    'to_minutes': 'times have a kind of tests of their own',
    'with_squares': 'refused by name in its page',
    'lookup_feature': 'refused by name in its page',
    'TableLookup': 'made by `lookup_feature`',
    'read_stream': 'takes what `disturb_delivery` takes',
    'slice_differences': 'takes what `compare_models` takes, with a slice that is large enough',
    'plot_reliability': 'a plot of what `reliability_table` takes',
    'plot_slices': 'a plot of an answer',
    'plot_rolling_origin': 'a plot of an answer',
    'metrics_by_edge': 'takes an answer of `rolling_origin`',
    'Monitor': 'tried with every wrong reference in test_kind_monitor',
    'check_held_out': 'tried with every wrong reference in test_kind_monitor',
    'estimate_day': 'tried with every wrong day in test_kind_monitor',
    'realized_day': 'tried with every wrong day in test_kind_monitor',
    'alarm_decisions': 'takes answers of `find_alarms`',
    'unanswered_alarms': 'takes answers of `find_alarms`',
    'find_evening_alarms': 'part of the loop',
    'explain_alarms': 'part of the loop',
    'check_alarms': 'takes answers of the checks',
    'verdict': 'takes answers of the gates',
    'format_gate_value': 'takes an answer of the gates',
    'alarms_of_day': 'part of the loop',
    'decide_challenge': 'part of the loop',
    'decide_day': 'part of the loop',
    'serve_day': 'part of the loop',
    'run_day': 'part of the loop',
    'run_days': 'part of the loop',
    'SavedModel': 'an answer of the library',
    'score_in_blocks': 'takes what `check_rows` has passed',
    'score_in_parts': 'takes what `check_rows` has passed',
    'write_description': 'takes a model',
    'register_loader': 'takes a function',
    'load_model': 'takes a folder (test_registry)',
    'TorchPredictor': 'takes a network; it scores what `check_rows` passes',
    'LightGBMPredictor': 'refused by name in `REFUSED`',
    'EnsemblePredictor': 'refused by name in `REFUSED`',
    'check_saved_model': 'takes a model',
    'sklearn_model': 'refused by name in `REFUSED`',
    'onnx_model': 'refused by name in `REFUSED`',
    'xgboost_model': 'refused by name in its page',
    'register_model': 'refused by name in `REFUSED`',
    'fit_logistic': 'takes what `fit_recipe` takes',
    'fit_net': 'takes what `fit_recipe` takes',
    'fit_tabm': 'takes what `fit_recipe` takes',
    'fit_student': 'takes what `fit_recipe` takes',
    'can_refresh': 'says whether a model fits',
    'refresh_student': 'takes what `fit_recipe` takes, and a student',
    'fit_mean': 'takes what `fit_recipe` takes',
    'out_of_fold_teacher_scores': 'takes what `fit_recipe` takes',
    'fit_cached': 'takes what `fit_recipe` takes, and a folder',
    'RegistryUnreachable': 'an error',
    'Registry': 'takes a folder and an address (test_registry)',
    'version_by_alias': 'takes a registry',
    'upload_model': 'takes a registry',
    'TrainingRun': 'notes what it is given',
    'DayDifferences': 'an answer of the library',
    'ConfidenceSequence': 'an answer of the library',
    'Assignment': 'an answer of the library',
    'SampleRatio': 'an answer of the library',
    'SegmentRule': 'refused by name in its page',
    'Rollout': 'made by `start_rollout`, and checked when it is read back',
    'RolloutEvidence': 'an answer of the library',
    'RolloutDecision': 'an answer of the library',
    'apply_decision': 'takes answers of the library',
}


def public_names(file: Path) -> Iterator[str]:
    "Functions and classes of a module that take a frame, an array, a number or a text"
    tree = ast.parse(file.read_text())
    wanted = re.compile(r'np\.ndarray|pl\.DataFrame|pl\.Series|\b(int|float|str)\b')
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith('_'):
            given = [*node.args.args, *node.args.kwonlyargs]
            kinds = [ast.unparse(each.annotation) for each in given if each.annotation]
            if any(wanted.search(kind) for kind in kinds):
                yield node.name
        elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            yield node.name


def test_every_public_function_is_tried_or_exempt_with_a_reason():
    "Those of the modules above; what a test of another kind names is tried there"
    functions = [one.function for one in CALLS]
    tried_names = {function.__qualname__.split('.')[0] for function in functions}
    modules = {function.__module__.split('.')[1] for function in functions} - set(WHOLE_MODULES)
    elsewhere = [file for file in Path(__file__).parent.glob('test_kind_*.py')]
    texts = ' '.join(file.read_text() for file in elsewhere if file.name != Path(__file__).name)
    names = {name for module in modules for name in public_names(LIBRARY / f'{module}.py')}
    missing = names - tried_names - set(EXEMPT)
    assert {name for name in missing if not re.search(rf'\b{name}\b', texts)} == set()
    assert set(WHOLE_MODULES) <= {path.stem for path in LIBRARY.iterdir()}
