"""What open arrivals say of a server: before a crowd, in it, and after it"""

import json
import subprocess
import sys
from collections.abc import Set
from dataclasses import asdict
from pathlib import Path

import numpy as np
from peers.serve_machine import Server
from peers.serve_open import Arrivals, Stretch, read_arrivals, request_id
from peers.serve_rows import median

from mlref.results import result_row

SHED = (429, 503)  # too much was asked, by one client or by all
_SETTLED = 1.0  # seconds after a crowd that are not counted as after it


def send_arrivals(
    server: Server,
    path: str,
    bodies: Path,  # one a line
    stretches: list[Stretch],
    most: int = 5000,  # connections
    seed: int = 0,
    first: int = 0,  # id of the first request
) -> Arrivals:
    "Load from a process of its own; raises `RuntimeError` when that fails"
    file = bodies.with_suffix('.npz')
    told = {
        'address': ['127.0.0.1', server.port],
        'path': path,
        'bodies': str(bodies),
        'stretches': [asdict(each) for each in stretches],
        'most': most,
        'seed': seed,
        'first': first,
        'file': str(file),
    }
    script = Path(__file__).with_name('serve_open.py')
    command = [sys.executable, str(script), json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'expected open arrivals, got: {done.stderr[-300:]}')
    return read_arrivals(file)


def lost_ids(
    found: Arrivals,
    written: Set[str],  # ids of requests in the logs of the server
    first: int = 0,  # id of the first request
) -> list[str]:
    "Accepted answers that nobody wrote down"
    accepted = (first + np.flatnonzero(found.status == 200)).tolist()
    return [each for each in map(request_id, accepted) if each not in written]


def _quantile(seconds: np.ndarray, q: float = 0.99) -> float:
    return float(np.quantile(seconds, q)) if len(seconds) else float('inf')


def split_stretches(
    found: Arrivals,
    stretches: list[Stretch],
) -> dict[str, np.ndarray]:  # name -> which requests came in it
    "Requests of each stretch"
    edges = np.cumsum([0.0, *[each.seconds for each in stretches]])
    return {
        each.name: (found.moments >= begin) & (found.moments < end)
        for each, begin, end in zip(stretches, edges[:-1], edges[1:], strict=True)
    }


def arrival_rows(
    found: Arrivals,
    stretches: list[Stretch],  # 'before', 'crowd' and 'after'
    peak: float,  # answers a second at the usual load
    deadline: float,  # seconds within which an answer counts
    lost: int,  # accepted answers that nobody wrote down
) -> list[dict[str, object]]:
    "What is left of the peak, who is refused and how, and what remains of a crowd afterwards"
    parts = split_stretches(found, stretches)
    crowd = parts['crowd']
    seconds = next(each.seconds for each in stretches if each.name == 'crowd')
    accepted = found.status == 200
    shed = np.isin(found.status, SHED)
    in_time = int((accepted & crowd & (found.took <= deadline)).sum())
    settled = found.moments > found.moments[parts['after']].min() + _SETTLED
    before = _quantile(found.took[parts['before'] & accepted])
    after = _quantile(found.took[parts['after'] & settled & accepted])
    late = _quantile(found.took[crowd & accepted]) / deadline
    n = int(crowd.sum())
    more = {
        'offered': n / seconds / peak,
        'peak': peak,
        'refused': int((crowd & shed).sum()),
        'behind': _quantile(found.behind[crowd & (found.behind >= 0)]),
    }
    left = int((~accepted & ~shed).sum())
    silent = int((shed & ~found.advised).sum())
    refused_after = int((parts['after'] & settled & shed).sum())
    answers = int((crowd & accepted).sum())
    calm = {'n': int(parts['after'].sum())}
    rows = [
        result_row('goodput, share of the peak', in_time / seconds / peak, '', '>= 0.8', n, **more),
        result_row('p99 of the accepted over the deadline', late, '', '<= 1', answers),
        result_row('refused without Retry-After', silent, '', '== 0', int(shed.sum())),
        result_row('neither answered nor refused', left, '', '== 0', len(found.status)),
        result_row('accepted and not in the log', lost, '', '== 0', int(accepted.sum())),
        result_row('a second after it: p99 over that before', after / before, '', '<= 2', **calm),
        result_row('from a second after it on: refused', refused_after, '', '== 0', **calm),
    ]
    return [{**row, 'name': f'open arrivals, three times the peak: {row["name"]}'} for row in rows]


def join_rounds(
    rounds: list[list[dict[str, object]]],  # the same rows of each
    count: str = '== 0',  # a goal of what must never be
) -> list[dict[str, object]]:
    "What must never be is counted over all rounds; of the rest the median"
    joined = []
    for rows in zip(*rounds, strict=True):
        values = [row['ours'] for row in rows]
        value = sum(values) if rows[0]['goal'] == count else median(values)
        told = {**rows[0], 'n_runs': len(rows), 'spread': [min(values), max(values)]}
        name, unit, goal = (told.pop(each) for each in ('name', 'unit', 'goal'))
        del told['ours'], told['held']
        joined.append(result_row(name, value, unit, goal, **told))
    return joined
