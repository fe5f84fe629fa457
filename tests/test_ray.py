"""Work on a real Ray cluster of this machine, started once: what a page cannot hold"""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from threading import Event, Lock, Thread

import numpy as np
import pytest

from mlref.capacity import LoadStep, request_bodies, run_load_step
from mlref.consumer import send_events
from mlref.core import DAY, MlrefError, parse_time
from mlref.edges import find_program
from mlref.events import events_between
from mlref.ingest import ingest
from mlref.lake import Lake
from mlref.log import LocalLog
from mlref.results import result_row, write_results
from mlref.snapshots import open_snapshot, publish_snapshot
from mlref.task import load_task, select_requests
from mlref.training_set import training_set
from programs import need_package
from test_second_task import in_two_files

RESULTS = Path(__file__).resolve().parent.parent / 'reports' / 'results'
DEEP = os.environ.get('MLREF_DEEP', '0') == '1'
COLUMNS = ('ids', 'cutoff', 'label_time', 'y', 'X')
FLIGHTS = 'mlref.flights.task:flights_task'
SHOP = 'shop:SHOP'
STRETCHES = {FLIGHTS: ('2013-01-15', '2013-01-18'), SHOP: ('1997-06-01', '1997-07-01')}
if DEEP:
    STRETCHES = {FLIGHTS: ('2012-12-31', '2014-01-02'), SHOP: ('1997-01-01', '1998-07-01')}
SERVED = {FLIGHTS: ('2013-01-15', '2013-01-17'), SHOP: ('1997-06-01', '1997-06-20')}
ALL = {FLIGHTS: 336_776, SHOP: 67_591}
TABLES = [*STRETCHES] if DEEP else [SHOP]  # the flights are those of the pages and of the guide


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    "Where workers find the second task, too"
    folder = tmp_path_factory.mktemp('ray')
    in_two_files(folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope='session')
def balanced():
    "Settings that put Ray Serve behind HAProxy, where that is installed"
    need_package('ray')
    from mlref.ext.ray_cluster import free_ports
    from mlref.ext.ray_serve import haproxy_settings

    try:
        program = find_program('haproxy')
    except MlrefError:
        yield {}
        return
    metrics, statistics = free_ports(2)
    with tempfile.TemporaryDirectory() as short:  # that of pytest is too long for a socket
        yield haproxy_settings(program, Path(short), (metrics, statistics))


@pytest.fixture(scope='session')
def cluster(folder, balanced):
    need_package('ray')
    import ray

    from mlref.ext.ray_cluster import RayProcess, count_running

    settings = {'RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S': '0.5'}
    settings |= {'RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S': '2'}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join([str(folder), *sys.path]))
        with RayProcess(settings=settings | balanced) as process:
            for name, value in process.secret.items():
                patch.setenv(name, value)
            process.connect()
            yield process
            ray.shutdown()
    assert count_running(process.process.pid) == 0
    assert not process.folder.exists()


ALONE: dict[str, float] = {}  # seconds that one process took for the table of a task


def read_all(task):
    "Every event of a task"
    if task.source is not None:
        return task.source()
    import shop

    return shop.events


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


@pytest.fixture(scope='session')
def strangers(cluster):
    "Two that try to join, with another token and with none; to say no takes Ray half a minute"
    return [ask_to_enter(cluster, RAY_AUTH_TOKEN=token) for token in ('0' * 64, '')]


@pytest.mark.usefixtures('strangers')
def test_a_cluster_is_there_while_strangers_ask(cluster):
    import ray

    assert ray.get(ray.remote(lambda: os.getpid()).remote()) != os.getpid()


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


@pytest.fixture(scope='session', params=TABLES, ids=lambda task: task.partition(':')[0])
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
    begun = time.perf_counter()
    alone = training_set(snapshot.events(task.schema), task, start, end)
    ALONE[request.param] = time.perf_counter() - begun
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


WORKERS = 2


def record_backfill(alone, found, seconds):
    "What the whole year took, by one process and on the cluster"
    differ = (alone.X.view(np.int32) != found.X.view(np.int32)).sum() + (
        alone.ids != found.ids
    ).sum()
    one, more = seconds
    rows = [
        result_row('rows of the year', len(found), '', '== 336776', len(alone)),
        result_row('values that differ from one process', differ, '', '== 0', found.X.size),
        result_row('one process', one, 's', n=len(alone)),
        result_row(f'Ray, {WORKERS} workers', more, 's', n=len(alone)),
        result_row(f'Ray, {WORKERS} workers: times one process', more / one, '', n=len(alone)),
    ]
    write_results(RESULTS, 'backfill', 'MLREF_DEEP=1 pytest tests/test_ray.py', rows)


def test_a_table_in_parts_is_the_table_of_one_process(backfill):
    from mlref.ext.ray_backfill import run_backfill

    job, alone = backfill
    begun = time.perf_counter()
    found = run_backfill(job, workers=WORKERS)
    seconds = time.perf_counter() - begun
    assert_same(found, alone)
    if DEEP and job.task == FLIGHTS:
        record_backfill(alone, found, (ALONE[job.task], seconds))


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


def with_labels(rows):
    "Rows with made-up labels, since few are known at the end of a stretch; bits are compared"
    y = (np.arange(len(rows)) % 3 == 0).astype(np.float32)
    return replace(rows, y=y, label_time=rows.cutoff)


def torch_job(place, alone, epochs):
    "The rows of a stretch as a training job: every other one to stop on"
    from mlref.distributed import TrainJob, write_job
    from mlref.training_state import TrainConfig

    rows = with_labels(alone)
    even = np.arange(len(rows)) % 2 == 0
    job = TrainJob(TrainConfig(epochs=epochs, batch=64), width=16, every=5)
    return write_job(place, job, rows.take(even), rows.take(~even))


def curve_of(folder):
    return json.loads((folder / 'report.json').read_text())['history']


def kill_one_rank(cluster, folder, killed):
    "As soon as there is a checkpoint, and others to come"
    from mlref.checkpoint import load_checkpoint
    from mlref.ext.ray_cluster import list_session

    while not (found := load_checkpoint(folder / 'checkpoints')):
        time.sleep(0.02)
    ranks = [each for each in list_session(cluster.process.pid) if 'RayTrainW' in each.name]
    os.kill(ranks[-1].pid, signal.SIGKILL)
    killed.append((found.step, len(ranks)))


@pytest.mark.skipif(not DEEP, reason='the page of Ray Train does it; set MLREF_DEEP=1')
def test_a_fit_whose_process_is_killed_ends_with_the_bits_of_torchrun(backfill, cluster, tmp_path):
    from mlref.distributed import train_distributed
    from mlref.ext.ray_train import train_on_ray

    _, alone = backfill
    whole = torch_job(tmp_path / 'whole', alone, 6)
    wanted = train_distributed(whole)
    broken = torch_job(tmp_path / 'broken', alone, 6)
    killed = []
    killer = Thread(target=kill_one_rank, args=(cluster, broken, killed))
    killer.start()
    found = train_on_ray(broken)
    killer.join()
    [(step, ranks)] = killed
    assert ranks == 2 and 0 < step < 6 * len(np.load(whole / 'fit' / 'y.npy')) // 128
    assert found.version == wanted.version
    assert curve_of(broken) == curve_of(whole)
    assert len(list((broken / 'checkpoints').iterdir())) > 0


def make_run(home, address):
    "A run to serve: a store, a registry, its champion; and rows that it may be asked about"
    from mlref.contracts import validate
    from mlref.lmdb_store import LmdbStore
    from mlref.materialize import apply_events
    from mlref.promotion import promote
    from mlref.recipes import fit_recipe
    from mlref.registry import Registry, TrainingRun, register_model
    from mlref.tracking_store import local_uri

    task = load_task(address)
    start, end = (parse_time(f'{day}T00:00') for day in SERVED[address])
    events = validate(events_between(read_all(task), start - 9 * DAY, end), task.contract).good
    store = LmdbStore(home / 'online', task.features)
    apply_events(store, events)
    store.close()
    labelled = with_labels(training_set(events, task, start, end))
    registry = Registry(home / 'registry', local_uri(home / 'registry'), name=task.name)
    version = register_model(
        registry, fit_recipe('logistic', labelled, labelled), TrainingRun('test'), task.features
    )
    promote(registry, version, end, 'made for tests')
    return task.name, labelled.X[:40]


@pytest.fixture(scope='session')
def serving(cluster, folder):
    "Both tasks on Ray Serve: what runs, and rows of each"
    from ray import serve

    from mlref.ext.ray_cluster import free_ports
    from mlref.ext.ray_serve import RayServing, serve_on_ray
    from mlref.fleet import AutoscalingConfig
    from mlref.publisher import ServedRun, ServeOptions

    homes = {address: folder / f'home-{number}' for number, address in enumerate(SERVED)}
    (folder / 'registry').mkdir()
    for home in homes.values():  # one registry: its tables take longer than its models
        home.mkdir()
        (home / 'registry').symlink_to(folder / 'registry')
    rows = dict(make_run(home, address) for address, home in homes.items())
    first, second = homes.items()
    options = ServeOptions(
        first[0],
        str(first[1]),
        str(first[1] / 'served'),
        port=free_ports(1)[0],
        cache=0,
        also=(ServedRun(second[0], str(second[1])),),
    )
    scaling = AutoscalingConfig(
        max_replicas=2,
        target_ongoing_requests=2,
        look_back_period_s=2,
        upscale_delay_s=1,
        downscale_delay_s=2,
    )
    found = RayServing(options, scaling, cpus=0.2)
    serve_on_ray(found)
    yield found, rows
    serve.delete(found.name)


def json_tensor(X):
    data = [None if np.isnan(value) else float(value) for value in X.ravel()]
    return {'name': 'X', 'datatype': 'FP32', 'shape': list(X.shape), 'data': data}


def binary_tensor(X):
    "A request of the binary extension: its headers, its body"
    about = {'name': 'X', 'datatype': 'FP32', 'shape': list(X.shape)}
    about['parameters'] = {'binary_data_size': X.nbytes}
    outputs = [{'name': 'p', 'parameters': {'binary_data': True}}]
    head = json.dumps({'inputs': [about], 'outputs': outputs}).encode()
    headers = {'content-type': 'application/octet-stream'}
    return headers | {'inference-header-content-length': str(len(head))}, head + X.tobytes()


def questions(name, X):
    "Requests of the Open Inference Protocol, good and bad"
    model = f'/v2/models/{name}'
    infer = f'{model}/infer'
    whole = {'id': 'a', 'inputs': [json_tensor(X)]}
    headers, body = binary_tensor(X)
    wrong = json_tensor(X[:, :-1])
    for path in ('/v2', model, f'{model}/ready', f'{model}/config', '/v2/models/nobody'):
        yield 'GET', path, {}, None
    yield 'POST', infer, {}, json.dumps(whole).encode()
    yield 'POST', infer, {}, json.dumps({'inputs': [json_tensor(X[:1])]}).encode()
    yield 'POST', infer, headers, body
    yield 'POST', infer, headers, body[:-3]
    yield 'POST', infer, {}, json.dumps({'inputs': [wrong]}).encode()
    yield 'POST', infer, {}, b'{"inputs": '
    yield 'POST', infer, {'content-type': 'text/plain'}, b'x'
    yield 'POST', f'{model}/versions/none/infer', {}, json.dumps(whole).encode()
    yield 'GET', infer, {}, None


def ask_replica(connection, method, path, headers, body):
    "As `LocalClient.ask`, through the proxy"
    named = {'content-type': 'application/json', **headers}
    connection.request(method, path, body, named)
    answer = connection.getresponse()
    data = answer.read()
    is_json = answer.headers.get('content-type', '').startswith('application/json')
    return answer.status, json.loads(data) if is_json and data else data


def test_replicas_answer_as_the_embedded_server_does(serving):
    from mlref.serve import LocalClient
    from mlref.workers import open_worker

    running, rows = serving
    embedded = LocalClient(open_worker(running.options, 9))
    connection = HTTPConnection(*running.address, timeout=30)
    statuses = set()
    for name, X in rows.items():
        for method, path, headers, body in questions(name, X):
            wanted = embedded.ask(method, path, b'' if body is None else body, headers)
            assert ask_replica(connection, method, path, headers, body) == wanted, path
            statuses.add(wanted[0])
    connection.close()
    embedded.close()
    assert {200, 400, 404, 405, 415} <= statuses


@dataclass
class Asked:
    "What became of the requests of some clients"

    right: int = 0
    wrong: int = 0
    lost: int = 0  # An error, or a connection that broke
    longest: float = 0.0  # Seconds of one


class Load:
    "Clients that ask all the time, each on a connection that it keeps"

    def __init__(self, address, path, questions, pause=0.0):
        self.address = address
        self.path = path
        self.questions = questions  # Body -> scores
        self.pause = pause
        self.found = Asked()
        self.stopped = Event()
        self.lock = Lock()

    def ask(self):
        connection = HTTPConnection(*self.address, timeout=30)
        for body, scores in itertools.cycle(self.questions):
            if self.stopped.wait(self.pause):
                return
            begun = time.perf_counter()
            try:
                status, said = ask_replica(connection, 'POST', self.path, {}, body)
            except (OSError, HTTPException):
                status, said = 0, None
                connection.close()
            with self.lock:
                self.note(status, said, scores, time.perf_counter() - begun)

    def note(self, status, said, scores, seconds):
        self.found.longest = max(self.found.longest, seconds)
        if status != 200:
            self.found.lost += 1
        elif said['outputs'][0]['data'] == scores:
            self.found.right += 1
        else:
            self.found.wrong += 1

    @contextmanager
    def clients(self, count):
        threads = [Thread(target=self.ask, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield self.found
        finally:
            self.stopped.set()
            for thread in threads:
                thread.join(40)


def replicas_of(running):
    "Processes of the replicas that answer"
    from mlref.serving_state import read_notes

    notes = read_notes(Path(running.options.folder))
    return {note.pid for note in notes} - {os.getpid()}


def wait_until(holds, seconds=60):
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds
        time.sleep(0.1)
    return time.monotonic() - begun


def known_answers(running, name, X):
    "Requests, each with the scores of the server before any load"
    connection = HTTPConnection(*running.address, timeout=30)
    found = []
    for i in range(len(X)):
        body = json.dumps({'inputs': [json_tensor(X[i : i + 1])]}).encode()
        _, said = ask_replica(connection, 'POST', f'/v2/models/{name}/infer', {}, body)
        found.append((body, said['outputs'][0]['data']))
    connection.close()
    assert len({scores[0] for _, scores in found}) > 10  # a mixed-up answer would show
    return found


def entities_of(address, count=100):
    "What users of a task ask: some of those that are scored in its stretch"
    task = load_task(address)
    start, end = (parse_time(f'{day}T00:00') for day in SERVED[address])
    events = events_between(read_all(task), start - 9 * DAY, end)
    return request_bodies(task, select_requests(task, events, start, end)[:count])


@dataclass(frozen=True)
class Scaled:
    "What a fleet did while users came and went"

    up: float  # Seconds from the first of many users to two replicas
    down: float  # From the last of them to one replica
    steps: tuple[LoadStep, ...]  # What the many got, and the one that stayed


def scale_under_locust(running, bodies):
    "Many users, and one more when there are two replicas; it stays until there is one again"
    url = f'http://{running.address[0]}:{running.address[1]}'
    many, few = ((16, 30), (1, 60)) if DEEP else ((8, 15), (1, 25))
    begun = time.monotonic()
    with ThreadPoolExecutor() as pool:  # Locust is a process of its own; a thread waits for it
        crowd = pool.submit(run_load_step, url, bodies, *many, 0)
        wait_until(lambda: len(replicas_of(running)) == 2)
        grown = time.monotonic()
        last = pool.submit(run_load_step, url, bodies, *few, 0)
        found = [crowd.result()]
        left = time.monotonic()
        wait_until(lambda: len(replicas_of(running)) == 1)
        shrunk = time.monotonic()
        assert not last.done()  # somebody asked while a replica went
        found.append(last.result())
    return Scaled(grown - begun, shrunk - left, tuple(found))


def record_scaling(found):
    "What became of the requests while replicas came and went"
    lost = sum(step.errors for step in found.steps)
    rows = [result_row('requests that were not answered', lost, '', '== 0')]
    rows += [
        result_row(f'answers a second, users: {step.users}', step.rate, '1/s')
        for step in found.steps
    ]
    rows += [
        result_row('from the first user to two replicas', found.up, 's'),
        result_row('from the last of many users to one replica', found.down, 's'),
    ]
    write_results(RESULTS, 'ray_scaling', 'MLREF_DEEP=1 pytest tests/test_ray.py', rows)


def test_replicas_follow_the_users_of_locust_and_nothing_is_dropped(serving):
    running, _ = serving
    wait_until(lambda: len(replicas_of(running)) == 1)
    found = scale_under_locust(running, entities_of(running.options.task))
    print(found)
    assert [step.errors for step in found.steps] == [0, 0]
    assert all(step.rate > 10 for step in found.steps)
    if DEEP:
        record_scaling(found)


def test_a_replica_may_die_under_load(serving):
    running, rows = serving
    name, X = next(iter(rows.items()))
    path = f'/v2/models/{name}/infer'
    known = known_answers(running, name, X)
    with Load(running.address, path, known).clients(8) as found:
        wait_until(lambda: len(replicas_of(running)) == 2)
        time.sleep(1)
        grown = replace(found)
        victim = max(replicas_of(running))
        os.kill(victim, signal.SIGKILL)
        again = wait_until(lambda: len(replicas_of(running) - {victim}) == 2)
    assert (grown.wrong, grown.lost) == (0, 0) and grown.right > 100
    print(f'2 replicas again after {again:.1f} s: {found}')
    assert found.wrong == 0
    assert found.lost <= 16 and found.longest < 10  # at most what was on its way, and once more


def test_a_stranger_is_not_let_in(strangers):
    for process in strangers:
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
