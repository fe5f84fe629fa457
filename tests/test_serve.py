"""A real server process over a run

Answers equal the offline scores, the calibration of the day moves them, bad input costs its sender
one sentence, predictions survive a kill -9, a tracking server that dies takes nobody with it, and a
task that nobody here has heard of is served like any other.
"""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import polars as pl
import pytest

from mlref.calibration import CALIBRATION_KEY, Calibration, encode_calibrations
from mlref.challenger import bootstrap
from mlref.client import start_server
from mlref.core import DAY, digest, format_time, parse_time
from mlref.flights.common import HORIZON
from mlref.flights.features import FLIGHTS
from mlref.flights.task import flights_task
from mlref.lake import events_as_of
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.model_versions import load_champion
from mlref.offline import OfflineReader
from mlref.policy import RetrainPolicy
from mlref.promotion import promote
from mlref.protocols import RequestError
from mlref.registry import Registry, TrainingRun, register_model
from mlref.request_fields import entity_rows, request_fields
from mlref.serving_state import prediction_log
from mlref.task import load_task, read_stream, select_requests
from mlref.tracking_store import local_uri
from mlref.training_set import training_set
from mlref.vectors import compute_vectors
from mlref.workspace import Workspace, deliver_events
from programs import MLREF
from test_registry import GOOD, env, free
from test_registry import model as another
from test_registry import serve as tracking

SERVE = [*MLREF, 'serve']
START, NOW = parse_time('2013-03-01T07:00'), parse_time('2013-03-20T07:00')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    at = tmp_path_factory.mktemp('home')
    stream = read_stream(flights_task(), seed=0).filter(pl.coalesce('sched', 'known_time') >= START)
    # for a tracking server: its tables take seconds to make
    h = Workspace(at, flights_task())
    assert h.registry.client
    shutil.copy(at / 'registry' / 'mlflow.db', at / 'bare.db')
    deliver_events(h, stream, NOW)
    bootstrap(h, RetrainPolicy('torch', stop=4), NOW - DAY)
    t = training_set(events_as_of(h.lake), h.task, NOW - 600, NOW)
    model = load_champion(h.registry)
    requests = select_requests(h.task, events_as_of(h.lake), NOW - 600, NOW)
    h.close()
    assert requests['flight_id'].to_list() == t.ids.tolist()
    return at, t, model, entity_rows(requests, request_fields(h.task))


@pytest.fixture(scope='module')
def url(home):
    p = subprocess.Popen(
        [*SERVE, '--home', home[0], '--log', home[0] / 'served', '--port', '0', '--workers', '1'],
        stdout=subprocess.PIPE,
        text=True,
    )
    line = p.stdout.readline()
    assert ' at http://' in line, line
    yield line.split(' at ')[1].split()[0], p
    p.kill()
    p.wait()


def call(url, path, body):
    try:
        return 200, json.load(
            urlopen(
                Request(
                    url + path,
                    body if isinstance(body, bytes) else json.dumps(body).encode(),
                    {'content-type': 'application/json'},
                ),
                timeout=60,
            )
        )
    except HTTPError as e:
        return e.code, json.load(e)


def vectors(X):
    return {
        'inputs': [
            {
                'name': 'X',
                'datatype': 'FP32',
                'shape': list(X.shape),
                'data': [None if np.isnan(v) else float(v) for v in X.ravel()],
            }
        ]
    }


@pytest.mark.parametrize('b', [1, 7, 32])
def test_scores_over_http_are_the_offline_scores_in_any_batch(home, url, b):
    _, t, model, flights = home
    want = model.predict(t.X)
    n = min(len(t), 4 * b)
    keys, vecs = [], []
    for i in range(0, n, b):
        keys += [
            x['p']
            for x in call(url[0], '/predict', {'entities': flights[i : i + b]})[1]['predictions']
        ]
        vecs += call(url[0], '/v2/models/late/infer', vectors(t.X[i : i + b]))[1]['outputs'][0][
            'data'
        ]
    assert keys[:n] == vecs[:n] == want[: len(keys)].tolist()[:n]


BAD = [
    ('/predict', b'{"entities": [', 400, 'expected a JSON object'),
    ('/predict', {}, 400, "expected 'entities'"),
    ('/predict', {'entities': [{'origin': 'EWR'}]}, 400, 'expected the field flight_id'),
    (
        '/v2/models/late/infer',
        {'inputs': [{'name': 'X', 'datatype': 'FP32', 'shape': [1, 3], 'data': [1, 2, 3]}]},
        422,
        'expected shape [rows, 132]',
    ),
    (
        '/v2/models/late/infer',
        {'inputs': [{'name': 'X', 'datatype': 'BF16', 'shape': [1, 132], 'data': [0] * 132}]},
        400,
        "got 'BF16'",
    ),
    ('/v2/models/late/infer', b'{"inputs": NaN}', 400, 'send null for a missing feature'),
    (
        '/v2/models/late/infer',
        {'inputs': [{'name': 'X', 'datatype': 'FP32', 'shape': [1, 132], 'data': [1e300] * 132}]},
        422,
        'fit into float32',
    ),
    (
        '/invocations',
        {'dataframe_split': {'columns': ['carrier'], 'data': [[1]]}},
        422,
        '131 missing',
    ),
    ('/invocations', b'\xff\xfe', 400, 'expected a JSON object'),
    ('/predict', b'x' * 9_000_000, 413, 'expected at most 8,388,608 bytes'),
]


@pytest.mark.parametrize('path, body, status, says', BAD, ids=[f'{p}-{s}' for p, _, _, s in BAD])
def test_bad_input_gets_its_status_and_one_sentence_and_the_server_is_unharmed(
    home, url, path, body, status, says
):
    got, said = call(url[0], path, body)
    assert got == status and says in said['error'] and said['error'].count('\n') == 0
    assert (
        call(url[0], '/predict', {'entities': home[3][:1]})[1]['predictions'][0]['p']
        == home[2].predict(home[1].X[:1])[0]
    )


@pytest.mark.parametrize(
    'change, status, says',
    [
        ({'dest': 'XXX'}, 422, 'airports known'),
        ({'origin': 'LAX'}, 422, 'EWR, JFK, LGA'),
        ({'sched': 'noon'}, 422, 'sched in minutes UTC or as a time with a zone'),
        ({'sched': 10**30}, 422, 'in minutes UTC'),
        ({'distance': 2**50}, 422, 'in minutes or miles'),
        ({'tailnum': 7}, 400, 'tailnum as str or null'),
        ({'sched': 5}, 422, 'got -115'),
        ({'sched': 5000}, 422, 'older than what is kept'),
    ],
)
def test_a_flight_that_cannot_be_scored(home, url, change, status, says):
    got, said = call(url[0], '/predict', {'entities': [{**home[3][0], **change}]})
    assert (got, says in said['error']) == (status, True), said


def test_a_port_in_use(home, url):
    r = subprocess.run(
        [*SERVE, '--home', home[0], '--log', home[0] / 'other', '--port', url[0].rsplit(':', 1)[1]],
        capture_output=True,
        text=True,
    )
    assert (
        r.returncode == 1 and 'to be free' in r.stderr and len(r.stderr.strip().splitlines()) == 1
    )


LOAD = '/v2/repository/models/late/load'


def keep(at, note):
    "What the lifecycle does while a server reads"
    store = LmdbStore(at / 'online', FLIGHTS)
    store.write({CALIBRATION_KEY: note})
    store.close()


def test_a_calibration_moves_the_next_answers_is_logged_and_old_clients_see_no_difference(
    home, url
):
    at, t, model, flights = home
    p, T = model.predict(t.X), np.array([f['sched'] for f in flights]) - HORIZON
    split = {
        'dataframe_split': {
            'columns': list(model.names),
            'data': [[None if np.isnan(v) else float(v) for v in r] for r in t.X],
        }
    }

    def asked():
        return [
            call(url[0], path, body)
            for path, body in (
                ('/predict', {'entities': flights}),
                ('/v2/models/late/infer', vectors(t.X)),
                ('/invocations', split),
            )
        ]

    bare = asked()
    assert [s for s, _ in bare] == [200] * 3 and 'calibrat' not in json.dumps(bare)
    early, later = (int(x) for x in np.quantile(np.unique(T), (0.3, 0.7)))
    first, last = (
        Calibration(0.31, 0.87, early - 9 * DAY, early - DAY, early, 5000),
        Calibration(-0.42, 1.13, early - 8 * DAY, later - DAY, later - 1, 6000),
    )
    try:
        keep(
            at,
            encode_calibrations(
                [
                    {'fitted_at': f, 'digest': m.digest, **asdict(m)}
                    for f, m in ((later, last), (early, first))
                ]
            ),
        )
        (_, keys), (_, oip), (_, inv) = asked()
        by = [last if x >= later else first if x >= early else None for x in T]
        assert {None, first, last} == set(by)
        assert [
            (a['p'], a.get('calibrated'), a.get('calibration')) for a in keys['predictions']
        ] == [
            (x, m and m.apply(p[i : i + 1])[0], m and m.digest)
            for i, (x, m) in enumerate(zip(p, by, strict=True))
        ]
        assert keys == {
            **bare[0][1],
            'predictions': [
                {
                    **b,
                    **(
                        {'calibrated': a['calibrated'], 'calibration': a['calibration']}
                        if m
                        else {}
                    ),
                }
                for a, b, m in zip(keys['predictions'], bare[0][1]['predictions'], by, strict=True)
            ],
        }
        assert oip['outputs'][0] == bare[1][1]['outputs'][0] and oip['outputs'][1] == {
            **oip['outputs'][0],
            'name': 'calibrated',
            'data': last.apply(p).tolist(),
            'parameters': {'calibration': last.digest},
        }
        assert inv == {
            **bare[2][1],
            'calibrated': last.apply(p).tolist(),
            'calibration': last.digest,
        }
        assert [o['name'] for o in json.load(urlopen(url[0] + '/v2/models/late'))['outputs']] == [
            'p',
            'calibrated',
        ]
        log = LocalLog(prediction_log(at / 'served', 0), readonly=True)
        end = log.end('predictions')
        wrote = [json.loads(m) for m in log.read('predictions', end - len(p), len(p))]
        log.close()
        assert [(m['p'], m.get('calibration')) for m in wrote] == [
            (x, m and m.digest) for x, m in zip(p, by, strict=True)
        ]
        # had seen a label of a minute later
        keep(
            at,
            encode_calibrations([{'fitted_at': later - 2, 'digest': last.digest, **asdict(last)}]),
        )
        for status, said in asked():
            assert (
                status == 503
                and 'no label later than itself' in said['error']
                and '\n' not in said['error']
            )
    finally:
        keep(at, None)
    assert asked() == bare


def test_a_registry_that_is_gone_is_said_and_serving_goes_on(home, url):
    db = home[0] / 'registry' / 'mlflow.db'
    db.rename(home[0] / 'away.db')
    try:
        got, said = call(url[0], '/v2/repository/models/late/load', {})
        assert got == 503 and 'still serving' in said['error']
        assert call(url[0], '/predict', {'entities': home[3][:2]})[0] == 200
    finally:
        (home[0] / 'away.db').rename(db)
    assert call(url[0], '/v2/repository/models/late/load', {}) == (
        200,
        {'model_version': home[2].version},
    )


def test_what_was_answered_is_on_disk_after_kill_9(home, url):
    before = json.load(urlopen(url[0] + '/health/ready'))['model_version']
    answered = call(url[0], '/predict', {'entities': home[3][:50]})[1]['predictions']
    url[1].send_signal(signal.SIGKILL)
    url[1].wait()
    log = LocalLog(prediction_log(home[0] / 'served', 0), readonly=True)
    end = log.end('predictions')
    last = [json.loads(m) for m in log.read('predictions', end - len(answered), len(answered))]
    assert [(m['entity_id'], m['p'], m['version']) for m in last] == [
        (a['entity_id'], a['p'], before) for a in answered
    ] and all(m['trained_until'] <= m['scored_at'] for m in last)


def test_a_tracking_server_hands_out_the_champion_and_takes_nobody_with_it_when_it_hangs_and_dies(
    home, tmp_path
):
    # another machine: a store and an address
    _, t, old, flights = home
    port = free()
    uri = f'http://127.0.0.1:{port}'
    here = tmp_path / 'here'
    shutil.copytree(home[0] / 'online', here / 'online')
    shutil.copy(home[0] / 'bare.db', tmp_path / 'server.db')
    tracked, p = tracking(tmp_path, port), None
    told = env(MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_TIMEOUT='5')

    def command(log):
        return [*SERVE, '--home', here, '--log', tmp_path / log, '--port', '0', '--workers', '1']

    try:
        there = Registry(tmp_path / 'there', uri, name='late')
        first = register_model(there, old, TrainingRun(digest([0])), FLIGHTS, sample=t.X)
        promote(there, first, 30, 'bootstrap')
        p = subprocess.Popen(command('served'), stdout=subprocess.PIPE, text=True, env=told)
        url = p.stdout.readline().split(' at ')[1].split()[0]

        def scores():
            return [
                a['p'] for a in call(url, '/predict', {'entities': flights[:9]})[1]['predictions']
            ]

        assert (
            scores() == old.predict(t.X[:9]).tolist()
            and (here / 'registry' / 'models' / old.version).exists()
        )
        new = another(1)
        second = register_model(there, new, TrainingRun(digest([1])), FLIGHTS, GOOD, t.X)
        promote(there, second, 40, 'all gates passed')
        want = new.predict(t.X[:9]).tolist()
        assert scores() == old.predict(t.X[:9]).tolist() != want  # until it is told
        assert call(url, LOAD, {}) == (200, {'model_version': new.version}) and scores() == want
        os.killpg(tracked.pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(call, url, LOAD, {})
            time.sleep(0.5)
            # the tracking server hangs, and only the load with it
            assert scores() == want and not load.done()
            os.killpg(tracked.pid, signal.SIGKILL)
            tracked.wait()
            status, said = load.result()
        assert (
            status == 503
            and f'expected the tracking server {uri} to answer' in said['error']
            and f'still serving {new.version}' in said['error']
            and scores() == want
        )
        r = subprocess.run(command('late'), capture_output=True, text=True, env=told)
        assert (
            r.returncode == 1
            and r.stderr
            == f'mlref: expected the tracking server {uri} to answer, got: [Errno 111] Connection'
            ' refused; start it again, or name one that answers with --uri or'
            ' MLFLOW_TRACKING_URI\n'
        ), r.stderr
        assert scores() == want
    finally:
        if tracked.poll() is None:
            os.killpg(tracked.pid, signal.SIGKILL)
            tracked.wait()
        if p:
            p.kill()
            p.wait()


SHOP = '''
"""A shop's customers, as their owner writes them down"""

import json

import numpy as np
import polars as pl

from mlref.core import DAY, Calendar
from mlref.features import Entity, FeatureSet, FeatureView
from mlref.sources import from_table
from mlref.model import register_loader
from mlref.own_model import OwnModel
from mlref.schema import EventSchema
from mlref.task import Task

CUSTOMER = Entity(name='customer', keys=('customer',))
COLUMNS = {'known': 'known_time', 'keys': ('customer',), 'values': {'price': 'cent'}}
LAST = from_table('last', **COLUMNS)
SUMS = from_table('sums', **COLUMNS, kind='aggregate')
FEATURES = FeatureSet(
    name='shop',
    views=(
        FeatureView(name='last', entity=CUSTOMER, source=LAST, stats=('price',), ttl=30 * DAY),
        FeatureView(
            name='month', entity=CUSTOMER, source=SUMS, stats=('count',), windows=(30 * DAY,)
        ),
    ),
)


def labels(events, now):
    return events.select('order_id', y=pl.lit(0.0), label_time='known_time').head(0)


SHOP = Task(
    name='rebuy',
    entity='order',
    outcome='is followed by another within sixty days',
    schema=EventSchema(
        payload={'order_id': pl.Int64, 'customer': pl.Int64, 'price': pl.Int64},
        kinds=('order',),
        entity_id='order_id',
    ),
    contract=(),
    features=FEATURES,
    calendar=Calendar(),
    request_kind='order',
    request_time='event_time',
    labels=labels,
    label_kinds=('order',),
)


def weights_model(data, names, trained_until):
    weights = np.array(json.loads(data))

    def score(X):
        return 1 / (1 + np.exp(-np.nan_to_num(X.astype(float)) @ weights))

    return OwnModel('weights', score, {'weights.json': data}, names, trained_until)


@register_loader('weights')
def load_weights(saved, device):
    data = (saved.folder / 'weights.json').read_bytes()
    return weights_model(data, saved.names, saved.trained_until)
'''


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A run of the shop: its task, the orders that are known, those to be scored, the model"
    (tmp_path / 'shop_of_a_test.py').write_text(SHOP)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module('shop_of_a_test')
    task = load_task('shop_of_a_test:SHOP')
    # customer 2 has not been heard of for fifty days; three more orders are asked about
    customers = [2, 0, 1, 0, 0, 1, 0, 0, 1, 2]
    times = [NOW + day * DAY for day in (20, 33, 45, 50, 55, 60, 70, 71, 72, 73)]
    orders = pl.DataFrame(
        {
            'event_id': [f'order {i}' for i in range(10)],
            'kind': 'order',
            'event_time': times,
            'known_time': times,
            'order_id': range(900, 910),
            'customer': [2**60 + place for place in customers],
            'price': range(1000, 2000, 100),
        },
        schema=dict(task.schema.columns),
    )
    known = orders.head(7)
    store = LmdbStore(tmp_path / 'online', task.features)
    apply_events(store, known)
    store.close()
    model = module.weights_model(b'[0.001, -0.5]', task.features.names, NOW)
    registry = Registry(tmp_path / 'registry', local_uri(tmp_path / 'registry'), name=task.name)
    version = register_model(registry, model, TrainingRun(digest([0])), task.features)
    promote(registry, version, NOW, 'bootstrap')
    yield task, known, orders.tail(3), model
    sys.modules.pop('shop_of_a_test')


WRONG_ORDERS = [
    ({'entities': []}, 'at least one order'),
    ({'entities': [{'order_id': 1, 'event_time': NOW}]}, 'the field customer of each order'),
    ({'entities': [{'order_id': 1, 'customer': 'x', 'event_time': NOW}]}, 'customer as int'),
    ({'entities': [{'order_id': 1, 'customer': 2**64, 'event_time': NOW}]}, 'of 64 bits'),
    ({'entities': [{'order_id': 1, 'customer': 7, 'event_time': '2013-04-01'}]}, 'with a zone'),
]


def test_a_task_of_ones_own(shop, tmp_path):
    task, known, asked, model = shop
    process, client = start_server('shop_of_a_test:SHOP', tmp_path, tmp_path / 'served')
    try:
        answers = client.answers(asked, batch=2)
        X = compute_vectors(
            OfflineReader(known),
            asked.with_columns(cutoff=pl.col('event_time')),
            task.features,
        )
        assert X.tolist()[:2] == [[1600, 3], [1500, 2]] and np.isnan(X[2, 0])
        assert [answer['entity_id'] for answer in answers] == [907, 908, 909]
        assert [answer['p'] for answer in answers] == model.predict(X).tolist()
        for body, said in WRONG_ORDERS:
            with pytest.raises(RequestError, match=said) as refused:
                client.ask('/predict', body)
            words = re.findall(r'flight|airport|sched', str(refused.value))
            assert refused.value.status in (400, 422) and not words
        text = {
            'order_id': 909,
            'customer': 2**60 + 2,
            'event_time': format_time(asked['event_time'][2]),
        }
        by_text = client.ask('/predict', {'entities': [text]})['predictions']
        assert by_text == answers[-1:]
        metadata = json.load(urlopen(f'{client.url}/v2/models/rebuy'))
        assert (metadata['name'], metadata['inputs'][0]['shape']) == ('rebuy', [-1, 2])
        page = urlopen(f'{client.url}/metrics').read().decode()
        assert 'mlref_entities_total{model="rebuy",route="/predict"} 4.0' in page
        assert 'mlref_values_total{model="rebuy",status="expired",view="last"}' in page
    finally:
        process.kill()
        process.wait()
    log = LocalLog(prediction_log(tmp_path / 'served', 0), readonly=True)
    assert json.loads(log.read('predictions', 0, 1)[0])['entity_id'] == '907'
    log.close()


LIGHT = """
import sys
import mlref.client, mlref.serve
heavy = {'torch', 'mlflow', 'onnxruntime', 'lightgbm', 'sklearn', 'starlette', 'uvicorn', 'duckdb'}
print(sorted(heavy & set(sys.modules)))
"""


def test_importing_the_server_imports_nothing_heavy():
    done = subprocess.run([sys.executable, '-c', LIGHT], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stdout + done.stderr


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None  # as if it were not installed
from mlref.core import MlrefError
from mlref.serve import Application, serve
try:
    serve(Application([]), 0)
except MlrefError as error:
    print(error)
"""


@pytest.mark.parametrize('package', ['httptools'])
def test_a_package_that_is_missing_is_one_sentence_with_its_extra(package):
    command = [sys.executable, '-c', WITHOUT, package]
    done = subprocess.run(command, capture_output=True, text=True)
    said = f"expected the package {package}, found none; run: pip install 'mlref[serve]'\n"
    assert done.stdout == said, done.stderr
