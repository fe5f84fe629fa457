"Feast on Redis: last values, asked in each of its ways; runs in an environment of its own"

import json
import os
import sys
import time
from pathlib import Path

os.environ['FEAST_USAGE'] = 'False'
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
from feast.types import Float64

home = Path(sys.argv[1]).resolve()
spec = json.loads((home / 'spec.json').read_text())
key = spec['key']
repo = home / 'repo_redis'
repo.mkdir(exist_ok=True)
(repo / 'feature_store.yaml').write_text(
    f'project: {home.name.replace("-", "_")}\nprovider: local\n'  # keys of its own in the server
    'registry:\n  path: registry.db\n  cache_ttl_seconds: 3600\n'
    f'online_store:\n  type: redis\n  connection_string: 127.0.0.1:{sys.argv[2]}\n'
    'entity_key_serialization_version: 3\n'
)
store = FeatureStore(repo_path=str(repo))
entity = Entity(name=key, join_keys=[key], value_type=ValueType.STRING)


def make_view(name, values):
    rows = FileSource(
        name=f'{name}_rows', path=str(home / f'{name}.parquet'), timestamp_field='known'
    )
    return FeatureView(
        name=name,
        entities=[entity],
        schema=[Field(name=value, dtype=Float64) for value in values],
        online=True,
        source=PushSource(name=f'{name}_push', batch_source=rows),
    )


views = [make_view(name, values) for name, values in spec['views'].items()]
whole = FeatureService(name='whole', features=views)
store.apply([entity, *views, whole])
refs = [f'{name}:{value}' for name, values in spec['views'].items() for value in values]


def matrix(response):
    "A response as a matrix, the quickest way"
    names = [name.split('__')[-1] for name in response.proto.metadata.feature_names.val]
    at = [names.index(ref.split(':')[1]) for ref in refs]
    columns = response.proto.results
    return np.array([[value.double_val for value in columns[i].values] for i in at]).T


def read(way, keys):
    rows = [{key: each} for each in keys]
    return matrix(store.get_online_features(whole if way == 'service' else refs, rows))


def answer(question):
    if question['op'] == 'push':
        for name in spec['views']:
            store.push(f'{name}_push', pd.read_parquet(home / f'{name}.parquet'))
        return {}
    keys = question['keys']
    X = read(question['way'], keys)
    wall = time.perf_counter()
    cpu = time.process_time()
    for _ in range(question['times']):
        read(question['way'], keys)
    times = question['times']
    return {
        'wall': (time.perf_counter() - wall) / times,
        'cpu': (time.process_time() - cpu) / times,
        'X': X.tolist(),
    }


print(json.dumps({'ready': True}), flush=True)
for line in sys.stdin:
    try:
        found = answer(json.loads(line))
    except Exception as error:
        found = {'error': f'{type(error).__name__}: {error}'[:300]}
    print(json.dumps(found), flush=True)
