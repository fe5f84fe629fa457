"""What strangers, slow clients, operators and accidents do to a running server

Every case was found by trying; each is an input against a real server of two workers.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial

import numpy as np
import pytest

from mlref.access import make_key, write_keys
from mlref.bundle import write_bundle
from mlref.core import MlrefError
from mlref.edges import child_environment
from mlref.log import LocalLog
from mlref.publisher import ServeOptions
from mlref.serving_state import (
    prediction_log,
    publish_state,
    read_notes,
    read_state,
    set_workers,
    with_champion,
)
from server_fixture import endless_model, start_copy

ONE = np.array([[3, 2.5]], np.float32)
DEEP = b'{"inputs":' + b'[' * 1500 + b']' * 1500 + b'}'
LONG = b'{"inputs":[{"name":"X","datatype":"FP32","shape":[1,2],"data":[1,' + b'9' * 400 + b']}]}'
HALF = b'{"entities":[{"visit":"\\ud800","shop":"s1","event_time":11000}]}'


def tensor(data, shape=(1, 2), **more):
    "A request with a tensor that need not be right"
    return {'inputs': [{'name': 'X', 'datatype': 'FP32', 'shape': shape, 'data': data, **more}]}


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


NONSENSE = {
    'nesting of 1,500': ('infer', DEEP, 400),
    'a number of 400 digits': ('infer', LONG, 400),
    'half a surrogate in an id': ('/predict', HALF, 400),
    'a fraction in the shape': ('infer', tensor([1, 2], [1, 2.0]), 400),
    'a row and a number': ('infer', tensor([[1, 2], 5], [2, 2]), 400),
    'a row and null': ('infer', tensor([[1, 2], None], [2, 2]), 400),
    'text as a value': ('infer', tensor(['', 2]), 400),
    'a list as a value': ('infer', tensor([[], 2]), 400),
    'an object as a value': ('infer', tensor([{}, 2]), 400),
    'false as a value': ('infer', tensor([False, 2]), 400),
    'no data at all': ('infer', {'inputs': ''}, 400),
    'an output that there is not': ('infer', {**tensor([1, 2]), 'outputs': [{'name': 'q'}]}, 400),
    'another name of the input': ('infer', tensor([1, 2], name='Z'), 400),
    'ragged rows': ('infer', tensor([[1], [2, 3, 4]], [2, 2]), 400),
    'too many rows': ('infer', tensor([0.5] * 2002, [1001, 2]), 413),
    'NaN': ('infer', b'{"inputs": [NaN]}', 400),
    'no JSON': ('/predict', b'{"entities": [', 400),
    'nobody': ('/predict', {'entities': []}, 400),
    'false as an entity': ('/predict', {'entities': [False]}, 400),
    'a shop that is no text': ('/predict', {'entities': [{'visit': 'v', 'shop': 7}]}, 400),
    'the year 2099': (
        '/predict',
        {'entities': [{'visit': 'v', 'shop': 's1', 'event_time': 68_000_000}]},
        422,
    ),
    'before 1970': (
        '/predict',
        {'entities': [{'visit': 'v', 'shop': 's1', 'event_time': -5}]},
        400,
    ),
    'a column twice': (
        '/invocations',
        {'dataframe_split': {'columns': ['a', 'a'], 'data': [[1, 2]]}},
        400,
    ),
    'no event': ('/events', b'[{"visit": 1}]', 422),
    'a list that does not end': ('/events', b'[{"visit": "v1"}', 400),
    'another model': ('/v2/models/early/infer', tensor([1, 2]), 404),
    'another version': ('/v2/models/late-visits/versions/x/infer', tensor([1, 2]), 404),
}


@pytest.mark.parametrize('name', NONSENSE)
def test_nonsense_costs_its_sender_a_sentence_and_is_counted(served, name):
    path, body, status = NONSENSE[name]
    path = served.infer if path == 'infer' else path
    before = served.counted()
    got, said = served.post(path, body)
    assert got in {400: (400, 422)}.get(status, (status,)), said
    assert said['error'].count('\n') == 0 and len(said['error']) < 400
    assert served.counted() == before + 1
    assert served.counted(status='500') == 0
    assert served.post(served.infer, served.tensor(ONE))[0] == 200


def test_what_was_refused_was_not_written_down(served):
    before = len(served.rows())
    odd = [served.visit(), {'visit': '\ud800', 'shop': 's1', 'event_time': 11000}]
    assert served.post('/predict', json.dumps({'entities': odd}).encode())[0] in (400, 422)
    assert len(served.rows()) == before


def test_an_answer_by_keys_names_features_that_are_not_present(served):
    visits = [served.visit(399), served.visit(398, shop='nowhere')]
    status, plain = served.post('/predict', {'entities': visits})
    assert status == 200 and 'statuses' not in plain['predictions'][0]
    status, said = served.post('/predict', {'entities': visits, 'statuses': True})
    found = [answer.pop('statuses') for answer in said['predictions']]
    assert found == [{}, {'missing': ['week_price_10080m']}]
    assert said == plain
    for wrong in (1, 'yes', None, []):
        status, said = served.post('/predict', {'entities': visits, 'statuses': wrong})
        assert (status, 'expected statuses as true or false' in said['error']) == (400, True)


def outside(served):
    "Values out of range that all workers have counted"
    page = served.call('GET', '/metrics')[1].decode()
    found = [line for line in page.splitlines() if line.startswith('mlref_values_out_of_range_')]
    return sum(float(line.rsplit(' ', 1)[1]) for line in found)


OTHERS = 100  # values that other tests of the run may have counted meanwhile


def test_values_out_of_range_are_told_counted_and_never_refused(served):
    low_high = dict(zip(served.names, [[0.0, 50.0], [0.0, 6.0]], strict=True))
    about = served.call('GET', '/v2/models/late-visits')[1]['parameters']['ranges']
    assert json.loads(about) == low_high
    config = served.call('GET', '/v2/models/late-visits/config')[1]
    assert config['parameters'] == {'ranges': {'string_value': about}}
    inside = np.tile(np.array([[50, np.nan]], np.float32), (600, 1))
    beyond = np.tile(np.array([[51, -1]], np.float32), (600, 1))
    visits = [served.visit(number) for number in range(200, 400)]  # of 66 a week and more
    for path, body, n in (
        (served.infer, served.tensor(inside), 0),
        (served.infer, served.tensor(beyond), 1200),
        (served.infer, served.tensor(beyond), 1200),  # whose scores come from memory
        ('/predict', {'entities': visits}, 200),
    ):
        before = outside(served)
        assert served.post(path, body)[0] == 200
        assert n <= outside(served) - before < n + OTHERS


def test_a_row_says_for_which_request_and_for_whom(served):
    visits = [served.visit(398), served.visit(399)]
    trace = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01'
    status, said, told = served.call(
        'POST', '/predict', {'entities': visits}, x_request_id='mine-7', traceparent=trace
    )
    assert (status, told['x-request-id']) == (200, 'mine-7')
    assert told['traceparent'][:35] == trace[:35] != told['traceparent']
    rows = [row for row in served.rows() if row['request_id'] == 'mine-7']
    wanted = [(each['entity_id'], each['p']) for each in said['predictions']]
    assert [(row['entity_id'], row['p']) for row in rows] == wanted
    assert {row['client'] for row in rows} == {''} and {row['trace'] for row in rows} == {
        trace[3:35]
    }
    # a name that could break a line of a log is not taken over
    assert served.call('POST', '/predict', {'entities': visits}, x_request_id='a b')[2][
        'x-request-id'
    ] not in ('a b', '')


FOREIGN = [
    ({'content_type': 'text/plain'}, 415),
    ({'content_type': 'application/x-www-form-urlencoded'}, 415),
    ({'content_type': None}, 415),
    ({'host': 'evil.example'}, 421),
    ({'host': 'evil.example:80', 'origin': 'http://evil.example'}, 421),
    ({'origin': 'http://evil.example'}, 403),
    ({'origin': 'null'}, 403),
    ({'content_encoding': 'br'}, 415),
    ({'content_encoding': 'gzip'}, 400),
]


@pytest.mark.parametrize('headers, status', FOREIGN)
def test_a_web_page_cannot_write(served, headers, status):
    for path in ('/events', '/predict'):
        got, said = served.post(path, {'entities': [served.visit()]}, **headers)
        assert (got, isinstance(said['error'], str)) == (status, True)
    got, _ = served.post(
        '/v2/repository/models/late-visits/load',
        b'',
        **{name: value for name, value in headers.items() if name in ('host', 'origin')},
    )
    assert got == (status if {'host', 'origin'} & set(headers) else 200)


def test_no_answer_may_be_read_by_another_origin(served):
    told = served.call('OPTIONS', '/predict', None, origin=served.url)
    assert told[0] == 405 and not [name for name in told[2] if name.startswith('access-control')]
    assert served.call('HEAD', '/health/live')[0] == 200
    assert served.call('GET', '/predict')[0] == 405


def test_slow_clients_do_not_disturb_the_others(served):
    head = b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(served.address, timeout=5))
            for _ in range(200)
        ]
        for place, client in enumerate(slow):
            client.sendall((head + b'content-length: 900\r\n\r\n{"e', head, b'P', b'')[place % 4])
        start = time.monotonic()
        for _ in range(20):
            assert served.post(served.infer, served.tensor(ONE))[0] == 200
        assert time.monotonic() - start < 10
    left = served.counted(status='499')
    wait_for(lambda: served.counted(status='499') >= max(left, 50))


def test_a_large_request_is_refused_and_a_legal_one_keeps_nobody_waiting(served):
    visits = [served.visit(number % 400) for number in range(1000)]
    assert served.post('/predict', {'entities': visits * 2})[0] == 413
    waits = []

    def ask(_):
        start = time.monotonic()
        assert served.post(served.infer, served.tensor(ONE))[0] == 200
        waits.append(time.monotonic() - start)

    with ThreadPoolExecutor(4) as pool:
        large = pool.submit(served.post, '/predict', {'entities': visits})
        list(pool.map(ask, range(20)))
        status, said = large.result()
    assert (status, len(said['predictions'])) == (200, 1000)
    assert sorted(waits)[10] < 1


def test_a_worker_that_dies_is_replaced_and_nothing_it_counted_is_lost(served):
    for _ in range(20):
        served.post(served.infer, served.tensor(ONE))
    before = served.counted(route='/v2/models/{model}/infer', status='200')
    victim = read_notes(served.folder)[0]
    os.kill(victim.pid, signal.SIGKILL)
    answered = [served.post(served.infer, served.tensor(ONE))[0] for _ in range(20)]
    assert answered == [200] * 20
    wait_for(lambda: victim.pid not in {note.pid for note in read_notes(served.folder)}, 30)
    wait_for(lambda: len(read_notes(served.folder)) == 2, 30)
    assert served.counted(route='/v2/models/{model}/infer', status='200') == before + 20


@pytest.fixture(scope='module')
def watched(served, tmp_path_factory):
    "A server of two workers whose model may never come back"
    from small import TASK

    folder = tmp_path_factory.mktemp('watched') / 'server'
    said = folder.with_suffix('.txt')
    options = {'workers': 2, 'worker_timeout': 3.0}
    with (
        open(said, 'w') as opened,
        start_copy(served, folder, says=opened, **options) as (running, process),
    ):
        digest = write_bundle(TASK, endless_model(), folder / 'bundles').name
        epoch = publish_state(folder, lambda now: with_champion(now, digest)).epoch
        wait_for(lambda: [each.epoch for each in read_notes(folder)] == [epoch] * 2)
        yield running, process, folder, said


@contextmanager
def one_is_stopped(server, folder):
    os.kill(read_notes(folder)[0].pid, signal.SIGSTOP)
    yield


@contextmanager
def one_is_in_a_call_without_end(server, folder):
    body = json.dumps(server.tensor(np.array([[2000, 1]], np.float32))).encode()
    head = f'POST {server.infer} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}'
    kind = 'Content-Type: application/json'
    with socket.create_connection(server.address) as client:
        client.sendall(f'{head}\r\n{kind}\r\n\r\n'.encode() + body)
        time.sleep(0.5)  # whoever it took in the same turn would wait with it
        yield


def restarts(server, reason):
    page = server.call('GET', '/metrics')[1].decode()
    name = f'mlref_worker_restarts_total{{reason="{reason}"}} '
    (line,) = [line for line in page.splitlines() if line.startswith(name)]
    return float(line.removeprefix(name))


@pytest.mark.parametrize('hang', [one_is_stopped, one_is_in_a_call_without_end])
def test_a_worker_that_hangs_is_killed_and_replaced_while_others_answer(watched, hang):
    server, _, folder, said = watched
    before = {note.pid for note in read_notes(folder)}
    counted = restarts(server, 'hung')
    lines = said.read_text().splitlines()
    with hang(server, folder):
        began = time.monotonic()
        while before <= {note.pid for note in read_notes(folder)}:
            assert server.post(server.infer, server.tensor(ONE))[0] == 200
            assert time.monotonic() < began + 30
        assert time.monotonic() > began + 1  # silence counts from its last heartbeat
    wait_for(lambda: len(read_notes(folder)) == 2, 30)
    assert len(before & {note.pid for note in read_notes(folder)}) == 1
    assert server.post(server.infer, server.tensor(ONE))[0] == 200
    assert restarts(server, 'hung') == counted + 1
    (sentence,) = said.read_text().splitlines()[len(lines) :]
    assert 'gave no heartbeat for 3' in sentence and sentence.endswith('another begins')


@pytest.mark.parametrize('whom', ['the supervisor alone', 'all of them'])
def test_workers_are_left_alone_when_their_supervisor_was_held_up_as_well(watched, whom):
    server, process, folder, _ = watched
    wait_for(lambda: len(read_notes(folder)) == 2)
    workers = [note.pid for note in read_notes(folder)]
    stopped = [process.pid, *(workers if whom == 'all of them' else [])]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(4.5)  # longer than the silence that a worker is allowed
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    time.sleep(2)
    assert [note.pid for note in read_notes(folder)] == workers
    assert server.post(server.infer, server.tensor(ONE))[0] == 200


def test_versions_change_under_load_and_back_without_a_failure(served):
    wanted = dict(
        zip(served.versions, (served.scores(ONE)[0], served.scores(ONE, 1)[0]), strict=True)
    )
    stop = threading.Event()

    def ask(_):
        seen = []
        while not stop.is_set():
            status, said = served.post(served.infer, served.tensor(ONE))
            seen.append((status, said.get('model_version'), said['outputs'][0]['data'][0]))
        return seen

    def both_at(epoch):
        return [each.epoch for each in read_notes(served.folder)] == [epoch] * 2

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, number) for number in range(3)]
        try:
            for _ in range(6):
                before = read_state(served.folder)
                other = publish_state(served.folder, lambda now: with_champion(now, now.previous))
                assert (other.champion, other.epoch) == (before.previous, before.epoch + 1)
                wait_for(partial(both_at, other.epoch))
        finally:
            stop.set()
        seen = [each for future in asking for each in future.result()]
    assert {status for status, _, _ in seen} == {200}
    assert {version for _, version, _ in seen} == set(served.versions)
    assert all(p == wanted[version] for _, version, p in seen)
    # a load asks the registry: its champion answers again, in every worker
    told = served.post('/v2/repository/models/late-visits/load', b'')
    assert told == (200, {'model_version': served.versions[0]})
    answers = [served.post(served.infer, served.tensor(ONE)) for _ in range(20)]
    assert {said['model_version'] for _, said in answers} == {served.versions[0]}


@pytest.fixture(scope='module')
def own(served, tmp_path_factory):
    "Another server over the same run, to be stopped and spoilt"
    folder = tmp_path_factory.mktemp('own')
    with start_copy(served, folder) as (running, process):
        yield running, folder, process


def test_keys_open_what_their_scopes_say_and_no_more(own):
    server, folder, _ = own
    tokens, keys = zip(
        make_key('gate', ('predict',), rows=1), make_key('ops', ('admin', 'write')), strict=True
    )
    ask = server.tensor(ONE)
    load = '/v2/repository/models/late-visits/load'
    try:
        write_keys(folder / 'keys.json', keys)
        wait_for(lambda: server.post(server.infer, ask)[0] == 401)
        headers = [{'authorization': f'Bearer {token}'} for token in tokens]
        assert server.post(server.infer, ask, **headers[0])[0] == 200
        status, said, told = server.call('POST', server.infer, ask, **headers[0])
        assert (status, 'retry-after' in told) == (429, True), said
        assert server.post(load, b'', **headers[0])[0] == 403
        assert server.post('/events', b'[]', **headers[0])[0] == 403
        assert server.post(load, b'', **headers[1])[0] == 200
        assert server.post(server.infer, ask, **headers[1])[0] == 403
        assert server.post(server.infer, ask, authorization='Bearer x')[0] == 401
        assert server.call('GET', '/health/ready')[0] == 200
        (folder / 'keys.json').write_text('nonsense')
        wait_for(lambda: server.call('GET', '/health/ready')[0] == 503)
        assert server.post(load, b'', **headers[1])[0] == 200
        assert server.post(load, b'')[0] == 401
    finally:
        (folder / 'keys.json').unlink()
    wait_for(lambda: server.post(server.infer, ask)[0] == 200)


def test_workers_come_and_go_as_wanted(own):
    server, folder, _ = own
    for n in (2, 1):
        set_workers(folder, n)
        wait_for(lambda n=n: len(read_notes(folder)) == n, 30)
        assert server.post(server.infer, server.tensor(ONE))[0] == 200


def read_answer(client):
    "The whole of one answer of scores"
    found = b''
    while not found.endswith(b'}]}'):
        part = client.recv(65536)
        if not part:
            break
        found += part
    return found


def test_what_was_sent_before_sigterm_is_answered_and_half_sent_requests_do_not_hold_it_up(own):
    server, _, process = own
    body = json.dumps(server.tensor(ONE)).encode()
    head = f'POST {server.infer} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    whole = f'{head}content-length: {len(body)}\r\n\r\n'.encode() + body
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(server.address, timeout=20))
            for _ in range(24)
        ]
        for client in clients[:16]:  # known to the server, and idle
            client.sendall(whole)
            assert read_answer(client).startswith(b'HTTP/1.1 200')
        for client in clients[16:]:
            client.sendall(whole[:-20])
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        for client in clients[:16]:
            client.sendall(whole)
        answers = [read_answer(client) for client in clients[:16]]
        assert {answer[:12] for answer in answers} == {b'HTTP/1.1 200'}
        # one that was answered before the order was noticed does not say so, and ends all the same
        said = [b'connection: close' in answer for answer in answers]
        assert any(said)
        for client, told in zip(clients, said, strict=False):
            assert told or client.recv(1) == b''
        process.wait(20)
        assert time.monotonic() - start < 12
        assert all(client.recv(65536)[:12] in (b'HTTP/1.1 408', b'') for client in clients[16:])


def test_a_worker_of_an_exported_engine_is_light(served):
    for note in read_notes(served.folder):
        with open(f'/proc/{note.pid}/maps') as maps:
            mapped = maps.read()
        packages = (
            'torch',
            '_polars_runtime',
            'pandas',
            'matplotlib',
        )  # as their folders are named
        heavy = [name for name in packages if f'/{name}' in mapped]
        assert not heavy
        with open(f'/proc/{note.pid}/status') as status:
            resident = next(line for line in status if line.startswith('VmRSS'))
        assert int(resident.split()[1]) < 120 * 1024


def cores_of(folder):
    "Where the threads of each worker may run"
    found = []
    for note in read_notes(folder):
        threads = [int(name) for name in os.listdir(f'/proc/{note.pid}/task')]
        found.append({core for thread in threads for core in os.sched_getaffinity(thread)})
    return found


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason='one core: there is no choice')
def test_a_worker_that_is_pinned_keeps_all_its_threads_on_one_core(served, tmp_path):
    for pin, at in ((None, tmp_path / 'pinned'), (False, tmp_path / 'free')):
        at.mkdir()
        with start_copy(served, at, pin=pin) as (server, _):  # one worker, and more cores
            # the thread that writes begins with the first prediction
            assert server.post(server.infer, server.tensor(ONE))[0] == 200
            if pin is None:
                wait_for(lambda at=at: [len(cores) for cores in cores_of(at)] == [1])
            else:
                time.sleep(2.5)  # seconds in which another would have been pinned
                assert cores_of(at) == [os.sched_getaffinity(0)]


def test_a_worker_that_ends_in_order_leaves_an_empty_journal(served, tmp_path):
    with start_copy(served, tmp_path) as (server, process):
        assert server.post(server.infer, server.tensor(ONE))[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    with closing(LocalLog(prediction_log(tmp_path, 0))) as log:
        assert log.end('vectors') == 1
        # refused as long as there is a journal that may hold more
        assert log.append('vectors', [b'{}']) == 1


FEW = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
from mlref.connections import HttpServer, listen
from mlref.protocols import Answer
from mlref.requests import Route
from mlref.serve import Application
app = Application([Route('/live', lambda request: Answer(b'{}'))])
listening = listen('127.0.0.1', 0)
print(listening.getsockname()[1], flush=True)
asyncio.run(HttpServer(app, count=app.count_refused).run(listening, asyncio.Event()))
"""


@contextmanager
def few_descriptors():
    "A server with 128 descriptors: its address; what it writes on stderr is in the list afterwards"
    said = []
    process = subprocess.Popen(
        [sys.executable, '-c', FEW],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=child_environment(threads=1),
    )
    try:
        yield ('127.0.0.1', int(process.stdout.readline())), said
    finally:
        process.kill()
        said.append(process.communicate()[1])


def test_silent_connections_do_not_use_up_the_descriptors():
    with few_descriptors() as (address, said), ExitStack() as stack:
        for _ in range(150):
            stack.enter_context(socket.create_connection(address, timeout=5))
        for _ in range(10):
            with socket.create_connection(address, timeout=5) as client:
                client.sendall(
                    b'GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n'
                )
                assert client.recv(65536).startswith(b'HTTP/1.1 200')
    assert len(said[0]) < 1000, said[0][:500]


def test_who_asks_much_and_leaves_fills_no_log():
    "asyncio writes a line for each answer that nobody takes, unless it is not sent"
    ask = b'GET /live HTTP/1.1\r\nhost: localhost\r\n\r\n'
    with few_descriptors() as (address, said):
        for _ in range(20):
            with socket.create_connection(address, timeout=5) as client:
                client.sendall(ask * 3000)
                client.recv(100)
        with socket.create_connection(address, timeout=5) as client:
            client.sendall(ask)
            assert client.recv(65536).startswith(b'HTTP/1.1 200')
    assert said == ['']


def test_a_server_that_others_can_reach_wants_keys(tmp_path):
    options = ServeOptions('small:TASK', str(tmp_path), str(tmp_path), host='0.0.0.0', port=0)
    from mlref.workers import Supervisor

    with pytest.raises(MlrefError, match='mlref keys add'):
        Supervisor(options)


CROWDED = """
import asyncio, select, signal, sys, time
from collections import deque
from mlref.connections import HttpServer, listen
from mlref.protocols import Answer, RequestError
from mlref.requests import Route
from mlref.serve import Application

WORK = 0.002  # seconds of a request
waiting = deque()

def ask(request):
    if request.waited > 0.5:
        raise RequestError(503, 'expected to answer by now; ask again later', 1)
    waiting.append((request, asyncio.get_running_loop().create_future()))
    return waiting[-1][1]

async def work():
    while True:
        await asyncio.sleep(0)
        if waiting:
            request, told = waiting.popleft()
            time.sleep(WORK)
            told.set_result(Answer(b'{"age": %f}' % (time.monotonic() - float(request.body))))

def metrics(request):
    return Answer(app.metrics.text())

async def main():
    working = asyncio.create_task(work())
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await HttpServer(app, count=app.count_refused).run(listening, stop)

app = Application([
    Route('/ask', ask, 'POST', scope='predict', model='m', label='/ask'),
    Route('/live', lambda request: Answer(b'{}')),
    Route('/metrics', metrics),
])
app.room = lambda: 32 - len(waiting)
app.patience = 0.25
if 'no turns' in sys.argv:
    select.__dict__.pop('epoll')  # as outside Linux
listening = listen('127.0.0.1', 0)
print(listening.getsockname()[1], flush=True)
if 'uvloop' in sys.argv:
    import uvloop
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
asyncio.run(main())
"""


TURNS = ['asyncio', 'uvloop']


@pytest.fixture
def crowded(request):
    "Where a server listens that needs two milliseconds for a request, and its process"
    words = request.param.split(', ')
    if 'uvloop' in words:
        pytest.importorskip('uvloop')
    process = subprocess.Popen(
        [sys.executable, '-c', CROWDED, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(threads=1),
    )
    yield ('127.0.0.1', int(process.stdout.readline())), process
    process.kill()
    process.communicate()


def read_reply(client):
    "Status, headers and body of one answer"
    found = b''
    while b'\r\n\r\n' not in found:
        part = client.recv(65536)
        assert part, found
        found += part
    head, _, body = found.partition(b'\r\n\r\n')
    status, *lines = head.decode().split('\r\n')
    headers = dict(line.lower().split(': ', 1) for line in lines)
    while len(body) < int(headers['content-length']):
        body += client.recv(65536)
    return int(status.split()[1]), headers, body


def get(address, path):
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(f'GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n'.encode())
        return read_reply(client)


def ask_age(client):
    "A request that says when it was sent"
    body = repr(time.monotonic()).encode()
    head = b'POST /ask HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    client.sendall(head + b'content-length: %d\r\n\r\n' % len(body) + body)


@pytest.mark.parametrize('crowded', TURNS, indirect=True)
def test_a_crowd_is_answered_in_time_or_turned_down_and_health_is_told_meanwhile(crowded):
    """1,500 requests at once, three seconds of work; the first read first would be seconds late"""
    address, _ = crowded
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(1500)
        ]
        for client in clients:
            ask_age(client)
        asked = []
        for _ in range(5):
            begun = time.monotonic()
            assert get(address, '/live')[0] == 200
            asked.append(time.monotonic() - begun)
        answers = [read_reply(client) for client in clients]
        ask_age(clients[0])  # whoever was turned down may ask again
        assert read_reply(clients[0])[0] == 200
    ages = [json.loads(body)['age'] for status, _, body in answers if status == 200]
    refused = [(headers, body) for status, headers, body in answers if status == 503]
    assert len(ages) + len(refused) == 1500
    assert len(ages) > 10 and max(ages) < 1.2 and max(asked) < 1.0  # how many: of the machine
    for headers, body in refused:
        assert headers['retry-after'] == '1' and 'ask again later' in json.loads(body)['error']
    page = get(address, '/metrics')[2].decode()
    counted = [line for line in page.splitlines() if 'requests_total' in line and '/ask' in line]
    found = {line.split('status="')[1][:3]: float(line.split()[-1]) for line in counted}
    assert found == {'200': len(ages) + 1, '503': len(refused)}


@pytest.mark.parametrize('crowded', [*TURNS, 'uvloop, no turns'], indirect=True)
def test_a_crowd_that_has_asked_before_sigterm_is_answered(crowded):
    """Also those whose requests are not read yet: none of them sees a reset"""
    address, process = crowded
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(300)
        ]
        for client in clients:  # each is taken by the server
            ask_age(client)
            assert read_reply(client)[0] == 200
        for client in clients:
            ask_age(client)
        process.send_signal(signal.SIGTERM)
        answers = [read_reply(client) for client in clients]
    assert {status for status, _, _ in answers} <= {200, 503}
    assert sum(headers.get('connection') == 'close' for _, headers, _ in answers) > 100
    assert process.wait(10) == 0
