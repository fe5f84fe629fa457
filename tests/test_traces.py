"""Traces of a real server, sent to a real collector over HTTP

The server is a process with the SDK in it; the collector takes what it sends as any would.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mlref.edges import child_environment
from mlref.serving_state import read_messages
from programs import need_package
from server_fixture import Served, start_copy

need_package('opentelemetry.exporter')
ROOT = Path(__file__).parent.parent
TRACE, PARENT = '0af7651916cd43dd8448eb211c80319c', 'b7ad6b7169203331'


class Collector(ThreadingHTTPServer):
    "Keeps the spans that it is sent"

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Taker)
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f'http://127.0.0.1:{self.server_port}'

    def spans(self, trace: str = ''):
        "All of a trace, or all, in order of their beginning"
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        read = trace_service_pb2.ExportTraceServiceRequest.FromString
        parts = [
            part
            for body in self.bodies
            for each in read(body).resource_spans
            for part in each.scope_spans
        ]
        found = [span for part in parts for span in part.spans]
        mine = [span for span in found if trace in ('', span.trace_id.hex())]
        return sorted(mine, key=lambda span: (span.start_time_unix_nano, -span.end_time_unix_nano))

    def wait(self, trace: str, n: int):
        "The spans of a trace, when there are as many as expected"
        until = time.monotonic() + 30
        while len(self.spans(trace)) < n and time.monotonic() < until:
            time.sleep(0.1)
        return self.spans(trace)


class Taker(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers['content-length']))
        self.server.paths.add(self.path)
        self.server.bodies.append(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *said):
        pass


@pytest.fixture(scope='module')
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.shutdown()
    found.server_close()


@contextmanager
def environment(**names: str) -> Iterator[None]:
    "Variables that processes begun inside find"
    before = dict(os.environ)
    os.environ.update(OTEL_BSP_SCHEDULE_DELAY='200', **names)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    "Of the server"
    return tmp_path_factory.mktemp('traced') / 'served'


@pytest.fixture(scope='module')
def traced(served, collector, folder) -> Iterator[Served]:
    "A server that samples what its callers sample, and no other request"
    sampler = {'OTEL_TRACES_SAMPLER': 'parentbased_traceidratio', 'OTEL_TRACES_SAMPLER_ARG': '0'}
    with ExitStack() as stack:
        with environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.address, **sampler):
            server, _ = stack.enter_context(start_copy(served, folder))
        yield server


def header(trace: str, flag: str = '01') -> str:
    return f'00-{trace}-{PARENT}-{flag}'


def check_tree(spans, names, told):
    "One trace: a root that the answer names, and its stages in order inside it"
    root, *stages = spans
    assert [span.name for span in spans] == names
    assert told['traceparent'] == f'00-{root.trace_id.hex()}-{root.span_id.hex()}-01'
    assert {span.parent_span_id for span in stages} == {root.span_id}
    for before, after in pairwise(stages):
        assert before.end_time_unix_nano <= after.start_time_unix_nano
    assert root.start_time_unix_nano <= stages[0].start_time_unix_nano
    assert stages[-1].end_time_unix_nano <= root.end_time_unix_nano
    assert abs(root.start_time_unix_nano / 1e9 - time.time()) < 60
    return root


@pytest.mark.parametrize('visits', [1, 3, 12], ids=['one', 'three', 'more than a group takes'])
def test_a_request_by_keys_is_one_trace_with_its_stages(traced, collector, folder, visits):
    trace = f'{visits:032x}'
    numbers = range(399, 399 - visits, -1)
    entities = [traced.visit(number) for number in numbers]
    status, said, told = traced.call(
        'POST', '/predict', {'entities': entities}, traceparent=header(trace), x_request_id='mine'
    )
    assert status == 200
    names = ['POST /predict', 'features', 'model', 'commit']
    spans = collector.wait(trace, 4)
    root = check_tree(spans, names, told)
    assert root.parent_span_id.hex() == PARENT and root.kind == 2  # of a server
    about = {each.key: each.value for each in root.attributes}
    assert about['http.route'].string_value == '/predict'
    assert about['http.response.status_code'].int_value == 200
    assert about['mlref.rows'].int_value == visits
    assert about['mlref.model.version'].string_value == said['model_version']
    rows = [row for row in read_messages(folder, 'predictions') if row['trace'] == trace]
    assert len(rows) == visits  # what was written down leads to the trace
    assert collector.paths == {'/v1/traces'}


def test_no_attribute_has_a_key_an_id_or_a_path_of_what_was_asked(traced, collector):
    trace = 'f' * 31 + '1'
    body = {'entities': [traced.visit(399)]}
    asked = {'traceparent': header(trace), 'x_request_id': 'request-of-mine'}
    assert traced.call('POST', '/predict', body, **asked)[0] == 200
    wrong = {'entities': [traced.visit(398, shop='')]}
    traced.call('POST', '/predict?shop=s0', wrong, **asked)
    collector.wait(trace, 4)
    said = b''.join(span.SerializeToString() for span in collector.spans(trace))
    visit = body['entities'][0]
    for secret in (visit['visit'], 'request-of-mine', 'shop', 'visit='):
        assert secret.encode() not in said, secret
    allowed = {'http.request.method', 'http.route', 'http.response.status_code'}
    allowed |= {'mlref.task', 'mlref.rows', 'mlref.model.version'}
    keys = {each.key for span in collector.spans(trace) for each in span.attributes}
    assert keys <= allowed


def test_vectors_are_not_read_so_they_have_two_stages(traced, collector):
    trace = 'e' * 32
    X = np.array([[3, 2], [5, 1]], np.float32)
    asked = {'traceparent': header(trace)}
    status, _, told = traced.call('POST', traced.infer, traced.tensor(X), **asked)
    assert status == 200
    names = ['POST /v2/models/{model}/infer', 'model', 'commit']
    check_tree(collector.wait(trace, 3), names, told)


def test_who_did_not_sample_and_who_says_nothing_at_a_ratio_of_0_has_no_span(traced, collector):
    visit = {'entities': [traced.visit(397)]}
    told = traced.call('POST', '/predict', visit, traceparent=header('d' * 32, '00'))[2]
    assert told['traceparent'].startswith(f'00-{"d" * 32}-') and told['traceparent'].endswith('00')
    assert 'traceparent' not in traced.call('POST', '/predict', visit)[2]
    traced.call('GET', '/metrics', traceparent=header('c' * 32))  # is not counted either
    traced.call('POST', '/predict', visit, traceparent=header('b' * 32))
    assert len(collector.wait('b' * 32, 4)) == 4
    assert collector.spans('d' * 32) == collector.spans('c' * 32) == []


def test_a_request_that_is_refused_is_a_span_without_stages(traced, collector):
    trace = 'a' * 32
    status = traced.call('POST', '/predict', b'{', traceparent=header(trace))[0]
    assert status == 400
    (root,) = collector.wait(trace, 1)
    about = {each.key: each.value for each in root.attributes}
    assert about['http.response.status_code'].int_value == 400 and root.status.code == 0


def test_requests_of_a_group_are_each_in_their_own_trace(traced, collector):
    from concurrent.futures import ThreadPoolExecutor

    traces = [f'{number:031x}9' for number in range(1, 41)]

    def ask(trace):
        visit = {'entities': [traced.visit(399 - int(trace[-3:-1], 16) % 9)]}
        return traced.call('POST', '/predict', visit, traceparent=header(trace))

    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(ask, traces)]
    for trace, (status, _, told) in zip(traces, answers, strict=True):
        assert status == 200
        check_tree(collector.wait(trace, 4), ['POST /predict', 'features', 'model', 'commit'], told)


def test_a_ratio_of_1_begins_a_trace_and_tells_it(served, collector, tmp_path):
    with (
        environment(OTEL_EXPORTER_OTLP_ENDPOINT=collector.address, OTEL_SERVICE_NAME='scores'),
        start_copy(served, tmp_path / 'served') as (server, process),
    ):
        told = server.call('POST', '/predict', {'entities': [server.visit(396)]})[2]
        process.terminate()  # what waits is sent before it ends
        assert process.wait(30) == 0
    _, trace, _, flag = told['traceparent'].split('-')
    spans = collector.spans(trace)
    assert flag == '01' and len(spans) == 4 and spans[0].parent_span_id == b''


def test_a_collector_that_is_away_takes_nothing_from_a_request(served, tmp_path):
    with (
        environment(OTEL_EXPORTER_OTLP_ENDPOINT='http://127.0.0.1:9'),
        start_copy(served, tmp_path / 'served') as (server, process),
    ):
        visit = {'entities': [server.visit(395)]}
        answers = [server.call('POST', '/predict', visit)[0] for _ in range(50)]
        assert answers == [200] * 50
        begun = time.monotonic()
        process.terminate()
        # what waits has two seconds; a supervisor kills after fifteen
        assert process.wait(60) == 0 and time.monotonic() - begun < 12


WITHOUT = """
import sys


class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.startswith('opentelemetry.exporter'):
            raise ModuleNotFoundError(f'No module named {name!r}', name='opentelemetry.exporter')


sys.meta_path.insert(0, Missing())
from mlref.core import MlrefError
from mlref.traces import open_traces

try:
    open_traces()
except MlrefError as error:
    print(error)
"""


def test_who_wants_traces_without_the_extra_is_told_what_to_install():
    environ = {**child_environment(), 'OTEL_EXPORTER_OTLP_ENDPOINT': 'http://127.0.0.1:9'}
    done = subprocess.run(
        [sys.executable, '-c', WITHOUT], capture_output=True, text=True, env=environ, cwd=ROOT
    )
    assert "pip install 'mlref[trace]'" in done.stdout, done.stderr
