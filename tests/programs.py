"""Programs that are not Python packages"""

import os
import shutil

import pytest


def need(program: str) -> str:
    """Where a program is

    Without it the test is skipped, or fails when MLREF_REQUIRE says that everything must be there.
    """
    found = shutil.which(program) or shutil.which(program, path='/usr/sbin:/usr/local/sbin')
    if found is None:
        give_up = pytest.fail if os.environ.get('MLREF_REQUIRE') else pytest.skip
        give_up(
            f'expected the program {program}, found none; on Debian and Ubuntu: apt install'
            f' {program}'
        )
    return str(found)


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
