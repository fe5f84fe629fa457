"Feast on Redis: last values, asked in each of its ways; runs in an environment of its own"

import sys
import time
from pathlib import Path

import pandas as pd
from feast_repo import FeastRepo, answer_lines

home = Path(sys.argv[1]).resolve()
repo = FeastRepo(
    home,
    'repo_redis',
    home.name.replace('-', '_'),  # keys of its own in the server
    f'  type: redis\n  connection_string: 127.0.0.1:{sys.argv[2]}\n',
)
repo.store.apply([repo.entity, *repo.views, repo.whole])


def read(way, keys):
    return repo.read(repo.whole if way == 'service' else repo.refs, keys)


def answer(question):
    if question['op'] == 'push':
        for name in repo.spec['views']:
            repo.store.push(f'{name}_push', pd.read_parquet(home / f'{name}.parquet'))
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


answer_lines(answer)
