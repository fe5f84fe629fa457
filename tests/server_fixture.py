"""One real server of two workers for a whole run of tests: the fixture `served`

It serves the visits of `small.py` with a model of four numbers in ONNX, so that its workers are
those of an exported engine. Tests in other processes of the same run share it; the last one stops
it, and it stops by itself when the run is gone.
"""

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection
from pathlib import Path
from socket import create_connection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
VERSIONS = ((0.3, 0.002), (-0.4, 0.001))  # weights of two models
NAMES = ('week_count_10080m', 'week_price_mean_10080m')
TRAINED_ON = np.array([[0, 0], [50, 6], [7, np.nan]], np.float32)  # smaller weeks than are asked


def build_graph(name: str, nodes: list[Any], values: dict[str, Any]) -> Any:
    "A graph from rows of two numbers to a logit each; `values` are its constants"
    from onnx import TensorProto, helper, numpy_helper

    X = helper.make_tensor_value_info('X', TensorProto.FLOAT, ['n', 2])
    y = helper.make_tensor_value_info('y', TensorProto.FLOAT, ['n'])
    constants = [numpy_helper.from_array(np.array(value), key) for key, value in values.items()]
    return helper.make_graph(nodes, name, [X], [y], constants)


def encode_graph(graph: Any) -> bytes:
    "A graph as an ONNX file"
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)])
    model.ir_version = 9
    return model.SerializeToString()


def linear_nodes(out: str) -> list[Any]:
    "A linear model in which a missing value counts as 0"
    from onnx import helper

    return [
        helper.make_node('IsNaN', ['X'], ['missing']),
        helper.make_node('Where', ['missing', 'zero', 'X'], ['filled']),
        helper.make_node('MatMul', ['filled', 'w'], ['column']),
        helper.make_node('Squeeze', ['column', 'axis'], [out]),
    ]


def linear_values(weights: tuple[float, float]) -> dict[str, Any]:
    "Constants of a linear model"
    w = np.array(weights, np.float32)[:, None]
    return {'w': w, 'zero': np.zeros(1, np.float32), 'axis': np.array([1])}


def onnx_model(weights: tuple[float, float]) -> bytes:
    "Logits of a linear model"
    return encode_graph(build_graph('linear', linear_nodes('y'), linear_values(weights)))


_WEEK = {'w': np.array([[-1], [0]], np.float32), 'axis': np.array([1])}  # minus visits of a week


def nan_model() -> Any:
    "It scores made-up rows, and gives no number for a shop with more than eight visits a week"
    from onnx import helper

    nodes = [
        helper.make_node('MatMul', ['X', 'w'], ['column']),
        helper.make_node('Add', ['column', 'room'], ['left']),
        helper.make_node('Sqrt', ['left'], ['root']),
        helper.make_node('Squeeze', ['root', 'axis'], ['y']),
    ]
    values = {**_WEEK, 'room': np.array([8], np.float32)}
    return wrap_model(encode_graph(build_graph('nan', nodes, values)))


def raising_model() -> Any:
    "It scores made-up rows, and raises at a shop with more than eight visits a week"
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node('MatMul', ['X', 'w'], ['column']),
        helper.make_node('Less', ['column', 'least'], ['over']),
        helper.make_node('Cast', ['over'], ['place'], to=TensorProto.INT64),
        helper.make_node('Gather', ['table', 'place'], ['found']),  # that has one place
        helper.make_node('Squeeze', ['found', 'axis'], ['y']),
    ]
    values = {**_WEEK, 'least': np.array([-8], np.float32), 'table': np.ones(1, np.float32)}
    return wrap_model(encode_graph(build_graph('raising', nodes, values)))


def _looping_model(name: str, turns: list[Any], values: dict[str, Any]) -> Any:
    "It says what the champion says, after some turns of a loop: as many as `turns` gives"
    from onnx import TensorProto, helper

    inner = [
        helper.make_tensor_value_info('turn', TensorProto.INT64, []),
        helper.make_tensor_value_info('go', TensorProto.BOOL, []),
        helper.make_tensor_value_info('before', TensorProto.FLOAT, ['n']),
    ]
    outer = [
        helper.make_tensor_value_info('go_on', TensorProto.BOOL, []),
        helper.make_tensor_value_info('after', TensorProto.FLOAT, ['n']),
    ]
    again = [
        helper.make_node('Identity', ['go'], ['go_on']),
        helper.make_node('Mul', ['before', 'one'], ['after']),
    ]
    body = helper.make_graph(again, 'turn', inner, outer)
    loop = helper.make_node('Loop', ['turns', 'begin', 'logits'], ['y'], body=body)
    nodes = [*linear_nodes('logits'), *turns, loop]
    values |= {'begin': np.array(True), 'one': np.array(1, np.float32)}
    values |= linear_values(VERSIONS[0])
    return wrap_model(encode_graph(build_graph(name, nodes, values)))


def slow_model(
    turns: int = 60_000,  # About 50 ms
) -> Any:
    "It says what the champion says, much later"
    return _looping_model('slow', [], {'turns': np.array(turns)})


def endless_model() -> Any:
    "It says what the champion says, and never comes back from a row with a value above 1,000"
    from onnx import helper

    nodes = [
        helper.make_node('ReduceMax', ['filled'], ['most'], keepdims=0),
        helper.make_node('Greater', ['most', 'enough'], ['over']),
        helper.make_node('Where', ['over', 'for_ever', 'none'], ['turns']),
    ]
    values = {
        'enough': np.array(1000, np.float32),
        'for_ever': np.array(2**60),
        'none': np.array(0),
    }
    return _looping_model('endless', nodes, values)


def wrap_model(data: bytes) -> Any:
    "An engine as a predictor that can be registered"
    from mlref.compress import OnnxPredictor
    from mlref.core import digest
    from mlref.recipes import fit_recipe
    from small import FEATURES, make_table

    table = replace(make_table(), names=FEATURES.names)
    source = fit_recipe('logistic', table, table)
    return OnnxPredictor(data, source, 'onnx', digest(data)[:12])


def make_home(home: Path, address: str = 'small:TASK') -> list[str]:
    "A run of the visits; its versions, the champion first"
    from mlref.core import DAY
    from mlref.gates import Gate
    from mlref.lmdb_store import LmdbStore
    from mlref.materialize import apply_events
    from mlref.promotion import promote
    from mlref.publisher import ServeOptions, publish_champion
    from mlref.registry import Registry, TrainingRun, register_model
    from mlref.task import load_task
    from mlref.tracking_store import local_uri
    from small import FEATURES, make_events

    task = load_task(address)
    events = make_events()
    store = LmdbStore(home / 'online', FEATURES)
    apply_events(store, events)
    store.close()
    registry = Registry(home / 'registry', local_uri(home / 'registry'), name=task.name)
    options = ServeOptions(address, str(home), str(home / 'served'))
    gates = [Gate('better_than_champion', True, 0.01, -0.003, '')]
    models = [wrap_model(onnx_model(weights)) for weights in VERSIONS]
    for model in reversed(models):
        run = TrainingRun(model.version)
        version = register_model(registry, model, run, FEATURES, gates, TRAINED_ON)
        promote(registry, version, 8 * DAY, 'made for tests')
        publish_champion(options)
    return [model.version for model in models]


@dataclass(frozen=True)
class Served:
    "A running server, and what its answers must be"

    url: str
    home: Path  # With registry/ and online/
    pid: int  # Of the supervisor
    versions: tuple[str, str]  # Of the champion, and of the one before
    names: tuple[str, ...]  # Features

    @property
    def folder(self) -> Path:
        "Of the server"
        return self.home / 'served'

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix('http://').partition(':')
        return host, int(port)

    @property
    def infer(self) -> str:
        "The path of the Open Inference Protocol"
        return '/v2/models/late-visits/infer'

    def call(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        "Status, content and headers of one answer"
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        named = {'content-type': 'application/json'} if method == 'POST' else {}
        named |= {name.replace('_', '-'): value for name, value in headers.items()}
        connection = HTTPConnection(*self.address, timeout=30)
        try:
            kept = {name: value for name, value in named.items() if value is not None}
            connection.request(method, path, sent, kept)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        told = {name.lower(): value for name, value in answer.getheaders()}
        is_json = told.get('content-type', '').startswith('application/json')
        return answer.status, json.loads(data) if is_json and data else data, told

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        "Status and content"
        return self.call('POST', path, body, **headers)[:2]

    def send(self, data: bytes, wait: float = 10.0) -> bytes:
        "What comes back for some bytes until the server closes"
        with create_connection(self.address, timeout=wait) as client:
            client.sendall(data)
            found = b''
            while part := client.recv(65536):
                found += part
        return found

    def tensor(self, X: np.ndarray) -> dict[str, Any]:
        "Rows as a request of the Open Inference Protocol"
        data = [None if np.isnan(value) else float(value) for value in X.ravel()]
        tensor = {'name': 'X', 'datatype': 'FP32', 'shape': list(X.shape), 'data': data}
        return {'inputs': [tensor]}

    def scores(self, X: np.ndarray, version: int = 0) -> list[float]:
        "What the champion must say of rows"
        filled = np.where(np.isnan(X), np.float32(0), X.astype(np.float32))
        logits = (filled @ np.array(VERSIONS[version], np.float32)).astype(np.float64)
        return (1 / (1 + np.exp(-logits))).tolist()

    def visit(self, number: int = 399, **change: Any) -> dict[str, Any]:
        "An entity as it is asked about by its keys"
        at = number * 8 * 1440 // 400
        return {'visit': f'v{number}', 'shop': f's{number % 3}', 'event_time': at, **change}

    def counted(self, **labels: str) -> float:
        "Answers that were counted with these labels, by all workers"
        wanted = [f'{name}="{value}"' for name, value in labels.items()]
        page = self.call('GET', '/metrics')[1].decode()
        lines = [line for line in page.splitlines() if line.startswith('mlref_requests_total{')]
        found = [line for line in lines if all(each in line for each in wanted)]
        return sum(float(line.rsplit(' ', 1)[1]) for line in found)

    def rows(self, topic: str = 'predictions') -> list[dict[str, Any]]:
        "What the workers wrote down so far"
        from mlref.serving_state import read_messages

        return read_messages(self.folder, topic)


def deliver_body(log: Any, schema: Any, body: bytes) -> dict[str, Any]:
    "What a server with this log answers to a body of events; raises as its handler does"
    from mlref.event_route import post_events
    from mlref.group_commit import GroupCommit
    from mlref.messages import MessageReader

    columns = {name: str(kind) for name, kind in schema.columns.items()}
    task = SimpleNamespace(messages=MessageReader(columns, schema.limits))

    async def post() -> bytes:
        server = SimpleNamespace(task=task, events=GroupCommit(log), event_file=log)
        answer = await post_events(server, SimpleNamespace(body=body))
        return answer.body

    return json.loads(asyncio.run(post()))


CHILD = """
import os, sys, threading, time
from mlref.publisher import decode_options
from mlref.workers import supervise

def end_with_run(supervisor, version):
    def watch():
        while os.path.exists(f'/proc/{sys.argv[2]}'):
            time.sleep(0.5)
        supervisor.stop()

    threading.Thread(target=watch, daemon=True).start()

supervise(decode_options(sys.argv[1]), end_with_run)
"""


def start_process(
    options: Any,
    *run: str,
    says: Any = None,  # Where its errors go
) -> tuple[subprocess.Popen, str]:
    "A server in a process of its own, and where it answers"
    from mlref.edges import child_environment
    from mlref.publisher import encode_options

    process = subprocess.Popen(
        [sys.executable, '-c', CHILD, encode_options(options), *(run or (str(os.getpid()),))],
        stdout=subprocess.PIPE,
        stderr=says,
        text=True,
        env=child_environment(threads=1),
    )
    line = process.stdout.readline()
    assert ' at http://' in line, line
    return process, line.split(' at ')[1].split()[0]


@contextmanager
def start_copy(
    served: Served,
    folder: Path,  # Of the other server
    home: Path | None = None,  # Its run; None = the same
    says: Any = None,  # Where its errors go
    **more: Any,  # Options of the server
) -> Iterator[tuple[Served, subprocess.Popen]]:
    "Another server of the same versions, which may be stopped and spoilt"
    from mlref.publisher import ServeOptions

    home = served.home if home is None else home
    shutil.copytree(served.folder / 'bundles', folder / 'bundles')
    shutil.copy(served.folder / 'state.json', folder)
    options = ServeOptions('small:TASK', str(home), str(folder), port=0, **more)
    process, url = start_process(options, says=says)
    try:
        yield replace(served, url=url, pid=process.pid, home=home), process
    finally:
        if process.poll() is None:
            process.terminate()
            wait_gone(process.pid)


@contextmanager
def alone(file: Path) -> Iterator[None]:
    "No other process of the run meanwhile"
    with open(file, 'w') as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def start_shared(root: Path) -> dict[str, Any]:
    "The server of this run"
    from mlref.publisher import ServeOptions

    home = root / 'served-home'
    versions = make_home(home)
    # of a controller with workers the parent lives as long as the run
    run = os.getppid() if 'PYTEST_XDIST_WORKER' in os.environ else os.getpid()
    options = ServeOptions('small:TASK', str(home), str(home / 'served'), port=0, workers=2)
    process, url = start_process(options, str(run))
    return {'url': url, 'home': str(home), 'pid': process.pid, 'versions': versions}


@pytest.fixture(scope='session')
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    "The server that all tests of a run ask"
    base = tmp_path_factory.getbasetemp()
    root = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
    note = root / 'served.json'
    with alone(root / 'served.lock'):
        about = json.loads(note.read_text()) if note.exists() else start_shared(root)
        about['users'] = about.get('users', 0) + 1
        note.write_text(json.dumps(about))
    from small import FEATURES

    yield Served(
        about['url'], Path(about['home']), about['pid'], tuple(about['versions']), FEATURES.names
    )
    with alone(root / 'served.lock'):
        about = json.loads(note.read_text())
        about['users'] -= 1
        note.write_text(json.dumps(about))
        if not about['users']:
            os.kill(about['pid'], 15)
            note.unlink()
            wait_gone(about['pid'])


def is_running(pid: int) -> bool:
    "Whether a process does anything still: one that has ended may wait for its parent to look"
    try:
        about = Path(f'/proc/{pid}/stat').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return about.rpartition(')')[2].split()[0] not in 'ZX'


def wait_gone(pid: int, seconds: float = 20.0) -> None:
    "Wait until a process has ended"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            done, _ = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # another process of the run started it
            done = 0 if is_running(pid) else pid
        if done:
            return
        time.sleep(0.02)
    raise AssertionError(f'expected process {pid} to end within {seconds} s')
