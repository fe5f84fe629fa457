"MLServer with a runtime of its own: MODEL PORT FOLDER"

import json
import os
import sys
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from serve_model import arguments, open_scorer


class Scorer(MLModel):
    async def load(self):
        self.score = open_scorer(self.settings.parameters.uri)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        scores = self.score(NumpyCodec.decode_input(payload.inputs[0]))
        output = NumpyCodec.encode_output('p', scores.reshape(-1, 1))
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])


def write_settings(model: str, port: int, folder: Path) -> None:
    "One process, as quiet as it goes"
    folder.mkdir(parents=True, exist_ok=True)
    ports = {'http_port': port, 'grpc_port': port + 1, 'metrics_port': port + 2}
    server = {'host': '127.0.0.1', 'parallel_workers': 0, 'debug': False, **ports}
    server |= {'logging_settings': None, 'metrics_endpoint': None}
    scorer = {'name': 'late', 'implementation': 'serve_mlserver.Scorer'}
    scorer |= {'parameters': {'uri': model, 'version': '1'}}
    (folder / 'settings.json').write_text(json.dumps(server))
    (folder / 'model-settings.json').write_text(json.dumps(scorer))


if __name__ == '__main__':
    model, port, (folder,) = arguments()
    write_settings(model, port, Path(folder))
    environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent)}
    command = str(Path(sys.executable).parent / 'mlserver')
    os.execve(command, [command, 'start', folder], environment)
