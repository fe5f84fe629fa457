"""A message that a stage cannot work on is refused before, or set aside, and the rest goes on"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlref import outbox
from mlref.contracts import Rule
from mlref.core import MlrefError, parse_time, write_json
from mlref.dead_letters import Outage, PoisonPolicy, work_in_parts
from mlref.events import encode_events, events_between
from mlref.features import Entity, FeatureSet, FeatureView, Source
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_year
from mlref.flights.features import FLIGHTS
from mlref.flights.task import flights_task
from mlref.lake import Lake
from mlref.limits import KEYS_FIT, LIMIT_RULES, NUMBERS_FIT, store_limits
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import list_records
from mlref.outbox import list_set_aside, upload_pending
from mlref.registry import Registry
from mlref.stream import apply_log, deliver_log, list_dead_letters, replay_dead_letters

TASK = flights_task()
RULES = flight_rules(list(TASK.lookups.airports))
BAD = set()  # ids on which the view's own function raises
TAIL = Entity(name='tail', keys=('tailnum',))


def moody_rows(events):
    left = events.filter(pl.col('kind') == 'departure')
    if BAD & set(left['event_id']):
        raise ZeroDivisionError('a flight of no miles')
    return left.select('tailnum', t='known_time', delay='dep_delay').sort('t')


MOODY = Source(
    name='moody',
    values={'delay': 'minute'},
    rows=moody_rows,
    columns=('event_id', 'kind', 'known_time', 'tailnum', 'dep_delay'),
)
VIEW = FeatureView(name='moody', entity=TAIL, source=MOODY, stats=('sum:delay',), windows=(60,))
FEATURES = FeatureSet(name='moody', views=(VIEW,))


@pytest.fixture(scope='module')
def events():
    end = parse_time('2013-04-10T07:00')
    return events_between(read_year(raw_folder()), end - 600, end)


@pytest.fixture(autouse=True)
def nothing_bad():
    BAD.clear()


def fed(at, messages, features=FEATURES, rules=RULES, **settings):
    log = LocalLog(at / 'log')
    log.append('flights', messages)
    store = LmdbStore(at / 'store', features)
    counts = apply_log(store, log, 'flights', FLIGHT_SCHEMA, rules, **settings)
    log.close()
    return store, counts


def departures(events):
    return events.filter(pl.col('kind') == 'departure')['event_id'].to_list()


@pytest.mark.parametrize('places', [(0,), (-1,), (3, 4), (0, 17, -1)])
@pytest.mark.parametrize('batch', [50_000, 7])
def test_a_view_that_raises_on_some_events_stops_no_other(events, places, batch, tmp_path):
    "What is applied is what a log without the poison gives, byte for byte"
    ids = departures(events)
    chosen = {ids[place] for place in places}
    BAD.update(chosen)
    store, counts = fed(tmp_path / 'with', encode_events(events, FLIGHT_SCHEMA), batch=batch)
    rest = events.filter(~pl.col('event_id').is_in(list(chosen)))
    clean, _ = fed(tmp_path / 'without', encode_events(rest, FLIGHT_SCHEMA))
    assert list_records(store) == list_records(clean)
    assert (counts.dead, counts.applied) == (len(chosen), rest.height)
    assert store.position() == counts.messages == events.height
    letters = list_dead_letters(store)
    assert {json.loads(raw)['event_id'] for raw in letters['raw']} == chosen
    where = events['event_id'].to_list()
    assert letters['off'].to_list() == sorted(where.index(each) for each in chosen)
    assert set(letters['reasons']) == {'ZeroDivisionError: a flight of no miles'}


def test_a_dead_letter_goes_in_once_its_code_is_mended(events, tmp_path):
    "Replayed, and nothing of it is left or applied twice; unmended, it stays with its reason"
    BAD.update(departures(events)[5:8])
    store, counts = fed(tmp_path / 'a', encode_events(events, FLIGHT_SCHEMA))
    again = replay_dead_letters(store, FLIGHT_SCHEMA, RULES)
    assert (again.dead, again.applied, list_dead_letters(store).height) == (3, 0, 3)
    BAD.clear()
    position = store.position()
    again = replay_dead_letters(store, FLIGHT_SCHEMA, RULES)
    assert (again.dead, again.applied, list_dead_letters(store).height) == (0, 3, 0)
    whole, _ = fed(tmp_path / 'b', encode_events(events, FLIGHT_SCHEMA))
    assert list_records(store) == list_records(whole)
    assert store.position() == position
    assert replay_dead_letters(store, FLIGHT_SCHEMA, RULES).messages == 0


def test_code_that_fails_on_every_message_stops_the_feed(events, tmp_path):
    "A circuit breaker: a broken release does not throw a day away"
    BAD.update(departures(events))
    messages = encode_events(events, FLIGHT_SCHEMA)
    with pytest.raises(Outage, match='at most 10 messages of a batch .* ZeroDivisionError'):
        fed(tmp_path, messages, policy=PoisonPolicy(max_dead=10))
    store = LmdbStore(tmp_path / 'store', FEATURES, readonly=True)
    letters = list_dead_letters(store)
    assert letters.height == 10
    assert letters['off'][-1] < store.position() < len(messages)


def test_a_full_store_is_no_fault_of_a_message(events, tmp_path):
    log = LocalLog(tmp_path / 'log')
    log.append('flights', encode_events(events, FLIGHT_SCHEMA))
    store = LmdbStore(tmp_path / 'store', FLIGHTS, size=200_000)
    with pytest.raises(Outage, match='larger size'):
        apply_log(store, log, 'flights', FLIGHT_SCHEMA, RULES)
    assert (store.position(), list_dead_letters(store).height) == (0, 0)
    store.close()
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    assert apply_log(store, log, 'flights', FLIGHT_SCHEMA, RULES).applied == events.height


def odd_events(events):
    "A tail number of 600 letters, an air time of 4.8e18: good by every rule of the flights"
    landed = events.filter(pl.col('kind') == 'arrival')
    long = landed.head(1).with_columns(
        tailnum=pl.lit('N' * 600), event_id=pl.lit('long', pl.String)
    )
    large = landed[1:3].with_columns(
        air_time=pl.lit(4_800_000_000_000_000_000, events.schema['air_time']),
        event_id=pl.concat_str(pl.lit('large'), 'event_id'),
    )
    return pl.concat([landed[:50], long, landed[50:100], large, landed[100:]])


def test_what_the_store_refuses_the_contract_refuses_first(events, tmp_path):
    "With its reason, in the lake and in the store, before it moves anything"
    odd = odd_events(events)
    log = LocalLog(tmp_path / 'log')
    log.append('flights', encode_events(odd, FLIGHT_SCHEMA))
    lake = Lake(tmp_path / 'lake.duckdb', FLIGHT_SCHEMA)
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    counts = deliver_log(lake, store, log, 'flights', TASK.contract)
    assert (counts.refused, counts.dead, counts.applied) == (3, 0, odd.height - 3)
    reasons = lake.sql('select reasons from dead_letters order by off')['reasons'].to_list()
    assert reasons == [KEYS_FIT, NUMBERS_FIT, NUMBERS_FIT]


def test_what_slips_through_a_contract_without_limits_is_set_aside(events, tmp_path):
    odd = odd_events(events)
    store, counts = fed(tmp_path, encode_events(odd, FLIGHT_SCHEMA), FLIGHTS)
    assert counts.refused == 0 and counts.applied + counts.dead == odd.height
    said = ' '.join(list_dead_letters(store)['reasons'])
    assert 'names of at most 500 bytes' in said and '2**62' in said.replace('2^62', '2**62')


def test_every_task_has_the_limits_of_its_own_features():
    assert [rule.name for rule in TASK.contract][-2:] == list(LIMIT_RULES)
    small = replace(TASK, features=FEATURES, monitored=())
    names = [rule.name for rule in small.contract]
    assert names.count(KEYS_FIT) == names.count(NUMBERS_FIT) == 1
    assert replace(TASK).contract[:-2] == TASK.contract[:-2]
    assert store_limits(FeatureSet(name='none', views=()), FLIGHT_SCHEMA) == ()


MANY = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@MANY
@given(st.lists(st.sampled_from('.x!'), max_size=60), st.integers(1, 3))
def test_every_message_is_done_or_dead_once_and_in_order(kinds, tries):
    "'x' fails always, '!' the first time; whatever their places"
    state = SimpleNamespace(done=[], dead=[], seen=set())

    def prepare(start, end):
        part = range(start, end)
        if any(kinds[i] == 'x' for i in part):
            raise KeyError('x')
        moody = [i for i in part if kinds[i] == '!' and i not in state.seen]
        if moody and end - start == 1:
            state.seen.update(moody)
            raise ValueError('!')
        return list(part)

    def commit(part):
        state.done += part
        return len(part)

    def set_aside(place, reason):
        assert reason == "KeyError: 'x'" or tries == 1
        state.dead.append(place)
        return 1

    policy = PoisonPolicy(max_tries=tries)
    assert sum(work_in_parts(len(kinds), prepare, commit, set_aside, policy)) == len(kinds)
    assert sorted(state.done + state.dead) == list(range(len(kinds)))
    assert state.done == sorted(state.done) and state.dead == sorted(state.dead)
    assert {i for i, kind in enumerate(kinds) if kind == 'x'} <= set(state.dead)


def test_sums_that_would_overflow_together_cost_one_event_and_no_more(events, tmp_path):
    "Each fits, two of them do not: the second is set aside, a third that fits goes in"
    source = Source(
        name='big',
        values={'x': 'unit'},
        rows=lambda events: events.select('tailnum', t='known_time', x='number').sort('t'),
        columns=('known_time', 'tailnum', 'number'),
    )
    view = FeatureView(name='big', entity=TAIL, source=source, stats=('sum:x',), windows=(60,))
    features = FeatureSet(name='big', views=(view,))
    head = events.head(3)
    numbers = [2**61, 2**61 + 1, 5]
    rows = head.with_columns(
        tailnum=pl.lit('N1'), number=pl.Series(numbers, dtype=head.schema['number'])
    )
    store, counts = fed(tmp_path, encode_events(rows, FLIGHT_SCHEMA), features, ())
    assert (counts.applied, counts.dead) == (2, 1)
    total = store.read(source, TAIL, ['N1'], np.array([[2**40]]))[0, 0].tolist()
    assert total == [2, 2**61 + 5]


@pytest.mark.parametrize('wrong', [-1, 0.5, '3', None, True])
def test_settings_of_the_policy_are_checked(wrong):
    for name in ('max_tries', 'max_dead'):
        with pytest.raises(MlrefError, match=f'{name} of a .* as a whole number from'):
            PoisonPolicy(**{name: wrong})
    with pytest.raises(MlrefError, match='max_tries of a message as a whole number from 1'):
        PoisonPolicy(max_tries=0)
    assert PoisonPolicy(max_tries=1, max_dead=0).max_dead == 0


def test_a_message_on_which_a_rule_raises_is_dead_and_the_rest_goes_in(events, tmp_path):
    "In the lake and in the store; a rule that fits no batch at all stops both"
    strict = Rule(name='digits', holds=pl.col('event_id').str.to_integer() >= 0)
    rows = events.head(60)
    ids = [str(i) if i != 41 else 'none' for i in range(rows.height)]
    log = LocalLog(tmp_path / 'log')
    log.append('flights', encode_events(rows.with_columns(event_id=pl.Series(ids)), FLIGHT_SCHEMA))
    lake = Lake(tmp_path / 'lake.duckdb', FLIGHT_SCHEMA)
    store = LmdbStore(tmp_path / 'store', FLIGHTS)
    never = replace(strict, holds=pl.col('no_such_column'))
    with pytest.raises(MlrefError, match='fit the rules'):
        deliver_log(lake, store, log, 'flights', (never,))
    counts = deliver_log(lake, store, log, 'flights', (strict,))
    assert (counts.refused, counts.applied) == (1, 59)
    letters = lake.sql('select off, reasons from dead_letters')
    assert letters['off'].to_list() == [41] and 'fit the rules' in letters['reasons'][0]


def test_letters_that_wait_stop_the_feed_whatever_the_size_of_a_batch(events, tmp_path):
    "Event by event, code that always fails must not throw a day away either"
    BAD.update(departures(events))
    with pytest.raises(Outage, match='at most 5 messages'):
        fed(
            tmp_path, encode_events(events, FLIGHT_SCHEMA), batch=1, policy=PoisonPolicy(max_dead=5)
        )


def test_a_model_that_the_registry_refuses_keeps_no_other_waiting(tmp_path, monkeypatch):
    registry = Registry(tmp_path, name='late')
    for model in 'abc':
        write_json(tmp_path / 'waiting' / f'{model}.json', {'tags': {}})

    def upload(registry, model):
        if model == 'a':
            raise MlrefError('expected a shorter tag')
        (tmp_path / 'waiting' / f'{model}.json').unlink()
        return '7'

    monkeypatch.setattr(outbox, 'upload_model', upload)
    found = [upload_pending(registry) for _ in range(4)]
    assert [list(each.sent) for each in found] == [['b', 'c'], [], [], []]
    assert [list(each.dead) for each in found] == [[], [], ['a'], []]
    assert list_set_aside(registry) == {'a': 'expected a shorter tag'}
