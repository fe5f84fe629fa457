"""A rollout on a real server of two workers: shadow, half, all, and nothing fails on the way"""

import os
import time
from collections import Counter

import pytest

from mlref.cli_rollout import read_messages
from mlref.followers import ServeOptions
from mlref.promotion import promotions
from mlref.registry import Registry
from mlref.rollout import RolloutDecision, RolloutPolicy, Step, rollout_plan
from mlref.rollout_state import (
    begin_rollout,
    gather_evidence,
    require_rollout,
    scored_rows,
    sync_routing,
    take_decision,
)
from mlref.route import Router
from mlref.serving_state import laggards, read_notes, read_state
from server_fixture import Served, make_home, start_process, wait_gone

POLICY = RolloutPolicy(steps=(Step(0.0, 0, 0), Step(0.5, 0, 0)))
ADVANCE = RolloutDecision('advance', 'no alarm')
PROMOTE = RolloutDecision('promote', 'not worse')


@pytest.fixture(scope='module')
def rolling(tmp_path_factory):
    "A server of its own: what is promoted here is nobody else's champion"
    from small import FEATURES

    home = tmp_path_factory.mktemp('rolling')
    versions = make_home(home)
    options = ServeOptions('small:TASK', str(home), str(home / 'served'), port=0, workers=2)
    process, url = start_process(options)
    yield Served(url, home, process.pid, tuple(versions), FEATURES.names)
    os.kill(process.pid, 15)
    wait_gone(process.pid)


def opened(rolling):
    return Registry(rolling.home / 'registry', name='late-visits')


def wait_for(condition, what, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f'expected {what} within {seconds} s'
        time.sleep(0.05)


def routed(rolling):
    "Let the workers follow the log"
    epoch = sync_routing(opened(rolling), rolling.folder)
    notes = lambda: read_notes(rolling.folder)  # noqa: E731
    wait_for(lambda: len(notes()) == 2 and not laggards(notes(), epoch), f'epoch {epoch}')


def ask_all(rolling, **headers):
    "Which version answered each visit"
    found = {}
    for number in range(100):
        body = {'entities': [rolling.visit(number)]}
        status, content = rolling.post('/predict', body, **headers)
        assert status == 200, content
        found[f'v{number}'] = content['model_version']
    return found


def test_a_rollout_on_a_server(rolling):
    from small import TASK, find_labels, make_events

    champion, candidate = rolling.versions
    registry = opened(rolling)
    other = {'1': '2', '2': '1'}[promotions(registry)[-1].to]
    assert set(ask_all(rolling).values()) == {champion}

    standing = begin_rollout(registry, other, 0, 'gates passed', 'ann', POLICY)
    routed(rolling)
    wait_for(lambda: read_state(rolling.folder).candidate != '', 'a bundle of the candidate')
    routed(rolling)
    before = len(rolling.rows('shadows'))
    assert set(ask_all(rolling).values()) == {champion}  # a shadow answers nobody
    wait_for(lambda: len(rolling.rows('shadows')) >= before + 100, 'shadows of 100 visits')

    standing = take_decision(registry, require_rollout(registry), ADVANCE, 1)
    routed(rolling)
    router = Router(rollout_plan(standing.rollout))
    versions = {'champion': champion, 'candidate': candidate}
    planned = {f'v{n}': versions[router.assign(f'v{n}').variant] for n in range(100)}
    assert ask_all(rolling) == ask_all(rolling) == planned
    assert min(Counter(planned.values()).values()) > 30
    chosen = rolling.post('/predict', {'entities': [rolling.visit(3)]}, x_variant='candidate')
    assert chosen[1]['model_version'] == candidate

    written = [read_messages(rolling.folder, topic) for topic in ('predictions', 'shadows')]
    assert [row for row in written[0] if row.get('counted') is False][-1]['variant'] == 'candidate'
    events = make_events()
    labels = find_labels(events.filter(kind='end'), 9).rename({'visit': 'entity_id'})
    rows = scored_rows(*written, 0)
    now = 9 * 1440
    evidence = gather_evidence(standing.rollout, rows, labels, TASK.calendar, now)
    assert evidence.mature_days >= 1 and evidence.requests >= 30

    take_decision(registry, standing, PROMOTE, 2)
    routed(rolling)
    wait_for(lambda: set(ask_all(rolling).values()) == {candidate}, 'the new champion everywhere')
