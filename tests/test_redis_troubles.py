"""Redis in trouble: one sentence that says what to do, and nothing accepted is lost"""

import signal
import subprocess
import sys
import time

import pytest
import redis

from mlref.dead_letters import Outage
from mlref.edges import child_environment
from mlref.ext.redis_cluster import ClusterProcesses, wait_for_cluster
from mlref.ext.redis_process import RedisProcess, free_port
from mlref.ext.redis_server import RedisSettings
from mlref.ext.redis_store import RedisStore
from mlref.followers import ServeOptions, encode_options
from mlref.records import seal
from programs import need
from server_fixture import CHILD
from test_redis import LAYOUT, NAMES, read_all

HASTY = RedisSettings(timeout=1.0, patience=3.0, lease=0.2)


def batch(i):
    "A record under every name, and the position"
    return {name: seal(b'%d' % i) for name in NAMES} | {b'!position': b'%d' % i}


@pytest.fixture(scope='module')
def own_cluster():
    "A cluster that is stopped and filled here"
    need('redis-server')
    with ClusterProcesses() as processes:
        yield processes


def test_half_a_cluster_takes_nothing_and_loses_nothing(own_cluster):
    store = RedisStore(own_cluster.url, 'half', more=(LAYOUT,), settings=HASTY)
    store.write(batch(1))
    halves = own_cluster.nodes[1], own_cluster.nodes[2]  # two of three primaries: no majority
    for node in halves:
        node.process.send_signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        with pytest.raises(Outage) as told:
            store.write(batch(2))
        assert time.monotonic() - start < 15
        said = str(told.value)
        assert said.startswith('expected Redis at redis://127.0.0.1:') and '\n' not in said
        time.sleep(2)
        with pytest.raises(Outage, match='start'):
            RedisStore(own_cluster.url, 'half', readonly=True, settings=HASTY)
    finally:
        for node in halves:
            node.process.send_signal(signal.SIGCONT)
    wait_for_cluster(own_cluster)
    store.close()
    again = RedisStore(own_cluster.url, 'half', more=(LAYOUT,))
    records, position = read_all(again)
    assert records == {position} and position in (
        b'1',
        b'2',
    )  # the accepted one, or all of the next
    again.write(batch(3))
    assert read_all(again) == ({b'3'}, b'3')
    again.close()


def limit_memory(nodes, size):
    for node in nodes:
        with redis.Redis(port=node.port) as client:
            client.config_set('maxmemory', size)


@pytest.mark.parametrize('kind', ['server', 'cluster'])
def test_full_memory_takes_nothing_and_loses_nothing(kind, request):
    need('redis-server')
    own = RedisProcess() if kind == 'server' else request.getfixturevalue('own_cluster')
    nodes = [own] if kind == 'server' else own.nodes
    store = RedisStore(own.url, 'full', more=(LAYOUT,), settings=HASTY)
    store.write(batch(1))
    limit_memory(nodes, '100kb')
    with pytest.raises(Outage, match=r'its memory is full \(maxmemory\)') as told:
        store.write(batch(2))
    assert 'give the server more memory, and send it again' in str(told.value)
    assert read_all(store) == ({b'1'}, b'1')
    limit_memory(nodes, '0')
    store.write(batch(2))
    assert read_all(store) == ({b'2'}, b'2')
    store.close()
    if kind == 'server':
        own.stop()


@pytest.mark.parametrize('trouble', ['away', 'password'])
def test_a_server_does_not_start_without_its_store(trouble, served, tmp_path):
    need('redis-server')
    words = ('--requirepass', 'open-sesame') if trouble == 'password' else ()
    with RedisProcess(words) as process:
        port = process.port if words else free_port()
        url = f'redis://:closed-sesame@127.0.0.1:{port}'
        home = tmp_path / 'home'
        home.mkdir()
        (home / 'registry').symlink_to(served.home / 'registry')
        (home / 'settings.ini').write_text(f'[DEFAULT]\nonline = {url}\n')
        options = ServeOptions('small:TASK', str(home), str(tmp_path / 'served'), port=0)
        command = [sys.executable, '-c', CHILD, encode_options(options), '1']
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=child_environment(threads=1)
        )
    wanted = {'away': 'start it, or correct', 'password': 'correct the user and the password'}
    lines = [line for line in ran.stderr.splitlines() if line.startswith('mlref: expected Redis')]
    assert ran.returncode != 0 and lines and wanted[trouble] in lines[0]
    assert 'sesame' not in ran.stderr + ran.stdout
