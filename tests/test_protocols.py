"""Bodies of requests: exactly what was meant or a refusal, for every decoder and every client

Whatever the bytes, a decoder gives rows of numbers or a `RequestError`, within bounded time and
memory. A body that the quick reader takes means the same to the exact one.
"""

import gzip
import json
import math
import os
import subprocess
import sys
import time
import tracemalloc
import zlib
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mlflow.pyfunc.scoring_server.client import ScoringServerClient
from schemathesis.config import SchemathesisConfig
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

import protocol_server
from mlref.feature_ranges import count_outside, decode_ranges
from mlref.mlflow_protocol import decode_mlflow, encode_mlflow
from mlref.oip import LENGTH_HEADER, decode_oip, encode_oip
from mlref.oip_metadata import check_load, describe_metadata, index_models
from mlref.protocols import (
    RequestError,
    Scores,
    Signature,
    compress,
    decode_json,
    decompress,
)
from protocol_server import DOCUMENT, LIMITS, MODEL, SIGNATURE, score

DEEP = os.environ.get('MLREF_DEEP') == '1'
EXAMPLES = 2000 if DEEP else 30
NAMES = SIGNATURE.names
WIDTH = len(NAMES)
JSON = 'application/json'
many = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])

ROW = [21.5, None, 8]
TENSOR = {'name': 'X', 'datatype': 'FP32', 'shape': [1, WIDTH], 'data': ROW}
USUAL = json.dumps({'id': 'a7', 'inputs': [TENSOR]}).encode()
RAW = np.array(ROW, 'f4').tobytes()
HEAD = json.dumps(
    {
        'inputs': [
            {
                **{name: TENSOR[name] for name in ('name', 'datatype', 'shape')},
                'parameters': {'binary_data_size': len(RAW)},
            }
        ],
        'outputs': [{'name': 'p', 'parameters': {'binary_data': True}}],
    }
).encode()
BINARY = HEAD + RAW
SPLIT = json.dumps({'dataframe_split': {'columns': NAMES, 'data': [ROW]}}).encode()
RECORDS = json.dumps({'dataframe_records': [dict(zip(NAMES, ROW, strict=True))]}).encode()
CSV = b'temperature,wind,hour\n21.5,,8\n'


def oip(body: bytes, length: int | None = None):
    headers = {} if length is None else {LENGTH_HEADER: b'%d' % length}
    return decode_oip(body, headers, SIGNATURE, LIMITS)


def table(body: bytes, kind: str = JSON):
    return decode_mlflow(body, kind, SIGNATURE, LIMITS)


DECODERS = {
    'json': lambda body: decode_json(body, LIMITS),
    'oip': oip,
    'oip binary': lambda body: oip(body, min(len(HEAD), len(body))),
    'mlflow': table,
    'csv': lambda body: table(body, 'text/csv'),
    'gzip': lambda body: decompress(body, 'gzip', LIMITS),
    'deflate': lambda body: decompress(body, 'deflate', LIMITS),
    'index': lambda body: index_models([MODEL], body, LIMITS),
    'load': lambda body: check_load(body, LIMITS),
}
GOOD = {
    'json': [USUAL],
    'oip': [USUAL],
    'oip binary': [BINARY],
    'mlflow': [SPLIT, RECORDS],
    'csv': [CSV],
    'gzip': [gzip.compress(USUAL)],
    'deflate': [zlib.compress(USUAL)],
    'index': [b'', b'{"ready": true}'],
    'load': [b'', b'{"parameters": {"unload_dependents": true}}'],
}


@st.composite
def mutated(draw, body: bytes):
    "A body with parts of it left out, doubled, or replaced"
    pieces = [b'', b'null', b'NaN', b'-1', b'1e999', b'true', b'"X"', b'[', b'}', b',', b'"', b'\\']
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 20)))
        piece = draw(st.sampled_from([*pieces, body[start:end] * 2]) | st.binary(max_size=4))
        body = body[:start] + piece + body[end:]
    return body


def refused_or_read(decoder: str, body: bytes) -> None:
    "Only a `RequestError` with a status and one sentence, or an answer"
    try:
        DECODERS[decoder](body)
    except RequestError as error:
        assert error.status in (400, 413, 415, 422)
        assert str(error) and '\n' not in str(error) and len(str(error)) < 500
        str(error).encode()


@pytest.mark.parametrize('decoder', DECODERS)
@many
@given(st.data())
def test_whatever_the_bytes_a_decoder_reads_or_refuses(decoder, data):
    good = data.draw(st.sampled_from(GOOD[decoder]))
    DECODERS[decoder](good)
    refused_or_read(decoder, data.draw(mutated(good)))
    refused_or_read(decoder, data.draw(st.binary(max_size=60)))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
FIELDS = (
    'id',
    'inputs',
    'outputs',
    'parameters',
    'name',
    'datatype',
    'shape',
    'data',
    'binary_data_size',
    'columns',
    'index',
    'dataframe_split',
    'dataframe_records',
    'instances',
    'params',
    'X',
    *NAMES,
)
keys = st.sampled_from(FIELDS)
bodies = st.recursive(
    values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner), max_leaves=12
)


@many
@given(st.dictionaries(keys, bodies, max_size=4), st.sampled_from(['oip', 'mlflow', 'load']))
def test_whatever_the_json_a_decoder_reads_or_refuses(body, decoder):
    refused_or_read(decoder, json.dumps(body).encode())


@many
@given(bodies, st.sampled_from(['name', 'datatype', 'shape', 'data', 'parameters']))
def test_whatever_a_field_of_a_tensor_holds(value, field):
    for tensor in ({**TENSOR, field: value}, {**TENSOR, 'datatype': 'INT64', field: value}):
        refused_or_read('oip', json.dumps({'inputs': [tensor]}).encode())


def refusal(call) -> RequestError:
    with pytest.raises(RequestError) as found:
        call()
    return found.value


# What answered with a plain 500, or with a score, before
@pytest.mark.parametrize(
    'change, status, says',
    [
        ({'shape': [1, 3.0]}, 422, 'shape [rows, 3]'),
        ({'shape': [1, True]}, 422, 'shape [rows, 3]'),
        ({'shape': [-1, 3]}, 422, 'shape [rows, 3]'),
        ({'shape': [0, 3], 'data': []}, 400, 'at least one row'),
        ({'shape': [65, 3], 'data': []}, 413, 'at most 64 rows'),
        ({'data': [[1, 2, 3], 5]}, 422, 'rows of 3 values, got 5'),
        ({'data': [[1, 2, 3], None]}, 422, 'rows of 3 values, got None'),
        ({'shape': [2, 3], 'data': [[1, 2], [3, 4, 5, 6]]}, 422, 'rows of 3 values, got one of 2'),
        ({'data': [1, 2, '']}, 422, "got '' for feature hour of row 0"),
        ({'data': [1, 2, False]}, 422, 'got False for feature hour of row 0'),
        ({'data': [1, 2, {}]}, 422, 'got {} for feature hour of row 0'),
        ({'name': 'input-0'}, 400, "got 'input-0'"),
        ({'datatype': 'BF16'}, 400, "got 'BF16'"),
        ({'datatype': 'FP64', 'data': [1, 0.1, 2]}, 422, 'got 0.1 for feature wind of row 0'),
        ({'datatype': 'INT64', 'data': [1, 2, 2**24 + 1]}, 422, 'got 16777217 for feature hour'),
        ({'parameters': {'shared_memory_region': 'a'}}, 400, 'got also shared_memory_region'),
    ],
)
def test_a_tensor_that_is_not_what_it_says(change, status, says):
    body = json.dumps({'inputs': [{**TENSOR, **change}]}).encode()
    error = refusal(lambda: oip(body))
    assert (error.status, says in str(error)) == (status, True), error


@pytest.mark.parametrize(
    'body, says',
    [
        (b'{"a":' * 1500 + b'1' + b'}' * 1500, 'at most 32 deep'),
        (USUAL.replace(b'21.5', b'9' * 400), 'at most 308 digits, got 400'),
        (USUAL.replace(b'21.5', b'1e999'), 'that a float carries, got 1e999'),
        (USUAL.replace(b'null', b'NaN'), 'or NaN in a binary tensor'),
        (USUAL.replace(b'a7', b'UA\\ud800'), 'half of a surrogate pair'),
        (USUAL.replace(b'a7', b'UA\\u0000'), 'a NUL character'),
        (USUAL.replace(b'"a7"', b'7'), 'id of a request as a text, got 7'),
        (USUAL[:-1] + b', "more": 1}', 'got also more'),
        (b'\xef\xbb\xbf' + USUAL, 'bytes that are none'),
        (USUAL.decode().encode('utf-16'), 'bytes that are none'),
    ],
)
def test_a_body_that_is_refused_as_a_whole(body, says):
    error = refusal(lambda: oip(body))
    status = 422 if b'UA' in body else 400  # the text can be understood
    assert (error.status, says in str(error)) == (status, True), error


# Of each field that a usual body has, also when nothing else is odd about it
@pytest.mark.parametrize('field', ['inputs', 'id', 'name', 'datatype', 'shape', 'data'])
@pytest.mark.parametrize('escaped', [False, True])
def test_a_field_that_comes_twice_is_refused_by_the_quick_reader_too(field, escaped):
    request = json.loads(USUAL)
    value = request[field] if field in request else TENSOR[field]
    name = f'\\u{ord(field[0]):04x}{field[1:]}' if escaped else field
    twice = f'"{name}": {json.dumps(value)}, "{field}":'.encode()
    body = USUAL.replace(f'"{field}":'.encode(), twice)
    assert body != USUAL
    assert f'got {field} more than once' in str(refusal(lambda: oip(body)))
    split = SPLIT.replace(b'"columns":', b'"columns": ["a"], "columns":')
    assert 'got columns more than once' in str(refusal(lambda: table(split)))


numbers = st.none() | st.integers(-(2**70), 2**70) | st.floats(width=64, allow_nan=False)


@many
@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=3))
@example([(3.4028235677973366e38, -3.4028235677973362e38, 5e-324)])
@example([(2**53 + 1, -0.0, 1e-46)])
def test_the_quick_reader_and_the_exact_one_read_the_same(rows):
    flat = [value for row in rows for value in row]
    tensor = {**TENSOR, 'shape': [len(rows), WIDTH], 'data': flat}
    usual = {'inputs': [tensor]}
    unusual = {**usual, 'outputs': []}  # which means the same

    def read(request):
        try:
            return oip(json.dumps(request).encode()).X.tobytes()
        except RequestError as error:
            return str(error), error.status

    found = read(usual)
    assert found == read(unusual) == read({'inputs': [{**tensor, 'data': rows}]})
    split = {'columns': NAMES, 'data': rows}
    frames = [{'dataframe_split': split}, {'dataframe_split': split, 'params': {}}]
    frames += [
        {'instances': rows},
        {'dataframe_records': [dict(zip(NAMES, r, strict=True)) for r in rows]},
    ]
    for frame in frames:
        try:
            assert table(json.dumps(frame).encode()).X.tobytes() == found
        except RequestError as error:
            assert (str(error), error.status) == found


@many
@given(
    st.sampled_from(['<f2', '<f4', '<f8', '<i8', '<u8', '<i4', '<u4', '<i2', '|u1', '|i1', '|b1']),
    st.binary(min_size=8 * WIDTH, max_size=8 * WIDTH),
)
def test_a_binary_tensor_keeps_every_number_or_is_refused(kind, raw):
    dtype = np.dtype(kind)
    raw = bytes(byte & 1 for byte in raw) if kind == '|b1' else raw
    values = np.frombuffer(raw[: dtype.itemsize * WIDTH], dtype)
    tensor = {
        'name': 'X',
        'datatype': np_to_triton_dtype(dtype),
        'shape': [1, WIDTH],
        'parameters': {'binary_data_size': values.nbytes},
    }
    head = json.dumps({'inputs': [tensor]}).encode()
    with np.errstate(over='ignore'):
        narrow = values.astype('f4')
    exact = [math.isnan(v) or float(n) == v for n, v in zip(narrow, values.tolist(), strict=True)]
    fits = all(exact) and not np.isinf(narrow).any()
    try:
        X = oip(head + values.tobytes(), len(head)).X
        assert fits and np.array_equal(X[0], narrow, equal_nan=True)
    except RequestError as error:
        assert not fits and error.status == 422


@many
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9))
def test_a_score_survives_the_answer(p):
    scores = Scores(np.array(p), np.array(p) / 3, 'c0ffee')
    found = json.loads(encode_oip(oip(USUAL), scores, 'late', '1').body)
    assert found['outputs'][0]['data'] == p and found['id'] == 'a7'
    assert json.loads(encode_mlflow(table(SPLIT), scores).body)['predictions'] == p
    binary = encode_oip(oip(BINARY, len(HEAD)), scores, 'late', '1')
    size = int(dict(binary.headers)[LENGTH_HEADER])
    assert np.frombuffer(binary.body[size:], '<f8').tolist() == p


def test_a_missing_value_is_refused_where_the_model_takes_none():
    strict = Signature(NAMES, 'refuse')
    for call in (
        lambda: decode_oip(USUAL, {}, strict, LIMITS),
        lambda: decode_oip(BINARY, {LENGTH_HEADER: b'%d' % len(HEAD)}, strict, LIMITS),
        lambda: decode_mlflow(SPLIT, JSON, strict, LIMITS),
        lambda: decode_mlflow(CSV, 'text/csv', strict, LIMITS),
    ):
        assert 'got a missing one for feature wind of row 0' in str(refusal(call))


def test_ranges_are_told_and_refuse_nothing_a_row_beyond_them_means_what_it_meant():
    unknown = Signature(NAMES)
    far = json.dumps({'inputs': [{**TENSOR, 'data': [-1e9, 7, 99]}]}).encode()
    for body in (USUAL, far):
        rows = [decode_oip(body, {}, each, LIMITS).X for each in (SIGNATURE, unknown)]
        assert rows[0].tobytes() == rows[1].tobytes()
    assert (count_outside(rows[0], SIGNATURE.ranges), unknown.ranges) == (3, None)
    assert 'parameters' not in describe_metadata(replace(MODEL, signature=unknown), [])
    paths = DOCUMENT['paths']['/v2/models/{model}/infer']['post']
    example = paths['requestBody']['content']['application/json']['examples']['example 0']
    assert example['value']['inputs'][0]['data'] == [12.375, 0.5, 11.5]


# Time and memory of what is made to take both
BOMB = gzip.compress(bytes(300 * 2**20), 9) if DEEP else gzip.compress(bytes(30 * 2**20), 9)
COSTLY = {
    'a zip bomb': ('gzip', BOMB),
    'empty parts of a gzip file': ('gzip', gzip.compress(b'') * 50_000),
    'brackets': ('oip', b'[' * 2**20),
    'brackets in a field': ('oip', b'{"inputs":' + b'[' * (2**20 - 20)),
    'backslashes': ('json', b'{"a": "' + b'\\' * (2**20 - 20)),
    'digits': ('oip', USUAL.replace(b'21.5', b'1' * (2**20 - 200))),
    'digits of a fraction': ('mlflow', SPLIT.replace(b'21.5', b'0.' + b'1' * (2**20 - 200))),
    'small numbers': ('oip', USUAL.replace(b'21.5', b'0,' * (2**19 - 200) + b'0')),
    'fields': ('json', b'{' + b','.join(b'"%d":0' % k for k in range(80_000)) + b'}'),
    'columns': ('csv', b','.join(b'%d' % k for k in range(100_000)) + b'\n1'),
    'lines': ('csv', b'wind\n' + b'1\n' * 400_000),
    'a long field': ('csv', b'wind\n"' + b'1' * (2**20 - 100)),
    'inputs': ('oip', b'{"inputs": [' + b'{},' * 300_000 + b'{}]}'),
    'texts': ('oip binary', HEAD.replace(b'FP32', b'BYTES').ljust(len(HEAD)) + bytes(2**19)),
}


@pytest.mark.parametrize('case', COSTLY)
def test_a_costly_body_costs_no_more_than_it_is_long(case):
    decoder, body = COSTLY[case]
    start = time.process_time()
    tracemalloc.start()
    try:
        refused_or_read(decoder, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 4
    assert peak < 100 * 2**20


def test_a_compressed_answer_is_the_answer():
    answer = encode_oip(oip(USUAL), Scores(np.full(400, 0.25)), 'late', '1')
    packed = compress(answer, 'gzip, deflate')
    assert decompress(packed.body, 'gzip', LIMITS) == answer.body
    assert len(packed.body) < len(answer.body) / 4


def test_decoders_import_little():
    code = (
        'import sys, mlref.oip, mlref.mlflow_protocol, mlref.oip_metadata; print([m for m in'
        ' ("torch", "mlflow", "polars", "pandas", "matplotlib", "starlette", "pydantic")'
        ' if m in sys.modules])'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert run.stdout.strip() == '[]', run.stdout + run.stderr


# Other people's clients


@pytest.fixture(scope='module')
def address():
    with protocol_server.running() as found:
        yield found


@pytest.fixture(scope='module')
def client(address):
    found = triton.InferenceServerClient(address)
    yield found
    found.close()


VECTORS = np.array([[21.5, np.nan, 8], [-3, 12.25, 17]], 'f4')


def tensor_of(array: np.ndarray, name: str = 'X', binary: bool = True) -> triton.InferInput:
    found = triton.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    found.set_data_from_numpy(array, binary_data=binary)
    return found


@pytest.mark.parametrize('request_encoding', [None, 'gzip', 'deflate'])
@pytest.mark.parametrize('answer_encoding', [None, 'gzip'])
def test_triton_client_as_it_is(client, request_encoding, answer_encoding):
    found = client.infer(
        'late',
        [tensor_of(VECTORS)],
        request_id='a7',
        request_compression_algorithm=request_encoding,
        response_compression_algorithm=answer_encoding,
    )
    assert found.as_numpy('p').tolist() == score(VECTORS).p.tolist()
    assert found.as_numpy('calibrated').tolist() == score(VECTORS).calibrated.tolist()
    assert found.get_response()['id'] == 'a7'


def test_triton_client_in_json_by_feature_and_by_version(client):
    whole = np.array([[1, 2, 3]], 'f4')
    wanted = [triton.InferRequestedOutput('p', binary_data=False)]
    by_json = client.infer('late', [tensor_of(whole, binary=False)], outputs=wanted)
    assert by_json.get_response()['outputs'][0]['data'] == score(whole).p.tolist()
    columns = [
        tensor_of(np.array([1.0]), 'temperature'),
        tensor_of(np.array([2]), 'wind'),
        tensor_of(np.array([[b'3']], np.object_), 'hour'),
    ]
    by_name = client.infer('late', columns[::-1], model_version=MODEL.version)
    assert by_name.as_numpy('p').tolist() == score(whole).p.tolist()
    half = client.infer('late', [tensor_of(whole.astype('f2'))])
    assert half.as_numpy('p').tolist() == score(whole).p.tolist()


def test_triton_client_is_told_in_a_sentence(client):
    odd = VECTORS.astype('f8') + 1e-12
    for inputs, says in (
        ([tensor_of(odd)], 'FP64 that float32 carries exactly'),
        ([tensor_of(VECTORS[:, :2])], 'shape [rows, 3]'),
        ([tensor_of(VECTORS, 'input-0')], "got 'input-0'"),
    ):
        with pytest.raises(InferenceServerException, match='expected') as error:
            client.infer('late', inputs)
        assert says in error.value.message()
    with pytest.raises(InferenceServerException, match='a model among late'):
        client.infer('early', [tensor_of(VECTORS)])


def test_triton_client_asks_what_there_is(client):
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready('late')
    assert 'binary_tensor_data' in client.get_server_metadata()['extensions']
    assert client.get_model_metadata('late')['inputs'][0]['shape'] == [-1, WIDTH]
    config = client.get_model_config('late')
    assert config['input'][0]['dims'] == [WIDTH]
    ranges = client.get_model_metadata('late')['parameters']['ranges']
    assert config['parameters']['ranges'] == {'string_value': ranges}
    assert decode_ranges(json.loads(ranges), NAMES) == SIGNATURE.ranges
    assert client.get_model_repository_index()[0]['state'] == 'READY'
    assert client.get_inference_statistics('late')['model_stats'][0]['name'] == 'late'
    client.load_model('late')
    client.unload_model('late')
    with pytest.raises(InferenceServerException, match='a load without config'):
        client.load_model('late', config='{}')


def test_mlflow_client_as_it_is(address):
    host, port = address.split(':')
    frame = pd.DataFrame(VECTORS, columns=NAMES).assign(carrier='UA')
    found = ScoringServerClient(host, int(port)).invoke(frame[[*frame.columns[::-1]]])
    assert found['predictions'] == score(VECTORS).p.tolist()
    assert found['ignored'] == ['carrier']
    rows = frame.to_csv(index=False).encode()
    assert table(rows, 'text/csv').X.tobytes() == VECTORS.tobytes()


# Bodies in CSV and in binary have no schema; what is fuzzed of them stands above
SCHEMAS = deepcopy(DOCUMENT)
for path in SCHEMAS['paths'].values():
    content = path.get('post', {}).get('requestBody', {}).get('content', {})
    for kind in [*content]:
        if kind != JSON:
            del content[kind]
# what the schema allows and still cannot be scored together: values and parts that do not agree
CHECKS = {
    'positive_data_acceptance': {'expected-statuses': ['2xx', '422']},
    'negative_data_rejection': {'expected-statuses': ['400', '404', '405', '413', '415', '422']},
}
CONFIG = SchemathesisConfig.from_dict({'checks': CHECKS})
schema = schemathesis.openapi.from_dict(SCHEMAS, config=CONFIG)
bodies_of = settings(
    max_examples=500 if DEEP else 8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


sent = schema.include(method='POST')
if not DEEP:
    sent = sent.exclude(path_regex='versions')  # the same bodies as without one


@sent.parametrize()
@bodies_of
def test_the_document_is_true_of_what_is_sent(case, address):
    case.call_and_validate(base_url=f'http://{address}')


@schema.include(method='GET').parametrize()
@settings(bodies_of, max_examples=500 if DEEP else 3)
def test_the_document_is_true_of_what_is_asked(case, address):
    case.call_and_validate(base_url=f'http://{address}')


# The server that mlref ships, in processes of its own


def test_other_clients_and_the_server_of_this_package(served):
    rows = VECTORS[:, : len(served.names)]
    host, port = served.address
    client = triton.InferenceServerClient(f'{host}:{port}')
    model = served.infer.split('/')[3]
    found = client.infer(
        model,
        [tensor_of(rows)],
        request_id='a7',
        request_compression_algorithm='gzip',
        response_compression_algorithm='gzip',
    )
    assert np.allclose(found.as_numpy('p'), served.scores(rows), rtol=1e-6)
    assert found.get_response()['id'] == 'a7'
    assert client.is_model_ready(model) and client.get_model_repository_index()
    client.close()
    frame = pd.DataFrame(rows, columns=served.names)
    answer = ScoringServerClient(host, port).invoke(frame)
    assert np.allclose(answer['predictions'], served.scores(rows), rtol=1e-6)
