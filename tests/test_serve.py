"""A real server process over a run: answers equal the offline scores, bad input costs its sender one sentence, predictions survive a kill -9"""
import json, signal, subprocess, sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen
import numpy as np, polars as pl, pytest
from mlref.core import HORIZON, known_by, minute, rows
from mlref.events import FLIGHT, raw_folder
from mlref.lake import events_at
from mlref.lifecycle import Home, Plan, bootstrap, deliver, source
from mlref.log import LocalLog
from mlref.offline import table
from mlref.registry import champion

SERVE = [sys.executable, '-c', 'import sys; from mlref.pipeline import main; sys.exit(main())', 'serve']
START, NOW = minute('2013-03-01T07:00'), minute('2013-03-20T07:00')

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    at = tmp_path_factory.mktemp('home')
    stream = source(raw_folder(), seed=0).filter(pl.coalesce('sched', 'known_time') >= START)
    h = Home(at); deliver(h, stream, NOW); bootstrap(h, Plan('torch', stop=4), NOW - 1440)
    t = table(events_at(h.lake), h.static, NOW - 600, NOW); model = champion(h.registry)
    req = h.lake.sql(f"select {', '.join(FLIGHT)} from events where kind = 'schedule' and sched - {HORIZON} >= ? and sched - {HORIZON} < ? order by sched, event_id", NOW - 600, NOW)
    h.close()
    assert req['flight_id'].to_list() == t.ids.tolist()
    return at, t, model, req.to_dicts()

@pytest.fixture(scope='module')
def url(home):
    p = subprocess.Popen([*SERVE, '--home', home[0], '--log', home[0]/'served', '--port', '0'], stdout=subprocess.PIPE, text=True)
    line = p.stdout.readline(); assert ' at http://' in line, line
    yield line.split(' at ')[1].strip(), p
    p.kill(); p.wait()

def call(url, path, body):
    try: return 200, json.load(urlopen(Request(url + path, body if isinstance(body, bytes) else json.dumps(body).encode()), timeout=60))
    except HTTPError as e: return e.code, json.load(e)

def vectors(X): return {'inputs': [{'name': 'X', 'datatype': 'FP32', 'shape': list(X.shape), 'data': [None if np.isnan(v) else float(v) for v in X.ravel()]}]}

@pytest.mark.parametrize('b', [1, 7, 32])
def test_scores_over_http_are_the_offline_scores_in_any_batch(home, url, b):
    _, t, model, flights = home; want = model.predict(t.X); n = min(len(t), 4 * b)
    keys, vecs = [], []
    for i in range(0, n, b):
        keys += [x['p'] for x in call(url[0], '/predict', {'flights': flights[i:i+b]})[1]['predictions']]
        vecs += call(url[0], '/v2/models/late/infer', vectors(t.X[i:i+b]))[1]['outputs'][0]['data']
    assert keys[:n] == vecs[:n] == want[:len(keys)].tolist()[:n]

ONE = 'flights'
BAD = [('/predict', b'{"flights": [', 400, 'expected a JSON object'), ('/predict', {}, 400, "expected 'flights'"), ('/predict', {'flights': [{'origin': 'EWR'}]}, 400, 'expected the field flight_id'),
       ('/v2/models/late/infer', {'inputs': [{'name': 'X', 'datatype': 'FP32', 'shape': [1, 3], 'data': [1, 2, 3]}]}, 400, 'expected shape [rows, 132]'),
       ('/v2/models/late/infer', {'inputs': [{'name': 'X', 'datatype': 'FP64', 'shape': [1, 132], 'data': [0] * 132}]}, 400, 'expected datatype FP32'),
       ('/v2/models/late/infer', b'{"inputs": NaN}', 400, 'send null for a missing feature'), ('/v2/models/late/infer', {'inputs': [{'name': 'X', 'datatype': 'FP32', 'shape': [1, 132], 'data': [1e300] * 132}]}, 400, 'fit into float32'),
       ('/invocations', {'dataframe_split': {'columns': ['carrier'], 'data': [[1]]}}, 400, '131 are missing'), ('/invocations', b'\xff\xfe', 400, 'expected a JSON object'), ('/predict', b'x' * 9_000_000, 413, 'expected at most 8,388,608 bytes')]

@pytest.mark.parametrize('path, body, status, says', BAD, ids=[f'{p}-{s}' for p, _, _, s in BAD])
def test_bad_input_gets_its_status_and_one_sentence_and_the_server_is_unharmed(home, url, path, body, status, says):
    got, said = call(url[0], path, body)
    assert got == status and says in said['error'] and said['error'].count('\n') == 0
    assert call(url[0], '/predict', {'flights': home[3][:1]})[1]['predictions'][0]['p'] == home[2].predict(home[1].X[:1])[0]

@pytest.mark.parametrize('change, status, says', [({'dest': 'XXX'}, 422, 'airports known'), ({'origin': 'LAX'}, 422, 'EWR, JFK, LGA'), ({'sched': 'noon'}, 400, 'sched as int'), ({'sched': 10**30}, 400, 'in minutes'), ({'sched': 5}, 422, 'older than what is kept')])
def test_a_flight_that_cannot_be_scored(home, url, change, status, says):
    got, said = call(url[0], '/predict', {'flights': [{**home[3][0], **change}]}); assert (got, says in said['error']) == (status, True), said

def test_a_port_in_use(home, url):
    r = subprocess.run([*SERVE, '--home', home[0], '--log', home[0]/'other', '--port', url[0].rsplit(':', 1)[1]], capture_output=True, text=True)
    assert r.returncode == 1 and 'to be free' in r.stderr and len(r.stderr.strip().splitlines()) == 1

def test_a_registry_that_is_gone_is_said_and_serving_goes_on(home, url):
    db = home[0]/'registry'/'mlflow.db'; db.rename(home[0]/'away.db')
    try:
        got, said = call(url[0], '/v2/repository/models/late/load', {}); assert got == 503 and 'still serving' in said['error']
        assert call(url[0], '/predict', {'flights': home[3][:2]})[0] == 200
    finally: (home[0]/'away.db').rename(db)
    assert call(url[0], '/v2/repository/models/late/load', {}) == (200, {'model_version': home[2].version})

def test_what_was_answered_is_on_disk_after_kill_9(home, url):
    before = json.load(urlopen(url[0] + '/health/ready'))['model_version']
    answered = call(url[0], '/predict', {'flights': home[3][:50]})[1]['predictions']
    url[1].send_signal(signal.SIGKILL); url[1].wait()
    log = LocalLog(home[0]/'served', readonly=True); end = log.end('predictions')
    last = [json.loads(m) for m in log.read('predictions', end - len(answered), len(answered))]
    assert [(m['flight_id'], m['p'], m['version']) for m in last] == [(a['flight_id'], a['p'], before) for a in answered] and all(m['trained_until'] <= m['scored_at'] for m in last)
