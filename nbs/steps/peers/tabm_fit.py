"""The authors' TabM, from tabm and rtdl_num_embeddings, in an environment of its own

Answers one line of JSON on stdin with one on stdout.
"""

import copy
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import tabm
import torch
from rtdl_num_embeddings import PiecewiseLinearEmbeddings, PiecewiseLinearEncoding, compute_bins
from sklearn.preprocessing import QuantileTransformer
from torch.nn.functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
)
from torch.nn.utils import clip_grad_norm_

warnings.simplefilter('ignore')  # a column with two edges is told about once for each

home = Path(sys.argv[1])
spec = json.loads((home / 'spec.json').read_text())
torch.set_num_threads(spec['threads'])
PARTS = ('past', 'stop', 'later')
CATEGORIES = [i for i, name in enumerate(spec['names']) if name in spec['cats']]


def sort_columns(past: np.ndarray) -> tuple[list[int], list[int]]:
    "Numbers, and categories: those that are said to be, and columns of two values"
    numbers = []
    two = []
    for i in range(past.shape[1]):
        column = past[:, i]
        if i in CATEGORIES:
            continue
        whole = not np.isnan(column).any()
        (two if whole and len(np.unique(column)) == 2 else numbers).append(i)
    return numbers, [*CATEGORIES, *two]


def to_normal(X: dict[str, np.ndarray], seed: int) -> dict[str, torch.Tensor]:
    "Numbers to a normal distribution by quantiles of noisy training rows; missing is 0 after that"
    past = X['past']
    noise = np.random.RandomState(seed).normal(0, 1e-5, past.shape).astype(np.float32)
    even = QuantileTransformer(
        n_quantiles=max(min(len(past) // 30, 1000), 10),
        output_distribution='normal',
        subsample=10**9,
        random_state=seed,
    ).fit(past + noise)
    normal = {part: np.nan_to_num(even.transform(x)).astype(np.float32) for part, x in X.items()}
    several = [len(np.unique(column)) > 1 for column in normal['past'].T]
    return {part: torch.from_numpy(x[:, several].copy()) for part, x in normal.items()}


def codes_of(values: np.ndarray, column: np.ndarray) -> np.ndarray:
    "The place of each value among those of the training rows; what they lack comes last"
    known = np.isin(column, values)
    return np.where(known, np.searchsorted(values, column), len(values))


def prepare(data, seed: int) -> tuple[dict, list[int]]:
    "Rows as the authors' experiments prepare them, and how many values each category has"
    X = {part: data[f'X_{part}'] for part in PARTS}
    numbers, categories = sort_columns(X['past'])
    normal = to_normal({part: x[:, numbers] for part, x in X.items()}, seed)
    seen = {i: np.unique(X['past'][:, i]) for i in categories}
    rows = {}
    for part, x in X.items():
        codes = [codes_of(values, x[:, i]) for i, values in seen.items()]
        rows[part] = (normal[part], torch.from_numpy(np.column_stack(codes)))
    return rows, [len(values) + 1 for values in seen.values()]


def predict(net, rows) -> torch.Tensor:
    "The mean of the members' probabilities"
    net.eval()
    numbers, codes = rows
    scores = []
    with torch.inference_mode():
        for some, their_codes in zip(numbers.split(4096), codes.split(4096), strict=True):
            logits = net(some, their_codes).squeeze(-1)
            scores.append(logits.double().sigmoid().mean(1))
    return torch.cat(scores)


def make_net(question: dict, numbers: torch.Tensor, sizes: list[int]):
    "Their network with their embeddings"
    bins = compute_bins(numbers, n_bins=question['bins'])
    embeddings = PiecewiseLinearEmbeddings(bins, question['size'], activation=False, version='B')
    return tabm.TabM.make(
        n_num_features=len(bins),
        cat_cardinalities=sizes,
        d_out=1,
        k=question['k'],
        d_block=question['width'],
        num_embeddings=embeddings,
    )


def run_epoch(net, optimizer, rows, y: torch.Tensor, question: dict) -> None:
    "Every row once: a loss for each member, gradients cut at a norm of 1"
    numbers, codes = rows
    net.train()
    for batch in torch.randperm(len(y)).split(question['batch']):
        logits = net(numbers[batch], codes[batch]).squeeze(-1)
        labels = y[batch][:, None].expand(-1, question['k'])
        loss = binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()


def fit(question: dict) -> dict:
    "As the authors' example trains: AdamW with 2e-3 and 3e-4, the best epoch kept"
    wall = time.perf_counter()
    cpu = time.process_time()
    torch.manual_seed(question['seed'])
    data = np.load(home / question['rows'])
    rows, sizes = prepare(data, question['seed'])
    y = torch.from_numpy(data['y_past'])
    y_stop = torch.from_numpy(data['y_stop']).double()
    net = make_net(question, rows['past'][0], sizes)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=3e-4)
    losses = []
    best = {}
    for _ in range(question['epochs']):
        run_epoch(net, optimizer, rows['past'], y, question)
        losses.append(float(binary_cross_entropy(predict(net, rows['stop']), y_stop)))
        if losses[-1] == min(losses):
            best = copy.deepcopy(net.state_dict())
    answer = {
        'wall': time.perf_counter() - wall,
        'cpu': time.process_time() - cpu,
        'losses': losses,
        'weights': sum(tensor.numel() for tensor in net.parameters()),
    }
    net.load_state_dict(best)
    np.save(home / question['out'], predict(net, rows['later']).numpy())
    return answer


def encode(question: dict) -> dict:
    "Numbers between the edges of pieces, in float64 and float32"
    data = np.load(home / question['file'])
    x = torch.from_numpy(data['x'])
    edges = [
        torch.from_numpy(of_column[there])
        for of_column, there in zip(data['edges'], data['there'], strict=True)
    ]
    for name, kind in (('wide', torch.float64), ('narrow', torch.float32)):
        torch.set_default_dtype(kind)
        encoding = PiecewiseLinearEncoding([one.to(kind) for one in edges])
        np.save(home / f'{name}.npy', encoding(x.to(kind)).numpy())
    torch.set_default_dtype(torch.float32)
    return {'pieces': sum(len(one) - 1 for one in edges)}


def make_body(inputs: int, width: int, members: int, weights: dict):
    "Their hidden layers with given weights"
    body = tabm.make_tabm_backbone(
        d_in=inputs,
        n_blocks=2,
        d_block=width,
        dropout=0.0,
        activation='SiLU',
        k=members,
        start_scaling_init='random-signs',
        start_scaling_init_chunks=None,
    )
    ours = {'weight': 'weight', 'r': 'before', 's': 'after', 'bias': 'bias'}
    named = {}
    for i in range(2):
        for theirs, name in ours.items():
            named[f'blocks.{i}.0.{theirs}'] = weights[f'{3 * i}.{name}']
    body.load_state_dict(named)
    return body.double().eval()


def layers(question: dict) -> dict:
    "Hidden layers and heads with given weights, in float64"
    data = np.load(home / question['file']).items()
    weights = {name: torch.from_numpy(array) for name, array in data}
    members, inputs = weights['0.before'].shape
    width = len(weights['0.weight'])
    body = make_body(inputs, width, members, weights)
    head = tabm.LinearEnsemble(width, 1, k=members)
    of_head = {'weight': weights['6.weight'][:, :, None], 'bias': weights['6.bias'][:, None]}
    head.load_state_dict(of_head)
    with torch.inference_mode():
        seen = tabm.ensemble_view(weights['h'].double(), members, False)
        logits = head.double()(body(seen)).squeeze(-1)
    np.save(home / 'logits.npy', logits.numpy())
    return {}


OPERATIONS = {'fit': fit, 'encode': encode, 'layers': layers}

print(json.dumps({'ready': True}), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    try:
        answer = OPERATIONS[question['op']](question)
    except Exception as error:  # the other side says it
        answer = {'error': f'{type(error).__name__}: {error}'[:300]}
    print(json.dumps(answer), flush=True)
