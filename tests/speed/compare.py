"""Is today's library as fast? Kernels of an old commit and of today's, one after the other

    git worktree add --detach OLD da38fe3
    python tests/speed/compare.py OLD                       the commit before the rewrite
    python tests/speed/compare.py OLD --name NAME           a later commit, by its own kernels
    python tests/speed/compare.py OLD --name storage --kernels tests/speed/storage.py
                                                            kernels that both commits can run

Each kernel is run alternately by a process of the old commit and one of this checkout. A row of
`reports/results/NAME.json` has the median of the ratios old/new of CPU time (above 1: today's is
faster) and the interval in which it lies with about 95 % confidence (order statistics).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from mlref.results import result_row, write_results

ROOT = Path(__file__).parent.parent.parent
MODELS = ROOT / 'tests' / 'golden' / 'models'
HERE = Path(__file__).parent


class Kernels:
    "A process that runs the kernels of one commit"

    def __init__(self, checkout: Path, script: Path, work: Path):
        work.mkdir()
        env = {**os.environ, 'PYTHONPATH': str(checkout), 'OMP_NUM_THREADS': '1'}
        command = [sys.executable, str(script), str(work), str(MODELS)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=work
        )
        self.names = self._answer()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit('expected a kernel to answer, its process has ended')
        return json.loads(line)

    def run(self, name: str) -> dict[str, float]:
        "Seconds of CPU and of the clock"
        print(json.dumps(name), file=self.process.stdin, flush=True)
        return self._answer()


def median_interval(ratios: list[float]) -> tuple[float, float]:
    "Order statistics around the median: of 7 the first and last cover it with 98 %, of 9 the 2nd"
    ordered = sorted(ratios)
    skip = max(0, int((len(ordered) - 1.96 * np.sqrt(len(ordered))) / 2))
    return ordered[skip], ordered[-1 - skip]


def file_system(folder: Path) -> str:
    "What files there lie on, e.g. 'ext2/ext3', or 'tmpfs': a durable write costs nothing there"
    kind = subprocess.run(
        ['stat', '--file-system', '--format=%T', folder], capture_output=True, text=True, check=True
    )
    return kind.stdout.strip()


def commit_of(checkout: Path) -> str:
    "The commit that is checked out in a folder"
    named = ['git', '-C', checkout, 'rev-parse', '--short', 'HEAD']
    return subprocess.run(named, capture_output=True, text=True, check=True).stdout.strip()


def compare(old: Kernels, new: Kernels, name: str, repeats: int) -> dict[str, object]:
    "A row of the result file"
    old.run(name)
    new.run(name)  # both warm
    pairs = [(old.run(name), new.run(name)) for _ in range(repeats)]
    ratios = [before['cpu'] / after['cpu'] for before, after in pairs]
    walls = [before['wall'] / after['wall'] for before, after in pairs]
    low, high = median_interval(ratios)
    # the interval may not lie wholly below .95: its upper end is held to the goal
    return result_row(
        name,
        round(high, 3),
        'old / new CPU time, upper end',
        goal='>= 0.95',
        n=repeats,
        median=round(float(np.median(ratios)), 3),
        low=round(low, 3),
        high=round(high, 3),
        wall=round(float(np.median(walls)), 3),
    )


def main() -> None:
    "Compare, print, and write the result file"
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('old', type=Path, help='checkout of the old commit')
    ask.add_argument('--name', default='rewrite', help='of the result file')
    ask.add_argument('--kernels', type=Path, help='script for both; default: each has its own')
    ask.add_argument('--repeats', type=int, default=9)
    ask.add_argument('--results', type=Path, default=ROOT / 'reports' / 'results')
    args = ask.parse_args()
    args.kernels = args.kernels and args.kernels.resolve()
    with tempfile.TemporaryDirectory() as work:
        theirs = args.kernels or args.old / 'tests' / 'speed' / 'after.py'
        old = Kernels(
            args.old, theirs if theirs.exists() else HERE / 'before.py', Path(work, 'old')
        )
        new = Kernels(ROOT, args.kernels or HERE / 'after.py', Path(work, 'new'))
        if not {*old.names} <= {*new.names}:
            raise SystemExit('expected today to have every kernel of the old commit; mend after.py')
        rows = []
        files = file_system(Path(work))
        for name in old.names:
            row = compare(old, new, name, args.repeats) | {'files': files}
            print(
                f'{name:56} {row["median"]:6.3f} [{row["low"]:.3f}, {row["ours"]:.3f}]', flush=True
            )
            rows.append(row)
        old.process.kill()
        new.process.kill()
    command = f'python tests/speed/compare.py OLD --name {args.name}'
    if args.kernels:
        command += f' --kernels tests/speed/{args.kernels.name}'
    command += f'  # OLD at {commit_of(args.old)}'
    print(write_results(args.results, args.name, command, rows))


if __name__ == '__main__':
    main()
