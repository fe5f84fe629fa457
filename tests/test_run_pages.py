"""A page that fails, dies or waits for ever fails by name, and the others are run"""

import multiprocessing
import time

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

import run_pages
import suite

CONTEXT = multiprocessing.get_context('forkserver')


def write_page(folder, code):
    path = folder / 'page.ipynb'
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), path)
    return path


@pytest.mark.parametrize(
    'code, limit, passes, says',
    [
        ('assert 1 + 1 == 2', 60, True, 'page.ipynb: ok'),
        ('assert 1 + 1 == 3', 60, False, 'FAILED, exit status 1'),
        ('import os\nos._exit(9)', 60, False, 'FAILED, exit status 9'),
        ('import time\ntime.sleep(1000)', 5, False, 'expected to end within 5 s'),
    ],
    ids=['passes', 'fails', 'dies', 'waits'],
)
def test_a_page_passes_when_it_came_to_its_end(tmp_path, capfd, code, limit, passes, says):
    start = time.monotonic()
    ran = run_pages.run_page(CONTEXT, write_page(tmp_path, code), limit)
    assert (ran.name, ran.passed) == ('page.ipynb', passes)
    assert (ran.cpu_seconds > 0) == ('exit' not in code and 'sleep' not in code)
    assert says in capfd.readouterr().out
    assert run_pages.describe_failures([ran]).startswith('-- page.ipynb FAILED:') != passes
    assert time.monotonic() - start < limit + 60


def test_the_last_lines_of_a_run_say_which_page_failed_and_why(tmp_path):
    code = "print('before')\nassert 1 + 1 == 3, 'one and one'"
    ran = run_pages.run_page(CONTEXT, write_page(tmp_path, code), 60)
    failures = tmp_path / 'failures'
    failures.write_text(run_pages.describe_failures([ran, ran]))
    end = suite.describe_end(['every page'], failures)
    assert end.startswith('-- page.ipynb FAILED:') and 'AssertionError: one and one' in end
    assert '== FAILED: every page. Parts' in end.splitlines()[-1]
    assert suite.describe_end([], tmp_path / 'none').startswith('== ok. Parts')


def test_every_page_is_run_once_but_those_that_others_run():
    names = [path.name for path in run_pages.find_pages('', '')]
    assert len(names) == len({*names}) > 180
    assert '07_offline.ipynb' in names and 'roll_back.ipynb' in names
    assert not {'index.ipynb', '00_tour.ipynb', 'live.ipynb'} & {*names}
    assert '31_redis.ipynb' not in [path.name for path in run_pages.find_pages('', '^(31)')]


def test_the_longest_pages_begin_first():
    names = [path.name for path in run_pages.find_pages('', '')]
    for name, start in zip(names, run_pages.LONGEST, strict=False):
        assert name.startswith(start), f'expected a page {start} in nbs'


def test_pages_that_wait_are_pages():
    names = [path.name for path in run_pages.find_pages('', '')]
    for start in run_pages.WAITING:
        assert sum(name.startswith(start) for name in names) == 1
