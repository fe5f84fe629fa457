"BentoML: MODEL PORT FOLDER"

import os
import sys
from pathlib import Path

import bentoml
import numpy as np
from serve_model import arguments, open_scorer


@bentoml.service(workers=1, traffic={'timeout': 30}, logging={'access': {'enabled': False}})
class Scorer:
    def __init__(self):
        self.score = open_scorer(os.environ['SERVED_MODEL'])

    @bentoml.api(route='/predict')
    def predict(self, features: list[float]) -> dict[str, float]:
        return {'p': float(self.score(np.array([features], np.float32))[0])}


if __name__ == '__main__':
    model, port, _ = arguments()
    here = Path(__file__).parent
    environment = {**os.environ, 'SERVED_MODEL': model, 'PYTHONPATH': str(here)}
    environment |= {'BENTOML_DO_NOT_TRACK': 'True'}
    command = str(Path(sys.executable).parent / 'bentoml')
    words = ['serve', 'serve_bentoml:Scorer', '--host', '127.0.0.1', '--port', str(port)]
    os.chdir(here)
    os.execve(command, [command, *words], environment)
