"""Rows scored in batches of one size, in other company, by several threads, on a GPU"""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from mlref.compress import batch_variance
from mlref.core import MlrefError
from mlref.model import TorchPredictor
from mlref.networks import TabularNet
from mlref.recorded_network import RecordedPredictor

NAMES, CATS = ('a', 'b', 'c', 'd', 'kind'), {'kind': 5}
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')


def rows(n, seed=0):
    "Rows with gaps"
    g = np.random.default_rng(seed)
    X = g.normal(size=(n, 5)).astype(np.float32)
    X[:, 4] = g.integers(0, 5, n)
    X[g.random(n) < 0.1, 1] = np.nan
    return X


def network(device='cpu'):
    torch.manual_seed(0)
    net = TabularNet(NAMES, CATS, 32, layers=2)
    net.scale(torch.from_numpy(rows(500, 1)))
    return TorchPredictor(net, 0, device)


DEVICES = ['cpu', pytest.param('cuda', marks=on_cuda)]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('n', [1, 63, 64, 65, 1000])
def test_every_number_of_rows_is_scored_as_the_network_does(n, device):
    alone = network().predict(rows(n))
    recorded = RecordedPredictor(network(device), 64)
    scores = recorded.predict(rows(n))
    assert scores.shape == (n,) and scores.dtype == np.float64
    assert np.abs(scores - alone).max() < 1e-5
    assert recorded.version == network().version


@pytest.mark.parametrize('device', DEVICES)
def test_what_was_scored_before_changes_nothing(device):
    "The rest of a batch that is not full holds rows of the call before"
    recorded = RecordedPredictor(network(device), 64)
    first = recorded.predict(rows(3))
    recorded.predict(np.full((64, 5), np.inf, np.float32))
    assert np.array_equal(recorded.predict(rows(3)), first)
    recorded.predict(rows(64, 9))
    assert np.array_equal(recorded.predict(rows(3)), first)


@pytest.mark.parametrize('device', DEVICES)
def test_scores_do_not_depend_on_the_batch(device):
    assert not any(batch_variance(RecordedPredictor(network(device), 64), rows(3000)).values())


@pytest.mark.parametrize('device', DEVICES)
def test_threads_take_turns(device):
    "Without turns they would read each other's places"
    recorded = RecordedPredictor(network(device), 64)
    asked = [rows(50 + i, i) for i in range(40)]
    alone = [recorded.predict(X) for X in asked]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = [*pool.map(recorded.predict, asked)]
            assert all(map(np.array_equal, together, alone))


@on_cuda
def test_on_cuda_a_network_that_waits_is_refused_with_the_way_out():
    "In a process of its own: a recording that failed is no place to go on from"
    code = (
        'import torch\n'
        'from test_recorded_network import network\n'
        'from mlref.recorded_network import RecordedPredictor\n'
        "model = network('cuda')\n"
        'model.net.register_forward_hook(lambda net, got, gave: gave * gave.max().item())\n'
        'RecordedPredictor(model, 64)\n'
    )
    where = {'cwd': __file__.rpartition('/')[0], 'capture_output': True, 'text': True}
    said = subprocess.run([sys.executable, '-c', code], **where)
    assert said.returncode and 'or score with the model itself' in said.stderr, said.stderr


def test_a_size_that_is_none_is_refused():
    for size in (0, -1, 1.5, '64'):
        with pytest.raises(MlrefError, match='size'):
            RecordedPredictor(network(), size)
