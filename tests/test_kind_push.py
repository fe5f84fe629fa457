"""What is pushed and asked for by hand: odd and falsy values are refused, not read as something"""

import numpy as np
import pytest

from mlref.core import MlrefError
from mlref.last_values import get_online_features, push
from mlref.lmdb_store import LmdbStore
from mlref.records import RecordLayout

LAST = RecordLayout('last/k', ('a', 'b'), True, 0, 'a' * 16, ttl=50)
KEPT = RecordLayout('kept/k', ('a', 'b'), True, 500, 'b' * 16, ttl=50)
NOW = 22_700_000
ODD = ('', [], {}, (), False, None, float('nan'), b'', 'abc', {'x'})


@pytest.fixture
def store(tmp_path):
    made = LmdbStore(tmp_path, more=(LAST, KEPT))
    push(made, LAST.name, ['x'], np.array([NOW]), np.array([[1.0, 2]]))
    yield made
    made.close()


@pytest.mark.parametrize('odd', ODD, ids=repr)
@pytest.mark.parametrize('history', [LAST, KEPT], ids=['newest', 'kept'])
def test_push_refuses_what_is_no_row(store, history, odd):
    t, rows = np.array([NOW]), np.ones((1, 2))
    before = store.names()
    calls = [
        lambda: push(store, odd, ['x'], t, rows),
        lambda: push(store, history.name, odd, t, rows),
        lambda: push(store, history.name, ['x'], odd, rows),
        lambda: push(store, history.name, ['x'], t, odd),
    ]
    if odd != 'abc':  # is a key
        calls += [lambda: push(store, history.name, [odd], t, rows)]
    if odd is not None:  # None means `t`
        calls += [lambda: push(store, history.name, ['x'], t, rows, odd)]
    for call in calls:
        with pytest.raises(MlrefError, match='expected'):
            call()
    assert store.names() == before


@pytest.mark.parametrize('odd', ODD, ids=repr)
def test_a_read_refuses_what_is_no_key(store, odd):
    calls = [
        lambda: get_online_features(store, odd, [['x']], NOW),
        lambda: get_online_features(store, [odd], [['x']], NOW),
        lambda: get_online_features(store, [LAST.name], odd, NOW),
        lambda: get_online_features(store, [LAST.name], [['x']], odd),
    ]
    if odd not in ([], ()):  # no request at all is no fault
        calls += [lambda: get_online_features(store, [LAST.name], [odd], NOW)]
    if odd not in ('', 'abc'):  # nobody, and a key
        calls += [lambda: get_online_features(store, [LAST.name], [[odd]], NOW)]
    if odd is not None:  # None means a new matrix
        calls += [lambda: get_online_features(store, [LAST.name], [['x']], NOW, odd)]
    for call in calls:
        with pytest.raises(MlrefError, match='expected'):
            call()


@pytest.mark.parametrize('unit', [60, 60_000, 1 / 60])
def test_a_push_in_another_unit_freezes_no_key(store, unit):
    "One row in seconds would be newer than every row to come"
    with pytest.raises(MlrefError, match='whole minutes'):
        push(store, LAST.name, ['x'], np.array([NOW * unit]), np.array([[3.0, 4]]))
    assert push(store, LAST.name, ['x'], np.array([NOW + 1]), np.array([[3.0, 4]])) == 1


def test_whole_numbers_that_a_float_would_round_are_refused(store):
    large = np.array([[2**53 + 1, 0]])
    with pytest.raises(MlrefError, match=r'below 2\^53'):
        push(store, LAST.name, ['x'], np.array([NOW + 1]), large)
