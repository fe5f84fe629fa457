"FastAPI and ONNX Runtime, as most begin: MODEL PORT def|async FOLDER"

import fastapi
import numpy as np
import uvicorn
from pydantic import BaseModel
from serve_model import arguments, open_scorer

model, port, (kind, _) = arguments()
score = open_scorer(model)
app = fastapi.FastAPI()


class Row(BaseModel):
    features: list[float]


def answer(row: Row):
    return {'p': float(score(np.array([row.features], np.float32))[0])}


async def answer_at_once(row: Row):
    return answer(row)


app.post('/predict')(answer if kind == 'def' else answer_at_once)
uvicorn.run(app, host='127.0.0.1', port=port, log_level='warning', access_log=False)
