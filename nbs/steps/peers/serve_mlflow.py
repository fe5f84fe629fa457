"mlflow models serve over a pyfunc of the same model: MODEL PORT FOLDER"

import os
import shutil
import sys
from pathlib import Path

import mlflow
from serve_model import arguments

if __name__ == '__main__':
    model, port, (folder,) = arguments()
    shutil.rmtree(folder, ignore_errors=True)
    here = Path(__file__).parent
    mlflow.pyfunc.save_model(
        folder,
        python_model=str(here / 'serve_mlflow_model.py'),  # as code: a pickle is not read any more
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
