"""Failures are not counted as answers"""

import json
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.capacity import answer_rate, read_load_report, run_load_step
from mlref.core import MlrefError

COUNT = st.integers(0, 5000)


def counted(name: str, requests: int, failures: int = 0) -> dict:
    return {
        'name': name,
        'num_requests': requests,
        'num_failures': failures,
        'start_time': 0.0,
        'last_request_timestamp': 10.0,
        'response_times': {'5': requests},
    }


@given(COUNT, COUNT, COUNT)
@settings(max_examples=300, deadline=None)
def test_a_rate_is_of_successes(answered, refused, broken):
    "However the failures are booked: under a name of their own, or under the same one"
    rows = [counted('/predict', answered + refused, refused), counted('failed', broken, broken)]
    try:
        found, errors = read_load_report(json.dumps(rows), 'refused', 'http://x')
    except MlrefError as error:
        assert answered == 0 and 'expected answers from http://x, got none' in str(error)
        return
    assert answer_rate(found) == answered / 10 and errors == refused + broken


@pytest.mark.parametrize(
    'text', ['', 'x', '[]', '[{}]', '7', 'null', '[{"name": "/"}]', '{"a": 1}']
)
def test_no_numbers_are_an_error(text):
    with pytest.raises(MlrefError, match='expected'):
        read_load_report(text, 'no locust', 'http://x')


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        return taken.getsockname()[1]


def test_a_load_on_nobody_is_an_error_with_what_the_network_said():
    with pytest.raises(MlrefError, match='got none and .* errors: .*refused'):
        run_load_step(f'http://127.0.0.1:{free_port()}', ['{}'], users=2, seconds=1, pid=0)


def answer_every_second(listening: socket.socket, told: list[bool]) -> None:
    "200 to every other request, 503 to the rest; one request a connection"
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        told.append(len(told) % 2 == 0)
        status = b'200 OK' if told[-1] else b'503 Busy'
        with connection:
            connection.recv(65536)
            connection.sendall(
                b'HTTP/1.1 %s\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}' % status
            )


def test_what_is_not_answered_is_an_error_and_no_part_of_the_rate():
    told: list[bool] = []
    with socket.create_server(('127.0.0.1', 0)) as listening:
        threading.Thread(target=answer_every_second, args=(listening, told), daemon=True).start()
        port = listening.getsockname()[1]
        step = run_load_step(f'http://127.0.0.1:{port}', ['{}'], users=1, seconds=2, pid=0)
    refused = told.count(False)
    assert refused > 10 and abs(step.errors - refused) <= 5
    # the first and the last answer are at least half a second apart
    assert 0 < step.rate < 2 * told.count(True)
