"""Whatever raises on the way of a request, its client and those beside it get an answer

Each case makes a function of the server raise that is called behind the point where the request was
taken, most of them in callbacks of the event loop, from which an exception comes back to nobody.
"""

import asyncio
import json
import socket
import threading

import pytest

from mlref import batching, entity_answers, model_server, vector_answers
from mlref.bundle import make_bundle
from mlref.connections import listen
from mlref.feature_ranges import measure_ranges
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.protocols import Answer
from mlref.route import Assignment
from mlref.routes import make_app, open_server
from mlref.serve import run_app
from server_fixture import TRAINED_ON, VERSIONS, onnx_model, wrap_model
from small import FEATURES, TASK, make_events

INFER = '/v2/models/late-visits/infer'
CLIENTS = 12


class Running:
    "A server of one version, over a socket, in a thread of this process"

    def __init__(self, folder):
        store = LmdbStore(folder / 'online', FEATURES)
        apply_events(store, make_events())
        ranges = measure_ranges(TRAINED_ON)
        bundle = make_bundle(TASK, wrap_model(onnx_model(VERSIONS[0])), ranges)
        self.server = open_server(bundle, store, LocalLog(folder / 'served'))
        self.socket = listen('127.0.0.1', 0)
        self.started = threading.Event()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        assert self.started.wait(20)

    def run(self):
        app = make_app(self.server)
        asyncio.run(run_app(app, self.socket, started=self.hear))

    def hear(self, stopper):
        self.stopper = stopper
        self.started.set()

    def ask(self, path, bodies):
        "Status and content of each, asked at once"
        lines = [socket.create_connection(self.socket.getsockname(), 5) for _ in bodies]
        for line, body in zip(lines, bodies, strict=True):
            text = json.dumps(body).encode()
            head = f'POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n'
            head += f'content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n'
            line.sendall(head.encode() + text)
        return [read_answer(line) for line in lines]

    def counted(self):
        samples = self.server.metrics.meters.samples()
        return sum(n for name, n in samples.items() if name.startswith('mlref_requests_total'))

    def stop(self):
        self.stopper.stop()
        self.thread.join(20)
        self.socket.close()


def read_answer(line):
    found = b''
    while part := line.recv(65536):
        found += part
    line.close()
    head, _, body = found.partition(b'\r\n\r\n')
    assert head, 'expected an answer, the connection was closed without one'
    return int(head.split()[1]), json.loads(body)


@pytest.fixture(scope='module')
def running(tmp_path_factory):
    made = Running(tmp_path_factory.mktemp('running'))
    yield made
    made.stop()


def visit(number):
    return {'visit': f'v{number}', 'shop': f's{number % 3}', 'event_time': number * 28}


def by_keys():
    return [{'entities': [visit(380 + i)], 'statuses': i % 2 == 0} for i in range(CLIENTS)]


def by_vectors():
    tensor = {'name': 'X', 'datatype': 'FP32', 'shape': [1, 2]}
    return [{'inputs': [{**tensor, 'data': [i, 2.5]}], 'id': f'v{i}'} for i in range(CLIENTS)]


def raising(*args, **kwargs):
    raise ZeroDivisionError('planted')


def raising_for(original, is_one):
    def call(*args):
        if is_one(*args):
            raise ZeroDivisionError('planted')
        return original(*args)

    return call


def is_v383(version, asked, *others):
    return asked.ids == ['v383']


def no_bytes(*args):
    return Answer('text')


def nothing(*args):
    return None


KEYS, VECTORS = ('/predict', by_keys), (INFER, by_vectors)
FAULTS = {  # what raises, where, the way that is asked, how many fail
    'one answer by keys cannot be encoded': (
        entity_answers,
        'encode_predictions',
        raising_for(entity_answers.encode_predictions, is_v383),
        KEYS,
        1,
    ),
    'one statuses cannot be named': (entity_answers, 'name_absent', raising, KEYS, 6),
    'a version cannot be chosen': (entity_answers, 'assign_versions', raising, KEYS, CLIENTS),
    'a group cannot be parsed': (entity_answers, 'parse_entities', raising, KEYS, 0),
    'a group cannot be cut': (entity_answers, '_read_part', raising, KEYS, CLIENTS),
    'nothing is counted by keys': (entity_answers, 'count_group', raising, KEYS, CLIENTS),
    'no row by keys': (entity_answers, 'kept_prediction_rows', raising, KEYS, CLIENTS),
    'values are not counted': (vector_answers, 'count_beyond', raising, KEYS, CLIENTS),
    'runs are not counted': (batching, 'count_run', raising, KEYS, CLIENTS),
    'it cannot be told': (entity_answers.EntityRequest, 'set_result', raising, KEYS, CLIENTS),
    'statuses are not counted': (model_server, 'count_statuses', raising, KEYS, CLIENTS),
    'runs are not counted, by vectors': (batching, 'count_run', raising, VECTORS, CLIENTS),
    'nothing is counted by vectors': (vector_answers, 'count_group', raising, VECTORS, CLIENTS),
    'no row by vectors': (vector_answers, 'encode_row', raising, VECTORS, CLIENTS),
    'an answer of text': (vector_answers, 'encode_oip', no_bytes, VECTORS, CLIENTS),
    'no answer at all': (vector_answers, 'encode_oip', nothing, VECTORS, CLIENTS),
    'a shadow of vectors cannot begin': (vector_answers, 'shadow_vectors', raising, VECTORS, 0),
}


@pytest.mark.parametrize('name', FAULTS)
def test_every_client_gets_an_answer(running, monkeypatch, capfd, name):
    place, attribute, fault, (path, bodies), failing = FAULTS[name]
    before = running.counted()
    monkeypatch.setattr(running.server.champion, 'cache', None)  # each is scored
    with monkeypatch.context() as planted:
        planted.setattr(place, attribute, fault)
        found = running.ask(path, bodies())
    refused = [said['error'] for status, said in found if status == 500]
    assert len(refused) == failing
    assert sum(status == 200 for status, _ in found) == CLIENTS - failing
    assert all('its log has the reason under' in said for said in refused)
    told = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(told) == failing and all('500 POST' in line for line in told), told
    assert running.counted() == before + CLIENTS
    assert (running.server.admission.waiting, running.server.champion.users) == (0, 0)
    assert [status for status, _ in running.ask(path, bodies())] == [200] * CLIENTS


def test_a_shadow_by_keys_that_cannot_begin_costs_no_answer(running, monkeypatch):
    class Shadowing:
        def assign(self, unit, segment, override):
            return Assignment('champion', shadow=('candidate',))

    monkeypatch.setattr(running.server, 'router', Shadowing())
    monkeypatch.setattr(entity_answers, 'start_shadows', raising)
    dropped = running.server.metrics.meters.samples().get(vector_answers.DROPPED, 0)
    assert [status for status, _ in running.ask(*[KEYS[0], by_keys()])] == [200] * CLIENTS
    assert running.server.metrics.meters.samples()[vector_answers.DROPPED] == dropped + CLIENTS
