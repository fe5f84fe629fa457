"The benchmark of serving sees all processes of a server, their cost, and its last words"

import ast
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

STEPS = Path(__file__).parent.parent / 'nbs' / 'steps'
sys.path.insert(0, str(STEPS))
from peers.serve_cache import Asked, Served, count_stale, draw_popular
from peers.serve_machine import (
    Load,
    Measured,
    Overload,
    Server,
    cpu_of,
    free_ports,
    mapped_of,
    marked,
    memory_of,
    need_wrk,
    read_load,
    send_load,
)
from peers.serve_peers import BY_KEYS, CONTENDERS, FEAST, OURS
from peers.serve_rows import (
    BY_KEYS_GOALS,
    FREE,
    FREE_TWO,
    GOALS,
    goal_rows,
    overload_rows,
    room_row,
    server_row,
)

sys.path.remove(str(STEPS))

# a parent that only waits, and a child in a session of its own that answers and keeps busy
SERVER = """
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


class Echo(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers['Content-Length']))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    def log_message(self, *words):
        pass


port = sys.argv[1]
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, __file__, port, 'child'], start_new_session=True)
    time.sleep(60)
else:
    HTTPServer(('127.0.0.1', int(port)), Echo).serve_forever()
"""


@pytest.fixture
def server(tmp_path):
    script = tmp_path / 'server.py'
    script.write_text(SERVER)
    port = free_ports(1)
    found = Server('echo', [sys.executable, str(script), str(port)], port, tmp_path)
    yield found
    found.stop()
    assert marked(found.mark) == []


def test_all_processes_of_a_server_are_counted_paused_and_ended(server):
    seconds = server.wait_for('/', b'7', lambda answer: answer == b'7', 20)
    assert 0 < seconds < 20
    pids = marked(server.mark)
    assert len(pids) == 2 and len(server.memory()) == 2
    before = server.cpu()
    status, answer = server.ask('/', b'hello')
    assert (status, answer) == (200, b'hello')
    time.sleep(0.3)
    assert server.cpu() - before >= 0.15  # the child's, which is in another session
    assert cpu_of(server.process.pid) < 0.15
    server.pause()
    with pytest.raises(TimeoutError):
        server.ask('/', b'hello', timeout=0.3)
    server.resume()
    assert server.ask('/', b'again')[1] == b'again'


def test_a_server_that_ends_is_told_with_its_last_words(tmp_path):
    words = [sys.executable, '-c', 'raise SystemExit("no such model")']
    server = Server('short', words, free_ports(1), tmp_path)
    with pytest.raises(RuntimeError, match='ended with status 1; it said: no such model'):
        server.wait_for('/', b'', bool, 20)


def test_answers_are_compared_with_the_model():
    tensor = json.dumps({'outputs': [{'data': [0.25]}]}).encode()
    assert OURS.is_right(0.25)(tensor) and not OURS.is_right(0.26)(tensor)
    entity = json.dumps({'predictions': [{'p': 0.25}]}).encode()
    assert BY_KEYS.is_right(0.25)(entity) and not FEAST.is_right(0.3)(entity)
    hello = next(each for each in CONTENDERS if each.name == 'hello')
    assert hello.is_right(0.25)(b'{"p": 0.5}')


def runs(rate, n=3, client=0.0):
    said = {'seconds': 2.0, 'refused': 5, 'broken': 0, 'p50': 0.01, 'p99': 0.02}
    load = read_load(json.dumps({**said, 'answers': int(2 * rate) + 5}), client)
    return [Measured(load, load, 0.001, [90.0, 10.0])] * n


def test_pages_of_a_file_are_not_memory_of_its_reader(server, tmp_path):
    server.wait_for('/', b'7', lambda answer: answer == b'7', 20)
    assert 0 < server.own_memory() < sum(server.memory())
    (tmp_path / 'file').write_bytes(bytes(2**25))
    with (tmp_path / 'file').open('rb') as file:
        before = memory_of(os.getpid()), mapped_of(os.getpid())
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(mapped[::4096]) == 0
        grown = [memory_of(os.getpid()) - before[0], mapped_of(os.getpid()) - before[1]]
        mapped.close()
    assert grown == [pytest.approx(32, abs=3)] * 2


def test_a_refusal_is_no_answer():
    (run, *_) = runs(100)
    assert run.load == Load(2.0, 200, 5, 0, 0.01, 0.02) and run.load.rate == 100
    row = server_row('ours', runs(100), 1.5)
    assert (row['ours'], row['failed'], row['n'], row['memory_mb']) == (100, 15, 600, 100)


@pytest.mark.skipif(bool(need_wrk()), reason='wrk is not installed')
def test_an_answer_is_in_time_by_when_its_request_was_sent(server, tmp_path):
    server.wait_for('/', b'7', lambda answer: answer == b'7', 20)
    bodies = tmp_path / 'bodies.jsonl'
    bodies.write_text('{"inputs": []}\n')
    fine, late = (send_load(f'{server.url}/', bodies, 2, 1, deadline=each) for each in (20, 0.001))
    assert fine.answers == fine.in_time > 0 and 0 < fine.accepted_p99 < 20
    assert late.in_time < late.answers  # two ask, and each holds up the other for .2 s
    assert send_load(f'{server.url}/', bodies, 1, 1).in_time == 0  # nothing is judged


def test_goodput_counts_what_was_in_time_alone():
    load = Load(2.0, 200, 300, 0, 0.01, 0.02, in_time=150, accepted_p99=0.5)
    crowd = Overload(100.0, load, 64, [0.01, 0.03], 1, 1.05)
    goodput, p99, memory, health = overload_rows([crowd] * 3, deadline=0.25)
    assert (goodput['ours'], goodput['held'], goodput['n']) == (0.75, False, 1500)
    assert (goodput['offered'], goodput['late'], goodput['peak']) == (2.5, 150, 100)
    assert (p99['ours'], p99['held'], p99['n']) == (2, False, 600)
    assert memory['held'] and (health['ours'], health['n'], health['failed']) == (0.03, 6, 3)
    nothing = Overload(100.0, Load(2.0, 0, 300, 0, 0.01, 0.02), 64, [0.01], 0, 1.0)
    assert overload_rows([nothing], 0.25)[1]['held'] is False


def test_every_goal_names_servers_that_are_measured():
    known = {each.name for each in CONTENDERS} | {'ours', 'ours with two workers', FREE, FREE_TWO}
    assert {name for _, ours, theirs, _ in GOALS for name in (ours, theirs)} <= known
    assert {theirs for _, _, theirs, _ in BY_KEYS_GOALS} == {'ours before', FEAST.name}
    found = {name: runs(100) for name in known} | {'ours': runs(1200)}
    held = {row['name']: row['held'] for row in goal_rows(found, GOALS)}
    assert len(held) == len(GOALS)
    assert held['throughput, ours over FastAPI def'] is True
    assert held['throughput, ours over Ray Serve'] is False
    assert goal_rows({'ours': runs(1)}, GOALS) == []


def test_two_workers_cannot_reach_more_than_the_cores_give():
    two = runs(100, client=0.1)  # half a millisecond of the client, one of the server
    row = room_row(runs(1000), two, cores=2)
    assert row['ours'] == pytest.approx(2 / 0.0015 / 1000, rel=0.02) and '2 cores' in row['why']


def test_an_old_score_and_an_old_version_are_stale():
    scores = {'a': [0.1, 0.2], 'b': [0.3, 0.4]}
    served = [Served(0.0, 10.0, 'a'), Served(11.0, 20.0, 'b')]
    fine = [
        Asked(1.0, 2.0, 0, 'a', 0.1),
        Asked(9.9, 10.1, 1, 'b', 0.4),  # while versions changed either may answer
        Asked(12.0, 13.0, 1, 'b', 0.4),
    ]
    assert count_stale(fine, served, scores) == 0
    stale = [Asked(12.0, 13.0, 1, 'a', 0.2), Asked(12.0, 13.0, 1, 'b', 0.2)]
    assert count_stale([*fine, *stale], served, scores) == 2


def test_few_rows_are_asked_about_most_of_the_time():
    drawn = draw_popular(1000, 20_000)
    most = sorted((drawn.count(row) for row in {*drawn}), reverse=True)
    assert 0.3 < sum(most[:10]) / 20_000 < 0.5 and len(most) > 900


def test_packages_are_pinned():
    for each in (*CONTENDERS, FEAST):
        assert all('==' in package for package in each.packages), each.name
    assert (STEPS / 'peers' / 'serve.lua').exists()
    assert all((STEPS / 'peers' / each.script).exists() for each in (*CONTENDERS, FEAST))


def names_of(source):
    "What can be imported from a module"
    found = set()
    for each in ast.parse(source).body:
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            found.add(each.name)
        elif isinstance(each, ast.Assign):
            found |= {target.id for target in each.targets if isinstance(target, ast.Name)}
        elif isinstance(each, ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in each.names}
    return found


def test_the_release_before_has_all_that_makes_a_run_to_serve():
    page = nbformat.read(STEPS / 'bench_serve.ipynb', 4)
    given = next(cell for cell in page.cells if 'parameters' in cell.metadata.get('tags', ()))
    commit = re.search(r"before: str = '(\w+)'", given.source)[1]
    script = ast.parse((STEPS / 'peers' / 'serve_home.py').read_text())
    taken = [each for each in script.body if isinstance(each, ast.ImportFrom)]
    taken = [each for each in taken if each.module.startswith('mlref.')]
    assert len(taken) > 10
    for each in taken:
        file = each.module.replace('.', '/') + '.py'
        shown = subprocess.run(
            ['git', 'show', f'{commit}:{file}'],
            cwd=STEPS.parents[1],
            capture_output=True,
            text=True,
        )
        if 'invalid object name' in shown.stderr or 'not a git' in shown.stderr:
            pytest.skip(f'commit {commit} is not here')
        assert shown.returncode == 0, f'{commit} has no {file}'
        assert {alias.name for alias in each.names} <= names_of(shown.stdout), each.module


ABANDONS = """
import os, signal, sys
from pathlib import Path
from peers.serve_machine import Server
command = [sys.executable, '-c', 'import time; time.sleep(60)']
server = Server('sleeper', command, 1, Path(sys.argv[1]))
server.pause()
print(server.mark, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_benchmark_that_is_killed_leaves_no_server_behind(tmp_path):
    environment = {**os.environ, 'PYTHONPATH': str(STEPS)}
    killed = subprocess.run(
        [sys.executable, '-c', ABANDONS, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    mark = killed.stdout.strip()
    assert killed.returncode == -signal.SIGKILL and mark, killed.stderr
    until = time.monotonic() + 10
    while marked(mark) and time.monotonic() < until:
        time.sleep(0.05)
    assert marked(mark) == []
