"""Who is measured in the benchmark of serving, how each is installed, started, asked and read

Versions are pinned: a figure is of these, and of no other.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peers.serve_machine import Server
from peers.talk import install

ONNX = 'onnxruntime==1.32.0'
NUMPY = 'numpy==2.4.6'
UVICORN = 'uvicorn[standard]==0.54.0'


def features_body(row: list[float]) -> bytes:
    return json.dumps({'features': row}).encode()


def tensor_body(row: list[float], name: str = 'X') -> bytes:
    tensor = {'name': name, 'datatype': 'FP32', 'shape': [1, len(row)], 'data': row}
    return json.dumps({'inputs': [tensor]}).encode()


def inputs_body(row: list[float]) -> bytes:
    return json.dumps({'inputs': [row]}).encode()


def p_of_features(answer: dict) -> float:
    return answer['p']


def p_of_tensor(answer: dict) -> float:
    return answer['outputs'][0]['data'][0]


def p_of_predictions(answer: dict) -> float:
    return answer['predictions'][0]


def p_of_entities(answer: dict) -> float:
    return answer['predictions'][0]['p']


@dataclass(frozen=True)
class Contender:
    "A server that is asked about one row of numbers, as JSON"

    name: str
    script: str  # in this folder
    packages: tuple[str, ...]
    path: str = '/predict'
    words: tuple[str, ...] = ()  # behind model and port
    body: Callable[[list[float]], bytes] = features_body
    score: Callable[[dict], float] = p_of_features
    environment: str = ''  # folder of its packages; '' = its name
    scores: bool = True  # or does it answer always the same?

    def is_right(
        self,
        p: float,  # what the model gives
    ) -> Callable[[bytes], bool]:
        "Whether an answer holds it"

        def check(answer: bytes) -> bool:
            said = self.score(json.loads(answer))
            return not self.scores or math.isclose(said, p, abs_tol=1e-6)

        return check


FASTAPI = ('fastapi==0.163.2', UVICORN, ONNX, NUMPY)
MOSEC = ('mosec==0.9.8', 'msgspec==0.22.0', ONNX, NUMPY)
LEAN = ('lmdb==3.0.0', 'zlib-ng==1.1.0')  # that the least of ours imports
HELLO = (UVICORN, 'msgspec==0.22.0', *LEAN, ONNX, NUMPY)
TENSOR = {'body': tensor_body, 'score': p_of_tensor}
MOSEC_PATH = '/inference'
CONTENDERS = (
    Contender('FastAPI def', 'serve_fastapi.py', FASTAPI, words=('def',), environment='fastapi'),
    Contender(
        'FastAPI async def', 'serve_fastapi.py', FASTAPI, words=('async',), environment='fastapi'
    ),
    Contender('LitServe', 'serve_litserve.py', ('litserve==0.2.19', ONNX, NUMPY)),
    Contender(
        'MLServer',
        'serve_mlserver.py',
        ('mlserver==1.7.1', ONNX),
        '/v2/models/late/infer',
        **TENSOR,
    ),
    Contender('BentoML', 'serve_bentoml.py', ('bentoml==1.4.40', ONNX, NUMPY)),
    Contender('Ray Serve', 'serve_ray.py', ('ray[serve]==2.60.0', ONNX, NUMPY)),
    Contender(
        'MLflow serve',
        'serve_mlflow.py',
        ('mlflow==3.17.2', UVICORN, 'fastapi==0.163.2', ONNX),
        '/invocations',
        body=inputs_body,
        score=p_of_predictions,
    ),
    Contender('mosec', 'serve_mosec.py', MOSEC, MOSEC_PATH, words=('bare',), environment='mosec'),
    Contender(
        'mosec with the same features',
        'serve_mosec.py',
        MOSEC,
        MOSEC_PATH,
        words=('full',),
        environment='mosec',
        **TENSOR,
    ),
    Contender('bare', 'serve_bare.py', HELLO, words=('bare',), environment='hello'),
    Contender('hello', 'serve_bare.py', HELLO, words=('hello',), environment='hello', scores=False),
    Contender(
        'hello of Uvicorn',
        'serve_uvicorn.py',
        HELLO,
        words=('hello',),
        environment='hello',
        scores=False,
    ),
)


OURS = Contender('ours', '', (), '/v2/models/late/infer', **TENSOR)
BY_KEYS = Contender('ours, by keys', '', (), score=p_of_entities)
FEAST = Contender(
    'Feast + FastAPI',
    'serve_feast.py',
    ('feast==0.67.*', 'fastapi==0.163.2', UVICORN, ONNX),
    environment='feast',
    score=p_of_entities,
)


def prepare(
    contender: Contender,
    folder: Path,  # of all environments
) -> tuple[Path | None, str]:  # its Python; why there is none
    "An environment of its own, made once and completed when it was interrupted"
    name = contender.environment or contender.name.lower().replace(' ', '-')
    return install(folder / f'serve-{name}', *contender.packages)


def write_bodies(
    bodies: list[bytes],
    file: Path,
) -> Path:  # `file`
    "What a client asks, one body a line"
    file.write_bytes(b'\n'.join(bodies) + b'\n')
    return file


def start(
    contender: Contender,
    python: Path,
    model: Path,
    port: int,
    folder: Path,  # where it works
) -> Server:
    "Its processes"
    script = Path(__file__).parent / contender.script
    work = folder / f'work_{port}'
    command = [str(python), str(script), str(model), str(port), *contender.words, str(work)]
    return Server(contender.name, command, port, folder, {'SERVED_HOME': str(model.parent)})


def start_ours(
    name: str,
    checkout: Path,  # whose mlref
    home: Path,  # a run
    port: int,
    folder: Path,
    *words: str,  # more of the command line
) -> Server:
    "`mlref serve` of a checkout"
    code = 'import sys; from mlref.cli import main; sys.exit(main())'
    command = [sys.executable, '-c', code, 'serve', '--home', str(home), '--port', str(port)]
    log = folder / f'served_{name.replace(" ", "_")}'
    here = {'PYTHONPATH': str(checkout), 'PATH': os.environ['PATH']}
    return Server(name, [*command, '--log', str(log), *words], port, folder, here)


def make_home(
    checkout: Path,  # whose mlref makes it
    home: Path,
    raw: str = '',  # folder of the raw files; '' = the installed package
) -> Path:  # `home`
    "A run to serve, by `serve_home.py` in a process of its own; one that is whole is kept"
    if (home / 'home.json').exists():
        return home
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    script = Path(__file__).parent / 'serve_home.py'
    command = [sys.executable, str(script), str(home), *([raw] if raw else [])]
    # one thread: how many there are decides the last bits of a model
    environment = {**os.environ, 'PYTHONPATH': str(checkout), 'MPLBACKEND': 'agg'}
    environment['OMP_NUM_THREADS'] = '1'
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'expected a run in {home}, got: {done.stderr[-500:]}')
    print(home.name, done.stdout.strip().splitlines()[-1], flush=True)
    return home


def unpack_commit(
    repository: Path,
    commit: str,
    folder: Path,
) -> str:  # '' = done; else why not
    "The files of a commit, beside the repository and not of it; those that are here are kept"
    if (folder / 'done').exists():
        return ''
    folder.mkdir(parents=True, exist_ok=True)
    command = ['git', '-C', str(repository), 'archive', '-o', str(folder / 'files.tar'), commit]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f'commit {commit} is not here: {done.stderr.strip()[:150]}'
    with tarfile.open(folder / 'files.tar') as files:
        files.extractall(folder, filter='data')
    (folder / 'done').touch()
    return ''
