"""What waits for ever ends, fails and shows where it stood"""

import subprocess
import sys
import time
from pathlib import Path

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


def test_a_process_that_has_ended_counts_as_gone_before_its_parent_looks():
    with subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE) as child:
        assert is_running(child.pid)
        child.stdin.close()
        until = time.monotonic() + 20
        while is_running(child.pid) and time.monotonic() < until:
            time.sleep(0.01)
        assert Path(f'/proc/{child.pid}').exists() and not is_running(child.pid)
    assert not is_running(child.pid)
