"""A place for shared scores that hangs costs one client the bound, and no other a moment"""

import asyncio
import threading

from mlref import shared_scores
from mlref.shared_scores import SecondLevel


class Clock:
    "Stands still, but when it is moved"

    now = 100.0

    def monotonic(self):
        return self.now


class Hanging:
    def __init__(self):
        self.asked = 0
        self.is_asked, self.may_go_on = threading.Event(), threading.Event()

    def find(self, keys):
        self.asked += 1
        self.is_asked.set()
        self.may_go_on.wait()
        return [None] * len(keys)

    def keep(self, scores):
        pass


async def ask_at_the_bound(second, clock):
    told = []
    second.ask([('a', b'x')], told.append)
    assert second.store.is_asked.wait(60)  # by a thread
    clock.now += second.wait  # when the first question is given up, to the nanosecond
    second.ask([('a', b'y')], told.append)
    said = list(told)
    second.store.may_go_on.set()
    return said


def test_who_asks_when_the_first_is_given_up_is_told_at_once(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(shared_scores, 'time', clock)
    place = Hanging()
    second = SecondLevel(place, wait=0.5)
    assert asyncio.run(ask_at_the_bound(second, clock)) == [[None]]
    assert place.asked == 1
