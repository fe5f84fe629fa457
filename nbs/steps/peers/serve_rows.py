"The rows of the benchmark of serving: one a server, then one a goal"

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from peers.serve_machine import Measured, Overload

from mlref.results import result_row

Runs = Mapping[str, list[Measured]]  # name of a server -> what was measured in each round


def rate_of(run: Measured) -> float:
    return run.load.rate


def p50_of(run: Measured) -> float:
    return run.load.p50


def p99_of(run: Measured) -> float:
    return run.load.p99


def alone_of(run: Measured) -> float:
    return run.alone.p50


def cpu_of_answer(run: Measured) -> float:
    return run.cpu


def client_of_answer(run: Measured) -> float:
    return run.load.client / max(run.load.answers, 1)


def failed_of(run: Measured) -> int:
    return run.load.refused + run.load.broken


SEEN: dict[str, Callable[[Measured], float]] = {
    'throughput': rate_of,
    'p99': p99_of,
    'p50 at one connection': alone_of,
    'CPU a request': cpu_of_answer,
}
FREE = 'ours on any core'
FREE_TWO = 'ours with two workers on any core'
GOALS = (  # what, whose, over whose, goal
    ('throughput', 'ours', 'FastAPI def', '>= 12'),
    ('throughput', 'ours', 'FastAPI async def', '>= 5'),
    ('p99', 'ours', 'FastAPI def', '<= 0.04'),
    ('throughput', 'ours', 'LitServe', '>= 10'),
    ('throughput', 'ours', 'MLServer', '>= 10'),
    ('throughput', 'ours', 'BentoML', '>= 18'),
    ('throughput', 'ours', 'Ray Serve', '>= 40'),
    ('throughput', 'ours', 'MLflow serve', '>= 15'),
    ('throughput', 'bare', 'mosec', '>= 1'),
    ('throughput', 'ours', 'mosec with the same features', '>= 1'),
    ('p50 at one connection', 'bare', 'mosec', '<= 0.2'),
    ('p50 at one connection', 'ours', 'mosec with the same features', '<= 0.2'),
    ('throughput', 'ours', 'mosec', ''),
    ('throughput', 'bare', 'FastAPI def', ''),  # the most there is without any promise
    ('CPU a request', 'ours', 'hello', '<= 2.5'),
    ('CPU a request', 'bare', 'hello', ''),  # what the model alone takes
    ('CPU a request', 'ours', FREE, ''),
    ('throughput', 'ours', FREE, ''),
    ('CPU a request', 'ours with two workers', FREE_TWO, ''),
    ('throughput', 'ours with two workers', FREE_TWO, ''),
    ('throughput', 'ours with two workers', 'ours', '>= 1.8'),
)
BY_KEYS_GOALS = (
    ('throughput', 'ours', 'ours before', '>= 10'),
    ('throughput', 'ours', 'Feast + FastAPI', '>= 15'),
)


CACHE = 'ours with a cache'
CACHE_GOALS = (
    ('throughput', CACHE, 'ours', ''),
    ('p99', CACHE, 'ours', ''),
)


def median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def server_row(
    name: str,
    runs: list[Measured],
    start: float,  # seconds to the first right answer
) -> dict[str, object]:
    "A server's rate, and all else that was seen of it"
    rates = [run.load.rate for run in runs]
    more = {
        'n_runs': len(runs),
        'spread': [min(rates), max(rates)],
        'p50_ms': 1000 * median(map(p50_of, runs)),
        'p99_ms': 1000 * median(map(p99_of, runs)),
        'alone_p50_ms': 1000 * median(map(alone_of, runs)),
        'cpu_us': 1e6 * median(map(cpu_of_answer, runs)),
        'client_us': 1e6 * median(map(client_of_answer, runs)),
        'memory_mb': sum(runs[-1].memory),
        'start_s': start,
        'failed': sum(map(failed_of, runs)),
    }
    n = sum(run.load.answers for run in runs)
    return result_row(f'{name}: answers a second', median(rates), '', n=n, **more)


def goal_rows(
    found: Runs,
    goals: Iterable[tuple[str, str, str, str]],  # what, whose, over whose, goal
    how: str = '',  # in front of each name
) -> list[dict[str, object]]:
    "One side over the other, round by round; without a side there is no row"
    rows = []
    for what, ours, theirs, goal in goals:
        if ours not in found or theirs not in found:
            continue
        mine = [SEEN[what](run) for run in found[ours]]
        other = [SEEN[what](run) for run in found[theirs]]
        ratios = [left / right for left, right in zip(mine, other, strict=True)]
        more = {'peer': theirs, 'theirs': median(other), 'mine': median(mine)}
        more |= {'ratio': median(ratios), 'low': min(ratios), 'high': max(ratios)}
        name = f'{how}{what}, {ours} over {theirs}'
        rows.append(result_row(name, median(ratios), '', goal, n=len(ratios), **more))
    return rows


def room_row(
    one: list[Measured],  # of one worker
    two: list[Measured],  # of two
    cores: int,  # of this machine
) -> dict[str, object]:
    "What two workers could reach over one where clients need the same cores"
    each = [run.cpu + client_of_answer(run) for run in two]
    limits = [cores / cost / rate_of(run) for cost, run in zip(each, one, strict=True)]
    more = {'low': min(limits), 'high': max(limits)}
    more['why'] = (
        f'an answer costs {1e6 * median(each):.0f} us of workers and client together, and'
        f' {cores} cores have no more to give'
    )
    return result_row(
        'two workers over one: the most that these cores allow',
        median(limits),
        '',
        n=len(limits),
        **more,
    )


def overload_rows(
    found: list[Overload],  # of each round
    deadline: float,  # seconds
) -> list[dict[str, object]]:
    "What is left of the peak, and how long the accepted ones took"
    loads = [each.load for each in found]
    goodputs = [each.load.in_time / each.load.seconds / each.peak for each in found]
    asked = [(load.answers + load.refused) / load.seconds for load in loads]
    offered = [rate / each.peak for rate, each in zip(asked, found, strict=True)]
    more = {
        'n_runs': len(found),
        'spread': [min(goodputs), max(goodputs)],
        'offered': median(offered),
        'peak': median(each.peak for each in found),
        'clients': max(each.clients for each in found),
        'refused': sum(load.refused for load in loads),
        'late': sum(load.answers - load.in_time for load in loads),
        'broken': sum(load.broken for load in loads),
    }
    n = sum(load.answers + load.refused for load in loads)
    answers = sum(load.answers for load in loads)
    late = median(load.accepted_p99 if load.answers else float('inf') for load in loads) / deadline
    grown = median(each.grown for each in found)
    health = [seconds for each in found for seconds in each.health]
    unhealthy = {'failed': sum(each.unhealthy for each in found)}
    name = 'three times too much'
    return [
        result_row(
            f'{name}: goodput, share of the peak', median(goodputs), '', '>= 0.8', n, **more
        ),
        result_row(f'{name}: p99 of the accepted over the deadline', late, '', '<= 1', answers),
        result_row(f'{name}: memory, times that before', grown, '', '<= 1.1', len(found)),
        result_row(
            f'{name}: health, the slowest answer', max(health), 's', '', len(health), **unhealthy
        ),
    ]
