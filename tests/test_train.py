"""Training that is killed, in one process and in several; folders of other fits and broken ones"""
import hashlib, json, os, random, signal, subprocess, sys, time
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
from mlref.core import MlrefError, Table
from mlref.distributed import Job, blame, came_to, train_together, write_job
from mlref.model import Net, load_model, save_model
from mlref.pipeline import row, write_results
from mlref.train import fit_torch

DEEP = os.environ.get('MLREF_DEEP') == '1'
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
NAMES, CATS = ('a', 'b', 'c', 'd', 'kind'), {'kind': 5}
JOB = Job(epochs=6, batch=64, width=32, every=7)
STEPS = JOB.epochs * -(-1500 // JOB.batch)

def table(n, seed, day):
    "Rows of a rule that can be learnt, with gaps"
    g = np.random.default_rng(seed); X = g.normal(size=(n, 5)).astype(np.float32); X[:, 4] = g.integers(0, 5, n); X[g.random(n) < .1, 1] = np.nan
    T = day * 1440 + np.sort(g.integers(0, 20 * 1440, n))
    return Table(np.arange(n).astype(str), T, T + 300, (X[:, 0] + (X[:, 4] == 2) + g.normal(size=n) > .8).astype(np.float32), X, NAMES, CATS)

FIT, STOP = table(1500, 1, 15800), table(500, 2, 15825)
CHILD = '''
import json, os, signal, sys
from functools import partial
from pathlib import Path
import numpy as np
from mlref.core import rows
from mlref.distributed import read_job
from mlref.model import Net, save_model
from mlref.train import bce, fit_torch
folder, left = Path(sys.argv[1]), [int(sys.argv[2])]
def dies(logits, target):
    left[0] -= 1
    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
    return bce(logits, target)
dies.__qualname__ = 'bce'
job, fit, stop = read_job(folder)
fit_torch(rows(fit, np.arange(99)), stop, epochs=1)  # so that what comes is the fit, not an import
print('ready', flush=True)
save_model(fit_torch(fit, stop, job.seed, job.epochs, job.batch, job.rate, make=partial(Net, width=job.width, drop=job.drop), folder=folder/'checkpoints', every=job.every, loss=dies), folder/'model')
'''

def weights(folder): return hashlib.sha256((Path(folder)/'model'/'weights.safetensors').read_bytes()).hexdigest()
def child(folder, after=0): return subprocess.Popen([sys.executable, '-c', CHILD, str(folder), str(after)], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
def ends(p): out, err = p.communicate(); return p.returncode, err

def here(at, job=JOB, **more): return save_model(fit_torch(FIT, STOP, job.seed, job.epochs, job.batch, job.rate, make=partial(Net, width=job.width, drop=job.drop), **more), at/'model').parent

@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "As many as the child processes have: bits depend on it"
    n = torch.get_num_threads(); torch.set_num_threads(1); yield; torch.set_num_threads(n)

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "Weights of the fit that nobody killed"
    return weights(here(tmp_path_factory.mktemp('whole')))

def killed(at, how, g):
    "Kill a fit in a random step, or at a random moment, also in the middle of a checkpoint; False = it was done before"
    if how == 'step': p = child(at, g.randint(1, STEPS))
    else: p = child(at); assert p.stdout.readline() == 'ready\n'; time.sleep(g.uniform(0, .3)); p.kill()
    code, err = ends(p); assert code in (0, -signal.SIGKILL), err
    return code != 0 and not (at/'model').exists()

def test_killed_at_any_step_it_goes_on_to_the_same_bits(good, tmp_path):
    g, want, steps, same = random.Random(), 20 if DEEP else 2, [], 0
    while len(steps) < want:
        at = write_job(tmp_path/os.urandom(4).hex(), JOB, FIT, STOP)
        if not killed(at, ('step', 'moment')[len(steps) % 2], g): continue
        steps.append(came_to(at)); assert ends(child(at)) == (0, ''); same += weights(at) == good
    if DEEP: write_results(Path(__file__).parent.parent/'reports'/'results', 'kills', 'MLREF_DEEP=1 pytest tests/test_train.py', [row('kills resumed to the same bits', same, '', '== 20', want), row('places they went on from', len(set(steps)), '', '> 5')])
    assert same == want

def test_other_bits_would_be_seen(good, tmp_path):
    "The comparison can fail: a fit that draws one other batch ends elsewhere"
    assert weights(here(tmp_path, Job(**{**vars(JOB), 'seed': 1}))) != good and weights(here(tmp_path)) == good

def test_a_truncated_checkpoint_gives_way_to_the_one_before_and_two_are_refused(good, tmp_path):
    at = write_job(tmp_path, JOB, FIT, STOP); assert ends(child(at, 40))[0] == -signal.SIGKILL
    old, new = sorted((at/'checkpoints').glob('*.safetensors')); new.write_bytes(new.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=f'checkpoint {new.stem} in .* going on from {old.stem}'): assert weights(here(at, folder=at/'checkpoints', every=JOB.every)) == good
    for f in (at/'checkpoints').glob('*.safetensors'): f.write_bytes(b'')
    with pytest.raises(MlrefError, match='got 2 truncated or altered; delete the folder'): here(at, folder=at/'checkpoints')

PAIR = Job(epochs=12, batch=64, width=32, every=30, seconds=10)

def rank_pid(torchrun, rank):
    "The process of a rank, by the environment torchrun gave it"
    for p in Path(f'/proc/{torchrun}/task/{torchrun}/children').read_text().split():
        if f'RANK={rank}'.encode() in Path(f'/proc/{p}/environ').read_bytes().split(b'\0'): return int(p)

def test_two_processes_learn_what_one_does_and_hold_the_same_weights(tmp_path):
    job = Job(**{**vars(JOB), 'drop': 0.}); two = train_together(write_job(tmp_path, job, FIT, STOP))
    curve, alone = json.loads((tmp_path/'report.json').read_text())['history'], []
    one = load_model(here(tmp_path/'one', job, history=alone)/'model')
    for e, f in zip(curve, alone, strict=True): assert abs(e['train'] - f.train) < 1e-4 and abs(e['stop'] - f.stop) < 1e-4
    assert np.abs(one.predict(STOP.X) - two.predict(STOP.X)).max() < 1e-3 and one.version != two.version

@pytest.mark.parametrize('rank,sign', [(1, signal.SIGKILL)] + ([(0, signal.SIGKILL), (1, signal.SIGSTOP)] if DEEP else []))
def test_the_death_of_one_rank_ends_the_job_soon_and_it_goes_on_to_the_same_bits(rank, sign, tmp_path):
    train_together(write_job(tmp_path/'whole', PAIR, FIT, STOP)); at = write_job(tmp_path/'killed', PAIR, FIT, STOP)
    p = subprocess.Popen([Path(sys.executable).parent/'torchrun', '--standalone', '--nproc-per-node', '2', '-m', 'mlref.distributed', at], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list((at/'checkpoints').glob('0*.json')): assert p.poll() is None; time.sleep(.01)
    os.kill(rank_pid(p.pid, rank), sign); died = time.monotonic()
    said = p.communicate(timeout=120)[1]; took = time.monotonic() - died
    assert p.returncode and took < (60 if sign == signal.SIGSTOP else 20)  # stopped: 10 s until the other gives up, 30 s that torchrun waits before it kills
    assert not (at/'model').exists()
    if sign == signal.SIGKILL: assert blame(said) == f'rank {rank} was killed by signal 9', said
    else: assert 'mlref: rank 0: expected all processes to train to the end, lost one' in said, said
    assert came_to(at) != 'the start' and train_together(at) and weights(at) == weights(tmp_path/'whole')

def test_what_goes_wrong_in_a_rank_is_said_in_its_sentence(tmp_path):
    "A rate so high that the weights overflow: both ranks stop at the same look, nothing poisoned is written"
    at = write_job(tmp_path, Job(**{**vars(JOB), 'rate': 1e30}), FIT, STOP)
    with pytest.raises(MlrefError, match=r'expected 2 processes to train to the end, rank \d: expected a finite loss, got .* of epoch 0; in its batch: no infinite value; .*it goes on from the start'): train_together(at)
