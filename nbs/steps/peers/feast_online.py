"Feast's side of the online store: one JSON line answers one; runs in Feast's own environment"

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
from feast import FeatureService, FeatureView, Field, FileSource
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Bytes
from feast_repo import FeastRepo, answer_lines

home = Path(sys.argv[1]).resolve()
repo = FeastRepo(home, 'repo', 'bench', '  type: sqlite\n  path: online.db\n')
spec, store, key, refs = repo.spec, repo.store, repo.key, repo.refs
made = FeatureService(name='made', features=repo.views, precompute_online=True)
hidden = FeatureView(
    name='__precomputed__made',
    entities=[repo.entity],
    schema=[Field(name='vector', dtype=Bytes)],
    source=FileSource(
        name='none',
        path=str(home / f'{next(iter(spec["views"]))}.parquet'),
        timestamp_field='known',
    ),
)
# SQLite gives the vectors no table of their own
store.apply([repo.entity, *repo.views, repo.whole, hidden])
frames = {name: pd.read_parquet(home / f'{name}.parquet') for name in spec['views']}


def ways(keys):
    body = json.dumps({'features': refs, 'entities': {key: keys}}).encode()

    def http():
        ask = urllib.request.Request(
            f'http://127.0.0.1:{PORT}/get-online-features',
            body,
            {'Content-Type': 'application/json'},
        )
        with urllib.request.urlopen(ask) as a:
            r = json.loads(a.read())
        names = r['metadata']['feature_names']
        at = [names.index(x.split(':')[1]) for x in refs]
        return np.array([r['results'][i]['values'] for i in at], float).T

    return {
        'references': lambda: repo.read(refs, keys),
        'service': lambda: repo.read(repo.whole, keys),
        'precomputed': lambda: repo.read(made, keys),
        'server': http,
    }


def precompute():
    """What Feast's own precompute writes, which it does for Redis only

    The same message, through the same call of its store, in the order its reader expects.
    """
    from feast.protos.feast.core.PrecomputedFeatureVector_pb2 import (
        FeatureViewTimestamp,
        PrecomputedFeatureVector,
    )
    from google.protobuf.timestamp_pb2 import Timestamp

    store.apply([made])
    online, expected = store._get_provider().online_store, []
    inner = online._compute_expected_feature_names

    def note(*a, **k):
        expected[:] = inner(*a, **k)
        return expected

    online._compute_expected_feature_names = note
    with contextlib.suppress(RuntimeError):
        store.get_online_features(made, [{key: spec['keys'][0]}])
    del online._compute_expected_feature_names
    last, now = {n: f.set_index(key) for n, f in frames.items()}, Timestamp()
    now.GetCurrentTime()
    view = {x: n for n, v in spec['views'].items() for x in v}
    for k in spec['keys']:
        stamps = []
        for n in last:
            t = Timestamp()
            t.FromDatetime(last[n].loc[k, 'known'].to_pydatetime().replace(tzinfo=None))
            stamps.append(FeatureViewTimestamp(feature_view_name=n, event_timestamp=t))
        v = PrecomputedFeatureVector(
            feature_names=expected,
            values=[Value(double_val=float(last[view[x]].loc[k, x])) for x in expected],
            fv_timestamps=stamps,
            precomputed_at=now,
        )
        online.write_precomputed_vector(
            config=store.config,
            feature_service_name='made',
            project=store.project,
            entity_key=EntityKey(join_keys=[key], entity_values=[Value(string_val=k)]),
            vector_bytes=v.SerializeToString(),
        )


def ask(q):
    if q['op'] == 'push':
        f = pd.read_parquet(home / q['file'])
        t, c = time.perf_counter(), time.process_time()
        store.push(f'{q["view"]}_push', f)
        return {'wall': time.perf_counter() - t, 'cpu': time.process_time() - c}
    if q['op'] == 'precompute':
        precompute()
        return {}
    call = ways(q['keys'])[q['way']]
    call()
    t, c = time.perf_counter(), time.process_time()
    for _ in range(q['times']):
        X = call()
    return {
        'wall': (time.perf_counter() - t) / q['times'],
        'cpu': (time.process_time() - c) / q['times'],
        'X': X.tolist() if q.get('values') else None,
    }


PORT = int(sys.argv[2])
servers = []


def start_server():
    "Feast's own server, once it answers"
    program = str(Path(sys.executable).parent / 'feast')
    where = ('-h', '127.0.0.1', '-p', str(PORT), '--no-access-log')
    quiet = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL}
    servers.append(subprocess.Popen([program, '-c', str(repo.path), 'serve', *where], **quiet))
    for _ in range(60):
        try:
            urllib.request.urlopen(f'http://127.0.0.1:{PORT}/health', timeout=1)
            return {}
        except OSError:
            time.sleep(0.5)
    raise TimeoutError('no answer from feast serve in 30 s')


answer_lines(lambda question: start_server() if question['op'] == 'server' else ask(question))
for server in servers:
    server.terminate()
    server.wait(10)
