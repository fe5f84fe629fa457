"What a cache of scores saves, and whether a change of version lets an old score out"

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from urllib.request import urlopen

import numpy as np
from peers.serve_machine import Server


def draw_popular(
    rows: int,  # that there are to ask about
    n: int,  # requests
    seed: int = 0,
) -> list[int]:  # which row each asks about
    "Some are asked about again and again, most seldom: the k-th in turn by 1/k (Zipf)"
    shares = 1 / np.arange(1, rows + 1)
    rng = np.random.default_rng(seed)
    return rng.choice(rng.permutation(rows), size=n, p=shares / shares.sum()).tolist()


def read_gauge(
    server: Server,
    name: str,
) -> float:
    "A number of its page of metrics"
    with urlopen(f'{server.url}/metrics', timeout=10) as page:
        lines = page.read().decode().splitlines()
    return next(float(line.rsplit(' ', 1)[1]) for line in lines if line.startswith(name))


@dataclass(frozen=True)
class Asked:
    "A request and what came back"

    begun: float  # seconds
    ended: float
    row: int
    version: str  # that the answer says
    p: float


class Askers:
    "Clients that ask from threads until they have enough answers; they raise what went wrong"

    def __init__(self, server: Server, path: str, bodies: Sequence[bytes], wanted: Iterable[int]):
        self.server = server
        self.path = path
        self.bodies = bodies
        self.wanted = iter(wanted)
        self.taking = threading.Lock()
        self.found: list[Asked] = []
        self.errors: list[Exception] = []

    def _ask(self) -> None:
        line = HTTPConnection('127.0.0.1', self.server.port, timeout=30)
        try:
            while (row := self._next()) is not None:
                begun = time.perf_counter()
                line.request(
                    'POST', self.path, self.bodies[row], {'Content-Type': 'application/json'}
                )
                answer = json.loads(line.getresponse().read())
                p = answer['outputs'][0]['data'][0]
                ended = time.perf_counter()
                self.found.append(Asked(begun, ended, row, answer['model_version'], p))
        except Exception as error:
            self.errors.append(error)
        finally:
            line.close()

    def _next(self) -> int | None:
        with self.taking:
            return next(self.wanted, None)

    def run(self, clients: int, meanwhile: Callable[[], object]) -> list[Asked]:
        "Answers of all clients; `meanwhile` is called again and again until they have them"
        threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            meanwhile()
        if self.errors:
            raise self.errors[0]
        return self.found


@dataclass(frozen=True)
class Served:
    "A time in which one version alone may answer"

    since: float  # seconds: its loading was confirmed
    until: float  # the next was asked for
    version: str


def count_stale(
    asked: Iterable[Asked],
    served: Sequence[Served],
    scores: Mapping[str, Sequence[float]],  # version -> score of each row
) -> int:
    "Answers of a version that was replaced, or with a score that is not its version's"
    stale = 0
    for each in asked:
        alone = [
            one.version for one in served if one.since <= each.begun and each.ended <= one.until
        ]
        wrong = abs(each.p - scores[each.version][each.row]) > 1e-6
        stale += wrong or any(version != each.version for version in alone)
    return stale


class Swaps:
    "Versions change places, and when each alone was served is noted"

    def __init__(self, swap: Callable[[], str], pause: float = 0.5):  # gives the version loaded
        self.swap = swap
        self.pause = pause
        self.served: list[Served] = []

    def __call__(self) -> None:
        if self.served:
            last = self.served.pop()
            self.served.append(Served(last.since, time.perf_counter(), last.version))
        version = self.swap()
        self.served.append(Served(time.perf_counter(), math.inf, version))
        time.sleep(self.pause)
