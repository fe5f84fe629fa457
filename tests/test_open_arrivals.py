"Open arrivals: requests come at their moments, and an answer takes as long as it is after its own"

import json
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mlref.serving_state import read_messages, read_notes
from server_fixture import start_copy

STEPS = Path(__file__).parent.parent / 'nbs' / 'steps'
sys.path.insert(0, str(STEPS))
from peers.serve_open import (
    Arrivals,
    OpenClient,
    Stretch,
    draw_moments,
    make_requests,
    read_answer,
    request_id,
)
from peers.serve_open_rows import arrival_rows, join_rounds, lost_ids, send_arrivals

sys.path.remove(str(STEPS))

ONE = np.array([[3, 2.5]], np.float32)


def test_moments_are_drawn_beforehand_with_the_rate_of_each_stretch():
    stretches = [Stretch('before', 100.0, 5.0), Stretch('crowd', 3000.0, 2.0)]
    moments = draw_moments(stretches, seed=1)
    assert (np.diff(moments) >= 0).all() and moments[-1] < 7
    assert (moments < 5).sum() == pytest.approx(500, rel=0.2)
    assert (moments >= 5).sum() == pytest.approx(6000, rel=0.1)
    gaps = np.diff(moments[moments >= 5])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of a Poisson process
    assert (draw_moments(stretches, seed=1) == moments).all()


def test_an_answer_is_read_when_all_of_it_is_there():
    head = b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\nRetry-After: 1\r\n\r\n'
    assert [read_answer(part) for part in (b'', head[:30], head, head + b'{')] == [None] * 4
    assert read_answer(head + b'{}') == (503, True)
    assert read_answer(b'HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n') == (200, False)


@pytest.fixture(scope='module')
def own(served, tmp_path_factory):
    "A server that may be stopped"
    folder = tmp_path_factory.mktemp('open') / 'server'
    with start_copy(served, folder) as (running, _):
        yield running, folder


def test_who_comes_while_a_server_stands_still_has_waited_since_he_came(own, tmp_path):
    "One connection that waits for its answer would have seen a single slow one"
    server, folder = own
    bodies = tmp_path / 'bodies.jsonl'
    bodies.write_text(json.dumps(server.tensor(ONE)) + '\n')
    (worker,) = [note.pid for note in read_notes(folder)]
    began = time.monotonic()

    def hold_up():
        time.sleep(1.5)
        os.kill(worker, signal.SIGSTOP)
        time.sleep(1.0)
        os.kill(worker, signal.SIGCONT)

    holding = threading.Thread(target=hold_up)
    holding.start()
    place = SimpleNamespace(port=server.address[1])
    found = send_arrivals(place, server.infer, bodies, [Stretch('all', 60.0, 4.0)], most=200)
    holding.join()
    assert time.monotonic() - began > 3.9
    assert set(found.status.tolist()) == {200}
    assert ((found.took > 0.2) & (found.took < 1.5)).sum() > 25  # of about 60 in that second
    written = {row['request_id'] for row in read_messages(folder, 'vectors')}
    assert lost_ids(found, written) == []
    assert lost_ids(found, written - {request_id(7)}) == [request_id(7)]


def test_a_connection_that_breaks_is_an_answer_that_never_came():
    with socket.create_server(('127.0.0.1', 0)) as listening:

        def break_all():
            for _ in range(3):
                listening.accept()[0].close()

        breaking = threading.Thread(target=break_all)
        breaking.start()
        requests = make_requests('localhost', '/', [b'{"inputs": []}'])
        moments = np.array([0.0, 0.2, 0.4])
        found = OpenClient(listening.getsockname(), requests, moments, most=10).run()
        breaking.join()
    assert found.status.tolist() == [0, 0, 0] and np.isnan(found.took).all()


STRETCHES = [Stretch('before', 100, 10.0), Stretch('crowd', 300, 10.0), Stretch('after', 100, 10.0)]


def crowded():
    "A server of 100 answers a second that refuses what is too much, at once and with advice"
    moments = draw_moments(STRETCHES)
    n = len(moments)
    crowd = (moments >= 10) & (moments < 20)
    refused = crowd & (np.arange(n) % 3 > 0)
    return Arrivals(
        moments=moments,
        status=np.where(refused, 503, 200),
        took=np.where(crowd, 0.1, 0.01),
        behind=np.full(n, 0.001),
        advised=refused,
    )


def held(found, lost=0):
    rows = arrival_rows(found, STRETCHES, peak=100, deadline=0.25, lost=lost)
    return {row['name'].partition(': ')[2]: row['held'] for row in rows}


FAULTS = {
    'goodput, share of the peak': {'took': 0.3},
    'p99 of the accepted over the deadline': {'took': 0.3},
    'refused without Retry-After': {'advised': False},
    'neither answered nor refused': {'status': 500},
}


def test_a_row_for_each_promise_fails_by_its_own_fault():
    found = crowded()
    fine = held(found)
    assert list(fine.values()) == [True] * 7
    crowd = (found.moments >= 10) & (found.moments < 20)
    for name, changed in FAULTS.items():
        fields = {
            key: np.where(crowd, value, getattr(found, key)) for key, value in changed.items()
        }
        assert held(replace(found, **fields))[name] is False, name
    assert held(found, lost=1)['accepted and not in the log'] is False
    later = found.moments > 21
    slow = replace(found, took=np.where(later, 0.05, found.took))
    assert held(slow)['a second after it: p99 over that before'] is False
    closed = replace(found, status=np.where(later, 503, found.status))
    assert held(closed)['from a second after it on: refused'] is False


def test_what_must_never_be_is_counted_over_all_rounds():
    fine = arrival_rows(crowded(), STRETCHES, 100, 0.25, lost=0)
    once = arrival_rows(crowded(), STRETCHES, 100, 0.25, lost=1)
    rows = {row['name'].partition(': ')[2]: row for row in join_rounds([fine, once, fine])}
    lost = rows['accepted and not in the log']
    assert (lost['ours'], lost['held'], lost['n_runs']) == (1, False, 3)
    assert rows['goodput, share of the peak']['held'] is True
