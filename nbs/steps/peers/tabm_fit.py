"The authors' TabM, from tabm and rtdl_num_embeddings: answers one JSON line on stdin with one on stdout; runs in an environment of its own"

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
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

warnings.simplefilter('ignore')  # a column with two edges is told about once for each

home = Path(sys.argv[1])
spec = json.loads((home / 'spec.json').read_text())
torch.set_num_threads(spec['threads'])
cats = [i for i, n in enumerate(spec['names']) if n in spec['cats']]


def prepared(data, seed):
    "As the authors' experiments prepare rows: numbers to a normal distribution by quantiles of rows with a little noise, what is missing 0 after that, a column of two values a category, one of a single value left out"
    X = {p: data[f'X_{p}'] for p in ('past', 'stop', 'later')}
    past = X['past']
    some = [i for i in range(past.shape[1]) if i not in cats]
    two = [i for i in some if not np.isnan(past[:, i]).any() and len(np.unique(past[:, i])) == 2]
    some = [i for i in some if i not in two]
    noise = np.random.RandomState(seed).normal(0, 1e-5, (len(past), len(some))).astype(np.float32)
    even = QuantileTransformer(
        n_quantiles=max(min(len(past) // 30, 1000), 10),
        output_distribution='normal',
        subsample=10**9,
        random_state=seed,
    ).fit(past[:, some] + noise)
    num = {p: np.nan_to_num(even.transform(x[:, some])).astype(np.float32) for p, x in X.items()}
    keep = [len(np.unique(c)) > 1 for c in num['past'].T]
    # what the training rows lack comes last
    seen = {i: np.unique(past[:, i]) for i in [*cats, *two]}
    code = lambda v, c: np.where(np.isin(c, v), np.searchsorted(v, c), len(v))
    return {
        p: (
            torch.from_numpy(num[p][:, keep].copy()),
            torch.from_numpy(np.column_stack([code(v, x[:, i]) for i, v in seen.items()])),
        )
        for p, x in X.items()
    }, [len(v) + 1 for v in seen.values()]


def scores(net, rows):
    "The mean of the members' probabilities"
    net.eval()
    with torch.inference_mode():
        return torch.cat(
            [
                net(a, b).squeeze(-1).double().sigmoid().mean(1)
                for a, b in zip(*(t.split(4096) for t in rows))
            ]
        )


def fit(q):
    "As the authors' example trains: AdamW 2e-3 and 3e-4, gradients cut at 1, a loss for each member, the best epoch kept"
    t, c = time.perf_counter(), time.process_time()
    torch.manual_seed(q['seed'])
    data = np.load(home / q['rows'])
    rows, sizes = prepared(data, q['seed'])
    y, ys = torch.from_numpy(data['y_past']), torch.from_numpy(data['y_stop']).double()
    bins = compute_bins(rows['past'][0], n_bins=q['bins'])
    numbers, codes = rows['past']
    net = tabm.TabM.make(
        n_num_features=len(bins),
        cat_cardinalities=sizes,
        d_out=1,
        k=q['k'],
        d_block=q['width'],
        num_embeddings=PiecewiseLinearEmbeddings(bins, q['size'], activation=False, version='B'),
    )
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=3e-4)
    losses = []
    for epoch in range(q['epochs']):
        net.train()
        for at in torch.randperm(len(y)).split(q['batch']):
            loss = binary_cross_entropy_with_logits(
                net(numbers[at], codes[at]).squeeze(-1), y[at][:, None].expand(-1, q['k'])
            )
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
        losses.append(float(binary_cross_entropy(scores(net, rows['stop']), ys)))
        if losses[-1] == min(losses):
            best = copy.deepcopy(net.state_dict())
    a = {
        'wall': time.perf_counter() - t,
        'cpu': time.process_time() - c,
        'losses': losses,
        'weights': sum(p.numel() for p in net.parameters()),
    }
    net.load_state_dict(best)
    np.save(home / q['out'], scores(net, rows['later']).numpy())
    return a


def encode(q):
    "Numbers between the edges of pieces, in float64 and float32"
    a = np.load(home / q['file'])
    x, edges = a['x'], [a['edges'][i][a['there'][i]] for i in range(a['x'].shape[1])]
    for name, kind in (('wide', torch.float64), ('narrow', torch.float32)):
        torch.set_default_dtype(kind)
        np.save(
            home / f'{name}.npy',
            PiecewiseLinearEncoding([torch.from_numpy(e).to(kind) for e in edges])(
                torch.from_numpy(x).to(kind)
            ).numpy(),
        )
    torch.set_default_dtype(torch.float32)
    return {'pieces': sum(len(e) - 1 for e in edges)}


def layers(q):
    "Hidden layers and heads with given weights, in float64"
    a = {k: torch.from_numpy(v) for k, v in np.load(home / q['file']).items()}
    k, ins = a['0.before'].shape
    width = len(a['0.weight'])
    body = tabm.make_tabm_backbone(
        d_in=ins,
        n_blocks=2,
        d_block=width,
        dropout=0.0,
        activation='SiLU',
        k=k,
        start_scaling_init='random-signs',
        start_scaling_init_chunks=None,
    )
    named = {'weight': 'weight', 'r': 'before', 's': 'after', 'bias': 'bias'}
    body.load_state_dict(
        {
            f'blocks.{i}.0.{theirs}': a[f'{3 * i}.{ours}']
            for i in range(2)
            for theirs, ours in named.items()
        }
    )
    head = tabm.LinearEnsemble(width, 1, k=k)
    head.load_state_dict({'weight': a['6.weight'][:, :, None], 'bias': a['6.bias'][:, None]})
    with torch.inference_mode():
        np.save(
            home / 'logits.npy',
            head.double()(body.double().eval()(tabm.ensemble_view(a['h'].double(), k, False)))
            .squeeze(-1)
            .numpy(),
        )
    return {}


print(json.dumps({'ready': True}), flush=True)
for line in sys.stdin:
    q = json.loads(line)
    try:
        a = {'fit': fit, 'encode': encode, 'layers': layers}[q['op']](q)
    except Exception as e:
        a = {'error': f'{type(e).__name__}: {e}'[:300]}
    print(json.dumps(a), flush=True)
