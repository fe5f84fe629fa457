"""Training that is killed, in one process and in several; folders of other fits and broken ones"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlref.core import MlrefError, TrainingSet
from mlref.distributed import TrainJob, blame_rank, describe_progress, train_distributed, write_job
from mlref.model import load_model, save_model
from mlref.networks import TabularNet
from mlref.results import result_row, write_results
from mlref.seeds import fit_seeds
from mlref.train import Runtime, fit_torch, make_step, run_epoch, start_training
from mlref.training_state import TrainConfig
from mlref.training_step import CudaGraphStep, bce_loss

DEEP = os.environ.get('MLREF_DEEP') == '1'
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
# as train_together does
TWO = {**ENV, **({'CUDA_VISIBLE_DEVICES': ''} if torch.cuda.device_count() < 2 else {})}
NAMES, CATS = ('a', 'b', 'c', 'd', 'kind'), {'kind': 5}
JOB = TrainJob(TrainConfig(epochs=6, batch=64), width=32, every=7)
STEPS = JOB.config.epochs * JOB.config.steps(1500)


def table(n, seed, day):
    "Rows of a rule that can be learnt, with gaps"
    g = np.random.default_rng(seed)
    X = g.normal(size=(n, 5)).astype(np.float32)
    X[:, 4] = g.integers(0, 5, n)
    X[g.random(n) < 0.1, 1] = np.nan
    T = day * 1440 + np.sort(g.integers(0, 20 * 1440, n))
    return TrainingSet(
        np.arange(n).astype(str),
        T,
        T + 300,
        (X[:, 0] + (X[:, 4] == 2) + g.normal(size=n) > 0.8).astype(np.float32),
        X,
        NAMES,
        CATS,
    )


FIT, STOP = table(1500, 1, 15800), table(500, 2, 15825)
CHILD = """
import os, signal, sys
from functools import partial
from pathlib import Path
import numpy as np
from mlref.distributed import read_job
from mlref.model import save_model
from mlref.networks import TabularNet
from mlref.train import Runtime, fit_torch
from mlref.training_state import TrainConfig
from mlref.training_step import bce_loss
folder, left = Path(sys.argv[1]), [int(sys.argv[2])]
def dies(logits, target):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return bce_loss(logits, target)
dies.__qualname__ = 'bce_loss'
job, fit, stop = read_job(folder)
# so that what comes is the fit, not an import
fit_torch(fit.take(np.arange(99)), stop, TrainConfig(epochs=1))
print('ready', flush=True)
make = partial(TabularNet, width=job.width, drop=job.drop)
runtime = Runtime(folder / 'checkpoints', every=job.every, graph=len(sys.argv) > 3)
save_model(fit_torch(fit, stop, job.config, make, dies, runtime=runtime), folder / 'model')
"""


def weights(folder):
    return hashlib.sha256((Path(folder) / 'model' / 'weights.safetensors').read_bytes()).hexdigest()


def child(folder, after=0, *graph):
    return subprocess.Popen(
        [sys.executable, '-c', CHILD, str(folder), str(after), *graph],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(p):
    out, err = p.communicate()
    return p.returncode, err


def here(at, job=JOB, **settings):
    "A fit in this process"
    # the losses that kill count their calls: nothing is recorded
    runtime = Runtime(**{'graph': False, **settings})
    make = partial(TabularNet, width=job.width, drop=job.drop)
    model = fit_torch(FIT, STOP, job.config, make, runtime=runtime)
    return save_model(model, at / 'model').parent


def with_config(**settings):
    "The job, other settings of its fit"
    return replace(JOB, config=replace(JOB.config, **settings))


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "As many as the child processes have: bits depend on it"
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "Weights of the fit that nobody killed"
    return weights(here(tmp_path_factory.mktemp('whole')))


def killed(at, how, g):
    "Kill a fit in a random step or at a random moment; False = it was done before"
    if how == 'step':
        p = child(at, g.randint(1, STEPS))
    else:
        p = child(at)
        assert p.stdout.readline() == 'ready\n'
        time.sleep(g.uniform(0, 0.3))
        p.kill()
    code, err = ends(p)
    assert code in (0, -signal.SIGKILL), err
    return code != 0 and not (at / 'model').exists()


def test_killed_at_any_step_it_goes_on_to_the_same_bits(good, tmp_path):
    g, want, steps, same = random.Random(), 20 if DEEP else 2, [], 0
    while len(steps) < want:
        at = write_job(tmp_path / os.urandom(4).hex(), JOB, FIT, STOP)
        if not killed(at, ('step', 'moment')[len(steps) % 2], g):
            continue
        steps.append(describe_progress(at))
        assert ends(child(at)) == (0, '')
        same += weights(at) == good
    if DEEP:
        write_results(
            Path(__file__).parent.parent / 'reports' / 'results',
            'kills',
            'MLREF_DEEP=1 pytest tests/test_train.py',
            [
                result_row('kills resumed to the same bits', same, '', '== 20', want),
                result_row('places they went on from', len(set(steps)), '', '> 5'),
            ],
        )
    assert same == want


def test_other_bits_would_be_seen(good, tmp_path):
    "The comparison can fail: a fit that draws one other batch ends elsewhere"
    assert weights(here(tmp_path, with_config(seed=1))) != good and weights(here(tmp_path)) == good


def test_a_truncated_checkpoint_gives_way_to_the_one_before_and_two_are_refused(good, tmp_path):
    at = write_job(tmp_path, JOB, FIT, STOP)
    assert ends(child(at, 40))[0] == -signal.SIGKILL
    old, new = sorted((at / 'checkpoints').glob('*.safetensors'))
    new.write_bytes(new.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=f'checkpoint {new.stem} in .* going on from {old.stem}'):
        assert weights(here(at, folder=at / 'checkpoints', every=JOB.every)) == good
    for f in (at / 'checkpoints').glob('*.safetensors'):
        f.write_bytes(b'')
    with pytest.raises(MlrefError, match='got 2 truncated or altered; delete the folder'):
        here(at, folder=at / 'checkpoints')


PAIR = TrainJob(TrainConfig(epochs=12, batch=64), width=32, every=30, seconds=10)


def rank_pid(torchrun, rank):
    "The process of a rank, by the environment torchrun gave it"
    for p in Path(f'/proc/{torchrun}/task/{torchrun}/children').read_text().split():
        if f'RANK={rank}'.encode() in Path(f'/proc/{p}/environ').read_bytes().split(b'\0'):
            return int(p)
    raise ProcessLookupError(f'expected a process of rank {rank} below {torchrun}, found none')


def test_two_processes_learn_what_one_does_and_hold_the_same_weights(tmp_path):
    job = replace(JOB, drop=0.0)
    two = train_distributed(write_job(tmp_path, job, FIT, STOP))
    curve, alone = json.loads((tmp_path / 'report.json').read_text())['history'], []
    one = load_model(here(tmp_path / 'one', job, on_epoch=alone.append) / 'model')
    for e, f in zip(curve, alone, strict=True):
        assert abs(e['train'] - f.train) < 1e-4 and abs(e['stop'] - f.stop) < 1e-4
    assert (
        np.abs(one.predict(STOP.X) - two.predict(STOP.X)).max() < 1e-3
        and one.version != two.version
    )


@pytest.mark.parametrize(
    'rank,sign',
    [(1, signal.SIGKILL)] + ([(0, signal.SIGKILL), (1, signal.SIGSTOP)] if DEEP else []),
)
def test_the_death_of_one_rank_ends_the_job_soon_and_it_goes_on_to_the_same_bits(
    rank, sign, tmp_path
):
    train_distributed(write_job(tmp_path / 'whole', PAIR, FIT, STOP))
    at = write_job(tmp_path / 'killed', PAIR, FIT, STOP)
    p = subprocess.Popen(
        [
            Path(sys.executable).parent / 'torchrun',
            '--standalone',
            '--nproc-per-node',
            '2',
            '-m',
            'mlref.distributed',
            at,
        ],
        env=TWO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((at / 'checkpoints').glob('0*.json')):
        assert p.poll() is None
        time.sleep(0.01)
    os.kill(rank_pid(p.pid, rank), sign)
    died = time.monotonic()
    said = p.communicate(timeout=120)[1]
    took = time.monotonic() - died
    # stopped: 10 s until the other gives up, 30 s that torchrun waits before it kills
    assert p.returncode and took < (60 if sign == signal.SIGSTOP else 20)
    assert not (at / 'model').exists()
    if sign == signal.SIGKILL:
        assert blame_rank(said) == f'rank {rank} was killed by signal 9', said
    else:
        assert 'mlref: rank 0: expected all processes to train to the end, lost one' in said, said
    assert (
        describe_progress(at) != 'the start'
        and train_distributed(at)
        and weights(at) == weights(tmp_path / 'whole')
    )


def test_what_goes_wrong_in_a_rank_is_said_in_its_sentence(tmp_path):
    "Weights that overflow: both ranks stop at the same look, nothing poisoned is written"
    at = write_job(tmp_path, with_config(rate=1e30), FIT, STOP)
    with pytest.raises(
        MlrefError,
        match=(
            r'expected 2 processes to train to the end, rank \d: expected a finite loss, got .* of'
            r' epoch 0; in its batch: no infinite value; .*it goes on from the start'
        ),
    ):
        train_distributed(at)


class Stage:
    "CUDA's part in a `CudaGraphStep`, played on a CPU: what is recorded is done at each replay"

    def __init__(self, step, patch):
        self.step, self.said, self.graph = step, [], None
        stream, played = (
            SimpleNamespace(wait_stream=lambda other: None),
            SimpleNamespace(replay=self.replay),
        )
        for name, part in {
            'Stream': lambda: stream,
            'current_stream': lambda: stream,
            'stream': lambda s: nullcontext(),
            'CUDAGraph': lambda: played,
            'graph': self.recording,
        }.items():
            patch.setattr(torch.cuda, name, part)

    @contextmanager
    def recording(self, graph, stream):
        self.graph = graph
        yield
        self.graph = None

    def replay(self):
        self.said.append('replay')
        self.again()

    def __call__(self, at):
        if not self.graph:
            self.said.append(len(at))
            return self.step(at)
        self.said.append('record')
        loss = torch.zeros(())
        self.again = lambda: loss.copy_(self.step(at))
        return loss


def test_rehearsed_without_a_device_recorded_steps_end_in_the_same_bits(monkeypatch):
    "Three full batches, then one recording for all epochs; short batches are never replayed"
    X, y, plan, ends = (
        torch.from_numpy(FIT.X),
        torch.from_numpy(FIT.y),
        TrainConfig(epochs=3, batch=256),
        [],
    )
    for recorded in (False, True):
        torch.manual_seed(0)
        net = TabularNet(NAMES, CATS, 32)
        net.scale(X)
        s = start_training(net, plan, len(FIT))
        step = make_step(net, s.optimizer, X, y, plan, bce_loss)
        if recorded:
            stage = Stage(step, monkeypatch)
            step = CudaGraphStep(stage, plan.batch)
        for _ in range(plan.epochs):
            list(run_epoch(s, step, plan, len(FIT)))
        ends.append([s.losses.clone(), *(v.clone() for v in net.state_dict().values())])
    assert all(a.equal(b) for a, b in zip(*ends, strict=True))
    assert stage.said == [256, 256, 256, 'record', *['replay'] * 2, 220] + 2 * [
        *['replay'] * 5,
        220,
    ]


def test_rehearsed_without_a_device_a_step_that_waits_is_refused_with_the_way_out(monkeypatch):
    def step(at):
        if stage.graph:
            raise RuntimeError('operation not permitted when stream is capturing')
        return at.sum()

    stage = Stage(None, monkeypatch)
    recorded = CudaGraphStep(step, 2)
    for _ in range(3):
        recorded(torch.arange(2))
    with pytest.raises(
        MlrefError,
        match='never waits for the device, got: operation not permitted .* fit with graph=False',
    ):
        recorded(torch.arange(2))


def test_seeds_together_are_those_alone_whatever_their_place(tmp_path):
    plain = partial(TabularNet, width=32, drop=0.0)
    three = TrainConfig(epochs=3, batch=64)
    many, turned = (fit_seeds(FIT, STOP, seeds, three, plain) for seeds in ((0, 1, 2), (2, 0, 1)))
    alone = [fit_torch(FIT, STOP, replace(three, seed=i), plain).predict(STOP.X) for i in range(3)]
    for models in (many, [turned[i] for i in (1, 2, 0)]):
        assert (
            max(np.abs(m.predict(STOP.X) - a).max() for m, a in zip(models, alone, strict=True))
            < 1e-5
        )
    assert np.abs(alone[0] - alone[1]).max() > 0.01
    # and a network like any other
    assert load_model(save_model(many[1], tmp_path)).version == many[1].version


def test_training_is_imported_where_there_is_no_data_plane():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('duckdb', 'polars', 'pyarrow', 'pandas', 'lmdb',"
        " 'fastcore', 'lightgbm', 'mlflow', 'papermill')); import mlref.seeds, mlref.distributed,"
        ' mlref.pipeline'
    )
    subprocess.run([sys.executable, '-c', code], env=ENV, check=True)


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


@on_cuda
@pytest.mark.parametrize('half', [False, True])
def test_on_cuda_recorded_steps_learn_what_plain_ones_do(half, tmp_path):
    "With dropout: a graph that drew the same units in every step would learn something else"
    curves = {g: [] for g in (True, False)}
    for g in curves:
        here(tmp_path / str(g), with_config(half=half), graph=g, on_epoch=curves[g].append)
    for a, b in zip(*curves.values(), strict=True):
        assert abs(a.train - b.train) < 1e-4 and abs(a.stop - b.stop) < 1e-4


@on_cuda
def test_on_cuda_a_recorded_fit_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    job = with_config(epochs=40)
    at = write_job(tmp_path / 'killed', job, FIT, STOP)
    p = child(at, 0, 'graph')
    while not list((at / 'checkpoints').glob('0*.json')):
        assert p.poll() is None
        time.sleep(0.001)
    p.kill()
    p.communicate()
    assert not (at / 'model').exists()
    assert ends(child(at, 0, 'graph')) == (0, '') and weights(at) == weights(
        here(tmp_path / 'whole', job, graph=True)
    )


@on_cuda
def test_on_cuda_recorded_seeds_learn_what_plain_ones_do():
    recorded, plain = (
        fit_seeds(
            FIT,
            STOP,
            range(3),
            TrainConfig(epochs=6, batch=64),
            partial(TabularNet, width=32),
            runtime=Runtime(graph=g),
        )
        for g in (True, False)
    )
    assert (
        max(
            np.abs(a.predict(STOP.X) - b.predict(STOP.X)).max()
            for a, b in zip(recorded, plain, strict=True)
        )
        < 1e-3
    )


@on_cuda
def test_on_cuda_a_loss_that_waits_is_refused_with_the_way_out(tmp_path):
    "In a process of its own: a recording that failed is no place to go on from"
    code = (
        CHILD[: CHILD.index('job, fit, stop')]
        + 'def waits(logits, target):\n    value = bce_loss(logits, target)\n    value.item()\n'
        '    return value\n'
        'job, fit, stop = read_job(folder)\n'
        'fit_torch(fit, stop, TrainConfig(epochs=1, batch=64), loss=waits)\n'
    )
    said = subprocess.run(
        [sys.executable, '-c', code, write_job(tmp_path, JOB, FIT, STOP), '0'],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert said.returncode and 'or fit with graph=False' in said.stderr, said.stderr
