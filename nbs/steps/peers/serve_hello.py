"""The least that an ASGI server does: MODEL PORT hello|bare FOLDER

`hello` reads a request and answers always the same; `bare` scores it in the batch of whatever came
while the last batch ran, and checks, counts and keeps nothing.
"""

import asyncio

import msgspec
import numpy as np
import uvicorn
from serve_model import arguments, open_scorer

MOST = 64  # rows of a batch
HEADERS = [(b'content-type', b'application/json')]


class Row(msgspec.Struct):
    features: list[float]


decode = msgspec.json.Decoder(Row).decode


class Batcher:
    "What queued while the last batch ran is the next batch"

    def __init__(self, score):
        self.score = score
        self.waiting = []
        self.running = False

    def submit(self, row: list[float]) -> asyncio.Future:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((row, future))
        self._start()
        return future

    def _start(self):
        if self.waiting and not self.running:
            self.running = True
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self):
        now = self.waiting[:MOST]
        self.waiting = self.waiting[MOST:]
        scores = self.score(np.array([row for row, _ in now], np.float32)).tolist()
        for (_, future), p in zip(now, scores, strict=True):
            if not future.done():
                future.set_result(p)
        self.running = False
        self._start()


async def read_body(receive) -> bytes:
    body = b''
    more = True
    while more:
        event = await receive()
        body += event.get('body', b'')
        more = event.get('more_body', False)
    return body


async def follow_lifespan(receive, send) -> None:
    kind = ''
    while kind != 'lifespan.shutdown':
        kind = (await receive())['type']
        await send({'type': f'{kind}.complete'})


def make_app(answer):
    async def app(scope, receive, send):
        if scope['type'] == 'lifespan':
            await follow_lifespan(receive, send)
            return
        text = await answer(await read_body(receive))
        headers = [*HEADERS, (b'content-length', b'%d' % len(text))]
        await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
        await send({'type': 'http.response.body', 'body': text})

    return app


model, port, (kind, _) = arguments()
batcher = Batcher(open_scorer(model))


async def say_hello(body: bytes) -> bytes:
    return b'{"p":0.5}'


async def score_bare(body: bytes) -> bytes:
    return msgspec.json.encode({'p': await batcher.submit(decode(body).features)})


app = make_app(say_hello if kind == 'hello' else score_bare)
uvicorn.run(app, host='127.0.0.1', port=port, log_level='warning', access_log=False)
