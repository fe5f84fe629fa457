"""Kafka in trouble, for who follows it from a terminal: one sentence, and each event counts once"""

import re
import time
from dataclasses import replace

import pytest
from confluent_kafka import Producer

from mlref.dead_letters import Outage
from mlref.events import encode_events
from mlref.ext.kafka_log import KafkaLog, open_producer
from mlref.ingest import ingest
from mlref.lake import Lake
from mock_kafka import MockCluster
from small import SCHEMA, make_events
from test_kafka import follow, read_ids

NOW = 1_700_000_000_000  # milliseconds
DAY = 86_400_000
EVENTS = make_events()[:80]
MESSAGES = encode_events(EVENTS, SCHEMA)


@pytest.fixture(scope='module')
def mock():
    cluster = MockCluster(3)
    yield cluster
    cluster.close()


def produce(mock, topic, messages, stamps, partition=0):
    "Messages as a sender with a clock of its own writes them"
    sender = Producer({'bootstrap.servers': mock.address.removeprefix('kafka://'), 'log_level': 0})
    for message, stamp in zip(messages, stamps, strict=True):
        sender.produce(topic, message, partition=partition, timestamp=stamp)
    assert sender.flush(20) == 0


def hear(worker):
    "The status of a command, and what it said last; nothing comes after a refusal"
    _, said = worker.communicate(timeout=120)
    *before, last = said.strip().splitlines()
    assert not any(line.startswith(('mlref:', 'Traceback')) for line in before), said
    return worker.returncode, last


def open_hasty(mock, space):
    "A log whose client does not wait for long"
    log = KafkaLog(f'{mock.address}/{space}')
    log.metadata.settings = replace(log.metadata.settings, timeout=2, delivery=3)
    log.producer = open_producer(log.metadata)
    return log


CHANGED = {  # partitions, which messages in which order, what is said
    'grown': (8, slice(60), 'of 2 partitions, .* got the log .* of 8 partitions; restore'),
    'wiped': (2, slice(0), 'up to which it was read, it holds 0 to 0; restore'),
    'replaced': (2, slice(59, None, -1), 'a copy of the log that went on differently; restore'),
}


@pytest.mark.parametrize('how', CHANGED)
def test_another_topic_of_the_same_name_is_refused_after_a_restart(how, mock, tmp_path):
    parts, which, told = CHANGED[how]
    topic, address, lake = f'{how}.events', f'{mock.address}/{how}', tmp_path / 'lake.duckdb'
    stamps = range(NOW, NOW + 60)
    mock.create(topic, 2)
    produce(mock, topic, MESSAGES[:60], stamps)
    assert hear(follow(address, lake, '--once'))[0] == 0
    mock.tell('topic_delete', topic.encode())
    mock.create(topic, parts)
    produce(mock, topic, MESSAGES[which], stamps[which])
    produce(mock, topic, MESSAGES[60:], range(NOW, NOW + 20), 1)
    status, said = hear(follow(address, lake, '--once'))
    assert status == 1 and re.search(told, said), said
    assert len(read_ids(lake)) == 60  # nothing of the other one was taken in


def test_brokers_that_go_while_it_is_followed_end_it_in_one_sentence(tmp_path):
    cluster = MockCluster()
    cluster.create('gone.events', 1)
    produce(cluster, 'gone.events', MESSAGES[:40], range(NOW, NOW + 40))
    address, lake = f'{cluster.address}/gone', tmp_path / 'lake.duckdb'
    worker = follow(address, lake)
    lines = [worker.stderr.readline() for _ in range(2)]
    assert 'events/0: 40 of 40' in lines[1]
    cluster.stop()
    status, said = hear(worker)
    assert status == 1 and said.endswith('start the brokers or correct their address')
    cluster.start()
    produce(cluster, 'gone.events', MESSAGES[40:], range(NOW, NOW + 40))
    assert hear(follow(address, lake, '--once'))[0] == 0
    assert sorted(read_ids(lake)) == sorted(EVENTS['event_id'].to_list())
    cluster.close()


def test_half_a_cluster_loses_nothing_and_the_other_half_goes_on(mock):
    mock.create('half.events', 2)
    for part, broker in ((0, 1), (1, 2)):
        mock.tell('partition_set_leader', b'half.events', part, broker)
    log = open_hasty(mock, 'half')
    for part in range(2):
        assert log.append('events', [b'one', b'two'], part) == 0
    mock.tell('broker_set_down', 1)
    assert log.append('events', [b'three'], 1) == 2  # its leader is another
    for ask in (lambda: log.append('events', [b'lost'], 0), lambda: log.end('events', 0)):
        with pytest.raises(Outage, match='to answer for half.events/0, got: .*start the brokers'):
            ask()
    mock.tell('partition_set_leader', b'half.events', 0, 3)  # as a cluster elects another
    assert log.append('events', [b'three'], 0) == 2
    for part in range(2):
        assert log.read('events', 0, 100, part) == [b'one', b'two', b'three']
    mock.tell('broker_set_up', 1)
    log.close()


def test_what_kafka_removed_unread_is_told_and_a_new_lake_begins_with_what_is_kept(mock, tmp_path):
    mock.create('short.events', 1)
    address, lake = f'{mock.address}/short', tmp_path / 'lake.duckdb'
    produce(mock, 'short.events', MESSAGES[:40], range(NOW, NOW + 40))
    assert hear(follow(address, lake, '--once'))[0] == 0
    large = [b'%d' % i + bytes(200_000) for i in range(60)]  # the mock keeps 5 MB of a partition
    produce(mock, 'short.events', large, range(NOW, NOW + 60))
    produce(mock, 'short.events', MESSAGES[40:], range(NOW, NOW + 40))
    log = KafkaLog(address)
    oldest = log.start('events')
    assert 40 < oldest < 100
    for _ in range(2):  # it does not go on behind them by itself
        status, said = hear(follow(address, lake, '--once'))
        assert status == 1 and 'expected events/0 to hold offset 40, up to which it was' in said
    new = follow(address, tmp_path / 'new.duckdb', '--once')
    said = new.communicate(timeout=120)[1]
    assert new.returncode == 0 and f'begins at {oldest}, nothing before it is kept' in said
    assert sorted(read_ids(tmp_path / 'new.duckdb')) == sorted(EVENTS['event_id'][40:].to_list())
    again = follow(address, tmp_path / 'new.duckdb', '--once')
    said = again.communicate(timeout=120)[1]
    assert again.returncode == 0 and 'begins at' not in said
    own = Lake(tmp_path / 'own.duckdb', SCHEMA)
    assert ingest(own, log, 'events', ()).skipped == oldest
    own.close()
    log.close()


CLOCKS = {
    'a day late': [NOW - DAY + i for i in range(80)],
    'a day early': [NOW + DAY + i for i in range(80)],
    'going back': [NOW - DAY * i for i in range(80)],
    'of two hosts': [NOW + (i % 2) * DAY for i in range(80)],
    'at one moment': [NOW] * 80,
}


@pytest.mark.parametrize('clock', CLOCKS)
def test_clocks_of_senders_that_differ_change_nothing(clock, mock, tmp_path):
    space = clock.replace(' ', '-')
    mock.create(f'{space}.events', 1)
    lake = Lake(tmp_path / 'lake.duckdb', SCHEMA)
    for half in (slice(40), slice(40, None)):
        produce(mock, f'{space}.events', MESSAGES[half], CLOCKS[clock][half])
        log = KafkaLog(f'{mock.address}/{space}')  # another process, which knows no mark
        assert ingest(lake, log, 'events', (), 7).messages == 40
        marks = [log.epoch_of('events', at) for at in (0, 1, 39)]
        assert len({*marks}) == 3
        log.close()
    found = lake.sql('select event_id from events order by off')['event_id'].to_list()
    assert found == EVENTS['event_id'].to_list()
    lake.close()


def test_a_password_is_used_as_it_was_meant_and_not_told(mock, tmp_path):
    host = mock.address.removeprefix('kafka://')
    begun = time.monotonic()
    status, said = hear(follow(f'kafka://me:50%25%2Fsesame@{host}', tmp_path / 'lake.duckdb'))
    assert status == 1 and 'sesame' not in said and time.monotonic() - begun < 60
    assert 'to answer with encryption' in said and 'give the port that has it' in said, said
