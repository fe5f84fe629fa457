"Epochs that the benchmarks of training time: each call of what is returned is one"

from collections.abc import Callable, Sequence

import torch

from mlref.networks import TabularNet
from mlref.seeds import StackedNets, train_stacked
from mlref.train import make_step, run_epoch, start_training
from mlref.training_state import TrainConfig
from mlref.training_step import bce_loss


def resident_epoch(
    net: TabularNet,
    rows: torch.Tensor,  # Where the network is trained
    labels: torch.Tensor,
    config: TrainConfig,
    graph: bool = True,
) -> Callable[[], object]:
    "Epochs of one network, its rows at hand"
    state = start_training(net, config, len(rows), str(rows.device))
    step = make_step(state.net, state.optimizer, rows, labels, config, bce_loss, graph)
    return lambda: list(run_epoch(state, step, config, len(rows)))


def stacked_epoch(
    nets: Sequence[TabularNet],  # Where the rows are
    rows: torch.Tensor,
    labels: torch.Tensor,
    config: TrainConfig,
) -> Callable[[], object]:
    "Epochs of several networks together"
    epochs = train_stacked(StackedNets(nets), rows, labels, range(len(nets)), config)
    return lambda: next(epochs)
