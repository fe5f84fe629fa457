"""A compiled vector is the reader's own, bit for bit: made-up sets, commits, threads, damage"""

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from mlref import hot_keys
from mlref.compiled_vectors import compile_vectors
from mlref.core import LAST_MINUTE, MlrefError
from mlref.features import Entity, FeatureSet, FeatureView, OnDemand
from mlref.flights.features import FLIGHTS
from mlref.lmdb_store import LmdbStore, reshard
from mlref.materialize import apply_events
from mlref.online import Facts, OnlineReader, merge_facts
from mlref.read_plan import make_plan
from mlref.records import DamagedRecord, read_record, record_layouts
from mlref.row_forms import find_row_form, row_form_of
from mlref.sources import from_table, with_squares
from mlref.vectors import read_vectors

DEEP = os.environ.get('MLREF_DEEP') == '1'
MANY = settings(
    max_examples=5000 if DEEP else 70,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # an example of a few rows is small enough
)
SHOP = Entity(name='shop', keys=('city', 'no'))
CITY = Entity(name='city', keys=('city',))
ALL = Entity(name='all', keys=())
TABLE = {'known': 'at', 'keys': ('city', 'no'), 'values': {'x': 'cent', 'y': 'cent'}}
SALE = with_squares(from_table('sale', kind='aggregate', **TABLE), 'x')
POST = from_table('post', kind='last', **TABLE)
SUMS = ('count', 'rate', 'sum:x', 'mean:x', 'std:x', 'sum:y', 'mean:y')
ROWS = ('min:x', 'max:y', 'distinct:x')
LARGE = 2**28  # squares of a dozen still fit into a sum


class Moments:
    "A snapshot that says which moment it is of"

    def __init__(self, store):
        self.moment = store.commits
        self.records = store.records

    def __enter__(self):
        return lambda names: [self.records.get(name) for name in names]

    def __exit__(self, *error):
        return None


class Memory(OnlineReader):
    "A store in a dict"

    def __init__(self, features, has_moments=True):
        self.layouts = {layout.name: layout for layout in record_layouts(features)}
        self.records = {}
        self.commits = 0
        self.has_moments = has_moments

    def snapshot(self):
        if self.has_moments:
            return Moments(self)
        return nullcontext(lambda names: [self.records.get(name) for name in names])

    def write(self, records):
        self.records = self.records | records
        self.commits += 1

    def put(self, history, keys, t, values):
        "Facts of one history"
        if keys:
            layout = self.layouts[history]
            table = np.array(values, np.float64 if layout.newest else np.int64)
            facts = Facts(keys, np.array(t), table.reshape(len(keys), -1))
            self.write(merge_facts(self, layout, facts, max(t)))


def half_of_shop(request, inputs, lookups):
    return [inputs[0] / 2, request['no'] + inputs[1]]


@row_form_of(half_of_shop)
def half_of_shop_row(request, inputs, lookups):
    return inputs[0] / 2, request['no'] + inputs[1]


def without_a_form(request, inputs, lookups):
    return [np.where(np.isnan(inputs[0]), lookups, inputs[0]), request['cutoff'] % 7]


def make_set(stats, windows, ahead, ttl, only_last=False):
    "Every kind of column of several entities; `windows` may hold 0, everything"
    names = [stat for stat in stats if 0 not in windows or not stat.startswith(('rate', *ROWS))]
    views = [
        FeatureView(
            name=f'past_{entity.name}',
            entity=entity,
            source=SALE,
            stats=tuple(names),
            windows=windows,
            ahead=ahead,
        )
        for entity in (SHOP, CITY, ALL)
        if names and not only_last
    ]
    views += [
        FeatureView(
            name=f'last_{entity.name}',
            entity=entity,
            source=POST,
            stats=('age', 'x', 'y'),
            ttl=ttl,
            ahead=ahead,
        )
        for entity in (SHOP, ALL)
    ]
    views.append(FeatureView(name='before', entity=SHOP, source=POST, stats=('y',), ahead=-30))
    formulas = (
        OnDemand(
            name='half',
            outputs=('half', 'plus'),
            make=half_of_shop,
            inputs=('last_shop_x', 'before_y'),
            reads=('no',),
        ),
        OnDemand(name='plain', outputs=('filled', 'rest'), make=without_a_form, inputs=('half',)),
    )
    return FeatureSet(name='made', views=tuple(views), on_demand=formulas)


cities = st.sampled_from(['a', 'b', 'a|', '\\', 'é', ''])
numbers = st.sampled_from([1, 2, -3])
whole = st.one_of(st.integers(-50, 50), st.sampled_from([LARGE, -LARGE, 2**15 + 1]))
real = st.one_of(st.sampled_from([np.nan, -0.0, 1e300, -1e-300, 2.0**53 + 2]), st.floats(-9, 9))
sales = st.lists(st.tuples(st.integers(200, 400), cities, numbers, whole, whole), max_size=25)
posts = st.lists(st.tuples(st.integers(200, 400), cities, numbers, real, real), max_size=12)
asks = st.lists(st.tuples(st.integers(190, 420), cities, numbers), min_size=1, max_size=7)
sets = st.builds(
    make_set,
    stats=st.lists(st.sampled_from(SUMS + ROWS), min_size=1, max_size=6, unique=True),
    windows=st.lists(st.sampled_from([0, 1, 7, 60, 300]), min_size=1, max_size=3, unique=True).map(
        tuple
    ),
    ahead=st.sampled_from([-20, 0, 5, 90]),
    ttl=st.sampled_from([None, 1, 30, 500]),
    only_last=st.booleans(),
)


def key_of(entity, city, no):
    if entity is ALL:
        return '*'
    escaped = city.replace('\\', '\\\\').replace('|', '\\|')
    return city if entity is CITY else f'{escaped}|{no}'


def fill(store, source, rows):
    "Rows (t, city, no, values...) into the histories of a source"
    for name in store.layouts:
        entity = {each.name: each for each in (SHOP, CITY, ALL)}[name.split('/')[1]]
        if name.split('/')[0] == source:
            kept = [row for row in rows if key_of(entity, row[1], row[2])]
            keys = [key_of(entity, city, no) for _, city, no, *_ in kept]
            more = (lambda x, y: (x, y, x * x)) if source == 'sale' else (lambda x, y: (x, y))
            store.put(name, keys, [row[0] for row in kept], [more(*row[3:]) for row in kept])


def columns_of(asked):
    minutes, city, no = zip(*asked, strict=True)
    return {
        'cutoff': np.array(minutes, np.int64),
        'city': np.array(city, object),
        'no': np.array(no, np.int64),
    }


def assert_same(ours, theirs):
    "Values and statuses, bit for bit"
    np.testing.assert_array_equal(ours.X.view(np.int32), theirs.X.view(np.int32))
    assert ours.X.dtype == theirs.X.dtype and ours.X.flags.writeable
    assert list(ours.status) == list(theirs.status)
    for name, states in theirs.status.items():
        np.testing.assert_array_equal(ours.status[name], states)
        assert ours.status[name].dtype == states.dtype


@pytest.mark.filterwarnings('ignore:overflow encountered in cast')  # 1e300
@MANY
@example(make_set(SUMS, (0, 300), 0, 30), [(200, 'a', 1, LARGE, 3)] * 3, [], [(420, 'a', 1)])
@given(sets, sales, posts, asks)
def test_made_up_sets_and_histories_give_the_same_bits(features, sold, posted, asked):
    store = Memory(features)
    fill(store, 'sale', sold)
    compiled = compile_vectors(make_plan(features), store.layouts)
    columns = columns_of(asked)
    for again in (False, True):  # the second time something was written since
        if again:
            fill(store, 'post', posted)
        for i in range(len(asked)):
            one = {name: values[i : i + 1] for name, values in columns.items()}
            for _ in range(2):  # read, then kept
                theirs = read_vectors(store, one, features, 7.5)
                assert_same(compiled.read(store, one, 7.5), theirs)
        theirs = read_vectors(store, columns, features, 7.5)
        assert_same(compiled.read(store, columns, 7.5), theirs)
        at_once = compile_vectors(make_plan(features), store.layouts)
        with patch.object(hot_keys, 'FEW_KEYS', 0):  # all that is new by one search
            for _ in range(2):
                assert_same(at_once.read(store, columns, 7.5), theirs)


@MANY
@given(sets, sales, posts, asks)
def test_one_search_over_all_records_gives_the_rows_of_each(features, sold, posted, asked):
    "The rows that many requests read at once are those of each record read alone"
    store = Memory(features)
    fill(store, 'sale', sold)
    fill(store, 'post', posted)
    plan = make_plan(features)
    minutes = columns_of(asked)['cutoff']
    keys = {
        entity.name: [key_of(entity, city, no) for _, city, no in asked] for entity in plan.entities
    }
    for reads, flat in zip(
        (plan.sums, plan.lasts),
        store.gather(plan, keys, minutes[:, None] + plan.offsets),
        strict=True,
    ):
        assert not flat[-1].any()
        for read in reads:
            layout = store.layouts[read.name]
            for i, key in enumerate(keys[read.entity.name]):
                record = store.records.get(layout.prefix + key.encode())
                alone = b''.join(read_record(layout, key, record, minutes[i] + read.offsets))
                found = flat[read.start : read.start + read.size, i]
                assert found.tobytes() == bytes(alone)


def test_a_window_that_is_one_minute_off_is_seen():
    "The comparison can fail"
    features = make_set(('count',), (60,), 0, None)
    store = Memory(features)
    fill(store, 'sale', [(300, 'a', 1, 5, 5)])
    plan = make_plan(features)
    moved = [replace(read, offsets=read.offsets - 1) for read in plan.sums]
    compiled = compile_vectors(replace(plan, sums=tuple(moved)), store.layouts)
    one = columns_of([(300, 'a', 1)])
    assert (compiled.read(store, one, 0).X != read_vectors(store, one, features, 0).X).any()


@pytest.mark.parametrize('has_moments', [True, False])
def test_a_commit_makes_what_was_kept_worthless(has_moments):
    features = make_set(('count', 'sum:x'), (300,), 0, None)
    store = Memory(features, has_moments)
    compiled = compile_vectors(make_plan(features), store.layouts)
    one = columns_of([(400, 'a', 1)])
    for i in range(20):
        fill(store, 'sale', [(300 + i, 'a', 1, i, 1)])
        for _ in range(3):
            assert_same(compiled.read(store, one, 0), read_vectors(store, one, features, 0))
    assert compiled.read(store, one, 0).X[0, 0] == 20


def test_what_is_kept_is_bounded():
    features = make_set(('count',), (60,), 0, None)
    store = Memory(features)
    fill(store, 'sale', [(300, 'a', 1, 5, 5)])
    compiled = compile_vectors(make_plan(features), store.layouts, bound=50)
    for minute in range(200, 400):
        one = columns_of([(minute, 'a', 1)])
        assert_same(compiled.read(store, one, 0), read_vectors(store, one, features, 0))
        kept = sum(len(table) for each in compiled.reader.hot.minutes.values() for table in each)
        assert kept <= 50 + 3 == 50 + len(compiled.plan.entities)


def test_minutes_that_cannot_be_read_do_not_pile_up():
    "A client that asks about ever other minutes of long ago costs no memory"
    features = make_set(('count',), (60,), 0, None)
    store = Memory(features)
    fill(store, 'sale', [(9000, 'a', 1, 5, 5)])
    fill(store, 'sale', [(30_000, 'a', 1, 5, 5)])  # trims the first
    compiled = compile_vectors(make_plan(features), store.layouts, bound=50)
    for minute in range(100, 300):
        with pytest.raises(MlrefError, match='use the offline reader'):
            compiled.read(store, columns_of([(minute, 'a', 1)]), 0)
    assert len(compiled.reader.hot.minutes) <= 51


def test_two_stores_are_not_mixed_up():
    features = make_set(('count',), (60,), 0, None)
    full, empty = Memory(features), Memory(features)
    fill(full, 'sale', [(300, 'a', 1, 5, 5)])
    empty.commits = full.commits
    compiled = compile_vectors(make_plan(features), full.layouts)
    one = columns_of([(300, 'a', 1)])
    for _ in range(2):
        counts = [compiled.read(store, one, 0).X[0, 0] for store in (full, empty)]
        assert counts == [1, 0]


ODD = {
    'several requests': columns_of([(300, 'a', 1), (301, 'b', 2)]),
    'no request': {name: values[:0] for name, values in columns_of([(300, 'a', 1)]).items()},
    'a key in 32 bits': columns_of([(300, 'a', 1)]) | {'no': np.array([1], np.int32)},
    'a key that is a time': columns_of([(300, 'a', 1)]) | {'city': np.array(['2013'], 'M8[D]')},
    'a text of NumPy': columns_of([(300, 'a', 1)]) | {'city': np.array(['a'])},
    'a key that is missing': columns_of([(300, 'a', 1)]) | {'city': np.array([None], object)},
    'lists': {name: values.tolist() for name, values in columns_of([(300, 'a', 1)]).items()},
}


@pytest.mark.parametrize('name', ODD)
def test_what_is_no_single_plain_request_is_read_as_the_reader_reads_it(name):
    features = make_set(SUMS, (60,), 0, 30)
    store = Memory(features)
    fill(store, 'sale', [(300, 'a', 1, 5, 5)])
    compiled = compile_vectors(make_plan(features), store.layouts)
    assert_same(compiled.read(store, ODD[name], 0), read_vectors(store, ODD[name], features, 0))


REFUSED = {
    'a column that is missing': {'cutoff': np.array([300]), 'city': np.array(['a'], object)},
    'half a minute': columns_of([(300, 'a', 1)]) | {'cutoff': np.array([300.5])},
    'a time in seconds': columns_of([(300, 'a', 1)]) | {'cutoff': np.array([LAST_MINUTE + 1])},
    'a time before 1970': columns_of([(300, 'a', 1)]) | {'cutoff': np.array([-1])},
    'minutes as objects': columns_of([(300, 'a', 1)]) | {'cutoff': np.array([300], object)},
    'a truth value': columns_of([(300, 'a', 1)]) | {'cutoff': np.array([True])},
    'what is forgotten': columns_of([(20, 'a', 1)]),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_the_reader_refuses_is_refused_in_its_words(name):
    features = make_set(('count', 'mean:x'), (60,), 0, 30)
    store = Memory(features)
    fill(store, 'sale', [(9000, 'a', 1, 5, 5), (9001, 'a', 1, 5, 5)])
    fill(store, 'sale', [(30_000, 'a', 1, 5, 5)])  # trims the first
    compiled = compile_vectors(make_plan(features), store.layouts)
    with pytest.raises(MlrefError) as theirs:
        read_vectors(store, REFUSED[name], features, 0)
    with pytest.raises(MlrefError) as ours:
        compiled.read(store, REFUSED[name], 0)
    assert str(ours.value) == str(theirs.value)
    two = {each: np.repeat(values, 2) for each, values in REFUSED[name].items()}
    with pytest.raises(MlrefError):
        compiled.read(store, two, 0)


def test_a_formula_that_gives_too_few_numbers_is_named():
    def short(request, inputs, lookups):
        return [inputs[0]]

    features = FeatureSet(
        name='f',
        views=(FeatureView(name='v', entity=ALL, source=POST, stats=('x',)),),
        on_demand=(OnDemand(name='s', outputs=('a', 'b'), make=short, inputs=('v_x',)),),
    )
    compiled = compile_vectors(make_plan(features), Memory(features).layouts)
    with pytest.raises(MlrefError, match='expected 2 numbers of .*short.*, got 1'):
        compiled.read(Memory(features), {'cutoff': np.array([300])})


def stored(tmp_path, features, shards=1):
    "A store in files with one sale"
    store = LmdbStore(tmp_path / 'store', features, shards=shards)
    none = pl.DataFrame(schema={'known_time': pl.Int64})
    table = pl.DataFrame({'at': [300], 'city': ['a'], 'no': [1], 'x': [5], 'y': [6]})
    apply_events(store, none, tables={'sale': table, 'post': table})
    return store


def test_a_damaged_record_is_refused_though_its_neighbours_are_kept(tmp_path):
    features = make_set(('sum:x',), (60,), 0, None)
    store = stored(tmp_path, features)
    compiled = compile_vectors(make_plan(features), store.layouts)
    one = columns_of([(300, 'a', 1)])
    good = compiled.read(store, one, 0)
    name = store.layouts['sale/city'].prefix + b'a'
    with store.snapshot() as lookup:
        record = bytearray(lookup([name])[0])
    record[60] ^= 1
    store.write({name: bytes(record)})
    for _ in range(2):
        with pytest.raises(DamagedRecord, match='sale/city/a in'):
            compiled.read(store, one, 0)
    record[60] ^= 1
    store.write({name: bytes(record)})
    assert_same(compiled.read(store, one, 0), good)
    store.close()


def test_a_reshard_loses_nothing_that_was_kept_or_not(tmp_path):
    features = make_set(('sum:x',), (60,), 0, None)
    store = stored(tmp_path, features)
    compiled = compile_vectors(make_plan(features), store.layouts)
    one = columns_of([(300, 'a', 1)])
    before = compiled.read(store, one, 0)
    for shards in (3, 1, 2):
        reshard(store, shards)
        assert_same(compiled.read(store, one, 0), before)
    store.close()


def test_threads_see_whole_moments_while_a_writer_commits(tmp_path):
    "Sum and count are of one commit, and never older than one that was seen before"
    features = make_set(('count', 'sum:x'), (300,), 0, None)
    store = stored(tmp_path, features)
    compiled = compile_vectors(make_plan(features), store.layouts)
    one = columns_of([(400, 'a', 1)])
    none = pl.DataFrame(schema={'known_time': pl.Int64})
    seen = []
    stop = threading.Event()

    def read():
        mine = []
        while not stop.is_set():
            mine.append(compiled.read(store, one, 0).X[0, :2].tolist())
        seen.append(mine)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for i in range(15):
            table = pl.DataFrame({'at': [301 + i], 'city': ['a'], 'no': [1], 'x': [5], 'y': [6]})
            apply_events(store, none, tables={'sale': table, 'post': table})
    finally:  # else a failure would leave threads that never end
        stop.set()
        for thread in threads:
            thread.join()
    store.close()
    assert len({tuple(each) for mine in seen for each in mine}) > 3
    for mine in seen:
        assert mine == sorted(mine)
        assert all(total == 5 * count for count, total in mine)


def test_every_formula_of_the_flights_has_a_row_form():
    "A formula without one costs a request five times as much, and nothing else would tell"
    formulas = [FLIGHTS.asks, *(part.make for part in FLIGHTS.on_demand)]
    assert [formula for formula in formulas if find_row_form(formula) is None] == []


def test_a_compiled_vector_needs_no_frame_library():
    code = 'import sys, mlref.compiled_vectors; print(*sys.modules)'
    loaded = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    assert not {'polars', 'pandas', 'torch', 'mlflow', 'matplotlib'} & set(loaded.stdout.split())
