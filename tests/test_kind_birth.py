"""Whoever is killed while making a file leaves nothing that the next one refuses"""

import subprocess
import sys
import threading

import pytest

from mlref.flights.events import FLIGHT_SCHEMA
from mlref.lake import Lake
from mlref.lmdb_store import LmdbStore, reshard
from mlref.log import LocalLog
from mlref.records import RecordLayout

LAST = RecordLayout('last/k', ('a',), True, 0, 'a' * 16, ttl=50)

KILLED = """
import os, signal, sys
from pathlib import Path
import lmdb
from mlref.lmdb_store import LmdbStore, reshard
from mlref.log import LocalLog
from mlref.records import RecordLayout

LAST = RecordLayout('last/k', ('a',), True, 0, 'a' * 16, ttl=50)
open_file = lmdb.open
folder, what, at = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def die(path, **settings):
    if at == 'empty':  # LMDB makes the file, then writes its head
        (Path(path) / 'data.mdb').touch()
    else:
        open_file(path, **settings)
    os.kill(os.getpid(), signal.SIGKILL)

if what == 'reshard':
    store = LmdbStore(folder, more=(LAST,))
    store.write({b'!name': b'kept'})
lmdb.open = die
if what == 'log':
    LocalLog(folder)
elif what == 'store':
    LmdbStore(folder, more=(LAST,))
else:
    reshard(store, 3)
"""


def kill(folder, what, at):
    "A process that dies while a file of LMDB is empty, or as soon as it has its head"
    command = [sys.executable, '-c', KILLED, str(folder), what, at]
    assert subprocess.run(command, timeout=60).returncode == -9


@pytest.mark.parametrize('at', ['empty', 'whole'])
class TestKilledAtBirth:
    def test_a_log(self, at, tmp_path):
        kill(tmp_path / 'log', 'log', at)
        log = LocalLog(tmp_path / 'log')
        log.append('t', [b'{}'])
        assert log.end('t') == 1
        log.close()

    def test_a_store(self, at, tmp_path):
        kill(tmp_path / 'store', 'store', at)
        store = LmdbStore(tmp_path / 'store', more=(LAST,))
        store.write({b'!name': b'here'})
        assert bytes(store.note(b'!name')) == b'here'
        store.close()

    def test_a_reshard(self, at, tmp_path):
        kill(tmp_path / 'store', 'reshard', at)
        store = LmdbStore(tmp_path / 'store', more=(LAST,))
        assert bytes(store.note(b'!name')) == b'kept'
        reshard(store, 3)
        assert bytes(store.note(b'!name')) == b'kept'
        assert len(list((tmp_path / 'store').glob('g*-*'))) == 3
        store.close()


def test_a_lake(tmp_path):
    "DuckDB, too, makes its file empty at first"
    code = """
import os, sys
from pathlib import Path
import duckdb
from mlref.flights.events import FLIGHT_SCHEMA
from mlref.lake import Lake

def die(path, **settings):
    Path(path).touch()
    os.kill(os.getpid(), 9)

duckdb.connect = die
Lake(Path(sys.argv[1]), FLIGHT_SCHEMA)
"""
    path = tmp_path / 'lake.duckdb'
    assert subprocess.run([sys.executable, '-c', code, str(path)], timeout=60).returncode == -9
    lake = Lake(path, FLIGHT_SCHEMA)
    assert lake.sql('select count(*) as n from events')['n'].to_list() == [0]
    lake.close()


def test_a_registry(tmp_path, monkeypatch):
    "MLflow makes its tables by one migration after the other"
    monkeypatch.delenv('MLREF_CACHE', raising=False)  # not those that another process made
    from mlref.model_versions import list_versions
    from mlref.registry import Registry
    from mlref.tracking_store import local_uri

    code = """
import os, sys
from pathlib import Path
from sqlalchemy import event
from sqlalchemy.engine import Engine
from mlref.registry import Registry
from mlref.tracking_store import local_uri

@event.listens_for(Engine, 'before_cursor_execute')
def die(connection, cursor, statement, *rest):
    if statement.startswith('INSERT INTO _alembic_tmp_'):
        os.kill(os.getpid(), 9)

folder = Path(sys.argv[1])
Registry(folder, local_uri(folder), name='late').client
"""
    folder = tmp_path / 'registry'
    assert subprocess.run([sys.executable, '-c', code, str(folder)], timeout=60).returncode == -9
    registry = Registry(folder, local_uri(folder), name='late')
    assert list_versions(registry) == []
    registry.client.create_registered_model('late')
    assert list_versions(registry) == []


def test_two_that_begin_one_log_in_the_same_instant_have_one_log(tmp_path):
    "Neither takes the file of the other away"
    code = (
        'import sys; from pathlib import Path; from mlref.log import LocalLog; print(flush=True);'
        'sys.stdin.readline(); log = LocalLog(Path(sys.argv[1])); log.append("t", [b"{}"] * 10)'
    )
    for i in range(5):
        command = [sys.executable, '-c', code, str(tmp_path / f'log{i}')]
        both = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for one in both:
            one.stdout.readline()
        threads = [threading.Thread(target=one.communicate, args=[b'\n']) for one in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [one.returncode for one in both] == [0, 0]
        log = LocalLog(tmp_path / f'log{i}')
        assert log.end('t') == 20
        log.close()
