"""Two servers share their scores on a real Redis: never stale, never late, with it or without"""

import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest

from mlref.bundle import open_bundle
from mlref.ext.redis_process import RedisProcess
from mlref.serving_state import publish_state, read_notes, read_state, with_champion
from programs import need
from server_fixture import start_copy
from test_redis import cluster, find_primary

__all__ = ['cluster']
ROWS = np.random.default_rng(8).uniform(0, 9, (60, 2)).astype(np.float32)
ASKED = 2400  # in each place: of both servers together
LATE = 2.0  # seconds; what a killed Redis may not cost


class OneServer:
    "A Redis that is killed and started again"

    def __init__(self):
        self.process = RedisProcess()
        self.url = self.process.url

    def kill(self):
        self.process.kill()

    def start(self):
        self.process.start()

    def stop(self):
        self.process.stop()


class OnePrimary:
    "A primary of a cluster that is killed and started again"

    def __init__(self, cluster):
        self.cluster = cluster
        self.url = cluster.url
        self.victim = find_primary(cluster)

    def kill(self):
        self.victim.kill()

    def start(self):
        self.victim.start()

    def stop(self):
        return None


@pytest.fixture(params=['server', 'cluster'])
def place(request):
    need('redis-server')
    found = OneServer()
    if request.param == 'cluster':
        found.stop()
        found = OnePrimary(request.getfixturevalue('cluster'))
    yield found
    found.stop()


@pytest.fixture
def pair(place, served, tmp_path):
    "Two servers of the same versions, with one place for their scores"
    homes = [tmp_path / name for name in ('first', 'second')]
    for place_of in homes:
        place_of.mkdir()
        for name in ('registry', 'online'):
            (place_of / name).symlink_to(served.home / name)
        (place_of / 'settings.ini').write_text(f'[DEFAULT]\nscores = {place.url}\n')
    with ExitStack() as stack:
        yield [stack.enter_context(start_copy(served, home / 'served', home))[0] for home in homes]


def score_rows(served):
    "Version -> what its model says of every row, without any cache"
    found = {}
    for folder in (served.folder / 'bundles').iterdir():
        model = open_bundle(folder).model
        found[model.version] = [model.predict(row[None])[0] for row in ROWS]
    return found


def ask(server, number):
    "What a server says of a row: version, score, seconds"
    start = time.monotonic()
    status, said = server.post(server.infer, server.tensor(ROWS[number : number + 1]))
    assert status == 200, said
    return said['model_version'], said['outputs'][0]['data'][0], time.monotonic() - start


def ask_on(server, seed, answers):
    "Ask about rows, few of them often"
    for number in np.random.default_rng(seed).zipf(1.3, ASKED // 4) % len(ROWS):
        answers.append((int(number), *ask(server, int(number))))


def put_in_place(servers, change):
    "Another champion on every server; answers of an earlier one are over when this returns"
    for server in servers:
        epoch = publish_state(server.folder, change).epoch
        until = time.monotonic() + 20
        while any(note.epoch < epoch for note in read_notes(server.folder)):
            assert time.monotonic() < until
            time.sleep(0.02)


def count_shared(server):
    name = 'mlref_cache_rows_total{model="late-visits",result="shared"} '
    lines = server.call('GET', '/metrics')[1].decode().splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_no_answer_is_stale_or_late(place, pair, served):
    expected = score_rows(served)
    now, before = read_state(pair[0].folder).champion, read_state(pair[0].folder).previous
    answers = []
    askers = [
        threading.Thread(target=ask_on, args=(server, seed, answers), daemon=True)
        for seed, server in enumerate([*pair, *pair])
    ]
    for asker in askers:
        asker.start()
    told = [{ask(server, 0)[0] for server in pair}]
    for step, digest in enumerate((before, now, before, now)):
        time.sleep(0.5)
        put_in_place(pair, lambda state, digest=digest: with_champion(state, digest))
        told.append({ask(server, 0)[0] for server in pair})
        if step == 1:
            place.kill()
        if step == 2:
            place.start()
    for asker in askers:
        asker.join(60)
    current, earlier = served.versions
    assert told == [{current}, {earlier}, {current}, {earlier}, {current}]
    assert len(answers) >= ASKED and {version for _, version, _, _ in answers} == {*expected}
    wrong = [each for each in answers if expected[each[1]][each[0]] != each[2]]
    assert not wrong, wrong[:3]
    assert max(seconds for *_, seconds in answers) < LATE
    assert min(map(count_shared, pair)) > 0
