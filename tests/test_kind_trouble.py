"""What a stopped neighbour, a full disk, a store that is gone and hurried clients do to a server

Each happens to a real server of one worker; afterwards it must be as it was, and what it accepted
must be there.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlref.edges import child_environment
from mlref.serving_state import prediction_log, read_notes
from server_fixture import Served, start_copy

DEEP = os.environ.get('MLREF_DEEP') == '1'
ONE = np.array([[3, 2.5]], np.float32)


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


@dataclass(frozen=True)
class Own:
    "A server that may be spoilt"

    server: Served
    home: Path
    folder: Path
    process: subprocess.Popen
    says: Path  # What it writes to stderr

    def post(self, path, body, **headers):
        return self.server.post(path, body, **headers)

    def predict(self, *numbers):
        entities = [self.server.visit(number) for number in numbers or (399,)]
        return self.server.post('/predict', {'entities': entities})

    def status(self, path):
        return self.server.call('GET', path)[0]

    @property
    def worker(self):
        return read_notes(self.folder)[0].pid


@contextmanager
def started(served: Served, root: Path, online: Path | None = None) -> Iterator[Own]:
    "Another server over copies of a run and of what it serves, or over another store"
    home = root / 'home'
    folder = root / 'own'
    shutil.copytree(served.home / 'registry', home / 'registry')
    shutil.copytree(online or served.home / 'online', home / 'online')
    says = root / 'stderr'
    with says.open('wb') as out, start_copy(served, folder, home, out) as (server, process):
        yield Own(server, home, folder, process, says)


@pytest.fixture(scope='module')
def own(served, tmp_path_factory):
    with started(served, tmp_path_factory.mktemp('trouble')) as own:
        yield own


def rows_of(own: Own) -> list[dict]:
    "What the server wrote down so far"
    from mlref.log import LocalLog

    log = LocalLog(prediction_log(own.folder, 0), readonly=True)
    found = log.read('predictions', 0, 10**6) if log.end('predictions') else []
    log.close()
    return [json.loads(message) for message in found]


# The log


HOLDS = """
import sys, time
from pathlib import Path
from mlref.log import LocalLog
log = LocalLog(Path(sys.argv[1]))
with log.file.env.begin(write=True):
    print('held', flush=True)
    time.sleep(600)
"""


@contextmanager
def stopped_writer(log: Path) -> Iterator[subprocess.Popen]:
    "A process that is stopped inside its transaction, with the writer's lock of a log"
    command = [sys.executable, '-c', HOLDS, str(log)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, env=child_environment())
    try:
        assert holder.stdout.readline() == b'held\n'
        os.kill(holder.pid, signal.SIGSTOP)
        yield holder
    finally:
        holder.kill()
        holder.wait()


def test_a_writer_stopped_inside_its_transaction_holds_up_nobody(own):
    def predict_until_refused():  # the journal of the log has room for some
        for _ in range(1_000):
            found = own.predict()
            if found[0] != 200:
                break
        return found

    assert own.predict()[0] == 200
    with stopped_writer(prediction_log(own.folder, 0)), ThreadPoolExecutor(2) as pool:
        refused = [pool.submit(predict_until_refused) for _ in range(2)]
        waits = []
        while not all(each.done() for each in refused):
            start = time.monotonic()
            assert own.status('/health/live') == 200
            waits.append(time.monotonic() - start)
            time.sleep(0.02)
        for each in refused:
            status, said = each.result()
            assert status == 503 and 'disk or another writer holds it up' in said['error'], said
        assert len(waits) > 5 and statistics.median(waits) < 0.5
        status, said, _ = own.server.call('GET', '/health/ready')
        assert status == 503 and 'within 2 s' in said['error'], said
    wait_for(lambda: own.status('/health/ready') == 200)
    assert own.predict()[0] == 200


def test_a_full_disk_is_a_503_and_nothing_accepted_is_lost(own):
    accepted = []

    def ask(number, many):
        status, said = own.predict(*range(number, number + many))
        if status == 200:
            accepted.extend(each['entity_id'] for each in said['predictions'])
        return status, said

    before = len(rows_of(own))
    file = prediction_log(own.folder, 0) / 'data.mdb'
    soft = file.stat().st_size + 64 * 1024
    limits = resource.prlimit(own.worker, resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
    try:
        answers = []
        for many in (50, 1):  # what is refused first is large; a readiness check is small
            answers.append(ask(1, many))
            while answers[-1][0] == 200:
                assert len(answers) < 300
                answers.append(ask(len(answers), many))
        status, said = answers[-1]
        assert status == 503 and 'expected room on the disk' in said['error'], said
        status, said, _ = own.server.call('GET', '/health/ready')
        assert status == 503 and 'room on the disk' in said['error'], said
        assert own.status('/health/live') == 200
    finally:
        resource.prlimit(own.worker, resource.RLIMIT_FSIZE, limits)
    wait_for(lambda: own.status('/health/ready') == 200)
    assert ask(0, 1)[0] == 200
    kept = [row['entity_id'] for row in rows_of(own)[before:]]
    assert len(answers) > 2 and kept == accepted


# The store


def test_a_store_that_is_gone_is_told_until_it_is_back(own):
    place = own.home / 'online'
    away = own.home / 'elsewhere'
    place.rename(away)
    try:
        wait_for(lambda: own.status('/health/ready') == 503)
        status, said = own.predict()
        assert status == 503 and 'online store' in said['error'], said
        assert own.status('/health/live') == 200
    finally:
        away.rename(place)
    wait_for(lambda: own.status('/health/ready') == 200)
    assert own.predict()[0] == 200


def test_a_store_that_was_replaced_is_not_answered_from(own):
    place = own.home / 'online'
    before = own.predict()
    shutil.copytree(place, own.home / 'copy')
    place.rename(own.home / 'first')
    (own.home / 'copy').rename(place)
    try:
        wait_for(lambda: own.status('/health/ready') == 503)
        status, said = own.predict()
        assert status == 503 and 'online store' in said['error'], said
    finally:
        shutil.rmtree(place)
        (own.home / 'first').rename(place)
    wait_for(lambda: own.status('/health/ready') == 200)
    assert own.predict() == before


def test_a_store_that_knows_nothing_is_not_ready(served, tmp_path):
    from mlref.lmdb_store import LmdbStore
    from small import FEATURES

    LmdbStore(tmp_path / 'empty', FEATURES).close()
    with started(served, tmp_path, tmp_path / 'empty') as own:
        status, said, _ = own.server.call('GET', '/health/ready')
        assert status == 503 and 'is empty; begin with: mlref ingest' in said['error'], said
        assert own.predict()[0] == 503 and own.status('/health/live') == 200


# Time


def test_the_year_2100_is_refused_and_not_written_down(own):
    before = len(rows_of(own))
    for year in (2100, 2200):
        visit = own.server.visit(event_time=f'{year}-07-01T12:00Z')
        status, said = own.post('/predict', {'entities': [visit]})
        assert status in (400, 422) and str(year) in said['error'], said
    assert len(rows_of(own)) == before


# Clients


def test_a_client_that_leaves_is_a_499_and_at_most_one_line(own):
    visits = [own.server.visit(number % 400) for number in range(1000)]
    body = json.dumps({'entities': visits}).encode()
    head = b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    whole = head + b'content-length: %d\r\n\r\n' % len(body) + body
    before = own.server.counted(status='499')
    said = own.says.stat().st_size
    for part in (whole, whole, whole[:-100], whole[:-100]):
        with socket.create_connection(own.server.address, timeout=10) as client:
            client.sendall(part)
    wait_for(lambda: own.server.counted(status='499') >= before + 4)
    lines = own.says.read_bytes()[said:].splitlines()
    assert len(lines) <= 4 and not [line for line in lines if line.startswith(b'Traceback')]
    assert own.server.counted(status='500') == 0


def test_clients_that_leave_while_the_server_stands_still_are_499s(own):
    "Request and end lie there together when it reads again: both come with one event of epoll"
    visits = [own.server.visit(number % 400) for number in range(1000)]
    body = json.dumps({'entities': visits}).encode()
    head = b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    whole = head + b'content-length: %d\r\n\r\n' % len(body) + body
    clients = [socket.create_connection(own.server.address, timeout=10) for _ in range(4)]
    for client in clients:  # accepted, and known to whoever decides who is read
        client.sendall(b'GET /v2/health/live HTTP/1.1\r\nhost: localhost\r\n\r\n')
        assert b'200' in client.recv(4096)
    before = own.server.counted(status='499')
    os.kill(own.worker, signal.SIGSTOP)
    try:
        for client in clients:
            client.sendall(whole)
            client.close()
    finally:
        os.kill(own.worker, signal.SIGCONT)
    wait_for(lambda: own.server.counted(status='499') >= before + 4)


def ask_some(own: Own, n: int) -> float:
    "Median of some answers on one connection, in seconds"
    line = HTTPConnection(*own.server.address, timeout=30)
    body = json.dumps(own.server.tensor(ONE)).encode()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        line.request('POST', own.server.infer, body, {'content-type': 'application/json'})
        answer = line.getresponse()
        answer.read()
        times.append(time.perf_counter() - start)
        assert answer.status == 200
    line.close()
    return statistics.median(times)


@contextmanager
def dribbling(own: Own, n: int) -> Iterator[None]:
    "Clients that send a request a byte at a time"
    request = b'POST /predict HTTP/1.1\r\nhost: localhost\r\nx-slow: ' + b'a' * 8000
    done = threading.Event()
    with ExitStack() as stack:
        address = own.server.address
        clients = [
            stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(n)
        ]

        def send():
            for place in range(len(request)):
                for client in clients:
                    client.send(request[place : place + 1])
                if done.wait(0.2):
                    return

        sender = threading.Thread(target=send)
        sender.start()
        try:
            yield
        finally:
            done.set()
            sender.join()


def test_two_hundred_dribbling_clients_leave_the_others_their_time(own):
    ratios = []
    for _ in range(3):
        alone = ask_some(own, 60)
        with dribbling(own, 200):
            ratios.append(ask_some(own, 60) / alone)
    assert min(ratios) < 2.5, ratios


REQUEST = (
    b'POST /v2/models/late-visits/infer HTTP/1.1\r\nhost: localhost\r\n'
    b'content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n'
)


@st.composite
def spoilt(draw, request: bytes):
    "A request as bytes with parts left out, doubled or replaced"
    pieces = [b'', b'\r\n', b'\n', b':', b'\0', b' ', b'-1', b'99999999999999999999', b'chunked']
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(request)))
        end = draw(st.integers(start, min(len(request), start + 30)))
        piece = draw(st.sampled_from([*pieces, request[start:end] * 2]) | st.binary(max_size=6))
        request = request[:start] + piece + request[end:]
    return request


def test_whatever_the_bytes_on_a_connection_the_server_answers_or_closes(own):
    body = json.dumps(own.server.tensor(ONE)).encode()
    whole = REQUEST % len(body) + body
    pid = own.worker

    @settings(
        max_examples=2000 if DEEP else 60,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=not DEEP,
        database=None,
    )
    @given(spoilt(whole) | st.binary(max_size=60))
    @example(whole + whole)
    def send(request):
        with socket.create_connection(own.server.address, timeout=10) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            found = b''
            while part := client.recv(65536):
                found += part
        assert found == b'' or found.startswith(b'HTTP/1.1 ')
        assert not found.startswith(b'HTTP/1.1 500'), request

    send()
    assert own.worker == pid and own.predict()[0] == 200
    assert own.server.counted(status='500') == 0


# The end


def test_sigterm_under_load_answers_every_request_it_received(served, tmp_path):
    "Clients ask as fast as they are answered; the last answer of each says that it is the last"
    with started(served, tmp_path) as own:
        body = json.dumps(own.server.tensor(ONE)).encode()
        counts = []
        going = threading.Barrier(13, timeout=60)

        def ask():
            line = HTTPConnection(*own.server.address, timeout=30)
            line.connect()
            line.auto_open = False
            going.wait()
            n = 0
            last = False
            while not last:
                line.request('POST', own.server.infer, body, {'content-type': 'application/json'})
                answer = line.getresponse()
                assert answer.status == 200, answer.read()
                last = answer.getheader('connection') == 'close'
                answer.read()
                n += 1
            counts.append(n)

        with ThreadPoolExecutor(12) as pool:
            asking = [pool.submit(ask) for _ in range(12)]
            going.wait()
            time.sleep(0.5 + random.random() / 10)
            own.process.send_signal(signal.SIGTERM)
            for each in asking:
                each.result(40)
        own.process.wait(20)
        vectors = rows_of_vectors(own)
        assert len(counts) == 12 and sum(counts) > 24 and vectors in (0, sum(counts))


def rows_of_vectors(own: Own) -> int:
    "How many rows of vectors were written down; 0 where a server keeps none"
    from mlref.log import LocalLog

    log = LocalLog(prediction_log(own.folder, 0), readonly=True)
    found = log.end('vectors')
    log.close()
    return found
