"""A fleet that lives: workers 1 → 2 → 1 under the load of Locust, and nothing is dropped"""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlref.capacity import LoadStep, run_load_step
from mlref.fleet import Autoscaler, AutoscalingConfig
from mlref.publisher import ServeOptions
from mlref.serving_state import read_notes, set_workers
from server_fixture import Served, make_home, start_process, wait_gone
from small import FEATURES

POLICY = AutoscalingConfig(
    min_replicas=1,
    max_replicas=2,
    target_ongoing_requests=8.0,
    metrics_interval_s=0.2,
    look_back_period_s=0.6,
    upscale_delay_s=0.4,
    downscale_delay_s=3.0,  # longer than a busy machine keeps the crowd from asking
)


@pytest.fixture
def server(tmp_path):
    "A server of one worker"
    home = tmp_path / 'home'
    versions = make_home(home)
    options = ServeOptions('small:TASK', str(home), str(home / 'served'), port=0, workers=1)
    process, url = start_process(options)
    yield Served(url, home, process.pid, tuple(versions), FEATURES.names)
    process.terminate()
    wait_gone(process.pid)


def busy_seconds(server: Served) -> float:
    "What all workers spent on predictions so far, also those that have gone"
    page = server.call('GET', '/metrics')[1].decode()
    lines = [
        line for line in page.splitlines() if line.startswith('mlref_request_duration_seconds_sum{')
    ]
    return sum(float(line.rsplit(' ', 1)[1]) for line in lines if '/predict' in line)


class Controller:
    "Looks five times a second, and notes every change"

    def __init__(self, server: Served):
        self.changes: list[int] = []
        self.most = 1  # workers that were seen at the same time
        self.scaler = Autoscaler(
            POLICY,
            lambda: busy_seconds(server),
            lambda: len(read_notes(server.folder)),
            self.scale,
        )
        self.folder = server.folder
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def scale(self, n: int) -> None:
        self.changes.append(n)
        set_workers(self.folder, n)

    def run(self) -> None:
        while not self.stopped.wait(POLICY.metrics_interval_s):
            self.scaler.look()
            self.most = max(self.most, self.scaler.running())

    def __enter__(self) -> 'Controller':
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()


# seconds: on a busy machine a second worker takes some to be asked for and to begin
CROWD = 8
FEW = 11


def ask(server: Served, users: int, seconds: int) -> LoadStep:
    bodies = [json.dumps({'entities': [server.visit(number)]}) for number in range(300, 400)]
    return run_load_step(server.url, bodies, users, seconds, server.pid)


def wait_until(right: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not right():
        assert time.monotonic() < until, f'expected {what} within {seconds} s'
        time.sleep(0.05)


def test_workers_follow_the_load_and_nothing_is_dropped(server):
    "Thirty-two users for some seconds; six come while two workers answer, and stay"
    before = len(server.rows())
    with Controller(server) as controller, ThreadPoolExecutor() as pool:
        crowd = pool.submit(ask, server, 32, CROWD)
        wait_until(lambda: controller.most == 2, 'a second worker')
        few = ask(server, 6, FEW)
        many = crowd.result()
        wait_until(lambda: len(read_notes(server.folder)) == 1, 'one worker again')
    assert controller.changes == [2, 1]
    assert many.errors == few.errors == 0
    # what was answered was written down, also by the worker that has gone
    assert len(server.rows()) - before >= 0.8 * (CROWD * many.rate + FEW * few.rate)
