"A process that reads last values from a store for some seconds, and says how often and how long"

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


read()
print('ready', flush=True)
_ = sys.stdin.readline()  # all begin together
times = []
cpu = time.process_time()
end = time.perf_counter() + given['seconds']
while (start := time.perf_counter()) < end:
    read()
    times.append(time.perf_counter() - start)
status = Path('/proc/self/status').read_text()
said = {
    'reads': len(times),
    'p50': float(np.median(times)),
    'p99': float(np.quantile(times, 0.99)),
    'cpu': (time.process_time() - cpu) / len(times),
    'memory': int(status.split('VmHWM:')[1].split()[0]) / 1024,  # MB at most
    'sum': float(out.sum()),
}
print(json.dumps(said), flush=True)
