"""Processes that die, hold a moment for ever, or find another folder under the name they opened"""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mlref import lmdb_store
from mlref.core import MlrefError
from mlref.dead_letters import Outage
from mlref.last_values import get_online_features, push
from mlref.lmdb_store import LmdbStore, reshard, snapshot_lag
from mlref.records import RecordLayout

LAST = RecordLayout('last/k', ('a', 'b'), True, 0, 'a' * 16, ttl=50)
KEYS = [f'k{i}' for i in range(2000)]
HOLD = """
import sys, time
from pathlib import Path
from mlref.lmdb_store import LmdbStore
from mlref.records import RecordLayout
last = RecordLayout('last/k', ('a', 'b'), True, 0, 'a' * 16, ttl=50)
store = LmdbStore(Path(sys.argv[1]), readonly=True, more=(last,))
held = [store.snapshot() for _ in range(int(sys.argv[2]))]
for each in held:
    each.__enter__()
print('holds', flush=True)
time.sleep(600)
"""


def store_at(folder, **settings):
    return LmdbStore(folder, more=(LAST,), **settings)


def write(store, value, keys=KEYS):
    count = len(keys)
    push(store, LAST.name, keys, np.full(count, value), np.full((count, 2), float(value)))


def hold(folder, moments=1):
    "A process that reads and holds so many moments"
    command = [sys.executable, '-c', HOLD, str(folder), str(moments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'holds\n'
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def size(folder):
    return sum(os.path.getsize(each) for each in folder.glob('*/data.mdb'))


def test_a_reader_killed_in_a_snapshot_lets_the_store_stay_small(tmp_path):
    "The writer frees what it held, within a few commits; without that it grew by every batch"
    store = store_at(tmp_path, shards=2)
    some = KEYS[:300]
    for value in range(4):
        write(store, value, some)
    before = size(tmp_path)
    kill(hold(tmp_path))
    for value in range(4, 104):
        write(store, value, some)
    assert snapshot_lag(store) == 0
    assert size(tmp_path) < 8 * before


def test_slots_of_dead_readers_are_freed_when_none_is_left(tmp_path):
    "And when all are held by the living, that is what the sentence says"
    store = store_at(tmp_path)
    write(store, 1)
    slots = store.envs[0].info()['max_readers']
    process = hold(tmp_path, slots - 2)
    with store.snapshot(), store.snapshot():
        with pytest.raises(Outage, match='all are held by readers that live'):
            store.position()
        kill(process)
        assert store.position() == 0
    assert get_online_features(store, [LAST.name], [['k1']], 1).values.tolist() == [[1, 1]]


def test_a_process_that_holds_a_moment_for_long_is_a_meter_and_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_store, 'MAX_LAG', 50)
    store = store_at(tmp_path)
    write(store, 0)
    process = hold(tmp_path)
    try:
        with pytest.warns(UserWarning, match='at most 50 commits, a process holds one of'):
            for value in range(1, 129):
                write(store, value, KEYS[:2])
        assert snapshot_lag(store) == 128
    finally:
        kill(process)
    for value in range(129, 160):
        write(store, value, KEYS[:2])
    assert snapshot_lag(store) == 0


def move(folder):
    folder.rename(folder.with_name('elsewhere'))


def replace_folder(folder):
    move(folder)
    store_at(folder).close()


def remove(folder):
    shutil.rmtree(folder)


def read_one(store):
    return get_online_features(store, [LAST.name], [['k1']], 7)


def write_one(store):
    write(store, 8)


def write_note(store):
    store.write({b'!x': b''})


def reshard_two(store):
    reshard(store, 2)


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('happens', [move, remove, replace_folder])
def test_a_folder_that_is_no_longer_there_is_not_served(happens, shards, tmp_path):
    "Not by a reader, not by the writer; a moment that was taken before is still whole"
    said = 'deleted, moved or replaced while it was in use'
    for readonly in (True, False):
        folder = tmp_path / f'{readonly}' / 'store'
        made = store_at(folder, shards=shards)
        write(made, 7)
        made.close()
        store = store_at(folder, readonly=readonly)
        with store.snapshot() as lookup:
            happens(folder)
            assert lookup([LAST.prefix + b'k1'])[0] is not None
        time.sleep(0.25)
        calls = [read_one, LmdbStore.position]
        calls += [] if readonly else [write_one, write_note, reshard_two]
        for call in calls:
            with pytest.raises(Outage, match=said):
                call(store)
        store.close()


def test_a_moved_folder_that_is_put_back_is_served_again(tmp_path):
    store = store_at(tmp_path / 'store')
    write(store, 7)
    move(tmp_path / 'store')
    time.sleep(0.25)
    with pytest.raises(Outage):
        store.position()
    (tmp_path / 'elsewhere').rename(tmp_path / 'store')
    assert store.position() == 0


@pytest.mark.parametrize('shards', [0, 257, -1])
def test_shards_have_a_limit_that_is_said(shards, tmp_path):
    with pytest.raises(MlrefError, match='at least one shard and at most 256'):
        store_at(tmp_path / 'new', shards=shards)
    assert not (tmp_path / 'new').exists()
    store = store_at(tmp_path / 'old')
    with pytest.raises(MlrefError, match='at most 256'):
        reshard(store, shards)
