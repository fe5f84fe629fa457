"""Where another library can speak, it is one sentence: client, registry, models, command line"""

import json
import os
import random
import socket
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import duckdb
import lmdb
import numpy as np
import polars as pl
import pytest
import requests
import sqlalchemy
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.client import Client, ServerUnreachable
from mlref.connections import listen
from mlref.core import MlrefError
from mlref.edges import blame_library, check_writable, read_json_object, retry
from mlref.flights.task import flights_task
from mlref.journaled_log import JournaledLog
from mlref.lake import Lake
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.model_versions import _load_kind
from mlref.pipeline import PipelineRun
from mlref.protocols import RequestError
from mlref.registry import Registry, TrainingRun, check_noted_names
from mlref.report import read_facts
from mlref.serving_state import publish_state
from mlref.terminal import Status, run_cli
from mlref.tracking_store import local_uri
from programs import FORK, MLREF
from small import SCHEMA, TASK

ROOT = Path(__file__).parent.parent


# The client


def serve_bytes(listening: socket.socket, answers: list[bytes | None]) -> None:
    "One answer a connection; None = never say anything"
    silent = []
    for answer in answers:
        connection, _ = listening.accept()
        if answer is None:
            silent.append(connection)
            continue
        with connection:
            connection.recv(65536)
            connection.sendall(answer)
    for connection in silent:
        connection.close()


def http(status: str, body: bytes, more: bytes = b'') -> bytes:
    head = f'HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n'
    return head.encode() + more + b'\r\n' + body


def ask(answer: bytes | None, act) -> BaseException:
    "What a client says of an answer"
    with socket.create_server(('127.0.0.1', 0)) as listening:
        thread = threading.Thread(target=serve_bytes, args=(listening, [answer]), daemon=True)
        thread.start()
        url = f'http://127.0.0.1:{listening.getsockname()[1]}'
        with pytest.raises(MlrefError) as error:
            act(Client(url, flights_task(), timeout=0.5))
    said = str(error.value)
    assert '\n' not in said and said.startswith('expected') and ';' in said
    return error.value


def score(client: Client) -> None:
    client.ask('/predict', {'entities': []})


@pytest.mark.parametrize(
    'answer, said',
    [
        (http('502 Bad Gateway', b'<html>nginx</html>'), 'status 502 and 18 bytes'),
        (http('200 OK', b'[1, 2]'), 'status 200 and 6 bytes'),
        (http('200 OK', b''), 'status 200 and 0 bytes'),
        (http('500 Oops', b'{"error": {"code": 1}}'), 'status 500'),
        (http('404 Not Found', b'{"detail": "no"}'), 'status 404'),
        (http('200 OK', b'{"p": \xff}'), 'status 200'),
    ],
)
def test_an_answer_that_is_none_is_a_sentence(answer, said):
    error = ask(answer, score)
    assert said in str(error) and not isinstance(error, RequestError | ServerUnreachable)


@pytest.mark.parametrize(
    'answer',
    [http('200 OK', b'{"predictions": []}')[:-5], b'', b'SSH-2.0-OpenSSH_9\r\n', None],
    ids=['cut', 'closed', 'another protocol', 'silent'],
)
def test_a_server_that_cannot_be_reached_is_a_sentence(answer):
    assert isinstance(ask(answer, score), ServerUnreachable)


@pytest.mark.parametrize('body', [b'{}', b'{"predictions": 7}', b'{"predictions": [1, 2, 3]}'])
def test_an_answer_without_what_was_asked_is_a_sentence(body):
    one = pl.DataFrame({field: [None] for field in flights_task().schema.columns})
    ask(http('200 OK', body), lambda client: client.answers(one))


def test_refused_connections_and_wrong_addresses_are_sentences():
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        port = taken.getsockname()[1]
    for url in (
        f'http://127.0.0.1:{port}',
        'http://no.such.host.invalid',
        'http://[::1',
        'http://',
    ):
        with pytest.raises(MlrefError, match='expected'):
            score(Client(url, flights_task(), timeout=2))
    for url in ('127.0.0.1:8080', 'file:///etc/passwd', 'ftp://x', ''):
        with pytest.raises(MlrefError, match='begin it with http'):
            Client(url, flights_task())


def test_any_bytes_at_all_are_a_sentence():
    "Answers with a byte changed, cut or doubled, and noise"
    chance = random.Random(0)
    good = http('200 OK', json.dumps({'error': 'x', 'predictions': [{'p': 0.5}]}).encode())
    answers = []
    for _ in range(60):
        data = bytearray(good)
        at = chance.randrange(len(data))
        data[at] = chance.randrange(256)
        answers.append(bytes(data[: chance.choice([at, len(data)])]))
    answers += [chance.randbytes(chance.randrange(200)) for _ in range(20)]
    with socket.create_server(('127.0.0.1', 0)) as listening:
        threading.Thread(target=serve_bytes, args=(listening, answers), daemon=True).start()
        client = Client(f'http://127.0.0.1:{listening.getsockname()[1]}', flights_task(), 1)
        for _ in answers:
            try:
                client.ask_for('predictions', '/predict', {})
            except MlrefError as error:
                assert '\n' not in str(error)


# The registry


def use_first(folder: str, barrier, failed) -> None:
    "One of several first users"
    barrier.wait()
    try:
        registry = Registry(Path(folder), local_uri(Path(folder)), name='late')
        assert registry.client
        registry.call('create_experiment', 'late')
        registry.call('create_registered_model', 'late')
    except Exception as error:
        failed.put(f'{type(error).__name__}: {error}')


def test_several_processes_are_the_first_users_of_a_registry(tmp_path):
    barrier = FORK.Barrier(3, timeout=100)
    failed = FORK.SimpleQueue()
    users = [FORK.Process(target=use_first, args=(str(tmp_path), barrier, failed)) for _ in '123']
    for user in users:
        user.start()
    for user in users:
        user.join(120)
    assert failed.empty(), failed.get()
    assert [user.exitcode for user in users] == [0] * 3
    with sqlite3.connect(tmp_path / 'mlflow.db') as tables:
        assert tables.execute('select name from registered_models').fetchall() == [('late',)]


ROUNDS = 40


def write_the_same(folder: str, barrier, failed) -> None:
    "One of two processes that write the same things at the same moment"
    registry = Registry(Path(folder), local_uri(Path(folder)), name='late')
    writes = [
        ('create_registered_model', 'model{}'),
        ('set_registered_model_alias', 'late', 'alias{}', '1'),
        ('set_registered_model_tag', 'late', 'tag{}', 'x'),
        ('delete_registered_model_alias', 'late', 'alias{}'),
    ]
    for number in range(ROUNDS):
        for write in writes:
            barrier.wait()
            try:
                registry.call(*[word.format(number) for word in write])
            except Exception as error:
                failed.put(f'{write[0]}: {type(error).__name__}: {error}')


def test_two_processes_that_write_the_same_at_once_are_both_answered(tmp_path):
    registry = Registry(tmp_path, local_uri(tmp_path), name='late')
    assert registry.client
    registry.call('create_registered_model', 'late')
    registry.call('create_model_version', 'late', str(tmp_path))
    barrier, failed = FORK.Barrier(2, timeout=100), FORK.Queue()
    both = [
        FORK.Process(target=write_the_same, args=(str(tmp_path), barrier, failed)) for _ in '12'
    ]
    for each in both:
        each.start()
    for each in both:
        each.join(200)
    assert [each.exitcode for each in both] == [0, 0]
    assert failed.empty(), failed.get()


def test_a_busy_database_is_waited_for(tmp_path):
    "Another process writes; MLflow says that the database is locked"
    answers = iter([sqlite3.OperationalError('database is locked')] * 2 + ['done'])

    def act():
        found = next(answers)
        if isinstance(found, Exception):
            raise found
        return found

    waits: list[float] = []
    assert retry(act, lambda error: 'locked' in str(error), wait=waits.append) == 'done'
    assert waits == [0.1, 0.2]


@pytest.mark.parametrize('data', [b'no database', b'SQLite format 3\x00' + b'\xff' * 4096])
def test_a_file_that_is_no_registry_is_a_sentence(tmp_path, data):
    (tmp_path / 'mlflow.db').write_bytes(data)
    registry = Registry(tmp_path, name='late')
    with pytest.raises(MlrefError, match='expected to open the registry at sqlite') as error:
        registry.call('search_registered_models')
    assert '\n' not in str(error.value)


KEEPERS = {  # what keeps something in a folder, and how it is opened
    'log': LocalLog,
    'journaled log': JournaledLog,
    'lake': lambda folder: Lake(folder / 'lake.duckdb', SCHEMA),
    'store': lambda folder: LmdbStore(folder, TASK.features),
    'registry': lambda folder: Registry(folder, name='late'),
    'server': lambda folder: publish_state(folder, replace),
}


@pytest.mark.parametrize('keeper', KEEPERS)
def test_a_file_in_the_place_of_a_folder_is_a_sentence(tmp_path, keeper):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        with pytest.raises(MlrefError, match=f'{folder}.*(File exists|Not a directory|is a file)'):
            KEEPERS[keeper](folder)
    assert (tmp_path / 'file').read_bytes() == b''


def test_a_registry_whose_folder_is_a_file_is_a_sentence(tmp_path):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'registry'):
        with pytest.raises(MlrefError, match='a folder for a registry'):
            Registry(folder, name='late')
    for name in ('', ' ', 'a/b', 'a:b', '../late', "la'te"):
        with pytest.raises(MlrefError, match='a name of a model'):
            Registry(tmp_path / 'new', name=name)
    assert not (tmp_path / 'new').exists()


@given(st.text(st.sampled_from('aB1_ -./:é%>\n\t$'), max_size=12) | st.text(max_size=260))
@settings(max_examples=300, deadline=None)
def test_the_names_we_take_are_those_that_mlflow_takes(name):
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_metric, _validate_param

    try:
        check_noted_names({name: 1}, 'metric')
    except MlrefError:
        return
    try:
        _validate_metric(name, 0.5, 0, 0)
        _validate_param(name, 'x')
    except MlflowException as error:
        raise AssertionError(f'{name!r} is refused later: {error}') from None


@pytest.mark.parametrize(
    'metrics, params',
    [({'auc>.7': 1.0}, {}), ({'auc': 'x'}, {}), ({'auc': None}, {}), ({}, {'a%': 1})],
)
def test_a_run_that_mlflow_would_refuse_is_refused_when_it_is_made(metrics, params):
    with pytest.raises(MlrefError, match='expected'):
        TrainingRun('data', metrics, params)
    with pytest.raises(MlrefError, match='at most 6,000 characters'):
        TrainingRun('data', {}, {'long': 'x' * 6001})
    assert TrainingRun('data', {'auc': np.float32(0.7), 'late/all 1': 1}).data == 'data'


# Files, folders, ports


@pytest.mark.parametrize('data', [b'', b'{', b'[]', b'7', b'\xff', b'[' * 100_000, b'null'])
def test_a_file_that_is_no_json_object_is_a_sentence(tmp_path, data):
    (tmp_path / 'x.json').write_bytes(data)
    with pytest.raises(MlrefError, match='x.json') as error:
        read_json_object(tmp_path / 'x.json', 'a record', 'write it again')
    assert str(error.value).endswith('; write it again')
    with pytest.raises(MlrefError):
        read_json_object(tmp_path, 'a record', 'write it again')


def test_a_lake_that_is_noise_is_a_sentence(tmp_path):
    run = PipelineRun(tmp_path, tmp_path, tmp_path, 'one', 'year', {})
    (run.folder / 'lake').mkdir(parents=True)
    (run.folder / 'lake' / 'mlref.duckdb').write_bytes(b'noise' * 5000)
    with pytest.raises(MlrefError, match='expected to read the lake'):
        read_facts(run)


@pytest.mark.parametrize('port', [99999, -1, 65536])
def test_a_port_that_is_none_is_a_sentence(port):
    with pytest.raises(MlrefError, match='choose another with --port'):
        listen('127.0.0.1', port)


def test_a_folder_is_judged_before_it_is_made(tmp_path):
    (tmp_path / 'file').touch()
    check_writable(tmp_path / 'a' / 'b', '--data')
    assert not (tmp_path / 'a').exists()
    for folder in (tmp_path / 'file', tmp_path / 'file' / 'b'):
        with pytest.raises(MlrefError, match='is a file; choose another with --data'):
            check_writable(folder, '--data')


def test_a_loader_that_fails_is_a_sentence(tmp_path, monkeypatch):
    "Its package may have another version than the model was saved with"
    import mlref.model_versions as page

    def load(folder):
        raise RuntimeError('invalid magic number\nin line 7')

    monkeypatch.setattr(page, 'load_model', load)
    with pytest.raises(MlrefError, match='of kind gbm .*RuntimeError: invalid magic number; inst'):
        _load_kind(tmp_path, 'gbm')


# The command line


ERRORS = [
    sqlite3.OperationalError('database is locked'),
    duckdb.IOException('IO Error: Could not set lock\non file'),
    lmdb.MapFullError('mdb_put'),
    pl.exceptions.ComputeError('cannot parse'),
    requests.ConnectionError('refused'),
    sqlalchemy.exc.OperationalError('select', {}, Exception('locked')),
    json.JSONDecodeError('Expecting value', '', 0),
    URLError('refused'),
    OSError(28, 'No space left on device', 'lake.duckdb'),
    PermissionError(13, 'Permission denied', 'data'),
    NotADirectoryError(20, 'Not a directory', 'file/data'),
]


@pytest.mark.parametrize('error', ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_of_another_library_is_one_line_and_status_1(error, capsys, monkeypatch):
    monkeypatch.delenv('MLREF_TRACEBACK', raising=False)
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    assert run_cli(app, []) == Status.REFUSED
    said = capsys.readouterr().err
    assert said.startswith('mlref: expected') and len(said.splitlines()) == 1
    assert blame_library(error)
    monkeypatch.setenv('MLREF_TRACEBACK', '1')
    with pytest.raises(type(error)):
        run_cli(app, [])


@pytest.mark.parametrize('error', [KeyError('x'), ZeroDivisionError(), AttributeError('x')])
def test_a_fault_of_this_library_keeps_its_traceback(error):
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run_cli(app, [])


def test_a_reader_that_goes_away_is_no_error():
    "mlref features list | head -1"
    command = [*MLREF, 'features', 'list', '--json']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 0 and said == b'', said.decode()[-500:]
    process.stderr.close()


# An engine without PyTorch

SERVED = """
import sys
from pathlib import Path
import numpy as np
from mlref.model_versions import _load_kind
model = _load_kind(Path(sys.argv[3]), 'onnx')
assert model.requires() == ('onnxruntime',)
print(model.predict(np.zeros((2, 3), np.float32)).tolist())
assert 'torch' not in sys.modules
"""


def test_an_exported_network_is_served_with_only_the_extra_serve():
    "tests/corpus/engine: a linear network of three features, saved by `build_engine(..., 'onnx')`"
    words = [sys.executable, ROOT / 'tests' / 'only_extra.py', 'serve', SERVED]
    words.append(ROOT / 'tests' / 'corpus' / 'engine')
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd='/',
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-1500:]
    scores = json.loads(done.stdout.splitlines()[-1])
    assert scores[0] == scores[1] and 0 < scores[0] < 1


def test_who_asks_an_engine_for_its_network_gets_it():
    "The step `compress` does, to measure other engines of it"
    engine = _load_kind(ROOT / 'tests' / 'corpus' / 'engine', 'onnx')
    assert engine.source.kind == 'torch' and engine.source.net.names == ('a', 'b', 'c')
