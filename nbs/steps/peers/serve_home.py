"""A run to serve: FOLDER

A network of a week as ONNX file, champion of a registry, a second one beside it to swap with, and
the online store of a morning. Each release of mlref makes its own, so that it reads what it wrote:
only what both have is imported (tests/test_bench_serve.py).
"""

import json
import sys
from pathlib import Path

import numpy as np

from mlref.addresses import sqlite_uri
from mlref.compress import build_engine
from mlref.contracts import validate
from mlref.core import DAY, known_by, parse_time
from mlref.events import events_between
from mlref.flights.events import check_raw, raw_folder, read_year
from mlref.flights.task import flights_task
from mlref.lmdb_store import LmdbStore
from mlref.materialize import apply_events
from mlref.promotion import promote
from mlref.recipes import fit_recipe
from mlref.registry import Registry, TrainingRun, register_model
from mlref.request_fields import entity_rows, request_fields
from mlref.task import select_requests
from mlref.training_set import training_set
from mlref.vectors import compute_vectors

home = Path(sys.argv[1])
raw = check_raw(sys.argv[2] if len(sys.argv) > 2 else raw_folder())
task = flights_task(raw)
now = parse_time('2013-03-15T07:00')
year = read_year(raw)
stretch = events_between(year, parse_time('2013-03-01'), parse_time('2013-03-17'))
events = validate(stretch, task.contract).good

past = known_by(training_set(events, task, now - 7 * DAY, now), now)
edge = now - 2 * DAY
train = known_by(past.take(past.cutoff < edge), edge)
own = sqlite_uri((home / 'registry' / 'mlflow.db').resolve())
registry = Registry(home / 'registry', own, name=task.name)
numbers = []
models = []
for seed in (0, 1):
    network = fit_recipe('torch', train, past.take(past.cutoff >= edge), seed)
    model = build_engine(network, 'onnx', train.X)
    numbers.append(register_model(registry, model, TrainingRun('bench'), task.features))
    models.append(model)
served, other = models
(home / 'model.onnx').write_bytes(served.data)
promote(registry, numbers[0], now, 'bench')

# every number is finite: a server that takes lists of numbers has no way to say that one is missing
X = np.nan_to_num(past.X)
store = LmdbStore(home / 'online', task.features)
apply_events(store, events_between(events, 0, now))
due = select_requests(task, events, now, now + 720)
vectors = compute_vectors(store, due, task.features, task.lookups)
store.close()
np.savez(
    home / 'rows.npz',
    X=X,
    p=served.predict(X),
    other=other.predict(X),
    vectors=vectors,
    by_keys=served.predict(vectors),
)
entities = entity_rows(due, request_fields(task))
told = {
    'versions': numbers,
    'models': [model.version for model in models],
    'names': list(served.names),
    'entities': entities,
}
(home / 'home.json').write_text(json.dumps(told))
print(f'{len(X):,} rows, {len(entities)} flights to ask about by their keys')
