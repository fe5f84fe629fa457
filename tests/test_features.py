"""Features: nothing leaks, and a store built only from the log gives the offline numbers"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mlref.contracts import validate
from mlref.core import parse_time
from mlref.events import encode_events, events_between
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_year
from mlref.flights.task import flights_task
from mlref.log import LocalLog
from mlref.results import result_row, write_results
from mlref.training_set import find_leaks, training_set

TASK = flights_task()


@pytest.fixture(scope='module')
def events():
    return validate(read_year(raw_folder()), TASK.contract).good


def test_no_feature_of_april_leaks(events):
    "Cut-offs at the known time of real events, one minute before and after; deep: 200 of them"
    april = events.filter(
        pl.coalesce('sched', 'known_time').is_between(
            parse_time('2013-04-01T07:00'), parse_time('2013-04-30T07:00')
        )
    )
    n = 67 if os.environ.get('MLREF_DEEP') == '1' else 4
    at = april.filter(pl.col('kind') != 'schedule')['known_time'].sample(n, seed=1).to_list()
    cuts = [t + d for t in at for d in (-1, 0, 1)]
    found = find_leaks(april, TASK, cuts)
    if os.environ.get('MLREF_DEEP') == '1':
        rows = [
            result_row('cut-offs', len(cuts), '', '>= 200', april.height),
            result_row('features that changed', len(found), '', '== 0', april.height),
            *filled(april),
        ]
        write_results(
            Path(__file__).parent.parent / 'reports' / 'results', 'leaks', './run test --deep', rows
        )
    assert found == {}


def test_that_something_will_happen_is_not_known_either(events):
    "Garbage leaves a later departure a departure; here it is gone, as in life"
    april = events.filter(
        pl.coalesce('sched', 'known_time').is_between(
            parse_time('2013-04-01T07:00'), parse_time('2013-04-12T07:00')
        )
    )
    at = (
        april.filter(pl.col('kind') != 'schedule')['known_time']
        .sample(67 if os.environ.get('MLREF_DEEP') == '1' else 4, seed=2)
        .to_list()
    )

    def until(events, task, start, end):
        return training_set(events.filter(pl.col('known_time') < end), task, start, end)

    assert find_leaks(april, TASK, [t + d for t in at for d in (-1, 0, 1)], until) == {}


def filled(april):
    """Share of April's flights for which a feature has a value

    Left out: the aircraft, two gauges that are often broken, and means over hours, or of a route
    over a day, in which nobody flies.
    """
    t = training_set(april, TASK, parse_time('2013-04-08T07:00'), parse_time('2013-04-30T05:00'))
    dense = [
        i
        for i, n in enumerate(t.names)
        if not n.startswith(
            (
                'tail_',
                'prev_',
                'plane_',
                'weather_wind_gust',
                'weather_pressure',
                'weather3_pressure',
            )
        )
        and not re.search(
            r'_(delay|late|over)_(60|180|360)m$|_spare_(360|1440)m$'
            r'|^(flight|route|slot)_arr_delay_1440m$',
            n,
        )
    ]
    share = {t.names[i]: float((~np.isnan(t.X[:, i])).mean()) for i in dense}
    worst = min(share, key=share.get)
    return [
        result_row('dense features', len(dense), '', '', len(t)),
        result_row(f'smallest share with a value ({worst})', share[worst], '', '>= 0.95', len(t)),
    ]


def test_what_should_be_there_is_there(events):
    april = events.filter(
        pl.coalesce('sched', 'known_time').is_between(
            parse_time('2013-04-01T07:00'), parse_time('2013-04-30T07:00')
        )
    )
    assert [r['held'] for r in filled(april)] == [None, True], filled(april)


def test_events_in_any_order_give_the_same_bits(events):
    april = events.filter(
        pl.coalesce('sched', 'known_time').is_between(
            parse_time('2013-04-01T07:00'), parse_time('2013-04-30T07:00')
        )
    )

    def make(events):
        start, end = parse_time('2013-04-01T07:00'), parse_time('2013-04-30T05:00')
        return training_set(events, TASK, start, end).X.tobytes()

    want = make(april)
    assert all(make(april.sample(fraction=1.0, shuffle=True, seed=s)) == want for s in (1, 2))


ONLINE = """
import sys
from pathlib import Path

import numpy as np
import polars as pl

from mlref.events import decode_events
from mlref.vectors import compute_vectors
from mlref.flights.task import flights_task
from mlref.log import LocalLog
from mlref.lmdb_store import LmdbStore
from mlref.materialize import apply_events

task = flights_task()
folder, first, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
log = LocalLog(folder / 'log', readonly=True)
store = LmdbStore(folder / 'online', task.features)
plans = pl.DataFrame(schema=task.schema.columns)
at, out = 0, {}
cutoff = pl.col('sched') - task.calendar.horizon
while messages := log.read('events', at, 3_000):  # about a day
    events = decode_events(messages, task.schema)[0].drop('_i')
    at += len(messages)
    apply_events(store, events, at)
    plans = pl.concat([plans, events.filter(pl.col('kind') == 'schedule')])
    seen = int(events['known_time'].max())  # every fact known before this minute is in the store
    due = plans.filter((cutoff < seen) & (cutoff >= first) & (cutoff < end))
    plans = plans.filter(cutoff >= seen)
    if due.height:
        vectors = compute_vectors(store, due, task.features, task.lookups)
        out.update(zip(due['flight_id'], vectors))
np.savez(folder / 'online.npz', ids=np.array(list(out)), X=np.array(list(out.values())))
"""


def test_online_equals_offline_bit_for_bit_over_a_live_month(events, tmp_path):
    "The online side is another process that has only the log"
    span = parse_time('2013-04-01T07:00'), parse_time('2013-05-01T07:00')
    part = events_between(events, parse_time('2013-01-20'), parse_time('2013-05-03'))
    log = LocalLog(tmp_path / 'log')
    log.append('events', encode_events(part, FLIGHT_SCHEMA))
    log.close()
    subprocess.run([sys.executable, '-c', ONLINE, str(tmp_path), *map(str, span)], check=True)
    on, off = np.load(tmp_path / 'online.npz'), training_set(part, TASK, *span)
    assert len(on['ids']) == len(off) > 25_000
    X = on['X'][np.argsort(on['ids'])]
    want = off.X[np.argsort(off.ids)]
    assert off.names and X.dtype == want.dtype == np.float32
    differ = {
        n: int(k)
        for n, k in zip(off.names, (X.view(np.int32) != want.view(np.int32)).sum(0), strict=True)
        if k
    }
    assert differ == {}
