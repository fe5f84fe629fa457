"""How much longer does a run take when one core is kept busy by something else?

    python tests/speed/busy.py             the year: about twenty minutes on an idle machine
    python tests/speed/busy.py --quick     April: about six

The run is made twice in a folder that is removed, first alone, then beside a process that never
rests. The ratio of the two, by the clock, is the row of `reports/results/busy.json`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from mlref.results import result_row, write_results

ROOT = Path(__file__).parent.parent.parent
RUN = 'import sys; from mlref.cli import main; sys.exit(main())'


def time_run(folder: Path, options: list[str]) -> float:
    "Seconds that a run takes by the clock"
    places = ['--data', folder / 'data', '--reports', folder / 'reports']
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', RUN, 'run', *options, *places], check=True, cwd=ROOT)
    return time.perf_counter() - start


def time_beside(folder: Path, options: list[str]) -> float:
    "The same beside a process that keeps one core busy"
    with ExitStack() as stack:
        busy = stack.enter_context(subprocess.Popen([sys.executable, '-c', 'while True: pass']))
        stack.callback(busy.kill)
        return time_run(folder, options)


def main() -> None:
    "Measure, print, and write the result file"
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument('--quick', action='store_true', help='April only')
    ask.add_argument('--results', type=Path, default=ROOT / 'reports' / 'results')
    args = ask.parse_args()
    options = ['--quick'] if args.quick else []
    with tempfile.TemporaryDirectory() as work:
        idle = time_run(Path(work, 'idle'), options)
        beside = time_beside(Path(work, 'busy'), options)
    what = ' '.join(['./run', *options])
    name = f'{what} with one core kept busy: times as long'
    about = {'idle': round(idle, 1), 'busy': round(beside, 1), 'cores': os.cpu_count()}
    row = result_row(name, round(beside / idle, 3), 'x', '<= 1.5', 1, **about)
    command = ' '.join(['python tests/speed/busy.py', *options])
    print(write_results(args.results, 'busy', command, [row]))


if __name__ == '__main__':
    main()
