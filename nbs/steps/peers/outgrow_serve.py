"One model behind our own server and on Ray Serve, asked over more and more connections"

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from peers.serve_machine import Server, free_ports, send_load
from peers.serve_peers import OURS, make_home, start_ours, write_bodies

import mlref

HERE = Path(__file__).parent
CHECKOUT = Path(mlref.__file__).parent.parent
CONNECTIONS = (1, 8, 32, 128)


@dataclass(frozen=True)
class Asked:
    "What is asked, and the first right answer"

    home: Path  # a run to serve
    bodies: Path  # one a line
    first: bytes
    p: float
    folder: Path  # where servers work


def prepare_questions(folder: Path) -> Asked:
    "A run to serve, and rows of it as a client writes them"
    home = make_home(CHECKOUT, folder / 'home')
    given = np.load(home / 'rows.npz')
    rows = [[float(str(value)) for value in row] for row in given['X'][:4000]]
    bodies = [OURS.body(row) for row in rows]
    file = write_bodies(bodies, folder / 'bodies.jsonl')
    return Asked(home, file, bodies[0], float(given['p'][0]), folder)


def start_default(asked: Asked) -> Server:
    "`mlref serve` with one worker; no cache, for the rows repeat"
    port = free_ports(3)
    words = ('--workers', '1', '--cache', '0')
    return start_ours('default', CHECKOUT, asked.home, port, asked.folder, *words)


def start_on_ray(asked: Asked, proxy: str) -> Server:
    "The same server as one replica of Ray Serve, behind its proxy `ray`, or `haproxy`"
    port = free_ports(3)
    words = [str(asked.home), str(port), str(asked.folder / f'ray-{port}'), proxy]
    command = [sys.executable, str(HERE / 'serve_ray_ours.py'), *words]
    return Server('Ray Serve', command, port, asked.folder, {'PYTHONPATH': str(CHECKOUT)})


def measure_load(server: Server, asked: Asked, connections: int, seconds: int) -> dict[str, float]:
    "Answers a second, how long they took, CPU of an answer and memory of all processes"
    before = server.cpu()
    load = send_load(server.url + OURS.path, asked.bodies, connections, seconds)
    assert not load.refused + load.broken, json.dumps(vars(load))
    return {
        'rate': load.rate,
        'p50': load.p50,
        'p99': load.p99,
        'cpu': (server.cpu() - before) / load.answers,
        'memory': sum(server.memory()),
        'answers': load.answers,
    }


def measure_server(server: Server, asked: Asked, seconds: int) -> dict[int, dict[str, float]]:
    "Every load once; a first second warms it up"
    started = server.wait_for(OURS.path, asked.first, OURS.is_right(asked.p), 120)
    _ = send_load(server.url + OURS.path, asked.bodies, 8, 1)
    found = {n: measure_load(server, asked, n, seconds) for n in CONNECTIONS}
    server.stop()
    return {n: {**measured, 'start': started} for n, measured in found.items()}
