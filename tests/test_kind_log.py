"""A log says which one it is, what it holds, and that it is whole"""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import lmdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.blocks import (
    GrowingBlock,
    Partition,
    pack_block,
    pack_offset,
    read_head,
    unpack_block,
)
from mlref.consumer import Consumer, list_partitions, partition_of, send_events
from mlref.contracts import check_messages
from mlref.core import MlrefError
from mlref.flights.events import FLIGHT_SCHEMA
from mlref.ingest import (
    IngestCounts,
    commit_batch,
    follow_log,
    ingest,
    read_position,
    start_position,
)
from mlref.journaled_log import append_together
from mlref.lake import Lake, insert_rows
from mlref.lmdb_files import measure_readers, read_meta_pages
from mlref.log import LocalLog
from mlref.log_care import Retention, StoredBlock, convert_log, retained_from, trim_log, verify_log
from mlref.log_position import LogPosition, check_position, position_at
from mlref.model_server import PredictionRow, encode_row
from mlref.snapshots import open_snapshot, publish_snapshot
from programs import MLREF

DEEP = os.environ.get('MLREF_DEEP') == '1'
MANY = settings(max_examples=1000 if DEEP else 30, deadline=None, derandomize=not DEEP)
MESSAGES = [b'{"event_id": "%d"}' % i for i in range(3000)]


@pytest.fixture
def log(tmp_path):
    log = LocalLog(tmp_path / 'log')
    log.append('t', MESSAGES)
    yield log
    log.close()


def test_the_position_of_a_log_is_kept_with_what_was_made_of_it(log, tmp_path):
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    ingest(lake, log, 't', (), batch=1000)
    kept = read_position(lake, 't')
    assert kept == position_at(log, 't', 3000)
    assert (kept.log, kept.epoch) == (log.file.id, log.writer.epoch)
    lake.close()


@pytest.mark.parametrize('replaced', ['shorter', 'longer', 'empty', 'restored and gone on'])
def test_another_log_in_its_place_is_refused_by_whoever_read_the_first(replaced, log, tmp_path):
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    log.append('t', MESSAGES[:1])
    log.close()
    if replaced == 'restored and gone on':
        shutil.copytree(tmp_path / 'log', tmp_path / 'copy')
    log = LocalLog(tmp_path / 'log')
    log.append('t', MESSAGES[:10])
    ingest(lake, log, 't', ())
    log.close()
    shutil.rmtree(tmp_path / 'log')
    if replaced == 'restored and gone on':
        shutil.move(tmp_path / 'copy', tmp_path / 'log')
    log = LocalLog(tmp_path / 'log')
    sizes = {'shorter': 100, 'longer': 5000, 'empty': 0, 'restored and gone on': 50}
    log.append('t', [b'{}'] * sizes[replaced])
    with pytest.raises(MlrefError, match='expected .*, got .*; restore that log'):
        ingest(lake, log, 't', ())
    with pytest.raises(MlrefError, match='restore that log'):
        Consumer(log, 't', {0: read_position(lake, 't')})
    lake.close()
    log.close()


def test_a_copy_that_was_cut_back_is_refused(log, tmp_path):
    kept = position_at(log, 't', 3000)
    log.close()
    shutil.copytree(tmp_path / 'log', tmp_path / 'backup')
    log = LocalLog(tmp_path / 'log')
    log.append('t', MESSAGES)
    later = position_at(log, 't', 6000)
    log.close()
    with_backup = LocalLog(tmp_path / 'backup')
    check_position(with_backup, 't', kept)
    with pytest.raises(MlrefError, match='it holds 0 to 3,000'):
        check_position(with_backup, 't', later)
    with_backup.close()


def test_the_command_that_follows_a_log_says_so_and_fails(log, tmp_path):
    log.append('events', [b'{}'] * 5)
    log.close()
    command = [*MLREF, 'ingest', '--once', '--log', tmp_path / 'log']
    command += ['--lake', tmp_path / 'l.duckdb']
    subprocess.run(command, capture_output=True)
    shutil.rmtree(tmp_path / 'log')
    other = LocalLog(tmp_path / 'log')
    other.append('t', [b'{}'])
    other.close()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'restore that log, or start a new lake' in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3, done.stderr


def test_a_lake_of_an_earlier_release_takes_the_log_it_meets(log, tmp_path):
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    ingest(lake, log, 't', ())
    lake.con.execute('update offsets set log = null, epoch = null')
    log.append('t', MESSAGES[:1])
    ingest(lake, log, 't', ())
    assert read_position(lake, 't') == position_at(log, 't', 3001)
    lake.close()


def test_a_log_of_an_earlier_release_is_refused_and_can_be_copied(tmp_path):
    with lmdb.open(str(tmp_path / 'old'), max_dbs=4, map_size=2**24) as env:
        for part in (0, 1):
            table = env.open_db(f'a/b/{part}'.replace('a/b', 'events').encode())
            with env.begin(write=True, db=table) as txn:
                for i in range(100 + part):
                    txn.put(struct.pack('>Q', i), b'%d' % i)
    for readonly in (False, True):
        with pytest.raises(MlrefError, match='another release; .*convert_log'):
            LocalLog(tmp_path / 'old', readonly=readonly)
    with lmdb.open(str(tmp_path / 'trimmed'), max_dbs=4, map_size=2**24) as env:
        table = env.open_db(b'events/0')
        with env.begin(write=True, db=table) as txn:
            for i in range(40, 100):
                txn.put(struct.pack('>Q', i), b'%d' % i)
    with pytest.raises(MlrefError, match='from 0 to 99, 40 of them are missing'):
        convert_log(tmp_path / 'trimmed', tmp_path / 'shifted')
    with lmdb.open(str(tmp_path / 'none'), max_dbs=4, map_size=2**24) as env:
        env.open_db(b'of something else')
    with pytest.raises(MlrefError, match="a partition such as events/0, got 'of something else'"):
        convert_log(tmp_path / 'none', tmp_path / 'never')
    assert convert_log(tmp_path / 'old', tmp_path / 'new') == {'events/0': 100, 'events/1': 101}
    assert LocalLog(tmp_path / 'new').read('events', 0, 999, 1) == [b'%d' % i for i in range(101)]
    with pytest.raises(MlrefError, match='choose another folder'):
        convert_log(tmp_path / 'old', tmp_path / 'new')


def stored_places(file, text, count, seed):
    "Places of bits of a text in a file"
    data = file.read_bytes()
    first = data.index(text)
    generator = random.Random(seed)
    return data, [first * 8 + generator.randrange(len(text) * 8) for _ in range(count)]


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize('n', [1, 7, 3000])
def test_a_flipped_bit_of_a_message_is_an_error_that_says_where(n, tmp_path):
    log = LocalLog(tmp_path / 'log')
    log.append('t', [b'before'], partition=3)
    log.append('t', MESSAGES[:n], partition=3)
    log.close()
    file = tmp_path / 'log' / 'data.mdb'
    data, bits = stored_places(file, MESSAGES[n - 1], 200 if DEEP else 20, seed=n)
    for bit in bits:
        file.write_bytes(flipped(data, bit))
        log = LocalLog(tmp_path / 'log', readonly=True)
        with pytest.raises(MlrefError, match=r'expected the messages of t/3 from offset \d'):
            log.read('t', 0, 9999, 3)
        log.close()
    file.write_bytes(data)
    log = LocalLog(tmp_path / 'log', readonly=True)
    assert log.read('t', 0, 9999, 3) == [b'before', *MESSAGES[:n]]
    log.close()


READS = """
import sys
from pathlib import Path
from mlref.core import MlrefError
from mlref.journaled_log import append_together
from mlref.log import LocalLog
try:
    log = LocalLog(Path(sys.argv[1]), readonly=True)
    read = log.read('t', 0, 10**6)
except MlrefError as error:
    print(error)
    sys.exit(3)
sys.exit(0 if len(read) == 20_000 else 4)
"""


def test_a_page_of_zeros_anywhere_is_a_sentence_and_not_the_end_of_the_process(tmp_path):
    log = LocalLog(tmp_path / 'log')
    for i in range(0, 20_000, 200):
        log.append('t', [b'%0100d' % j for j in range(i, i + 200)])
    log.close()
    file = tmp_path / 'log' / 'data.mdb'
    data = file.read_bytes()
    heads = read_meta_pages(file)
    used = max(meta.last_page for meta in heads) + 1
    pages = [0, 1, *random.Random(0).sample(range(2, used), 60 if DEEP else 4)]
    roots = max(heads, key=lambda meta: meta.transaction).roots
    for page in roots:  # found before LMDB reads it
        file.write_bytes(data[: page * 4096] + bytes(4096) + data[(page + 1) * 4096 :])
        with pytest.raises(MlrefError, match=f'page {page:,} of its file data.mdb is damaged'):
            LocalLog(tmp_path / 'log')
    for page in pages:
        file.write_bytes(data[: page * 4096] + bytes(4096) + data[(page + 1) * 4096 :])
        done = subprocess.run([sys.executable, '-c', READS, tmp_path / 'log'], capture_output=True)
        assert done.returncode in (0, 3), (page, done)  # 0: a page that was free


@MANY
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=30), st.integers(0, 2**40))
def test_what_comes_out_of_a_block_is_what_went_in(messages, offset):
    where, key = Partition('t/0'), pack_offset(offset)
    block = pack_block(messages[:1], where, key, 5, 0)
    last = GrowingBlock(where, key, block)
    for n, message in enumerate(messages[1:], 2):
        before = bytes(last.stored)
        if not last.add([message], n):
            assert last.stored == before
            messages = messages[: n - 1]
            break
        head = read_head(last.stored, where, key)
        assert (head.count, head.epoch, head.appended_at) == (n, 5, n)
        assert last.end == offset + n
    assert unpack_block(last.stored, where, key) == messages


@MANY
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=9), st.randoms(use_true_random=False))
def test_no_altered_block_is_believed(messages, generator):
    where, key = Partition('t/0'), pack_offset(9)
    block = bytearray(pack_block(messages, where, key, 5, 0))
    for _ in range(generator.randrange(1, 4)):
        block[generator.randrange(len(block))] ^= 1 << generator.randrange(8)
    if bytes(block) == pack_block(messages, where, key, 5, 0):
        return
    with pytest.raises(MlrefError, match='t/0 from offset 9'):
        unpack_block(bytes(block), where, key)


def test_small_appends_of_several_writers_are_the_lists_they_were_given(tmp_path):
    generator = random.Random(1)
    expected = []
    for _ in range(5):
        log = LocalLog(tmp_path / 'log')
        for _ in range(25):
            batch = [generator.randbytes(generator.randrange(300)) for _ in range(3)]
            assert log.append('t', batch) == len(expected)
            expected += batch
        log.close()
    log = LocalLog(tmp_path / 'log', readonly=True)
    assert log.read('t', 0, 9999) == expected
    for start in range(0, len(expected), 37):
        assert log.read('t', start, 5) == expected[start : start + 5]
    log.close()


READER = """
import os, sys
from pathlib import Path
from mlref.log import LocalLog, check_partition
log = LocalLog(Path(sys.argv[1]), readonly=True)
with log.file.read_moment(check_partition('t', 0)):
    print('reads', flush=True)
    sys.stdin.read()
"""


def test_a_dead_reader_does_not_let_the_log_grow(log, tmp_path):
    command = [sys.executable, '-c', READER, tmp_path / 'log', '0']
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    reader.stdout.readline()
    log.append('t', MESSAGES)
    assert measure_readers(log.file.env).reading == 1
    os.kill(reader.pid, signal.SIGKILL)
    reader.wait()
    lags = []
    for _ in range(16):
        log.append('t', MESSAGES[:1])
        lags.append(measure_readers(log.file.env).lag)
    assert max(lags) > 10
    assert (measure_readers(log.file.env).reading, measure_readers(log.file.env).lag) == (0, 0)
    assert log.file.sweep.freed == 1


def test_slots_that_are_all_taken_by_the_living_are_a_sentence_of_their_own(tmp_path):
    with lmdb.open(str(tmp_path / 'log'), max_readers=2):
        pass  # the slots are counted by who opens first
    log = LocalLog(tmp_path / 'log')
    log.append('t', MESSAGES[:3])
    held = []
    with pytest.raises(MlrefError, match='expected a free slot to read a log .*close some'):
        for _ in range(600):
            held.append(log.file.env.begin())
            log.read('t', 0, 3)
    held.clear()
    assert log.read('t', 0, 3) == MESSAGES[:3]
    log.close()


def test_one_partition_too_many_blames_the_partitions(tmp_path, monkeypatch):
    monkeypatch.setattr('mlref.log_file.PARTITIONS', 5)
    log = LocalLog(tmp_path / 'log')
    for part in range(5, 20):
        log.read('t', 0, 1, part)  # reading makes none
    for part in range(5):
        log.append('t', [b'x'], part)
    with pytest.raises(MlrefError, match='at most 5 partitions .* use fewer'):
        log.append('t', [b'x'], 5)
    assert log.append('t', [b'y'], 3) == 1
    log.close()


@pytest.mark.parametrize('how', ['deleted', 'moved', 'replaced'])
def test_nothing_is_accepted_into_a_log_that_is_not_there_any_more(how, log, tmp_path):
    folder = tmp_path / 'log'
    if how == 'deleted':
        shutil.rmtree(folder)
    else:
        folder.rename(tmp_path / 'moved')
    if how == 'replaced':
        shutil.copytree(tmp_path / 'moved', folder)
    for act in (
        lambda: log.append('t', [b'lost']),
        lambda: log.read('t', 0, 9),
        lambda: log.end('t'),
    ):
        with pytest.raises(MlrefError, match='expected the log .* while it was in use'):
            act()
    if how == 'moved':
        (tmp_path / 'moved').rename(folder)
        assert log.append('t', [b'kept']) == 3000


@pytest.mark.parametrize('how', ['deleted', 'moved', 'replaced'])
def test_nothing_is_accepted_into_a_lake_that_is_not_there_any_more(how, tmp_path):
    folder = tmp_path / 'lake'
    lake = Lake(folder / 'l.duckdb', FLIGHT_SCHEMA)
    if how == 'deleted':
        shutil.rmtree(folder)
    else:
        folder.rename(tmp_path / 'moved')
    if how == 'replaced':
        folder.mkdir()
        Lake(folder / 'l2.duckdb', FLIGHT_SCHEMA).close()
        (folder / 'l2.duckdb').rename(folder / 'l.duckdb')
    for act in (partial(insert_rows, lake, {}), partial(lake.sql, 'select 1')):
        with pytest.raises(MlrefError, match='expected the lake .* while it was in use'):
            act()
    lake.con.close()


def test_a_snapshot_whose_folder_is_gone_says_so(log, tmp_path):
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    ingest(lake, log, 't', ())
    publish_snapshot(lake, tmp_path / 's')
    snapshot = open_snapshot(tmp_path / 's')
    shutil.rmtree(tmp_path / 's')
    with pytest.raises(MlrefError, match='expected the files of the snapshot'):
        snapshot.sql('select * from events')
    publish_snapshot(lake, tmp_path / 's')  # the next one is whole again
    assert open_snapshot(tmp_path / 's').sql('select count(*) as n from commits')['n'][0] == 1
    lake.close()


@MANY
@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 50)), min_size=1, max_size=20),
    st.integers(1, 100),
    st.integers(1, 500),
)
def test_a_policy_keeps_at_least_what_it_says(blocks, seconds, size):
    times = sorted(1000 * at for at, _ in blocks)
    stored = [StoredBlock(10 * i, at, blocks[i][1]) for i, at in enumerate(times)]
    first = retained_from(stored, Retention(seconds=seconds), now=100)
    assert all(b.offset >= first for b in stored if b.appended_at >= 1000 * (100 - seconds))
    first = retained_from(stored, Retention(size=size), now=100)
    kept = [b.size for b in stored if b.offset >= first]
    assert len(kept) == 1 or sum(kept) <= size
    assert retained_from(stored, Retention(), now=100) == 0


YEAR = 365 * 86_400_000  # milliseconds


@pytest.mark.parametrize(
    'wrong', [lambda at: at + 10 * YEAR, lambda at: at - 3 * YEAR, lambda at: 1]
)
@pytest.mark.parametrize('first', range(10))
@pytest.mark.parametrize('n', [1, 2])
def test_a_time_of_a_wrong_clock_takes_nothing_with_it_and_keeps_nothing(wrong, first, n):
    "What is older goes, but for those that stand before the first block whose time is known"
    times = [40 * YEAR + 3_600_000 * i for i in range(10)]
    right = [StoredBlock(10 * i, at, 7) for i, at in enumerate(times)]
    odd = [
        StoredBlock(10 * i, wrong(at) if first <= i < first + n else at, 7)
        for i, at in enumerate(times)
    ]
    policy = Retention(seconds=3.5 * 3600)
    now = times[-1] / 1000
    usual = retained_from(right, policy, now)
    assert usual == 60
    assert usual - 10 * n <= retained_from(odd, policy, now) <= usual


def test_a_consumer_behind_the_floor_is_told(tmp_path):
    now = [0.0]
    log = LocalLog(tmp_path / 'log', clock=lambda: now[0])
    for i in range(30):
        now[0] = 60.0 * i
        log.append('t', MESSAGES[100 * i : 100 * (i + 1)])
    behind, at_start = position_at(log, 't', 500), position_at(log, 't', 2000)
    assert trim_log(log, 't', Retention(seconds=600), unread=1200) <= 1200
    start = trim_log(log, 't', Retention(seconds=600))
    assert 1200 < start <= 1900
    assert (log.start('t'), log.end('t')) == (start, 3000)
    for act in (
        lambda: check_position(log, 't', behind),
        lambda: Consumer(log, 't', {0: behind}),
        lambda: log.read('t', 500, 10),
        lambda: log.read('t', 0, 1),
    ):
        with pytest.raises(MlrefError, match='(removed by retention|it holds 1,)'):
            act()
    with pytest.raises(MlrefError, match='removed by retention'):
        log.epoch_of('t', start - 1)
    with pytest.raises(MlrefError, match='up to its end at 3,000'):
        log.epoch_of('t', 3000)
    check_position(log, 't', at_start)
    assert log.read('t', 2000, 5000) == MESSAGES[2000:]
    assert verify_log(log, 't') == {0: 3000 - start}
    log.close()
    log = LocalLog(tmp_path / 'log')
    assert (log.start('t'), log.append('t', [b'on'])) == (start, 3000)
    log.close()


def ingest_once(lake, log):
    return ingest(lake, log, 't', (), batch=70)


def follow_once(lake, log):
    consumer = Consumer(log, 't', {0: start_position(lake, log, 't')})
    rounds = []
    wait = partial(rounds.append, 1)
    return follow_log(lake, consumer, (), lambda: bool(rounds), wait, batch=70)


@pytest.mark.parametrize('read', [ingest_once, follow_once])
def test_a_new_lake_begins_with_what_is_kept_and_counts_what_is_not(read, log, tmp_path):
    oldest = trim_log(log, 't', Retention(size=1))
    assert 100 < oldest < 3000
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    counts = read(lake, log)
    assert (counts.skipped, counts.messages) == (oldest, 3000 - oldest)
    assert lake.sql('select min(off) as first from dead_letters')['first'][0] == oldest
    log.append('t', MESSAGES[:10])
    assert read(lake, log) == IngestCounts(messages=10, dead=10)
    said = lake.sql("select action, broken, says from quality where name = 'skipped messages'")
    assert said.rows() == [
        ('warn', oldest, f'the lake begins at offset {oldest:,}; no message before it was read')
    ]
    lake.close()


def test_what_is_removed_before_the_first_commit_is_counted_with_it(log, tmp_path):
    "A process that is killed before its first commit has said nothing; the next one says it all"
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    assert start_position(lake, log, 't').offset == 0
    oldest = trim_log(log, 't', Retention(size=1))
    with pytest.raises(MlrefError, match='from its first message on, .*begins at .*retention'):
        check_position(log, 't', LogPosition())
    assert start_position(lake, log, 't') == LogPosition(oldest, log.file.id)
    assert ingest(lake, log, 't', ()).skipped == oldest
    trim_log(log, 't', Retention(size=1))
    log.append('t', MESSAGES)
    trim_log(log, 't', Retention(size=1))
    assert log.start('t') > 3000
    with pytest.raises(MlrefError, match='up to which it was read'):  # it has a place of its own
        ingest(lake, log, 't', ())
    lake.close()


@pytest.mark.parametrize('first', [0, 5])
def test_a_batch_that_leaves_out_kept_messages_is_refused(first, log, tmp_path):
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    batch = check_messages(log.read('t', 6, 4), FLIGHT_SCHEMA, ())
    with pytest.raises(MlrefError, match=f'from offset {first} .*, got them from 6'):
        commit_batch(lake, batch, 't', position_at(log, 't', 10), first=first)
    lake.close()


@pytest.mark.parametrize(
    'topic', ['', 'a/b', 'a b', '.', '..', '!log', 'ü', 'x' * 250, 'a\n', None, b't', 7, False]
)
def test_a_topic_that_kafka_would_refuse_is_refused_everywhere(topic, log):
    for act in (log.append, log.read, log.start, log.end, log.epoch_of):
        arguments = {log.append: ([b'x'],), log.read: (0, 1), log.epoch_of: (0,)}.get(act, ())
        with pytest.raises(MlrefError, match='expected a topic of 1 to 249 letters'):
            act(topic, *arguments)


@pytest.mark.parametrize(
    'messages', [None, b'', b'text', '', 'text', 0, False, (b'x' for _ in 'a'), {b'x'}, {b'x': 1}]
)
def test_a_batch_that_is_no_list_is_refused(messages, log):
    with pytest.raises(MlrefError, match='expected a list of messages'):
        log.append('t', messages)
    assert log.end('t') == 3000


@pytest.mark.parametrize('message', [None, '', 'text', 0, [], bytearray(b'x'), memoryview(b'x')])
def test_a_message_that_is_not_bytes_is_refused_with_its_batch(message, log):
    with pytest.raises(MlrefError, match='expected messages of bytes'):
        log.append('t', [b'fine', message])
    assert log.end('t') == 3000


def test_partitions_are_listed_by_the_whole_name_of_their_topic(log):
    for topic, part in (('t', 12), ('t', 3), ('tt', 1), ('t.t', 2), ('T', 4)):
        log.append(topic, [b'x'], part)
    found = {topic: list_partitions(log, topic) for topic in ('t', 'tt', 't.', '', '!log')}
    assert found == {'t': [0, 3, 12], 'tt': [1], 't.': [], '': [], '!log': []}


def test_empty_messages_are_messages_and_an_empty_batch_is_none(tmp_path):
    log = LocalLog(tmp_path / 'log')
    assert [log.append('t', batch) for batch in ([], [b''], [b'', b''], [], (b'x',))] == [
        0,
        0,
        1,
        3,
        3,
    ]
    assert log.read('t', 0, 9) == [b'', b'', b'', b'x']
    consumer = Consumer(log, 't', {0: LogPosition()})
    assert consumer.poll(1).messages == [b'']
    log.close()


def test_a_number_that_is_too_large_is_refused_where_it_comes_in(log):
    for act in (
        lambda: log.read('t', 2**63, 1),
        lambda: log.read('t', 2**64, 1),
        lambda: log.epoch_of('t', 2**64),
        lambda: log.append('t', [b'x'], 2**31),
        lambda: log.append('t', [b'x'], 10**600),
        lambda: log.end('t', 10**600),
        lambda: partition_of('a', 2**31),
    ):
        with pytest.raises(MlrefError, match='as a whole number from . to'):
            act()
    assert log.append('t', [b'x'], 2**31 - 1) == 0
    assert len(log.read('t', 0, 2**70)) == 3000


@pytest.mark.parametrize('kind', [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy_are_numbers(kind, log):
    assert log.read('t', kind(3), kind(2), kind(0)) == MESSAGES[3:5]
    assert log.epoch_of('t', kind(3)) == log.writer.epoch
    assert log.append('n', MESSAGES[:2], kind(1)) == 0
    assert list_partitions(log, 'n') == [1]
    assert trim_log(log, 't', Retention(size=1), unread=kind(0)) == 0


@pytest.mark.parametrize('unread', [-1, 1.5, '9', True])
def test_trimming_up_to_a_reader_that_is_nowhere_is_refused(unread, log):
    with pytest.raises(MlrefError, match='the first offset that is unread as a whole number'):
        trim_log(log, 't', Retention(size=1), unread=unread)
    assert log.start('t') == 0


@pytest.mark.parametrize('wrong', [-1, 1.5, '0', None, True, b'0', float('nan')])
def test_a_number_that_is_none_is_refused(wrong, log):
    for act in (
        lambda: log.read('t', wrong, 1),
        lambda: log.read('t', 0, wrong),
        lambda: log.read('t', 0, 1, wrong),
        lambda: log.append('t', [b'x'], wrong),
        lambda: log.epoch_of('t', wrong),
    ):
        with pytest.raises(MlrefError, match='expected the .* as a whole number from'):
            act()
    with pytest.raises(MlrefError, match='the limit as a whole number from 1'):
        log.read('t', 0, 0)


def test_a_stream_cannot_be_split_into_no_partitions(log):
    nothing = pl.DataFrame(schema=dict(FLIGHT_SCHEMA.columns))
    for parts in (0, -1, 1.5, '2', True, None):
        with pytest.raises(MlrefError, match='the number of partitions as a whole number from 1'):
            send_events(log, 't', nothing, FLIGHT_SCHEMA, parts)


def test_a_prediction_says_when_it_was_answered_and_goes_by_policy(tmp_path):
    now = [1_800_000_000.0]
    log = LocalLog(tmp_path / 'log', clock=lambda: now[0])
    about = {'version': 'v', 'trained_until': 1, 'request_id': 'r', 'client': ''}

    def write(i):
        scored = {'cutoff': i, 'scored_at': i, 'p': 0.5, 'answered_at': now[0]}
        names = map(str, range(100))
        rows = [PredictionRow(entity_id=name, **scored, **about) for name in names]
        log.append('predictions', [encode_row(row) for row in rows])

    for i in range(100):
        now[0] += 3600
        write(i)
    rows = [json.loads(message) for message in log.read('predictions', 0, 10**6)]
    assert [row['answered_at'] for row in rows[::100]] == [
        1_800_000_000.0 + 3600 * (i + 1) for i in range(100)
    ]
    start = trim_log(log, 'predictions', Retention(seconds=24 * 3600))
    kept = [json.loads(message) for message in log.read('predictions', start, 10**6)]
    assert 0 < start < 10_000 - 2400
    assert sum(row['answered_at'] >= now[0] - 24 * 3600 for row in kept) == 2500
    shutil.rmtree(tmp_path / 'log')
    with pytest.raises(MlrefError, match='while it was in use'):
        write(0)


APPENDS = """
import sys
from pathlib import Path
from mlref.journaled_log import append_together
from mlref.log import LocalLog
log = LocalLog(Path(sys.argv[1]))
for line in sys.stdin:
    print(log.append('t', [line.strip().encode()]), flush=True)
"""


def test_writers_in_turns_keep_what_the_other_added_last(tmp_path):
    "Each has a last block of its own in memory, and writes none that is out of date"
    command = [sys.executable, '-c', APPENDS, tmp_path / 'log']
    log = LocalLog(tmp_path / 'log')
    sent = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        for i in range(60):
            message = b'%d' % i
            sent.append(message)
            if i % 5 in (2, 3):
                other.stdin.write(message + b'\n')
                other.stdin.flush()
                assert int(other.stdout.readline()) == i
            else:
                assert log.append('t', [message]) == i
            if i % 7 == 0:
                log.append('u', [b'of another topic'])
    assert log.read('t', 0, 100) == sent
    log.close()


def test_what_was_added_to_a_block_and_not_committed_is_forgotten(tmp_path):
    log = LocalLog(tmp_path / 'log', size=2**18)
    log.append('u', MESSAGES[:1])
    log.append('t', MESSAGES[:2])
    with pytest.raises(MlrefError, match='it is full'):
        append_together(log, {'t': [b'grown'], 'u': [bytes(2**20)]})
    assert log.append('t', MESSAGES[2:3]) == 2
    assert (log.read('t', 0, 9), log.read('u', 0, 9)) == (MESSAGES[:3], MESSAGES[:1])
    log.close()


def test_threads_that_append_at_once_overwrite_nothing(tmp_path):
    log = LocalLog(tmp_path / 'log')
    messages = [b'%d' % i for i in range(240)]
    with ThreadPoolExecutor(4) as pool:
        offsets = list(pool.map(lambda message: log.append('t', [message]), messages))
    assert sorted(offsets) == list(range(240))
    stored = log.read('t', 0, 999)
    assert [stored[offset] for offset in offsets] == messages
    log.close()
