"""A small server of the protocols, so that other people's clients meet a real one

Three features, a model that is a formula, no store and no log: what it answers by is mlref's.
"""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import uvicorn

from mlref.feature_ranges import FeatureRanges
from mlref.mlflow_protocol import decode_mlflow, encode_mlflow
from mlref.oip import decode_oip, encode_oip
from mlref.oip_metadata import (
    ModelState,
    ModelStatistics,
    check_load,
    describe_config,
    describe_metadata,
    describe_oip_server,
    describe_readiness,
    describe_statistics,
    find_model,
    index_models,
)
from mlref.openapi import OPERATIONS, ServedApi, describe_api
from mlref.protocols import (
    Answer,
    Limits,
    RequestError,
    Scores,
    Signature,
    compress,
    decompress,
    encode_error,
)

RANGES = FeatureRanges((-15.5, None, 0.0), (40.25, None, 23.0))
SIGNATURE = Signature(('temperature', 'wind', 'hour'), ranges=RANGES)
LIMITS = Limits(max_body_bytes=2**20, max_rows=64)
MODEL = ModelState('late', '3fa1', SIGNATURE, calibrated=True)
NOT_HERE = ('predict', 'events', 'metrics', 'ping', 'version')
SERVED = tuple(each for each in OPERATIONS if each.path.rpartition('/')[2] not in NOT_HERE)
DOCUMENT = describe_api(ServedApi(MODEL, {}, (), (), LIMITS), SERVED)
Headers = dict[bytes, bytes]


def score(
    X: np.ndarray,  # float32 (rows, features)
) -> Scores:
    "A formula of each row"
    p = 0.5 + 0.5 * np.tanh(np.nansum(X, axis=1, dtype=np.float64) / 100)
    return Scores(p, p / 2, 'c0ffee')


def as_json(value: object) -> Answer:
    return Answer(json.dumps(value).encode())


def infer(body: bytes, headers: Headers) -> Answer:
    kind = headers.get(b'content-type', b'').partition(b';')[0]
    # Triton's client sends none
    if kind not in (b'', b'application/json', b'application/octet-stream'):
        raise RequestError(415, f'expected Content-Type application/json, got {kind!r}')
    request = decode_oip(body, headers, SIGNATURE, LIMITS)
    return encode_oip(request, score(request.X), MODEL.name, MODEL.version)


def invoke(body: bytes, headers: Headers) -> Answer:
    kind = headers.get(b'content-type', b'').decode('latin-1')
    request = decode_mlflow(body, kind, SIGNATURE, LIMITS)
    return encode_mlflow(request, score(request.X))


def load(body: bytes, headers: Headers) -> Answer:
    check_load(body, LIMITS)
    return as_json({'model_version': MODEL.version})


def state(value: object) -> Callable[[bytes, Headers], Answer]:
    "What always answers with the same"
    return lambda body, headers: as_json(value)


STATISTICS = describe_statistics([ModelStatistics(name=MODEL.name, version=MODEL.version)])
HANDLERS = {
    '/v2/models/{model}/infer': infer,
    '/invocations': invoke,
    '/v2/repository/index': lambda body, headers: as_json(index_models([MODEL], body, LIMITS)),
    '/v2/repository/models/{model}/load': load,
    '/v2/repository/models/{model}/unload': load,
    '/v2': state(describe_oip_server('0')),
    '/v2/health/live': state({'live': True}),
    '/v2/health/ready': state({'ready': True}),
    '/health/live': state({'live': True}),
    '/health/ready': state({'ready': True}),
    '/v2/models/{model}': state(describe_metadata(MODEL, [MODEL.version])),
    '/v2/models/{model}/ready': state(describe_readiness(MODEL)),
    '/v2/models/{model}/config': state(describe_config(MODEL, LIMITS)),
    '/v2/models/{model}/stats': state(STATISTICS),
    '/v2/models/stats': state(STATISTICS),
    '/openapi.json': state(DOCUMENT),
}
METHODS = {each.path: each.method.upper() for each in SERVED}


def route(path: str) -> str:
    "The template of a path; raises `RequestError`"
    if path in HANDLERS:
        return path
    parts = path.strip('/').split('/')
    at = parts.index('models') + 1 if 'models' in parts else len(parts)
    if len(parts) > at:
        versioned = parts[at + 1 : at + 2] == ['versions'] and len(parts) > at + 2
        find_model([MODEL], parts[at], parts[at + 2] if versioned else None)
        rest = parts[at + 3 :] if versioned else parts[at + 1 :]
        template = '/'.join(['', *parts[:at], '{model}', *rest])
        if template in HANDLERS:
            return template
    raise RequestError(404, f'expected a path of the document, got {path!r:.60}')


def answer(scope: dict, body: bytes) -> tuple[int, Answer]:
    "Status and answer of a request"
    headers = dict(scope['headers'])
    try:
        path = route(scope['path'])
        if scope['method'] != METHODS[path]:
            refused = encode_error(RequestError(405, f'expected {METHODS[path]} of {path}'))
            return 405, Answer(refused.body, (*refused.headers, (b'allow', METHODS[path].encode())))
        encoding = headers.get(b'content-encoding', b'').decode('latin-1')
        found = HANDLERS[path](decompress(body, encoding, LIMITS), headers)
    except RequestError as error:
        return error.status, encode_error(error)
    accepted = headers.get(b'accept-encoding', b'').decode('latin-1')
    return 200, compress(found, accepted)


async def app(scope: dict, receive: Callable, send: Callable) -> None:
    "The application, by ASGI"
    body = b''
    more = True
    while more:
        message = await receive()
        body += message.get('body', b'')
        more = message.get('more_body', False)
    status, found = answer(scope, body)
    headers = [*found.headers, (b'content-length', str(len(found.body)).encode())]
    await send({'type': 'http.response.start', 'status': status, 'headers': headers})
    await send({'type': 'http.response.body', 'body': found.body})


@contextmanager
def running() -> Iterator[str]:
    "The server in a thread; its address"
    with socket.create_server(('127.0.0.1', 0)) as listening:
        config = uvicorn.Config(
            app, log_level='error', access_log=False, lifespan='off', timeout_graceful_shutdown=5
        )
        server = uvicorn.Server(config)
        work = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        work.start()
        try:
            yield f'127.0.0.1:{listening.getsockname()[1]}'
        finally:
            server.should_exit = True
            work.join()
