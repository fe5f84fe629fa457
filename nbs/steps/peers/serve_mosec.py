"""mosec: MODEL PORT bare|full FOLDER

`bare` scores; `full` does in the handler what a server in production does: it checks names, type,
shape and numbers, gives each request an id, assigns it to a variant by a salted hash, counts, and
has every prediction on disk before it is answered, with one write a batch.
"""

import hashlib
import os
import sys
import time
import uuid
from pathlib import Path

import msgspec
import numpy as np
from mosec import Server, ValidationError, Worker
from mosec.errors import DecodingError
from serve_model import arguments, open_scorer

COLUMNS = 132
CANDIDATE = 0.0  # share of the requests


class Row(msgspec.Struct):
    features: list[float]


class Tensor(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, int]
    data: list[float | None]


class InferRequest(msgspec.Struct):
    inputs: tuple[Tensor]
    id: str = ''


def decode_with(decoder, body: bytes):
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise DecodingError(str(error)) from None


class Bare(Worker):
    def __init__(self):
        self.score = open_scorer(os.environ['SERVED_MODEL'])
        self.decoder = msgspec.json.Decoder(Row)

    def deserialize(self, data):
        return decode_with(self.decoder, data).features

    def serialize(self, data):
        return msgspec.json.encode(data)

    def forward(self, data):
        return [{'p': p} for p in self.score(np.array(data, np.float32)).tolist()]


class Full(Worker):
    def __init__(self):
        self.score = open_scorer(os.environ['SERVED_MODEL'])
        self.decoder = msgspec.json.Decoder(InferRequest)
        file = Path(os.environ['SERVED_LOG'])
        file.parent.mkdir(parents=True, exist_ok=True)
        self.log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.counts = {'requests': 0, 'rows': 0, 'champion': 0, 'candidate': 0}
        self.encode = msgspec.json.Encoder().encode

    def deserialize(self, data):
        request = decode_with(self.decoder, data)
        (tensor,) = request.inputs
        if tensor.name != 'X' or tensor.datatype not in ('FP32', 'FP64'):
            raise ValidationError(f'expected a tensor X of FP32, got {tensor.name!r:.40}')
        if tensor.shape != (1, COLUMNS) or len(tensor.data) != COLUMNS:
            raise ValidationError(f'expected shape [1, {COLUMNS}], got {tensor.shape!r:.40}')
        row = np.array(tensor.data, np.float64).astype(np.float32)
        if np.isinf(row).any():
            raise ValidationError('expected numbers that fit into float32, got larger ones')
        return request.id or uuid.uuid4().hex, row

    def serialize(self, data):
        return self.encode(data)

    def assign(self, unit: str) -> str:
        point = hashlib.blake2b(f'rollout:{unit}'.encode(), digest_size=8).digest()
        share = int.from_bytes(point, 'big') / 2**64
        variant = 'candidate' if share < CANDIDATE else 'champion'
        self.counts[variant] += 1
        return variant

    def forward(self, data):
        scores = self.score(np.stack([row for _, row in data])).tolist()
        now = time.time()
        answers = []
        kept = []
        for (name, _), p in zip(data, scores, strict=True):
            kept.append({'id': name, 'variant': self.assign(name), 'p': p, 'answered_at': now})
            output = {'name': 'p', 'datatype': 'FP64', 'shape': [1], 'data': [p]}
            answers.append({'model_name': 'late', 'id': name, 'outputs': [output]})
        os.write(self.log, b''.join(self.encode(row) + b'\n' for row in kept))
        os.fdatasync(self.log)
        self.counts['requests'] += len(data)
        self.counts['rows'] += len(data)
        return answers


if __name__ == '__main__':
    model, port, (kind, folder) = arguments()
    os.environ |= {'SERVED_MODEL': model, 'SERVED_LOG': f'{folder}/predictions.jsonl'}
    # its own command line is read by mosec, also in the processes that it starts
    sys.argv[1:] = ['--address', '127.0.0.1', '--port', str(port), '--timeout', '30000']
    server = Server()
    worker = Bare if kind == 'bare' else Full
    server.append_worker(worker, num=1, max_batch_size=32, max_wait_time=1)
    server.run()
