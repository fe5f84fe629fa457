"Serve every flight of the log from a store that was built by applying it in order; nothing else is known here"

import sys
from pathlib import Path

import numpy as np
import polars as pl

from mlref.events import decode_events
from mlref.flights.events import FLIGHT_SCHEMA, SCHEMA, raw_folder, read_raw
from mlref.flights.features import FLIGHTS, static
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.vectors import compute_vectors

folder = Path(sys.argv[1])
log, store, at, ids, X = (
    LocalLog(folder / 'log', readonly=True),
    LmdbStore(folder / 'online', FLIGHTS),
    0,
    [],
    [],
)
st, plans = (
    static(read_raw(raw_folder(), 'airports'), read_raw(raw_folder(), 'planes')),
    pl.DataFrame(schema=SCHEMA),
)
while msgs := log.read('events', at, 3_000):  # about a day
    new = decode_events(msgs, FLIGHT_SCHEMA)[0].drop('_i')
    at += len(msgs)
    apply_events(store, new, at)
    plans, seen = (
        pl.concat([plans, new.filter(pl.col('kind') == 'schedule')]),
        int(new['known_time'].max()),
    )
    done = not log.read('events', at, 1)  # at the end of the log everything is known
    # every fact known before this minute is in the store
    due = plans if done else plans.filter(pl.col('sched') - 120 < seen)
    plans = plans.filter(pl.lit(False) if done else pl.col('sched') - 120 >= seen)
    if due.height:
        ids.append(due['flight_id'].to_numpy().astype(str))
        X.append(compute_vectors(store, due, FLIGHTS, st))
np.savez(folder / 'online.npz', ids=np.concatenate(ids), X=np.concatenate(X))
