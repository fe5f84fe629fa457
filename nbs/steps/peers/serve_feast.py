"""Feast's online store behind FastAPI, with ONNX Runtime and a durable log: MODEL PORT FOLDER

The vectors of the flights were computed beforehand and pushed: reading them is what is asked here.
"""

import json
import os
import shutil
import time
from pathlib import Path

os.environ['FEAST_USAGE'] = 'False'
import fastapi
import numpy as np
import pandas as pd
import uvicorn
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.types import Float64
from pydantic import BaseModel
from serve_model import arguments, open_scorer

model, port, (folder,) = arguments()
score = open_scorer(model)
given = np.load(Path(os.environ['SERVED_HOME']) / 'rows.npz')
told = json.loads((Path(os.environ['SERVED_HOME']) / 'home.json').read_text())
names = [f'f{i}' for i in range(len(told['names']))]
shutil.rmtree(folder, ignore_errors=True)
Path(folder).mkdir(parents=True)

(Path(folder) / 'feature_store.yaml').write_text(
    'project: bench\nprovider: local\nregistry:\n  path: registry.db\n  cache_ttl_seconds: 3600\n'
    'online_store:\n  type: sqlite\n  path: online.db\nentity_key_serialization_version: 3\n'
)
frame = pd.DataFrame(given['vectors'].astype(np.float64), columns=names)
frame['flight_id'] = [row['flight_id'] for row in told['entities']]
frame['known'] = pd.Timestamp.now('UTC')
frame.to_parquet(Path(folder) / 'vectors.parquet')
store = FeatureStore(repo_path=folder)
flight = Entity(name='flight_id', join_keys=['flight_id'], value_type=ValueType.STRING)
view = FeatureView(
    name='vectors',
    entities=[flight],
    schema=[Field(name=name, dtype=Float64) for name in names],
    source=FileSource(path=f'{folder}/vectors.parquet', timestamp_field='known'),
)
service = FeatureService(name='whole', features=[view])
store.apply([flight, view, service])
store.write_to_online_store('vectors', frame)
log = os.open(Path(folder) / 'predictions.jsonl', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
app = fastapi.FastAPI()


class Request(BaseModel):
    entities: list[dict]


def number_of(value) -> float:
    "NaN comes back as no value at all"
    return value.double_val if value.HasField('double_val') else np.nan


def read_vectors(ids: list[str]) -> np.ndarray:
    "The answer of the store as a matrix, the quickest way there is"
    found = store.get_online_features(service, [{'flight_id': each} for each in ids]).proto
    column = {name: i for i, name in enumerate(found.metadata.feature_names.val)}
    results = found.results
    columns = [[*map(number_of, results[column[name]].values)] for name in names]
    return np.array(columns, np.float32).T.copy()


@app.post('/predict')
def predict(request: Request):
    ids = [each['flight_id'] for each in request.entities]
    scores = score(read_vectors(ids)).tolist()
    answers = [{'entity_id': name, 'p': p} for name, p in zip(ids, scores, strict=True)]
    rows = [json.dumps({**answer, 'answered_at': time.time()}) + '\n' for answer in answers]
    os.write(log, ''.join(rows).encode())
    os.fdatasync(log)
    return {'predictions': answers}


uvicorn.run(app, host='127.0.0.1', port=port, log_level='warning', access_log=False)
