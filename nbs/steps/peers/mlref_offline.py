"Our side of the point-in-time join, asked in the same way in a process of its own"

import json
import resource
import sys
import time
from pathlib import Path

import polars as pl

from mlref.features import Entity, FeatureView
from mlref.flights.events import FLIGHT_SCHEMA
from mlref.offline import point_in_time_join
from mlref.sources import from_table


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


home = Path(sys.argv[1])
spec = json.loads((home / 'spec.json').read_text())
asked = {}
sources = {
    n: from_table(n, known='known', keys=tuple(v['keys']), values=dict.fromkeys(v['values'], ''))
    for n, v in spec.items()
}
views = tuple(
    FeatureView(
        name=n,
        entity=Entity(name='|'.join(v['keys']), keys=tuple(v['keys'])),
        source=sources[n],
        stats=tuple(v['values']),
        ttl=v['ttl'],
    )
    for n, v in spec.items()
)
none = pl.DataFrame(schema=FLIGHT_SCHEMA.columns)
print(json.dumps({'ready': True}), flush=True)
for line in sys.stdin:
    q = json.loads(line)
    if q['requests'] not in asked:
        asked[q['requests']] = pl.read_parquet(home / q['requests']).rename(
            {'event_timestamp': 'cutoff'}
        )
    before, c, t = memory('VmRSS'), cpu(), time.perf_counter()
    got = point_in_time_join(
        asked[q['requests']], views, none, {n: pl.read_parquet(home / f'{n}.parquet') for n in spec}
    )
    print(
        json.dumps(
            {
                'wall': time.perf_counter() - t,
                'cpu': cpu() - c,
                'rows': got.height,
                'mb': memory('VmHWM') - before,
            }
        ),
        flush=True,
    )
    if q.get('out'):
        got.write_parquet(home / q['out'])
