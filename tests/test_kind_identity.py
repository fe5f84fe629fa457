"""What cannot be kept exactly is refused before an id is made of it"""

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.consumer import partition_of
from mlref.core import MlrefError, digest, encode_text, text_fault
from mlref.events import decode_events, encode_events
from mlref.flights.events import FLIGHT_SCHEMA
from mlref.last_values import get_online_features, push
from mlref.lmdb_store import LmdbStore
from mlref.messages import MessageReader
from mlref.protocols import Limits, RequestError, decode_json
from mlref.records import RecordLayout
from mlref.schema import EventSchema

ANY_TEXT = st.text(st.characters(), max_size=12)  # lone surrogates and NUL included


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT, st.sampled_from(['text', 'list', 'key', 'value', 'array']))
def test_a_digest_is_made_of_text_that_can_be_written_down_or_of_none(text, where):
    value = {
        'text': text,
        'list': [1, [text]],
        'key': {text: 1},
        'value': {'a': {'b': text}},
        'array': np.array([text, None], object),
    }[where]
    if any('\ud800' <= character <= '\udfff' for character in text):
        with pytest.raises(MlrefError, match='expected text that UTF-8 can carry'):
            digest(value)
    else:
        assert len(digest(value)) == 64


def test_pairs_of_surrogates_in_json_are_one_character():
    assert digest(['\U0001f6ec']) != digest(['\U0001f6eb'])
    assert encode_text('\U0001f6ec') == '\U0001f6ec'.encode()


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_an_id_of_an_event_is_the_text_that_was_sent_or_a_dead_letter(text):
    fields = {'event_id': text, 'kind': 'departure', 'flight_id': text}
    message = json.dumps({**fields, 'event_time': 1, 'known_time': 1}).encode()
    told = MessageReader(FLIGHT_SCHEMA.columns, FLIGHT_SCHEMA.limits).read(message)
    if text_fault(text):
        assert {fault.split(':')[0] for fault in told.faults} == {'event_id', 'flight_id'}
    else:
        assert told.values['event_id'] == told.values['flight_id'] == text
        events, broken = decode_events([message] * 20, FLIGHT_SCHEMA)
        assert not broken and set(events['event_id']) == {text}
        again = encode_events(events.drop('_i'), FLIGHT_SCHEMA)
        assert decode_events(again, FLIGHT_SCHEMA)[0].equals(events)


@pytest.mark.parametrize('text', ['N14\\ud800', 'N14\\udc00\\ud800', '\\ud83d\\ud83d\\ude00'])
def test_two_ids_that_would_become_one_are_both_refused(text):
    one = f'{{"event_id":"{text}","kind":"departure","event_time":1,"known_time":1}}'
    other = one.replace('\\ud8', '\\udb')
    _, broken = decode_events([one.encode(), other.encode()], FLIGHT_SCHEMA)
    assert [place for place, _ in broken] == [0, 1]
    assert all(why.startswith('event_id: expected a text, got one with half') for _, why in broken)


@pytest.mark.parametrize(
    'body',
    [
        b'{"entities": [{"flight_id": "UA\\ud800"}]}',
        b'{"entities": [{"UA\\udfff": 1}]}',
        b'{"id": "\\ud800", "inputs": []}',
    ],
)
def test_a_request_with_such_text_is_refused(body):
    with pytest.raises(RequestError, match='UTF-8 can carry') as error:
        decode_json(body, Limits())
    assert error.value.status == 422
    found = decode_json(b'{"id": "\\ud83d\\ude00 \\u00fc"}', Limits())
    assert found == {'id': '\U0001f600 \xfc'}


def test_a_partition_is_of_a_key_that_can_be_written_down():
    with pytest.raises(MlrefError, match='UTF-8 can carry'):
        partition_of('N14\ud800', 4)


def test_whole_numbers_beyond_a_float_are_told_apart_beside_a_null():
    one, other = (pl.DataFrame({'a': [2**53 + k, None]}) for k in (0, 1))
    assert digest(one) != digest(other)
    assert digest(pl.DataFrame({'a': [1, None]})) != digest(pl.DataFrame({'a': [1, 0]}))


@pytest.mark.parametrize('name', ['', 'a"b', 'a\\b', 'a\nb', 'a\ud800', 7])
def test_a_column_has_a_name_that_every_part_can_write(name):
    with pytest.raises(
        MlrefError, match='expected (names of columns|a name|entity_id of EventSchema as str)'
    ):
        EventSchema({name: pl.Int64}, ('seen',), entity_id=name)


@pytest.mark.parametrize('others', [0, 60])
def test_a_key_that_no_file_keeps_is_refused_by_a_sentence(others, tmp_path):
    layout = RecordLayout('last/k', ('a',), True, 0, 'a' * 16)
    store = LmdbStore(tmp_path, more=(layout,))
    keys = ['tail \ud800', *map(str, range(others))]
    with pytest.raises(MlrefError, match='text that UTF-8 can carry'):
        push(store, layout.name, keys, np.full(len(keys), 5), np.ones((len(keys), 1)))
    with pytest.raises(MlrefError, match='text that UTF-8 can carry'):
        get_online_features(store, [layout.name], [keys], 9)
