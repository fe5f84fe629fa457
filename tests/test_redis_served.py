"""A running server whose online store is on a real Redis that hangs, dies and comes back"""

import signal
import threading
import time
from contextlib import contextmanager

import polars as pl
import pytest

from mlref.core import DAY
from mlref.ext.redis_process import RedisProcess
from mlref.ext.redis_store import RedisStore
from mlref.materialize import apply_events
from programs import need
from server_fixture import start_copy
from small import FEATURES, make_events

QUICK = 0.5  # seconds; what does not need the store is answered within
ROWS = [[1.0, 2.0]]


def feed(url, space):
    "The visits, applied to a store on a Redis"
    store = RedisStore(url, space, FEATURES)
    apply_events(store, make_events())
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
