"""A journal before a log: killed, cut short, damaged, read while it is written, one writer"""

import asyncio
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mlref.core import MlrefError
from mlref.dead_letters import Outage
from mlref.group_commit import GroupCommit
from mlref.journal import JOURNAL, PAGE_BYTES, JournalFile
from mlref.journaled_log import JournaledLog, abandon_journal
from mlref.log import LocalLog
from mlref.log_care import Retention, trim_log, verify_log
from mlref.log_file import LogFile
from mlref.log_position import check_log, check_position, position_at
from mlref.partitions import check_partition

TOPIC, OTHER = check_partition('t', 0), check_partition('u', 0)
DEEP = os.environ.get('MLREF_DEEP') == '1'
SMALL = 8 * PAGE_BYTES  # a journal that is full after a few batches
WRITER = f"""
import sys
from pathlib import Path
from mlref.journaled_log import JournaledLog, abandon_journal
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


class Steps:
    "Ends its process at a step: before, within and behind each write and each transaction"

    def __init__(self, last):
        self.left = last

    def pass_one(self):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    def write(self, write, file, data, at):
        self.pass_one()
        half = len(data) // 2
        written = write(file, data[:half], at) if half else 0
        self.pass_one()
        written += write(file, data[half:], at + half)
        self.pass_one()
        return written

    def commit(self, commit, file, work, *inputs):
        def watched(*some):
            self.pass_one()
            found = work(*some)
            self.pass_one()
            return found

        found = commit(file, watched, *inputs)
        self.pass_one()
        return found


def write_until(folder, last, told):
    "The child of a fork: one life of a writer, which ends at a step"
    steps = Steps(last)
    os.pwrite = partial(steps.write, os.pwrite)
    write = LogFile.write
    LogFile.write = lambda file, work, *inputs: steps.commit(write, file, work, *inputs)
    log = JournaledLog(folder, journal_bytes=2 * PAGE_BYTES)
    for size in (1, 900, 1, 1, 2_000, 1, 700):
        at = log.end('t')
        numbers = [b'%d' % i for i in range(at, at + size)]
        assert log.append_batches({TOPIC: numbers, OTHER: numbers}) == [at, at]
        os.write(told, b'%d\n' % (at + size))
    log.close()


def test_killed_at_every_step_it_has_all_that_was_accepted_once(tmp_path):
    ends = []
    for last in range(400):
        read, told = os.pipe()
        child = os.fork()
        if not child:
            with suppress(BaseException):
                write_until(tmp_path, last, told)
                os._exit(0)
            os._exit(1)
        os.close(told)
        state = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(read) as said:
            accepted = [int(line) for line in said]
        assert state in (0, -signal.SIGKILL)
        if (tmp_path / 'data.mdb').exists():
            with closing(LocalLog(tmp_path, readonly=True)) as log:
                ends.append(check_numbers(log))
                assert log.read('u', 0, 10**6) == log.read('t', 0, 10**6)
                assert ends[-1] >= max([0, *accepted, *ends[:-1]])
        if state == 0:
            break
    assert 35 < last < 399 and ends[-1] > 10_000


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
    for cut in range(PAGE_BYTES, begins[-1] + PAGE_BYTES, 512):
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


@pytest.mark.parametrize('harm', ['a gap', 'cut off', 'of another log'])
def test_a_journal_that_is_refused_is_left_as_it_is(harm, written):
    whole = (written / JOURNAL).read_bytes()
    gap = records_of(whole)[1]
    harmed = {
        'a gap': whole[:gap] + bytes(PAGE_BYTES) + whole[gap + PAGE_BYTES :],
        'cut off': whole[:-1],
        'of another log': bytes(PAGE_BYTES) + whole[PAGE_BYTES:],
    }[harm]
    (written / JOURNAL).write_bytes(harmed)
    for size in (SMALL, len(whole) + SMALL):
        with pytest.raises(MlrefError, match='damaged|cut off'):
            JournaledLog(written, journal_bytes=size)
        assert (written / JOURNAL).read_bytes() == harmed


def test_the_journal_is_read_once_when_its_log_is_opened(written, monkeypatch):
    end = read_numbers(written)
    read, read_file = JournalFile.read, Path.read_bytes
    reads = []
    monkeypatch.setattr(JournalFile, 'read', lambda file: (reads.append(1), read(file))[1])
    monkeypatch.setattr(
        Path, 'read_bytes', lambda path: (reads.append(path.name), read_file(path))[1]
    )
    with closing(JournaledLog(written)) as log:
        assert reads == [1]
        assert check_numbers(log) == end


def test_what_was_moved_is_found_without_the_journal(written):
    end = read_numbers(written)
    with closing(JournaledLog(written)) as log:
        log.append('t', [b'%d' % end])
        (written / JOURNAL).rename(written / 'aside')
        assert log.epoch_of('t', end - 1) == log.epoch_of('t', 0) != log.writer.epoch
        with pytest.raises(MlrefError, match='put it back'):
            log.epoch_of('t', end)
        (written / 'aside').rename(written / JOURNAL)
        assert log.epoch_of('t', end) == log.writer.epoch
        with pytest.raises(MlrefError, match=f'up to its end at {end + 1:,}'):
            log.epoch_of('t', end + 1)


def epoch_of(folder):
    with closing(LocalLog(folder, readonly=True)) as log:
        assert log.epoch_of('t', log.end('t') - 1) == log.epoch_of('t', 0)
        return log.epoch_of('t', 0)


def test_what_was_moved_does_not_count_again(written):
    before = (written / JOURNAL).read_bytes()
    end = read_numbers(written)
    epoch = epoch_of(written)
    code = 'import sys; from pathlib import Path; from mlref.journaled_log import JournaledLog;'
    code += 'JournaledLog(Path(sys.argv[1])); import os; os._exit(0)'  # moves, and dies
    subprocess.run([sys.executable, '-c', code, str(written)], check=True)
    assert (written / JOURNAL).read_bytes()[: len(before)] == before
    assert read_numbers(written) == end
    assert epoch_of(written) == epoch
    with closing(JournaledLog(written)) as log:
        assert check_numbers(log) == end


def test_a_journal_that_is_not_the_one_it_was_is_missed(written, tmp_path):
    whole = (written / JOURNAL).read_bytes()
    end = read_numbers(written)
    with closing(JournaledLog(tmp_path / 'other')) as other:
        other.append('t', [b'of another log'])
        stolen = (tmp_path / 'other' / JOURNAL).read_bytes()
    last = records_of(whole)[-1]
    wrong = {
        'removed': (None, 'put it back'),
        'empty': (b'', 'put it back'),
        'blank': (bytes(len(whole)), 'damaged or replaced'),
        'of another log': (stolen, 'damaged or replaced'),
        'without its last page': (whole[:-PAGE_BYTES], 'cut off'),
        'without its last record': (whole[:last], 'cut off'),
        'begun again': (whole[:PAGE_BYTES], 'cut off'),
    }
    for data, said in wrong.values():
        (written / JOURNAL).unlink()
        if data is not None:
            (written / JOURNAL).write_bytes(data)
        with pytest.raises(MlrefError, match=said):
            read_numbers(written)
        for _ in range(2):  # the first has not made a new one
            with pytest.raises(MlrefError, match=said):
                JournaledLog(written)
        (written / JOURNAL).write_bytes(whole)
    assert read_numbers(written) == end
    with closing(JournaledLog(written)) as log:
        assert check_numbers(log) == end


def test_what_a_lost_journal_held_is_given_up_by_a_person_alone(written):
    "And whoever had read it is told, also when as many messages have come again"
    with closing(LocalLog(written)) as log:
        end = check_numbers(log)
        kept = position_at(log, 't', end)
        with pytest.raises(MlrefError, match='moved aside'):
            abandon_journal(log)
    (written / JOURNAL).unlink()
    with closing(LocalLog(written)) as log:
        abandon_journal(log)
        with pytest.raises(MlrefError, match='moved aside'):
            abandon_journal(log)
        with pytest.raises(MlrefError, match='it holds 0 to 0'):
            check_position(log, 't', kept)
    with closing(JournaledLog(written)) as log:
        assert log.append('t', [b'%d' % i for i in range(end + 1)]) == 0
        with pytest.raises(MlrefError, match='went on differently'):
            check_position(log, 't', kept)
    assert read_numbers(written) == end + 1


def test_a_journal_that_was_closed_in_order_may_be_replaced(written):
    JournaledLog(written).close()
    end = read_numbers(written)
    for data in (None, b'', bytes(5_000)):
        (written / JOURNAL).unlink()
        if data is not None:
            (written / JOURNAL).write_bytes(data)
        assert read_numbers(written) == end
        with closing(JournaledLog(written)) as log:
            assert log.append('t', [b'%d' % end]) == end
        end += 1


def test_an_older_copy_of_a_closed_log_is_not_continued_by_later_records(written):
    JournaledLog(written).close()
    older = (written / 'data.mdb').read_bytes()
    end = read_numbers(written)
    with closing(JournaledLog(written)) as log:
        for i in range(3):
            log.append('t', [b'later %d' % i])
    (written / 'data.mdb').write_bytes(older)
    with closing(JournaledLog(written)) as log:
        assert check_numbers(log) == end
        assert log.append('t', [b'%d' % end]) == end
        assert check_numbers(log) == end + 1


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
            JournalFile(tmp_path / 'log', 0, patience=0.2)
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


def test_a_new_journal_is_on_disk_with_its_name(tmp_path, monkeypatch):
    sync = os.fsync
    synced = []
    monkeypatch.setattr(os, 'fsync', lambda file: (synced.append(os.fstat(file)), sync(file)))
    with closing(JournaledLog(tmp_path / 'log')) as log:
        assert [os.fstat(log.journal.file), os.stat(tmp_path / 'log')] == [
            each for each in synced if each.st_ino != os.stat(tmp_path / 'log' / 'data.mdb').st_ino
        ][-2:]


@pytest.mark.parametrize('name', [JOURNAL, 'data.mdb'])
def test_a_file_that_was_replaced_while_it_was_written_is_told(tmp_path, name):
    file = tmp_path / 'log' / name
    log = JournaledLog(tmp_path / 'log')
    log.append('t', [b'0'])
    file.rename(tmp_path / 'aside')
    file.write_bytes((tmp_path / 'aside').read_bytes())
    with pytest.raises(MlrefError, match='replaced while it was in use'):
        log.append('t', [b'lost'])
    (tmp_path / 'aside').rename(file)
    assert log.append('t', [b'1']) == 1
    log.close()
    assert read_numbers(tmp_path / 'log') == 2


def test_a_closed_journal_writes_nowhere(tmp_path):
    journal = JournalFile(tmp_path, 0)
    number = journal.file
    journal.close()
    other = os.open(tmp_path / 'other', os.O_RDWR | os.O_CREAT)
    os.dup2(other, number)  # as the system gives it out again, sooner or later
    with pytest.raises(OSError, match='Bad file descriptor'):
        journal.write(0, bytes(PAGE_BYTES))
    journal.close()
    assert os.fstat(number).st_size == 0
    for each in {number, other}:
        os.close(each)


@contextmanager
def files_up_to(size):
    "As on a disk that is full: no file grows beyond so many bytes"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_without_room_for_a_journal_there_is_no_log_yet(tmp_path):
    LocalLog(tmp_path / 'log').close()
    for size in (40_000, 2**18, 2**19):
        with files_up_to(size), pytest.raises(MlrefError, match='journal, got File too large'):
            JournaledLog(tmp_path / 'log')
    with closing(JournaledLog(tmp_path / 'log')) as log:
        check_log(log, 'checked')


async def wait_until(condition):
    for _ in range(400):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError('it did not come')


@pytest.mark.parametrize('durability', ['answer', 'async'])
def test_a_group_on_a_full_disk_is_told_and_goes_on_when_there_is_room(tmp_path, durability):
    log = JournaledLog(tmp_path / 'log', journal_bytes=SMALL)
    accepted = []

    async def add(group, size):
        message = b'%d ' % len(accepted) + bytes(size)
        offset = await group.append('t', [message])
        assert offset in (None, len(accepted))
        accepted.append(message)

    async def work():
        group = GroupCommit(log, durability=durability)
        size = (tmp_path / 'log' / 'data.mdb').stat().st_size
        with files_up_to(size + 40_000):
            if durability == 'answer':
                with pytest.raises(Outage, match='expected room on the disk'):
                    for _ in range(100):
                        await add(group, 3_000)
                assert group.could_be_lost == 0
            else:
                for _ in range(100):
                    await add(group, 3_000)
                    await asyncio.sleep(0.001)
                await wait_until(lambda: group.trouble is not None)
                assert 0 < group.could_be_lost < len(accepted)
            assert 'room on the disk' in str(group.trouble)
        if durability == 'answer':
            await add(group, 3_000)
        await wait_until(lambda: group.could_be_lost == 0 and group.trouble is None)
        await group.close()

    asyncio.run(work())
    assert len(accepted) > 5
    assert log.read('t', 0, 10**6) == accepted
    log.close()
    with closing(LocalLog(tmp_path / 'log', readonly=True)) as log:
        assert log.read('t', 0, 10**6) == accepted


def test_nothing_of_durability_none_is_written(tmp_path):
    async def work():
        group = GroupCommit(log, durability='none')
        await group.append('t', [b'0', b'1'])
        await group.close()
        return group.could_be_lost

    with closing(JournaledLog(tmp_path / 'log')) as log:
        assert asyncio.run(work()) == 2
        assert log.end('t') == 0


def test_a_log_without_a_journal_is_continued_and_given_back(tmp_path):
    "By a plain writer, a process that is killed, a plain writer that must wait, one with a journal"
    with closing(LocalLog(tmp_path)) as log:
        for i in range(0, 900, 3):
            log.append('t', [b'%d' % j for j in range(i, i + 3)])
        epoch = log.writer.epoch
    with writer(tmp_path) as process:
        for _ in range(40):
            process.stdout.readline()
        kill(process)
    end = read_numbers(tmp_path)
    assert end > 900
    with closing(LocalLog(tmp_path)) as log:
        assert log.epoch_of('t', 899) == epoch != log.epoch_of('t', 900)
        with pytest.raises(MlrefError, match='in its journal first'):
            log.append('t', [b'%d' % end])
    JournaledLog(tmp_path).close()
    with closing(LocalLog(tmp_path)) as log:
        assert log.append('t', [b'%d' % end]) == end
    with closing(JournaledLog(tmp_path)) as log:
        assert log.append('t', [b'%d' % (end + 1)]) == end + 1
        assert check_numbers(log) == end + 2


def test_retention_while_messages_are_in_the_journal_alone(tmp_path):
    "By age and size, with a clock that goes backwards, also of a partition that has no block yet"
    now = [10_000.0]
    expired = Retention(seconds=1.0, anyway=True)  # the steps of this clock are known
    with closing(JournaledLog(tmp_path, clock=lambda: now[0], journal_bytes=SMALL)) as log:
        log.append('t', [b'0', b'1'])
        for policy in (expired, Retention(size=1)):
            assert trim_log(log, 't', policy) == 0
        assert check_numbers(log) == 2
        log.empty_journal()
        now[0] -= 5_000
        log.append('t', [b'2'] + [b'%d' % i for i in range(3, 12_000)])
        now[0] += 9_000
        log.append('t', [b'12000'])
        # of what came while the clock stood back nobody knows when it came
        assert trim_log(log, 't', expired) == 2
        now[0] += 10
        log.append('t', [b'12001'])
        start = trim_log(log, 't', expired)  # now something younger has expired
        assert 2 < start <= 12_001 == log.end('t') - 1
        assert log.read('t', start, 10**6) == [b'%d' % i for i in range(start, 12_002)]


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


def fail_after(monkeypatch, whole, errors=1):
    "The next writes of a journal report an error, with all of it in the file or half of it"
    write = os.pwrite
    left = [errors]

    def broken(file, data, at):
        if not left[0]:
            return write(file, data, at)
        left[0] -= 1
        write(file, data if whole else data[: len(data) // 2], at)
        raise OSError(errno.EIO, 'Input/output error')

    monkeypatch.setattr(os, 'pwrite', broken)
    return left


@pytest.mark.parametrize('whole', [True, False])
@pytest.mark.parametrize('errors', [1, 2])
@pytest.mark.parametrize('before', [0, 3])
def test_what_failed_is_not_there_and_what_follows_is(tmp_path, monkeypatch, before, errors, whole):
    folder = tmp_path / 'log'
    log = JournaledLog(folder, journal_bytes=SMALL)
    for i in range(before):
        log.append('t', [b'%d' % i])
    fail_after(monkeypatch, whole, errors)  # with two, it cannot be blanked either
    with pytest.raises(MlrefError, match='nothing of this batch was kept'):
        log.append('t', [b'failed', b'x' * 9_000])
    if errors == 1:
        assert check_numbers(log) == before
    log.append('u', [b'another partition'])
    assert check_numbers(log) == before
    for i in range(before, before + 4):
        assert log.append('t', [b'%d' % i]) == i
        assert check_numbers(log) == i + 1
    log.close()
    with closing(JournaledLog(folder)) as log:
        assert check_numbers(log) == before + 4
        assert log.read('u', 0, 9) == [b'another partition']


@pytest.mark.parametrize('before', [0, 3])
def test_what_failed_does_not_come_back_with_the_next_writer(tmp_path, monkeypatch, before):
    log = JournaledLog(tmp_path / 'log', journal_bytes=SMALL)
    for i in range(before):
        log.append('t', [b'%d' % i])
    fail_after(monkeypatch, True, 2)
    with pytest.raises(MlrefError, match='nothing of this batch was kept'):
        log.append('t', [b'failed'])
    log.close()
    with closing(JournaledLog(tmp_path / 'log')) as log:
        assert check_numbers(log) == before
        assert log.append('t', [b'%d' % before]) == before
        assert check_numbers(log) == before + 1


def test_an_error_behind_the_commit_moves_nothing_twice(tmp_path, monkeypatch):
    with closing(JournaledLog(tmp_path / 'log', journal_bytes=SMALL)) as log:
        for i in range(4):
            log.append('t', [b'%d' % i])
        with monkeypatch.context() as broken:
            broken.setattr(log.file.sweep, 'after_commit', lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                log.empty_journal()
        assert check_numbers(log) == 4
        log.empty_journal()
        assert check_numbers(log) == 4
        assert log.append('t', [b'4']) == 4
        assert check_numbers(log) == 5


def test_a_short_write_goes_on(tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(os, 'pwrite', lambda file, data, at: write(file, data[:1_000], at))
    with closing(JournaledLog(tmp_path / 'log', journal_bytes=SMALL)) as log:
        for i in range(0, 300, 100):
            log.append('t', [b'%d' % j for j in range(i, i + 100)])
        log.append('u', [b'x' * 9_000])
        assert check_numbers(log) == 300
    assert (tmp_path / 'log' / JOURNAL).stat().st_size == SMALL + PAGE_BYTES


def test_a_reader_that_is_held_up_sees_no_damage(tmp_path, monkeypatch):
    "It has read the page where a record will be, two are written, and it reads on"
    with closing(JournaledLog(tmp_path / 'log', journal_bytes=SMALL)) as log:
        log.append('t', [b'0'])
        read = Path.read_bytes
        rounds = []

        def held_up(path):
            data = read(path)
            if len(rounds) < 2:
                rounds.append(log.accepted.at)
                passed = PAGE_BYTES + log.accepted.at + PAGE_BYTES
                end = 1 + 2 * len(rounds)
                log.append('t', [b'%d' % (end - 2)])
                log.append('t', [b'%d' % (end - 1)])
                data = data[:passed] + read(path)[passed:]
            return data

        monkeypatch.setattr(Path, 'read_bytes', held_up)
        assert check_numbers(log) == 5
        assert len(rounds) == 2


def test_a_reader_that_is_overtaken_by_a_large_batch_looks_again(tmp_path, monkeypatch):
    "The batch goes past the journal, and the next message stands in the journal already"
    with closing(JournaledLog(tmp_path / 'log', journal_bytes=SMALL)) as log:
        log.append('t', [b'0'])
        log.empty_journal()
        read = Path.read_bytes
        rounds = []

        def held_up(path):
            if not rounds:
                rounds.append(path)
                assert log.append('t', [b'%d' % i for i in range(1, 9_000)]) == 1
                assert log.append('t', [b'9000']) == 9_000
            return read(path)

        monkeypatch.setattr(Path, 'read_bytes', held_up)
        assert log.read('t', 0, 10_000) == [b'%d' % i for i in range(9_001)]
        assert rounds


def test_closed_it_takes_nothing_and_touches_no_other_file(tmp_path):
    log = JournaledLog(tmp_path / 'log')
    log.append('t', [b'0'])
    number = log.journal.file
    log.close()
    other = os.open(tmp_path / 'other', os.O_RDWR | os.O_CREAT)
    os.write(other, b'of somebody else')
    os.dup2(other, number)  # as the system gives it out again, sooner or later
    with pytest.raises(MlrefError, match='is closed'):
        log.append('t', [b'1'])
    with pytest.raises(MlrefError, match='is closed'):
        log.empty_journal()
    log.close()
    assert os.pread(other, 99, 0) == b'of somebody else'
    for each in {number, other}:
        os.close(each)
    assert read_numbers(tmp_path / 'log') == 1


def test_one_that_is_forgotten_lets_go(tmp_path):
    log = JournaledLog(tmp_path / 'log')
    log.append('t', [b'0'])
    del log
    with closing(JournaledLog(tmp_path / 'log')) as log:
        assert check_numbers(log) == 1


def test_a_fork_leaves_it_to_its_process(tmp_path):
    log = JournaledLog(tmp_path / 'log')
    log.append('t', [b'0'])
    child = os.fork()
    if not child:
        refused = 0
        for act in (partial(log.append, 't', [b'of the fork']), log.empty_journal):
            try:
                act()
            except MlrefError as error:
                refused += 'forked' in str(error)
        log.close()
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert log.append('t', [b'1']) == 1
    assert check_numbers(log) == 2
    log.close()
    assert read_numbers(tmp_path / 'log') == 2


@pytest.mark.parametrize('size', [0, -1, True, 100, PAGE_BYTES - 1, 1e5, None, '4096'])
def test_a_size_that_is_none_is_told(tmp_path, size):
    with pytest.raises(MlrefError, match='the bytes of a journal as a whole number from 4096'):
        JournaledLog(tmp_path / 'log', journal_bytes=size)
    with closing(JournaledLog(tmp_path / 'log', journal_bytes=PAGE_BYTES)) as log:
        check_log(log, 'checked')


def test_it_is_opened_with_another_size(tmp_path):
    end = 0
    for size in (5_000, 9 * PAGE_BYTES - 1, PAGE_BYTES, 3 * 2**20, 2 * PAGE_BYTES):
        code = WRITER.replace(f'journal_bytes={SMALL}', f'journal_bytes={size}')
        command = [sys.executable, '-c', code + 'import os; os._exit(0)', str(tmp_path), '40']
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert read_numbers(tmp_path) == int(said.split()[-1]) > end
        end = int(said.split()[-1])


def test_batches_without_messages_are_refused(tmp_path):
    where, other = check_partition('t', 0), check_partition('u', 0)
    with closing(JournaledLog(tmp_path / 'log', journal_bytes=SMALL)) as log:
        for wrong in ([], ['text'], None, b'bytes'):
            with pytest.raises(MlrefError, match='expected (a list of )?messages'):
                log.append_batches({other: [b'1'], where: wrong})
        with closing(LocalLog(tmp_path / 'plain')) as plain:
            with pytest.raises(MlrefError, match='leave it out'):
                plain.append_batches({other: [b'1'], where: []})
            assert (plain.end('t'), plain.end('u')) == (0, 0)
        for _ in range(30):
            assert log.append_batches({}) == []
        assert (tmp_path / 'log' / JOURNAL).stat().st_size == SMALL + PAGE_BYTES
        with pytest.raises(MlrefError, match='at most 256 partitions'):
            log.append_batches({check_partition('many', i): [b'1'] for i in range(300)})
        assert (log.end('t'), log.end('u'), log.end('many', 3)) == (0, 0, 0)
    with closing(JournaledLog(tmp_path / 'log')) as log:
        assert log.end('u') == 0


def test_messages_of_any_size_keep_their_order(tmp_path):
    draw = np.random.default_rng(2)
    sizes = [0, 0, 1, 10_000_000, *draw.integers(0, 5_000, 200), 0, 600_000, 0]
    with closing(JournaledLog(tmp_path / 'log', size=2**26)) as log:
        for i, size in enumerate(sizes):
            message = bytes([i % 256]) * int(size)
            assert log.append('t', [message]) == i
            assert log.read('t', i, 1) == [message]
        assert log.append('u', [b''] * 200_000) == 0
        assert log.append('u', [b'behind']) == 200_000
        assert [len(each) for each in log.read('t', 0, 999)] == sizes
