"""Everything that must hold before a change lands: ./run test [--deep]"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

from check import STEPS, check
from checks.parts import empty_cells
from mlref.core import MlrefError
from mlref.edges import find_program

ROOT = Path(__file__).resolve().parent.parent
PAGES = (sys.executable, 'tests/run_pages.py')
NEEDS = {  # program, or package of an extra -> beginnings of the pages that use it
    'program redis-server': '31|move_to_redis',
    'program nginx': '34|49b_cli_balance',
    'program haproxy': '32c|34a|49b_cli_balance',
    'program prometheus': 'observe_it',
    'package confluent_kafka': '29a|30|move_to_kafka',
    'package redis': '31|move_to_redis',
    'package opentelemetry.exporter': '15p',
    'package ray': '32|move_to_ray',
}
PYTEST = (
    *(sys.executable, '-m', 'pytest', '-q'),
    *('--dist', 'loadfile', '--no-loadscope-reorder'),
    *('--durations', '40', '--durations-min', '5'),
    # a file whose test ends its process is begun again, without this for ever
    *('--max-worker-restart', '4'),
)
# tests that wait, much of their time: for servers and clusters that do not answer, or to notice
# what became of others; they run one file after the other beside the rest
WAITING = tuple(
    f'tests/test_{name}.py'
    for name in (
        'serve',
        'registry',
        'kafka',
        'kafka_login',
        'kafka_troubles',
        'redis_troubles',
        'redis_served',
    )
)
TESTS = (
    *PYTEST,
    *('-n', '2'),
    # long ones that would come late begin first, so that no worker is left with one at the end
    *('tests/test_pipeline.py', 'tests/test_site.py', 'tests/test_train.py'),
    *('tests/test_steps.py', 'tests', *(f'--ignore={path}' for path in WAITING)),
)
BESIDE = (*PYTEST, '-n', '1', *WAITING)
PAGE_LIMIT = 300  # seconds of a page: the longest takes 80
PAGES_LIMIT = 2400  # seconds of all pages: they take 500
TESTS_LIMIT = 3600  # seconds of all tests: they take 1,000; pytest.ini limits one
DEEP_LIMIT = 6 * 3600  # seconds of either, and of one test


@contextmanager
def started(
    command: tuple[str | Path, ...],
    output: IO[str] | None = None,  # gets what it writes; None: where this process writes
) -> Iterator[subprocess.Popen]:
    "A command that runs at the root; what it has left ends with it when it did not end well"
    words = [str(word) for word in command]
    shown = {**os.environ, 'PYTHONFAULTHANDLER': '1'}
    pipes = {'stdout': output, 'stderr': output}
    with subprocess.Popen(words, cwd=ROOT, env=shown, process_group=0, **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() != 0:  # whatever it left; also after Ctrl-C
                end_group(process.pid)


def wait_for(
    process: subprocess.Popen,
    limit: float,  # seconds, then its processes show where each thread stands and end
) -> int:
    "Its exit status; 1 when it did not end in time"
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f'== expected to end within {limit:.0f} s, stopped; where it stood:', flush=True)
        os.killpg(process.pid, signal.SIGABRT)
        time.sleep(2)  # for the stacks
        return 1


def run_command(
    command: tuple[str | Path, ...],
    limit: float,  # seconds, then its processes show where each thread stands and end
) -> int:
    "Exit status of a command run at the root"
    with started(command) as process:
        return wait_for(process, limit)


def run_beside(
    command: tuple[str | Path, ...],
    beside: tuple[str | Path, ...],  # a second one, whose output is shown when both have ended
    limit: float,  # seconds of both
) -> int:
    "Exit status of two commands that run side by side: 0 when both ended with that"
    until = time.monotonic() + limit
    with TemporaryFile('w+') as said, started(beside, said) as second, started(command) as first:
        status = wait_for(first, limit)
        other = wait_for(second, max(until - time.monotonic(), 1.0))
        said.seek(0)
        print(f'== beside it:\n{said.read()}', flush=True)
        return status or other


def is_there(
    need: str,  # one of NEEDS
) -> bool:
    "Whether a program or a package is found"
    kind, name = need.split()
    if kind == 'package':
        return find_spec(name) is not None
    try:
        return bool(find_program(name))
    except MlrefError:
        return False


def left_out() -> tuple[str, ...]:
    "Words that leave out pages that lack what they use, unless everything must be there"
    if os.environ.get('MLREF_REQUIRE'):
        return ()
    missing = [need for need in NEEDS if not is_there(need)]
    for need in missing:
        print(f'== pages {NEEDS[need]}: skipped, expected the {need}', flush=True)
    return ('--without', '|'.join(f'^({NEEDS[each]})' for each in missing)) if missing else ()


def end_group(
    group: int,  # of processes
) -> None:
    "Kill what is left of a group"
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def run_pages(
    limit: float,  # seconds of all of them
    each: float,  # seconds of one
    failures: Path,  # a file that gets which failed, and why
) -> int:
    "Exit status of all pages"
    words = ('--limit', str(each), '--failures', failures)
    return run_command((*PAGES, *words, *left_out()), limit)


def run_steps(
    steps: dict[str, Callable[[], int]],  # name -> its exit status
) -> list[str]:
    "Names of the steps that failed; each is run, whatever became of those before"
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
    return failed


def name_steps(
    deep: bool,  # with the large counts
    failures: Path,  # a file that gets which pages failed, and why
) -> dict[str, Callable[[], int]]:
    "What is run, in this order: name -> a function that gives its exit status"
    pages, tests, page = PAGES_LIMIT, TESTS_LIMIT, PAGE_LIMIT
    longer: tuple[str, ...] = ()
    if deep:
        pages = tests = page = DEEP_LIMIT
        longer = ('--timeout', str(DEEP_LIMIT), '-o', 'faulthandler_timeout=0')
    return {
        f'check ({", ".join(STEPS)})': check,
        'every page': lambda: run_pages(pages, page, failures),
        'pytest': lambda: run_beside((*TESTS, *longer), (*BESIDE, *longer), tests),
    }


@contextmanager
def measured(
    folder: Path,  # gets what each process has reached
) -> Iterator[None]:
    "Count the lines of the library that are reached meanwhile, and show them; `kill -9` loses some"
    config = str(ROOT / 'tests' / 'coverage.ini')
    os.environ.update(COVERAGE_PROCESS_START=config, COVERAGE_FILE=str(folder / 'coverage'))
    yield
    del os.environ['COVERAGE_PROCESS_START']  # what follows is not measured
    coverage = (sys.executable, '-m', 'coverage')
    print('== lines of the library that pages and tests have reached', flush=True)
    run_command((*coverage, 'combine', '-q', f'--rcfile={config}', folder), limit=600)
    run_command((*coverage, 'report', f'--rcfile={config}'), limit=600)


def describe_end(
    failed: list[str],  # names of steps
    failures: Path,  # of run_pages
) -> str:
    "The last lines: which pages failed and why, then which steps"
    # once more, since thousands of lines of the tests came after the pages
    pages = failures.read_text() if failures.exists() else ''
    state = f'FAILED: {", ".join(failed)}' if failed else 'ok'
    end = f'== {state}. Parts still without page, module, test or result: {empty_cells()}'
    return f'{pages}\n{end}'.strip()


def main(
    words: list[str],  # of the command line
) -> int:
    "Run the steps one after the other, all of them, and say which failed"
    about = 'Everything that must hold: checks, every page, tests, the quick run'
    parser = argparse.ArgumentParser(prog='./run test', description=about, allow_abbrev=False)
    parser.add_argument('--deep', action='store_true', help='with large counts, for hours')
    deep = parser.parse_args(words).deep
    # two pages, then two files of tests, run side by side on two cores
    os.environ.update(MLREF_DEEP=str(int(deep)), MPLBACKEND='agg', OMP_NUM_THREADS='1')
    # what one process of this run made of the raw files, the others map
    with TemporaryDirectory(prefix='mlref-cache-') as cache:
        os.environ['MLREF_CACHE'] = cache
        failures = Path(cache) / 'failures'
        # measuring takes processor time, so a usual run does without
        with measured(Path(cache)) if deep else nullcontext():
            failed = run_steps(name_steps(deep, failures))
        print(describe_end(failed, failures))
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
