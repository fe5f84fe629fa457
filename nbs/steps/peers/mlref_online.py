"""Our side of the online store, asked in the same way in a process of its own"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

from mlref.last_values import get_online_features, push
from mlref.lmdb_store import LmdbStore
from mlref.records import RecordLayout
from mlref.sources import to_minutes

home = Path(sys.argv[1])
spec = json.loads((home / 'spec.json').read_text())
key = spec['key']
# the last row of a key, with a TTL that is looked at
layouts = tuple(
    RecordLayout(n, tuple(v), True, 0, f'{i:016x}', 10**7)
    for i, (n, v) in enumerate(spec['views'].items())
)
store, frames = (
    LmdbStore(home / 'ours', more=layouts),
    {n: pl.read_parquet(home / f'{n}.parquet') for n in spec['views']},
)
NOW = max(int(to_minutes(f['known']).max()) for f in frames.values())


def ask(q):
    if q['op'] == 'push':
        f = pl.read_parquet(home / q['file'])
        t, c = time.perf_counter(), time.process_time()
        n = push(
            store,
            q['view'],
            f[key].to_list(),
            to_minutes(f['known']).to_numpy(),
            f.select(spec['views'][q['view']]).to_numpy(),
        )
        return {'wall': time.perf_counter() - t, 'cpu': time.process_time() - c, 'keys': n}
    keys, names, out = (
        q['keys'],
        list(spec['views']),
        np.empty((len(q['keys']), sum(map(len, spec['views'].values())))),
    )

    def call():
        return get_online_features(store, names, [keys] * len(names), NOW, out)

    call()
    t, c = time.perf_counter(), time.process_time()
    for _ in range(q['times']):
        X, state = call()
    return {
        'wall': (time.perf_counter() - t) / q['times'],
        'cpu': (time.process_time() - c) / q['times'],
        'X': X.tolist() if q.get('values') else None,
    }


print(json.dumps({'ready': True}), flush=True)
for line in sys.stdin:
    print(json.dumps(ask(json.loads(line))), flush=True)
store.close()
