"""What clients, proxies and editors of files do that is right, and was answered wrongly

Every case was found by trying, and each is shown as its kind: an answer that another request's
fault takes away, memory that no limit counts, a question that is passed over, a file by hand.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest

from mlref.access import make_key, read_keys, write_keys
from mlref.cli_keys import keys_app
from mlref.core import MlrefError
from mlref.edges import child_environment
from mlref.log import LocalLog
from mlref.publisher import ServeOptions, encode_options
from mlref.serving_state import (
    prediction_log,
    publish_state,
    read_notes,
    read_state,
    with_champion,
)
from mlref.terminal import run_cli
from mlref.workers import Supervisor
from server_fixture import CHILD, start_copy, start_process, wait_gone

ONE = np.array([[3, 2.5]], np.float32)
NBS = Path(__file__).parents[1] / 'nbs'


def wait_for(condition, seconds=20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def request(server, body, *headers, path=None, end=b''):
    "A request in bytes"
    lines = [f'POST {path or server.infer} HTTP/1.1', 'host: localhost', *headers]
    lines += ['content-type: application/json', f'content-length: {len(body)}', '', '']
    return '\r\n'.join(lines).encode() + body + end


def replies(found):
    "Status and body of each answer in what a server sent"
    answers = []
    while found:
        head, _, rest = found.partition(b'\r\n\r\n')
        size = int(re.search(rb'content-length: (\d+)', head)[1])
        answers.append((int(head[9:12]), rest[:size]))
        found = rest[size:]
    return answers


@pytest.fixture
def ask(served):
    "A whole request for the score of one row, as bytes"
    return request(served, json.dumps(served.tensor(ONE)).encode())


@pytest.fixture(scope='module')
def own(served, tmp_path_factory):
    "Another server over the same run, and the folder that it serves from"
    folder = tmp_path_factory.mktemp('own')
    token, key = make_key('ops', ('predict', 'admin'))
    with start_copy(served, folder) as (server, _):
        yield server, folder, token, key


def scored(server, token=''):
    "The status of a request for a score"
    headers = {'authorization': f'Bearer {token}'} if token else {}
    return server.post(server.infer, server.tensor(ONE), **headers)[0]


def is_ready(server):
    return server.call('GET', '/health/ready')[0] == 200


# What is no request, behind requests that are


FAULTS = {
    'bytes that are none': (b'\x16\x03\x01\r\n\r\n', 400),
    'a version that is none': (b'GET / HTTP/9.9\r\n\r\n', 400),
    'two lengths': (b'POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n', 400),
    'a path of bytes': (b'GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n', 400),
    'a head without end': (b'GET / HTTP/1.1\r\nx: ' + b'y' * 200_000, 431),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_takes_no_answer_from_the_requests_before_it(served, ask, name):
    "Those were accepted, and their scores are on disk"
    fault, status = FAULTS[name]
    before = len(served.rows('vectors'))
    answers = replies(served.send(ask * 3 + fault))
    assert [found for found, _ in answers] == [200, 200, 200, status]
    scores = [json.loads(body)['outputs'][0]['data'] for _, body in answers[:3]]
    assert scores == [served.scores(ONE)] * 3
    assert len(served.rows('vectors')) == before + 3
    assert 'error' in json.loads(answers[3][1])


def peak_memory(pid):
    "Bytes that a process ever had in memory since that was reset"
    text = Path(f'/proc/{pid}/status').read_text()
    return 1024 * int(re.search(r'VmHWM:\s+(\d+)', text)[1])


TRAILERS = (
    'POST {infer} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    'transfer-encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\nx: '
)


@pytest.mark.parametrize('where', ['behind a request that is worked on', 'as trailers'])
def test_a_head_without_end_is_cut_off_wherever_it_stands(own, ask, where):
    "200 MB of it would be 200 MB of memory"
    server, folder, _, _ = own
    pid = read_notes(folder)[0].pid
    assert scored(server) == 200
    begin = TRAILERS.format(infer=server.infer).encode()
    Path(f'/proc/{pid}/clear_refs').write_text('5')
    before = peak_memory(pid)
    with ExitStack() as stack:
        if where != 'as trailers':
            log = LocalLog(prediction_log(folder, 0))
            stack.callback(log.close)
            stack.enter_context(log.file.env.begin(write=True))  # the request has to wait for it
            begin = ask + b'GET / HTTP/1.1\r\nhost: localhost\r\nx: '
        client = stack.enter_context(socket.create_connection(server.address, timeout=20))
        client.sendall(begin)
        until = time.monotonic() + 1.2
        with suppress(OSError):  # it was closed
            for _ in range(3000):
                client.sendall(b'y' * 65536)
                if time.monotonic() > until:
                    break
    assert peak_memory(pid) - before < 20_000_000
    wait_for(lambda: scored(server) == 200)


# What stands in a head


LAST = b'GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n'
HEADS = {  # a line more, or another first line; the statuses that come
    'a head of 60 kB': (('x: ' + 'y' * 60_000,), None, [431]),
    'a head of 20,000 lines': (('x: y',) * 20_000, None, [431]),
    'a head of 20 kB': (('x: ' + 'y' * 20_000,), None, [200]),
    'a transfer coding': (('transfer-encoding: gzip, chunked',), None, [501]),
    'chunks by another name': (('transfer-encoding: Chunked',), None, [200]),
    'two transfer codings': (
        ('transfer-encoding: identity', 'transfer-encoding: chunked'),
        None,
        [400],
    ),
    'the address of another': ((), 'http://evil.example{path}', [421]),
    'the address of this server': ((), 'http://LOCALHOST:80{path}', [200]),
    'the address of a file server': ((), 'ftp://localhost{path}', [400]),
}


@pytest.mark.parametrize('before', [0, 2], ids=['first', 'third in a packet'])
@pytest.mark.parametrize('name', HEADS)
def test_a_head_is_judged_as_it_stands_however_its_bytes_come(served, name, before):
    more, target, statuses = HEADS[name]
    body = json.dumps(served.tensor(ONE)).encode()
    path = None if target is None else target.format(path=served.infer)
    asks = request(served, body, *more, path=path)
    if any('transfer-encoding' in line for line in more):
        head = re.sub(rb'\r\ncontent-length: \d+', b'', asks.partition(b'\r\n\r\n')[0])
        asks = head + b'\r\n\r\n%x\r\n%b\r\n0\r\n\r\n' % (len(body), body)
    answers = replies(served.send(request(served, body) * before + asks + LAST))
    found = [status for status, _ in answers[before:]]
    assert found[:1] == statuses and found[1:] in ([200], []), answers
    assert found[1:] == [200] or statuses[0] in (400, 431)  # the next one is answered, too


@pytest.mark.parametrize(('version', 'told'), [('1.0', 0), ('1.1', 1)])
def test_an_old_client_is_not_told_to_go_on(served, ask, version, told):
    "It does not know of an answer before the answer"
    head = ask.replace(b'HTTP/1.1', f'HTTP/{version}'.encode())
    head = head.replace(
        b'content-length', b'connection: close\r\nexpect: 100-continue\r\ncontent-length'
    )
    assert served.send(head).count(b'100 Continue') == told


# Questions of clients that a server may pass over


@pytest.mark.parametrize('protocol', ['h2c', 'websocket', 'TLS/1.0'])
def test_a_client_that_would_rather_speak_another_protocol_is_answered(served, protocol):
    "Java's client asks so, and its body comes with the question"
    body = json.dumps(served.tensor(ONE)).encode()
    upgrade = ('connection: Upgrade, HTTP2-Settings', f'upgrade: {protocol}', 'http2-settings: AA')
    asks = request(served, body, *upgrade)
    last = b'GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n'
    for sent in (asks + last, asks * 5 + last):
        answers = replies(served.send(sent))
        assert {status for status, _ in answers} == {200}
        assert len(answers) == sent.count(b' HTTP/1.1')
        score = json.loads(answers[0][1])['outputs'][0]['data']
        assert score == served.scores(ONE)
    with socket.create_connection(served.address, timeout=10) as client:  # the body comes later
        head, _, rest = asks.partition(b'\r\n\r\n')
        for part in (head + b'\r\n\r\n', rest[:5], rest[5:] + last):
            client.sendall(part)
            time.sleep(0.05)
        found = b''
        while part := client.recv(65536):
            found += part
    assert [status for status, _ in replies(found)] == [200, 200]


def test_many_such_questions_in_one_packet_are_all_answered(served):
    "More than Python's calls may be deep"
    one = b'GET /v2 HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n'
    last = one.replace(b'connection: upgrade', b'connection: close')
    assert [status for status, _ in replies(served.send(one * 2000 + last))] == [200] * 2001


def test_who_asks_whether_it_may_send_a_body_that_is_too_long_need_not_send_it(served):
    head = request(served, b'', 'expect: 100-continue')
    long = head.replace(b'content-length: 0', b'content-length: 99999999999')
    ((status, said),) = replies(served.send(long))
    assert (status, 'at most' in json.loads(said)['error']) == (413, True)
    foreign = long.replace(b'host: localhost', b'host: evil.example')
    assert [status for status, _ in replies(served.send(foreign))] == [421]
    body = json.dumps(served.tensor(ONE)).encode()
    last = request(served, body, 'expect: 100-continue', 'connection: close')
    found = served.send(last)
    assert found.startswith(b'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK')


TARGETS = {b'http://localhost/v2': 200, b'http://localhost': 200, b'*': 404, b'/v2?x=/y#z': 200}


@pytest.mark.parametrize('target', TARGETS)
def test_a_path_may_be_written_as_proxies_write_it(served, target):
    ask = b'GET %b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n' % target
    assert [status for status, _ in replies(served.send(ask))] == [TARGETS[target]]


def test_a_client_that_is_still_sending_reads_why_it_is_refused(served):
    "Three megabytes of a header; closed at once, it would see a reset"
    line = HTTPConnection(*served.address, timeout=20)
    line.request('GET', '/v2', headers={'x': 'y' * 3_000_000})
    answer = line.getresponse()
    assert (answer.status, 'headers' in json.loads(answer.read())['error']) == (431, True)
    line.close()


HOSTS = {
    'no name, as health checks of HTTP/1.0 have it': (b'GET /v2 HTTP/1.0\r\n', 200),
    'another name': (b'GET /v2 HTTP/1.0\r\nhost: evil.example\r\n', 421),
    'no name in HTTP/1.1': (b'GET /v2 HTTP/1.1\r\n', 400),
    'two names': (b'GET /v2 HTTP/1.1\r\nhost: evil.example\r\nhost: localhost\r\n', 400),
    'two keys': (
        b'GET /v2 HTTP/1.1\r\nhost: localhost\r\nauthorization: a\r\nAuthorization: b\r\n',
        400,
    ),
    'two that may be': (
        b'GET /v2 HTTP/1.1\r\nhost: localhost\r\naccept: a\r\naccept: b\r\n',
        200,
    ),
}


@pytest.mark.parametrize('name', HOSTS)
def test_a_header_that_is_believed_is_there_once(served, name):
    head, status = HOSTS[name]
    ((got, body),) = replies(served.send(head + b'connection: close\r\n\r\n'))
    assert got == status and (got == 200) == ('error' not in json.loads(body))


def curl_commands():
    "What a reader of the pages is told to type"
    files = [*NBS.glob('*.ipynb'), *NBS.glob('guides/*.ipynb')]
    cells = [cell for file in files for cell in json.loads(file.read_text())['cells']]
    text = '\n'.join(''.join(cell['source']) for cell in cells)
    return re.findall(r'`(curl [^`]*127\.0\.0\.1:8080[^`]*)`', text)


def test_what_the_pages_say_to_type_is_answered(served):
    if shutil.which('curl') is None:
        pytest.skip('needs curl')
    assert curl_commands()
    for line in curl_commands():
        typed = line.replace('http://127.0.0.1:8080', served.url)
        typed = typed.replace('models/late/', 'models/late-visits/')
        told = ['-s', '-o', '/dev/null', '-w', '%{http_code}']
        done = subprocess.run([*typed.split(), *told], capture_output=True, text=True, timeout=60)
        assert done.stdout == '200', line


# Files of a server, changed by hand while it runs


def unlike_keys(key):
    "What an editor may leave in a file of keys"
    row = vars(key) | {'scopes': [*key.scopes]}
    odd = [{**row, 'rows': '5'}, {**row, 'scopes': 'predict'}, {**row, 'sha256': 'é' * 64}]
    odd += [{**row, 'sha256': None}, {**row, 'id': 7}, {**row, 'rows': True}, {**row, 'x': 1}]
    return ['', '{}', '""', 'null', '[1]', *[json.dumps([each]) for each in odd]]


def test_a_file_of_keys_that_is_none_keeps_the_keys_of_before(own):
    server, folder, token, key = own
    file = folder / 'keys.json'
    try:
        write_keys(file, [key])
        wait_for(lambda: (scored(server), scored(server, token)) == (401, 200))
        for text in unlike_keys(key):
            file.write_text(text)
            wait_for(lambda: not is_ready(server))
            assert (scored(server), scored(server, token)) == (401, 200), text
            write_keys(file, [key])
            wait_for(lambda: is_ready(server))
        file.unlink()
        file.mkdir()  # nobody may read it: as root no mode forbids that
        wait_for(lambda: not is_ready(server))
        assert (scored(server), scored(server, token)) == (401, 200)
        file.rmdir()
        write_keys(file, [])  # the last one was revoked
        wait_for(lambda: scored(server, token) == 401)
        said = server.call('GET', '/health/ready')[1]['error']
        assert scored(server) == 401 and 'mlref keys add' in said
    finally:
        file.unlink()
    wait_for(lambda: scored(server) == 200 and is_ready(server))


def test_a_server_that_others_can_reach_never_becomes_everybodys(served, tmp_path):
    "Some editors remove a file before they write it anew"
    token, key = make_key('ops', ('predict',))
    write_keys(tmp_path / 'keys.json', [key])
    with exposed(served, tmp_path) as server:
        assert (scored(server), scored(server, token)) == (401, 200)
        (tmp_path / 'keys.json').unlink()
        wait_for(lambda: scored(server, token) == 401)
        assert scored(server) == 401 and not is_ready(server)
        write_keys(tmp_path / 'keys.json', [key])
        wait_for(lambda: scored(server, token) == 200 and is_ready(server))


@contextmanager
def exposed(served, folder):
    "A server on every address of the machine"
    shutil.copytree(served.folder / 'bundles', folder / 'bundles')
    shutil.copy(served.folder / 'state.json', folder)
    options = ServeOptions('small:TASK', str(served.home), str(folder), host='0.0.0.0', port=0)
    process, url = start_process(options)
    try:
        yield replace(served, url=url.replace('0.0.0.0', '127.0.0.1'), pid=process.pid)
    finally:
        process.terminate()
        wait_gone(process.pid)


def test_a_state_that_was_removed_by_hand_does_not_stop_what_follows(own):
    "As the sentence about a broken one advises"
    server, folder, _, _ = own
    wait_for(lambda: is_ready(server))
    before = read_state(folder)
    (folder / 'state.json').write_text('{')
    wait_for(lambda: 'remove it' in server.call('GET', '/health/ready')[1].get('error', ''))
    (folder / 'state.json').unlink()
    wait_for(lambda: is_ready(server))
    other = publish_state(folder, lambda now: with_champion(now, before.previous))
    assert other.epoch > before.epoch
    wait_for(lambda: [note.epoch for note in read_notes(folder)] == [read_state(folder).epoch])
    wanted = server.post(server.infer, server.tensor(ONE))[1]['model_version']
    assert wanted == read_notes(folder)[0].version


def test_what_could_not_be_taken_is_taken_when_it_can(own):
    "A bundle that is away for a moment, and a note that cannot be written"
    server, folder, _, _ = own
    wait_for(lambda: is_ready(server))
    state = read_state(folder)
    spoilt = publish_state(folder, lambda now: with_champion(now, now.previous))
    wait_for(lambda: read_notes(folder)[0].epoch == spoilt.epoch)
    note = folder / 'workers' / '0.json'
    note.unlink()
    note.mkdir()
    again = publish_state(folder, lambda now: with_champion(now, state.champion))
    wait_for(
        lambda: 'which version answers' in server.call('GET', '/health/ready')[1].get('error', '')
    )
    assert scored(server) == 200
    note.rmdir()
    wait_for(lambda: is_ready(server) and read_notes(folder)[0].epoch >= again.epoch)


def test_a_log_that_is_moved_away_is_told_until_it_is_back(own):
    server, folder, _, _ = own
    wait_for(lambda: is_ready(server))
    (folder / 'logs').rename(folder / 'elsewhere')
    try:
        for path in ('/health/ready', '/ping'):
            status, said, _ = server.call('GET', path)
            assert (status, 'expected the log in' in said['error']) == (503, True)
        assert (scored(server), server.call('GET', '/status.json')[0]) == (503, 200)
    finally:
        (folder / 'elsewhere').rename(folder / 'logs')
    wait_for(lambda: is_ready(server) and scored(server) == 200)
    assert server.counted(status='500') == 0


# Two of one kind


def test_a_folder_is_served_from_once(own):
    "Another would write into its logs, and clear what its workers say of themselves"
    server, folder, _, _ = own
    options = ServeOptions('small:TASK', str(server.home), str(folder), port=0)
    with pytest.raises(MlrefError, match='expected no other server over .* with --log'):
        Supervisor(options)
    assert scored(server) == 200 and read_notes(folder)


def test_two_who_add_a_key_at_once_both_have_it(tmp_path, capsys):
    def add(name):
        return run_cli(keys_app, ['add', name, '--log', str(tmp_path)])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(add, [f'client {i}' for i in range(24)])) == [0] * 24
    assert len(read_keys(tmp_path / 'keys.json')) == 24


@pytest.mark.parametrize(
    ('process', 'wait'),  # seconds
    [('supervisor', 0.0), ('supervisor', 1.0), ('worker', 0.0), ('worker', 0.03)],
)
def test_a_server_that_is_told_to_stop_while_it_starts_ends_quietly(
    process, wait, served, tmp_path
):
    options = ServeOptions('small:TASK', str(served.home), str(tmp_path), port=0)
    server = subprocess.Popen(
        [sys.executable, '-c', CHILD, encode_options(options), str(os.getpid())],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(threads=1),
        start_new_session=True,
    )
    started = {
        'supervisor': lambda: (tmp_path / '.server.lock').exists(),
        'worker': lambda: 'worker_main' in commands_of_children(server.pid),
    }
    wait_for(started[process])
    time.sleep(wait)
    os.killpg(server.pid, signal.SIGINT)  # as a terminal does
    _, said = server.communicate(timeout=40)
    assert (server.returncode, said) == (0, ''), said


def commands_of_children(pid):
    "The command lines of a process's children, as one text"
    found = Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
    lines = []
    for child in found:
        with suppress(OSError):  # it has ended
            lines.append(Path(f'/proc/{child}/cmdline').read_text())
    return ' '.join(lines)


def test_a_worker_that_stands_still_for_seconds_costs_its_own_clients_that_time(served):
    "The others are answered by the other worker, and nothing accepted is lost"
    pid = read_notes(served.folder)[0].pid
    before = len(served.rows('vectors'))
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(2.0, os.kill, (pid, signal.SIGCONT))
    timer.start()
    try:
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda _: scored(served), range(60)))
    finally:
        timer.join()
    assert set(found) <= {200, 503} and found.count(200) >= 30
    wait_for(lambda: len(served.rows('vectors')) >= before + found.count(200))
