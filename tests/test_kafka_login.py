"""Kafka that asks who it is: what is said of a wrong password, at the start and in flight

The broker is a stand-in (mock_kafka_login.py), since the mock cluster lets everybody in; TLS, the
protocol and the client are the real ones.
"""

import re
import time

import pytest

from mlref.dead_letters import Outage
from mlref.events import encode_events
from mlref.ext.kafka_log import KafkaLog
from mlref.log_position import check_log
from mock_kafka import MockCluster
from mock_kafka_login import Front, write_certificate
from small import SCHEMA, make_events
from test_kafka import follow, read_ids
from test_kafka_troubles import hear

SOON = 60  # seconds; a refusal takes one
EVENTS = make_events()[:80]
MESSAGES = encode_events(EVENTS, SCHEMA)


@pytest.fixture(scope='module')
def certificate(tmp_path_factory):
    return write_certificate(tmp_path_factory.mktemp('certificate'))


@pytest.fixture
def front(certificate, monkeypatch):
    "A broker that asks for a password, with a certificate that is trusted"
    monkeypatch.setenv('SSL_CERT_FILE', str(certificate))
    cluster = MockCluster()
    found = Front(cluster.address.removeprefix('kafka://'), certificate)
    yield found
    found.close()
    cluster.close()


def address_of(front, login='me:open-sesame@', port=''):
    return f'kafka://{login}{port or front.hosts}/login'


def test_who_is_let_in_has_a_log_like_every_other(front):
    log = KafkaLog(address_of(front))
    check_log(log, 'check')
    log.close()


def change_password(front, monkeypatch):
    front.password = 'another'


def hang_up(front, monkeypatch):
    front.hangs_up = True


def offer_others(front, monkeypatch):
    front.mechanisms = [b'PLAIN', b'SCRAM-SHA-256']


def trust_nobody(front, monkeypatch):
    monkeypatch.delenv('SSL_CERT_FILE')


REFUSALS = {  # what is wrong, what is expected, and what to do
    change_password: ('to let this client in to .* credentials', 'the user, the password or its'),
    hang_up: ('to let this client in to .* SaslAuth', 'the user, the password or its rights'),
    offer_others: (
        'to let clients in by SCRAM-SHA-512.*: PLAIN,SCRAM-SHA-256',
        'add it to sasl.enabled.mech',
    ),
    trust_nobody: ('to show a certificate that is trusted', 'name its file in SSL_CERT_FILE'),
}


@pytest.mark.parametrize('change', REFUSALS)
def test_who_is_not_let_in_reads_one_sentence_and_soon(change, front, monkeypatch, tmp_path):
    change(front, monkeypatch)
    expected, advice = REFUSALS[change]
    begun = time.monotonic()
    status, said = hear(follow(address_of(front), tmp_path / 'lake.duckdb'))
    assert status == 1 and re.search(f'expected Kafka at {front.hosts} {expected}', said), said
    assert advice in said and 'sesame' not in said and time.monotonic() - begun < SOON
    assert not (tmp_path / 'lake.duckdb').exists()


def test_the_wrong_port_is_told_both_ways(front, tmp_path):
    ports = {
        address_of(front, login=''): 'to answer without encryption',
        address_of(front, port=front.broker): 'to answer with encryption',
    }
    for address, expected in ports.items():
        status, said = hear(follow(address, tmp_path / 'lake.duckdb'))
        assert status == 1 and expected in said and 'sesame' not in said, said


def test_a_password_that_changes_in_flight_loses_nothing_that_was_accepted(front):
    log = KafkaLog(address_of(front))
    assert log.append('events', MESSAGES[:40]) == 0
    assert log.read('events', 0, 20) == MESSAGES[:20]
    front.password = 'another'
    front.drop()
    begun = time.monotonic()
    questions = (
        lambda: log.read('events', 20, 20),
        lambda: log.end('events'),
        lambda: log.append('events', MESSAGES[40:]),
        lambda: log.append('events', MESSAGES[40:]),  # by another producer
    )
    for ask in questions:
        with pytest.raises(Outage, match='to let this client in to login.events.*the password'):
            ask()
    assert time.monotonic() - begun < SOON
    front.password = 'open-sesame'
    assert log.append('events', MESSAGES[40:]) == 40
    assert log.read('events', 0, 100) == MESSAGES
    log.close()


def test_a_follower_whose_password_changes_ends_in_one_sentence_and_goes_on_later(front, tmp_path):
    lake = tmp_path / 'lake.duckdb'
    log = KafkaLog(address_of(front))
    log.append('events', MESSAGES[:40])
    worker = follow(address_of(front), lake)
    lines = [worker.stderr.readline() for _ in range(2)]
    assert 'events/0: 40 of 40' in lines[1]
    front.password = 'another'
    front.drop()
    status, said = hear(worker)
    assert status == 1 and 'correct the user, the password or its rights' in said, said
    front.password = 'open-sesame'
    log.append('events', MESSAGES[40:])
    log.close()
    assert hear(follow(address_of(front), lake, '--once'))[0] == 0
    assert sorted(read_ids(lake)) == sorted(EVENTS['event_id'].to_list())
