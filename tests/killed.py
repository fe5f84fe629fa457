"""Processes of a test that die at a chosen call to MLflow"""

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from mlref.registry import Registry


def kill_at_call(
    dies: Callable[[Sequence[Any]], bool],  # Method and arguments of a call: whether it is the last
) -> None:
    "From now on this process kills itself before a call that `dies` picks"
    real = Registry.call

    def call(self, method, *args, **kwargs):
        if dies([method, *args]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, method, *args, **kwargs)

    Registry.call = call


def kill_at_number(
    k: int,  # From 0
) -> None:
    "From now on this process kills itself before its k-th call to MLflow"
    calls = iter(range(10**6))
    kill_at_call(lambda call: next(calls) == k)
