"""The online store on a real Redis and a real Redis Cluster: what a page cannot hold"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import redis

from mlref.core import DAY
from mlref.dead_letters import Outage
from mlref.ext.redis_cluster import ClusterProcesses, copy_store, wait_for_cluster
from mlref.ext.redis_process import RedisProcess
from mlref.ext.redis_records import COMMIT, record_key
from mlref.ext.redis_server import RedisSettings
from mlref.ext.redis_store import RedisStore
from mlref.last_values import check_store, get_online_features, push
from mlref.lmdb_store import LmdbStore
from mlref.records import RecordLayout, seal
from mlref.workspace import Workspace, deliver_events
from programs import need
from small import TASK, make_events
from test_second_task import in_two_files

DEEP = os.environ.get('MLREF_DEEP', '0') == '1'
KILLS = 100 if DEEP else 4
FAILOVERS = 10 if DEEP else 1
LAYOUT = RecordLayout('left/tail', ('delay',), True, 0, '0' * 16, ttl=10**6)
NAMES = [b'left/tail/N%d' % i for i in range(60)]  # on all servers of a cluster


@pytest.fixture(scope='session')
def server():
    need('redis-server')
    with RedisProcess() as process:
        yield process


@pytest.fixture(scope='session')
def cluster():
    need('redis-server')
    with ClusterProcesses() as processes:
        yield processes


@pytest.fixture(params=['server', 'cluster'])
def url(request):
    return request.getfixturevalue(request.param).url


@pytest.fixture
def space(request):
    return ''.join(letter if letter.isalnum() else '-' for letter in request.node.name)


def test_the_check_of_every_store(url, space):
    stores = []

    def make(layout):
        stores.append(RedisStore(url, f'{space}{len(stores)}', more=(layout,)))
        return stores[-1]

    check_store(make)
    stores[0].close()


SHOP = """
import os
import sys
from pathlib import Path

import numpy as np

from mlref.vectors import compute_vectors
from mlref.workspace import Workspace, deliver_events
from shop import *

until = parse_time('1997-03-01')
some = events.filter(pl.col('known_time') < until + 30 * DAY)
spaces = []
for address in ('', sys.argv[1]):
    os.environ['MLREF_ONLINE'] = address
    space = Workspace(Path('redis' if address else 'files') / 'shop-run', SHOP)
    for month in (parse_time('1997-02-01'), until):
        deliver_events(space, some, month)
    spaces.append(space)
files, other = spaces
assert type(other.store).__name__ == 'RedisStore', other.store
assert other.store.names() == sorted(files.store.names())
asked = some.filter(pl.col('known_time') >= until)[:300].with_columns(cutoff='known_time')
X = [compute_vectors(space.store, asked, SHOP.features, None).view(np.int32) for space in spaces]
assert (X[0] == X[1]).all() and X[0].size > 1000
print('equal')
"""


def test_the_shop_by_one_line_of_settings(cluster, tmp_path):
    in_two_files(tmp_path)
    command = [sys.executable, '-c', SHOP, cluster.url]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.stdout.endswith('equal\n'), ran.stderr[-3000:]


def test_features_get_reads_where_the_store_is(server, tmp_path, monkeypatch):
    program = Path(sys.executable).parent / 'mlref'
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parent), prepend=os.pathsep)
    events = make_events()
    said = []
    for name, address in (('files', ''), ('redis', server.url)):
        monkeypatch.setenv('MLREF_ONLINE', address)
        run = tmp_path / name / 'runs' / f'get-{name}'
        workspace = Workspace(run, TASK)
        deliver_events(workspace, events, 3 * DAY)
        workspace.close()
        assert (run / 'online').exists() == (not address)
        _ = (tmp_path / name / 'current').write_text(run.name)
        words = ['features', 'get', 'v100', '--task', 'small:TASK', '--json', '--data']
        ran = subprocess.run(
            [program, *words, run.parents[1]], capture_output=True, text=True, timeout=60
        )
        assert ran.returncode == 0, ran.stderr
        said.append(json.loads(ran.stdout))
    assert said[0] == said[1] and None not in said[0]['features'].values()


PUSH = """
import sys
import numpy as np
from mlref.ext.redis_records import COMMIT, KEEP, APPLY_SLOT, pack_words
from mlref.ext.redis_server import RedisServer
from mlref.last_values import _pack_rows
from mlref.records import RecordLayout

layout = RecordLayout('left/tail', ('delay',), True, 0, '0' * 16, ttl=10**6)
server = RedisServer(sys.argv[1])
own = int(sys.argv[3])
newest = 0
for i in range(400):
    t = np.array([(i * 7919 + own * 104729) % 10007])
    row = _pack_rows(layout, t, t, t.astype(float)[:, None])[0].tobytes()
    commit = 10 + 2 * i + own  # a writer of its own time, which nobody fences
    keys, words = pack_words(sys.argv[2].encode(), {b'left/tail/N1': row}, commit, [True])
    server.run(APPLY_SLOT, keys, [commit - 1, commit, KEEP, *words])
    value = server.read(keys[:1])[0]
    now = int(np.frombuffer(value[24:32], np.int64)[0])
    assert now >= newest, (now, newest)
    newest = now
"""


def test_older_never_replaces_newer_whoever_writes(url, space):
    command = [sys.executable, '-c', PUSH, url, space]
    writers = [subprocess.Popen([*command, str(own)]) for own in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]


WRITE = """
import sys
from mlref.ext.redis_store import RedisStore
from mlref.records import RecordLayout, seal

layout = RecordLayout('left/tail', ('delay',), True, 0, '0' * 16, ttl=10**6)
store = RedisStore(sys.argv[1], sys.argv[2], more=(layout,))
i = store.position()
while True:
    i += 1
    rows = {b'left/tail/N%d' % k: seal(b'%d' % i) for k in range(60)}
    store.write(rows | {b'!position': b'%d' % i})
    print(i, flush=True)
"""


def read_all(store):
    "What lies under every name, and the position, of one moment"
    with store.snapshot() as lookup:
        *records, position = lookup([*NAMES, b'!position'])
    return {bytes(record[:-8]) for record in records}, bytes(position[:-8])


def test_a_killed_writer_leaves_whole_batches(url, space):
    command = [sys.executable, '-c', WRITE, url, space]
    accepted = 0
    for kill in range(KILLS):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(2 + kill % 5):
            accepted = int(writer.stdout.readline())
        time.sleep(0.0007 * (kill % 7))
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split('\n')
        writer.wait()
        accepted = max([accepted, *(int(line) for line in rest[:-1])])
        reader = RedisStore(url, space, readonly=True)
        records, position = read_all(reader)
        assert records == {position}, 'a batch was seen in part'
        assert int(position) >= accepted, 'an accepted batch was lost'
        reader.close()
    writer = RedisStore(url, space, more=(LAYOUT,))  # the dead one's lease is no obstacle
    records, position = read_all(writer)
    assert records == {position}
    assert int(position) - accepted in (0, 1)
    writer.close()


def test_a_batch_cut_short_is_finished_by_the_next_writer(cluster, space):
    store = RedisStore(cluster.url, space, more=(LAYOUT,))
    store.write({name: seal(b'1') for name in NAMES} | {b'!position': b'1'})
    real = store.server.each
    calls = []

    def half(commands):
        calls.append(real(commands[: len(commands) // 2]))
        raise KeyboardInterrupt

    store.server.each = half
    with pytest.raises(KeyboardInterrupt):
        store.write({name: seal(b'2') for name in NAMES} | {b'!position': b'2'})
    store.server.each = real
    assert read_all(store) == ({b'1'}, b'1')  # half of it is there, and nobody sees it
    store.writer.begin()
    assert read_all(store) == ({b'2'}, b'2')
    store.close()


def test_what_nobody_published_is_taken_back(cluster, space):
    store = RedisStore(cluster.url, space, more=(LAYOUT,))
    store.write({name: seal(b'1') for name in NAMES} | {b'!position': b'1'})
    key = record_key(space.encode(), NAMES[0])
    orphan = record_key(space.encode(), b'left/tail/new')
    for place in (key, orphan):  # of a redo that died with its server
        store.server.client.set(place, COMMIT.pack(9) + seal(b'9'))
    store.server.client.set(record_key(space.encode(), NAMES[0], b'p'), COMMIT.pack(1) + seal(b'1'))
    assert read_all(store) == ({b'1'}, b'1')
    store.writer.begin()
    assert store.server.read([orphan]) == [None]
    assert read_all(store) == ({b'1'}, b'1')
    store.close()


def read_on(url, space, stop, wrong, times):
    reader = RedisStore(url, space, readonly=True)
    while not stop.is_set():
        start = time.monotonic()
        records, position = read_all(reader)
        wrong.append(records != {position})
        times.append(time.monotonic() - start)
    reader.close()


def test_no_answer_is_wrong_while_slots_move(cluster, space):
    writer = RedisStore(cluster.url, space, more=(LAYOUT,))
    writer.write({name: seal(b'0') for name in NAMES} | {b'!position': b'0'})
    stop = threading.Event()
    wrong, times = [], []
    reader = threading.Thread(
        target=read_on, args=(cluster.url, space, stop, wrong, times), daemon=True
    )
    reader.start()
    one, two = cluster.nodes[:2]
    mover = threading.Thread(target=cluster.move_slots, args=(one, two, 400))
    mover.start()
    i = 0
    while mover.is_alive():
        i += 1
        writer.write({name: seal(b'%d' % i) for name in NAMES} | {b'!position': b'%d' % i})
    mover.join()
    cluster.move_slots(two, one, 400)
    stop.set()
    reader.join(30)
    assert len(wrong) > 10 and not any(wrong)
    assert read_all(writer) == ({b'%d' % i}, b'%d' % i)
    writer.close()


def find_primary(cluster, slot=12_000):
    "The process that has a slot now"
    for node in cluster.nodes:
        with redis.Redis(port=node.port) as client:
            shards = client.execute_command('CLUSTER', 'SLOTS')
            own = next(each for each in shards if each[0] <= slot <= each[1])
            return next(each for each in cluster.nodes if each.port == own[2][1])
    raise AssertionError('no server answers')


def test_a_primary_dies_and_nothing_accepted_is_lost(cluster, space):
    writer = RedisStore(cluster.url, space, more=(LAYOUT,))
    for round_ in range(FAILOVERS):
        wait_for_cluster(cluster)
        victim = find_primary(cluster)
        longest = 0.0
        for i in range(1, 60):
            if i == 20:
                victim.kill()
            start = time.monotonic()
            value = b'%d' % (1000 * round_ + i)
            writer.write({name: seal(value) for name in NAMES} | {b'!position': value})
            longest = max(longest, time.monotonic() - start)
        records, position = read_all(writer)
        assert (records, position) == ({value}, value)
        assert longest < 12, longest  # patience is 15 s; the cluster's own gap some 2
        victim.start()
    wait_for_cluster(cluster)
    writer.close()


def test_a_store_moves_from_files(cluster, space, tmp_path):
    files = LmdbStore(tmp_path / 'online', more=(LAYOUT,), shards=3)
    keys = [f'N{i}' for i in range(5000)]
    push(files, 'left/tail', keys, np.arange(5000) + 1, np.arange(5000.0)[:, None])
    files.write({b'!position': b'77'})
    store = RedisStore(cluster.url, space, more=(LAYOUT,))
    assert copy_store(files, store) == 5000
    got = [get_online_features(each, ['left/tail'], [keys], 5000) for each in (files, store)]
    assert (got[0].values == got[1].values).all() and (got[0].status == got[1].status).all()
    assert store.position() == 77
    store.close()


def test_a_server_that_stops_and_comes_back_is_waited_for(space):
    need('redis-server')
    with RedisProcess(('--appendonly', 'yes', '--appendfsync', 'always')) as process:
        store = RedisStore(process.url, space, more=(LAYOUT,))
        store.write({name: seal(b'1') for name in NAMES} | {b'!position': b'1'})
        process.kill()
        later = threading.Timer(0.5, process.start)
        later.start()
        store.write({name: seal(b'2') for name in NAMES} | {b'!position': b'2'})
        assert read_all(store) == ({b'2'}, b'2')
        later.join()
        process.kill()
        store.server.settings = RedisSettings(patience=0.2)
        with pytest.raises(Outage, match='start it, or correct its address'):
            store.position()
        process.start()


def test_the_password_is_never_told(space):
    need('redis-server')
    with RedisProcess(('--requirepass', 'open-sesame')) as process:
        with pytest.raises(Outage) as told:
            RedisStore(process.url.replace('//', '//:closed-sesame@'), space)
        assert 'sesame' not in str(told.value)
        assert 'correct the user and the password' in str(told.value)
    with pytest.raises(Exception, match='scheme') as told:
        RedisStore('http://:open-sesame@host', space)
    assert 'sesame' not in str(told.value)


FAIL = """
import sys
from concurrent.futures import ProcessPoolExecutor

from mlref.ext.redis_process import RedisProcess


def fail():
    server = RedisProcess()
    print(server.process.pid, server.folder, flush=True)
    raise RuntimeError('the page fails')


if sys.argv[1] == 'pool':
    with ProcessPoolExecutor(1) as pool:
        pool.submit(fail).result()
fail()
"""


@pytest.mark.parametrize('where', ['alone', 'pool'])
def test_no_server_outlives_an_interpreter_that_fails(where):
    need('redis-server')
    command = [sys.executable, '-c', FAIL, where]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 1 and 'the page fails' in ran.stderr
    pid, folder = ran.stdout.split()
    assert not Path('/proc', pid).exists() and not Path(folder).exists()


def test_the_fixture_is_stopped_by_its_own_process():
    need('redis-server')
    with RedisProcess() as process:
        alive = process.process.pid
        assert Path(f'/proc/{alive}').exists()
    assert not Path(f'/proc/{alive}').exists()
