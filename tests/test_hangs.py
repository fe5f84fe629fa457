"""What waits for ever ends, fails and shows where it stood"""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import suite
from server_fixture import is_running

HERE = Path(__file__).parent
WAITS = """
import threading

def test_waits_for_itself():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

def test_after():
    pass
"""


def test_a_test_that_waits_for_ever_fails_and_the_next_one_runs(tmp_path):
    (tmp_path / 'test_waits.py').write_text(WAITS)
    words = [sys.executable, '-m', 'pytest', '-q', '-c', HERE.parent / 'pytest.ini', '--timeout=1']
    run = subprocess.run([*words, '-n1', tmp_path], capture_output=True, text=True)
    assert run.returncode == 1 and '1 failed, 1 passed' in run.stdout, run.stdout
    assert 'Timeout (>1.0s)' in run.stdout


def test_a_step_that_waits_for_ever_ends_with_the_stack_of_its_processes(capfd):
    code = 'import time\n\ndef wait_for_ever():\n    time.sleep(1000)\n\nwait_for_ever()'
    assert suite.run_command((sys.executable, '-c', code), 1.0) == 1
    told = capfd.readouterr()
    assert 'expected to end within 1 s' in told.out and 'in wait_for_ever' in told.err


def test_the_status_of_a_step_is_its_own():
    words = (sys.executable, '-c', 'import sys; sys.exit(3)')
    assert suite.run_command(words, 60.0) == 3


SAYS = "import sys; print('said by {0}', flush=True); sys.exit({0})"


@pytest.mark.parametrize('first, second, status', [(0, 0, 0), (3, 0, 3), (0, 4, 4)])
def test_two_commands_side_by_side_fail_when_one_does(capfd, first, second, status):
    words = [(sys.executable, '-c', SAYS.format(code)) for code in (first, second)]
    assert suite.run_beside(*words, 60.0) == status
    told = capfd.readouterr().out
    assert told.index(f'said by {first}') < told.index('== beside it:')
    assert f'said by {second}' in told[told.index('== beside it:') :]


def test_a_command_beside_another_that_waits_for_ever_ends_too(capfd):
    code = 'import time\n\ndef wait_for_ever():\n    time.sleep(1000)\n\nwait_for_ever()'
    words = [(sys.executable, '-c', text) for text in ('pass', code)]
    assert suite.run_beside(*words, 5.0) == 1
    assert 'in wait_for_ever' in capfd.readouterr().out


def test_each_file_of_tests_is_run_once():
    files = {f'tests/{path.name}' for path in HERE.glob('test_*.py')}
    beside = [word for word in suite.BESIDE if word in files]
    assert sorted(beside) == sorted(suite.WAITING)
    ignored = [word.removeprefix('--ignore=') for word in suite.TESTS if '--ignore=' in word]
    assert ignored == beside and 'tests' in suite.TESTS
    assert not {*suite.TESTS} & {*beside}


def test_a_process_that_has_ended_counts_as_gone_before_its_parent_looks():
    with subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE) as child:
        assert is_running(child.pid)
        child.stdin.close()
        until = time.monotonic() + 20
        while is_running(child.pid) and time.monotonic() < until:
            time.sleep(0.01)
        assert Path(f'/proc/{child.pid}').exists() and not is_running(child.pid)
    assert not is_running(child.pid)
