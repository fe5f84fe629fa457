"Rows of a part under growing load, and the load from which moving pays"

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlref.results import result_row

Run = Mapping[str, float]  # rate, p50, ... of one round
Found = Mapping[tuple[str, int], Sequence[Run]]  # engine and load -> its rounds


@dataclass(frozen=True)
class Part:
    "What may be moved to an engine"

    name: str
    default: str  # what it is without one
    engine: str
    load_of: str  # what grows
    what: str  # is counted
    cores: int  # that the default keeps busy at its best

    def row_name(self, engine: str, load: int) -> str:
        return f'{self.name}, {engine}, {load:,} {self.load_of}: {self.what}'


STORE = Part('store', 'files', 'Redis', 'processes', 'reads of 100 x 12', 2)
LOG = Part('log', 'files', 'Kafka, mock cluster', 'events sent a second', 'events into a lake', 2)
SERVING = Part('serving', 'mlref serve', 'Ray Serve', 'connections', 'answers', 1)
TRAINING = Part('training', 'one process', 'Ray Train, two workers', 'rows a fit', 'rows learnt', 1)
SCALES = {  # to ms, us
    'p50': 1000,
    'p99': 1000,
    'told_p50': 1000,
    'told_p99': 1000,
    'cpu': 1e6,
    'server_cpu': 1e6,
}
NOT_SHOWN = ('rate', 'answers', 'epochs', 'stop')


def median_of(runs: Sequence[Run], name: str) -> float:
    return float(np.median([run[name] for run in runs]))


def load_row(
    part: Part,
    engine: str,
    load: int,
    runs: Sequence[Run],
) -> dict[str, object]:
    "What one side carried at one load, with waits in ms, CPU in us, memory in MB"
    rates = [run['rate'] for run in runs]
    more = {'part': part.name, 'engine': engine, 'load': load, 'load_of': part.load_of}
    more |= {'n_runs': len(runs), 'spread': [min(rates), max(rates)]}
    for name in runs[0]:
        if name not in NOT_SHOWN:
            more[name] = SCALES.get(name, 1) * median_of(runs, name)
    name = part.row_name(engine, load)
    return result_row(name, median_of(runs, 'rate'), '1/s', **more)


def first_from(
    ratios: Mapping[int, Sequence[float]],  # load -> of each round
    holds: Callable[[Sequence[float]], bool],
) -> int | None:
    "The least load at which something holds, and at every larger one; None = not at the largest"
    found = None
    for load in sorted(ratios, reverse=True):
        if not holds(ratios[load]):
            break
        found = load
    return found


def find_crossover(
    ratios: Mapping[int, Sequence[float]],  # load -> engine over default, of each round
) -> dict[str, int | None]:
    "From which load on the engine is ahead: in half of the rounds, in one of them, in all"
    return {
        'crosses': first_from(ratios, lambda each: float(np.median(each)) > 1),
        'earliest': first_from(ratios, lambda each: max(each) > 1),
        'latest': first_from(ratios, lambda each: min(each) > 1),
    }


def ratios_of(part: Part, found: Found, name: str) -> dict[int, list[float]]:
    "Load -> engine over default, round by round"
    ratios = {}
    for load in sorted({load for _, load in found}):
        pairs = zip(found[part.engine, load], found[part.default, load], strict=True)
        ratios[load] = [theirs[name] / ours[name] for theirs, ours in pairs]
    return ratios


def shorter_from(part: Part, found: Found) -> int | None:
    "From which load on one waits less for the engine; of fits, where there is no p99, half wait"
    name = 'p99' if 'p99' in next(iter(found.values()))[0] else 'p50'
    ratios = ratios_of(part, found, name)
    return first_from(ratios, lambda each: float(np.median(each)) < 1)


def limit_row(part: Part, found: Found) -> dict[str, object]:
    """What the default carried before the engine was ahead; at its best where that never was

    Its interval is the slowest and the quickest round; on sixteen cores it is extrapolated.
    """
    crossed = find_crossover(ratios_of(part, found, 'rate'))
    rates = {
        load: median_of(runs, 'rate')
        for (name, load), runs in found.items()
        if name == part.default
    }
    best = crossed['crosses'] or max(rates, key=rates.__getitem__)
    every = [run['rate'] for run in found[part.default, best]]
    theirs = [median_of(runs, 'rate') for (name, _), runs in found.items() if name == part.engine]
    more = {'part': part.name, 'low': min(every), 'high': max(every), 'cores': part.cores}
    more |= {'load': best, 'load_of': part.load_of, 'peer': part.engine, 'theirs': max(theirs)}
    more |= {**crossed, 'shorter_from': shorter_from(part, found), 'n_runs': len(every)}
    more['formula'] = f'16 / {part.cores} cores x what is measured'
    more['with_16_cores'] = 16 / part.cores * rates[best]
    return result_row(f'{part.name}: moving does not pay before', rates[best], '1/s', **more)


def part_rows(part: Part, found: Found) -> list[dict[str, object]]:
    "A row of every side and load, and the limit behind them; none of what was not measured"
    if not found:
        return []
    rows = [load_row(part, engine, load, runs) for (engine, load), runs in found.items()]
    return [*rows, limit_row(part, found)]
