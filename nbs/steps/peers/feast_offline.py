"""Feast's side of the point-in-time join, in Feast's own environment

It answers one JSON line on stdin with one on stdout.
"""

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
    "CPU seconds of this process and of those that it has started and waited for"
    spent = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in spent)


def memory(name):
    "A line of /proc/self/status in MB; ru_maxrss would begin at the parent's"
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) // 1024
    raise KeyError(name)


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
    before, c, t = memory('VmRSS'), cpu(), time.perf_counter()
    try:
        job = s.get_historical_features(entity_df=df, features=refs)
        got = job.to_arrow()
        a = {
            'wall': time.perf_counter() - t,
            'cpu': cpu() - c,
            'rows': got.num_rows,
            'mb': memory('VmHWM') - before,
        }
        if q.get('out'):
            pq.write_table(got, home / q['out'])
    except Exception as e:
        a = {'error': f'{type(e).__name__}: {e}'[:300]}
    print(json.dumps(a), flush=True)
