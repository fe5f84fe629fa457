"Feast's side of the point-in-time join: answers one JSON line on stdin with one on stdout; runs in Feast's own environment"

import json
import os
import resource
import sys
import time

os.environ['FEAST_USAGE'] = 'False'
from datetime import timedelta
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Float64


def cpu():
    return sum(
        r.ru_utime + r.ru_stime
        for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def now():
    return (
        int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmRSS'))) // 1024
    )


# ru_maxrss would begin at the parent's
def most():
    return (
        int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM'))) // 1024
    )


def store(home, spec, kind):
    "`spec`: view -> keys, values, ttl in minutes"
    s = FeatureStore(
        config=RepoConfig(
            project='bench',
            provider='local',
            registry=str(home / f'{kind}.db'),
            offline_store={'type': kind},
            online_store={'type': 'sqlite', 'path': str(home / f'{kind}-online.db')},
            entity_key_serialization_version=3,
        )
    )
    entities = {
        k: Entity(name=k, join_keys=[k], value_type=ValueType.STRING)
        for v in spec.values()
        for k in v['keys']
    }
    views = [
        FeatureView(
            name=n,
            entities=[entities[k] for k in v['keys']],
            ttl=timedelta(minutes=v['ttl']),
            schema=[Field(name=x, dtype=Float64) for x in v['values']],
            source=FileSource(
                name=f'{n}_rows', path=str(home / f'{n}.parquet'), timestamp_field='known'
            ),
        )
        for n, v in spec.items()
    ]
    s.apply([*entities.values(), *views])
    return s, [f'{n}:{x}' for n, v in spec.items() for x in v['values']]


home = Path(sys.argv[1])
spec = json.loads((home / 'spec.json').read_text())
stores, asked = {k: store(home, spec, k) for k in ('duckdb', 'dask')}, {}
print(json.dumps({'ready': True}), flush=True)
for line in sys.stdin:
    q = json.loads(line)
    if q['requests'] not in asked:
        asked[q['requests']] = pd.read_parquet(home / q['requests'])
    (s, refs), df = stores[q['kind']], asked[q['requests']].copy()
    before, c, t = now(), cpu(), time.perf_counter()
    try:
        job = s.get_historical_features(entity_df=df, features=refs)
        got = job.to_arrow()
        a = {
            'wall': time.perf_counter() - t,
            'cpu': cpu() - c,
            'rows': got.num_rows,
            'mb': most() - before,
        }
        if q.get('out'):
            pq.write_table(got, home / q['out'])
    except Exception as e:
        a = {'error': f'{type(e).__name__}: {e}'[:300]}
    print(json.dumps(a), flush=True)
