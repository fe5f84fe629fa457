"""The online store against a plain dict, real readers, a killed writer, a full disk, odd files"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from mlref import last_values
from mlref.core import MlrefError
from mlref.last_values import check_store, get_online_features, push
from mlref.lmdb_store import LmdbStore, reshard
from mlref.records import (
    KEEP_MINUTES,
    NO_TIME,
    RecordLayout,
    extend_record,
    pack_record,
    trim_record,
    unpack_record,
)
from mlref.vectors import EXPIRED, MISSING, PRESENT
from programs import MLREF

DEEP = os.environ.get('MLREF_DEEP') == '1'
LAST, ROWS, SUMS = (
    RecordLayout('last/k', ('a', 'b'), True, 0, 'a' * 16, ttl=50),
    RecordLayout('rows/k', ('a',), True, 500, 'b' * 16),
    RecordLayout('sums/k', ('a', 'b'), False, 500, 'c' * 16),
)
EMPTY = settings(
    max_examples=300 if DEEP else 40,
    deadline=None,
    derandomize=not DEEP,
    suppress_health_check=list(HealthCheck),
)


def number(top=1000):
    return st.integers(0, top)


def store(at, **kw):
    return LmdbStore(at, more=(LAST, ROWS, SUMS), **kw)


@pytest.mark.parametrize('shards', [1, 3])
def test_the_conformance_function_passes(shards, tmp_path):
    check_store(lambda layout: LmdbStore(tmp_path / 's', more=(layout,), shards=shards))


def never(layout, records):
    return np.full((len(records), 2), NO_TIME)


@pytest.mark.parametrize(
    'broken', ['older wins', 'no ttl', 'loses a delete', 'first of a batch only']
)
def test_the_conformance_function_can_fail(broken, tmp_path, monkeypatch):
    class Broken(LmdbStore):
        def write(self, records):
            if broken == 'loses a delete':
                records = {k: v for k, v in records.items() if v is not None}
            if broken == 'first of a batch only':
                records = dict(list(records.items())[:1])
            super().write(records)

    if broken == 'older wins':  # the guard sees nothing
        monkeypatch.setattr(last_values, '_newest_times', never)

    def make(layout):
        s = Broken(tmp_path / 's', more=(layout,))
        if broken == 'no ttl':
            object.__setattr__(s.layouts[layout.name], 'ttl', None)
        return s

    with pytest.raises(MlrefError, match='expected a store in which'):
        check_store(make)


facts = st.lists(
    st.tuples(number(40).map(lambda i: 50 * i), st.integers(-3, 3), st.integers(-3, 3)),
    min_size=1,
    max_size=30,
)


@pytest.mark.parametrize('layout', [SUMS, ROWS])
@EMPTY
@given(facts, st.randoms(use_true_random=False), st.integers(1, 6))
def test_a_record_is_a_function_of_its_facts_and_not_of_their_order(layout, fs, rnd, parts):
    "Any order, any batches: the same bytes, and the reads a brute-force count gives"
    clock, w = KEEP_MINUTES + 2000, len(layout.values)
    cut = clock - layout.keep - KEEP_MINUTES

    def put(record, some, now):
        some = sorted(some)
        t = np.array([f[0] for f in some])
        return extend_record(
            layout,
            record,
            t,
            np.array([f[1 : 1 + w] for f in some]).reshape(-1, w).astype(layout.dtype),
            now,
        )

    whole = put(None, fs, clock)
    mixed, record, now = rnd.sample(fs, len(fs)), None, 0
    for i in range(0, len(mixed), -(-len(mixed) // parts)):
        now = min(clock, max(now, rnd.randrange(clock + 1)))
        record = put(record, mixed[i : i + -(-len(mixed) // parts)], now)
    assert (
        pack_record(layout, *trim_record(layout, *unpack_record(layout, record), clock), clock)
        == whole
    )
    T, table = unpack_record(layout, whole)
    for q in range(cut, 2100, 97):
        if q < T[0]:
            continue
        got, known = (
            table[T.searchsorted(q, 'right') - 1],
            sorted(f[: 1 + w] for f in fs if f[0] <= q),
        )
        if layout.newest:
            assert np.array_equal(got, known[-1] if known else [np.nan] * (1 + w), equal_nan=True)
        else:
            assert got.tolist() == [
                len(known),
                *(sum(f[i] for f in known) for i in range(1, 1 + w)),
            ]


class Machine(RuleBasedStateMachine):
    "A store against a dict of the newest (t, known, values) per key; closed, opened, resharded"

    def __init__(self):
        super().__init__()
        self.tmp = tempfile.TemporaryDirectory()
        self.s, self.model = store(Path(self.tmp.name) / 's'), {}

    @rule(
        rows=st.lists(
            st.tuples(
                st.sampled_from('vwxyz'), number(200), number(5), st.floats(-9, 9) | st.just(np.nan)
            ),
            max_size=8,
        )
    )
    def push(self, rows):
        k, t, d = (
            [r[0] for r in rows],
            np.array([r[1] for r in rows], np.int64),
            np.array([r[2] for r in rows], np.int64),
        )
        before = dict(self.model)
        for r in rows:
            if r[0] not in self.model or self.model[r[0]][:2] < (r[1], r[1] + r[2]):
                self.model[r[0]] = (r[1], r[1] + r[2], (r[3], r[3] + 1))
        n = push(
            self.s,
            LAST.name,
            k,
            t,
            np.array([[r[3], r[3] + 1] for r in rows]).reshape(-1, 2),
            t + d,
        )
        assert n == sum(before.get(k) is not v for k, v in self.model.items())

    @rule()
    def again(self):
        self.s.close()
        self.s = store(Path(self.tmp.name) / 's')

    @rule(n=st.integers(1, 4))
    def reshard(self, n):
        reshard(self.s, n)

    @rule(now=number(300))
    def read(self, now):
        keys = list('uvwxyz')
        X, state = get_online_features(self.s, [LAST.name], [keys], now, np.empty((6, 2)))
        for i, k in enumerate(keys):
            t, _, v = self.model.get(k, (now, 0, (np.nan, np.nan)))
            old = k in self.model and t < now - LAST.ttl
            assert np.array_equal(X[i], (np.nan, np.nan) if old else v, equal_nan=True)
            assert state[i].tolist() == [
                EXPIRED if old else MISSING if np.isnan(x) else PRESENT for x in v
            ]

    @invariant()
    def nothing_else(self):
        assert sum(k.startswith(LAST.prefix) for k in self.s.names()) == len(self.model)

    def teardown(self):
        self.s.close()
        self.tmp.cleanup()


Machine.TestCase.settings = settings(
    max_examples=200 if DEEP else 15,
    stateful_step_count=30,
    deadline=None,
    derandomize=not DEEP,
    suppress_health_check=list(HealthCheck),
)
test_machine = Machine.TestCase

READER = """
import sys, time; from pathlib import Path; import numpy as np
from mlref.last_values import get_online_features
from mlref.lmdb_store import LmdbStore
from mlref.records import RecordLayout
l = RecordLayout('last/k', ('a', 'b'), True, 0, 'a' * 16, ttl=50)
s = LmdbStore(Path(sys.argv[1]), readonly=True, more=(l,))
keys = [f'k{i}' for i in range(200)]
i = np.arange(200)
n = wrong = 0
low = -1
generations = set()
print('ready', flush=True)
while not (Path(sys.argv[1])/'stop').exists():
    X, state = get_online_features(s, ['last/k'], [keys], 0, np.empty((200, 2)))
    n += 1
    generations.add(s.manifest.generation)
    whole = not state.any() and (X[:, 1] - X[:, 0] == i).all()
    wrong += not (whole and (X[:, 0] >= low).all())  # a batch that was seen stays seen
    low = X[:, 0].min()
print(n, wrong, len(generations))
"""


@pytest.mark.parametrize('readers', [2])
def test_readers_see_no_wrong_answer_while_the_store_is_resharded_and_written(readers, tmp_path):
    s, keys = store(tmp_path), [f'k{i}' for i in range(200)]
    i = np.arange(200)

    def batch(v):
        push(s, LAST.name, keys, np.full(200, v), np.column_stack([np.full(200, v), v + i]))

    batch(0)
    ps = [
        subprocess.Popen(
            [sys.executable, '-c', READER, tmp_path], stdout=subprocess.PIPE, text=True
        )
        for _ in range(readers)
    ]
    for p in ps:
        assert p.stdout.readline() == 'ready\n'
    v = 0
    for n in [3, 1, 4, 2, 5] * (4 if DEEP else 1):
        for _ in range(5):
            v += 1
            batch(v)
            time.sleep(0.005)
        reshard(s, n)
    time.sleep(0.1)
    (tmp_path / 'stop').touch()
    for p in ps:
        n, wrong, moves = map(int, p.communicate(timeout=30)[0].split())
        assert n > 50 and wrong == 0 and moves >= 3, (n, wrong, moves)


def test_the_command_makes_and_reshards_a_store_under_read_load(tmp_path):
    "Three processes of the command, one after the other, while two others read without a pause"
    at = tmp_path / 's'

    def mlref(*args):
        p = subprocess.run([*MLREF, 'features', 'reshard', *args], capture_output=True, text=True)
        return p.returncode, p.stdout + p.stderr

    assert mlref('3', '--store', str(at)) == (0, f'0 records in 3 parts of {at}, none before\n')
    s, keys, i = store(at), [f'k{i}' for i in range(200)], np.arange(200)
    assert len(s.envs) == 3
    push(s, LAST.name, keys, np.full(200, 5), np.column_stack([np.full(200, 5), 5 + i]))
    code_, said = mlref('2', '--store', str(at))
    assert code_ == 1 and 'expected no other writer' in said
    s.close()
    ps = [
        subprocess.Popen([sys.executable, '-c', READER, at], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for p in ps:
        assert p.stdout.readline() == 'ready\n'
    for was, n in ((3, 1), (1, 4), (4, 2)):
        assert mlref(str(n), '--store', str(at)) == (
            0,
            f'200 records in {n} part{"s" * (n > 1)} of {at}, {was} before\n',
        )
        time.sleep(0.1)
    (at / 'stop').touch()
    for p in ps:
        n, wrong, moves = map(int, p.communicate(timeout=60)[0].split())
        assert n > 50 and wrong == 0 and moves == 4, (n, wrong, moves)
    assert mlref('many', '--store', str(at))[0] == mlref('0', '--store', str(at))[0] == 2


WRITER = """
import sys; from pathlib import Path; import numpy as np
from mlref.lmdb_store import LmdbStore, reshard
from mlref.records import RecordLayout
l = RecordLayout('last/k', ('a', 'b'), True, 0, 'a' * 16, ttl=50)
s = LmdbStore(Path(sys.argv[1]), more=(l,), shards=3); print('ready', flush=True)
v = int(s.note(b'!v') or 0)
while True:
    v += 1; s.write({b'!v': b'%d' % v, **{b'!last/k/%d' % i: b'%d' % v for i in range(300)}})
    if v % 7 == 0: reshard(s, 2 + v % 3)
"""


def test_a_killed_writer_leaves_whole_batches(tmp_path):
    g = random.Random(1)
    for _ in range(40 if DEEP else 6):
        p = subprocess.Popen(
            [sys.executable, '-c', WRITER, tmp_path], stdout=subprocess.PIPE, text=True
        )
        assert p.stdout.readline() == 'ready\n'
        time.sleep(g.uniform(0.01, 0.3))
        p.send_signal(signal.SIGKILL)
        p.wait()
        s = store(tmp_path)  # finishes what was begun
        got = set(s.notes([b'!v', *(b'!last/k/%d' % i for i in range(300))]))
        s.close()
        assert len(got) == 1, got
        assert {d.name for d in tmp_path.glob('g*-*')} == set(
            json.loads((tmp_path / 'store.json').read_text())['parts']
        )
    assert int(got.pop()) > 5


def test_bad_input_is_refused_and_the_store_is_as_it_was(tmp_path):
    s = store(tmp_path)
    push(s, LAST.name, ['x'], np.array([5]), np.array([[1.0, 2]]))
    one, t = ['x'], np.array([9])
    before = {n: s.get(LAST.name, 'x') for n in s.names()}
    for why, call in {
        'one of the histories': lambda: push(s, 'nobody/k', one, t, np.ones((1, 2))),
        'keeps sums': lambda: push(s, SUMS.name, one, t, np.ones((1, 2))),
        'whole minutes': lambda: push(s, LAST.name, one, np.array([9.0]), np.ones((1, 2))),
        'expected numbers of shape': lambda: push(s, LAST.name, one, t, np.ones((1, 3))),
        'got <U1': lambda: push(s, LAST.name, one, t, np.array([['a', 'b']])),
        'keys as text': lambda: push(s, LAST.name, [7], t, np.ones((1, 2))),
        'one t and one known': lambda: push(s, LAST.name, one, np.array([9, 9]), np.ones((1, 2))),
        'at most 500 bytes': lambda: push(s, LAST.name, ['x' * 600], t, np.ones((1, 2))),
        'expected out as floats': lambda: get_online_features(
            s, [LAST.name], [one], 9, np.empty((1, 2), int)
        ),
        'all as long': lambda: get_online_features(s, [LAST.name] * 2, [one, []], 9),
        'at least one shard': lambda: reshard(s, 0),
    }.items():
        with pytest.raises(MlrefError, match=why):
            call()
    assert {n: s.get(LAST.name, 'x') for n in s.names()} == before
    assert (
        get_online_features(s, [LAST.name], [[]], 9)[0].shape == (0, 2)
        and push(s, LAST.name, [], np.array([], np.int64), np.empty((0, 2))) == 0
    )
    s.close()
    r = store(tmp_path, readonly=True)
    with pytest.raises(MlrefError, match='readonly=True'):
        push(r, LAST.name, one, t, np.ones((1, 2)))


@pytest.mark.parametrize('shards', [1, 3])
def test_a_full_store_is_as_it_was_and_takes_more_when_it_may_grow(shards, tmp_path):
    s, v = store(tmp_path, size=300_000, shards=shards), np.ones((20_000, 2))
    push(s, LAST.name, ['x'], np.array([5]), v[:1])
    keys = [f'k{i}' for i in range(20_000)]
    t = np.full(20_000, 6)
    with pytest.raises(MlrefError, match='full at 300,000 bytes; open it with a larger size'):
        push(s, LAST.name, keys, t, v)
    assert (
        sum(k.startswith(LAST.prefix) for k in s.names()) == 1 and not (tmp_path / 'redo').exists()
    )
    s.close()
    s = store(tmp_path)
    assert push(s, LAST.name, keys, t, v) == 20_000


def test_files_that_are_not_what_they_should_be(tmp_path):
    s = store(tmp_path / 's')
    push(s, LAST.name, [f'k{i}' for i in range(1000)], np.full(1000, 6), np.ones((1000, 2)))
    p = subprocess.run(
        [
            sys.executable,
            '-c',
            f'from mlref.lmdb_store import LmdbStore; LmdbStore({str(tmp_path / "s")!r})',
        ],
        capture_output=True,
        text=True,
    )
    assert 'expected no other writer' in p.stderr
    s.close()
    about = (tmp_path / 's' / 'store.json').read_text()
    data = tmp_path / 's' / 'g1-0' / 'data.mdb'
    with pytest.raises(
        MlrefError, match='version dddddddddddddddd, the store holds version aaaaaaaaaaaaaaaa'
    ):
        LmdbStore(tmp_path / 's', more=(RecordLayout('last/k', ('a', 'b'), True, 0, 'd' * 16),))
    (tmp_path / 's' / 'store.json').write_text(about.replace('"format": 2', '"format": 9'))
    with pytest.raises(MlrefError, match='format 2 .*format 9'):
        store(tmp_path / 's')
    (tmp_path / 's' / 'store.json').write_text(about)
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    for readonly in (True, False):
        with pytest.raises(MlrefError, match='was cut off'):
            store(tmp_path / 's', readonly=readonly)
    data.write_bytes(b'\0' * len(whole))
    with pytest.raises(MlrefError, match='rebuild the store'):
        store(tmp_path / 's')
    (tmp_path / 'old').mkdir()
    (tmp_path / 'old' / 'data.mdb').touch()
    with pytest.raises(MlrefError, match='format 0'):
        store(tmp_path / 'old')


@pytest.mark.skipif(not DEEP, reason='10^7 keys: only with MLREF_DEEP=1')
def test_ten_million_keys(tmp_path):
    s = store(tmp_path)
    for a in range(0, 10**7, 500_000):
        push(
            s,
            LAST.name,
            [f'{k}' for k in range(a, a + 500_000)],
            np.full(500_000, 7),
            np.column_stack([np.arange(a, a + 500_000)] * 2),
        )
    keys = [f'{k}' for k in range(0, 10**7, 99_991)]
    assert get_online_features(s, [LAST.name], [keys], 7, np.empty((len(keys), 2)))[0][
        :, 0
    ].tolist() == [float(k) for k in keys]
