"""Every page, each in a process of its own: run_pages.py [--limit SECONDS] [--without RE] [PAGE]

The processes are forked from one that has imported the packages that take long to import and has
done nothing else. So a page begins as in a fresh kernel, without importing PyTorch and MLflow for
itself, and what it leaves in memory is gone when it ends.
"""

import argparse
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from tempfile import TemporaryDirectory

from test_outputs import PAGES as SHOWN

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
IMPORTED = (
    *('matplotlib.pyplot', 'nbdev.test', 'lightgbm', 'sklearn', 'nannyml', 'papermill'),
    *('torch', 'torch._dynamo'),  # of the first optimizer
    *('onnxscript.function_libs.torch_lib.ops', 'torch.export._trace'),  # of the first export
    'torch.onnx._internal.exporter._torchlib.ops',
    *('mlflow', 'mlflow.store.tracking.sqlalchemy_store'),  # of the first registry in a folder
    'mlflow.store.model_registry.sqlalchemy_store',
)
# in this order before all others, so that no worker is left with a long one at the end
LONGEST = ('13_', '22d_', '20_', '32b_', '12b_', '32c_', '31d_', '18_fleet', '12c_', '17ba_')
LONGEST += ('11a_', '17f_', '22c_', '17e_', 'bring_your_own_task', '16d_', '12a_', '07b_')
LONGEST += ('observe_it', '11c_', '13d_', '09_', '22ab_', '22e_', 'move_to_kafka', 'move_to_ray')
# these wait, most of their time: for a cluster to begin or to notice a death, for processes to
# follow a file; one after the other, so that no two clusters of Ray begin at once
WAITING = ('32b_', '31d_', '32c_', '17f_', '32a_', 'observe_it', 'move_to_kafka', '30_kafka')
AFTER_LIMIT = 1  # seconds for a page to show where it stood


@dataclass(frozen=True)
class Ran:
    "A page that was run"

    name: str
    passed: bool
    seconds: float
    cpu_seconds: float  # of it and of what it waited for; 0 when it did not come to its end
    said: str  # all that it wrote


def find_pages(
    part: str,  # of the names that are wanted
    without: str,  # a regular expression of names that are not
) -> list[Path]:
    "Pages that run by themselves, the longest first"
    # those whose outputs are compared are run by that test, steps by the pipeline
    shown = {ROOT / 'nbs' / f'{page}.ipynb' for page in SHOWN}
    found = []
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        parts = path.relative_to(ROOT / 'nbs').parts
        hidden = any(re.match(r'[_.]|steps$', each) for each in parts)
        left_out = hidden or path in shown or (without and re.search(without, path.name))
        if part in path.name and not left_out:
            found.append(path)
    return sorted(found, key=place)


def place(path: Path) -> int:
    "Where a page stands in the order"
    for number, start in enumerate(LONGEST):
        if path.name.startswith(start):
            return number
    return len(LONGEST)


def execute(
    path: Path,
    cpu_seconds: Synchronized,  # gets what it took
    said: Path,  # gets what it writes
) -> None:
    "Run a page in this process, which ends with 1 when it fails"
    import faulthandler
    import gc
    import signal

    gc.freeze()  # what was imported before the fork is not looked at by every garbage collection
    with said.open('wb') as file:  # also what its child processes write
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)

    from nbdev.test import get_config, test_nb

    faulthandler.register(signal.SIGUSR1)
    sys.path.insert(0, str(ROOT))
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split())
    cpu_seconds.value = sum(os.times()[:4])
    sys.exit(not passed)


def run_page(
    context: multiprocessing.context.BaseContext,
    path: Path,
    limit: float,  # seconds
) -> Ran:
    "Run a page in a process of its own; one that takes too long shows its stacks and is killed"
    import signal

    start = time.monotonic()
    cpu_seconds = context.Value('d', 0.0)
    with TemporaryDirectory(prefix='mlref-page-') as folder:
        file = Path(folder) / 'said'
        process = context.Process(target=execute, args=(path, cpu_seconds, file))
        process.start()
        process.join(limit)
        late = process.is_alive()
        if late:
            os.kill(process.pid, signal.SIGUSR1)
            process.join(AFTER_LIMIT)
            process.kill()
            process.join()
        said = file.read_text(errors='replace') if file.exists() else ''
    if late:
        said = f'expected to end within {limit:.0f} s; where it stood:\n{said}'
    seconds = time.monotonic() - start
    state = 'ok' if process.exitcode == 0 else f'FAILED, exit status {process.exitcode}'
    end = f'{path.name}: {state}, {seconds:.1f} s, {cpu_seconds.value:.1f} CPU s'
    print(f'{said.strip()}\n{end}'.strip(), flush=True)
    return Ran(path.name, process.exitcode == 0, seconds, cpu_seconds.value, said)


def describe_failures(
    ran: list[Ran],
    lines: int = 25,  # of the end of what each failed page wrote
) -> str:
    "The failed pages, each with the end of what it wrote; empty when none failed"
    told = []
    for each in ran:
        if not each.passed:
            told += [f'-- {each.name} FAILED:', *each.said.strip().splitlines()[-lines:]]
    return '\n'.join(told)


def main(
    words: list[str],  # of the command line
) -> int:
    "Run the pages two at a time, and those that wait beside them; 1 when one failed"
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--limit', type=float, default=600, help='seconds of a page')
    parser.add_argument('--without', default='', help='names to leave out, a regular expression')
    parser.add_argument('--failures', type=Path, help='a file that gets which failed, and why')
    parser.add_argument('page', nargs='?', default='', help='part of the names to run')
    given = parser.parse_args(words)
    os.environ['IN_TEST'] = '1'
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(IMPORTED))
    pages = find_pages(given.page, given.without)
    with ThreadPoolExecutor(WORKERS) as pool, ThreadPoolExecutor(1) as beside:
        begun = [
            (beside if path.name.startswith(WAITING) else pool).submit(
                run_page, context, path, given.limit
            )
            for path in pages
        ]
    ran = [each.result() for each in begun]
    slowest = sorted(ran, key=lambda each: -each.seconds)[:12]
    print('slowest:', ', '.join(f'{each.name} {each.seconds:.0f} s' for each in slowest))
    failed = [each.name for each in ran if not each.passed]
    cpu = sum(each.cpu_seconds for each in ran)
    print(f'{len(ran)} pages, {cpu:.0f} CPU s, failed: {", ".join(failed) or "none"}')
    if given.failures:
        given.failures.write_text(describe_failures(ran))
    return int(bool(failed))


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
