"""Batches, group commits and a cache under what a server meets: real logs, loops, kills, storms"""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager
from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest

from mlref.arguments import MlrefError
from mlref.batching import Batcher, DeadlineExceeded, Overloaded
from mlref.dead_letters import Outage
from mlref.group_commit import GroupCommit
from mlref.log import LocalLog
from mlref.prediction_cache import PredictionCache

DEEP = os.environ.get('MLREF_DEEP') == '1'
LOOPS = [
    'asyncio',
    pytest.param(
        'uvloop',
        marks=pytest.mark.skipif(find_spec('uvloop') is None, reason='uvloop is not installed'),
    ),
]
WEIGHTS = np.random.default_rng(0).normal(size=132).astype(np.float32)
X = np.random.default_rng(1).normal(size=(2000, 132)).astype(np.float32)


def model(rows):
    "A score that is bit-equal in any batch"
    return 1 / (1 + np.exp(-(rows * WEIGHTS).sum(1, dtype=np.float64) / 10))


SCORES = model(X)


@pytest.fixture(params=LOOPS)
def run(request):
    "Runs a coroutine in a loop of this kind"
    if request.param == 'uvloop':
        import uvloop

        return lambda coroutine: asyncio.Runner(loop_factory=uvloop.new_event_loop).run(coroutine)
    return asyncio.run


@pytest.fixture
def log(tmp_path):
    log = LocalLog(tmp_path / 'log')
    yield log
    log.close()


@asynccontextmanager
async def heartbeat(longest: list[float]):
    "Measures how long the loop was held up at most, in seconds"
    times = [time.monotonic()]

    async def beat():
        while True:
            await asyncio.sleep(0.005)
            times.append(time.monotonic())

    beating = asyncio.create_task(beat())
    await asyncio.sleep(0.02)
    yield
    await asyncio.sleep(0.02)
    beating.cancel()
    longest.append(max(later - earlier for earlier, later in pairwise(times)))


def read_all(log, topic='t'):
    return log.read(topic, 0, 10**6)


# group commit


def test_every_message_is_kept_once_in_order_and_its_offset_is_its_own(log, run):
    async def client(group, k):
        found = {}
        for i in range(40):
            messages = [b'%d-%d-%d' % (k, i, j) for j in range(1 + (k + i) % 3)]
            found[await group.append('t', messages)] = messages
        return found

    async def main():
        group = GroupCommit(log)
        found = await asyncio.gather(*[client(group, k) for k in range(32)])
        await group.close()
        return group, found

    group, found = run(main())
    kept = read_all(log)
    for mine in found:
        assert [*mine] == sorted(mine)  # of one caller: in order
        for offset, messages in mine.items():
            assert kept[offset : offset + len(messages)] == messages
    assert len(kept) == group.messages == sum(len(m) for mine in found for m in mine.values())
    assert 40 <= group.commits <= 80  # 1,280 appends


KILLED = """
import asyncio, sys
from pathlib import Path
from mlref.group_commit import GroupCommit
from mlref.log import LocalLog

async def client(group, k):
    for i in range(10**6):
        await group.append('t', [b'%d-%d' % (k, i)])
        sys.stdout.buffer.write(b'%d-%d\\n' % (k, i))  # the answer
        sys.stdout.buffer.flush()

async def main():
    group = GroupCommit(LocalLog(Path(sys.argv[1])), durability=sys.argv[2])
    await asyncio.gather(*[client(group, k) for k in range(8)])

asyncio.run(main())
"""


@pytest.mark.parametrize('answers', [40, 93, 211] if DEEP else [93])
def test_what_was_answered_is_there_after_a_kill(answers, tmp_path):
    command = [sys.executable, '-c', KILLED, str(tmp_path / 'log'), 'answer']
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    answered = {process.stdout.readline().strip() for _ in range(answers)}
    os.kill(process.pid, signal.SIGKILL)
    rest = process.communicate()[0].splitlines(keepends=True)
    answered |= {line.strip() for line in rest if line.endswith(b'\n')}
    kept = read_all(LocalLog(tmp_path / 'log', readonly=True))
    assert len(kept) == len({*kept}) and len(answered) >= answers
    assert answered <= {*kept}


def test_the_kill_loses_what_was_only_promised(tmp_path):
    """The test above can fail: with 'async' answers run ahead of the disk"""
    code = KILLED.replace('print', 'print') + ''
    code = code.replace('import asyncio, sys', 'import asyncio, sys, time').replace(
        'LocalLog(Path(sys.argv[1]))', 'Slow(Path(sys.argv[1]))'
    )
    slow = 'class Slow(LocalLog):\n    def append(self, *a):\n        time.sleep(60)\n'
    code = code.replace('\nasync def client', '\n' + slow + '\nasync def client')
    command = [sys.executable, '-c', code, str(tmp_path / 'log'), 'async']
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    answered = {process.stdout.readline().strip() for _ in range(50)}
    process.kill()
    process.communicate()
    assert not answered & {*read_all_or_none(tmp_path / 'log')}


def read_all_or_none(folder):
    log = LocalLog(folder)
    try:
        return read_all(log)
    finally:
        log.close()


HOLDS = """
import sys, time
from pathlib import Path
from mlref.log import LocalLog
log = LocalLog(Path(sys.argv[1]))
with log.file.env.begin(write=True):
    print('held', flush=True)
    time.sleep(600)
"""


@pytest.fixture
def stopped_writer(tmp_path):
    "Another process that holds the writer's lock of the log and is stopped"
    command = [sys.executable, '-c', HOLDS, str(tmp_path / 'log')]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b'held\n'
    os.kill(process.pid, signal.SIGSTOP)
    yield process
    process.kill()
    process.wait()


def test_a_stopped_writer_holds_up_nobody_for_long(log, stopped_writer, run):
    async def main():
        group = GroupCommit(log, max_wait=0.3)
        longest, waits = [], []
        async with heartbeat(longest):
            for _ in range(3):  # also a new topic, whose table must be made
                start = time.monotonic()
                with pytest.raises(Outage, match='within 0.3 s'):
                    await group.append('t', [b'first'])
                waits.append(time.monotonic() - start)
        assert group.trouble is not None
        stopped_writer.kill()
        stopped_writer.wait()
        for _ in range(200):  # the lock of a dead process is taken over
            await asyncio.sleep(0.02)
            if group.trouble is None:
                break
        offset = await group.append('t', [b'second'])
        await group.close()
        return longest[0], waits, offset

    longest, waits, offset = run(main())
    assert longest < 0.25
    assert 0.25 < waits[0] < 2 and max(waits[1:]) < 0.25  # the first waits, the others are told
    # the first was under way when it was refused: it may be kept, and the message says so
    assert read_all(log) == [b'first', b'second'] and offset == 1


def test_who_comes_behind_a_commit_that_never_ends_is_told_too(log, stopped_writer):
    """Also who comes before the commit has taken too long, since it began behind another"""

    async def main():
        now = 0.0
        group = GroupCommit(log, max_wait=0.1, clock=lambda: now)
        first = group.append('t', [b'first'])
        await asyncio.sleep(0.02)
        group.watch.begun = 0.05  # the commit before it ended then
        now = 0.1  # the first has waited long enough, the commit not yet
        with pytest.raises(Outage, match='within 0.1 s'):
            await asyncio.wait_for(first, 5)
        second = group.append('t', [b'second'])
        now = 0.3
        with pytest.raises(Outage, match='nothing was kept'):
            await asyncio.wait_for(second, 5)

    try:
        asyncio.run(main())
    finally:
        stopped_writer.kill()


def test_a_loop_that_waits_for_the_disk_itself_is_held_up(log, stopped_writer):
    """The heartbeat above can fail: an append in the loop stops it until the lock is free"""

    async def main():
        longest = []
        async with heartbeat(longest):
            asyncio.get_running_loop().run_in_executor(None, free_soon)
            log.append('t', [b'x'])
        return longest[0]

    def free_soon():
        time.sleep(0.5)
        stopped_writer.kill()

    assert asyncio.run(main()) > 0.4


FULL = """
import asyncio, resource, signal, sys
from pathlib import Path
from mlref.dead_letters import Outage
from mlref.group_commit import GroupCommit
from mlref.log import LocalLog

async def main():
    log = LocalLog(Path(sys.argv[1]))
    group = GroupCommit(log, durability=sys.argv[2])
    await group.append('t', [b'before'])
    while group.messages < 1:
        await asyncio.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    waiting = [group.append('t', [b'%d' % i * 2000]) for i in range(99)]
    found = await asyncio.gather(*waiting, return_exceptions=True)
    if sys.argv[2] == 'answer':
        assert all(isinstance(each, Outage) for each in found), found[:3]
        assert 'expected room on the disk' in str(found[0]), found[0]
        assert log.end('t') == 1 and group.trouble is not None
    else:
        await asyncio.sleep(0.3)
        assert group.could_be_lost == 99 and group.trouble is not None
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    if sys.argv[2] == 'answer':
        assert await group.append('t', [b'after']) == 1
    await group.close()
    assert group.could_be_lost == 0 and group.trouble is None
    print(log.end('t'))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
asyncio.run(main())
"""


@pytest.mark.parametrize(('durability', 'kept'), [('answer', 2), ('async', 100)])
def test_a_full_disk_is_told_and_what_was_promised_is_written_when_there_is_room(
    durability, kept, tmp_path
):
    command = [sys.executable, '-c', FULL, str(tmp_path / 'log'), durability]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(kept)


def test_a_full_map_is_told_to_its_callers_and_to_no_others(tmp_path, run):
    async def main():
        group = GroupCommit(LocalLog(tmp_path / 'small', size=2**17))
        large = group.append('t', [b'x' * 2**18])
        with pytest.raises(Outage, match='it is full at 131,072 bytes'):
            await large
        return await group.append('t', [b'small'])

    assert run(main()) == 0


def test_topics_of_a_group_share_one_commit_all_or_nothing(tmp_path, run):
    async def main(log):
        group = GroupCommit(log)
        waiting = [group.append('ab'[i % 2], [b'%d' % i, b'x']) for i in range(40)]
        offsets = await asyncio.gather(*waiting)
        large = [group.append('a', [b'small']), group.append('b', [b'x' * 2**19])]
        found = await asyncio.gather(*large, return_exceptions=True)
        await group.close()
        return group.commits, offsets, found

    log = LocalLog(tmp_path / 'small', size=2**18)
    commits, offsets, found = run(main(log))
    assert commits == 1 and offsets[::2] == offsets[1::2] == [*range(0, 40, 2)]
    assert all(isinstance(each, Outage) for each in found)
    assert read_all(log, 'a')[::2] == [b'%d' % i for i in range(0, 40, 2)]
    assert log.end('a') == log.end('b') == 40
    log.close()


def test_what_waits_for_the_disk_is_bounded(log, run):
    async def main():
        group = GroupCommit(log, max_bytes=100_000)
        taken, refused = [], 0
        for i in range(2000):
            try:
                taken.append(group.append('t', [b'%d' % i]))
            except Outage as error:
                refused += 1
                assert 'nothing was kept' in str(error)
        await asyncio.gather(*taken)
        await group.append('t', [b'x' * 200_000])  # alone it may be larger
        await group.close()
        return len(taken), refused

    taken, refused = run(main())
    assert refused > 1000 and taken + refused == 2000
    assert len(read_all(log)) == taken + 1


def test_clients_that_leave_neither_write_nor_disturb(log, run):
    async def client(group, i):
        await group.append('t', [b'%d' % i])

    async def main():
        group = GroupCommit(log)
        tasks = [asyncio.create_task(client(group, i)) for i in range(200)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await group.close()
        return group.queue.size

    assert run(main()) == 0
    kept = {int(message) for message in read_all(log)}
    assert {*range(1, 200, 2)} <= kept and not kept - {*range(200)}
    assert not kept & {*range(0, 200, 2)}


def test_closing_writes_what_was_accepted_and_takes_no_more(log, run):
    async def main():
        group = GroupCommit(log, durability='async')
        for i in range(500):
            group.append('t', [b'%d' % i])
        lost = group.could_be_lost
        await group.close()
        with pytest.raises(Outage, match='being closed'):
            group.append('t', [b'late'])
        return lost, group.could_be_lost

    assert run(main()) == (500, 0)
    assert read_all(log) == [b'%d' % i for i in range(500)]


def test_closing_says_how_much_may_be_lost(log, stopped_writer, run):
    async def main():
        group = GroupCommit(log, durability='async', max_wait=0.2)
        for i in range(7):
            group.append('t', [b'%d' % i])
        with pytest.raises(Outage, match='7 accepted messages may be lost'):
            await group.close()
        return group

    start = time.monotonic()
    group = run(main())
    assert time.monotonic() - start < 5
    stopped_writer.kill()
    group.thread.thread.join(20)  # it has the lock now, and the log may be closed after it
    assert not group.thread.thread.is_alive() and len(read_all(log)) == 7


@pytest.mark.parametrize(
    ('topic', 'messages'), [('t', ['text']), ('t', b'bytes'), ('a/b', [b'x']), ('t', [b'x', None])]
)
def test_what_is_no_message_is_refused_before_it_joins_a_group(topic, messages, log, run):
    async def main():
        group = GroupCommit(log)
        neighbour = group.append('t', [b'fine'])
        with pytest.raises(MlrefError, match='expected'):
            group.append(topic, messages)
        return await neighbour

    assert run(main()) == 0
    assert read_all(log) == [b'fine']


# batching


async def ask(batcher, i, seconds=math.inf):
    return (await batcher.submit(X[i : i + 1], time.monotonic() + seconds))[0]


@pytest.mark.parametrize('in_thread', [False, True])
def test_scores_do_not_depend_on_who_asks_at_the_same_time(in_thread, run):
    rng = np.random.default_rng(2)
    places = [
        (int(a), int(a + n))
        for a, n in zip(
            rng.integers(0, 1000, 300), rng.choice([1, 1, 1, 3, 40, 700], 300), strict=True
        )
    ]

    async def client(batcher, mine):
        for start, end in mine:
            scores = await batcher.submit(X[start:end], math.inf)
            assert scores.dtype == np.float64
            np.testing.assert_array_equal(scores, SCORES[start:end])

    async def main():
        batcher = Batcher(model, max_rows=64, in_thread=in_thread)
        await asyncio.gather(*[client(batcher, places[k::20]) for k in range(20)])
        await batcher.close()
        return batcher

    batcher = run(main())
    assert batcher.rows == sum(end - start for start, end in places)
    assert batcher.batches < batcher.rows / 8


def test_an_idle_model_is_run_at_once_and_a_busy_one_for_all_who_wait(run):
    async def main():
        batcher = Batcher(model)
        start = time.monotonic()
        await ask(batcher, 0)
        alone = time.monotonic() - start
        await asyncio.gather(*[ask(batcher, i) for i in range(100)])
        return alone, batcher.batches

    alone, batches = run(main())
    assert alone < 0.1 and batches == 2


def test_a_request_of_60000_rows_holds_up_nobody(run):
    many = np.tile(X, (30, 1))

    def slow(rows):
        time.sleep(len(rows) * 4e-6)  # a slice of 256 rows in a millisecond, all in 240
        return model(rows)

    async def main():
        batcher = Batcher(slow)
        await ask(batcher, 0)
        large = batcher.submit(many, math.inf)
        waits = []
        while not large.done():
            start = time.monotonic()
            assert await ask(batcher, 7) == SCORES[7]
            waits.append(time.monotonic() - start)
        np.testing.assert_array_equal(large.result(), np.tile(SCORES, 30))
        return waits

    waits = run(main())
    assert len(waits) > 150  # one in every two turns, of 235 slices
    assert np.median(waits) < 0.05


def test_two_large_requests_share_the_turns(run):
    async def main():
        batcher = Batcher(model, max_rows=100)
        done = []
        first = batcher.submit(X, math.inf)
        second = batcher.submit(X[:500], math.inf)
        for name, future in (('first', first), ('second', second)):
            future.add_done_callback(lambda _, name=name: done.append(name))
        await asyncio.gather(first, second)
        return done

    assert run(main()) == ['second', 'first']


@pytest.mark.parametrize('in_thread', [False, True])
def test_a_request_that_the_model_fails_on_costs_its_neighbours_nothing(in_thread, run):
    def picky(rows):
        if (rows[:, 0] == 99).any():
            raise ValueError('99 of all numbers')
        return model(rows)

    odd = X[:1].copy()
    odd[0, 0] = 99

    async def main():
        batcher = Batcher(picky, in_thread=in_thread)
        bad = [odd, X[:1, :7], odd]
        waiting = [batcher.submit(X[i : i + 1], math.inf) for i in range(100)]
        waiting[10:10] = [batcher.submit(rows, math.inf) for rows in bad]
        found = await asyncio.gather(*waiting, return_exceptions=True)
        await batcher.close()
        return found, batcher

    found, batcher = run(main())
    assert all(isinstance(each, ValueError) for each in found[10:13])
    np.testing.assert_array_equal(np.concatenate(found[:10] + found[13:]), SCORES[:100])


@pytest.mark.parametrize(
    'wrong', [lambda rows: model(rows)[:-1], lambda rows: model(rows)[:, None]]
)
def test_a_model_that_gives_other_than_a_score_a_row_is_told(wrong, run):
    async def main():
        return await Batcher(wrong).submit(X[:3], math.inf)

    with pytest.raises(MlrefError, match='expected 3 scores'):
        run(main())


@pytest.mark.parametrize('odd', [X[0], X[:0], X.astype(np.float64), [[1.0]], X.astype('>f4'), None])
def test_what_is_no_row_is_refused(odd, run):
    async def main():
        with pytest.raises(MlrefError, match='float32'):
            Batcher(model).submit(odd, math.inf)

    run(main())


def test_late_requests_and_clients_that_left_cost_no_run(run):
    async def main():
        now = [100.0]
        batcher = Batcher(model, clock=lambda: now[0])
        waiting = [batcher.submit(X[i : i + 1], 160) for i in range(50)]
        for future in waiting[:20]:
            future.cancel()
        late = [batcher.submit(X[:1], 101) for _ in range(5)]
        batcher.submit(X, math.inf).cancel()
        now[0] = 101.0
        await asyncio.gather(*waiting[20:], *late, return_exceptions=True)
        assert all(isinstance(each.exception(), DeadlineExceeded) for each in late)
        with pytest.raises(DeadlineExceeded) as refused:
            batcher.submit(X[:1], 101)
        assert refused.value.status == 504
        await batcher.close()
        return batcher.rows

    assert run(main()) == 30


def test_a_deadline_ends_a_large_request_between_its_slices(run):
    def slow(rows):
        time.sleep(0.01)
        return model(rows)

    async def main():
        batcher = Batcher(slow, max_rows=100)
        with pytest.raises(DeadlineExceeded, match='2,000 rows'):
            await batcher.submit(X, time.monotonic() + 0.05)
        return batcher.rows

    assert run(main()) < 1500


def test_a_full_queue_says_when_to_come_back(run):
    def slow(rows):
        time.sleep(0.3)
        return model(rows)

    async def main():
        batcher = Batcher(slow, max_rows=10, max_queue=100, in_thread=True)
        await ask(batcher, 0)  # one turn is measured: .3 s
        waiting = [asyncio.create_task(ask(batcher, i)) for i in range(100)]
        await asyncio.sleep(0)
        turn = batcher.turn.seconds
        with pytest.raises(Overloaded, match='100 requests wait') as refused:
            await ask(batcher, 0)
        for task in waiting:
            task.cancel()
        return refused.value.status, refused.value.retry_after, turn

    status, retry_after, turn = run(main())
    assert status == 503 and turn >= 0.3
    assert retry_after == math.ceil(12 * turn)  # ten full turns, the one under way, its own


def test_large_requests_take_bounded_memory_and_no_place_of_the_small_ones(run):
    async def main():
        batcher = Batcher(model, max_waiting=6000)
        large = [batcher.submit(X, math.inf) for _ in range(3)]
        with pytest.raises(Overloaded):
            batcher.submit(X, math.inf)
        await ask(batcher, 0)
        await asyncio.gather(*large)
        await batcher.submit(X, math.inf)

    run(main())


BATCH, TURN = 16, 0.02  # rows and seconds of a run; the peak is 800 rows/s


def timed(rows):
    time.sleep(TURN)
    return model(rows)


async def one_request(batcher, seconds, found):
    start = time.monotonic()
    try:
        await batcher.submit(X[:1], start + seconds)
        found.append(time.monotonic() - start)
    except Overloaded:
        found.append('shed')
    except DeadlineExceeded:
        found.append('late')


async def storm(batcher, rate, deadline):
    "Requests at a rate for a second and a half; what became of them, and how long it took in all"
    tasks, found = [], []
    begun = time.monotonic()
    while (elapsed := time.monotonic() - begun) < 1.5:
        new = range(int(rate * elapsed) - len(tasks))
        tasks += [asyncio.create_task(one_request(batcher, deadline, found)) for _ in new]
        await asyncio.sleep(0.002)
    await asyncio.gather(*tasks)
    return found, time.monotonic() - begun


def test_three_times_too_much_is_shed_and_the_rest_is_in_time(run):
    async def main():
        batcher = Batcher(timed, max_rows=BATCH, in_thread=True)
        all_of_it = await storm(batcher, 2 * BATCH / TURN, 60)
        some_of_it = await storm(batcher, 3 * BATCH / TURN, 0.4)
        await batcher.close()
        return all_of_it, some_of_it

    (every, needed), (found, seconds) = run(main())
    answered = [each for each in found if isinstance(each, float)]
    in_time = sum(each <= 0.4 for each in answered)
    goodput, peak = in_time / seconds, len(every) / needed
    assert all(isinstance(each, float) for each in every)
    assert goodput > 0.6 * peak, (goodput, peak)  # .8 and more on an idle machine
    assert in_time > 0.9 * len(answered)
    assert found.count('shed') > found.count('late')


def test_without_shedding_too_much_is_in_time_for_nobody(run):
    """The test above can fail: the same storm with a queue that refuses nothing"""

    class Patient(Batcher):
        def _admit(self, rows, deadline):
            return self.clock()

    async def main():
        batcher = Patient(timed, max_rows=BATCH, max_queue=10**6, in_thread=True)
        return await storm(batcher, 3 * BATCH / TURN, 60)

    found, _ = run(main())
    assert sum(each > 0.4 for each in found) > 0.5 * len(found)


def test_closing_waits_for_the_last_batch(run):
    async def main():
        batcher = Batcher(timed, max_rows=10, in_thread=True)
        waiting = [asyncio.create_task(ask(batcher, i)) for i in range(30)]
        await asyncio.sleep(0)
        await batcher.close()
        found = await asyncio.wait_for(asyncio.gather(*waiting), 0.1)  # they are scored
        with pytest.raises(Overloaded, match='no longer served'):
            await ask(batcher, 0)
        return found

    assert run(main()) == SCORES[:30].tolist()


# the cache


def test_promotion_and_rollback_give_no_stale_answer(run):
    versions = {'old': model, 'new': lambda rows: 1 - model(rows)}

    async def client(cache, batchers, serving, rng):
        stale = 0
        for i in rng.zipf(1.3, 10_000 // 64 + 1) % 500:
            version = serving[0]
            submit = partial(batchers[version].submit, deadline=math.inf)
            scores = await cache.submit(version, X[i : i + 1], submit)
            stale += scores[0] != (SCORES[i] if version == 'old' else 1 - SCORES[i])
        return stale

    async def main():
        batchers = {name: Batcher(each) for name, each in versions.items()}
        cache, serving = PredictionCache(max_bytes=100_000), ['old']

        async def swap():
            for k in range(10**6):
                await asyncio.sleep(0.001)
                serving[0] = ('new', 'old')[k % 2]
                if k % 3 == 0:
                    cache.drop(serving[0])

        swapping = asyncio.create_task(swap())
        rngs = [np.random.default_rng(k) for k in range(64)]
        stale = await asyncio.gather(*[client(cache, batchers, serving, rng) for rng in rngs])
        swapping.cancel()
        return sum(stale), cache

    stale, cache = run(main())
    assert stale == 0 and cache.hit_rate > 0.5
    assert cache.memory.size <= 100_000 and cache.hits + cache.joined + cache.misses > 10_000


def test_a_thousand_clients_cost_one_row_also_when_the_first_leaves(run):
    async def main():
        batcher = Batcher(timed, in_thread=True)
        cache = PredictionCache()

        async def client():
            return await cache.submit('v', X[:1], lambda rows: batcher.submit(rows, math.inf))

        tasks = [asyncio.create_task(client()) for _ in range(1000)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        return batcher.rows, found

    rows, found = run(main())
    assert rows == 1 and isinstance(found[0], asyncio.CancelledError)
    assert {scores[0] for scores in found[1:]} == {SCORES[0]}


def test_an_overload_of_the_first_is_not_that_of_those_who_joined(run):
    async def main():
        cache = PredictionCache()
        batcher = Batcher(model)
        calls = []

        def first(rows):
            calls.append('first')
            raise Overloaded('full', 3)

        failed = asyncio.get_running_loop().create_future()
        waiting = [cache.submit('v', X[:1], lambda rows: failed)]
        waiting.append(cache.submit('v', X[:1], first))
        good = [cache.submit('v', X[:1], lambda r: batcher.submit(r, math.inf)) for _ in range(3)]
        failed.set_exception(DeadlineExceeded('late'))
        found = await asyncio.gather(*waiting, *good, return_exceptions=True)
        return found, calls, cache

    found, calls, cache = run(main())
    assert isinstance(found[0], DeadlineExceeded) and isinstance(found[1], Overloaded)
    assert [scores[0] for scores in found[2:]] == [SCORES[0]] * 3
    assert calls == ['first'] and not cache.in_flight


def test_rows_of_one_request_come_from_everywhere(run):
    async def main():
        batcher = Batcher(timed, in_thread=True)
        cache = PredictionCache()

        def submit(rows):
            return batcher.submit(rows, math.inf)

        await cache.submit('v', X[:2], submit)
        under_way = cache.submit('v', X[2:4], submit)
        mixed = cache.submit('v', X[[0, 2, 9, 9, 1]], submit)
        found = await asyncio.gather(under_way, mixed)
        await batcher.close()
        return found[1], batcher.rows

    scores, rows = run(main())
    np.testing.assert_array_equal(scores, SCORES[[0, 2, 9, 9, 1]])
    assert rows == 5


# what they cost, and what they bring along


def test_a_worker_needs_nothing_heavy_for_them():
    code = 'import json, sys, mlref.prediction_cache; print(json.dumps([*sys.modules]))'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    heavy = {'polars', 'pandas', 'torch', 'mlflow', 'matplotlib', 'pyarrow'}
    found = {*json.loads(loaded.stdout)}
    assert {'mlref.batching', 'mlref.group_commit', 'mlref.log'} <= found and not heavy & found


def test_a_request_costs_a_small_part_of_a_commit_of_its_own(log, run):
    async def both(batcher, group, n, rounds):
        async def one(i):
            await batcher.submit(X[i : i + 1], math.inf)
            await group.append('t', [b'x' * 250])

        for _ in range(rounds):
            await asyncio.gather(*[one(i) for i in range(n)])

    async def main():
        batcher, group = Batcher(model), GroupCommit(log)
        await both(batcher, group, 32, 2)
        ratios = []
        for _ in range(9):
            start = time.process_time()
            await both(batcher, group, 1, 8)
            alone = time.process_time() - start
            await both(batcher, group, 32, 8)
            ratios.append((time.process_time() - start - alone) / 32 / alone)
        await group.close()
        return np.median(ratios)

    assert run(main()) < 0.4


# The processor time of a run


def spin(seconds):
    "Work for so long, by the clock of this thread"
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_a_run_took_what_its_own_thread_worked_however_many_others_do():
    stop = threading.Event()

    def be_busy():
        while not stop.is_set():
            spin(0.01)

    def run(X):
        spin(0.004)
        return np.zeros(len(X))

    async def score():
        batcher = Batcher(run, in_thread=True)
        seen = []
        for _ in range(20):
            await batcher.submit(np.zeros((1, 2), np.float32), math.inf)
            seen.append((batcher.turn.worked, batcher.turn.ran))
        await batcher.close()
        return np.array(seen)

    others = [threading.Thread(target=be_busy) for _ in range(3)]
    for other in others:
        other.start()
    try:
        worked, ran = asyncio.run(score()).T
    finally:
        stop.set()
        for other in others:
            other.join()
    assert (worked >= 0.004).all() and np.median(worked) < 0.006
    assert np.median(ran) > 0.008  # it waited for its turn in Python longer than it worked


def test_a_run_that_sleeps_did_not_work_and_waited():
    def run(X):
        time.sleep(0.03)
        return np.zeros(len(X))

    async def score():
        batcher = Batcher(run)
        await batcher.submit(np.zeros((1, 2), np.float32), math.inf)
        await batcher.close()
        return batcher.turn

    turn = asyncio.run(score())
    assert turn.worked < 0.01 and turn.ran - turn.worked > 0.02
