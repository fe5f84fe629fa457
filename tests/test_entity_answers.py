"""Requests by keys that are read together: each gets, to the byte, what it gets by itself

What is asked by itself goes the way of `predict_entities`, which reads one request; a field that
the server does not know, at the top of a body, sends a request of the running server there too.
"""

import asyncio
import json
import random
import socket
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.access import AccessKey
from mlref.answers import predict_entities
from mlref.bundle import make_bundle
from mlref.core import DAY
from mlref.entity_answers import answer_entities, read_plain
from mlref.feature_ranges import measure_ranges
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.model_server import ServedModel, ServerSettings
from mlref.protocols import Limits, RequestError, decode_json
from mlref.requests import Request
from mlref.route import Assignment
from mlref.routes import open_server
from server_fixture import TRAINED_ON, VERSIONS, onnx_model, wrap_model
from small import FEATURES, TASK, make_events


class CountingStore(LmdbStore):
    "A store that knows how often it was opened for reading"

    opened = 0

    def snapshot(self):
        self.opened += 1
        return super().snapshot()


def make_bundles():
    ranges = measure_ranges(TRAINED_ON)
    return [make_bundle(TASK, wrap_model(onnx_model(each)), ranges) for each in VERSIONS]


@pytest.fixture(scope='module')
def bundles():
    return make_bundles()


@pytest.fixture
def server(tmp_path, bundles):
    store = CountingStore(tmp_path / 'online', FEATURES)
    apply_events(store, make_events())
    unremembered = ServerSettings(cache_bytes=0)  # each score is computed
    return open_server(bundles[0], store, LocalLog(tmp_path / 'served'), unremembered)


def visit(number, **change):
    "An entity as it is asked about"
    at = number * 8 * DAY // 400
    return {'visit': f'v{number}', 'shop': f's{number % 3}', 'event_time': at, **change}


def make_request(body, key=None, **headers):
    named = [(name.encode(), value.encode()) for name, value in headers.items()]
    asked = Request({'method': 'POST', 'path': '/predict', 'headers': named})
    asked.key = key
    asked.feed(body if isinstance(body, bytes) else json.dumps(body).encode())
    asked.end()
    return asked


async def outcome(awaited):
    "The bytes of an answer, or the status and the sentence of an error"
    try:
        return (await awaited).body
    except RequestError as error:
        return error.status, str(error)


def ask_together(server, requests):
    async def ask():
        return await asyncio.gather(*[outcome(answer_entities(server, each)) for each in requests])

    return asyncio.run(ask())


def ask_alone(server, requests):
    async def ask():
        return [await outcome(predict_entities(server, each)) for each in requests]

    return asyncio.run(ask())


def kept(server, start, end):
    "What was written down, without what differs from call to call, in whatever order"
    rows = map(json.loads, server.log_file.read('predictions', start, end - start))
    varies = ('answered_at', 'request_id')
    same = [{name: row[name] for name in row if name not in varies} for row in rows]
    return sorted(same, key=json.dumps)


ODD = (
    {'entities': [visit(3, shop='nowhere')]},
    {'entities': [visit(3, shop='a|b')]},
    {'entities': [visit(3, shop='')]},
    {'entities': [visit(3, shop='caf\u00e9')]},
    {'entities': [visit(0, event_time=1)]},
    {'entities': [visit(0, event_time=-9)]},
    {'entities': [visit(0, event_time=68_000_000)]},
    {'entities': [visit(0, event_time=9 * 10**20)]},
    {'entities': [visit(3, event_time='1970-01-07T00:00Z')]},
    {'entities': [visit(3, event_time='1970-01-07')]},
    {'entities': [visit(3, shop=7)]},
    {'entities': [visit(3, shop=None)]},
    {'entities': [visit(3, event_time=7.0)]},
    {'entities': [visit(3, event_time=True)]},
    {'entities': [visit(3, price=3)]},
    {'entities': [visit(3, price=9 * 10**400)]},
    {'entities': [visit(3, cost=3)]},
    {'entities': [visit(3), {}]},
    {'entities': [visit(3), 5]},
    {'entities': [visit(n) for n in range(8)]},
    {'entities': [visit(n) for n in range(9)]},
    {'entities': [visit(3)], 'statuses': None},
    {'entities': [visit(3)], 'statuses': 'yes'},
    {'entities': [visit(3)], 'note': [[[[]]]]},
    {'entities': []},
    {'entities': {}},
    [],
    b'{"entities": [{"visit": "v", "visit": "w", "shop": "s1", "event_time": 9000}]}',
    b'{"entities": [], "entities": [{"visit": "v", "shop": "s1", "event_time": 9000}]}',
    b'{"entities": [{"visit": "v\\u0041", "shop": "s1", "event_time": 9000}]}',
    b'{"entities": [{"visit": "\\ud800", "shop": "s1", "event_time": 9000}]}',
    b'{"entities": [{"visit": "\xff", "shop": "s1", "event_time": 9000}]}',
    b'{"entities": [{"visit": "v", "shop": "s1", "event_time": -0}]}',
    b'{"entities": [{"visit": "v", "shop": "s1", "event_time": 9e3}]}',
    b'{"entities": [{"visit": "v", "shop": "s1", "event_time": NaN}]}',
    b'{"entities": [',
    b'',
)


def draw_body(drawn):
    "What somebody asks: most of it right, some visits asked about by many"
    if drawn.random() < 0.2:
        return drawn.choice(ODD)
    shops = ('s0', 's1', 's2', 'nowhere')
    numbers = [drawn.randrange(380, 400) for _ in range(drawn.choice((1, 1, 1, 2, 5)))]
    rows = [visit(number, shop=drawn.choice(shops)) for number in numbers]
    return {'entities': rows, **drawn.choice(({}, {'statuses': True}, {'statuses': False}))}


@pytest.mark.parametrize('seed', range(4))
def test_together_each_gets_to_the_byte_what_it_gets_by_itself(server, seed):
    drawn = random.Random(seed)
    ways = (ask_alone, ask_together) if seed % 2 else (ask_together, ask_alone)
    for size in (1, 2, 40, 120):
        bodies = [draw_body(drawn) for _ in range(size)]
        ends = [server.log_file.end('predictions')]
        found = []
        for ask in ways:
            found.append(ask(server, [*map(make_request, bodies)]))
            ends.append(server.log_file.end('predictions'))
        assert found[0] == found[1]
        assert kept(server, *ends[:2]) == kept(server, *ends[1:])
        assert (server.admission.waiting, server.champion.users) == (0, 0)


@pytest.mark.parametrize('body', ODD, ids=range(len(ODD)))
def test_one_that_is_odd_costs_nobody_beside_it_an_answer(server, body):
    good = [{'entities': [visit(number)]} for number in range(390, 399)]
    mixed = [*good[:5], body, *good[5:]]
    assert ask_together(server, [*map(make_request, mixed)]) == ask_alone(
        server, map(make_request, mixed)
    )


def test_a_group_opens_the_store_once_and_is_committed_once(server):
    bodies = [{'entities': [visit(number)]} for number in range(360, 400)]
    before = server.store.opened
    found = ask_together(server, [*map(make_request, bodies)])
    assert all(isinstance(each, bytes) for each in found)
    assert (server.store.opened - before, server.log.commits) == (1, 1)
    again = ask_alone(server, map(make_request, bodies))  # and the test can fail:
    assert (again, server.store.opened - before) == (found, 41)


def test_a_store_that_nothing_was_applied_to(tmp_path, bundles):
    store = LmdbStore(tmp_path / 'empty', FEATURES)
    server = open_server(bundles[0], store, LocalLog(tmp_path / 'log'))
    for status, said in ask_together(server, [make_request({'entities': [visit(3)]})] * 3):
        assert (status, 'that events were applied to' in said) == (503, True)


def test_each_is_answered_by_its_own_version(server, bundles):
    served = [ServedModel(each, server.store, server.settings) for each in bundles]
    server.versions = {'champion': served[0], 'candidate': served[1]}
    names = ('champion', 'candidate')

    def assign(unit, segment, override):
        return Assignment(override or names[int(unit[1:]) % 2])

    server.router = SimpleNamespace(assign=assign)
    pairs = [{'entities': [visit(n), visit(n + 2)]} for n in range(380, 396)]
    mixed = [{'entities': [visit(n), visit(n + 1)]} for n in range(380, 384)]
    bodies = [*pairs, *mixed, *[{'entities': [visit(n)]} for n in range(380, 396)]]
    requests = [make_request(body) for body in bodies]
    requests += [make_request(bodies[0], **{'x-variant': 'candidate'})]
    found = ask_together(server, requests)
    assert found == ask_alone(server, requests)
    versions = [json.loads(each)['model_version'] for each in found[:16]]
    assert versions == [served[i % 2].version for i in range(16)]
    assert json.loads(found[-1])['model_version'] == served[1].version
    assert [each.users for each in served] == [0, 0]


def test_a_client_that_had_its_share_is_refused_alone(server):
    key = AccessKey('k', 'c', ('predict',), sha256='0' * 64, created=0, rows=3)
    bodies = [{'entities': [visit(number)]} for number in range(390, 398)]
    limited = [make_request(body, key) for body in bodies[:5]]
    found = ask_together(server, [*limited, *map(make_request, bodies)])
    assert [isinstance(each, bytes) for each in found] == [True] * 3 + [False] * 2 + [True] * 8
    assert {status for status, _ in found[3:5]} == {429}


TEXTS = st.sampled_from(['a', 'b', 'visit', 'entities', '\u00e9', 'x"', '\x7f', '\\', ''])
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False), st.just(10**309), st.just(-0.0))
VALUES = st.one_of(NUMBERS, TEXTS, st.booleans(), st.none(), st.just([]), st.just({}))
ROWS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=4), max_size=9)
CUTS = st.tuples(st.integers(0, 200), st.integers(0, 3), st.binary(max_size=3))
LIMITS = Limits(max_rows=6)


def same(left, right):
    "Equal, with the types of numbers and the sign of zero"
    return repr(left) == repr(right)


@settings(max_examples=500, deadline=None)
@given(rows=ROWS, statuses=st.one_of(st.none(), VALUES), cut=CUTS, escaped=st.booleans())
def test_what_is_read_as_plain_is_what_the_careful_reader_reads(rows, statuses, cut, escaped):
    found = {'entities': rows, **({} if statuses is None else {'statuses': statuses})}
    body = json.dumps(found, ensure_ascii=escaped).encode()
    at, gone, new = cut
    for text in (body, body[:at] + new + body[at + gone :]):
        plain = read_plain(text, LIMITS)
        if plain is not None:
            careful = decode_json(text, LIMITS)
            assert same(plain.entities, careful['entities'])
            assert len(plain.entities) <= LIMITS.max_rows
            assert careful.keys() <= {'entities', 'statuses'}
            assert (plain.statuses is True) == (careful.get('statuses') is True)


def test_forty_connections_at_once(served):
    "Over sockets, beside a server of two workers: the same bytes as one after the other"
    drawn = random.Random(9)
    visits = [served.visit(n, shop=drawn.choice(('s1', 'nowhere'))) for n in range(360, 400)]
    bodies = [
        json.dumps({'entities': [each], 'statuses': drawn.random() < 0.5}).encode()
        for each in visits
    ]
    bodies[7] = b'{"entities": [{"visit": 7}]}'
    head = b'POST /predict HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n'
    head += b'connection: close\r\ncontent-length: '
    lines = [socket.create_connection(served.address, timeout=20) for _ in bodies]
    for line, body in zip(lines, bodies, strict=True):
        line.sendall(head + str(len(body)).encode() + b'\r\n\r\n' + body)
    answers = [read_whole(line).partition(b'\r\n\r\n')[2] for line in lines]
    for body, answer in zip(bodies, answers, strict=True):
        alone = served.post('/predict', body + b' ' * 17_000)[1]  # too long for a plain body
        assert json.loads(answer) == alone
    assert 'is missing' in json.loads(answers[7])['error']


def read_whole(line):
    found = b''
    while part := line.recv(65536):
        found += part
    line.close()
    return found
