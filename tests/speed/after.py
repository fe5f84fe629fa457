"""The kernels of `before.py` by today's names: PYTHONPATH=CHECKOUT python after.py WORK MODELS"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
from kernels import answer, times

from mlref.bundle import make_bundle
from mlref.compiled_vectors import compile_vectors
from mlref.contracts import validate
from mlref.core import DAY, parse_time
from mlref.events import decode_events, encode_events, events_between
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_COLUMNS, FLIGHT_SCHEMA, raw_folder, read_year
from mlref.flights.features import VIEWS
from mlref.flights.task import flights_task
from mlref.ingest import ingest
from mlref.lake import Lake
from mlref.last_values import get_online_features, push
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.model import load_model
from mlref.model_server import ServerSettings
from mlref.offline import point_in_time_join
from mlref.protocols import Limits
from mlref.read_plan import make_plan
from mlref.records import RecordLayout
from mlref.routes import make_app, open_server
from mlref.serve import LocalClient
from mlref.stream import apply_log
from mlref.training_set import training_set
from mlref.vectors import compute_vectors

WORK = Path(sys.argv[1])
MODELS = Path(sys.argv[2])
task = flights_task()
features = task.features
contract = flight_rules(list(task.lookups.airports))
whole = read_year(raw_folder())
events = validate(whole, contract).good
april = parse_time('2013-04-01T12:00')
last = tuple(
    view for view in VIEWS if not view.windows and view.name in ('left', 'landed', 'weather')
)
schedules = events.filter(kind='schedule')
asked = schedules.with_columns(cutoff=pl.col('sched') - 120)
month = events_between(events, parse_time('2013-04-01'), parse_time('2013-04-12'))
messages = encode_events(month, FLIGHT_SCHEMA)
store = LmdbStore(WORK / 'after-store', features)
apply_events(store, events_between(events, april - 61 * DAY, april))
due = asked.filter(pl.col('cutoff') >= april).sort('sched', 'event_id')
due = due.with_columns(sched=pl.lit(april + 120, pl.Int64), cutoff=pl.lit(april, pl.Int64))


def arrays(n: int) -> dict[str, np.ndarray]:
    rows = due[:n].select(*FLIGHT_COLUMNS, 'cutoff')
    return {
        column.name: np.array(column.to_list(), np.int64 if column.dtype.is_integer() else object)
        for column in rows
    }


one = arrays(1)
hundred = arrays(100)
compiled = compile_vectors(make_plan(features), store.layouts)
drivers = tuple(
    RecordLayout(f'v{i}/driver', tuple('abcdef'), True, 0, f'{i:016x}', 60) for i in range(2)
)
last_values = LmdbStore(WORK / 'after-drivers', more=drivers)
for driver in drivers:
    push(last_values, driver.name, ['7'], np.array([10]), np.ones((1, 6)))
log = LocalLog(WORK / 'after-log')
log.append('events', messages)
network = load_model(MODELS / 'network')
settings = ServerSettings(limits=Limits(max_rows=2048))
served = LocalLog(WORK / 'after-served')
client = LocalClient(make_app(open_server(make_bundle(task, network), store, served, settings)))
INFER = f'/v2/models/{task.name}/infer'
bodies = {
    n: json.dumps({'entities': due[:n].select(FLIGHT_COLUMNS).to_dicts()}).encode()
    for n in (1, 100)
}
rows = np.nan_to_num(compute_vectors(store, due[:1024], features, task.lookups))


def tensor(n: int) -> bytes:
    data = rows[:n].ravel().tolist()
    inputs = {'name': 'X', 'datatype': 'FP32', 'shape': [n, 132], 'data': data}
    return json.dumps({'inputs': [inputs]}).encode()


tensors = {n: tensor(n) for n in (1, 1024)}
made = [0]


def fresh(name: str) -> Path:
    made[0] += 1
    folder = WORK / f'after-{name}-{made[0]}'
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def ingest_log() -> None:
    folder = fresh('lake')
    folder.mkdir()
    lake = Lake(folder / 'l.duckdb', FLIGHT_SCHEMA)
    ingest(lake, log, 'events', contract)
    lake.close()


def feed_log() -> None:
    fed = LmdbStore(fresh('fed'), features)
    apply_log(fed, log, 'events', FLIGHT_SCHEMA, contract)
    fed.close()


def month_of_vectors() -> None:
    begin = parse_time('2013-06-01T07:00')
    training_set(events, task, begin, parse_time('2013-07-01T07:00'))


KERNELS = {
    'features: point-in-time join of last values, the year': lambda: point_in_time_join(
        asked, last, events
    ),
    'features: full build, one month': month_of_vectors,
    'online: 132 numbers of one row': times(
        200, lambda: compute_vectors(store, one, features, task.lookups)
    ),
    'online: 132 numbers of 100 rows': times(
        20, lambda: compute_vectors(store, hundred, features, task.lookups)
    ),
    'online: 132 numbers of one row, compiled': times(
        500, lambda: compiled.read(store, one, task.lookups)
    ),
    'online: 132 numbers of 100 rows, compiled': times(
        30, lambda: compiled.read(store, hundred, task.lookups)
    ),
    'online: 12 last values of one key': times(
        2000, lambda: get_online_features(last_values, ['v0/driver', 'v1/driver'], [['7']] * 2, 10)
    ),
    'online: eleven days of events into a new store': feed_log,
    'ingest: eleven days from log to lake': ingest_log,
    'contracts: the year through every rule': lambda: validate(whole, contract),
    'ingest: eleven days encoded': lambda: encode_events(month, FLIGHT_SCHEMA),
    'ingest: eleven days decoded': lambda: decode_events(messages, FLIGHT_SCHEMA),
    'serve: one row by its keys': times(100, lambda: client.ask('POST', '/predict', bodies[1])),
    'serve: 100 rows by their keys': times(10, lambda: client.ask('POST', '/predict', bodies[100])),
    'serve: one vector': times(200, lambda: client.ask('POST', INFER, tensors[1])),
    'serve: 1,024 vectors': times(5, lambda: client.ask('POST', INFER, tensors[1024])),
}

if __name__ == '__main__':
    answer(KERNELS)
