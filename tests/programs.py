"""Programs and packages of extras that tests need"""

import contextlib
import io
import multiprocessing
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import NoReturn

import pytest

from mlref.cli import main
from mlref.core import MlrefError
from mlref.edges import find_program

# The beginning of a command, `mlref` as it stands in this checkout, in a process of its own
MLREF = [sys.executable, '-c', 'import sys; from mlref.cli import main; sys.exit(main())']

# Processes of their own that need not import everything again. What is imported there is loaded
# at the first use of a registry, or of an optimizer, which would cost each of them seconds.
FORK = multiprocessing.get_context('forkserver')
FORK.set_forkserver_preload(
    [
        'mlref.cli_models',
        'mlref.waiting',
        'mlflow',
        'mlflow.store.tracking.sqlalchemy_store',
        'mlflow.store.model_registry.sqlalchemy_store',
    ]
)


def _say_one(words: list[str]) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    return status, out.getvalue(), err.getvalue()


def _say_all(lines, environment, said):
    os.chdir('/')
    os.environ.pop('MLFLOW_TRACKING_URI', None)
    os.environ.update(environment)
    said.put([_say_one(words) for words in lines])


def run_commands(
    lines: list[list[str]],  # The words of each, without `mlref`
    **environment: str,
) -> list[tuple[int, str, str]]:
    "Status, stdout and stderr of commands, one after another in a process of its own"
    said = FORK.Queue()
    process = FORK.Process(target=_say_all, args=(lines, environment, said))
    process.start()
    answers = said.get(timeout=300)
    process.join()
    assert process.exitcode == 0
    return answers


def give_up(why: str) -> NoReturn:
    "Skip the test, or fail it when MLREF_REQUIRE says that everything must be there"
    if os.environ.get('MLREF_REQUIRE'):
        pytest.fail(why)
    pytest.skip(why)


def need(program: str) -> str:
    "Where a program is; the test gives up without it"
    try:
        return find_program(program)
    except MlrefError as error:
        give_up(str(error))


def need_package(name: str) -> None:
    "A package of an extra; the test gives up without it"
    if find_spec(name) is None:
        give_up(f"expected the package {name}, found none; pip install 'mlref[{name}]'")


def stop_process(
    process: subprocess.Popen,
    seconds: float = 30.0,  # For it to end by itself
) -> None:
    "End a process that a test began; raises `TimeoutExpired` where it had to be killed"
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:  # nothing that a test began stays behind
        process.kill()
        process.wait()
        raise


def browser(pw):
    "Headless Chromium that asks nobody for updates"
    return pw.chromium.launch(
        executable_path=need('chromium'),
        args=[
            '--no-sandbox',
            '--disable-gpu',
            '--disable-quic',
            '--no-first-run',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
        ],
    )
