"""What names another machine: read as its client reads it, or refused without telling a password"""

import socket
from dataclasses import fields, replace
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.arguments import MlrefError
from mlref.balance import parse_backend
from mlref.ext.kafka_settings import KafkaSettings, parse_kafka
from mlref.fleet import AutoscalingConfig, AutoscalingState, FleetObservation, decide_replicas
from mlref.followers import ServeOptions

REFUSED_OF_REDIS = (
    *('redis://cache/prod', 'redis://cache/1/2', 'redis://cache/-1', 'redis://cache/1.5'),
    *('redis://cache/٣', 'redis://cache:0', 'redis://cache:70000', 'redis:cache:6379'),
    *('redis://cache?db=3', 'redis://cache/2?db=3', 'redis://cache#2', 'redis://[::1', 'redis://'),
    *('redis://cache?socket_timeout=1', 'rediss://cache?password=s3cret', 'unix:///run/redis'),
    *(
        'redis://user:pa/ss@cache:6379',
        'redis://user:12/s3cret@cache:6379',
        'rediss://a?x=1&ssl_a=2',
    ),
)


@pytest.mark.parametrize('address', REFUSED_OF_REDIS)
def test_an_address_of_redis_says_one_server_and_one_number_or_is_refused(address):
    server = pytest.importorskip('mlref.ext.redis_server')
    with pytest.raises(MlrefError, match='^expected ') as error:
        server.hide_password(address)
    assert 's3cret' not in str(error.value) and 'pa/ss' not in str(error.value)


@pytest.mark.parametrize(
    ('address', 'shown'),
    [
        ('redis://cache', 'redis://cache:6379'),
        ('redis://u:p%2F%40%23@cache:1/', 'redis://cache:1/'),
        ('rediss://[::1]:7/2?ssl_ca_certs=/etc/ca.pem', 'rediss://[::1]:7/2'),
    ],
)
def test_an_address_of_redis_is_what_its_client_reads(address, shown):
    server = pytest.importorskip('mlref.ext.redis_server')
    from redis.connection import parse_url

    assert server.hide_password(address) == shown
    read = parse_url(address)
    assert read.get('password') in (None, 'p/@#')
    assert read.get('db', 0) == (2 if shown.endswith('/2') else 0)


@pytest.mark.parametrize('options', ['ssl_a=1', 'ssl_check_hostname=perhaps'])
def test_an_option_that_the_client_does_not_know_is_a_sentence(options):
    server = pytest.importorskip('mlref.ext.redis_server')
    with pytest.raises(MlrefError, match=r'expected .*127\.0\.0\.1:1'):
        server.open_client(f'rediss://127.0.0.1:1?{options}')


REFUSED_OF_KAFKA = (
    *('kafka://a:1,', 'kafka://a:1,:2', 'kafka://u:s3/cret@a:1', 'kafka:a:1', ''),
    *('kafka://a:1#x', 'kafka://a:1?x', 'kafka://u:s3?cret@a:1', 'kafka://u:s3#cret@a:1'),
    *('kafka://a:0', 'kafka://a:70000', 'kafka://a:x', 'kafka://a:٣', 'kafka://a', 'kafka://a b:1'),
    *('kafka://::1:9092', 'kafka://[::1:9092', 'kafka://::1]:9092', 'kafka://[::1]'),
    # a password that another login would be made of, or that a slash cuts in two
    *('kafka://u:s3%zz@a:1', 'kafka://u:s3%@a:1', 'kafka://u:s3%ff@a:1', 'kafka://u:s3%00@a:1'),
    *(
        'kafka://u:s3\ncret@a:1',
        'kafka://u:s3\t@a:1',
        'kafka://u:12/s3cret@a:1',
        'kafka://u:s3cret',
    ),
    *('kafka://u@a:1', 'kafka://:s3@a:1'),
)


@pytest.mark.parametrize('address', REFUSED_OF_KAFKA)
def test_an_address_of_kafka_says_brokers_and_a_login_or_is_refused(address):
    with pytest.raises(MlrefError, match='^expected an address as kafka://') as error:
        parse_kafka(address)
    assert 's3' not in str(error.value)


@pytest.mark.parametrize('space', ['x/../y', 'a b', '%41', '/', 'ä', 'x' * 250])
def test_the_space_of_an_address_is_the_begin_of_a_topic_or_is_refused(space):
    with pytest.raises(MlrefError, match='^expected a topic'):
        parse_kafka(f'kafka://a:1/{space}')


@settings(deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=('C', 'Z')), min_size=1))
def test_a_password_of_kafka_is_read_as_it_was_written(password):
    read = parse_kafka(f'kafka://m%40e:{quote(password, safe="")}@[::1]:1,b:2/may')
    assert (read.user, read.password, read.brokers, read.space) == (
        *('m@e', password, '[::1]:1,b:2', 'may'),
    )


@pytest.mark.parametrize('name', ['timeout', 'delivery'])
@pytest.mark.parametrize('odd', [-1, 0, float('nan'), float('inf'), '5', None, True])
def test_a_patience_with_kafka_that_is_none_is_refused(name, odd):
    with pytest.raises(MlrefError, match=f'expected {name}'):
        KafkaSettings('a:1', **{name: odd})


ODD_NUMBERS = (-1, float('nan'), float('inf'), '5', True)


@pytest.mark.parametrize('odd', ODD_NUMBERS)
@pytest.mark.parametrize('name', [each.name for each in fields(AutoscalingConfig)])
def test_a_number_of_a_fleet_that_is_none_is_refused(name, odd):
    if name == 'max_cost_per_day' and odd == float('inf'):
        assert AutoscalingConfig(max_cost_per_day=odd).max_cost_per_day == odd  # no cap
        return
    with pytest.raises(MlrefError, match=f'^expected {name}'):
        AutoscalingConfig(**{name: odd})


@pytest.mark.parametrize('odd', [*ODD_NUMBERS, None])
@pytest.mark.parametrize('name', [each.name for each in fields(FleetObservation)])
def test_a_fleet_that_cannot_be_seen_decides_nothing(name, odd):
    observed = replace(FleetObservation(0.0, 1, 1.0), **{name: odd})
    if name == 'at' and odd == -1:
        return  # a clock may begin anywhere
    with pytest.raises(MlrefError, match=f'^expected {name}'):
        decide_replicas(AutoscalingConfig(max_replicas=3), AutoscalingState(1), observed)


@pytest.mark.parametrize('odd', ODD_NUMBERS)
@pytest.mark.parametrize('name', ['ongoing', 'cpus', 'options', 'scaling'])
def test_a_number_of_ray_serve_that_is_none_is_refused(name, odd):
    ray_serve = pytest.importorskip('mlref.ext.ray_serve')
    with pytest.raises(MlrefError, match=f'^expected {name}'):
        ray_serve.RayServing(**{'options': ServeOptions('a:B', '/h', '/h/s'), name: odd})


@pytest.mark.parametrize('odd', [*ODD_NUMBERS, 0])
def test_a_number_of_a_backfill_on_ray_that_is_none_is_refused(odd):
    backfill = pytest.importorskip('mlref.ext.ray_backfill')
    with pytest.raises(MlrefError, match='^expected parts'):
        backfill.Backfill(Path('/snapshots'), 'one', 'a:B', 0, 1, odd)


@pytest.mark.parametrize(
    'text',
    [
        'a:1,weight=3,weight=5',
        'a:1,state=ready,state=drain',
        'a:٣',
        'a:1,weight=٣',
        'a:1,',
        'a:70000',
    ]
    + [
        'a',
        'a:',
        ':1',
        'a b:1',
        'a;b:1',
        'a:1\n',
        'a:1,weight=',
        'a:1,weight=1e2',
        'a:1,=3',
        '[::1:1',
    ],
)
def test_a_server_of_a_fleet_is_said_once_or_refused(text):
    with pytest.raises(MlrefError, match='^expected '):
        parse_backend(text)


@pytest.mark.parametrize('writer', [b'', b'x', b'x:y', b'HOST:x:1', b'HOST:99999999999:1', b'\xff'])
def test_a_writer_that_is_none_of_ours_is_not_said_to_be_dead(writer):
    records = pytest.importorskip('mlref.ext.redis_records')
    assert not records.is_dead(writer.replace(b'HOST', socket.gethostname().encode()))


@pytest.mark.parametrize('name', ['timeout', 'connect', 'patience', 'pause', 'lease'])
@pytest.mark.parametrize('odd', [-1, float('nan'), float('inf'), '5', None, True])
def test_a_patience_that_is_none_is_refused(name, odd):
    server = pytest.importorskip('mlref.ext.redis_server')
    with pytest.raises(MlrefError, match=f'expected {name}'):
        server.RedisSettings(**{name: odd})
