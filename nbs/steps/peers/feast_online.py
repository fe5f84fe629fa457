"Feast's side of the online store: one JSON line answers one; runs in Feast's own environment"

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request

os.environ['FEAST_USAGE'] = 'False'
from pathlib import Path

import numpy as np
import pandas as pd
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    ValueType,
)
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Bytes, Float64

home = Path(sys.argv[1]).resolve()
spec = json.loads((home / 'spec.json').read_text())
key, repo = spec['key'], home / 'repo'
repo.mkdir(exist_ok=True)
(repo / 'feature_store.yaml').write_text(
    'project: bench\nprovider: local\nregistry:\n  path: registry.db\n  cache_ttl_seconds:'
    ' 3600\nonline_store:\n  type: sqlite\n  path: online.db\nentity_key_serialization_version: 3\n'
)
store, entity = (
    FeatureStore(repo_path=str(repo)),
    Entity(name=key, join_keys=[key], value_type=ValueType.STRING),
)
views = [
    FeatureView(
        name=n,
        entities=[entity],
        schema=[Field(name=x, dtype=Float64) for x in v],
        online=True,
        source=PushSource(
            name=f'{n}_push',
            batch_source=FileSource(
                name=f'{n}_rows', path=str(home / f'{n}.parquet'), timestamp_field='known'
            ),
        ),
    )
    for n, v in spec['views'].items()
]
whole, made = (
    FeatureService(name='whole', features=views),
    FeatureService(name='made', features=views, precompute_online=True),
)
hidden = FeatureView(
    name='__precomputed__made',
    entities=[entity],
    schema=[Field(name='vector', dtype=Bytes)],
    source=FileSource(
        name='none',
        path=str(home / f'{next(iter(spec["views"]))}.parquet'),
        timestamp_field='known',
    ),
)
store.apply([entity, *views, whole, hidden])  # SQLite gives the vectors no table of their own
refs, frames = (
    [f'{n}:{x}' for n, v in spec['views'].items() for x in v],
    {n: pd.read_parquet(home / f'{n}.parquet') for n in spec['views']},
)


def vector(r):
    "A response as a matrix, the quickest way"
    names = [n.split('__')[-1] for n in r.proto.metadata.feature_names.val]
    at = [names.index(x.split(':')[1]) for x in refs]
    c = r.proto.results
    return np.array([[v.double_val for v in c[i].values] for i in at]).T


def ways(keys):
    rows, body = (
        [{key: k} for k in keys],
        json.dumps({'features': refs, 'entities': {key: keys}}).encode(),
    )

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
        'references': lambda: vector(store.get_online_features(refs, rows)),
        'service': lambda: vector(store.get_online_features(whole, rows)),
        'precomputed': lambda: vector(store.get_online_features(made, rows)),
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
server = None
print(json.dumps({'ready': True}), flush=True)
for line in sys.stdin:
    q = json.loads(line)
    try:
        if q['op'] == 'server':
            server = subprocess.Popen(
                [
                    str(Path(sys.executable).parent / 'feast'),
                    '-c',
                    str(repo),
                    'serve',
                    '-h',
                    '127.0.0.1',
                    '-p',
                    str(PORT),
                    '--no-access-log',
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for _ in range(60):
                try:
                    urllib.request.urlopen(f'http://127.0.0.1:{PORT}/health', timeout=1)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise TimeoutError('no answer from feast serve in 30 s')
            a = {}
        else:
            a = ask(q)
    except Exception as e:
        a = {'error': f'{type(e).__name__}: {e}'[:300]}
    print(json.dumps(a), flush=True)
if server:
    server.terminate()
    server.wait(10)
