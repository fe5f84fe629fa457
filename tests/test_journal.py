"""A journal before a log: killed, cut short, damaged, read while it is written, one writer"""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import numpy as np
import pytest

from mlref.core import MlrefError
from mlref.journal import JOURNAL, PAGE_BYTES, JournalFile
from mlref.journaled_log import JournaledLog
from mlref.log import LocalLog
from mlref.log_care import Retention, trim_log, verify_log
from mlref.log_position import check_log

DEEP = os.environ.get('MLREF_DEEP') == '1'
SMALL = 8 * PAGE_BYTES  # a journal that is full after a few batches
WRITER = f"""
import sys
from pathlib import Path
from mlref.journaled_log import JournaledLog
log = JournaledLog(Path(sys.argv[1]), journal_bytes={SMALL})
at = log.end('t')
for i in range(int(sys.argv[2])):
    size = 2_000 if i % 97 == 96 else 1 + 7 * i % 60
    assert log.append('t', [b'%d' % j for j in range(at, at + size)]) == at
    at += size
    print(at, flush=True)
"""


@contextmanager
def writer(folder, batches=10**6):
    "A process that appends numbers, each under the offset that it says"
    process = subprocess.Popen(
        [sys.executable, '-c', WRITER, str(folder), str(batches)], stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def kill(process):
    "End it at once; how far it had said that it was"
    os.kill(process.pid, signal.SIGKILL)
    said = process.communicate()[0].splitlines(keepends=True)
    whole = [int(line) for line in said if line.endswith('\n')]
    return whole[-1] if whole else 0


def check_numbers(log):
    "Every offset holds its own number; how many there are"
    end = log.end('t')
    assert log.read('t', 0, end + 1) == [b'%d' % i for i in range(end)]
    return end


def read_numbers(folder):
    with closing(LocalLog(folder, readonly=True)) as log:
        return check_numbers(log)


def test_killed_at_any_moment_it_has_all_that_was_accepted_once(tmp_path):
    moments = np.random.default_rng(0).uniform(0, 0.3, 40 if DEEP else 8)
    for moment in moments:
        with writer(tmp_path / 'log') as process:
            before = int(process.stdout.readline())
            time.sleep(moment)
            accepted = max(before, kill(process))
        end = read_numbers(tmp_path / 'log')  # nobody has opened it for writing since
        assert end >= accepted
        with closing(JournaledLog(tmp_path / 'log', journal_bytes=SMALL)) as log:
            assert check_numbers(log) == end
    with closing(LocalLog(tmp_path / 'log')) as log:
        assert verify_log(log, 't') == {0: end}
        assert log.append('t', [b'by a plain writer, since it was closed in order']) == end


def test_a_reader_follows_a_writer_while_its_journal_is_emptied(tmp_path):
    with writer(tmp_path / 'log', 3_000) as process:
        process.stdout.readline()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        at, ends = 0, 0
        with closing(LocalLog(tmp_path / 'log', readonly=True)) as log:
            while process.poll() is None:
                messages = log.read('t', at, 500)
                assert messages == [b'%d' % i for i in range(at, at + len(messages))]
                at += len(messages)
                end = log.end('t')
                assert end >= at
                if at:
                    assert log.epoch_of('t', at - 1) == log.epoch_of('t', 0)
                ends += end == at
            assert log.end('t') == check_numbers(log) >= at
            assert at > 10_000 and ends > 10


@pytest.fixture
def written(tmp_path):
    "A log whose journal holds five records, one of several pages, by a process that is gone"
    code = WRITER.replace('range(int(sys.argv[2]))', '[30, 96, 32, 33, 34]')
    code = code.replace(f'journal_bytes={SMALL}', f'journal_bytes={4 * SMALL}')
    code += 'import os; os._exit(0)'
    command = [sys.executable, '-c', code, str(tmp_path / 'log'), '5']
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return tmp_path / 'log'


def records_of(data):
    return [at for at in range(0, len(data), PAGE_BYTES) if data[at : at + 4] == b'mlj1']


def test_a_write_that_was_cut_short_is_none(written):
    whole = (written / JOURNAL).read_bytes()
    begins = records_of(whole)
    counts = []
    for cut in range(0, begins[-1] + PAGE_BYTES, 512):
        (written / JOURNAL).write_bytes(whole[:cut] + bytes(len(whole) - cut))
        counts.append(read_numbers(written))
    assert counts[0] == 0 and sorted(counts) == counts and len({*counts}) == 6
    (written / JOURNAL).write_bytes(whole)
    assert read_numbers(written) == counts[-1]


def test_damage_before_the_last_record_is_told(written):
    whole = (written / JOURNAL).read_bytes()
    last = records_of(whole)[-1]
    draw = np.random.default_rng(1)
    sizes = [29 + int.from_bytes(whole[at + 8 : at + 12], 'little') for at in records_of(whole)]
    places = [
        at + int(draw.integers(size - 1))
        for at, size in zip(records_of(whole), sizes, strict=True)
        for _ in range(10)
    ]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(draw.integers(8))
        (written / JOURNAL).write_bytes(damaged)
        if place >= last:  # cannot be told from a write that was cut short
            read_numbers(written)
            continue
        with pytest.raises(MlrefError, match='damaged'):
            read_numbers(written)
        with pytest.raises(MlrefError, match='damaged'):
            JournaledLog(written)


def test_what_was_moved_does_not_count_again(written):
    before = (written / JOURNAL).read_bytes()
    end = read_numbers(written)
    code = 'import sys; from pathlib import Path; from mlref.journaled_log import JournaledLog;'
    code += 'JournaledLog(Path(sys.argv[1])); import os; os._exit(0)'  # moves, and dies
    subprocess.run([sys.executable, '-c', code, str(written)], check=True)
    assert (written / JOURNAL).read_bytes()[: len(before)] == before
    assert read_numbers(written) == end
    with closing(JournaledLog(written)) as log:
        assert check_numbers(log) == end


def test_a_journal_that_is_gone_is_missed(written):
    (written / JOURNAL).unlink()
    with pytest.raises(MlrefError, match='put it back'):
        read_numbers(written)


def test_a_journal_of_another_log_adds_nothing(written, tmp_path):
    with closing(JournaledLog(tmp_path / 'other')) as other:
        other.append('t', [b'of another log'])
        stolen = (tmp_path / 'other' / JOURNAL).read_bytes()
    (written / JOURNAL).write_bytes(stolen)
    assert read_numbers(written) == 0


def test_files_that_were_copied_at_different_moments_are_refused(tmp_path):
    with writer(tmp_path / 'log') as process:
        process.stdout.readline()
        early = (tmp_path / 'log' / 'data.mdb').read_bytes()
        for _ in range(300):
            process.stdout.readline()
        kill(process)
    (tmp_path / 'log' / 'data.mdb').write_bytes(early)
    with pytest.raises(MlrefError, match='copied while it was written|damaged'):
        read_numbers(tmp_path / 'log')


def test_there_is_one_writer(tmp_path):
    with writer(tmp_path / 'log') as process:
        process.stdout.readline()
        with pytest.raises(MlrefError, match='the only writer'):
            JournalFile(tmp_path / 'log', patience=0.2)
        with closing(LocalLog(tmp_path / 'log')) as plain:
            with pytest.raises(MlrefError, match='in its journal first'):
                plain.append('t', [b'in between'])
            with pytest.raises(MlrefError, match='in its journal first'):
                plain.append('new', [b'in between'])
    assert read_numbers(tmp_path / 'log')


def test_the_next_writer_waits_for_the_one_that_ends(tmp_path):
    with writer(tmp_path / 'log') as process:
        process.stdout.readline()
        threading.Timer(0.5, process.kill).start()
        with closing(JournaledLog(tmp_path / 'log')) as log:
            assert process.wait() == -signal.SIGKILL
            assert check_numbers(log)


def test_its_writes_return_when_they_are_on_disk(tmp_path):
    with closing(JournaledLog(tmp_path / 'log')) as log:
        assert fcntl.fcntl(log.journal.file, fcntl.F_GETFL) & os.O_DSYNC


def test_threads_take_turns(tmp_path):
    with closing(JournaledLog(tmp_path / 'log', journal_bytes=SMALL)) as log:
        found = {}

        def work(k):
            for i in range(150):
                message = b'%d-%d' % (k, i)
                found[message] = log.append('t', [message])

        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = log.read('t', 0, 1_000)
        assert {message: kept.index(message) for message in found} == found
        assert len(kept) == 900


def test_a_log_is_trimmed_while_its_journal_is_written(tmp_path):
    with writer(tmp_path / 'log') as process:
        for _ in range(600):
            process.stdout.readline()
        with closing(LocalLog(tmp_path / 'log')) as log:
            start = trim_log(log, 't', Retention(size=20_000))
            assert start > 0
        for _ in range(100):
            process.stdout.readline()
        accepted = kill(process)
    with closing(LocalLog(tmp_path / 'log', readonly=True)) as log:
        end = log.end('t')
        assert end >= accepted
        assert log.read('t', start, 10**6) == [b'%d' % i for i in range(start, end)]
        with pytest.raises(MlrefError, match='retention'):
            log.read('t', 0, 1)


def test_it_is_a_log(tmp_path):
    with closing(JournaledLog(tmp_path / 'log', journal_bytes=SMALL)) as log:
        check_log(log, 'checked')
        log.empty_journal()
        check_log(log, 'again')
    with closing(JournaledLog(tmp_path / 'log')) as log:
        check_log(log, 'more')
