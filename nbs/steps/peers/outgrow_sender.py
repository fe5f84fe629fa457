"Events sent at a rate, and what became of them: how many a second were in the lake, and when"

import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from peers.serve_machine import memory_of
from peers.talk import Peer

from mlref.log import Log

PARTS = 4
EVERY = 0.02  # seconds between two batches of a sender


class Sent(NamedTuple):
    "A batch that was sent"

    part: int
    end: int  # offset behind it
    due: float  # when it was to be sent; a sender that is late has waited, too
    acknowledged: float


def send_at_rate(
    log: Log,
    messages: list[bytes],
    rate: float,  # messages a second
) -> list[Sent]:
    "A batch every while, to each partition in turn, whether or not anybody keeps up"
    size = round(rate * EVERY)
    ends = [0] * PARTS
    begun = time.monotonic()
    found = []
    for i, at in enumerate(range(0, len(messages), size)):
        due = begun + i * EVERY
        time.sleep(max(0.0, due - time.monotonic()))
        part = i % PARTS
        batch = messages[at : at + size]
        _ = log.append('events', batch, part)
        ends[part] += len(batch)
        found.append(Sent(part, ends[part], due, time.monotonic()))
    return found


def waits_of(
    sent: list[Sent],
    taken: list[tuple[int, int, float]],  # partition, offset behind what was committed, when
) -> list[float]:  # seconds, of each batch
    "From the moment a batch was due until all of it is in the lake"
    found = []
    for batch in sent:
        moments = [at for part, end, at in taken if part == batch.part and end >= batch.end]
        found.append(min(moments) - batch.due)
    return found


def carried_rate(
    taken: list[tuple[int, int, float]],  # as of `waits_of`, in order
    begun: float,  # when the first batch was due
    rate: float,  # events sent a second
) -> float:  # events a second
    "How quickly the lake grew, by least squares over its commits, at most as events were sent"
    ends: dict[int, int] = {}
    totals = []  # events in the lake, with each commit
    for part, end, _ in taken:
        ends[part] = end
        totals.append(sum(ends.values()))
    moments = np.array([at for _, _, at in taken]) - begun
    if len(taken) == 1:
        return min(rate, totals[0] / float(moments[0]))
    slope, _ = np.polyfit(moments, totals, 1)
    return min(rate, float(slope))


def measure_rate(
    follower: Peer,  # `outgrow_log.py`
    log: Log,
    question: dict,  # where the log and the new lake are
    messages: list[bytes],
    rate: float,  # messages a second that are sent
) -> dict[str, object]:
    "One round: carried a second, seconds until acknowledged and in the lake, CPU and memory"
    answer = follower.ask(op='open', parts=PARTS, **question)
    assert 'error' not in answer, answer
    with ThreadPoolExecutor(1) as pool:
        begun = time.process_time()
        coming = pool.submit(follower.ask, op='follow', events=len(messages))
        sent = send_at_rate(log, messages, rate)
        sender = time.process_time() - begun
        said = coming.result()
    assert said.get('events') == [len(messages)] * 2, said  # all of them, each once
    waits = waits_of(sent, said['taken'])
    told = [batch.acknowledged - batch.due for batch in sent]
    return {
        'rate': carried_rate(said['taken'], sent[0].due, rate),
        'p50': float(np.median(waits)),
        'p99': float(np.quantile(waits, 0.99)),
        'told_p50': float(np.median(told)),
        'told_p99': float(np.quantile(told, 0.99)),
        'cpu': (said['cpu'] + sender) / len(messages),
        'memory': memory_of(follower.p.pid),
    }
