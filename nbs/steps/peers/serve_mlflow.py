"mlflow models serve over a pyfunc of the same model: MODEL PORT FOLDER"

import os
import shutil
import sys
from pathlib import Path

import mlflow
import numpy as np
from serve_model import arguments, open_scorer


class Scorer(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.score = open_scorer(context.artifacts['model'])

    def predict(self, context, model_input, params=None):
        return self.score(np.asarray(model_input, np.float32))


if __name__ == '__main__':
    model, port, (folder,) = arguments()
    shutil.rmtree(folder, ignore_errors=True)
    here = Path(__file__).parent
    mlflow.pyfunc.save_model(
        folder,
        python_model=Scorer(),
        artifacts={'model': model},
        code_paths=[str(here / 'serve_model.py')],
        pip_requirements=[],
    )
    command = str(Path(sys.executable).parent / 'mlflow')
    place = ['--host', '127.0.0.1', '--port', str(port)]
    words = ['models', 'serve', '-m', folder, *place, '--env-manager', 'local', '--workers', '1']
    # gunicorn or uvicorn of this environment, whichever this release starts
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    os.execve(command, [command, *words], {**os.environ, 'PATH': path})
