"""The timed kernels against commit da38fe3: PYTHONPATH=<checkout> python before.py WORK"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import polars as pl
from kernels import answer, times

from mlref.contracts import check, rules
from mlref.core import DAY, minute
from mlref.events import between, decode, encode, raw_folder, read_raw, year
from mlref.features import compute
from mlref.flights import FLIGHTS, VIEWS, static
from mlref.lake import Lake, ingest
from mlref.log import LocalLog
from mlref.model import load_model
from mlref.observe import Meters
from mlref.offline import point_in_time, table
from mlref.online import Online, update
from mlref.serve import Server, infer, predict
from mlref.stream import feed

WORK = Path(sys.argv[1])
MODELS = Path(sys.argv[2])
raw = raw_folder()
lookups = static(read_raw(raw, 'airports'), read_raw(raw, 'planes'))
contract = rules(list(lookups.airports))
whole = year(raw)
events = check(whole, contract).good
april = minute('2013-04-01T12:00')
last = tuple(v for v in VIEWS if not v.windows and v.name in ('left', 'landed', 'weather'))
asked = events.filter(pl.col('kind') == 'schedule').with_columns(T=pl.col('sched') - 120)
month = between(events, minute('2013-04-01'), minute('2013-04-12'))
messages = encode(month)
store = Online(WORK / 'before-store')
update(store, between(events, april - 61 * DAY, april))
due = (
    events.filter(pl.col('kind') == 'schedule')
    .filter(pl.col('sched') - 120 >= april)
    .sort('sched', 'event_id')
    .with_columns(sched=pl.lit(april + 120, pl.Int64))
)
columns = [
    'flight_id',
    'carrier',
    'number',
    'origin',
    'dest',
    'tailnum',
    'sched',
    'duration',
    'distance',
]


def arrays(n):
    f = due[:n]
    return {
        c: np.array(f[c].to_list(), np.int64 if f[c].dtype.is_integer() else object)
        for c in columns
    }


one, hundred = arrays(1), arrays(100)
log = LocalLog(WORK / 'before-log')
log.append('flights', messages)
model = load_model(MODELS / 'network')
server = Server(model, None, store, LocalLog(WORK / 'before-served'), lookups, Meters())


def body(n):
    return json.dumps({'flights': due[:n].select(columns).to_dicts()}).encode()


bodies = {n: body(n) for n in (1, 100)}
rows = np.nan_to_num(compute(store, due[:1024], FLIGHTS, lookups))
tensor = {
    n: json.dumps(
        {
            'inputs': [
                {
                    'name': 'X',
                    'datatype': 'FP32',
                    'shape': [n, 132],
                    'data': rows[:n].ravel().tolist(),
                }
            ]
        }
    ).encode()
    for n in (1, 1024)
}
count = [0]


def fresh(name):
    count[0] += 1
    folder = WORK / f'before-{name}-{count[0]}'
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def ingest_log():
    folder = fresh('lake')
    folder.mkdir()
    lake = Lake(folder / 'l.duckdb')
    ingest(lake, log, 'flights', contract)
    lake.close()


def feed_log():
    s = Online(fresh('fed'))
    feed(s, log, 'flights', contract)
    s.close()


KERNELS = {
    'features: point-in-time join of last values, the year': lambda: point_in_time(
        asked, last, events
    ),
    'features: full build, one month': lambda: table(
        events, lookups, minute('2013-06-01T07:00'), minute('2013-07-01T07:00')
    ),
    'online: 132 numbers of one row': times(200, lambda: compute(store, one, FLIGHTS, lookups)),
    'online: 132 numbers of 100 rows': times(20, lambda: compute(store, hundred, FLIGHTS, lookups)),
    'online: eleven days of events into a new store': feed_log,
    'ingest: eleven days from log to lake': ingest_log,
    'contracts: the year through every rule': lambda: check(whole, contract),
    'ingest: eleven days encoded': lambda: encode(month),
    'ingest: eleven days decoded': lambda: decode(messages),
    'serve: one row by its keys': times(100, lambda: predict(server, bodies[1])),
    'serve: 100 rows by their keys': times(10, lambda: predict(server, bodies[100])),
    'serve: one vector': times(200, lambda: infer(server, tensor[1])),
    'serve: 1,024 vectors': times(5, lambda: infer(server, tensor[1024])),
}

if __name__ == '__main__':
    answer(KERNELS)
