"""Kernels of log and store by names that hold since the redesign: python storage.py WORK MODELS

One message appended alone costs more than it did, since an append promises more: topic, partition
and batch are checked, the path is looked at, and it is added to a block with two checksums, the
writer's epoch and the time. The old code put a message under its offset, and of all this checked
the batch only. Decision 0014 says what each promise takes, and how much of it is where the pages
come to lie: the transaction is some twenty times as much.
"""

import shutil
import sys
from itertools import count
from pathlib import Path

import numpy as np
import polars as pl
from kernels import answer, times

from mlref.contracts import validate
from mlref.core import DAY, parse_time
from mlref.events import events_between
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_COLUMNS, raw_folder, read_year
from mlref.flights.task import flights_task
from mlref.last_values import push
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.records import RecordLayout
from mlref.vectors import read_vectors

WORK = Path(sys.argv[1])
ROWS = 10_000
APRIL = parse_time('2013-04-01T12:00')
numbers = count()

task = flights_task()
events = validate(read_year(raw_folder()), flight_rules(list(task.lookups.airports))).good
store = LmdbStore(WORK / 'storage-store', task.features)
apply_events(store, events_between(events, APRIL - 20 * DAY, APRIL))
planned = events.filter((pl.col('kind') == 'schedule') & (pl.col('sched') >= APRIL + 120))
planned = planned.sort('sched', 'event_id').with_columns(
    sched=pl.lit(APRIL + 120, pl.Int64), cutoff=pl.lit(APRIL, pl.Int64)
)


def requests(n: int) -> dict[str, np.ndarray]:
    rows = planned[:n].select(*FLIGHT_COLUMNS, 'cutoff')
    return {
        column.name: np.array(column.to_list(), np.int64 if column.dtype.is_integer() else object)
        for column in rows
    }


asked = {n: requests(n) for n in (1, 2, 100)}

flights = RecordLayout('left/flight', tuple('abc'), True, 0, '0' * 16, 60)
pushed = LmdbStore(WORK / 'storage-pushed', more=(flights,))
keys = [f'EWR-UA-{i}-2013' for i in range(ROWS)]
values = np.random.default_rng(0).normal(size=(ROWS, 3))


def push_rows() -> None:
    "Ten batches; every row is newer than the one that is there"
    for _ in range(10):
        push(pushed, flights.name, keys, np.full(ROWS, APRIL + next(numbers)), values)


log = LocalLog(WORK / 'storage-log')
message = b'{"event_id": "%s", "kind": "departure"}' % (b'x' * 200)
batch = [message + b'%d' % i for i in range(1000)]


def append_one() -> None:
    log.append('one', [message])


def append_batch() -> None:
    log.append('batch', batch)


def fill_log() -> None:
    "In one transaction of the disk for each thousand"
    shutil.rmtree(WORK / 'storage-full', ignore_errors=True)
    full = LocalLog(WORK / 'storage-full')
    for _ in range(50):
        full.append('batch', batch)
    full.close()


log.append('read', batch * 50)
KERNELS = {
    'online: pushes of 10,000 rows': push_rows,
    'log: one message appended alone': times(2000, append_one),
    'log: 1,000 messages appended': times(30, append_batch),
    'log: 50,000 messages into a new log': fill_log,
    'log: 50,000 messages read by the thousand': lambda: [
        log.read('read', start, 1000) for start in range(0, 50_000, 1000)
    ],
    'online: read_vectors of one request': times(
        200, lambda: read_vectors(store, asked[1], task.features, task.lookups)
    ),
    'online: read_vectors of two requests': times(
        100, lambda: read_vectors(store, asked[2], task.features, task.lookups)
    ),
    'online: read_vectors of 100 requests': times(
        20, lambda: read_vectors(store, asked[100], task.features, task.lookups)
    ),
}

if __name__ == '__main__':
    answer(KERNELS)
