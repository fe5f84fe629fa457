"""A stamp from the future or of another unit moves nothing: all goes on as if it never came"""

import json
import os
from dataclasses import fields

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.checks import check_clock, check_freshness
from mlref.consumer import Consumer
from mlref.contracts import CLOCK_RULES, at_clock, base_rules, check_messages, clock_of
from mlref.core import DAY, MAX_AHEAD, MlrefError, parse_time, wall_clock
from mlref.events import encode_events, events_between
from mlref.flights.common import HORIZON
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_year
from mlref.flights.features import FLIGHTS
from mlref.flights.task import flights_task
from mlref.ingest import check_tables, follow_log, ingest, quality_rows, release
from mlref.lake import Lake, events_as_of, insert_rows
from mlref.last_values import push
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.log_position import LogPosition
from mlref.materialize import apply_events, list_records
from mlref.schema import EventSchema
from mlref.stream import StreamCounts, apply_log, deliver_log
from mlref.task import no_checks
from mlref.vectors import compute_vectors
from mlref.workspace import TOPIC, Workspace, deliver_events
from server_fixture import deliver_body

DEEP = os.environ.get('MLREF_DEEP') == '1'
TASK = flights_task()
END = parse_time('2013-04-12T07:00')
START = END - 2 * DAY
YEAR = 365 * DAY
# What a producer may write instead of a minute `t`, when the clock shows `now`
STAMPS = {
    'next year': lambda t, now: now + YEAR,
    'an hour ahead': lambda t, now: now + 60,
    'just too far ahead': lambda t, now: now + MAX_AHEAD + 1,
    'seconds': lambda t, now: t * 60,
    'milliseconds': lambda t, now: t * 60_000,
    'nanoseconds': lambda t, now: t * 60_000_000_000,
    'before 1970': lambda t, now: -t,
    'the largest number': lambda t, now: 2**63 - 1,
}


def restamp(message: bytes, stamp: str, now: int, event_id: str | None = None) -> bytes:
    "The same event with its times in the future, or in another unit"
    event = json.loads(message)
    for name in ('event_time', 'known_time'):
        event[name] = STAMPS[stamp](event[name], now)
    event['event_id'] = event_id or f'bad:{event["event_id"]}'
    return json.dumps(event).encode()


def weather_of(messages: list[bytes]) -> list[bytes]:
    "Those that no other rule ties to a time"
    return [message for message in messages if b'"kind":"weather"' in message]


@pytest.fixture(scope='module')
def year():
    return read_year(raw_folder())


@pytest.fixture(scope='module')
def events(year):
    return events_between(year, START, END)


@pytest.fixture(scope='module')
def flights(year):
    soon = pl.col('sched').is_between(END - 300 + HORIZON, END + HORIZON - 1)
    asked = year.filter((pl.col('kind') == 'schedule') & soon).sort('sched', 'event_id')
    return asked.with_columns(cutoff=pl.lit(END - 1))


class Story:
    "A log, a lake and a store that follows them, on a clock"

    def __init__(self, folder):
        self.log = LocalLog(folder / 'log')
        self.lake = Lake(folder / 'lake.duckdb', FLIGHT_SCHEMA)
        self.store = LmdbStore(folder / 'store', FLIGHTS)
        self.counts = StreamCounts()

    def deliver(self, messages, now, batch=50_000):
        if messages:
            self.log.append('flights', messages)
        rules = at_clock(TASK.contract, FLIGHT_SCHEMA, now)
        args = (self.lake, self.store, self.log, 'flights', rules, batch)
        self.counts += deliver_log(*args)

    def told(self):
        "All that a later step can see, without places in the log"
        columns = list(FLIGHT_SCHEMA.columns)
        watermark = self.lake.sql('select max(watermark) as w from offsets')['w'][0]
        rows = events_as_of(self.lake).select(columns).sort('event_id')
        counts = {
            field.name: getattr(self.counts, field.name)
            for field in fields(StreamCounts)
            if field.name not in ('messages', 'refused')
        }
        return rows.rows(), watermark, self.store.clock(), list_records(self.store), counts

    def close(self):
        for part in (self.log, self.lake, self.store):
            part.close()


def in_four(messages, events):
    "The messages of each half day, with the minute at which it ends"
    known = events['known_time'].to_numpy()
    edges = [START + part * DAY // 2 for part in range(5)]
    places = np.searchsorted(known, edges)
    for first, last, now in zip(places, places[1:], edges[1:], strict=False):
        yield messages[first:last], now


def test_after_every_bad_stamp_the_day_goes_on_as_if_it_had_never_come(events, flights, tmp_path):
    messages = encode_events(events, FLIGHT_SCHEMA)
    (tmp_path / 'clean').mkdir()
    (tmp_path / 'bad').mkdir()
    clean, story = Story(tmp_path / 'clean'), Story(tmp_path / 'bad')
    sent = 0
    for part, now in in_four(messages, events):
        clean.deliver(part, now)
        bad = list(part)
        for place, stamp in enumerate(STAMPS):
            # at the begin, in the middle and at the end, once under the id of a good event to come
            at = place * len(part) // (len(STAMPS) - 1)
            to_come = json.loads(part[-1])['event_id'] if place % 2 else None
            bad.insert(at, restamp(weather_of(part)[place], stamp, now, to_come))
            sent += 1
        story.deliver(bad, now, batch=1777)
    assert story.told() == clean.told()
    assert story.counts.refused == sent + clean.counts.refused
    assert story.counts.late == 0
    served = [compute_vectors(s.store, flights, FLIGHTS, TASK.lookups) for s in (story, clean)]
    assert np.array_equal(*served, equal_nan=True)
    reasons = story.lake.sql('select reasons from dead_letters')['reasons'].str.split('; ')
    assert sum(bool({*each} & {*CLOCK_RULES}) for each in reasons) == sent
    clean.close()
    story.close()


@settings(max_examples=60 if DEEP else 6, deadline=None)
@given(data=st.data())
def test_any_bad_stamp_anywhere_moves_nothing(data, events, tmp_path_factory):
    some = events.tail(240)
    messages = encode_events(some, FLIGHT_SCHEMA)
    folder = tmp_path_factory.mktemp('any')
    (folder / 'clean').mkdir()
    (folder / 'bad').mkdir()
    clean, story = Story(folder / 'clean'), Story(folder / 'bad')
    clean.deliver(messages, END)
    bad = list(messages)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(bad)))
        like = data.draw(st.sampled_from(weather_of(messages)))
        taken = data.draw(st.one_of(st.none(), st.sampled_from(some['event_id'].to_list())))
        stamp = data.draw(st.sampled_from(sorted(STAMPS)))
        bad.insert(at, restamp(like, stamp, END, taken))
    story.deliver(bad, END, data.draw(st.integers(40, 300)))
    assert story.told() == clean.told()
    clean.close()
    story.close()


def test_the_bound_is_the_schemas_and_exact(events):
    message = encode_events(events.tail(1), FLIGHT_SCHEMA)
    known = events['known_time'][-1]
    for ahead in (-1, 0, 1, 5, 6):
        rules = at_clock((), FLIGHT_SCHEMA, known - ahead)
        got = check_messages(message, FLIGHT_SCHEMA, rules)
        assert got.events.height == (ahead <= FLIGHT_SCHEMA.max_ahead)
        assert got.clock == known - ahead


def test_a_forecast_may_speak_of_later_and_be_known_no_later():
    schema = EventSchema(
        payload={'place': pl.String, 'rain': pl.Float64},
        kinds=('measured', 'forecast'),
        entity_id='place',
        event_ahead={'forecast': 3 * DAY},
    )
    rules = at_clock(base_rules(schema), schema, END)

    def judged(kind, event_time, known_time):
        times = {'event_time': END + event_time, 'known_time': END + known_time}
        event = {'event_id': 'a', 'kind': kind, **times, 'place': 'EWR', 'rain': 0.5}
        return check_messages([json.dumps(event).encode()], schema, rules).events.height == 1

    assert judged('measured', -60, 0)
    assert not judged('measured', 60, 60)
    assert not judged('measured', 60, 0)
    assert judged('forecast', 3 * DAY, 0)
    assert not judged('forecast', 3 * DAY, 6)
    assert not judged('forecast', 3 * DAY + 6, 0)
    for odd in ({'event_ahead': {'guess': 1}}, {'max_ahead': -1}, {'max_ahead': 1.5}):
        with pytest.raises(MlrefError, match='expected'):
            EventSchema(schema.payload, schema.kinds, 'place', **odd)


def test_without_a_clock_of_its_own_every_reader_uses_the_wall_clock(events, tmp_path):
    good = encode_events(events.tail(50), FLIGHT_SCHEMA)
    bad = [restamp(weather_of(good)[0], stamp, wall_clock()) for stamp in STAMPS]
    log = LocalLog(tmp_path / 'log')
    # 'the largest number' too: the server takes what can be read, its readers judge
    deliver_body(log, FLIGHT_SCHEMA, b'\n'.join([*bad, *good]))
    assert clock_of(TASK.contract) is None

    def check_lake(name, read):
        lake = Lake(tmp_path / f'{name}.duckdb', FLIGHT_SCHEMA)
        read(lake)
        row = lake.sql('select sum(good), sum(dead), max(watermark), max(clock) from commits').row(
            0
        )
        assert row[:3] == (50, len(bad), events['known_time'][-1])
        assert abs(row[3] - wall_clock()) <= 1
        assert release(lake, TASK.contract) == 0
        lake.close()

    def follow(lake):
        done = iter((False, True))
        consumer = Consumer(log, 'events', {0: LogPosition()})
        follow_log(lake, consumer, TASK.contract, lambda: next(done), lambda: None)

    check_lake('ingest', lambda lake: ingest(lake, log, 'events', TASK.contract))
    check_lake('follow', follow)
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    counts = apply_log(store, log, 'events', FLIGHT_SCHEMA, TASK.contract)
    assert (counts.applied, counts.refused, counts.late) == (50, len(bad), 0)
    assert store.clock() == events['known_time'][-1]
    store.close()


def test_a_replay_judges_by_the_clock_of_its_delivery(year, tmp_path):
    day = events_between(year, END - DAY, END)
    home = Workspace(tmp_path, TASK)
    deliver_events(home, day, END - 600)
    assert home.lake.sql('select distinct clock from commits')['clock'].to_list() == [END - 600]
    weather = weather_of(encode_events(day, FLIGHT_SCHEMA))
    home.log.append(TOPIC, [restamp(weather[0], 'an hour ahead', END)])
    deliver_events(home, day, END)
    assert home.store.clock() == day['known_time'][-1]
    assert home.lake.sql('select count(*) as n from dead_letters')['n'][0] == 1
    home.close()


def test_a_refused_stamp_does_not_become_right_by_waiting(events, tmp_path):
    story = Story(tmp_path)
    messages = encode_events(events.tail(100), FLIGHT_SCHEMA)
    story.deliver([restamp(weather_of(messages)[0], 'next year', END), *messages], END)
    later = at_clock(TASK.contract, FLIGHT_SCHEMA, END + 2 * YEAR)
    assert release(story.lake, later) == 0
    assert release(story.lake, TASK.contract) == 0
    assert story.lake.sql('select count(*) as n from dead_letters')['n'][0] == 1
    story.close()


@pytest.mark.parametrize('moved', [600, -600, 2 * YEAR])
def test_a_store_behind_its_lake_judges_as_the_lake_did_wherever_the_clock_is_now(
    moved, events, tmp_path
):
    story = Story(tmp_path)
    messages = encode_events(events.tail(200), FLIGHT_SCHEMA)
    messages.insert(100, restamp(weather_of(messages)[0], 'an hour ahead', END))
    story.log.append('flights', messages)
    ingest(story.lake, story.log, 'flights', at_clock(TASK.contract, FLIGHT_SCHEMA, END))
    # killed here, and on when the clock shows another time
    story.deliver([], END + moved, batch=70)
    assert (story.counts.applied, story.counts.refused) == (200, 1)
    rebuilt = LmdbStore(tmp_path / 'rebuilt', FLIGHTS)
    apply_events(rebuilt, events_as_of(story.lake))
    assert list_records(story.store) == list_records(rebuilt)
    rebuilt.close()
    story.close()


def test_a_clock_that_jumps_is_a_finding_once(events, tmp_path):
    story = Story(tmp_path)
    messages = encode_events(events, FLIGHT_SCHEMA)

    def found():
        results = check_tables(story.lake, story.log, no_checks, END)
        insert_rows(story.lake, quality_rows(story.lake, results, END))
        return [result.rule for result in results]

    story.deliver(messages[:100], END - 60)
    story.deliver(messages[100:200], END)
    assert found() == []
    story.deliver(messages[200:300], END - 2)  # two machines never agree exactly
    assert found() == []
    story.deliver(messages[300:400], END + 10 * YEAR)
    assert found() == []
    story.deliver(messages[400:500], END + 1)
    assert found() == ['clock']
    story.close()


def test_a_pushed_row_of_next_year_freezes_no_key(tmp_path):
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    layout = next(each for each in store.layouts.values() if each.newest)
    row = np.ones((1, layout.width - 1))

    def send(t, known=None, now=END):
        known = None if known is None else np.array([known])
        return push(store, layout.name, ['x'], np.array([t]), row, known, now)

    assert send(END - 60) == 1
    for t, known, now in (
        (END + YEAR, None, END),
        (END, END + 6, END),
        (wall_clock() + 60, None, None),
    ):
        with pytest.raises(MlrefError, match='as known'):
            send(t, known, now)
    assert send(END) == 1
    assert send(END + DAY, known=END) == 1  # a plan
    store.close()


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 5))
def test_a_clock_is_judged_by_its_largest_step_back(readings, max_ahead):
    clocks = pl.Series([END + reading for reading in readings])
    steps = [max(readings[: i + 1]) - reading for i, reading in enumerate(readings)]
    result = check_clock(clocks, clocks.cum_max().shift(1), max_ahead)
    assert result.value == max(steps)
    assert result.holds == (max(steps) <= max_ahead)


@given(st.integers(-2 * YEAR, 2 * YEAR), st.integers(0, 500), st.integers(0, 10))
def test_only_a_row_between_too_old_and_the_future_is_fresh(age, max_age, max_ahead):
    result = check_freshness(END - age, END, max_age, max_ahead)
    assert result.holds == (-max_ahead <= age <= max_age)
    assert ('future' in result.says) == (age < -max_ahead)
