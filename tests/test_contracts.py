"""Thresholds refuse a batch whole, quarantine is released once, pandera is met both ways"""

import warnings
from pathlib import Path

import pandera.polars as pa
import polars as pl
import pytest

from mlref.challenger import bootstrap
from mlref.contracts import Rule, from_pandera, to_pandera, validate
from mlref.core import MlrefError, digest, format_time, parse_time
from mlref.events import decode_events, encode_events
from mlref.flights.common import FLIGHT_CALENDAR
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, MISSING_ZONES, raw_folder, read_raw, read_year
from mlref.flights.features import FLIGHTS
from mlref.flights.task import flights_task
from mlref.ingest import ingest, next_offset, release
from mlref.lake import Lake, events_as_of
from mlref.lifecycle import Stretch, run_days
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.policy import RetrainPolicy
from mlref.stream import apply_log
from mlref.task import read_stream
from mlref.workspace import Workspace, deliver_events

CONTRACT = flight_rules(read_raw(raw_folder(), 'airports')['faa'].to_list() + list(MISSING_ZONES))


@pytest.fixture(scope='module')
def some():
    return read_year(raw_folder()).filter(pl.col('kind') == 'departure').head(1000)


@pytest.mark.parametrize(
    'most, share, broken, over',
    [
        (0, 0.0, 1, True),
        (0, 0.0, 0, False),
        (5, 0.0, 5, False),
        (5, 0.0, 6, True),
        (0, 0.01, 10, False),
        (0, 0.01, 11, True),
        (20, 0.01, 20, False),
    ],
)
@pytest.mark.parametrize('action', ['info', 'warn', 'quarantine', 'fail'])
def test_a_threshold_is_a_count_or_a_share_whichever_is_more(
    action, most, share, broken, over, some
):
    odd = pl.concat([some.head(broken).with_columns(distance=pl.lit(-1, pl.Int64)), some[broken:]])
    got = validate(
        odd,
        (
            Rule(
                name='far',
                kinds=('departure',),
                holds=pl.col('distance') > 0,
                action=action,
                max_rows=most,
                max_share=share,
            ),
        ),
    )
    m = got.metrics[0]
    assert (m.of, m.broken, m.over) == (1000, broken, over)
    assert got.bad.height == (broken if action in ('quarantine', 'fail') else 0) and bool(
        got.failed
    ) == (over and action == 'fail')


def test_a_batch_over_a_fail_threshold_is_refused_whole_and_nothing_is_committed(some, tmp_path):
    strict = (
        *CONTRACT,
        Rule(
            name='never far',
            kinds=('departure',),
            holds=pl.col('distance') < 2000,
            action='fail',
            max_share=0.05,
        ),
    )
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    log.append('e', encode_events(some, FLIGHT_SCHEMA))
    with pytest.raises(MlrefError, match='refused whole'):
        ingest(lake, log, 'e', strict)
    assert (
        next_offset(lake, 'e') == 0
        and lake.sql(
            'select (select count(*) from events) + (select count(*) from commits) + (select'
            ' count(*) from quality) as n'
        )['n'][0]
        == 0
    )
    assert ingest(lake, log, 'e', CONTRACT).messages == 1000  # mended, the same messages go in


@pytest.mark.parametrize('way', ['ingest', 'release', 'feed'])
def test_a_fail_rule_stops_every_way_in(way, some, tmp_path):
    strict = (
        *(r for r in CONTRACT if not r.name.startswith('distance')),
        Rule(
            name='never far',
            kinds=('departure',),
            holds=pl.col('distance').is_between(0, 2000),
            action='fail',
            max_share=0.05,
        ),
    )
    log, lake, store = (
        LocalLog(tmp_path / 'log'),
        Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA),
        LmdbStore(tmp_path / 'online', FLIGHTS),
    )
    log.append(
        'e',
        encode_events(
            some.with_columns(distance=pl.lit(-1, pl.Int64)) if way == 'release' else some,
            FLIGHT_SCHEMA,
        ),
    )
    if way == 'release':
        ingest(lake, log, 'e', CONTRACT)
        assert lake.sql('select count(*) as n from dead_letters')['n'][0] == 1000
    before = lake.sql(
        'select (select count(*) from commits) as a, (select count(*) from dead_letters) as b'
    ).row(0)
    with pytest.raises(MlrefError, match="'never far', got .* refused whole"):
        (
            ingest(lake, log, 'e', strict)
            if way == 'ingest'
            else release(lake, strict)
            if way == 'release'
            else apply_log(store, log, 'e', FLIGHT_SCHEMA, strict)
        )
    assert (
        lake.sql(
            'select (select count(*) from commits) as a, (select count(*) from dead_letters) as b'
        ).row(0)
        == before
        and events_as_of(lake).height == 0
    )
    assert (store.position(), list(store.names())) == (0, [])


def test_all_reasons_and_release_is_idempotent(some, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    odd = some.head(3).with_columns(
        distance=pl.lit(7000, pl.Int64), dest=pl.Series(['ZZZ', *some['dest'][1:3]])
    )
    log.append('e', encode_events(pl.concat([odd, some[3:]]), FLIGHT_SCHEMA))
    ingest(lake, log, 'e', CONTRACT)
    before = digest(events_as_of(lake, 1))
    assert (
        lake.sql('select reasons from dead_letters order by off')['reasons'][0]
        == 'destination is known; distance 10 to 6,000 miles'
    )
    lax = tuple(r for r in CONTRACT if not r.name.startswith('distance'))
    assert [release(lake, r) for r in (CONTRACT, lax, lax)] == [0, 2, 0]
    assert events_as_of(lake).height == 999 and digest(events_as_of(lake, 1)) == before
    assert lake.sql('select sum(messages) = sum(good + repeated + dead) as ok from commits')['ok'][
        0
    ]
    assert (
        lake.sql('select count(*) as n from dead_letters')['n'][0] == 1
        and lake.sql('select count(*) as n from released')['n'][0] == 2
    )


def broken(schema, frame):
    "What pandera itself says of a collected frame: (row, name of the check)"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', pa.errors.SchemaWarning)
        try:
            schema.validate(frame, lazy=True)
            return set()
        except pa.errors.SchemaErrors as e:
            return set(e.failure_cases.select('index', 'check').iter_rows())


def reasons(frame, rules):
    return {
        (i, r)
        for i, why in (
            validate(frame.with_row_index('_row'), rules).bad.select('_row', 'reasons').iter_rows()
        )
        for r in why
    }


@pytest.fixture(scope='module')
def worst():  # a day of real flights and weather, with one break of every rule somewhere
    f = (
        read_year(raw_folder())
        .filter(pl.col('known_time').is_between(parse_time('2013-02-11'), parse_time('2013-02-13')))
        .with_row_index('i')
    )

    def at(k):
        return pl.col('i') % 97 == k

    odd = {
        'kind': (1, 'rumour'),
        'event_id': (2, None),
        'event_time': (3, 10**8),
        'origin': (4, 'LAX'),
        'dest': (5, 'ZZZ'),
        'carrier': (6, None),
        'duration': (7, 3),
        'distance': (8, -1),
        'sched': (9, 0),
        'dep_delay': (10, None),
        'arr_delay': (11, 9999),
        'wind_speed': (12, 150.0),
        'wind_gust': (13, 999.0),
        'temp': (14, 500.0),
        'humid': (15, -1.0),
        'pressure': (16, 1.0),
        'precip': (17, 99.0),
    }
    return f.with_columns(
        pl.when(at(k)).then(pl.lit(v, f.schema[c])).otherwise(pl.col(c)).alias(c)
        for c, (k, v) in odd.items()
    ).drop('i')


def test_pandera_finds_the_same_rows_under_a_contract_and_gives_the_contract_back(worst):
    schema = to_pandera(CONTRACT, FLIGHT_SCHEMA)
    want = reasons(worst, CONTRACT)
    assert {r for _, r in want} == {
        r.name for r in CONTRACT if r.action == 'quarantine'
    } and broken(schema, worst) == want
    assert broken(schema, validate(worst, CONTRACT).good) == set()
    assert all(a is b for a, b in zip(from_pandera(schema), CONTRACT, strict=True))
    # types are part of it
    with pytest.raises(pa.errors.SchemaErrors):
        schema.validate(worst.with_columns(pl.col('sched').cast(pl.Float64)), lazy=True)


@pytest.mark.parametrize('closed', [(True, True), (True, False), (False, True), (False, False)])
def test_a_pandera_schema_becomes_rules_that_find_the_same_rows(closed, worst):
    low, high = closed
    schema = pa.DataFrameSchema(
        {
            'wind_speed': pa.Column(
                pl.Float64,
                pa.Check.in_range(0, 150.0, include_min=low, include_max=high),
                nullable=True,
            ),
            'origin': pa.Column(pl.String, pa.Check.isin(['EWR', 'JFK', 'LGA'])),
            'event_id': pa.Column(pl.String, nullable=False),
            'humid': pa.Column(pl.Float64, [pa.Check.in_range(0, 100)], nullable=True),
        }
    )
    got, want = reasons(worst, from_pandera(schema)), broken(schema, worst)
    column = {n: {i for i, c in want if c == n} for _, n in want}
    assert (
        {i for i, _ in got} == {i for i, _ in want}
        and len(got) == len(want)
        and column['not_nullable'] == {i for i, r in got if r == 'event_id: there'}
    )
    wind = {i for i, r in got if r == 'wind_speed: in_range'}

    def equal(speed):
        rows = worst.with_row_index('_row')
        return set(rows.filter(pl.col('wind_speed') == speed)['_row'])

    assert (
        equal(0)
        and equal(150)
        and (equal(0) <= wind, equal(150) <= wind) == (not low, not high)
        and not (low and equal(0) & wind)
        and not (high and equal(150) & wind)
    )


def test_a_pandera_check_that_cannot_be_read_is_refused():
    with pytest.raises(MlrefError, match='in_range or isin on dest'):
        from_pandera(pa.DataFrameSchema({'dest': pa.Column(pl.String, pa.Check.str_length(3))}))
    with pytest.raises(MlrefError, match='one day of the whole frame'):
        from_pandera(
            pa.DataFrameSchema(
                {'dest': pa.Column(pl.String)}, checks=pa.Check(lambda d: True, name='one day')
            )
        )


def test_quality_accumulates_with_every_commit(some, tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    log.append('e', encode_events(some, FLIGHT_SCHEMA))
    ingest(lake, log, 'e', CONTRACT, 250)
    assert lake.sql(
        'select count(distinct commit_id) as c, sum(of_rows) filter (name = $$destination is'
        ' known$$) as n from quality'
    ).row(0) == (4, 1000)


@pytest.mark.parametrize('frame', ['empty', 'one', 'null', 'unsorted', 'double'])
def test_odd_shapes(frame, some):
    f = {
        'empty': some.head(0),
        'one': some.head(1),
        'null': some.with_columns(pl.lit(None, t).alias(c) for c, t in some.schema.items()),
        'unsorted': some.sample(fraction=1, shuffle=True, seed=0),
        'double': pl.concat([some, some]),
    }[frame]
    got = validate(f, CONTRACT)
    assert got.good.height + got.bad.height == f.height and got.good.height == (
        0 if frame == 'null' else f.height
    )


NOW = parse_time('2013-03-20T07:00')


def test_a_table_rule_that_fails_is_told_once_the_day_is_scored_and_no_challenger_is_trained(
    tmp_path,
):
    stream = read_stream(flights_task(), seed=0).filter(
        pl.coalesce('sched', 'known_time') >= parse_time('2013-03-01T07:00')
    )
    plans = stream.filter(pl.col('kind') == 'schedule')

    def at(day):
        return pl.col('known_time').is_between(NOW + day * 1440, NOW + day * 1440 + 1439)

    # a producer that gives a flight a second schedule, under an id of its own, on two days
    again = pl.concat([plans.filter(at(d)).head(2) for d in (1, 2)]).with_columns(
        event_id=pl.col('event_id') + '-again'
    )
    stream = pl.concat([stream, again]).sort('known_time', maintain_order=True)
    h = Workspace(tmp_path, flights_task())
    deliver_events(h, stream, NOW)
    bootstrap(h, RetrainPolicy('logistic', stop=3), NOW)
    plan = RetrainPolicy('logistic', stop=3, block=3, refresh=1)  # wants a challenger every night
    assert run_days(h, stream, plan, Stretch(NOW, NOW + 4 * 1440)) == 4
    q = h.lake.sql(
        "select measured_at, name, over, value, says from quality where action = 'fail' and of_rows"
        " is null and name like 'schedule%' order by measured_at"
    )
    # recorded
    assert q['over'].to_list() == [False, True, True, False] and q['value'].to_list() == [
        0,
        2,
        2,
        0,
    ]
    made = [
        (format_time(t)[:10], a, w)
        for t, a, w in h.lake.sql(
            'select decided_at, action, why from decisions order by decided_at'
        ).iter_rows()
    ]
    # told once
    alarms = [m for m in made if m[1] == 'alarm']
    assert alarms == [('2013-03-22', 'alarm', 'schedule: unique flight_id')]
    # nothing is learnt from such a table
    assert [m[0] for m in made if m[1] == 'retrain'] == ['2013-03-21', '2013-03-24']
    # every day is scored
    assert h.lake.sql(
        'select day, count(*) > 500 as many from predictions group by day order by day'
    ).rows() == [(FLIGHT_CALENDAR.day_of(NOW) + d, True) for d in range(4)]
    # nothing that came is lost
    assert h.lake.sql("select count(*) as n from events where event_id like '%-again'")['n'][0] == 4
    h.close()


def test_the_sample_in_the_repository_is_what_the_log_holds_and_the_contract_accepts():
    path = Path(__file__).parent.parent / 'data' / 'sample_events.jsonl'
    messages = path.read_bytes().splitlines()
    events, broken = decode_events(messages, FLIGHT_SCHEMA)
    good = validate(events.drop('_i'), CONTRACT).good
    assert not broken and good.height == len(messages) == 91
    assert encode_events(good, FLIGHT_SCHEMA) == messages
