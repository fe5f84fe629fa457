"Processes that begin together, and what a side takes while it works"

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peers.serve_machine import MARK, cpu_of, marked, memory_of

HERE = Path(__file__).parent


def start_worker(
    script: str,  # in this folder
    question: dict,
) -> subprocess.Popen:
    "A process that says 'ready', and begins when it is told"
    command = [sys.executable, str(HERE / script), json.dumps(question)]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    return subprocess.Popen(command, **pipes)


def start_workers(
    script: str,  # in this folder
    question: dict,
    count: int,
) -> list[subprocess.Popen]:
    "Processes that are all ready, so that none of them starts while another is asked"
    workers = [start_worker(script, question) for _ in range(count)]
    assert [worker.stdout.readline() for worker in workers] == ['ready\n'] * count
    return workers


def ask_together(
    workers: list[subprocess.Popen],
) -> list[dict]:  # what each said
    "What processes say that begin together"
    for worker in workers:
        _ = worker.stdin.write('go\n')
        worker.stdin.flush()
    return [json.loads(worker.stdout.readline()) for worker in workers]


class Brokers:
    "The mock cluster of Kafka's client library in a process of its own"

    def __init__(self):
        command = [sys.executable, str(HERE / 'outgrow_brokers.py')]
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
        self.process = subprocess.Popen(command, **pipes)
        self.hosts = self.process.stdout.readline().strip()

    def cpu(self) -> float:
        "Seconds of CPU so far"
        return cpu_of(self.process.pid)

    def memory(self) -> float:
        "Resident memory, MB"
        return memory_of(self.process.pid)

    def stop(self) -> None:
        "End it"
        self.process.communicate()


class Watch:
    "What all processes of a mark took: CPU of those that ended too, and memory at most"

    def __init__(self, mark: str):
        self.mark = mark
        self.seconds: dict[int, float] = {}  # process -> CPU, when last seen
        self.begun: dict[int, float] = {}  # the same of those that were there before
        self.memory = 0.0  # MB of all together, at most
        self.stopped = threading.Event()
        self.look()
        self.begun = dict(self.seconds)
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def look(self) -> None:
        pids = marked(self.mark)
        self.seconds |= {pid: cpu_of(pid) or self.seconds.get(pid, 0.0) for pid in pids}
        self.memory = max(self.memory, sum(map(memory_of, pids)))

    def _watch(self) -> None:
        while not self.stopped.wait(0.25):
            self.look()

    def stop(self) -> float:
        "Seconds of CPU since it began"
        self.stopped.set()
        self.thread.join()
        return sum(self.seconds.values()) - sum(self.begun.values())


@contextmanager
def marking(mark: str) -> Iterator[str]:
    "What is started meanwhile carries a mark"
    os.environ[MARK] = mark
    try:
        yield mark
    finally:
        del os.environ[MARK]
