"A process that reads last values from a store, some seconds a turn, and says how often and long"

import json
import sys
import time
from pathlib import Path

import numpy as np

from mlref.ext.redis_store import RedisStore
from mlref.last_values import get_online_features
from mlref.lmdb_store import LmdbStore

given = json.loads(sys.argv[1])
if given['url']:
    store = RedisStore(given['url'], given['space'], readonly=True)
else:
    store = LmdbStore(Path(given['folder']), readonly=True)
names = given['names']
out = np.empty((len(given['keys']), given['values']))


def read():
    get_online_features(store, names, [given['keys']] * len(names), given['now'], out)


def read_for(seconds):
    "How often it could read, how long that took, and what it used"
    times = []
    cpu = time.process_time()
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        read()
        times.append(time.perf_counter() - start)
    status = Path('/proc/self/status').read_text()
    return {
        'reads': len(times),
        'p50': float(np.median(times)),
        'p99': float(np.quantile(times, 0.99)),
        'cpu': (time.process_time() - cpu) / len(times),
        'memory': int(status.split('VmHWM:')[1].split()[0]) / 1024,  # MB at most
        'sum': float(out.sum()),
    }


read()
print('ready', flush=True)
for _ in sys.stdin:  # a line a turn, so that all begin together
    print(json.dumps(read_for(given['seconds'])), flush=True)
