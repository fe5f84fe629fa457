"""What a log keeps does not depend on a clock that jumps, and a clock shows a time or is refused"""

import json
import os
import time
from contextlib import closing, suppress
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref import cli
from mlref.core import MlrefError
from mlref.journaled_log import JournaledLog, append_together
from mlref.log import LocalLog
from mlref.log_care import Retention, surely_older, trim_log
from mlref.terminal import run_cli

DEEP = os.environ.get('MLREF_DEEP') == '1'
MANY = settings(max_examples=1000 if DEEP else 50, deadline=None, derandomize=not DEEP)
MESSAGES = [b'{"event_id": "%d"}' % i for i in range(1000)]

YEARS = 10 * 365 * 86_400


def append_daily(log, now, days, topic='t'):
    "A thousand messages a day, a block or more each"
    for _ in range(days):
        log.append(topic, MESSAGES[:1000])
        now[0] += 86_400


@pytest.mark.parametrize('written', [0, 3], ids=['it trims only', 'it has written too'])
@pytest.mark.parametrize('days', [1, 7, 60, 400])
def test_a_clock_that_stands_years_ahead_trims_nothing_unasked(written, days, tmp_path):
    now = [1.8e9]
    log = LocalLog(tmp_path / 'log', clock=lambda: now[0])
    append_daily(log, now, 10)
    now[0] += YEARS
    append_daily(log, now, written)
    policy = Retention(seconds=86_400 * days)
    if days > 1 or not written:
        with pytest.raises(MlrefError, match='a clock jumped, or nothing was added'):
            trim_log(log, 't', policy)
        assert log.start('t') == 0
    now[0] -= YEARS
    append_daily(log, now, 3)  # the clock was set right
    kept = trim_log(log, 't', policy)
    assert kept <= 1000 * max(13 + written - days, 0)
    now[0] += YEARS
    assert trim_log(log, 't', replace(policy, anyway=True)) > 9000
    log.close()


@given(
    times=st.lists(st.integers(0, 1000), min_size=1, max_size=40),
    seconds=st.integers(1, 400),
    ahead=st.integers(401, 10**9),
)
@MANY
def test_what_is_surely_older_does_not_depend_on_a_clock_that_jumps(times, seconds, ahead):
    now = max(times)
    times = [1000 * at for at in times]
    sure = surely_older(times, seconds, now)
    assert sure <= 1000 * (now - seconds)
    assert surely_older(times, seconds, now + ahead) == sure
    odd = [*times, 1000 * (now + ahead)]
    assert surely_older(odd, seconds, now + ahead) == sure
    steps = [b - a for a, b in pairwise(sorted(times))]
    if max(steps, default=0) <= 1000 * seconds and max(times) - min(times) >= 1000 * seconds:
        assert sure == 1000 * (now - seconds)


def test_a_topic_that_is_silent_goes_by_one_that_is_not(tmp_path):
    now = [1.8e9]
    log = LocalLog(tmp_path / 'log', clock=lambda: now[0])
    append_daily(log, now, 3, 'silent')
    append_daily(log, now, 30)
    week = Retention(seconds=7 * 86_400)
    assert trim_log(log, 'silent', week) == 2000
    assert trim_log(log, 't', week) == 23_000
    log.close()


@pytest.mark.parametrize(
    'shown', [float('nan'), float('inf'), -float('inf'), -1, 1.8e12, 1.8e18, None, '1.8e9', True]
)
def test_a_clock_that_shows_no_time_is_refused(shown, tmp_path):
    now = [1.8e9]
    log = LocalLog(tmp_path / 'log', clock=lambda: now[0])
    append_daily(log, now, 3)
    now[0] = shown
    for act in (
        lambda: log.append('t', MESSAGES[:1]),
        lambda: append_together(log, {'t': MESSAGES[:1]}),
        lambda: trim_log(log, 't', Retention(seconds=1)),
        lambda: trim_log(log, 't', Retention(size=1)),
    ):
        with pytest.raises(MlrefError, match='expected the clock of a log, in seconds since 1970'):
            act()
    assert (log.start('t'), log.end('t')) == (0, 3000)
    log.close()
    journaled = JournaledLog(tmp_path / 'other', clock=lambda: shown)
    with pytest.raises(MlrefError, match='expected the clock of a log'):
        journaled.append('t', MESSAGES[:1])
        journaled.empty_journal()
    with suppress(MlrefError):
        journaled.close()
    with closing(LocalLog(tmp_path / 'other', readonly=True)) as left:
        assert left.read('t', 0, 9) == MESSAGES[:1]  # what was accepted is there


def test_a_command_trims_no_log_by_a_step_and_begins_none(tmp_path, capsys):
    now = [time.time() - 40 * 86_400]
    for worker in ('0', '1'):
        with closing(LocalLog(tmp_path / 'served/logs' / worker, clock=lambda: now[0])) as log:
            append_daily(log, now, 3, 'predictions')
    line = ['log', 'trim', 'predictions', '--days', '7', '--log']
    assert run_cli(cli.app, [*line, str(tmp_path / 'served')]) == 1
    assert 'a clock jumped' in capsys.readouterr().err
    assert run_cli(cli.app, [*line, str(tmp_path / 'served'), '--anyway', '--json']) == 0
    assert [each['removed'] > 0 for each in json.loads(capsys.readouterr().out).values()] == [
        True,
        True,
    ]
    (tmp_path / 'none').mkdir()
    assert run_cli(cli.app, [*line, str(tmp_path / 'none')]) == 1
    assert [*(tmp_path / 'none').iterdir()] == []
