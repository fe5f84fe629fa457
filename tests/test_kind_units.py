"""A time of another unit is refused at every door; rounding is towards 'not known yet'"""

import ast
import io
import json
import os
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mlref
from mlref.arguments import LONGEST_DAYS, LONGEST_WAIT_S
from mlref.contracts import at_clock
from mlref.core import (
    DAY,
    DAY_S,
    LAST_MINUTE,
    MlrefError,
    TrainingSet,
    check_minute,
    check_minutes,
    format_time,
    known_by,
    parse_time,
)
from mlref.events import events_between
from mlref.features import Entity, FeatureSet, FeatureView
from mlref.flights.events import FLIGHT_SCHEMA
from mlref.flights.task import flights_task
from mlref.last_values import get_online_features, push
from mlref.lmdb_store import LmdbStore
from mlref.materialize import apply_events, list_records
from mlref.offline import OfflineReader, point_in_time_join
from mlref.sources import from_table, read_source, to_minutes
from mlref.task import select_requests
from mlref.training_set import corrupt_future
from mlref.vectors import compute_vectors, read_vectors

DEEP = os.environ.get('MLREF_DEEP') == '1'
TRIES = settings(max_examples=2000 if DEEP else 100, deadline=None)
NOON = parse_time('2013-04-01T12:00')
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
IN_A_MINUTE = {'ms': 60_000, 'us': 60_000_000, 'ns': 60_000_000_000}

WHO = Entity(name='who', keys=('key',))
FACTS = from_table('facts', known='at', keys=('key',), values={'value': 'unit'})
VIEW = FeatureView(name='v', entity=WHO, source=FACTS, stats=('value', 'age'))
FEATURES = FeatureSet(name='f', views=(VIEW,))


def facts(at) -> pl.DataFrame:
    "One fact about a, known at some time"
    return pl.DataFrame({'at': at, 'key': ['a'], 'value': [1.0]})


def asked(cutoff) -> pl.DataFrame:
    return pl.DataFrame({'key': ['a'], 'cutoff': cutoff})


KNOWN = facts([NOON])


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    made = LmdbStore(tmp_path_factory.mktemp('store'), FEATURES)
    apply_events(made, KNOWN.with_columns(known_time='at'))
    yield made
    made.close()


# Two flights: one is scored at noon, one the minute before
TASK = flights_task()
EVENT = pl.DataFrame({'event_id': ['a', 'b'], 'sched': [NOON + 119, NOON + 120]})
ZERO = pl.lit(0, pl.Int64)
EVENT = EVENT.with_columns(kind=pl.lit('schedule'), event_time=ZERO, known_time=ZERO)


def ask_vectors(t, store):
    return compute_vectors(OfflineReader(KNOWN), asked([t]), FEATURES)


def ask_arrays(t, store):
    columns = {'key': np.array(['a'], object), 'cutoff': np.array([t])}
    return compute_vectors(store, columns, FEATURES)


def training_rows(t, store):
    one = np.zeros(1, np.float32)
    ids, times, matrix = np.array(['a']), np.array([NOON]), np.zeros((1, 0), np.float32)
    return known_by(TrainingSet(ids, times, times, one, matrix, (), {}), t)


# Every door through which a time comes in: (time, store) -> whatever
DOORS = {
    'a number': lambda t, store: check_minute(t, 'now'),
    'an array': lambda t, store: check_minutes([t], 'now'),
    'a column': lambda t, store: check_minutes(pl.Series([t]), 'now'),
    'cutoff of a join': lambda t, store: point_in_time_join(asked([t]), (VIEW,), KNOWN),
    'cutoff of a vector': ask_vectors,
    'cutoff of arrays': ask_arrays,
    'cutoff of a served vector': lambda t, store: read_vectors(store, asked([t]), FEATURES),
    'known time of a source': lambda t, store: read_source(facts([t]), FACTS),
    'known time of an event': lambda t, store: apply_events(
        store, pl.DataFrame({'at': [NOON], 'key': ['a'], 'value': [1.0], 'known_time': [t]})
    ),
    't of a push': lambda t, store: push(store, 'facts/who', ['b'], np.array([t]), np.ones((1, 1))),
    'known of a push': lambda t, store: push(
        store, 'facts/who', ['b'], np.array([NOON]), np.ones((1, 1)), np.array([t])
    ),
    'now of a read': lambda t, store: get_online_features(store, ['facts/who'], [['a']], t),
    'cutoff of a training set': training_rows,
    'a first cut-off': lambda t, store: select_requests(TASK, EVENT, t, LAST_MINUTE),
    'a last cut-off': lambda t, store: select_requests(TASK, EVENT, 0, t),
    'the edge of a stretch': lambda t, store: events_between(EVENT, 0, t),
    'where garbage begins': lambda t, store: corrupt_future(EVENT, t, FLIGHT_SCHEMA),
    'a clock to trim to': lambda t, store: list_records(store, t),
    'the clock of a contract': lambda t, store: at_clock((), FLIGHT_SCHEMA, t),
}
WRONG = {
    'seconds': NOON * 60,
    'milliseconds': NOON * 60_000,
    'microseconds': NOON * 60_000_000,
    'nanoseconds': NOON * 60_000_000_000,
    'negative': -1,
    'after 2100': LAST_MINUTE + 1,
    'a fraction': NOON + 0.5,
    'NaN': float('nan'),
    'text': '2013-04-01',
    'truth': True,
    'a date': date(2013, 4, 1),
    'a time without a zone': datetime(2013, 4, 1, 12),
}


@pytest.mark.parametrize('wrong', WRONG)
@pytest.mark.parametrize('door', DOORS)
def test_what_is_no_minute_is_refused_at_every_door(door, wrong, store):
    before = store.clock()
    with pytest.raises(MlrefError, match='expected'):
        DOORS[door](WRONG[wrong], store)
    assert store.clock() == before


@pytest.mark.parametrize('door', DOORS)
def test_a_minute_passes_every_door(door, store):
    DOORS[door](NOON, store)


@TRIES
@given(minute=st.integers(0, LAST_MINUTE), in_a_minute=st.sampled_from((60, *IN_A_MINUTE.values())))
def test_no_time_of_another_unit_passes_from_1973_on(minute, in_a_minute):
    assert check_minute(minute, 't') == minute
    if minute * in_a_minute > LAST_MINUTE:
        with pytest.raises(MlrefError, match='which in .* is|convert it'):
            check_minute(minute * in_a_minute, 't')
    else:
        assert minute < parse_time('1972-03-01')


@TRIES
@given(st.lists(st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.none(), st.booleans())))
def test_minutes_pass_as_they_are_or_not_at_all(values):
    try:
        passed = check_minutes(values, 't').tolist()
    except MlrefError:
        assert not all(type(v) is int and 0 <= v <= LAST_MINUTE for v in values)
    else:
        assert passed == values
        assert all(type(v) is int and 0 <= v <= LAST_MINUTE for v in values)


ZONES = st.integers(-23 * 60, 23 * 60).map(lambda m: timezone(timedelta(minutes=m)))


@TRIES
@given(
    st.datetimes(datetime(1970, 1, 3), datetime(2099, 12, 30)),
    st.one_of(st.none(), ZONES),
    st.sampled_from(('T', ' ')),
)
def test_a_text_is_the_last_minute_that_had_begun_whatever_its_offset(moment, zone, between):
    moment = moment.replace(tzinfo=zone)
    since = (moment if zone else moment.replace(tzinfo=UTC)) - EPOCH
    microseconds = (since.days * 86_400 + since.seconds) * 10**6 + since.microseconds
    assert parse_time(moment.isoformat(between)) == microseconds // 60_000_000


CORPUS = json.loads((Path(__file__).parent / 'corpus' / 'times.json').read_text())


@pytest.mark.parametrize('text', [*CORPUS['refused'], None, 7, b'2013-04-01'])
def test_a_text_that_is_no_time_of_these_years_is_refused(text):
    with pytest.raises(MlrefError, match='expected'):
        parse_time(text)


@pytest.mark.parametrize('text', CORPUS['read'])
def test_a_text_is_read_as_it_was(text):
    assert parse_time(text) == CORPUS['read'][text]


def test_every_minute_has_a_name():
    for t in (-(2**63), -1, 0, NOON, LAST_MINUTE, 2**40, 2**63):
        assert isinstance(format_time(t), str)


@TRIES
@given(
    unit=st.sampled_from((60, 60_000, 60_000_000)),
    minute=st.integers(2_000_000, LAST_MINUTE),
    dtype=st.sampled_from((pl.Int64, pl.UInt64)),
)
def test_a_column_of_numbers_is_of_minutes_or_refused_with_its_unit(unit, minute, dtype):
    times = pl.Series('at', [None, minute], dtype)
    assert to_minutes(times).to_list() == [None, minute]
    with pytest.raises(MlrefError, match=f'expected at in whole minutes .* divide by {unit}$'):
        to_minutes(times * unit)


@TRIES
@given(
    unit=st.sampled_from(tuple(IN_A_MINUTE)),
    minute=st.integers(0, 60_000_000),
    beyond=st.integers(0, 59_999_999_999),
    zone=st.sampled_from(('UTC', 'America/New_York', 'Asia/Kolkata')),
)
def test_a_fact_is_known_from_the_next_whole_minute_and_a_cutoff_knows_the_last(
    unit, minute, beyond, zone
):
    tick = minute * IN_A_MINUTE[unit] + beyond % IN_A_MINUTE[unit]
    times = pl.Series('at', [tick], pl.Int64).cast(pl.Datetime(unit, 'UTC'))
    times = times.dt.convert_time_zone(zone)
    assert to_minutes(times)[0] == -(-tick // IN_A_MINUTE[unit])
    assert to_minutes(times, up=False)[0] == tick // IN_A_MINUTE[unit]


@TRIES
@given(
    known=st.tuples(st.sampled_from(tuple(IN_A_MINUTE)), st.integers(-2, 2), st.integers(-1, 1)),
    ask=st.tuples(st.sampled_from(tuple(IN_A_MINUTE)), st.integers(-2, 2), st.integers(-1, 1)),
)
def test_a_join_of_any_two_units_knows_what_was_known_and_nothing_later(known, ask):
    "Against exact nanoseconds: a tick before, at or after a minute, on both sides"

    def moment(unit, minutes, ticks):
        tick = (NOON + minutes) * IN_A_MINUTE[unit] + ticks
        column = pl.Series([tick], dtype=pl.Int64).cast(pl.Datetime(unit, 'UTC'))
        return column, tick * (IN_A_MINUTE['ns'] // IN_A_MINUTE[unit])

    at, known_ns = moment(*known)
    cutoff, asked_ns = moment(*ask)
    found = point_in_time_join(asked(cutoff), (VIEW,), facts(at))['v_value'][0]
    minute = IN_A_MINUTE['ns']
    # whole minutes are the grid: known from the next one on, asked at the last one
    assert (found == 1.0) == (-(-known_ns // minute) <= asked_ns // minute)
    if found is not None:
        assert known_ns <= asked_ns


def test_naive_times_are_refused_by_name_in_every_unit():
    for unit in IN_A_MINUTE:
        naive = pl.Series([datetime(2013, 4, 1)]).cast(pl.Datetime(unit))
        with pytest.raises(MlrefError, match='zone'):
            point_in_time_join(asked(naive), (VIEW,), KNOWN)
        with pytest.raises(MlrefError, match='at with a time zone'):
            read_source(facts(naive), FACTS)
        with pytest.raises(MlrefError, match='datetime64'):
            compute_vectors(OfflineReader(KNOWN), asked(naive), FEATURES)


def test_a_file_with_a_time_that_overflows_is_refused_too():
    table = io.StringIO('at,key,value\n9223372036854775807,a,1.0\n')
    with pytest.raises(MlrefError, match='in whole minutes'):
        read_source(pl.read_csv(table), FACTS)


def test_a_day_in_seconds_and_the_longest_settings_stand_in_one_place():
    "Two modules that mean the same bound do not each have their own"
    found = set()
    for module in sorted(Path(mlref.__file__).parent.rglob('*.py')):
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Constant) and node.value in (86_400, 3650):
                found.add((module.name, node.value))
    assert found == {('arguments.py', LONGEST_WAIT_S), ('arguments.py', LONGEST_DAYS)}
    assert DAY_S == timedelta(minutes=DAY).total_seconds() == 86_400
