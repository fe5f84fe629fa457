"""The log on Kafka, over the client library's own mock cluster: what a page cannot hold"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from confluent_kafka import Producer

from mlref.consumer import send_events
from mlref.core import MlrefError
from mlref.events import encode_events
from mlref.ext.kafka_log import KafkaLog
from mlref.ingest import read_position
from mlref.lake import Lake
from mlref.log_position import check_log
from small import SCHEMA, make_events

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


def test_nothing_is_lost_or_doubled_over_kills(brokers, tmp_path):
    events = make_events()
    messages = encode_events(events, SCHEMA)
    log = KafkaLog(brokers.address, 'kills')
    for part in range(4):
        log.append('events', messages[part::4] + messages[part : part + 8 : 4], part)  # some twice
    command = [sys.executable, '-c', READ, brokers.address, tmp_path / 'lake.duckdb', TESTS]
    command = [str(word) for word in command]
    for kill in range(KILLS):
        reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert reader.stdout.readline() == 'open\n'
        time.sleep(0.05 + 0.037 * (kill % 11))
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        reader.stdout.close()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=120)
    lake = Lake(tmp_path / 'lake.duckdb', SCHEMA)
    found = lake.sql('select event_id from events order by event_id')['event_id'].to_list()
    assert found == sorted(events['event_id'].to_list())
    ends = {part: read_position(lake, 'events', part).offset for part in range(4)}
    assert ends == {part: log.end('events', part) for part in range(4)}
    lake.close()
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
    for settings in (log.settings, log.reader('events', 0).settings):
        object.__setattr__(settings, 'timeout', 1.0)
    with pytest.raises(MlrefError, match='start the brokers or correct their address'):
        log.end('events')
