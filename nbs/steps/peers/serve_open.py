"""Open arrivals: requests that come when they come, whether or not those before are answered

A client that waits for its answer before it asks again asks less often of a server that is slow,
so what it measures is too kind (coordinated omission). Here the moments are drawn beforehand, and
an answer took as long as it is after its moment, also where no connection was free to ask on.
"""

import contextlib
import json
import selectors
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MARK = b'@@@@@@@@@@'  # stands for the id of a request, as many digits
_WAIT = 5.0  # seconds after the last moment until those without an answer are given up
_HEAD_END = b'\r\n\r\n'


@dataclass(frozen=True)
class Stretch:
    "A time of one rate"

    name: str
    rate: float  # requests a second, on average
    seconds: float


def draw_moments(
    stretches: list[Stretch],  # one after the other
    seed: int = 0,
) -> np.ndarray:  # seconds from the beginning, ascending
    "When requests come: a Poisson process, so that some come together"
    random = np.random.default_rng(seed)
    found = []
    begin = 0.0
    for each in stretches:
        n = random.poisson(each.rate * each.seconds)
        found.append(begin + np.sort(random.uniform(0, each.seconds, n)))
        begin += each.seconds
    return np.concatenate(found)


@dataclass(frozen=True)
class Arrivals:
    "What became of each request"

    moments: np.ndarray  # seconds from the beginning
    status: np.ndarray  # of HTTP; 0 = it was never answered
    took: np.ndarray  # seconds from its moment to its answer; NaN = there was none
    behind: np.ndarray  # seconds from its moment until a connection had it to send; the same
    advised: np.ndarray  # whether the answer has Retry-After


def write_arrivals(found: Arrivals, file: Path) -> None:
    "Keep them for the process that asked for them"
    np.savez(file, **vars(found))


def read_arrivals(file: Path) -> Arrivals:
    "What another process has kept"
    with np.load(file) as found:
        return Arrivals(**{name: found[name] for name in found.files})


def make_requests(
    host: str,
    path: str,
    bodies: list[bytes],  # JSON objects
) -> list[tuple[bytes, bytes]]:  # what stands before and behind the id of each
    "Whole requests of HTTP"
    found = []
    for body in bodies:
        head = (
            f'POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n'
            f'X-Request-Id: {MARK.decode()}\r\nContent-Length: {len(body)}\r\n\r\n'
        )
        before, _, behind = (head.encode() + body).partition(MARK)
        found.append((before, behind))
    return found


def request_id(number: int) -> str:
    "As the server is told it, and writes it down"
    return f'{number:0{len(MARK)}d}'


class _Line:
    "One connection"

    def __init__(self, client: 'OpenClient'):
        self.client = client
        self.number = -1  # of the request that it waits for
        self.data = b''
        self.unsent = b''
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(BlockingIOError):
            self.socket.connect(client.address)
        client.selector.register(self.socket, selectors.EVENT_WRITE, self)
        self.writes = True  # whether it waits until it may write

    def ask(self, number: int, data: bytes) -> None:
        self.number = number
        self.data = b''
        self.unsent = data
        if not self.writes:
            self.send()

    def send(self) -> None:
        try:
            sent = self.socket.send(self.unsent)
        except BlockingIOError:
            sent = 0
        self.unsent = self.unsent[sent:]
        if bool(self.unsent) != self.writes:
            self.writes = bool(self.unsent)
            event = selectors.EVENT_WRITE if self.writes else selectors.EVENT_READ
            self.client.selector.modify(self.socket, event, self)

    def turn(self) -> None:
        "Go on; raises `OSError` when the connection is gone"
        if self.writes:
            self.send()
            return
        part = self.socket.recv(65536)
        if not part:
            raise ConnectionResetError
        self.data += part
        found = read_answer(self.data)
        if found is not None:
            self.client.answered(self, *found)

    def close(self) -> None:
        self.client.selector.unregister(self.socket)
        self.socket.close()


def read_answer(data: bytes) -> tuple[int, bool] | None:  # None = it is not whole yet
    "Status of an answer, and whether it says when to ask again"
    end = data.find(_HEAD_END)
    if end < 0:
        return None
    head = data[:end].lower()
    place = head.find(b'content-length:')
    length = int(head[place + 15 :].partition(b'\r\n')[0]) if place >= 0 else 0
    if len(data) < end + len(_HEAD_END) + length:
        return None
    return int(head[9:12]), b'\r\nretry-after:' in head


class OpenClient:
    "Sends each request at its moment, on any connection that is free"

    def __init__(
        self,
        address: tuple[str, int],
        requests: list[tuple[bytes, bytes]],  # asked in turns
        moments: np.ndarray,
        most: int,  # connections
        first: int = 0,  # id of the first request
    ):
        self.address = address
        self.first = first
        self.requests = requests
        self.moments = moments.tolist()
        self.most = most
        self.selector = selectors.DefaultSelector()
        self.free: list[_Line] = []
        self.lines: set[_Line] = set()
        self.waiting: deque[int] = deque()  # requests whose moment is over, and no line was free
        n = len(moments)
        self.status = [0] * n
        self.took = [float('nan')] * n
        self.behind = [float('nan')] * n
        self.advised = [False] * n
        self.open = 0  # requests that came and have no answer yet

    def now(self) -> float:
        return time.perf_counter() - self.began

    def ask(self, number: int) -> None:
        "Send a request, or have it wait for a connection"
        if self.free:
            line = self.free.pop()
        elif len(self.lines) < self.most:
            line = _Line(self)
            self.lines.add(line)
        else:
            self.waiting.append(number)
            return
        before, behind = self.requests[number % len(self.requests)]
        self.behind[number] = self.now() - self.moments[number]
        try:
            line.ask(number, before + request_id(self.first + number).encode() + behind)
        except OSError:
            self.lost(line)

    def answered(self, line: _Line, status: int, advised: bool) -> None:
        number, line.number = line.number, -1
        self.status[number] = status
        self.took[number] = self.now() - self.moments[number]
        self.advised[number] = advised
        self.open -= 1
        self.free.append(line)
        if self.waiting:
            self.ask(self.waiting.popleft())

    def lost(self, line: _Line) -> None:
        "A connection is gone, and with it the answer that it waited for"
        self.open -= line.number >= 0
        line.close()
        self.lines.discard(line)
        if line in self.free:
            self.free.remove(line)
        if self.waiting:
            self.ask(self.waiting.popleft())

    def run(self) -> Arrivals:
        "All requests, until the last is answered or given up"
        self.began = time.perf_counter()
        place, n = 0, len(self.moments)
        end = (self.moments[-1] if n else 0.0) + _WAIT
        while (place < n or self.open) and self.now() < end:
            now = self.now()
            while place < n and self.moments[place] <= now:
                self.open += 1
                self.ask(place)
                place += 1
            wait = self.moments[place] - self.now() if place < n else 0.05
            for key, _ in self.selector.select(max(wait, 0.0)):
                try:
                    key.data.turn()
                except OSError:
                    self.lost(key.data)
        for line in list(self.lines):
            line.close()
        columns = (self.moments, self.status, self.took, self.behind, self.advised)
        return Arrivals(*map(np.array, columns))


def main(told: str) -> None:
    "The body of a process of its own: what is sent stands in `told`, JSON"
    found = json.loads(told)
    bodies = Path(found['bodies']).read_bytes().splitlines()
    host, port = found['address']
    requests = make_requests(f'{host}:{port}', found['path'], bodies)
    moments = draw_moments([Stretch(**each) for each in found['stretches']], found['seed'])
    client = OpenClient((host, port), requests, moments, found['most'], found['first'])
    write_arrivals(client.run(), Path(found['file']))


if __name__ == '__main__':
    main(sys.argv[1])
