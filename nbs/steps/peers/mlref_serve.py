"""Serve every flight of the log from a store that was built by applying it in order

Nothing else is known here.
"""

import sys
from pathlib import Path

import numpy as np
import polars as pl

from mlref.events import decode_events
from mlref.flights.task import flights_task
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.vectors import compute_vectors

BATCH = 3_000  # messages, about a day

folder = Path(sys.argv[1])
task = flights_task()
log = LocalLog(folder / 'log', readonly=True)
store = LmdbStore(folder / 'online', task.features)
cutoff = pl.col(task.request_time) - task.calendar.horizon
waiting = pl.DataFrame(schema=dict(task.schema.columns))
position = 0
ids = []
vectors = []
while messages := log.read('events', position, BATCH):
    new = decode_events(messages, task.schema)[0].drop('_i')
    position += len(messages)
    apply_events(store, new, position)
    waiting = pl.concat([waiting, new.filter(pl.col('kind') == task.request_kind)])
    seen = int(new['known_time'].max())
    # every fact known before this minute is in the store; at the end of the log all are
    done = not log.read('events', position, 1)
    is_due = pl.lit(True) if done else cutoff < seen
    due = waiting.filter(is_due)
    waiting = waiting.filter(~is_due)
    if due.height:
        ids.append(due[task.schema.entity_id].to_numpy().astype(str))
        vectors.append(compute_vectors(store, due, task.features, task.lookups))
np.savez(folder / 'online.npz', ids=np.concatenate(ids), X=np.concatenate(vectors))
