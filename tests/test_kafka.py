"""The log on Kafka, over the client library's own mock cluster: what a page cannot hold"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from confluent_kafka import Producer

from mlref.consumer import assigned_partitions
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


def test_workers_share_partitions():
    owners = [assigned_partitions(range(7), i, 3) for i in range(3)]
    assert sorted(part for own in owners for part in own) == list(range(7))


def test_brokers_that_die_are_one_sentence():
    brokers = Brokers(1)
    log = KafkaLog(brokers.address, 'gone')
    log.append('events', [b'kept'])
    del brokers.owner
    for settings in (log.settings, log.reader('events', 0).settings):
        object.__setattr__(settings, 'timeout', 1.0)
    with pytest.raises(MlrefError, match='start the brokers or correct their address'):
        log.end('events')
