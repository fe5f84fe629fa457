"""Redis in trouble: one sentence that says what to do, and nothing accepted is lost"""

import itertools
import signal
import subprocess
import sys
import threading
import time

import pytest
import redis

from mlref.core import MlrefError
from mlref.dead_letters import Outage
from mlref.edges import child_environment
from mlref.ext import redis_server
from mlref.ext.redis_cluster import ClusterProcesses, wait_for_cluster
from mlref.ext.redis_process import RedisProcess, free_port
from mlref.ext.redis_server import RedisServer, RedisSettings, open_client
from mlref.ext.redis_store import RedisStore
from mlref.last_values import check_store
from mlref.publisher import ServeOptions, encode_options
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


FORGETFUL = (
    'allkeys-lru',
    'allkeys-random',
    'volatile-lru',
    'volatile-lfu',
    'volatile-random',
    'volatile-ttl',
)


def test_a_server_that_may_forget_holds_no_store():
    need('redis-server')
    with RedisProcess() as process, redis.Redis(port=process.port) as client:
        for policy in FORGETFUL:
            client.config_set('maxmemory-policy', policy)
            with pytest.raises(MlrefError, match=f'{policy} forgets names.*set it to noeviction'):
                RedisStore(process.url, 'forgetful', more=(LAYOUT,))
            open_client(process.url, RedisSettings(keeps=False)).close()  # but scores
        client.config_set('maxmemory-policy', 'noeviction')
        RedisStore(process.url, 'forgetful', more=(LAYOUT,)).close()


def wait_for_names(cluster):
    "Until a client is told of every server; of a new replica it is some moments later"
    until = time.monotonic() + 20
    found = []
    while len(found) < len(cluster.nodes):
        assert time.monotonic() < until, found
        server = RedisServer(cluster.url)
        found = server.client.get_nodes()
        server.close()
        time.sleep(0.05)


@pytest.mark.parametrize('place', [1, 5], ids=['a primary', 'a replica'])
def test_one_server_of_a_cluster_that_may_forget_is_told(place, own_cluster):
    wait_for_names(own_cluster)
    node = own_cluster.nodes[place]
    with redis.Redis(port=node.port) as client:
        client.config_set('maxmemory-policy', 'volatile-ttl')
        try:
            with pytest.raises(MlrefError, match=f'redis://127.0.0.1:{node.port} to keep what'):
                RedisStore(own_cluster.url, 'forgetful', more=(LAYOUT,))
        finally:
            client.config_set('maxmemory-policy', 'noeviction')


def role_of(node):
    with redis.Redis(port=node.port) as client:
        return client.info('replication')['role']


def test_a_cluster_whose_replica_is_away_is_opened(own_cluster):
    away = next(node for node in own_cluster.nodes[1:] if role_of(node) == 'slave')
    away.kill()
    store = RedisStore(own_cluster.url, 'replica-away', more=(LAYOUT,), settings=HASTY)
    store.write(batch(1))
    assert read_all(store) == ({b'1'}, b'1')
    store.close()
    away.start()
    wait_for_cluster(own_cluster)


@pytest.mark.parametrize(('kind', 'number'), [('server', 99), ('cluster', 1)])
def test_a_database_that_is_not_there_is_one_sentence(kind, number, request):
    need('redis-server')
    own = RedisProcess() if kind == 'server' else request.getfixturevalue('own_cluster')
    with pytest.raises(Outage, match='leave the number behind the / out'):
        RedisStore(f'{own.url}/{number}', 'numbered')
    if kind == 'server':
        RedisStore(f'{own.url}/3', 'numbered').close()
        own.stop()


@pytest.mark.parametrize('kind', ['server', 'cluster'])
def test_a_version_that_is_too_old_is_one_sentence(kind, request, monkeypatch):
    need('redis-server')
    own = RedisProcess() if kind == 'server' else request.getfixturevalue('own_cluster')
    monkeypatch.setattr(redis_server, 'VERSION', (99, 0))  # then the one that is here is too old
    with pytest.raises(
        MlrefError, match=r'expected Redis 99.0 or later at .*, got \d+\.\d+.*later'
    ):
        RedisStore(own.url, 'old')
    if kind == 'server':
        own.stop()


def test_a_sentinel_is_told_apart(tmp_path):
    need('redis-server')
    with RedisProcess() as process:
        config = tmp_path / 'sentinel.conf'
        config.write_text(f'sentinel monitor main 127.0.0.1 {process.port} 1\n')
        port = free_port()
        command = [process.program, config, '--sentinel', '--port', str(port)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sentinel:
            url = f'redis://127.0.0.1:{port}'
            until = time.monotonic() + 20
            said = ''
            while 'Sentinel' not in said and time.monotonic() < until:
                with pytest.raises(MlrefError) as told:
                    RedisStore(url, 'watched')
                said = str(told.value)
            sentinel.terminate()
    assert 'got a Sentinel; give the address of the primary' in said


@pytest.fixture(scope='module')
def encrypted(tmp_path_factory):
    "A Redis with an encrypted port beside the other: both, and what signed its certificate"
    need('redis-server')
    place = tmp_path_factory.mktemp('tls')
    key, certificate = place / 'key.pem', place / 'certificate.pem'
    names = ['-subj', '/CN=127.0.0.1', '-addext', 'subjectAltName=IP:127.0.0.1', '-days', '2']
    made = ['req', '-x509', '-newkey', 'rsa:2048', '-nodes', *names]
    command = [need('openssl'), *made, '-keyout', key, '-out', certificate]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    options = ['--tls-port', str(port), '--tls-auth-clients', 'no', '--tls-key-file', str(key)]
    files = ['--tls-cert-file', str(certificate), '--tls-ca-cert-file', str(certificate)]
    with RedisProcess([*options, *files]) as process:
        yield process.port, port, certificate


def test_a_server_whose_certificate_is_known_holds_a_store(encrypted):
    _, port, certificate = encrypted
    url = f'rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}'
    made = []

    def make_store(layout):
        made.append(RedisStore(url, f'encrypted{len(made)}', more=(layout,)))
        return made[-1]

    check_store(make_store)
    for store in made:
        store.close()


def test_encryption_that_is_not_to_be_had_is_one_sentence(encrypted, tmp_path):
    plain, port, certificate = encrypted
    missing = f'{port}?ssl_ca_certs={tmp_path / "nothing.pem"}'
    for place in (f'{plain}?ssl_ca_certs={certificate}', port, missing):
        with pytest.raises(Outage, match='to answer with encryption, .*ssl_ca_certs=FILE$'):
            open_client(f'rediss://127.0.0.1:{place}', HASTY)


def test_a_server_that_still_reads_its_data_is_waited_for():
    need('redis-server')
    words = ('--appendonly', 'yes', '--appendfsync', 'always')
    with RedisProcess(words) as process:
        store = RedisStore(process.url, 'slow', more=(LAYOUT,))
        store.write(batch(1))
        store.close()
        with redis.Redis(port=process.port) as client, client.pipeline(False) as pipe:
            for i in range(12_000):  # it answers once in a thousand
                pipe.set(f'other{i}', i)
            pipe.execute()
        process.kill()
        process.options = (*words, '--key-load-delay', '250')  # microseconds
        starting = threading.Thread(target=process.start)
        starting.start()
        said = wait_for_sentence(process.url, 'to have read its data')
        assert said.endswith('wait until it has, and start this again')
        store = RedisStore(process.url, 'slow', more=(LAYOUT,))  # and with patience it is there
        assert read_all(store) == ({b'1'}, b'1')
        store.close()
        starting.join()


def wait_for_sentence(url, words, seconds=15):
    "What is said of a server, as soon as these words are in it"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            RedisServer(url, RedisSettings(patience=0)).read([b'other1'])
        except Outage as error:
            if words in str(error):
                return str(error)
    raise AssertionError(f'nothing said {words!r}')


@pytest.mark.parametrize('kind', ['server', 'cluster'])
def test_clocks_of_hosts_that_differ_change_nothing(kind, request, monkeypatch):
    need('redis-server')
    own = RedisProcess() if kind == 'server' else request.getfixturevalue('own_cluster')
    real = time.time
    skews = itertools.cycle([0, -86_400, 3600, 86_400])  # every look at the clock is another host's
    monkeypatch.setattr(time, 'time', lambda: real() + next(skews))
    made = []

    def make(layout):
        made.append(RedisStore(own.url, f'clocks{len(made)}', more=(layout,)))
        return made[-1]

    check_store(make)
    first = RedisStore(own.url, 'clocks', more=(LAYOUT,), settings=HASTY)
    first.write(batch(1))
    first.writer.token = b'another-host:1:' + b'0' * 16  # who lives there is not known here
    first.server.client.set(first.space.keys['writer'], first.writer.token, px=200)
    second = RedisStore(own.url, 'clocks', more=(LAYOUT,), settings=HASTY)  # its lease is over
    second.write(batch(2))
    with pytest.raises(Outage, match='another process is'):
        first.write(batch(3))
    assert read_all(second) == ({b'2'}, b'2')
    for each in (*made, second):
        each.close()
    if kind == 'server':
        own.stop()


def test_a_moment_of_a_wiped_store_is_another_with_the_same_number():
    need('redis-server')
    with RedisProcess() as process:
        reader = None
        moments = []
        for value in (1, 7):
            store = RedisStore(process.url, 'wiped', more=(LAYOUT,))
            store.write(batch(value))
            reader = reader or RedisStore(process.url, 'wiped', readonly=True)
            moments.append(reader.moment())
            assert read_all(reader) == ({b'%d' % value}, b'%d' % value)
            store.close()
            with redis.Redis(port=process.port) as client:
                client.flushall()
        with pytest.raises(Outage, match='the server lost its memory.*feed it from the log'):
            reader.moment()
        reader.close()
    assert moments[0][0] == moments[1][0] and moments[0] != moments[1]
