"""The log on Kafka, over the client library's own mock cluster: what a page cannot hold"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import pytest
from confluent_kafka import KafkaError, Producer

from mlref.consumer import send_events
from mlref.core import DAY, MlrefError
from mlref.dead_letters import Outage
from mlref.events import encode_events
from mlref.ext import kafka_log
from mlref.ext.kafka_log import KafkaLog
from mlref.ext.kafka_metadata import MetadataClient, find_cluster
from mlref.ext.kafka_settings import KafkaSettings
from mlref.ingest import ingest, read_position
from mlref.lake import Lake
from mlref.log_position import check_log
from mlref.results import result_row, write_results
from mlref.workspace import Workspace, deliver_events
from mock_kafka import FETCH, LIST_OFFSETS, METADATA, PRODUCE, PRODUCER_ID, MockCluster
from small import SCHEMA, TASK, make_events
from test_second_task import in_two_files

TESTS = Path(__file__).parent
DEEP = os.environ.get('MLREF_DEEP', '0') == '1'
KILLS = 100 if DEEP else 3


class Brokers:
    "Three brokers that live in this process, over real sockets"

    def __init__(self, count=3, rtt=0):
        options = {'bootstrap.servers': '', 'test.mock.num.brokers': count, 'log_level': 0}
        self.owner = Producer(options | {'test.mock.broker.rtt': rtt})
        found = self.owner.list_topics(timeout=10).brokers.values()
        self.address = 'kafka://' + ','.join(f'{each.host}:{each.port}' for each in found)


@pytest.fixture(scope='session')
def brokers():
    return Brokers()


@pytest.fixture(scope='session')
def slow_brokers():
    return Brokers(1, rtt=50)  # milliseconds


@pytest.mark.parametrize('kind', ['brokers', 'slow_brokers'])
def test_the_check_of_every_log(kind, request):
    log = KafkaLog(request.getfixturevalue(kind).address, kind)
    check_log(log, 'check')
    log.close()


READ = """
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[3])
from small import SCHEMA
from mlref.consumer import assigned_partitions
from mlref.ext.kafka_log import KafkaLog
from mlref.ingest import ingest
from mlref.lake import Lake

lake = Lake(Path(sys.argv[2]), SCHEMA)
log = KafkaLog(sys.argv[1], 'kills')
print('open', flush=True)
for part in range(4):
    print(ingest(lake, log, 'events', (), 20, part).messages, flush=True)
"""


def read_killed(command, seconds):
    "A reader that is killed so long after it has opened its lake"
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == 'open\n'
    time.sleep(seconds)
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    reader.stdout.close()


@dataclass
class Books:
    "What lakes hold of the messages of a topic"

    lost: int = 0  # Events that are not there
    doubled: int = 0  # Rows too many

    def add(self, file, events):
        "Look at a lake that has read all of them"
        found = read_ids(file)
        self.lost += len(set(events['event_id']) - set(found))
        self.doubled += len(found) - len(set(found))


def is_read(file, ends):
    "Whether a lake has read its topic to the end"
    lake = Lake(file, SCHEMA)
    found = {part: read_position(lake, 'events', part).offset for part in ends}
    lake.close()
    return found == ends


def record_kills(kills, books, messages):
    "What became of all of them"
    rows = [
        result_row('kills in the middle of a topic', kills, '', '>= 100', messages),
        result_row('events lost', books.lost, '', '== 0', messages),
        result_row('events doubled', books.doubled, '', '== 0', messages),
    ]
    results = TESTS.parent / 'reports' / 'results'
    write_results(results, 'kafka', 'MLREF_DEEP=1 pytest tests/test_kafka.py', rows)


def test_nothing_is_lost_or_doubled_over_kills(brokers, tmp_path):
    events = make_events()
    messages = encode_events(events, SCHEMA)
    log = KafkaLog(brokers.address, 'kills')
    for part in range(4):
        log.append('events', messages[part::4] + messages[part : part + 8 : 4], part)  # some twice
    ends = {part: log.end('events', part) for part in range(4)}
    books, kills, tries = Books(), 0, 0
    while kills < KILLS:
        lake = tmp_path / f'{tries}.duckdb'
        command = [str(word) for word in (sys.executable, '-c', READ, brokers.address, lake, TESTS)]
        while kills < KILLS:
            read_killed(command, 0.01 + 0.023 * (tries % 11))
            tries += 1
            if is_read(lake, ends):  # it came too late: another lake
                break
            kills += 1
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
        assert is_read(lake, ends)
        books.add(lake, events)
    if DEEP:
        record_kills(kills, books, sum(ends.values()))
    assert (books.lost, books.doubled) == (0, 0)
    log.close()


def test_a_message_keeps_its_mark_for_every_reader(brokers):
    log = KafkaLog(brokers.address, 'marks')
    log.append('events', [b'%d' % i for i in range(30)])
    log.read('events', 0, 30)
    other = KafkaLog(brokers.address, 'marks')
    marks = [log.epoch_of('events', i) for i in range(30)]
    assert marks == [other.epoch_of('events', i) for i in reversed(range(30))][::-1]
    assert len(set(marks)) == 30
    log.close()
    other.close()


def follow(address, lake, *words):
    "A process as a user starts it, with the line of settings from the environment"
    program = Path(sys.executable).parent / 'mlref'
    command = [program, 'ingest', '--lake', lake, '--task', 'small:TASK', *words]
    paths = os.pathsep.join([str(TESTS), os.environ.get('PYTHONPATH', '')])
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, 'MLREF_LOG': address, 'PYTHONPATH': paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_ids(file):
    lake = Lake(file, SCHEMA)
    found = lake.sql('select event_id from events')['event_id'].to_list()
    lake.close()
    return found


def test_two_processes_share_the_partitions(brokers, tmp_path):
    events = make_events()
    address = f'{brokers.address}/shared'
    log = KafkaLog(address)
    half = events.height // 2
    send_events(log, 'events', events[:half], SCHEMA, 4)
    lakes = [tmp_path / f'{i}.duckdb' for i in range(2)]
    for rounds in range(2):  # killed, and started again
        workers = [
            follow(address, lake, '--share', f'{i}/2', '--batch', 40)
            for i, lake in enumerate(lakes)
        ]
        for worker in workers:
            assert 'following events' in worker.stderr.readline()
            assert 'events/' in worker.stderr.readline()  # a batch is committed
            worker.send_signal(signal.SIGKILL)
            worker.communicate(timeout=30)
        if not rounds:
            send_events(log, 'events', events[half:], SCHEMA, 4)
    last = enumerate(lakes)
    workers = [follow(address, lake, '--share', f'{i}/2', '--once') for i, lake in last]
    assert [worker.communicate(timeout=60) and worker.returncode for worker in workers] == [0, 0]
    found = [read_ids(lake) for lake in lakes]
    assert min(len(each) for each in found) > 0
    assert sorted(found[0] + found[1]) == sorted(events['event_id'].to_list())
    other = follow(address, lakes[1], '--share', '0/2', '--once')
    assert 'start as many workers as before' in other.communicate(timeout=60)[1]
    assert other.returncode == 1
    log.close()


def test_dead_letters_keep_the_message_and_its_place(brokers, tmp_path):
    events = make_events()
    good = encode_events(events, SCHEMA)
    changed = encode_events(events[:1].with_columns(price=pl.lit(99, pl.Int64)), SCHEMA)
    address = f'{brokers.address}/dead'
    log = KafkaLog(address)
    log.append('events', [good[0], b'no message', *good[1:10], b''], 1)
    log.append('events', [*good[10:20], b'\xff', *changed], 3)
    for _ in range(2):  # again is harmless
        worker = follow(address, tmp_path / 'lake.duckdb', '--once', '--json')
        said = json.loads(worker.communicate(timeout=60)[0])
    assert said['messages'] == 0 and said['positions'] == {'0': 0, '1': 12, '2': 0, '3': 12}
    lake = Lake(tmp_path / 'lake.duckdb', SCHEMA)
    places = lake.sql('select part, off, raw from dead_letters order by part, off').rows()
    assert places == [(1, 1, b'no message'), (1, 11, b''), (3, 10, b'\xff'), (3, 11, changed[0])]
    why = lake.sql('select reasons from dead_letters where part = 3 order by off')['reasons']
    assert 'another content' in why[1]
    lake.close()
    log.close()


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path):
    worker = follow('kafka://127.0.0.1:1', tmp_path / 'lake.duckdb', '--once')
    said = worker.communicate(timeout=60)[1]
    assert worker.returncode == 1 and 'Traceback' not in said
    assert 'start the brokers or correct their address' in said
    assert not (tmp_path / 'lake.duckdb').exists()


def test_brokers_that_die_are_one_sentence():
    brokers = Brokers(1)
    log = KafkaLog(brokers.address, 'gone')
    log.append('events', [b'kept'])
    del brokers.owner
    object.__setattr__(log.metadata.settings, 'timeout', 1.0)
    with pytest.raises(MlrefError, match='start the brokers or correct their address'):
        log.end('events')


@pytest.fixture(scope='session')
def mock():
    cluster = MockCluster()
    yield cluster
    cluster.close()


SHOP = """
import sys
from pathlib import Path

import numpy as np

from mlref.vectors import compute_vectors
from mlref.workspace import Workspace, deliver_events
from shop import *

until = parse_time('1997-03-01')
some = events.filter(pl.col('known_time') < until + 30 * DAY)
spaces = []
for address in ('', sys.argv[1]):
    run = Path('kafka' if address else 'files') / 'shop-run'
    run.mkdir(parents=True)
    if address:  # as the guide says
        (run / 'settings.ini').write_text(f'[DEFAULT]\\nlog = {address}\\n')
    space = Workspace(run, SHOP)
    for month in (parse_time('1997-02-01'), until):
        deliver_events(space, some, month)
    spaces.append(space)
files, other = spaces
assert type(other.log).__name__ == 'KafkaLog' and not (run / 'log').exists()
assert other.log.identity('events').endswith('/shop-run.events of 4 partitions')
assert files.log.read('events', 0, 10**6) == other.log.read('events', 0, 10**6) != []
columns = 'event_id, known_time, off'
rows = [space.lake.sql(f'select {columns} from events order by off') for space in spaces]
assert rows[0].equals(rows[1])
asked = some.filter(pl.col('known_time') >= until)[:300].with_columns(cutoff='known_time')
X = [compute_vectors(space.store, asked, SHOP.features, None).view(np.int32) for space in spaces]
assert (X[0] == X[1]).all() and X[0].size > 1000
print('equal')
"""


def test_the_log_of_the_shop_by_one_line_of_settings(mock, tmp_path):
    in_two_files(tmp_path)
    command = [sys.executable, '-c', SHOP, mock.address]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.stdout.endswith('equal\n'), ran.stderr[-3000:]


def open_run(folder, address):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'settings.ini').write_text(f'[DEFAULT]\nlog = {address}\n')
    return Workspace(folder, TASK)


def test_a_run_goes_on_where_it_was(mock, tmp_path):
    events = make_events()
    halves = [(2 * DAY, False), (3 * DAY, True), (3 * DAY, False)]
    for until, more in halves:  # each time as a new process would open it
        run = open_run(tmp_path / 'goes-on', mock.address)
        counts = deliver_events(run, events, until)
        known = events['known_time'].search_sorted(until, 'left')
        assert run.log.end('events') == known and (counts.messages > 0) in (more, until == 2 * DAY)
        assert run.lake.sql('select count(distinct event_id) from events').row(0) == (known,)
        run.close()
    assert not (tmp_path / 'goes-on' / 'log').exists()


@pytest.mark.parametrize('who', ['another run', 'a producer', 'a wiped broker'])
def test_a_run_takes_in_nothing_of_others(who, mock, tmp_path):
    events = make_events()
    address = f'{mock.address}/{who.replace(" ", "-")}'
    run = open_run(tmp_path / 'run', address)
    if who == 'a wiped broker':
        deliver_events(run, events, 2 * DAY)
        run.close()
        mock.tell('topic_delete', b'a-wiped-broker.events')
        run = open_run(tmp_path / 'run', address)
    elif who == 'another run':
        other = open_run(tmp_path / 'other', address)
        deliver_events(other, events[5:], 2 * DAY)
        other.close()
    else:
        run.log.append('events', encode_events(events[:5], SCHEMA), 1)
    held = [run.log.end('events', part) for part in range(4)]
    taken = run.lake.sql('select count(*) from commits').row(0)
    told = 'up to which it was read' if who == 'a wiped broker' else 'events of this run alone'
    with pytest.raises(MlrefError, match=told):
        deliver_events(run, events, 2 * DAY)
    assert [run.log.end('events', part) for part in range(4)] == held
    assert run.lake.sql('select count(*) from commits').row(0) == taken
    run.close()


def test_a_run_whose_log_does_not_answer_holds_nothing(tmp_path):
    with pytest.raises(MlrefError, match='start the brokers or correct their address'):
        open_run(tmp_path / 'run', 'kafka://127.0.0.1:1')
    (tmp_path / 'run' / 'settings.ini').unlink()
    run = Workspace(tmp_path / 'run', TASK)  # its lake is free
    run.close()


def open_topic(mock, name, partitions=1):
    "A log with one topic, whose client does not wait for long"
    mock.create(f'{name}.events', partitions)
    log = KafkaLog(f'{mock.address}/{name}')
    log.metadata.settings = replace(log.metadata.settings, timeout=5, delivery=20)
    return log


REFUSED = {
    'large': (KafkaError.MSG_SIZE_TOO_LARGE, 'send smaller ones, or raise max.message.bytes'),
    'denied': (KafkaError.TOPIC_AUTHORIZATION_FAILED, 'the password or its rights'),
}


@pytest.mark.parametrize('known', [True, False])
@pytest.mark.parametrize('why', REFUSED)
def test_what_a_broker_refuses_is_one_sentence_and_leaves_no_hole(why, known, mock, monkeypatch):
    code, told = REFUSED[why]
    log = open_topic(mock, f'refused-{why}-{known}')
    many = [b'%d' % i for i in range(25_000)]  # several requests to the broker
    missed = []
    if known:  # a broker knows then that what comes behind is not what it waits for
        assert log.append('events', [b'before']) == 0
        missed = [KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER] * 4
    mock.fail(PRODUCE, code, *missed)
    mock.delay(30)  # milliseconds: the others are handed over before it answers the first
    hand_over = kafka_log._produce

    def hand_over_slowly(producer, name, message, partition, told):
        if message in many[1:3]:
            time.sleep(0.01)  # what is there is sent meanwhile
        return hand_over(producer, name, message, partition, told)

    monkeypatch.setattr(kafka_log, '_produce', hand_over_slowly)
    with pytest.raises(Outage, match=told):
        log.append('events', many)
    monkeypatch.undo()
    mock.delay(0)
    mock.forgive(PRODUCE)
    kept = log.read('events', 0, 50_000)[known:]
    assert kept == many[: len(kept)], 'a message is missing before one that was kept'
    log.append('events', many[len(kept) :])  # the sender goes on behind it
    assert log.read('events', 0, 50_000)[known:] == many
    log.close()


PASSING = (
    KafkaError.NOT_ENOUGH_REPLICAS,
    KafkaError.NOT_LEADER_FOR_PARTITION,
    KafkaError.REQUEST_TIMED_OUT,
)


def test_what_passes_is_waited_for(mock):
    log = open_topic(mock, 'passing')
    sent = []
    for code in PASSING:
        mock.fail(PRODUCE, code, code)
        some = [b'%d' % (len(sent) + i) for i in range(50)]
        assert log.append('events', some) == len(sent)
        sent += some
        mock.fail(FETCH, KafkaError.NOT_LEADER_FOR_PARTITION)
        mock.fail(LIST_OFFSETS, KafkaError.NOT_LEADER_FOR_PARTITION)
        assert log.read('events', 0, 1000) == sent
    log.close()


def test_nothing_is_lost_or_out_of_order_while_brokers_go_and_come():
    # the mock does not know again what an idempotent producer sends twice, as a broker does
    cluster = MockCluster()
    log = open_topic(cluster, 'comes')
    sent = []
    twice = threading.Event()

    def send():
        while not twice.is_set():
            some = [b'%d' % (len(sent) + i) for i in range(20)]
            log.append('events', some)
            sent.extend(some)

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(3):
        seen = len(sent)
        while len(sent) < seen + 100:  # it sends, and then its broker is away
            time.sleep(0.005)
        cluster.stop()
        time.sleep(0.2)
        cluster.delay(30)
        cluster.start()
    seen = len(sent)
    while len(sent) < seen + 20:
        time.sleep(0.005)
    twice.set()
    sender.join()
    assert list(dict.fromkeys(log.read('events', 0, 10**6))) == sent
    log.close()
    cluster.close()


def test_ingestion_meets_every_trouble_and_counts_each_event_once(mock, tmp_path):
    events = make_events()
    log = open_topic(mock, 'troubled')
    log.append('events', encode_events(events, SCHEMA))
    lake = Lake(tmp_path / 'lake.duckdb', SCHEMA)
    troubles = 0
    codes = (KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.UNKNOWN_TOPIC_OR_PART)
    for code in codes * 3:
        mock.fail(LIST_OFFSETS, code)
        with pytest.raises(Outage):
            ingest(lake, log, 'events', (), 40)
        troubles += 1
    mock.fail(LIST_OFFSETS, KafkaError.NOT_LEADER_FOR_PARTITION)
    mock.fail(FETCH, *[KafkaError.NOT_LEADER_FOR_PARTITION] * 2)
    counts = ingest(lake, log, 'events', (), 40)
    found = lake.sql('select count(*), count(distinct event_id) from events').row(0)
    assert (troubles, counts.messages, found) == (6, len(events), (len(events),) * 2)
    lake.close()
    log.close()


def test_a_topic_that_is_missing_is_one_sentence(mock):
    mock.tell('topic_set_error', b'missing.events', KafkaError.UNKNOWN_TOPIC_OR_PART)
    log = KafkaLog(f'{mock.address}/missing')
    for ask in (log.end, log.partitions, lambda topic: log.append(topic, [b'x'])):
        with pytest.raises(Outage, match='expected the topic of missing.events.*create it'):
            ask('events')
    log.close()


def test_other_partitions_than_before_are_one_sentence(mock):
    log = open_topic(mock, 'counted', 2)
    assert log.partitions('events') == [0, 1]
    mock.tell('topic_delete', b'counted.events')
    mock.create('counted.events', 8)
    with pytest.raises(MlrefError, match='expected 2 partitions of counted.events, got 8'):
        log.partitions('events')
    log.close()


@pytest.mark.parametrize('request_', [PRODUCER_ID, LIST_OFFSETS, METADATA])
def test_a_kafka_that_is_too_old_is_one_sentence(request_):
    cluster = MockCluster()
    cluster.create('old.events', 1)
    cluster.tell('set_apiversion', request_, -1, -1)
    with pytest.raises(Outage, match='expected Kafka 2.1 or later'):
        log = KafkaLog(f'{cluster.address}/old')
        log.append('events', [b'x'])
        log.end('events')
    cluster.close()


def test_a_broker_without_encryption_is_told_and_the_password_is_not(mock):
    settings = KafkaSettings(mock.address.removeprefix('kafka://'), 'me', 'open-sesame', timeout=2)
    with pytest.raises(Outage, match='to answer with encryption') as told:
        find_cluster(MetadataClient(settings))
    assert 'sesame' not in str(told.value)
