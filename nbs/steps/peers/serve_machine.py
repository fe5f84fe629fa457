"""A server as the benchmark sees it: its processes, what they cost, and load from another process

Every process of a server carries a mark in its environment, which whatever it starts inherits: so
all of them are found, whoever is the parent of whom.
"""

import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from http.client import HTTPConnection, HTTPException
from pathlib import Path

MARK = 'MLREF_BENCH_SERVER'
TICKS = os.sysconf('SC_CLK_TCK')
MOST_CLIENTS = 5000  # connections of an overload, each a descriptor


def free_ports(
    n: int,  # how many in a row
) -> int:  # the first of them
    "Ports that nobody listens at"
    for first in range(21_000, 32_000, n + 1):
        if all(is_free(port) for port in range(first, first + n)):
            return first
    raise RuntimeError(f'expected {n} free ports in a row, found none')


def is_free(port: int) -> bool:
    with socket.socket() as trying:
        trying.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trying.bind(('127.0.0.1', port))
        except OSError:
            return False
        return True


def marked(
    mark: str,  # of a server; what ends with '-' is the beginning of several
) -> list[int]:  # process ids
    "All processes of a server"
    wanted = f'{MARK}={mark}'.encode()
    several = mark.endswith('-')
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            variables = (folder / 'environ').read_bytes().split(b'\0')
        except OSError:  # it has ended, or is not ours
            continue
        if wanted in variables or (several and any(v.startswith(wanted) for v in variables)):
            found.append(int(folder.name))
    return found


def signal_marked(
    mark: str,  # as for `marked`
    number: int,
) -> None:
    "Send a signal to all processes of a server"
    for pid in marked(mark):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


GUARD = """
import signal, sys
from peers.serve_machine import signal_marked
sys.stdin.read()  # until the other end of this pipe is gone
signal_marked(sys.argv[1], signal.SIGKILL)
"""


@cache
def start_guard(
    pid: int,  # of this process
) -> subprocess.Popen:
    "A process that ends the servers of this one when it is gone, however it went"
    here = {'PYTHONPATH': str(Path(__file__).resolve().parents[1]), 'PATH': os.environ['PATH']}
    command = [sys.executable, '-c', GUARD, f'{pid}-']
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=here, start_new_session=True)


def cpu_of(pid: int) -> float:
    "Seconds of CPU of a process; 0 for one that has ended"
    try:
        fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory_of(pid: int) -> float:
    "Resident memory of a process, MB; 0 for one that has ended"
    try:
        pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf('SC_PAGE_SIZE') / 2**20


def mapped_of(pid: int) -> float:
    "The part of it that is pages of files, such as a log; the system takes it back as it likes"
    try:
        lines = Path(f'/proc/{pid}/status').read_text().splitlines()
    except OSError:
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith('RssFile:')]
    return int(found[0]) / 1024 if found else 0.0


@dataclass(frozen=True)
class Load:
    "What a client got"

    seconds: float
    answers: int  # with status 200
    refused: int  # with another status
    broken: int  # connections that broke, or waited too long
    p50: float  # seconds, over all answers
    p99: float
    client: float = 0.0  # seconds of CPU of the client itself
    in_time: int = 0  # of the answers, where there is a deadline
    accepted_p99: float = 0.0  # seconds, over answers with status 200; the same

    @property
    def rate(self) -> float:
        "Answers with status 200 a second"
        return self.answers / self.seconds


def read_load(
    text: str,  # the last line that wrk printed
    client: float = 0.0,  # seconds of CPU that wrk took
) -> Load:
    "What `serve.lua` says"
    found = json.loads(text)
    refused = found['refused']
    return Load(**{**found, 'answers': found['answers'] - refused, 'client': client})


def cpu_of_children() -> float:
    "Seconds of CPU of processes that have ended and were waited for"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def send_load(
    url: str,  # with its path
    bodies: Path,  # one a line
    connections: int,
    seconds: int,
    pause: int = 0,  # milliseconds between an answer and the next request; 0 = at once
    deadline: float = 0,  # seconds within which an answer counts; 0 = there is none
) -> Load:
    "Load by wrk; raises `RuntimeError` when it does not run"
    here = Path(__file__).parent
    command = ['wrk', '-t1', f'-c{connections}', f'-d{seconds}s', '--timeout', '30s']
    command += ['-s', str(here / 'serve.lua'), url]
    told = {'LOAD_BODIES': str(bodies), 'LOAD_PAUSE': str(pause)}
    told['LOAD_DEADLINE'] = str(deadline)
    before = cpu_of_children()
    done = subprocess.run(command, env={**os.environ, **told}, capture_output=True, text=True)
    line = next((each for each in done.stdout.splitlines() if each.startswith('{')), '')
    if not line:
        raise RuntimeError(f'expected numbers from wrk, got: {done.stderr or done.stdout:.300}')
    return read_load(line, cpu_of_children() - before)


def foreign_environment() -> dict[str, str]:
    "Variables without what this process set for its own packages, as MLflow's settings"
    ours = ('PYTHONPATH', 'PYTHONHOME', 'MLFLOW_')
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


class Server:
    "A server in processes of its own"

    def __init__(
        self,
        name: str,
        command: list[str],
        port: int,
        folder: Path,  # where it works, and what it says is kept
        environment: dict[str, str] | None = None,  # more of it
    ):
        self.mark = f'{os.getpid()}-{port}'
        self.name = name
        self.port = port
        self.says = folder / f'{name.replace("/", "-").replace(" ", "_")}.log'
        env = {**foreign_environment(), MARK: self.mark, 'OMP_NUM_THREADS': '1'}
        env |= environment or {}
        self.began = time.perf_counter()
        with self.says.open('wb') as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.PIPE, env=env
            )
        start_guard(os.getpid())  # a benchmark that fails is killed, and leaves nobody behind

    @property
    def url(self) -> str:
        return f'http://127.0.0.1:{self.port}'

    def last_words(self) -> str:
        "The end of what it said"
        lines = self.says.read_text(errors='replace').strip().splitlines()
        return ' '.join(lines[-3:])[-300:] or 'nothing'

    def ask(self, path: str, body: bytes | None, timeout: float = 10) -> tuple[int, bytes]:
        "Status and body of one answer; without a body it is asked by GET"
        line = HTTPConnection('127.0.0.1', self.port, timeout=timeout)
        method = 'GET' if body is None else 'POST'
        try:
            line.request(method, path, body, {'Content-Type': 'application/json'})
            answer = line.getresponse()
            return answer.status, answer.read()
        finally:
            line.close()

    def wait_for(
        self,
        path: str,
        body: bytes,
        is_right: Callable[[bytes], bool],  # of the body of an answer
        seconds: float = 60,
    ) -> float:  # seconds from its start
        "Wait for the first answer that is right; raises `RuntimeError` with what it said"
        said = 'no answer'
        while time.perf_counter() - self.began < seconds:
            if self.process.poll() is not None:
                said = f'it ended with status {self.process.returncode}'
                break
            try:
                status, answer = self.ask(path, body)
                if status == 200 and is_right(answer):
                    return time.perf_counter() - self.began
                said = f'status {status}: {answer[:200]!r}'
            except (OSError, HTTPException):
                pass
            time.sleep(0.01)
        words = self.last_words()
        self.stop()
        raise RuntimeError(
            f'expected the right answer of {self.name}, got {said}; it said: {words}'
        )

    def wait_said(self, word: str, seconds: float) -> None:
        "Wait until a word stands in what it says; raises `RuntimeError`"
        until = time.perf_counter() + seconds
        while word not in self.says.read_text(errors='replace'):
            if time.perf_counter() > until:
                raise RuntimeError(f'expected {word!r} of {self.name}, got: {self.last_words()}')
            time.sleep(0.05)

    def signal(self, number: int) -> None:
        "Send a signal to all of its processes"
        signal_marked(self.mark, number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def cpu(self) -> float:
        "Seconds of CPU of all of its processes"
        return sum(cpu_of(pid) for pid in marked(self.mark))

    def memory(self) -> list[float]:
        "Resident memory of each of its processes, MB, the largest first"
        return sorted((memory_of(pid) for pid in marked(self.mark)), reverse=True)

    def own_memory(self) -> float:
        "Resident memory of all of its processes without pages of files, MB"
        pids = marked(self.mark)
        return sum(memory_of(pid) - mapped_of(pid) for pid in pids)

    def stop(self) -> None:
        "End all of its processes"
        self.resume()
        self.signal(signal.SIGTERM)
        end = time.perf_counter() + 5
        while marked(self.mark) and time.perf_counter() < end:
            self.process.poll()
            time.sleep(0.05)
        self.signal(signal.SIGKILL)
        self.process.wait()


@dataclass(frozen=True)
class Measured:
    "A server under load, and what that took"

    load: Load  # of many connections
    alone: Load  # of one connection
    cpu: float  # seconds of CPU of all its processes, an answer
    memory: list[float]  # MB of each of its processes, the largest first


def measure(
    server: Server,
    path: str,
    bodies: Path,  # one a line
    connections: int,
    seconds: int,
) -> Measured:
    "One connection for a second, which also warms it; then many; it stands still before and after"
    url = server.url + path
    server.resume()
    alone = send_load(url, bodies, 1, 1)
    before = server.cpu()
    load = send_load(url, bodies, connections, seconds)
    cpu = (server.cpu() - before) / max(load.answers, 1)
    memory = server.memory()
    server.pause()
    return Measured(load, alone, cpu, memory)


class Probe:
    "A client that asks now and then whether the server lives, and notes how long that took"

    def __init__(self, server: Server, path: str = '/health/live', pause: float = 0.05):
        self.server = server
        self.path = path
        self.pause = pause
        self.times: list[float] = []
        self.failed = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        while not self.stopped.wait(self.pause):
            start = time.perf_counter()
            try:
                status, _ = self.server.ask(self.path, None, timeout=30)
            except (OSError, HTTPException):
                status = 0
            if status == 200:
                self.times.append(time.perf_counter() - start)
            else:
                self.failed += 1

    def __enter__(self) -> 'Probe':
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join(40)


@dataclass(frozen=True)
class Overload:
    "What comes of too much"

    peak: float  # answers a second at the usual load, just before
    load: Load
    clients: int
    health: list[float]  # seconds that each question about health took
    unhealthy: int  # of these questions, without an answer of status 200
    grown: float  # memory afterwards, times that before


def overload(
    server: Server,
    path: str,
    bodies: Path,
    connections: int,  # of the usual load
    seconds: int,
    deadline: float,  # seconds within which an answer counts
    times: float = 3,  # too much
) -> Overload:
    "Clients that together ask too often, although each waits for its answer and then a while"
    url = server.url + path
    server.resume()
    peak = send_load(url, bodies, connections, seconds).rate
    rate = times * peak
    clients = min(max(round(2 * deadline * rate), 200), MOST_CLIENTS)
    pause = max(clients / rate - deadline / 2, 0.02)  # whoever is refused has waited for that half
    memory = sum(server.memory())
    with Probe(server) as probe:
        load = send_load(url, bodies, clients, seconds, round(1000 * pause), deadline)
    grown = sum(server.memory()) / memory
    server.pause()
    return Overload(peak, load, clients, probe.times, probe.failed, grown)


class LoadInBackground:
    "Load from a thread; `.found` when it is over"

    def __init__(self, *arguments: object):  # as for `send_load`
        self.found: Load | None = None
        self.arguments = arguments
        self.thread = threading.Thread(target=self._send)
        self.thread.start()

    def _send(self) -> None:
        self.found = send_load(*self.arguments)

    def wait(self, seconds: float | None = None) -> bool:
        "Whether it is over"
        self.thread.join(seconds)
        return not self.thread.is_alive()


def swap_under_load(
    server: Server,
    path: str,
    bodies: Path,
    connections: int,
    seconds: int,
    swap: Callable[[], object],  # has another version served
) -> tuple[Load, Load]:  # without and with swaps
    "Load as long as usual, then as long again while versions are swapped, four times"
    url = server.url + path
    server.resume()
    swap()  # whatever is loaded for the first time
    steady = send_load(url, bodies, connections, seconds)
    load = LoadInBackground(url, bodies, connections, seconds)
    for _ in range(4):
        time.sleep(seconds / 8)
        swap()
    load.wait()
    server.pause()
    assert load.found is not None
    return steady, load.found


def soak(
    server: Server,
    path: str,
    bodies: Path,
    rate: float,  # requests a second
    minutes: int,
    swap: Callable[[], object],
) -> tuple[Load, float, float]:  # and MB for 100,000 requests: of its own, and of mapped files
    "A long load with a swap every half minute; the first third warms up"
    clients = 64
    server.resume()
    arguments = (server.url + path, bodies, clients, 60 * minutes, round(clients / rate * 1000))
    load = LoadInBackground(*arguments)
    start = time.perf_counter()
    times: list[float] = []
    own: list[float] = []
    mapped: list[float] = []
    while not load.wait(5):
        times.append(time.perf_counter() - start)
        own.append(server.own_memory())
        mapped.append(sum(server.memory()) - own[-1])
        if len(own) % 6 == 0:
            swap()
    server.pause()
    assert load.found is not None
    warm = len(own) // 3
    slopes = [statistics.linear_regression(times[warm:], x[warm:]).slope for x in (own, mapped)]
    grown, of_files = (slope / load.found.rate * 100_000 for slope in slopes)
    return load.found, grown, of_files


def need_wrk() -> str:  # '' = it is here
    "Why no load can be sent"
    if shutil.which('wrk'):
        return ''
    return 'wrk is not installed; call: apt-get install wrk'
