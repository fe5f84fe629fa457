"""Work on a real Ray cluster of this machine, started once: what a page cannot hold"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlref.core import MlrefError, parse_time
from mlref.ingest import ingest
from mlref.lake import Lake
from mlref.log import LocalLog
from mlref.snapshots import open_snapshot, publish_snapshot
from mlref.task import load_task
from mlref.training_set import training_set
from programs import need_package
from test_second_task import in_two_files

DEEP = os.environ.get('MLREF_DEEP', '0') == '1'
TESTS = Path(__file__).parent
COLUMNS = ('ids', 'cutoff', 'label_time', 'y', 'X')
FLIGHTS = 'mlref.flights.task:flights_task'
STRETCHES = {FLIGHTS: ('2013-01-01', '2013-02-01'), 'shop:SHOP': ('1997-06-01', '1997-07-01')}
if DEEP:
    STRETCHES = {FLIGHTS: ('2012-12-31', '2014-01-02'), 'shop:SHOP': ('1997-01-01', '1998-07-01')}
ALL = {FLIGHTS: 336_776, 'shop:SHOP': 67_591}


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "Where workers find the second task, too"
    folder = tmp_path_factory.mktemp('ray')
    in_two_files(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope='session')
def cluster(folder):
    need_package('ray')
    import ray

    from mlref.ext.ray_cluster import RayProcess

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join([str(folder), *sys.path]))
        with RayProcess() as process:
            for name, value in process.secret.items():
                patch.setenv(name, value)
            process.connect()
            yield process
            ray.shutdown()


def read_all(task):
    "Every event of a task"
    if task.source is not None:
        return task.source()
    import shop

    return shop.events


@pytest.fixture(scope='session', params=list(STRETCHES))
def backfill(request, cluster, folder):
    "A stretch of a task in a published snapshot, and its table by one process"
    from mlref.ext.ray_backfill import Backfill

    task = load_task(request.param)
    start, end = (parse_time(f'{day}T00:00') for day in STRETCHES[request.param])
    events = read_all(task)
    place = folder / task.name
    log = LocalLog(place / 'log')
    from mlref.consumer import send_events
    from mlref.events import events_between

    send_events(log, 'events', events_between(events, 0, end), task.schema)
    lake = Lake(place / 'lake', task.schema)
    ingest(lake, log, 'events', task.contract, 50_000)
    publish_snapshot(lake, place / 'snapshots')
    lake.close()
    snapshot = open_snapshot(place / 'snapshots')
    alone = training_set(snapshot.events(task.schema), task, start, end)
    assert len(alone) == ALL[request.param] if DEEP else len(alone) > 500
    return Backfill(snapshot, task.address, start, end), alone


def assert_same(table, alone):
    "Equal to the last bit; NaN is a bit pattern as well"
    for name in COLUMNS:
        found = np.ascontiguousarray(getattr(table, name))
        wanted = np.ascontiguousarray(getattr(alone, name))
        assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes(), name


def test_a_table_in_parts_is_the_table_of_one_process(backfill):
    from mlref.ext.ray_backfill import run_backfill

    job, alone = backfill
    assert_same(run_backfill(job), alone)


def test_a_worker_that_is_killed_is_followed_by_another(backfill):
    from mlref.ext.ray_backfill import compute_parts, start_workers

    job, alone = backfill
    first, second = start_workers(job, 2)
    import ray

    pid = ray.get(first.pid.remote())
    os.kill(pid, signal.SIGKILL)
    parts = compute_parts([first, second], job.parts)
    rows = sorted(part.tobytes() for part in parts)
    again = sorted(part.tobytes() for part in compute_parts(start_workers(job, 1), job.parts))
    assert rows == again and sum(map(len, parts)) == len(alone)


STRANGER = """
from mlref.core import MlrefError
from mlref.ext.ray_cluster import connect_ray
import sys
try:
    connect_ray(sys.argv[1])
except MlrefError as error:
    print(error)
"""


def test_a_stranger_is_not_let_in(cluster):
    words = [sys.executable, '-c', STRANGER, cluster.address]
    other = os.environ | {'RAY_AUTH_TOKEN': '0' * 64}
    ran = subprocess.run(words, env=other, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert 'its token in RAY_AUTH_TOKEN' in ran.stdout and len(ran.stdout.splitlines()) == 1


def test_a_cluster_that_is_not_there_is_one_sentence():
    need_package('ray')
    from mlref.ext.ray_cluster import connect_ray

    with pytest.raises(MlrefError, match='start one with ray start --head'):
        connect_ray('ray://127.0.0.1:1')
