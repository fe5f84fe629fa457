"""Work on a real Ray cluster of this machine, started once: what a page cannot hold"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from mlref.consumer import send_events
from mlref.core import MlrefError, parse_time
from mlref.events import events_between
from mlref.ingest import ingest
from mlref.lake import Lake
from mlref.log import LocalLog
from mlref.snapshots import open_snapshot, publish_snapshot
from mlref.task import load_task
from mlref.training_set import training_set
from programs import need_package
from test_second_task import in_two_files

DEEP = os.environ.get('MLREF_DEEP', '0') == '1'
COLUMNS = ('ids', 'cutoff', 'label_time', 'y', 'X')
FLIGHTS = 'mlref.flights.task:flights_task'
SHOP = 'shop:SHOP'
STRETCHES = {FLIGHTS: ('2013-01-15', '2013-01-18'), SHOP: ('1997-06-01', '1997-07-01')}
if DEEP:
    STRETCHES = {FLIGHTS: ('2012-12-31', '2014-01-02'), SHOP: ('1997-01-01', '1998-07-01')}
ALL = {FLIGHTS: 336_776, SHOP: 67_591}


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

    from mlref.ext.ray_cluster import RayProcess, count_running

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join([str(folder), *sys.path]))
        with RayProcess() as process:
            for name, value in process.secret.items():
                patch.setenv(name, value)
            process.connect()
            yield process
            ray.shutdown()
    assert count_running(process.process.pid) == 0
    assert not process.folder.exists()


def read_all(task):
    "Every event of a task"
    if task.source is not None:
        return task.source()
    import shop

    return shop.events


@pytest.fixture(scope='session', params=list(STRETCHES), ids=['flights', 'shop'])
def backfill(request, cluster, folder):
    "A stretch of a task in a published snapshot, and its table by one process"
    from mlref.ext.ray_backfill import Backfill

    task = load_task(request.param)
    start, end = (parse_time(f'{day}T00:00') for day in STRETCHES[request.param])
    place = folder / task.name
    log = LocalLog(place / 'log')
    send_events(log, 'events', events_between(read_all(task), 0, end), task.schema)
    lake = Lake(place / 'lake', task.schema)
    ingest(lake, log, 'events', task.contract, 50_000)
    publish_snapshot(lake, place / 'snapshots')
    lake.close()
    log.close()
    snapshot = open_snapshot(place / 'snapshots')
    alone = training_set(snapshot.events(task.schema), task, start, end)
    assert len(alone) == ALL[request.param] if DEEP else len(alone) > 500
    return Backfill(snapshot.folder, snapshot.name, task.address, start, end), alone


def version_of(job):
    return load_task(job.task).features.version


def place_rows(job, alone, parts):
    "Vectors of partitions, where their requests stand among all"
    from mlref.ext.ray_backfill import read_input

    X = np.full_like(alone.X, -1)
    own = read_input(job, version_of(job))
    for part, vectors in enumerate(parts):
        X[own.rows(part)] = vectors
    return replace(alone, X=X)


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


def test_a_worker_that_is_killed_at_work_is_followed_by_another(backfill):
    import ray

    from mlref.ext.ray_backfill import start_workers

    job, alone = backfill
    [worker] = start_workers(job, version_of(job), 1)
    pid = ray.get(worker.pid.remote())
    waiting = [worker.compute.remote(part) for part in range(job.parts)]
    ray.get(waiting[0])  # so that it dies with one partition told and others to do
    os.kill(pid, signal.SIGKILL)
    parts = ray.get(waiting)
    assert ray.get(worker.pid.remote()) != pid
    assert_same(place_rows(job, alone, parts), alone)
    ray.kill(worker)


def test_a_worker_that_always_dies_is_one_sentence(cluster):
    import ray

    from mlref.ext.ray_backfill import compute_parts

    @ray.remote(max_restarts=1, max_task_retries=1)
    class Dying:
        def compute(self, part):
            os._exit(1)

    with pytest.raises(MlrefError, match='expected 2 partitions from 1 workers') as caught:
        compute_parts([Dying.remote()], 2)
    assert '\n' not in str(caught.value)


def test_a_worker_says_what_it_lacks(backfill, tmp_path):
    from mlref.ext.ray_backfill import compute_parts, start_workers

    job, _ = backfill
    elsewhere = replace(job, folder=tmp_path)
    no_task = replace(job, task='nowhere:TASK')
    wrong = [
        (job, '0' * 16, 'this worker has'),
        (elsewhere, version_of(job), 'expected'),
        (no_task, version_of(job), 'expected a task at'),
    ]
    for other, version, said in wrong:
        with pytest.raises(MlrefError, match=said) as caught:
            compute_parts(start_workers(other, version, 1), 1)
        assert len(str(caught.value).splitlines()) == 1, str(caught.value)


STRANGER = """
import sys
from mlref.core import MlrefError
from mlref.ext.ray_cluster import connect_ray
try:
    connect_ray(sys.argv[1])
except MlrefError as error:
    print(error)
"""


def ask_to_enter(cluster, **other):
    "A process of its own that tries to join"
    words = [sys.executable, '-c', STRANGER, cluster.address]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    return subprocess.Popen(words, env=os.environ | other, **pipes)


def hear_answer(process):
    "What it was told, line by line"
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error[-2000:]
    return out.splitlines()


def test_a_stranger_is_not_let_in(cluster):
    tokens = ('0' * 64, '')
    asking = [ask_to_enter(cluster, RAY_AUTH_TOKEN=token) for token in tokens]
    for process in asking:
        [said] = hear_answer(process)
        assert 'its token in RAY_AUTH_TOKEN' in said


def test_another_version_is_not_let_in(cluster):
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    true = _internal_kv_get(b'CLUSTER_METADATA', namespace=KV_NAMESPACE_CLUSTER)
    other = json.dumps(json.loads(true) | {'ray_version': '1.0.0'}).encode()
    for value, lines in ((other, 1), (true, 0)):
        _internal_kv_put(b'CLUSTER_METADATA', value, True, namespace=KV_NAMESPACE_CLUSTER)
        said = hear_answer(ask_to_enter(cluster))
        assert len(said) == lines, said
        assert all('use its versions' in line and '1.0.0' in line for line in said)


OWNER = """
import time
from mlref.ext.ray_cluster import RayProcess
cluster = RayProcess()
print(cluster.process.pid, cluster.folder, flush=True)
time.sleep(3600)
"""


def test_a_cluster_ends_with_a_killed_owner():
    need_package('ray')
    from mlref.ext.ray_cluster import count_running

    command = [sys.executable, '-c', OWNER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        leader, folder = owner.stdout.readline().split()
        assert count_running(int(leader)) > 5
        owner.kill()
    while count_running(int(leader)):  # for ever when it stays: the limit of a test ends that
        time.sleep(0.1)
    shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_that_is_not_there_is_one_sentence():
    need_package('ray')
    from mlref.ext.ray_cluster import connect_ray

    with pytest.raises(MlrefError, match='start one with ray start --head'):
        connect_ray('127.0.0.1:1')
