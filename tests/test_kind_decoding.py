"""Decoding is exact or a dead letter, alike for one message and many, and bounded by bytes"""

import json
import os
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot as plt

from mlref.checks import check_schema, message_fields, plot_quality, select_readable
from mlref.contracts import base_rules, check_messages
from mlref.core import MlrefError
from mlref.events import OTHER_FIELDS, decode_batch, decode_events, encode_events, limit_names
from mlref.flights.events import FLIGHT_SCHEMA
from mlref.ingest import IngestCounts, check_tables, ingest
from mlref.lake import Lake
from mlref.log import LocalLog
from mlref.messages import MessageLimits, MessageReader
from mlref.mlflow_protocol import decode_mlflow
from mlref.protocols import Limits, RequestError, Signature, decode_json
from mlref.schema import EventSchema, TableSchema
from server_fixture import deliver_body

DEEP = os.environ.get('MLREF_DEEP') == '1'
HERE = Path(__file__).parent
CORPUS = json.loads((HERE / 'corpus' / 'messages.json').read_text())
SAMPLE = (HERE.parent / 'data' / 'sample_events.jsonl').read_bytes().splitlines()
RULES = base_rules(FLIGHT_SCHEMA)
# one of every type of column
SCHEMA = EventSchema(
    payload={
        'text': pl.String,
        'whole': pl.Int64,
        'small': pl.Int32,
        'share': pl.Float64,
        'short': pl.Float32,
        'truth': pl.Boolean,
    },
    kinds=('seen',),
    entity_id='text',
)
FAST = replace(
    SCHEMA, payload={n: k for n, k in SCHEMA.payload.items() if n not in ('small', 'short')}
)
HEAD = '"event_id":"e","kind":"seen","event_time":1,"known_time":2'


def bytes_of(entry: dict) -> bytes:
    "A message of the corpus; one character a byte"
    return entry['message'].encode('latin-1') * entry.get('times', 1)


def filler(schema: EventSchema, count: int) -> list[bytes]:
    "Good messages that the fast reader takes"
    names = [f'"{name}":{_good(kind)}' for name, kind in schema.payload.items()]
    return [f'{{{HEAD},{",".join(names)}}}'.encode()] * count


def _good(kind: object) -> str:
    return {pl.String: '"a"', pl.Boolean: 'true'}.get(kind, '7')


def read_singly(messages: list[bytes], schema: EventSchema) -> tuple:
    "What the exact reader says: events, broken, unknown"
    reader = MessageReader(schema.columns, schema.limits)
    read = [reader.read(message) for message in messages]
    rows = [m.values for m in read if not m.faults]
    columns = {
        name: pl.Series(name, [row.get(name) for row in rows], kind)
        for name, kind in schema.columns.items()
    }
    broken = [(i, '; '.join(m.faults)) for i, m in enumerate(read) if m.faults]
    unknown = {i: m.unknown for i, m in enumerate(read) if m.unknown and not m.faults}
    return pl.DataFrame(columns), broken, unknown


def assert_same(messages: list[bytes], schema: EventSchema) -> None:
    decoded = decode_batch(messages, schema)
    events, broken, unknown = read_singly(messages, schema)
    assert decoded.broken == broken
    assert dict(decoded.unknown) == unknown
    assert decoded.events.drop('_i').equals(events)
    assert decoded.events.drop('_i').schema == events.schema
    places = sorted({*range(len(messages))} - {i for i, _ in broken})
    assert decoded.events['_i'].to_list() == places


@pytest.mark.parametrize('beside', [0, 40, 2500])
@pytest.mark.parametrize('schema', [SCHEMA, FAST], ids=['every type', 'fast types'])
def test_what_was_found_is_said_the_same_alone_and_among_many(schema, beside):
    for entry in CORPUS:
        message = bytes_of(entry)
        if schema is FAST and ('small' in entry['message'] or 'short' in entry['message']):
            continue
        if schema is SCHEMA and beside > 40:
            beside = 40  # read one by one
        decoded = decode_batch([*filler(schema, beside), message], schema)
        if entry['why'] is None:
            assert not decoded.broken, entry
            last = decoded.events.row(-1, named=True)
            assert {name: last[name] for name in entry['values']} == entry['values'], entry
            if 'unknown' in entry:
                assert dict(decoded.unknown) == {beside: tuple(entry['unknown'])}, entry
        else:
            assert decoded.broken == [(beside, entry['why'])], entry
            assert decoded.events.height == beside


TOKENS = [
    *('12.9', '12.0', '1e3', '1E5', 'true', 'false', 'null', 'NaN', 'Infinity', '-Infinity'),
    *('1e400', '1e-400', '5e-324', '-0', '-0.0', '0', '7', '007', '1.', '.5', '+1', 'tru'),
    *('9223372036854775808', '9223372036854775807', '-9223372036854775808', '2147483648'),
    *('9007199254740993', '9007199254740992', '0.1234567890123456789', '0.1', '16777217'),
    *('"7"', '"a"', '""', '[1]', '{"a":1}', '{"a":1,"a":2}', '"null"', '"e-"', '" : "'),
    *('"\\ud800"', '"\\u0000"', '"\\u00fc"', '"\u00e9"', '"\\n"', '"a', "'a'", '"a\tb"'),
    '0.' + '0' * 330 + '1',
    '1' * 500,
    '"' + 'x' * 10_001 + '"',
]


@st.composite
def messages(draw):
    "An event, with some of it wrong"
    names = ['event_id', 'kind', 'event_time', 'known_time', *SCHEMA.payload]
    good = {'event_id': '"e"', 'kind': '"seen"', 'text': '"a"', 'truth': 'true', 'share': '2.5'}
    taken = draw(st.lists(st.sampled_from(names[4:]), unique=True))
    fields = [(name, good.get(name, '1')) for name in names if name in taken or name in names[:4]]
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*names, 'gate', '$\\\\frac$', 'x' * 201]))
        fields.insert(draw(st.integers(0, len(fields))), (name, draw(st.sampled_from(TOKENS))))
    comma = draw(st.sampled_from([',', ',', ', ', ' ,', '\n,', ',,']))
    colon = draw(st.sampled_from([':', ':', ': ', ' :', '\t:']))
    text = '{' + comma.join(f'"{name}"{colon}{value}' for name, value in fields) + '}'
    data = text.encode()
    cut = draw(st.integers(0, 40))
    return data[: len(data) - cut] if cut < 5 else draw(ends)(data)


ends = st.sampled_from(
    [lambda d, e=e: d + e for e in (b'', b'', b' ', b'\n', b'x', b'{}', b'\xff')]
)


@settings(max_examples=2000 if DEEP else 40, deadline=None, derandomize=not DEEP)
@given(st.lists(messages(), min_size=17, max_size=40), st.sampled_from([SCHEMA, FAST]))
def test_many_messages_mean_what_each_means_alone(some, schema):
    assert_same(some, schema)


@settings(max_examples=2000 if DEEP else 100, deadline=None, derandomize=not DEEP)
@given(messages(), st.integers(0, 2100))
def test_a_message_means_the_same_in_a_large_batch(message, place):
    batch = filler(FAST, 2100)
    batch[place:place] = [message]
    decoded = decode_batch(batch, FAST)
    events, broken, unknown = read_singly([message], FAST)
    assert decoded.broken == [(place, why) for _, why in broken]
    assert decoded.events.height == 2101 - len(broken)
    assert list(decoded.unknown.items()) == [(place, names) for names in unknown.values()]
    assert decoded.events.filter(pl.col('_i') == place).drop('_i').equals(events)


@pytest.mark.parametrize('seed', range(40 if DEEP else 4))
def test_a_byte_of_a_real_event_that_is_another_changes_nothing_else(seed):
    random_ = random.Random(seed)
    batch = SAMPLE * 30
    for place in random_.sample(range(len(batch)), 40):
        message = bytearray(batch[place])
        message[random_.randrange(len(message))] = random_.randrange(256)
        batch[place] = bytes(message)
    assert_same(batch, FLIGHT_SCHEMA)


TEXT = st.text(st.characters(codec='utf-8', exclude_characters='\0'), max_size=20)
VALUES = {
    'text': TEXT,
    'whole': st.integers(-(2**63), 2**63 - 1),
    'small': st.integers(-(2**31), 2**31 - 1),
    'share': st.floats(allow_nan=False, allow_infinity=False),
    'short': st.floats(width=32, allow_nan=False, allow_infinity=False),
    'truth': st.booleans(),
}


@settings(max_examples=1000 if DEEP else 40, deadline=None, derandomize=not DEEP)
@given(
    st.lists(
        st.fixed_dictionaries({n: st.none() | v for n, v in VALUES.items()}),
        min_size=1,
        max_size=30,
    )
)
def test_what_is_encoded_comes_back_to_the_bit(rows):
    schema = dict(SCHEMA.payload)
    columns = {n: pl.Series(n, [r[n] for r in rows], k) for n, k in schema.items()}
    head = {'event_id': 'e', 'kind': 'seen', 'event_time': 1, 'known_time': 2}
    events = pl.DataFrame(columns).with_columns(
        pl.lit(v, SCHEMA.columns[n]).alias(n) for n, v in head.items()
    )
    back, broken = decode_events(encode_events(events, SCHEMA), SCHEMA)
    assert not broken
    for name in SCHEMA.columns:
        assert back[name].to_arrow().equals(events[name].to_arrow())


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_a_number_that_json_cannot_carry_is_not_sent_as_null(value):
    events = decode_events(filler(SCHEMA, 2), SCHEMA)[0].drop('_i')
    with pytest.raises(MlrefError, match='numbers or null in share, got NaN or an infinity'):
        encode_events(events.with_columns(share=pl.lit(value)), SCHEMA)
    with pytest.raises(MlrefError, match='expected whole of events as Int64, got Float64'):
        encode_events(events.with_columns(pl.col('whole').cast(pl.Float64)), SCHEMA)
    with pytest.raises(MlrefError, match='got truth not among'):
        encode_events(events.drop('truth'), SCHEMA)


def cpu(run) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def test_broken_messages_cost_about_as_much_as_good_ones():
    clean = (SAMPLE * 550)[:50_000]
    hurt = [b'{x}' if i % 100 == 0 else message for i, message in enumerate(clean)]
    good = min(cpu(lambda: decode_batch(clean, FLIGHT_SCHEMA)) for _ in range(2))
    bad = min(cpu(lambda: decode_batch(hurt, FLIGHT_SCHEMA)) for _ in range(2))
    assert bad < 6 * good  # it was 30 times as much
    nonsense = min(cpu(lambda: decode_batch([b'{x}'] * 10_000, FLIGHT_SCHEMA)) for _ in range(2))
    assert nonsense < 25 * good  # it was 70 times as much


@pytest.mark.parametrize(
    'message',
    [
        b'{"text":"' + b'\\"[' * 300_000,
        b'[' * 1_000_000,
        b'{"share":' + b'9' * 900_000 + b'}',
        b'{"share":0.' + b'0' * 900_000 + b'1}',
        b'{' + b','.join(b'"f%d":{}' % i for i in range(90_000)) + b'}',
        b'{"gate":' + b'[' * 32 + b']' * 32 + b'}',
        b' ' * 3_000_000,
        b'"\\' * 400_000,
    ],
)
def test_a_large_message_is_judged_at_once(message):
    assert cpu(lambda: decode_batch([message], SCHEMA)) < 2
    assert decode_batch([message], SCHEMA).broken


def test_limits_are_those_of_the_schema():
    limits = MessageLimits(
        max_message_bytes=300,
        max_nesting_depth=2,
        max_string_length=5,
        max_name_length=6,
        max_unknown_fields=2,
        max_batch_messages=7,
    )
    schema = replace(FAST, limits=limits)
    for fields, why in (
        ('"text":"abcdef"', 'text: expected a text, got one of more than 5 characters'),
        ('"a":[[1]]', 'nested deeper than 2'),
        ('"toolong":1', 'a name of more than 6 characters'),
        ('"a":1,"b":null,"c":1', 'more than 2 fields that no column keeps'),
        ('"a":"' + 'x' * 300 + '"', 'larger than 300 bytes'),
    ):
        message = f'{{{HEAD},{fields}}}'.encode()
        batch = [*filler(schema, 20), message, *filler(schema, 20)]
        decoded = decode_batch(batch, schema)
        assert decoded.broken == [(20, why)] and decoded.events.height == 40
        assert decoded.events['_i'].to_list() == [*range(20), *range(21, 41)]
    ok = [*filler(schema, 9), f'{{{HEAD},"a":1}}'.encode()]
    assert dict(decode_batch(ok, schema).unknown) == {9: ('a',)}


def test_events_of_a_list_are_kept_as_they_were_written(tmp_path):
    log = LocalLog(tmp_path / 'log')
    good = f'{{{HEAD},"share":1.50, "gate":{{"a":[1,2]}}}}'.encode()
    deliver_body(log, SCHEMA, b' [' + good + b' ,\n' + good + b'] ')
    assert log.read('events', 0, 9) == [good, good]
    for body, why in (
        (b'[{"share":1,"share":2}]', 'share: given more than once'),
        (b'[{"share":NaN}]', 'share: expected a number'),
        (b'[{"whole":12.9}]', 'whole: expected a whole number, got a number with a point'),
        (b'[' + good + b'] x', 'a JSON list of events'),
        (b'[' + good + b' ' + good + b']', 'a JSON list of events'),
        (b'[' * 5000, 'a JSON list of events'),
        (b'[' + good, 'a JSON list of events'),
    ):
        with pytest.raises(RequestError, match=why):
            deliver_body(log, SCHEMA, body)
    assert log.end('events') == 2


def test_a_body_of_broken_lines_costs_milliseconds(tmp_path):
    log = LocalLog(tmp_path / 'log')

    def post(body):
        with pytest.raises(RequestError):
            deliver_body(log, SCHEMA, body)

    assert cpu(lambda: post(b'{x}\n' * 10_000)) < 2  # it was 18 seconds
    small = replace(SCHEMA, limits=MessageLimits(max_batch_messages=3))
    with pytest.raises(RequestError, match='at most 3 events at once, got 4') as error:
        deliver_body(log, small, b'{}\n' * 4)
    assert error.value.status == 413


def test_fields_that_nobody_keeps_are_counted_under_few_names(tmp_path):
    odd = [b'{%s,"$\\\\frac%d$":1}' % (HEAD.encode(), i) for i in range(300)]
    odd += [b'{%s,"gate":{"deep":[[1]]},"crew":null}' % HEAD.encode()] * 4
    batch = check_messages(odd, SCHEMA, base_rules(SCHEMA))
    assert batch.events.height == 304 and 'deep' not in str(batch.events.columns)
    assert len(batch.unknown) == 51 and batch.unknown['gate'] == 4
    assert batch.unknown[OTHER_FIELDS] == 251
    both = IngestCounts(unknown=batch.unknown) + IngestCounts(unknown={'zz': 9})
    assert len(both.unknown) == 51 and both.unknown['zz'] == 9
    assert sum(both.unknown.values()) == 313
    assert limit_names({}, 3) == {}


def test_a_picture_of_strange_names_is_drawn_at_once(tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', SCHEMA)
    for k in range(8):
        fields = ','.join(f'"$\\\\frac{{{k}_{i}}}$":1' for i in range(90))
        log.append('e', [f'{{{HEAD},{fields}}}'.replace('"e"', f'"e{k}"').encode()])
    ingest(lake, log, 'e', base_rules(SCHEMA), batch=1)
    quality = lake.sql('select * from quality')
    lake.close()
    assert quality['name'].n_unique() > 400
    figure = plot_quality(quality)
    assert cpu(figure.canvas.draw) < 5 and len(figure.axes[0].lines) <= 20
    plt.close(figure)


def test_one_odd_message_is_a_dead_letter_and_no_change_of_the_schema():
    deep = b'{"gate":' + b'[' * 1000 + b']' * 1000 + b'}'
    odd = [b'{"sched":12.9}', b'{"number":true}', deep, b'{"sched":1,"sched":2}', b'nonsense']
    fields = message_fields([*SAMPLE, *odd], FLIGHT_SCHEMA)
    expected = {name: kind for name, kind in FLIGHT_SCHEMA.columns.items() if name in fields}
    assert check_schema(expected, fields) == []
    assert len(select_readable(odd, FLIGHT_SCHEMA)) == 2
    other = [message.replace(b'"distance":', b'"distance":0.5,"was":') for message in SAMPLE]
    changed = check_schema(expected, message_fields(other, FLIGHT_SCHEMA))
    assert [(c.rule, c.action) for c in changed] == [
        ('schema: was', 'warn'),
        ('schema: distance', 'fail'),
    ]
    many = [b'{%s}' % b','.join(b'"f%d":1' % i for i in range(5000))]
    assert len(message_fields(many, FLIGHT_SCHEMA)) == 50


def test_a_column_that_is_sent_twice_is_refused():
    for data in (b'[[1, 2]]', b'[[1, "x"]]'):
        body = b'{"dataframe_split": {"columns": ["a", "a"], "data": %s}}' % data
        with pytest.raises(RequestError, match="expected each column once, got 'a' twice"):
            decode_mlflow(body, 'application/json', Signature(('a',)), Limits())


def test_a_field_that_is_sent_twice_is_refused_at_once():
    with pytest.raises(RequestError, match='expected each field once, got a more than once'):
        decode_json(b'{"entities": [{"a": 1, "b": 2, "a": 3}]}', Limits())
    fields = ','.join(f'"f{i}":1' for i in range(80_000)) + ',"f79999":2'

    def read():
        with pytest.raises(RequestError, match='got f79999 more than once'):
            decode_json(f'{{{fields}}}'.encode(), Limits())
        assert decode_batch([f'{{{fields}}}'.encode()], SCHEMA).broken

    assert cpu(read) < 2


def test_many_columns_cost_no_more_than_they_are():
    names = tuple(f'c{i}' for i in range(130))
    columns = [*(f'x{i}' for i in range(100_000)), *names]
    request = {'dataframe_split': {'columns': columns, 'data': [[1] * len(columns)]}}
    usual = json.dumps(request).encode()
    for body in (usual, usual.replace(b'[[1,', b'[["x",')):
        arguments = (body, 'application/json', Signature(names), Limits())
        assert decode_mlflow(*arguments).X.shape == (1, 130)
        assert cpu(partial(decode_mlflow, *arguments)) < 1


@pytest.mark.parametrize('value', [12.9, True, '7', 2**63, [1]])
def test_a_row_of_a_table_is_kept_exactly_or_refused(value):
    table = TableSchema('sizes', {'whole': pl.Int64})
    assert table.frame([(1,), (None,)])['whole'].to_list() == [1, None]
    with pytest.raises(MlrefError, match='expected values of whole as Int64, got others'):
        table.frame([(value,)])
    with pytest.raises(MlrefError, match='expected 1 values in a row of sizes, got 2'):
        table.frame([(1, 2)])
    with pytest.raises(MlrefError, match='got larger whole ones'):
        TableSchema('sizes', {'share': pl.Float64}).frame([(2**53 + 1,)])


def test_what_the_table_checks_are_handed_can_be_read(tmp_path):
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    deep = SAMPLE[0].replace(b'{', b'{"gate":' + b'[' * 1000 + b']' * 1000 + b',', 1)
    odd = SAMPLE[1].replace(b'"event_time":', b'"event_time":0.5,"was":')
    nested = SAMPLE[2].replace(b'{', b'{"gate":{"a":[1]},', 1)
    log.append('e', [deep, odd, nested, *SAMPLE[3:]])
    counts = ingest(lake, log, 'e', RULES)
    assert (counts.dead, dict(counts.unknown)) == (2, {'gate': 1})
    handed = []
    now = lake.sql('select max(known_time) + 1 as t from events')['t'][0]
    check_tables(lake, log, lambda tables: handed.append(tables) or [], now)
    messages = handed[0].messages
    assert len(messages) == len(SAMPLE) - 1 and deep not in messages
    fields = message_fields(messages, FLIGHT_SCHEMA)
    expected = {name: kind for name, kind in FLIGHT_SCHEMA.columns.items() if name in fields}
    assert {result.action for result in check_schema(expected, fields)} == {'warn'}
    lake.close()
