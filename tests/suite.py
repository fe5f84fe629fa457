"""Everything that must hold before a change lands: ./run test [--deep]"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from check import STEPS, check
from checks.parts import empty_cells

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PAGES = (
    BIN / 'nbdev_test',
    *('--n_workers', '2'),
    *('--do_print', '--timing'),
    *('--skip_folder_re', '^[_.]|steps'),
)
# a worker keeps what its pages left in memory, up to 12 GB over all of them: new ones per group
GROUPS = ('^0', '^1', '^[^01]')  # of file names
NEEDS = {'redis-server': '31|move_to_redis'}  # program -> beginnings of the pages that start it
TESTS = (
    *(sys.executable, '-m', 'pytest', '-q'),
    *('tests/test_pipeline.py', 'tests'),  # the longest begins first
    *('-n', '2', '--dist', 'loadfile', '--no-loadscope-reorder'),
    *('--durations', '12'),
)


def run_command(
    command: tuple[str | Path, ...],
) -> int:
    "Exit status of a command run at the root"
    return subprocess.run([str(word) for word in command], cwd=ROOT).returncode


def left_out() -> tuple[str, ...]:
    "Words that leave out pages whose program is missing, unless everything must be there"
    if os.environ.get('MLREF_REQUIRE'):
        return ()
    missing = [program for program in NEEDS if shutil.which(program) is None]
    for program in missing:
        print(f'== pages {NEEDS[program]}: skipped, expected the program {program}', flush=True)
    return ('--skip_file_re', '|'.join(['^[_.]', *(f'^({NEEDS[each]})' for each in missing)]))


def run_pages() -> int:
    "Exit status of all pages; a group that fails does not stop the next"
    more = left_out()
    return max([run_command((*PAGES, '--file_re', group, *more)) for group in GROUPS])


def main(
    words: list[str],  # of the command line
) -> int:
    "Run the steps one after the other, all of them, and say which failed"
    if unknown := [word for word in words if word != '--deep']:
        sys.exit(f'expected nothing or --deep, got {" ".join(unknown)}')
    deep = str(int('--deep' in words))
    # two pages, then two files of tests, run side by side on two cores
    os.environ.update(MLREF_DEEP=deep, MPLBACKEND='agg', OMP_NUM_THREADS='1')
    steps = {
        f'check ({", ".join(STEPS)})': check,
        'every page': run_pages,
        'pytest': lambda: run_command(TESTS),
    }
    failed = []
    begin = time.time()
    for name, step in steps.items():
        start = time.time()
        print(f'== {name}', flush=True)
        status = step()
        if status:
            failed.append(name)
        state = 'FAILED' if status else 'ok'
        now = time.time()
        print(f'== {name}: {state}, {now - start:.0f} s; {now - begin:.0f} s in all', flush=True)
    state = f'FAILED: {", ".join(failed)}' if failed else 'ok'
    print(f'== {state}. Parts still without page, module, test or result: {empty_cells()}')
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
