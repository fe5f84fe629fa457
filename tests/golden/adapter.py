"""The library as the golden values see it: the one file that knows its names.

A commit that renames or moves something changes this file, and no golden value.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import duckdb
import numpy as np
import polars as pl

from mlref.catalog import feature_version
from mlref.contracts import validate
from mlref.core import DAY, known_by, parse_time
from mlref.features import FeatureView
from mlref.flights.common import HORIZON
from mlref.flights.events import raw_folder, read_year
from mlref.flights.features import FLIGHTS
from mlref.flights.task import flights_task
from mlref.model import load_model
from mlref.offline import OfflineReader
from mlref.training_set import training_set as make_training_set
from mlref.vectors import compute_vectors

MODELS = Path(__file__).parent / 'models'
# A word of today's decisions and metrics -> the golden one; grows when a gate is renamed
RENAMED: dict[str, str] = {
    'same_features': 'features',
    'trained_before_judged': 'trained before it is tested',
    'no_leak': 'no label out of its time',
    'fresh_labels': 'labels are fresh',
    'fresh_events': 'events are fresh',
    'better_than_champion': 'better than the champion',
    'well_calibrated': 'calibrated',
    'no_slice_worse': 'no slice worse',
    'parity': 'exported = trained',
    'latency_within': 'latency',
    'size_within': 'size',
    'no_serving_skew': 'served scores = rebuilt scores',
    'not_worse_than_champion': 'not worse than the champion',
    'better_than_chance': 'better than chance',
    'no_slice_worse_by_margin': 'no slice worse by the margin',
    'all gates passed, shadowed for 1 day': 'all gates passed, shadowed for 1 days',
}
WEEK = ('2013-07-01', '2013-07-08')  # service days, the last excluded


@dataclass(frozen=True)
class Rows:
    "A training set, by what its columns mean; arrays are parallel, one entry per flight"

    ids: np.ndarray  # flight ids, str
    cutoff: np.ndarray  # minutes UTC
    label_known: np.ndarray  # minutes UTC, -1 = never
    label: np.ndarray  # 1 = late, 0 = not, NaN = no label
    values: np.ndarray  # features, float32 (flights, names)
    names: tuple[str, ...]  # of the columns of `values`


@dataclass(frozen=True)
class Part:
    "A feature view, a set of on-demand columns, or a whole feature set"

    version: str
    columns: tuple[str, ...]  # in order


@cache
def _events() -> pl.DataFrame:
    return validate(read_year(raw_folder()), flights_task().contract).good


@cache
def _reader() -> OfflineReader:
    # one for all stretches: its histories are made once
    return OfflineReader(_events())


def _service_day(date: str) -> int:
    return parse_time(f'{date}T07:00')


def training_set(start: str, end: str) -> Rows:
    "What was known of every flight of the service days from `start` to `end`, excluded"
    made = make_training_set(
        _events(), flights_task(), _service_day(start), _service_day(end), _reader()
    )
    return Rows(
        ids=made.ids,
        cutoff=made.cutoff,
        label_known=made.label_time,
        label=made.y,
        values=made.X,
        names=made.names,
    )


@cache
def _model(kind: str):
    return load_model(MODELS / kind)


def frozen_scores(day: str) -> dict[str, np.ndarray]:
    "What each frozen model says of the flights of a service day, in order of the training set"
    start = _service_day(day)
    made = make_training_set(_events(), flights_task(), start, start + DAY, _reader())
    return {kind: _model(kind).predict(made.X) for kind in ('trees', 'network')}


def feature_week() -> dict[str, np.ndarray]:
    "Every column of every part for the flights of a week, those between the parts too"
    start, end = map(_service_day, WEEK)
    cutoff = pl.col('sched') - HORIZON
    asked = (
        _events()
        .filter((pl.col('kind') == 'schedule') & (cutoff >= start) & (cutoff < end))
        .sort('sched', 'event_id')
    )
    whole = replace(FLIGHTS, only=())
    values = compute_vectors(_reader(), asked, whole, flights_task().lookups)
    return dict(zip(whole.names, values.T, strict=True))


def feature_names() -> tuple[str, ...]:
    "The columns that a model is given, in order"
    return FLIGHTS.names


def parts() -> dict[str, Part]:
    "Everything that has a version of its own, by a name that stays"
    found = {
        'feature set': Part(FLIGHTS.version, FLIGHTS.names),
        'feature set with its vocabularies': Part(
            feature_version(FLIGHTS, flights_task().lookups), FLIGHTS.names
        ),
    }
    for part in (*FLIGHTS.views, *FLIGHTS.on_demand):
        columns = part.names if isinstance(part, FeatureView) else part.outputs
        found[part.name] = Part(part.version, columns)
    return found


def train_models() -> None:
    "Two small models of the first quarter; only when the old files can no longer be read"
    # here: whoever only compares does not wait for them
    from mlref.model import save_model
    from mlref.networks import TabularNet
    from mlref.recipes import fit_lightgbm
    from mlref.train import fit_torch
    from mlref.training_state import TrainConfig

    start, edge, end = map(_service_day, ('2013-01-01', '2013-03-18', '2013-04-01'))
    past = known_by(make_training_set(_events(), flights_task(), start, end, _reader()), end)
    before = edge > past.cutoff
    head = past.take(before)
    tail = past.take(~before)
    trees = fit_lightgbm(head, tail, seed=0, trees=30, rate=0.2, leaves=15)
    save_model(trees, MODELS / 'trees')

    def small(names: tuple[str, ...], cats: dict[str, int]) -> TabularNet:
        return TabularNet(names, cats, width=8, pieces=2)

    network = fit_torch(head, tail, TrainConfig(epochs=2), make=small)
    save_model(network, MODELS / 'network')


# Table of a run -> its rows, by columns in a fixed order. The first dictionary holds nothing that
# a network computed: processors round its products their own way.
RUN_TABLES = {
    'events': (
        'select event_id, kind, event_time, known_time, flight_id, carrier, number, origin, dest,'
        ' tailnum, sched, duration, distance, dep_delay, arr_delay, air_time, temp, dewp, humid,'
        ' wind_dir, wind_speed, wind_gust, precip, pressure, visib'
        ' from events order by known_time, event_id'
    ),
    'messages refused': (
        "select 'flights' as topic, part, off, raw, reasons from dead_letters order by all"
    ),
    'flights scored': (
        'select entity_id as flight_id, cutoff as T, scored_at, day from predictions'
        ' order by cutoff, entity_id'
    ),
    'missing values': (
        "select day, name, round(value, 12) from metrics where name like 'missing:%' order by all"
    ),
    'checks of the tables': (
        'select measured_at, name, action, over from quality where of_rows is null'
        " and name not like 'leaking%' order by all"
    ),
    'decisions': 'select action, why from decisions order by day, action, why',
    'days': 'select day from days order by day',
    'metrics': 'select day, name, n from metrics order by all',
    'calibrations': 'select day, fitted_at from calibrations order by day',
}
NETWORK_TABLES = {
    'scores': (
        'select entity_id as flight_id, p, trained_until from predictions'
        ' order by cutoff, entity_id'
    ),
    'metrics': ('select day, measured_at, name, value, low, high, n from metrics order by all'),
    'calibrations': (
        'select day, fitted_at, shift, slope, since, until, known, n from calibrations order by day'
    ),
}


def run_folder(data: Path) -> Path:
    "The folder of the only run below `data`"
    (folder,) = data.glob('runs/*')
    return folder


def run_tables(folder: Path, queries: dict[str, str]) -> dict[str, pl.DataFrame]:
    "What a finished run left in its lake"
    with duckdb.connect(folder / 'lake' / 'mlref.duckdb', read_only=True) as lake:
        return {name: lake.sql(query).pl() for name, query in queries.items()}


def golden_word(text: str) -> str:
    "What a reason, a gate or a metric was called when the golden values were written"
    if text in RENAMED:
        return RENAMED[text]
    # a refusal says of each failed gate its name and what was found; it was the names alone
    failed = [part.split(': ')[0] for part in text.split('; ')]
    if all(name in RENAMED for name in failed):
        return ', '.join(RENAMED[name] for name in failed)
    return text


def _decision(day: int, action: str, why: str, evidence: dict) -> dict[str, object]:
    gates = {golden_word(gate['name']): gate['passed'] for gate in evidence.get('gates', [])}
    return {
        'day': day,
        'action': action,
        'why': golden_word(why),
        'model': evidence.get('number'),
        'gates': gates,
    }


def decided(folder: Path) -> list[dict]:
    "Every decision of a run: day, what, why, which model by its number, what each gate said"
    query = 'select day, action, why, evidence from decisions order by day, action, why'
    with duckdb.connect(folder / 'lake' / 'mlref.duckdb', read_only=True) as lake:
        rows_ = lake.sql(query).fetchall()
    return [_decision(day, action, why, json.loads(text)) for day, action, why, text in rows_]
