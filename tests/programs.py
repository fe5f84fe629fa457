"""Programs and packages of extras that tests need"""

import os
from importlib.util import find_spec

import pytest

from mlref.core import MlrefError
from mlref.edges import find_program


def need(program: str) -> str:
    """Where a program is

    Without it the test is skipped, or fails when MLREF_REQUIRE says that everything must be there.
    """
    try:
        return find_program(program)
    except MlrefError as error:
        give_up = pytest.fail if os.environ.get('MLREF_REQUIRE') else pytest.skip
        give_up(str(error))


def need_package(name: str) -> None:
    """A package of an extra

    Without it the test is skipped, or fails when MLREF_REQUIRE says that everything must be there.
    """
    if find_spec(name) is None:
        give_up = pytest.fail if os.environ.get('MLREF_REQUIRE') else pytest.skip
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
