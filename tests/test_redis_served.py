"""A running server whose online store is on a real Redis that hangs, dies and comes back"""

import asyncio
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import polars as pl
import pytest
import redis

from mlref.core import DAY
from mlref.dead_letters import Outage
from mlref.entity_answers import answer_entities
from mlref.ext.redis_process import RedisProcess
from mlref.ext.redis_store import RedisStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.model_server import ServerSettings
from mlref.routes import open_server
from programs import need
from server_fixture import start_copy
from small import FEATURES, make_events
from test_balance import ask_protocol
from test_entity_answers import ask_alone, ask_together, make_bundles, make_request, visit

QUICK = 1.0  # seconds; what does not need the store is answered within; the store hangs for three
ROWS = [[1.0, 2.0]]


def feed(url, space, events=None):
    "The visits, applied to a store on a Redis"
    store = RedisStore(url, space, FEATURES)
    apply_events(store, make_events() if events is None else events)
    store.close()


@contextmanager
def serve_from(url, served, folder):
    "A server of the same versions whose features are on a Redis"
    home = folder / 'redis-home'
    home.mkdir()
    (home / 'registry').symlink_to(served.home / 'registry')
    (home / 'settings.ini').write_text(f'[DEFAULT]\nonline = {url}\n')
    feed(url, home.name)
    with start_copy(served, folder / 'server', home) as (copy, _):
        yield copy


@pytest.fixture(scope='module')
def redis_server():
    need('redis-server')
    with RedisProcess(('--appendonly', 'yes', '--appendfsync', 'always')) as process:
        yield process


@pytest.fixture(scope='module')
def copy(redis_server, served, tmp_path_factory):
    with serve_from(redis_server.url, served, tmp_path_factory.mktemp('served')) as server:
        yield server


def timed(call, *words, **headers):
    "Status, content, headers, and the seconds that they took"
    start = time.monotonic()
    return (*call(*words, **headers), time.monotonic() - start)


def ask_keys(server, **headers):
    return timed(server.call, 'POST', '/predict', {'entities': [server.visit()]}, **headers)


def ask_vector(server):
    import numpy as np

    return timed(server.call, 'POST', server.infer, server.tensor(np.array(ROWS)))


def wait_ready(server, ready=True, seconds=10.0):
    "Until a server is ready, or is not; what it says"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        status, said, _ = server.call('GET', '/health/ready')
        if (status == 200) == ready:
            return said
        time.sleep(0.05)
    raise AssertionError(f'expected readiness {ready} within {seconds} s, got {status} {said}')


def wait_refused(found, path, seconds=10.0):
    "Until a path was refused"
    until = time.monotonic() + seconds
    while all(status == 200 for asked, status, _ in list(found) if asked == path):
        assert time.monotonic() < until, f'expected {path} to be refused within {seconds} s'
        time.sleep(0.05)


def need_no_store(server, stop, found):
    "Ask what needs no store, again and again"
    paths = ('/health/live', '/metrics', '/v2/models/late-visits', '/health/ready', '/status.json')
    while not stop.is_set():
        for path in paths:
            status, _, _, seconds = timed(server.call, 'GET', path)
            found.append((path, status, seconds))
        status, _, _, seconds = ask_vector(server)
        found.append(('vector', status, seconds))


def test_a_redis_that_hangs_holds_up_only_what_needs_it(redis_server, copy, served):
    wait_ready(copy)
    before = ask_keys(copy)
    assert before[0] == 200 and before[1] == ask_keys(served)[1]
    stop, found = threading.Event(), []
    asking = threading.Thread(target=need_no_store, args=(copy, stop, found), daemon=True)
    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        asking.start()
        status, said, headers, seconds = ask_keys(copy, x_timeout_ms='1500')
        assert (status, headers['retry-after']) == (503, '1') and 1.4 < seconds < 2.0
        assert 'by the deadline' in said['error']
        said = wait_ready(copy, ready=False)['error']
        assert said.startswith('expected the online store redis-home in redis://127.0.0.1:')
        assert said.count('\n') == 0 and said.endswith('can be reached')
        status, told, headers, seconds = ask_keys(copy)
        assert (status, headers['retry-after']) == (503, '1') and seconds < QUICK
        assert told['error'].split(' has not')[0] == said.split(' has not')[0]
        wait_refused(found, '/health/ready')
    finally:
        redis_server.process.send_signal(signal.SIGCONT)
    wait_ready(copy)
    stop.set()
    asking.join(10)
    assert ask_keys(copy)[1] == before[1]
    assert len(found) > 60 and max(seconds for *_, seconds in found) < QUICK
    refused = {path for path, status, _ in found if status != 200}
    assert refused == {'/health/ready'}


def test_a_redis_that_dies_and_comes_back(redis_server, copy):
    wait_ready(copy)
    before = ask_keys(copy)[1]
    redis_server.kill()
    said = wait_ready(copy, ready=False)['error']
    assert said.startswith('expected the online store redis-home')
    assert ask_keys(copy)[0] == 503 and ask_vector(copy)[0] == 200
    redis_server.start()
    wait_ready(copy)
    assert ask_keys(copy)[1] == before


def test_the_protocol_is_the_same_with_features_on_a_redis(copy, served):
    wait_ready(copy)
    model = served.infer.split('/')[3]
    said = [ask_protocol('{}:{}'.format(*each.address), model) for each in (copy, served)]
    assert said[0] == said[1] and {200, 400, 404, 405, 415} <= {status for status, _ in said[0]}


def count_reads(url):
    "How often a Redis was asked for values, as it counts that itself"
    with redis.Redis.from_url(url) as client:
        return client.info('commandstats').get('cmdstat_mget', {'calls': 0})['calls']


def end_looks(watch):
    "Look at a store no more, since that is counted, too; and trust it for ever"
    watch.looks.ended.set()
    for thread in threading.enumerate():
        if thread.name == 'store-looks':
            thread.join()
    watch.looks.late = 1e9


@pytest.fixture(scope='module')
def counted():
    "A Redis that nobody else asks"
    need('redis-server')
    with RedisProcess() as process:
        yield process


@pytest.fixture
def here(counted, tmp_path):
    "A server of this process, whose features are on a Redis"
    feed(counted.url, tmp_path.name)
    store = RedisStore(counted.url, tmp_path.name, FEATURES, readonly=True)
    unremembered = ServerSettings(cache_bytes=0)  # each score is computed
    server = open_server(make_bundles()[0], store, LocalLog(tmp_path / 'served'), unremembered)
    asyncio.run(server.watch.start())
    end_looks(server.watch)
    yield server
    server.watch.close()
    store.close()


READS = 2  # round trips of a group: which moment it is, and its records


def test_those_that_wait_together_share_a_round_trip(counted, here):
    bodies = [{'entities': [visit(number)]} for number in range(360, 400)]
    before = count_reads(counted.url)
    found = ask_together(here, map(make_request, bodies))
    together = count_reads(counted.url) - before
    assert all(isinstance(each, bytes) for each in found)
    assert together == READS
    here.champion.vectors.reader.hot.minutes.clear()  # what it remembers of this moment
    assert ask_alone(here, map(make_request, bodies)) == found
    alone = count_reads(counted.url) - before - together
    assert alone == READS * len(bodies)  # and the test can fail
    assert (here.watch.reading, here.admission.waiting, here.champion.users) == (0, 0, 0)


def test_a_group_waits_for_the_one_before_and_all_are_answered(counted, here):
    bodies = [{'entities': [visit(280 + number)]} for number in range(120)]
    before = count_reads(counted.url)
    found = ask_together(here, map(make_request, bodies))
    assert count_reads(counted.url) - before == 3 * READS
    assert found == ask_alone(here, map(make_request, bodies))
    assert all(isinstance(each, bytes) for each in found)


async def ask_any(server, bodies):
    "Answers to all at once, or what is wrong with the store"
    asked = [answer_entities(server, make_request(body)) for body in bodies]
    found = await asyncio.gather(*asked, return_exceptions=True)
    return [str(each) if isinstance(each, Outage) else each.body for each in found]


def test_a_store_that_was_wiped_and_fed_anew_gives_nothing_of_before(counted, here, tmp_path):
    bodies = [{'entities': [visit(number)]} for number in range(370, 390)]
    before = ask_together(here, map(make_request, bodies))
    with redis.Redis.from_url(counted.url) as client:
        head = client.get(f'{tmp_path.name}:{{!{tmp_path.name}}}head')
        client.flushall()
        with pytest.raises(Outage, match='the server lost its memory'):
            ask_alone(here, [make_request(bodies[0])])
        feed(counted.url, tmp_path.name, make_events().tail(4))
        assert client.get(f'{tmp_path.name}:{{!{tmp_path.name}}}head') == head  # the same number
    found = ask_together(here, map(make_request, bodies))
    here.champion.vectors.reader.hot.minutes.clear()  # what it remembers
    assert found == ask_alone(here, map(make_request, bodies))
    assert any(new != old for new, old in zip(found, before, strict=True))


def spoil(url, space, name):
    "Change a byte of a record"
    with redis.Redis.from_url(url) as client:
        [key] = [key for key in client.scan_iter(f'{space}:r:*') if name in key]
        value = client.get(key)
        client.set(key, value[:-1] + bytes([value[-1] ^ 1]))


def test_a_damaged_record_is_told_to_those_that_need_it(counted, here, tmp_path):
    bodies = [{'entities': [visit(number)]} for number in range(380, 400)]
    spoil(counted.url, tmp_path.name, b's1')
    found = asyncio.run(ask_any(here, bodies))
    for number, each in zip(range(380, 400), found, strict=True):
        assert isinstance(each, bytes) == (number % 3 != 1), each
        assert isinstance(each, bytes) or each.startswith('expected the record sales/shop/s1')


def test_each_waits_for_a_hanging_store_until_its_own_deadline(counted, here):
    waits = (300, 600, 900)  # milliseconds
    took = []

    async def ask(wait):
        begun = time.monotonic()
        body = {'entities': [visit(390)]}
        with pytest.raises(Outage, match='by the deadline'):
            await answer_entities(here, make_request(body, **{'x-timeout-ms': str(wait)}))
        took.append(time.monotonic() - begun)

    async def ask_all():
        await asyncio.gather(*map(ask, waits))

    counted.process.send_signal(signal.SIGSTOP)
    try:
        asyncio.run(ask_all())
    finally:
        counted.process.send_signal(signal.SIGCONT)
    assert took == sorted(took)
    for wait, seconds in zip(waits, took, strict=True):
        assert wait / 1000 - 0.01 < seconds < wait / 1000 + 1.5
    assert (here.admission.waiting, here.champion.users) == (0, 0)
    [again] = ask_together(here, [make_request({'entities': [visit(390)]})])
    assert isinstance(again, bytes)


ROUNDS = 10


def test_many_clients_of_a_running_server_share_round_trips(redis_server, copy, served):
    wait_ready(copy)
    bodies = [{'entities': [visit(368 + number)]} for number in range(32)]

    def ask(body):
        return [copy.call('POST', '/predict', body)[:2] for _ in range(ROUNDS)]

    before = count_reads(redis_server.url)
    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(ask, bodies))
    reads = count_reads(redis_server.url) - before
    for body, answers in zip(bodies, found, strict=True):
        assert answers == [served.call('POST', '/predict', body)[:2]] * ROUNDS
    print(f'{reads} round trips of {len(bodies) * ROUNDS} requests')
    assert reads < len(bodies) * ROUNDS


def read_lags(server):
    "Seconds that each kind of event is behind, as a scraper reads them"
    page = server.call('GET', '/metrics')[1].decode()
    prefix = 'mlref_feed_lag_seconds{'
    lines = [line for line in page.splitlines() if line.startswith(prefix)]
    return {line.split('kind="')[1].split('"')[0]: float(line.split()[1]) for line in lines}


def test_each_feed_has_its_lag_on_a_redis(redis_server, copy):
    wait_ready(copy)
    before = read_lags(copy)
    assert before == {'visit': 3600.0, 'end': 0.0}  # a visit ends an hour after it is known
    store = RedisStore(redis_server.url, 'redis-home', FEATURES)
    shift = pl.col('event_time', 'known_time') + 8 * DAY
    visits = make_events().filter(kind='visit').with_columns(shift)
    apply_events(store, visits)
    newest = visits['known_time'].max()
    store.close()
    deadline = time.monotonic() + 5
    while (found := read_lags(copy)) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == {'visit': 0.0, 'end': 60.0 * (newest - make_events()['known_time'].max())}
