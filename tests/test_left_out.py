"""Pages whose package is not installed are left out with a reason, and no others"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import suite

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in (ROOT / 'nbs').rglob('*.ipynb') if 'steps' not in page.parts]
PACKAGES = [need.split()[1] for need in suite.NEEDS if need.startswith('package ')]
WITHOUT = """
import sys

sys.modules[sys.argv[1]] = None  # as where it is not installed
import suite

print(suite.left_out()[1])
"""


def import_of(package):
    "What stands in a page that needs a package, itself or by a module of ours"
    inside = [
        module.stem
        for module in (ROOT / 'mlref' / 'ext').glob('*.py')
        if re.search(rf'^(import|from) {package}\b', module.read_text(), re.M)
    ]
    modules = '|'.join([re.escape(package), *(rf'mlref\.ext\.{name}' for name in inside)])
    return re.compile(rf'^(import|from) ({modules})\b', re.M)


def code_of(page):
    cells = json.loads(page.read_text())['cells']
    return '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')


@pytest.mark.parametrize('package', PACKAGES)
def test_pages_that_import_a_missing_package_are_left_out(package):
    environment = {name: value for name, value in os.environ.items() if name != 'MLREF_REQUIRE'}
    environment['PYTHONPATH'] = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    run = subprocess.run(
        [sys.executable, '-c', WITHOUT, package], env=environment, capture_output=True, text=True
    )
    said, pattern = run.stdout.rsplit('\n', 2)[:2]
    assert f'skipped, expected the package {package}' in said, run.stderr
    wanted = {page.name for page in PAGES if import_of(package).search(code_of(page))}
    assert wanted
    left = {page.name for page in PAGES if re.search(pattern, page.name)}
    assert wanted <= left
    allowed = suite.NEEDS[f'package {package}']
    others = [need for need in suite.NEEDS if f'expected the {need}\n' in said + '\n']
    spare = '|'.join([allowed, *(suite.NEEDS[need] for need in others)])
    assert all(re.match(rf'[_.]|{spare}', name) for name in left)


def test_everything_is_run_where_all_must_be_there(monkeypatch):
    monkeypatch.setenv('MLREF_REQUIRE', 'all')
    assert suite.left_out() == ()
