"""The online store follows the log through kills, retries, broken and late messages"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st_
from hypothesis.stateful import RuleBasedStateMachine, rule

from mlref.core import DAY, MlrefError, parse_time
from mlref.events import disturb_delivery, encode_events, events_between
from mlref.flights.common import HORIZON
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_raw, read_year
from mlref.flights.features import FLIGHTS, static
from mlref.ingest import ingest
from mlref.lake import Lake, events_as_of
from mlref.lmdb_store import LmdbStore, reshard
from mlref.log import LocalLog
from mlref.log_care import Retention, trim_log
from mlref.materialize import apply_events, list_records
from mlref.stream import (
    MAX_LATENESS,
    StreamCounts,
    apply_log,
    deliver_log,
    fill_store,
    store_position,
)
from mlref.vectors import compute_vectors

RAW = raw_folder()
ST = static(read_raw(RAW, 'airports'), read_raw(RAW, 'planes'))
CONTRACT = flight_rules(list(ST.airports))
END = parse_time('2013-04-12T07:00')
FEED = """
import sys
from pathlib import Path
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_raw
from mlref.flights.features import FLIGHTS, static
from mlref.log import LocalLog
from mlref.lmdb_store import LmdbStore
from mlref.stream import apply_log
raw = raw_folder()
rules = flight_rules(list(static(read_raw(raw, 'airports'), read_raw(raw, 'planes')).airports))
at = Path(sys.argv[1])
print('ready', flush=True)
log = LocalLog(at / 'log', readonly=True)
print(apply_log(LmdbStore(at / 'store', FLIGHTS), log, 'flights', FLIGHT_SCHEMA, rules, 50))
"""


@pytest.fixture(scope='module')
def events():
    return events_between(read_year(RAW), END - 2 * DAY, END)


@pytest.fixture(scope='module')
def flights():
    return (
        read_year(RAW)
        .filter(
            (pl.col('kind') == 'schedule')
            & pl.col('sched').is_between(END - DAY + HORIZON, END + HORIZON - 1)
        )
        .sort('sched', 'event_id')
    )


def applied(at, messages, batch=50_000):
    log = LocalLog(at / 'log')
    log.append('flights', messages)
    store = LmdbStore(at / 'store', FLIGHTS)
    return store, apply_log(store, log, 'flights', FLIGHT_SCHEMA, CONTRACT, batch)


def read(store, flights):
    return compute_vectors(store, flights, FLIGHTS, ST)


def test_killed_five_times_it_reads_like_never_killed(events, flights, tmp_path):
    storm = encode_events(
        disturb_delivery(events, seed=5, late=0.05, minutes=90, twice=0.05), FLIGHT_SCHEMA
    )
    storm.insert(len(storm) // 2, b'\xff not an event')
    whole, n = applied(tmp_path / 'whole', encode_events(events, FLIGHT_SCHEMA))
    assert n.applied == events.height
    LocalLog(tmp_path / 'killed' / 'log').append('flights', storm)
    g, kills, done = random.Random(5), 0, False
    while not done:
        p = subprocess.Popen(
            [sys.executable, '-c', FEED, tmp_path / 'killed'], stdout=subprocess.PIPE, text=True
        )
        assert p.stdout.readline() == 'ready\n'
        if kills == 5:
            done = p.wait() == 0
            assert done, 'the last run must come through'
            continue
        before = position(tmp_path / 'killed')
        time.sleep(g.uniform(0.05, 0.2))
        p.send_signal(signal.SIGKILL)
        p.wait()
        after = position(tmp_path / 'killed')
        assert before <= after < len(storm), 'killed after the end: not a kill in the middle'
        kills += 1
    store = LmdbStore(tmp_path / 'killed' / 'store', readonly=True)
    assert store.position() == len(storm) and np.array_equal(
        read(store, flights), read(whole, flights), equal_nan=True
    )
    # not only what these flights read: every record, byte for byte
    assert (a := list_records(store, whole.clock())) == (b := list_records(whole)), [
        k for k in {*a, *b} if a.get(k) != b.get(k)
    ][:5]


def position(at):
    if not (at / 'store' / 'store.json').exists():
        return 0
    try:
        s = LmdbStore(at / 'store', readonly=True)
    except MlrefError:
        return 0  # killed before there was a store
    n = s.position()
    s.close()
    return n


@pytest.mark.parametrize('days', [1, 1.9, 2.1, 3, 5, 8, 30])
def test_an_event_late_by_days_is_applied_or_counted_and_never_stops_the_stream(
    days, events, tmp_path
):
    newest = events['known_time'].max()
    at = newest - int(days * DAY)
    late = events_between(read_year(RAW), at - 360, at + 360).filter(pl.col('kind') == 'departure')
    assert late.height > 50
    applied(
        tmp_path,
        encode_events(
            events.filter(~pl.col('event_id').is_in(late['event_id'].implode())), FLIGHT_SCHEMA
        ),
    )[0].close()
    store, n = applied(tmp_path, encode_events(late, FLIGHT_SCHEMA))
    assert (
        n.late == (late['known_time'] < newest - MAX_LATENESS).sum()
        and n.applied + n.late == n.messages
    )
    assert store.position() == LocalLog(tmp_path / 'log', readonly=True).end('flights')


@pytest.mark.parametrize(
    'field,value', [('event_id', None), ('known_time', None), ('sched', 10**9), ('origin', 'XXX')]
)
def test_an_event_that_breaks_the_contract_is_refused_and_the_rest_applied(
    field, value, events, tmp_path
):
    for kind in ('schedule', 'weather'):
        if kind == 'weather' and field == 'sched':
            continue
        odd = (
            events.filter(pl.col('kind') == kind)
            .head(3)
            .with_columns(pl.lit(value, events.schema[field]).alias(field))
        )
        rest = events.filter(pl.col('kind') == 'departure').head(50)
        store, n = applied(
            tmp_path / kind,
            [*encode_events(odd, FLIGHT_SCHEMA), *encode_events(rest, FLIGHT_SCHEMA)],
        )
        assert (n.refused, n.applied) == (3, 50) and store.position() == 53


def test_the_lake_and_the_store_agree_which_event_under_an_id_counts(events, tmp_path):
    storm = disturb_delivery(events, seed=9, late=0.1, minutes=90, twice=0.1)
    changed = events.sample(300, seed=1).with_columns(
        pl.when(pl.col('kind') == 'weather')
        .then(pl.col('wind_dir') + 10)
        .otherwise(pl.col('wind_dir'))
        .alias('wind_dir'),
        distance=pl.col('distance') + 1,
    )
    messages = encode_events(storm, FLIGHT_SCHEMA)
    draw = random.Random(1)
    for message in encode_events(changed, FLIGHT_SCHEMA):
        # before the first delivery too: then the other content is the one that stands
        messages.insert(draw.randrange(len(messages)), message)
    log = LocalLog(tmp_path / 'log')
    lake = Lake(tmp_path / 'lake.duckdb', FLIGHT_SCHEMA)
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    third = len(messages) // 3
    log.append('flights', messages[:third])
    counts = deliver_log(lake, store, log, 'flights', CONTRACT, 777)
    log.append('flights', messages[third : 2 * third])
    ingest(lake, log, 'flights', CONTRACT)  # and killed before the store had it
    counts += deliver_log(lake, store, log, 'flights', CONTRACT, 500)
    log.append('flights', messages[2 * third :])
    counts += deliver_log(lake, store, log, 'flights', CONTRACT, 5000)
    books = lake.sql('select sum(messages), sum(good), sum(repeated), sum(dead) from commits')
    refused = counts.refused + counts.changed
    assert books.row(0) == (counts.messages, counts.applied, counts.repeated, refused)
    assert counts.changed > 100
    assert counts.late == 0
    rebuilt = LmdbStore(tmp_path / 'rebuilt', FLIGHTS)
    apply_events(rebuilt, events_as_of(lake))
    assert list_records(store, rebuilt.clock()) == list_records(rebuilt)


def trimmed_log(at, events):
    "A log that a lake has read, and that lost its beginning afterwards"
    log = LocalLog(at / 'log')
    lake = Lake(at / 'lake.duckdb', FLIGHT_SCHEMA)
    whole = LmdbStore(at / 'whole', FLIGHTS)
    log.append('flights', encode_events(disturb_delivery(events, 5, 0.1, 90, 0.1), FLIGHT_SCHEMA))
    counts = deliver_log(lake, whole, log, 'flights', CONTRACT)
    trim_log(log, 'flights', Retention(size=100_000))
    assert log.start('flights') > 1000
    return log, lake, whole, counts


def test_a_new_store_gets_from_the_lake_what_the_log_lost(tmp_path, events):
    log, lake, whole, counts = trimmed_log(tmp_path, events)
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    with pytest.raises(MlrefError, match='removed by retention; .* fill a store from its lake'):
        apply_log(store, log, 'flights', FLIGHT_SCHEMA, CONTRACT)
    more = encode_events(
        events.tail(50).with_columns(event_id='new' + pl.col('event_id')), FLIGHT_SCHEMA
    )
    log.append('flights', more)  # nobody has it yet
    filled = deliver_log(lake, store, log, 'flights', CONTRACT, 777)
    deliver_log(lake, whole, log, 'flights', CONTRACT)
    assert (filled.skipped, filled.applied) == (0, counts.applied + 50)
    assert list_records(store) == list_records(whole)
    assert store_position(store) == store_position(whole)
    assert deliver_log(lake, store, log, 'flights', CONTRACT) == StreamCounts()
    log.append('flights', more)
    assert deliver_log(lake, store, log, 'flights', CONTRACT).repeated == 50


def test_a_store_that_died_while_it_was_filled_is_filled_again(tmp_path, events, monkeypatch):
    _, lake, whole, _ = trimmed_log(tmp_path, events)
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    write = store.write
    written = []

    def write_few(records):
        written.append(len(records))
        if len(written) == 4:
            raise KeyboardInterrupt
        write(records)

    monkeypatch.setattr(store, 'write', write_few)
    with pytest.raises(KeyboardInterrupt):
        fill_store(lake, store, 'flights', 500)
    assert store.position() == 0
    counts = fill_store(lake, store, 'flights', 777)
    assert counts.repeated > 500
    assert list_records(store) == list_records(whole)
    with pytest.raises(MlrefError, match='a store that has read nothing'):
        fill_store(lake, store, 'flights')


def test_what_the_lake_never_saw_is_counted_for_the_store_too(tmp_path, events):
    log, _, _, _ = trimmed_log(tmp_path, events)
    oldest = log.start('flights')
    lake = Lake(tmp_path / 'late.duckdb', FLIGHT_SCHEMA)
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    assert deliver_log(lake, store, log, 'flights', CONTRACT).skipped == oldest
    says = lake.sql("select says from quality where name = 'skipped messages'")['says'].to_list()
    assert says == [f'the lake begins at offset {oldest:,}; no message before it was read']


class Follower(RuleBasedStateMachine):
    "Events in any order, twice, late, with restarts and reshards: the store one rebuild gives"

    pool = None

    def __init__(self):
        super().__init__()
        self.tmp = tempfile.TemporaryDirectory()
        self.at = Path(self.tmp.name)
        self.log, self.store, self.sent = (
            LocalLog(self.at / 'log'),
            LmdbStore(self.at / 'store', FLIGHTS),
            0,
        )
        if Follower.pool is None:
            day = events_between(read_year(RAW), END - 5 * DAY, END)
            Follower.pool = encode_events(
                pl.concat(
                    [
                        day.filter(
                            pl.col('tailnum').is_in(
                                day['tailnum'].drop_nulls().unique().sort().head(6).implode()
                            )
                        ),
                        day.filter(pl.col('kind') == 'weather').head(20),
                    ]
                ).sort('known_time'),
                FLIGHT_SCHEMA,
            )

    @rule(picks=st_.lists(st_.integers(0, 10**6), min_size=1, max_size=12))
    def some(self, picks):
        self.log.append('flights', [self.pool[i % len(self.pool)] for i in picks])
        self.sent += len(picks)

    @rule(start=st_.integers(0, 10**6), n=st_.integers(1, 40))
    def run_of(self, start, n):
        start %= len(self.pool)
        self.log.append('flights', more := self.pool[start : start + n])
        self.sent += len(more)

    @rule(batch=st_.sampled_from([3, 17, 1000]))
    def feed(self, batch):
        apply_log(self.store, self.log, 'flights', FLIGHT_SCHEMA, CONTRACT, batch)
        assert self.store.position() == self.sent

    @rule()
    def again(self):
        self.store.close()
        self.store = LmdbStore(self.at / 'store', FLIGHTS)

    @rule(n=st_.integers(1, 3))
    def reshard(self, n):
        reshard(self.store, n)

    def teardown(self):
        apply_log(self.store, self.log, 'flights', FLIGHT_SCHEMA, CONTRACT)
        rebuilt = LmdbStore(self.at / 'rebuilt', FLIGHTS)
        apply_log(rebuilt, self.log, 'flights', FLIGHT_SCHEMA, CONTRACT)
        try:
            assert (
                list_records(self.store) == list_records(rebuilt)
                and self.store.position() == rebuilt.position() == self.sent
            )
        finally:
            self.store.close()
            rebuilt.close()
            self.log.file.env.close()
            self.tmp.cleanup()


DEEP = os.environ.get('MLREF_DEEP') == '1'
Follower.TestCase.settings = settings(
    max_examples=60 if DEEP else 6,
    stateful_step_count=20 if DEEP else 12,
    deadline=None,
    derandomize=not DEEP,
    suppress_health_check=list(HealthCheck),
)
test_full_rebuild_equals_incremental = Follower.TestCase
