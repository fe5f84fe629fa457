"""The least that this server does: MODEL PORT hello|bare FOLDER

Its connections and its batches, without anything that stands between them in `mlref serve`: `hello`
reads a request and answers always the same; `bare` scores it in the batch of whatever came while
the last batch ran, and checks, counts and keeps nothing.
"""

import asyncio
import sys
from pathlib import Path

import msgspec
import numpy as np
import uvloop
from serve_model import arguments, open_scorer

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from mlref.batching import Batcher
from mlref.connections import HttpServer, listen
from mlref.protocols import Reply
from mlref.requests import Request


class Row(msgspec.Struct):
    features: list[float]


decode = msgspec.json.Decoder(Row).decode
encode = msgspec.json.Encoder().encode


def make_reply(found) -> Reply:
    body = encode(found)
    lines = b'content-type: application/json\r\ncontent-length: %d\r\n' % len(body)
    return Reply(200, lines, body)


class Hello:
    "Answers always the same"

    patience = 1.0

    def room(self) -> int:
        return 512

    def begin(self, scope) -> Request:
        return Request(scope)

    def answer(self, request):
        return make_reply({'p': 0.5})

    def finish(self, request, answered, left=False) -> Reply:
        return make_reply({'p': answered.result().item()})

    def leave(self, request) -> None:
        pass


class Bare(Hello):
    "Answers with a score"

    def __init__(self, model: str):
        self.batcher = Batcher(open_scorer(model))

    def answer(self, request):
        X = np.array([decode(request.body).features], np.float32)
        return self.batcher.submit(X, float('inf'))


async def main() -> None:
    model, port, (kind, _) = arguments()
    app = Hello() if kind == 'hello' else Bare(model)
    await HttpServer(app).run(listen('127.0.0.1', port), asyncio.Event())


uvloop.run(main())
