"""Programs and packages of extras that tests need"""

import os
import sys
from importlib.util import find_spec
from typing import NoReturn

import pytest

from mlref.core import MlrefError
from mlref.edges import find_program

# The beginning of a command, `mlref` as it stands in this checkout, in a process of its own
MLREF = [sys.executable, '-c', 'import sys; from mlref.cli import main; sys.exit(main())']


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
