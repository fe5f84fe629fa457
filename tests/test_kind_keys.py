"""One value has one key, in any type, for 1 row and many; what cannot meet is refused"""

import decimal
import os
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock_time

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.core import MlrefError
from mlref.features import Entity, FeatureSet, FeatureView
from mlref.keys import FEW_REQUESTS, key_series, key_text
from mlref.lmdb_store import LmdbStore
from mlref.materialize import apply_events
from mlref.offline import OfflineReader, point_in_time_join
from mlref.sources import from_table
from mlref.vectors import compute_vectors

DEEP = os.environ.get('MLREF_DEEP') == '1'
TRIES = settings(max_examples=1000 if DEEP else 20, deadline=None)
MANY = FEW_REQUESTS + 1
NOW = 22_749_840

ONE = Entity(name='one', keys=('a',))
TWO = Entity(name='two', keys=('a', 'b'))

WHOLE = [pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32, pl.UInt64]
TEXTS = [pl.String, pl.Categorical]
UNITS = ('ms', 'us', 'ns')
ARRAYS = [np.int8, np.int32, np.int64, np.uint16, object]


def every_way(column: pl.Series) -> set[str]:
    "The key of a value by every reader: frames of 1 row and of many, and arrays"
    few, many = column.head(1).to_frame('a'), pl.concat([column.head(1)] * MANY).to_frame('a')
    return {
        key_text(few, ONE)[0],
        *key_text(many, ONE),
        key_series(few, ONE)[0],
        key_text({'a': few['a'].to_numpy()}, ONE)[0],
    }


@TRIES
@given(st.integers(0, 127))
def test_a_whole_number_is_its_digits_in_any_width(value):
    ways = set()
    for dtype in WHOLE:
        ways |= every_way(pl.Series([value], dtype=dtype))
    for dtype in ARRAYS:
        ways |= set(key_text({'a': np.array([value], dtype)}, ONE))
    ways |= set(key_text({'a': np.array([np.int32(value)], object)}, ONE))
    assert ways == {str(value)}


@TRIES
@given(st.integers(-(2**63), 2**64 - 1))
def test_no_digit_of_a_large_number_is_lost(value):
    dtype = pl.Int64 if value < 2**63 else pl.UInt64
    assert every_way(pl.Series([value], dtype=dtype)) == {str(value)}


ANY_TEXT = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=8)


@TRIES
@given(ANY_TEXT)
def test_a_text_is_itself_in_any_type(value):
    ways = set()
    for dtype in (*TEXTS, pl.Enum([value])):
        ways |= every_way(pl.Series([value], dtype=dtype))
    assert ways == {value}


SOME_TEXT = st.text('ab|\\', max_size=3)


@TRIES
@given(st.lists(st.tuples(SOME_TEXT, SOME_TEXT), min_size=2, max_size=6))
def test_two_pairs_share_a_key_only_when_they_are_equal(pairs):
    frame = pl.DataFrame(pairs, schema=['a', 'b'], orient='row')
    many = pl.concat([frame] * MANY)
    arrays = {name: frame[name].to_numpy() for name in 'ab'}
    keys = key_text(frame, TWO)
    assert keys == key_text(many, TWO)[: len(pairs)] == key_text(arrays, TWO)
    for i, one in enumerate(pairs):
        for j, other in enumerate(pairs):
            assert (keys[i] == keys[j]) == (one == other)


def time_text(moment: datetime) -> str:
    "The oracle: ISO without zeros at the end, a date at midnight; UTC with a Z when it is known"
    zoned = moment.tzinfo is not None
    local = moment.astimezone(UTC).replace(tzinfo=None) if zoned else moment
    if not zoned and local.time() == clock_time():
        return local.strftime('%Y-%m-%d')
    text = local.strftime('%Y-%m-%d %H:%M:%S')
    if local.microsecond:
        text += f'.{local.microsecond:06d}'.rstrip('0')
    return text + 'Z' * zoned


@TRIES
@given(
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),
    st.sampled_from((1, 1000, 10**6, 60 * 10**6, 86_400 * 10**6)),
)
def test_a_time_has_one_key_in_every_unit_that_holds_it(moment, grid):
    since = (moment - datetime(1900, 1, 1)) // timedelta(microseconds=1)
    moment = datetime(1900, 1, 1) + timedelta(microseconds=since // grid * grid)
    held = [unit for unit in UNITS if unit != 'ms' or grid >= 1000]
    for zone, exact in ((None, moment), ('UTC', moment.replace(tzinfo=UTC))):
        column = pl.Series([moment]).dt.replace_time_zone(zone)
        ways = set()
        for unit in held:
            ways |= (
                every_way(column.dt.cast_time_unit(unit))
                if zone is None
                else set(key_text(column.dt.cast_time_unit(unit).to_frame('a'), ONE))
            )
        ways |= set(key_text({'a': np.array([exact], object)}, ONE))
        assert ways == {time_text(exact)}
    if grid == 86_400 * 10**6:
        assert every_way(pl.Series([moment.date()])) == {time_text(moment)}


def test_a_moment_has_one_key_in_every_zone():
    column = pl.Series([datetime(2013, 7, 1, 4)]).dt.replace_time_zone('UTC')
    zones = ('UTC', 'America/New_York', 'Asia/Kolkata')
    ways = [key_text(column.dt.convert_time_zone(zone).to_frame('a'), ONE) for zone in zones]
    assert ways == [['2013-07-01 04:00:00Z']] * 3


@pytest.mark.parametrize('unit', ['D', 'h', 'm', 's', 'ms', 'us', 'ns'])
def test_arrays_of_times_have_the_key_of_a_column(unit):
    values = np.array(['2013-07-01', 'NaT'], f'datetime64[{unit}]')
    assert key_text({'a': values}, ONE) == ['2013-07-01', '']


NO_KEYS = {
    'Decimal': [decimal.Decimal('7')],
    'Boolean': [True],
    'Float64': [7.0],
    'List': [[7]],
    'Binary': [b'7'],
    'Time': [clock_time(7)],
    'Duration': [timedelta(7)],
}


@pytest.mark.parametrize('rows', [1, MANY])
@pytest.mark.parametrize('kind', NO_KEYS)
def test_what_has_no_one_text_is_refused_by_name_for_any_number_of_rows(kind, rows):
    values = NO_KEYS[kind] * rows
    frame = pl.DataFrame({'a': pl.Series(values)})
    for read in (
        lambda: key_text(frame, ONE),
        lambda: key_series(frame, ONE),
        lambda: key_text({'a': frame['a'].to_numpy()}, ONE),
        lambda: key_text({'a': np.array(values, object)}, ONE),
    ):
        with pytest.raises(MlrefError, match='expected the key a'):
            read()


@pytest.mark.parametrize(
    'values', [[7, True], [7, 7.0], ['a', True], [date(2013, 7, 1), 7], ['a', 1.5, None]]
)
def test_values_of_two_kinds_in_one_array_are_refused_with_both_named(values):
    with pytest.raises(MlrefError, match=' and '):
        key_text({'a': np.array(values, object)}, ONE)


def view(entity: Entity) -> FeatureView:
    source = from_table('facts', known='known_time', keys=entity.keys, values={'value': 'unit'})
    return FeatureView(name='v', entity=entity, source=source, stats=('value',))


DAY_ONE = datetime(2013, 7, 1)
# How seven, and the first of July, may be held; types of one row meet, those of two never do
HELD = {
    **{
        f'{dtype}': ('seven', pl.Series([7], dtype=dtype))
        for dtype in (pl.Int8, pl.Int64, pl.UInt32)
    },
    'Date': ('day', pl.Series([DAY_ONE.date()])),
    **{f'naive {u}': ('day', pl.Series([DAY_ONE]).dt.cast_time_unit(u)) for u in ('us', 'ns')},
    'zoned us': ('moment', pl.Series([DAY_ONE]).dt.replace_time_zone('UTC')),
    'zoned ns': (
        'moment',
        pl.Series([DAY_ONE]).dt.replace_time_zone('UTC').dt.cast_time_unit('ns'),
    ),
}


@pytest.mark.parametrize('engine', ['numpy', 'duckdb'])
@pytest.mark.parametrize('held', HELD)
def test_equal_keys_of_two_types_meet_and_others_are_refused_with_both_named(held, engine):
    family, column = HELD[held]
    rows = pl.DataFrame({'a': column, 'known_time': [NOW], 'value': [1.0]})
    for other_family, other in HELD.values():
        for count in (1, MANY):
            asked = pl.DataFrame({'a': pl.concat([other] * count)})
            asked = asked.with_columns(cutoff=pl.lit(NOW))
            if family != other_family:
                with pytest.raises(MlrefError, match='the two never meet') as said:
                    point_in_time_join(asked, (view(ONE),), rows, engine=engine)
                assert str(column.dtype) in str(said.value)
                assert str(other.dtype) in str(said.value)
                continue
            found = point_in_time_join(asked, (view(ONE),), rows, engine=engine)['v_value']
            assert found.to_list() == [1.0] * count


@pytest.mark.parametrize('facts', [1, 250])  # few facts are read without a frame
@pytest.mark.parametrize('held', HELD)
def test_the_store_finds_what_the_reader_of_the_past_finds(held, facts, tmp_path):
    _, column = HELD[held]
    features = FeatureSet(name='f', views=(view(ONE),))
    rows = pl.DataFrame({'a': pl.concat([column] * facts)})
    rows = rows.with_columns(known_time=pl.lit(NOW), value=pl.lit(1.0))
    store = LmdbStore(tmp_path / 'store', features)
    apply_events(store, rows)
    for family, other in HELD.values():
        if family != HELD[held][0]:
            continue
        for count in (1, MANY):
            asked = pl.DataFrame({'a': pl.concat([other] * count)})
            asked = asked.with_columns(cutoff=pl.lit(NOW, pl.Int64))
            served = compute_vectors(store, asked, features)
            rebuilt = compute_vectors(OfflineReader(rows), asked, features)
            assert served.tolist() == rebuilt.tolist() == [[1.0]] * count
    store.close()


@pytest.mark.parametrize('kind', ['Decimal', 'Boolean', 'Float64'])
def test_a_join_names_both_types_whichever_side_has_the_one_that_is_no_key(kind):
    odd = pl.DataFrame({'a': pl.Series(NO_KEYS[kind])})
    plain = pl.DataFrame({'a': [7]})
    for asked, rows in ((odd, plain), (plain, odd)):
        rows = rows.with_columns(known_time=pl.lit(NOW), value=pl.lit(1.0))
        asked = asked.with_columns(cutoff=pl.lit(NOW))
        with pytest.raises(MlrefError, match='the two never meet') as said:
            point_in_time_join(asked, (view(ONE),), rows)
        assert 'Int64' in str(said.value)
        assert kind in str(said.value)


def test_a_nanosecond_makes_another_key_in_a_store_of_few_facts(tmp_path):
    features = FeatureSet(name='f', views=(view(ONE),))
    exact = pl.Series([DAY_ONE]).dt.cast_time_unit('ns')
    later = (exact.to_physical() + 1).cast(pl.Datetime('ns'))
    rows = pl.DataFrame(
        {'a': pl.concat([exact, later]), 'known_time': [NOW] * 2, 'value': [1.0, 2]}
    )
    store = LmdbStore(tmp_path / 'store', features)
    apply_events(store, rows)
    asked = rows.select('a', cutoff='known_time')
    assert compute_vectors(store, asked, features).ravel().tolist() == [1.0, 2.0]
    store.close()
