"""Every statistic against a slow oracle, and input nobody hoped for"""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlref.catalog import feature_catalog, feature_lineage
from mlref.core import MlrefError
from mlref.features import Entity, FeatureSet, FeatureView, OnDemand, Source, lookup_feature
from mlref.flights.common import local_time
from mlref.flights.features import FLIGHTS
from mlref.keys import key_text
from mlref.lmdb_store import LmdbStore
from mlref.materialize import apply_events
from mlref.offline import OfflineReader, point_in_time_join
from mlref.records import record_layouts
from mlref.sources import from_table, to_minutes, with_squares
from mlref.vectors import STATUS_NAMES, compute_vectors, read_vectors
from mlref.versions import canonical_code

MANY = settings(
    max_examples=2000 if os.environ.get('MLREF_DEEP') == '1' else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
DEEP = os.environ.get('MLREF_DEEP') == '1'
SHOP, ALL = Entity(name='shop', keys=('city', 'no')), Entity(name='all', keys=())
TABLE = {'at': pl.Int64, 'city': pl.String, 'no': pl.Int64, 'x': pl.Int64}
STATS = ('count', 'rate', 'sum:x', 'mean:x', 'std:x', 'min:x', 'max:x', 'distinct:x')


def source(kind='aggregate'):
    made = from_table('sale', known='at', keys=('city', 'no'), values={'x': 'cent'}, kind=kind)
    return made if kind == 'last' else with_squares(made, 'x')


cities, numbers = st.sampled_from(['a', 'a|', '|', '\\', None]), st.sampled_from([1, 2, None])
sales = st.lists(
    st.tuples(st.integers(90, 140), cities, numbers, st.integers(-50, 50)), max_size=30
)
asks = st.lists(st.tuples(st.integers(80, 160), cities, numbers), max_size=12)


def frame(rows, schema):
    return pl.DataFrame(rows, schema=schema, orient='row')


def both(rows, q):
    return frame(rows, TABLE), frame(q, {'cutoff': pl.Int64, 'city': pl.String, 'no': pl.Int64})


def slow(stat, x, w):
    "One statistic of the values in a window, as anyone would write it"
    kind = stat.split(':')[0]
    if kind == 'count':
        return len(x)
    if kind == 'rate':
        return len(x) * 60 / w
    if kind == 'sum':
        return sum(x)
    if kind == 'distinct':
        return len(set(x))
    if not x:
        return np.nan
    return {
        'mean': sum(x) / len(x),
        'std': float(np.std(np.array(x, float))),
        'min': min(x),
        'max': max(x),
    }[kind]


@MANY
@given(sales, asks, st.integers(1, 40), st.integers(-10, 10))
def test_every_statistic_of_every_window_equals_the_oracle(rows, q, w, ahead):
    table, req = both(rows, q)
    views = [
        FeatureView(
            name=e.name, entity=e, source=source(), stats=STATS, windows=(w, 2 * w), ahead=ahead
        )
        for e in (SHOP, ALL)
    ]
    fs = FeatureSet(name='s', views=tuple(views))
    X = compute_vectors(OfflineReader(pl.DataFrame(), {'sale': table}), req, fs)
    for i, (T, city, no) in enumerate(q):
        want = []
        for e in (SHOP, ALL):
            mine = [
                (t, x)
                for t, c, n, x in rows
                if e is ALL or (None not in (city, no) and (c, n) == (city, no))
            ]
            want += [
                slow(s, [x for t, x in mine if T + ahead - k < t <= T + ahead], k)
                for k in (w, 2 * w)
                for s in STATS
            ]
        np.testing.assert_allclose(X[i], np.float32(want), rtol=1e-6, atol=1e-6)
    for n in (1, 3):
        np.testing.assert_array_equal(
            compute_vectors(OfflineReader(pl.DataFrame(), {'sale': table}), req, fs, block=n), X
        )


def test_the_oracle_sees_a_window_that_is_one_minute_off():
    class Off(OfflineReader):
        def read(self, s, e, keys, t):
            return super().read(s, e, keys, t - 1)

        def span(self, s, e, keys, lo, hi):
            return super().span(s, e, keys, lo - 1, hi - 1)

    table, req = both([(100, 'a', 1, 5)], [(100, 'a', 1)])
    fs = FeatureSet(
        name='s',
        views=(FeatureView(name='v', entity=SHOP, source=source(), stats=STATS, windows=(10,)),),
    )
    assert (
        compute_vectors(OfflineReader(table, {'sale': table}), req, fs)[0]
        != compute_vectors(Off(table, {'sale': table}), req, fs)[0]
    ).all()


@MANY
# of one minute the greatest, not the last to come
@example([(90, 'a', 1, 1), (90, 'a', 1, 0)], [(90, 'a', 1)], None, 0)
@given(sales, asks, st.sampled_from([None, 1, 5, 30]), st.integers(-10, 10))
def test_a_point_in_time_join_equals_the_oracle_in_both_engines(rows, q, ttl, ahead):
    table, req = both(rows, q)
    s = source('last')
    v = FeatureView(
        name='last', entity=SHOP, source=s, stats=('x', 'age'), windows=(), ahead=ahead, ttl=ttl
    )
    got = point_in_time_join(req, (v,), pl.DataFrame(), {'sale': table})
    assert got.select('cutoff', 'city', 'no').equals(req)  # every request once, in order
    for (T, city, no), (x, age, status) in zip(
        q, got.select('last_x', 'last_age', 'last_status').iter_rows(), strict=True
    ):
        mine = [
            (t, x_)
            for t, c, n, x_ in rows
            if None not in (city, no) and (c, n) == (city, no) and t <= T + ahead
        ]
        if not mine:
            assert (x, age, status) == (None, None, 'missing')
            continue
        t, want = max(mine)
        expired = ttl is not None and T + ahead - t > ttl
        assert (x, age, status) == (
            (None, None, 'expired') if expired else (want, T + ahead - t, 'present')
        )
    assert point_in_time_join(req, (v,), pl.DataFrame(), {'sale': table}, 'duckdb').equals(got)
    reader = OfflineReader(pl.DataFrame(), {'sale': table})
    read = read_vectors(reader, req, FeatureSet(name='l', views=(v,)))
    values = got.select(pl.col('last_x', 'last_age').cast(pl.Float32)).to_numpy().reshape(-1, 2)
    np.testing.assert_array_equal(read.X, values)
    for column in read.status['last'].T:
        assert [STATUS_NAMES[code] for code in column] == got['last_status'].to_list()


def test_a_store_and_the_past_say_the_same_of_every_last_value(tmp_path):
    "Values and statuses from one read: present, a value that is missing, expired, nobody"
    table = pl.DataFrame(
        {'at': [100, 100, 10], 'city': ['a', 'b', 'c'], 'no': [1, 1, 1], 'x': [5.0, None, 7.0]}
    )
    features = FeatureSet(name='f', views=(VIEW(ttl=60),))
    store = LmdbStore(tmp_path / 's', features)
    none = pl.DataFrame(schema={'known_time': pl.Int64})
    apply_events(store, none, tables={'sale': table})
    asked = frame([('a', 1, 110), ('b', 1, 110), ('c', 1, 110), ('d', 1, 110)], None)
    asked = asked.rename(dict(zip(asked.columns, ('city', 'no', 'cutoff'), strict=True)))
    online = read_vectors(store, asked, features)
    past = read_vectors(OfflineReader(none, {'sale': table}), asked, features)
    np.testing.assert_array_equal(online.X, past.X)
    said = ['present', 'missing', 'expired', 'missing']
    for read in (online, past):
        assert [STATUS_NAMES[code] for code in read.status['v'][:, 0]] == said


@MANY
@given(st.lists(st.tuples(cities, numbers), min_size=1, max_size=80))
def test_few_and_many_keys_have_the_same_text_and_no_two_share_one(rows):
    f = frame(rows, {'city': pl.String, 'no': pl.Int64})
    many = pl.concat([f] * 501)
    few = [key_text(f[i : i + 1], SHOP)[0] for i in range(len(rows))]
    assert (
        few
        == key_text(many, SHOP)[: len(rows)]
        == key_text({'city': f['city'].to_list(), 'no': f['no'].to_list()}, SHOP)
    )
    assert len(set(few) - {''}) == len({r for r in rows if None not in r})


def test_keys_of_every_type_that_is_one():
    when = pl.Series(['2013-07-01', '2013-07-02']).str.to_date()
    for c in (
        pl.Series([1, 2]),
        when,
        when.cast(pl.Datetime('us', 'UTC')),
        pl.Series(['x', 'y'], dtype=pl.Categorical),
        pl.Series(['x', 'y'], dtype=pl.Enum(['x', 'y'])),
    ):
        e = Entity(name='e', keys=('k',))
        table = pl.DataFrame({'k': c, 'at': [10, 20], 'x': [1, 2]})
        s = from_table('t', known='at', keys=('k',), values={'x': 'm'})
        got = point_in_time_join(
            pl.DataFrame({'k': c.reverse(), 'cutoff': [30, 30]}),
            (FeatureView(name='v', entity=e, source=s, stats=('x',)),),
            table,
        )
        assert got['v_x'].to_list() == [2, 1], c.dtype
    with pytest.raises(MlrefError, match='take it apart'):
        key_text(pl.DataFrame({'k': [[1]]}), Entity(name='e', keys=('k',)))


def VIEW(**fields):
    default = {'name': 'v', 'entity': SHOP, 'source': source('last'), 'stats': ('x',)}
    return FeatureView(**{**default, **fields})


def one(**cols):
    return pl.DataFrame({'city': ['a'], 'no': [1], 'cutoff': [100], **cols})


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: VIEW(ttl=0), 'ttl'),
        (lambda: VIEW(ttl=-5), 'ttl'),
        (lambda: VIEW(ttl=1.5), 'ttl'),
        (lambda: VIEW(stats=('y',)), 'among x, age'),
        (lambda: VIEW(stats=('mean:x',)), 'windows'),
        (lambda: VIEW(stats=('mean:x',), windows=(60,)), "kind='aggregate'"),
        (lambda: VIEW(source=source(), stats=('x',)), "kind='last'"),
        (lambda: VIEW(source=source(), stats=('median:x',), windows=(60,)), 'median'),
        (lambda: VIEW(source=source(), stats=('mean:y',), windows=(60,)), "got 'y'"),
        (lambda: VIEW(source=source(), stats=('min:x',), windows=(0,)), 'begins somewhere'),
        (lambda: VIEW(source=source(), stats=('mean:x',), windows=(-60,)), 'whole minutes'),
        (
            lambda: VIEW(
                source=from_table('s', known='at', keys=(), values={'x': 'm'}, kind='aggregate'),
                stats=('std:x',),
                windows=(60,),
            ),
            'with_squares',
        ),
        (
            lambda: VIEW(source=source(), stats=('mean:x',), windows=(60,), ttl=5),
            'forgets by itself',
        ),
        (lambda: with_squares(source(), 'y'), "got 'y'"),
        (lambda: FeatureSet(name='f', views=(VIEW(), VIEW())), 'twice'),
        (lambda: FeatureSet(name='f', views=(VIEW(),), only=('z',)), 'found none'),
        (
            lambda: FeatureSet(
                name='f',
                views=(VIEW(),),
                on_demand=(
                    OnDemand(name='o', outputs=('p',), make=lambda r, x, s: x, inputs=('q',)),
                ),
            ),
            'column q',
        ),
    ],
)
def test_a_definition_that_cannot_work_says_so(make, words):
    with pytest.raises(MlrefError, match=words):
        make()


def test_a_table_that_cannot_be_trusted_says_so():
    ok = frame([(100, 'a', 1, 5)], TABLE)

    def bad(table, words, kind='aggregate', req=None):
        req = one() if req is None else req
        with pytest.raises(MlrefError, match=words):
            compute_vectors(
                OfflineReader(table),
                req,
                FeatureSet(
                    name='f',
                    views=(
                        VIEW(
                            source=source(kind),
                            stats=('x',) if kind == 'last' else ('mean:x',),
                            windows=() if kind == 'last' else (60,),
                        ),
                    ),
                ),
            )

    bad(ok.drop('at'), 'at is missing')
    bad(ok.drop('city'), 'city is missing')
    bad(ok.with_columns(at=pl.lit(None, pl.Int64)), 'known time')
    bad(ok.with_columns(at=pl.lit('noon')), 'times with a zone')
    bad(ok.with_columns(at=pl.lit(0).cast(pl.Datetime)), 'naive')
    bad(ok.with_columns(at=pl.lit(1_372_000_000)), 'minutes since 1970')
    bad(ok.with_columns(x=pl.lit(1.5)), 'whole numbers')
    bad(ok.with_columns(x=pl.lit(None, pl.Int64)), 'missing')
    bad(ok.with_columns(x=pl.lit('5')), 'as numbers|conversion|cast')
    bad(ok.with_columns(x=pl.lit(2**40)), '2..62')
    bad(ok.with_columns(x=pl.lit(-(2**40))), '2..62')
    bad(ok.with_columns(x=pl.lit('5')), 'as numbers', 'last')
    bad(ok, 'column cutoff', req=one().drop('cutoff'))
    bad(ok, 'column city', req=one().drop('city'))
    bad(ok, 'in whole minutes', req=one(cutoff=pl.Series([None], dtype=pl.Int64)))
    lost = Source(
        name='sale', values={'x': 'm'}, rows=lambda e: e.select('city', 'no', 'x'), kind='last'
    )
    with pytest.raises(MlrefError, match='guards against a leak'):
        point_in_time_join(one(), (VIEW(source=lost),), ok)
    shuffled = Source(
        name='sale',
        values={'x': 'm'},
        rows=lambda e: e.select('city', 'no', 'x', t='at'),
        kind='last',
    )
    with pytest.raises(MlrefError, match='sorted by t'):
        point_in_time_join(
            one(),
            (VIEW(source=shuffled),),
            pl.concat([ok, ok.with_columns(at=pl.lit(50, pl.Int64))]),
        )


def test_requests_that_cannot_be_placed_in_time_say_so():
    ok = frame([(100, 'a', 1, 5)], TABLE)

    def ask(requests, *views, **more):
        return point_in_time_join(requests, views or (VIEW(),), ok, **more)

    for r, words in (
        (one().drop('cutoff'), 'column cutoff'),
        (one(cutoff=pl.Series([0]).cast(pl.Datetime)), 'time zone'),
        (one(cutoff=pl.Series(['noon'])), 'time zone'),
        (one(cutoff=pl.Series([None], dtype=pl.Int64)), '1 missing'),
        (one().drop('no'), 'column no'),
    ):
        with pytest.raises(MlrefError, match=words):
            ask(r)
    with pytest.raises(MlrefError, match='engine'):
        ask(one(), engine='spark')
    with pytest.raises(MlrefError, match='rename the view'):
        ask(one(v_x=pl.Series([1])))
    with pytest.raises(MlrefError, match='use numpy'):
        ask(one(), VIEW(source=source(), stats=('count',), windows=(60,)), engine='duckdb')


def test_the_join_refuses_a_row_from_the_future(monkeypatch):
    newest = OfflineReader.newest
    monkeypatch.setattr(
        OfflineReader, 'newest', lambda self, s, e, keys, t: newest(self, s, e, keys, t + 5)
    )
    with pytest.raises(MlrefError, match='a leak'):
        point_in_time_join(one(), (VIEW(),), frame([(103, 'a', 1, 5)], TABLE))


def test_no_rows_one_row_nobody_and_twins():
    v, none = VIEW(), frame([], TABLE)
    ok = frame([(100, 'a', 1, 5), (100, 'a', 1, 7), (100, 'a', 1, 6)], TABLE)
    assert (
        point_in_time_join(one().head(0), (v,), ok).columns
        == ['city', 'no', 'cutoff', 'v_x', 'v_status']
        and point_in_time_join(one().head(0), (v,), none).height == 0
    )
    assert point_in_time_join(one(), (v,), none)['v_status'].to_list() == ['missing']
    # the greatest, in whatever order they came: online and a rebuild must agree
    assert point_in_time_join(one(), (v,), ok)['v_x'].to_list() == [7]
    nobody = one(city=pl.Series([None], dtype=pl.String))
    assert point_in_time_join(
        nobody, (v,), pl.concat([ok, ok.with_columns(city=pl.lit(None, pl.String))])
    )['v_status'].to_list() == ['missing']
    fs = FeatureSet(name='f', views=(VIEW(source=source(), stats=STATS, windows=(60,)),))
    assert compute_vectors(OfflineReader(ok), one().head(0), fs).shape == (0, 8)
    assert (
        compute_vectors(OfflineReader(none), one(), fs)[0, :3].tolist() == [0, 0, 0]
        and np.isnan(compute_vectors(OfflineReader(none), one(), fs)[0, 3:7]).all()
    )


def test_times_before_the_minute_and_zones():
    zoned = pl.Series(
        [
            '2013-11-03T01:30:00-04:00',
            '2013-11-03T01:30:00-05:00',
            '2013-11-03T05:30:00.000001+00:00',
        ]
    ).str.to_datetime(time_zone='UTC')
    # the hour that comes twice; a microsecond late is the next minute
    a, b, c = to_minutes(zoned)
    assert (b - a, c - a) == (60, 1)
    assert to_minutes(zoned.dt.convert_time_zone('America/New_York')).to_list() == [a, b, c]
    ok = frame([(a, 'a', 1, 5)], TABLE)

    def ask(t):
        cutoff = pl.Series([t]).cast(pl.Datetime('us', 'UTC'))
        return point_in_time_join(one(cutoff=cutoff), (VIEW(),), ok)['v_status'][0]

    assert (ask(a * 60_000_000 - 1), ask(a * 60_000_000)) == ('missing', 'present')


def test_local_hours_over_a_century_and_both_changes_of_2013():
    t = np.concatenate(
        [np.arange(0, 2**25, 9973) + d for d in (0, 59)]
        + [np.arange(22_713_000, 22_716_000), np.arange(23_056_000, 23_060_000)]
    )
    want = (
        pl.Series(t * 60)
        .cast(pl.Int64)
        .to_frame('s')
        .select(
            pl.from_epoch('s')
            .dt.replace_time_zone('UTC')
            .dt.convert_time_zone('America/New_York')
            .dt.replace_time_zone(None)
            .dt.epoch('s')
            // 60
        )
    )
    np.testing.assert_array_equal(local_time(t), want.to_series().to_numpy())


def test_versions_follow_definitions_and_nothing_else():
    v = VIEW(source=source(), stats=('mean:x',), windows=(60,))
    same = VIEW(
        source=source(), stats=('mean:x',), windows=(60,), owner='me', description='other words'
    )
    assert v.version == same.version
    others = [
        replace(v, windows=(30,)),
        replace(v, ahead=1),
        replace(v, stats=('count',)),
        replace(v, entity=ALL),
        replace(
            v,
            source=from_table(
                'sale', known='at', keys=('city', 'no'), values={'x': 'euro'}, kind='aggregate'
            ),
        ),
        replace(
            v,
            source=from_table(
                'sale', known='no', keys=('city', 'no'), values={'x': 'cent'}, kind='aggregate'
            ),
        ),
    ]
    assert len({v.version, *(o.version for o in others)}) == 7
    a, b = (
        FeatureSet(name='f', views=(v,)),
        FeatureSet(name='f', views=(replace(v, windows=(30,)),)),
    )
    # both versions, side by side
    table = frame([(50, 'a', 1, 5), (90, 'a', 1, 9)], TABLE)
    reader = OfflineReader(table)
    assert (
        compute_vectors(reader, one(), a)[0, 0],
        compute_vectors(reader, one(), b)[0, 0],
        a.version == b.version,
    ) == (7, 9, False)


_grid = np.array([1, 2])


def _on_grid(e):
    return e.filter(pl.col('x').is_in(_grid.tolist()))


def test_a_version_follows_the_constants_that_its_code_reads():
    global _grid
    was = canonical_code(_on_grid)
    _grid = np.array([1, 3])
    changed = canonical_code(_on_grid)
    _grid = np.array([1, 2])
    assert changed != was == canonical_code(_on_grid)


def test_lookups_and_formulas():
    size = lookup_feature('city', key='city', table='sizes', values=('people',))
    twice = OnDemand(
        name='twice', outputs=('v_x2',), make=lambda req, x, static: [2 * x[0]], inputs=('v_x',)
    )
    X = compute_vectors(
        OfflineReader(frame([(100, 'a', 1, 5)], TABLE)),
        one(),
        FeatureSet(name='f', views=(VIEW(),), on_demand=(size, twice)),
        SimpleNamespace(sizes={'a': (9,)}),
    )
    assert X.tolist() == [[5, 9, 10]]


def test_a_deviation_of_large_numbers_is_exact():
    table = frame([(100, 'a', 1, 10**8), (100, 'a', 1, 10**8 + 1)], TABLE)
    assert (
        compute_vectors(
            OfflineReader(table),
            one(),
            FeatureSet(name='f', views=(VIEW(source=source(), stats=('std:x',), windows=(60,)),)),
        )[0, 0]
        == 0.5
    )


@pytest.mark.skipif(not DEEP, reason='10 million keys take half a minute: ./run test --deep')
def test_ten_million_keys():
    n = 10**7
    table = pl.DataFrame({'k': np.arange(n), 'at': np.arange(n) % 1000, 'x': np.arange(n)})
    e = Entity(name='k', keys=('k',))
    got = point_in_time_join(
        pl.DataFrame({'k': np.arange(0, n, 97), 'cutoff': np.full(-(-n // 97), 1000)}),
        (
            FeatureView(
                name='v',
                entity=e,
                source=from_table('t', known='at', keys=('k',), values={'x': 'm'}),
                stats=('x',),
            ),
        ),
        table,
    )
    assert (got['v_x'] == got['k']).all()


def test_the_registry_knows_what_every_column_is_made_of():
    made = feature_lineage(FLIGHTS)
    assert set(made['feature']) == set(FLIGHTS.names) and made.null_count().sum_horizontal()[0] == 0
    assert set(made.filter(feature='origin_dep_delay_60m')['column']) >= {'dep_delay', 'known_time'}
    rows = feature_catalog(FLIGHTS)
    assert (
        rows.height == len(FLIGHTS.views) + len(FLIGHTS.on_demand)
        and rows.select('view').is_unique().all()
    )


def test_the_command_answers_and_refuses_in_one_sentence(capsys, tmp_path):
    from mlref.cli import main

    assert (
        main(['features', 'list', '--data', str(tmp_path)]) == 0
        and '132 columns' in capsys.readouterr().out
    )
    assert main(['features', 'show', 'weather']) == 0 and '"ttl": 360' in capsys.readouterr().out
    assert (
        main(['features', 'lineage', 'origin_dep_delay_60m']) == 0
        and 'dep -> origin_dep -> origin_dep_delay_60m: ' in capsys.readouterr().out
    )
    assert main(['features', 'lineage', 'weather3_visib']) == 0
    short = capsys.readouterr().out
    assert main(['features', 'lineage', 'weather3_visib', '--all']) == 0
    whole = capsys.readouterr().out
    assert '6 more' in short and 'visib' not in short.split(': ')[1]
    assert whole.split(': ')[1].split()[-1] == 'visib'
    for ask, status, words in (
        (['show', 'nope'], 1, 'expected a view among'),
        (['lineage', 'nope'], 1, 'expected a feature among'),
        (['show'], 2, 'Missing argument'),
        (['get', 'X', '--data', str(tmp_path)], 1, 'expected a finished run'),
        (['get', 'X', '--home', str(tmp_path / 'none')], 1, 'the folder of a run'),
    ):
        assert main(['features', *ask]) == status
        err = capsys.readouterr().err
        assert words in err and len(err.splitlines()) == 1


def test_materialize_and_get_over_a_run(capsys, tmp_path):
    from mlref.cli import main
    from mlref.core import parse_time
    from mlref.events import encode_events, events_between
    from mlref.flights.contract import flight_rules
    from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_raw, read_year
    from mlref.ingest import ingest
    from mlref.lake import Lake
    from mlref.lmdb_store import LmdbStore
    from mlref.log import LocalLog
    from mlref.materialize import apply_events

    home = tmp_path / 'runs' / 'r'
    (tmp_path / 'current').parent.mkdir(exist_ok=True)
    home.mkdir(parents=True)
    (tmp_path / 'current').write_text('r\n')
    part = events_between(read_year(raw_folder()), 0, parse_time('2013-01-03'))
    log, lake = LocalLog(home / 'log'), Lake(home / 'lake' / 'mlref.duckdb', FLIGHT_SCHEMA)
    log.append('flights', encode_events(part, FLIGHT_SCHEMA))
    ingest(
        lake,
        log,
        'flights',
        flight_rules(
            sorted({*read_raw(raw_folder(), 'airports')['faa'], *part['dest'].drop_nulls()})
        ),
    )
    lake.close()
    log.close()
    store = LmdbStore(home / 'online', FLIGHTS)
    apply_events(store, part, 1)
    store.close()
    assert (
        main(
            [
                'features',
                'materialize',
                '--since',
                '2013-01-01T12:00',
                '--until',
                '2013-01-01T20:00',
                '--data',
                str(tmp_path),
            ]
        )
        == 0
    )
    made = pl.read_parquet(next((home / 'features').glob('*.parquet')))
    capsys.readouterr()
    assert main(['features', 'get', made['flight_id'][100], '--data', str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert main(['features', 'get', made['flight_id'][100], '--home', str(home)]) == 0
    assert capsys.readouterr().out == out
    shown = dict(line.split() for line in out.splitlines()[:132])
    assert tuple(shown) == FLIGHTS.names and all(f'{made[n][100]:g}' == v for n, v in shown.items())


def test_a_store_of_earlier_code_that_computes_the_same_still_opens(tmp_path):
    "Its records keep their stamp, when the feature set knows the former version"

    def counted(rows):
        source = Source(name='s', values={'x': 'unit'}, rows=rows, columns=('t', 'x'))
        return FeatureSet(
            name='f',
            views=(
                FeatureView(
                    name='f',
                    entity=Entity(name='all', keys=()),
                    source=source,
                    stats=('sum:x',),
                    windows=(60,),
                ),
            ),
        )

    before = counted(lambda e: e.select('t', 'x'))
    after = counted(lambda e: e.select('t', x=pl.col('x')))
    (was,) = record_layouts(before)
    (now,) = record_layouts(after)
    events = pl.DataFrame({'t': [10, 20], 'x': [1, 2], 'known_time': [10, 20]})
    store = LmdbStore(tmp_path / 's', before)
    apply_events(store, events)
    store.close()
    with pytest.raises(MlrefError, match='rebuild the store'):
        LmdbStore(tmp_path / 's', after, readonly=True)
    known = replace(after, former={was.version: now.version})
    again = LmdbStore(tmp_path / 's', known)
    apply_events(again, events.with_columns(pl.col('t', 'known_time') + 20))
    assert compute_vectors(again, {'cutoff': np.array([40])}, known).tolist() == [[6]]
