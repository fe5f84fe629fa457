"""Rollouts on a real server of two workers, moved by the commands that a timer and people use"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import polars as pl
import pytest

from mlref.core import format_time
from mlref.edges import hold_file_lock
from mlref.guardrails import check_guardrails
from mlref.promotion import promote, promotions
from mlref.publisher import ServeOptions, publish_champion
from mlref.registry import Registry
from mlref.rollout import rollout_plan
from mlref.rollout_state import gather_evidence, read_counts, require_rollout, scored_rows
from mlref.route import Router
from mlref.serving_state import laggards, read_messages, read_notes, read_state
from server_fixture import (
    VERSIONS,
    Served,
    make_home,
    nan_model,
    onnx_model,
    raising_model,
    slow_model,
    start_process,
    wait_gone,
    wrap_model,
)

LATER = '1970-01-05T00:00'  # the visits are of that week, the first 200 until its fifth day
BEFORE = '1970-01-04T23:00'  # what began then is another rollout than what begins later
BUSY = '1970-01-05T06:00'
END = '1970-01-09T00:00'
NEAR = (VERSIONS[0][0] + 0.01, VERSIONS[0][1])  # weights of a candidate that says nearly the same


class Rolling:
    "A run and a server of its own: what is promoted here is nobody else's champion"

    def __init__(self, home):
        from mlref.gates import Gate
        from mlref.lake import Lake, insert_rows
        from mlref.registry import TrainingRun, register_model
        from small import FEATURES, TASK, make_events

        self.home = home
        self.champion = make_home(home)[0]
        gates = [Gate('better_than_champion', True, 0.01, -0.003, '')]
        near = wrap_model(onnx_model(NEAR))
        self.candidate = near.version
        models = {
            'near': near,
            'nan': nan_model(),
            'raising': raising_model(),
            'slow': slow_model(8000),  # about 7 ms, where the champion takes less than a tenth
        }
        self.numbers = {
            name: register_model(self.registry, model, TrainingRun(model.version), FEATURES, gates)
            for name, model in models.items()
        }
        self.slow = models['slow'].version
        lake = Lake(home / 'lake' / 'mlref.duckdb', TASK.schema)
        insert_rows(lake, {'events': make_events().with_columns(commit_id=pl.lit(1))})
        lake.close()
        self.options = ServeOptions(
            'small:TASK', str(home), str(home / 'served'), workers=2, port=0, worker_timeout=0.0
        )  # one is stopped below, and stays
        self.start()

    @property
    def registry(self):
        return Registry(self.home / 'registry', name='late-visits')

    def start(self):
        from small import FEATURES

        self.process, url = start_process(self.options)
        self.server = Served(url, self.home, self.process.pid, (self.champion, ''), FEATURES.names)

    def stop(self):
        os.kill(self.process.pid, 15)
        wait_gone(self.process.pid)

    def mlref(self, capsys, *words, at):
        "Status of a command, and the JSON that it prints"
        from mlref.cli import main

        where = ['--folder', str(self.home / 'registry'), '--task', 'small:TASK', '--at', at]
        status = main(['rollout', *words, *where, '--json'])
        said = capsys.readouterr()
        assert status == 0, said.err
        return json.loads(said.out)

    def begin(self, capsys, version, steps, at):
        "A rollout by its command, until every worker has the candidate and the plan"
        why = ('--why', 'all gates passed', '--who', 'ann', '--steps', steps, '--hours', '0')
        self.mlref(capsys, 'start', version, *why, at=at)
        wait_for(lambda: read_state(self.server.folder).tried != '', 'a bundle of it')
        self.settle()

    def settle(self):
        "Wait until both workers serve what is published"
        folder = self.server.folder

        def followed():
            notes = read_notes(folder)
            return len(notes) == 2 and not laggards(notes, read_state(folder).epoch)

        wait_for(followed, 'two workers that follow')

    def ask(self, number, headers=None, **change):
        entities = [self.server.visit(number, **change)]
        for _ in range(20):
            status, said = self.server.post('/predict', {'entities': entities}, **(headers or {}))
            if status != 503:  # the disk of a busy machine: send it again, says the answer
                break
        return status, said

    def versions(self, numbers=range(200, 300)):
        "Which version answered each visit"
        found = {}
        for number in numbers:
            status, content = self.ask(number)
            assert status == 200, content
            found[f'v{number}'] = content['model_version']
        return found

    def champion_is(self, version):
        wait_for(lambda: set(self.versions(range(200, 208)).values()) == {version}, 'it everywhere')


@pytest.fixture(scope='module')
def rolling(tmp_path_factory):
    found = Rolling(tmp_path_factory.mktemp('rolling'))
    yield found
    found.stop()


def wait_for(condition, what, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f'expected {what} within {seconds} s'
        time.sleep(0.05)


BROKEN = {  # the first visit of its day, and what the guardrail says
    'nan': (50, 'errors of'),
    'raising': (100, 'errors of'),
    'slow': (150, "answers twice as slow as the champion's p99 of"),
}


@pytest.mark.parametrize('kind', BROKEN)
def test_a_broken_canary_is_rolled_back_by_the_next_decision(rolling, capsys, kind):
    rolling.champion_is(rolling.champion)
    before = promotions(rolling.registry)[-1].to
    first, broken = BROKEN[kind]
    start, end = [format_time(visit * 8 * 1440 // 400) for visit in (first - 1, first + 49)]
    rolling.begin(capsys, rolling.numbers[kind], '0.01', start)
    hurt, decided = 0, {}
    for turn in range(400):
        status, said = rolling.ask(first + turn % 49, visit=f'{kind}-{turn}')
        assert status in (200, 500), said
        hurt += status == 500 or said['model_version'] == rolling.slow
        if turn % 10 == 9 and decided.get('decision') != 'roll back':
            decided = rolling.mlref(capsys, 'decide', at=end)
            rolling.settle()
    assert decided['decision'] == 'roll back' and broken in decided['why'], decided['why']
    assert hurt <= 4  # 1 % of the requests; most are found by what the candidate says beside
    last = promotions(rolling.registry)[-1]
    assert (last.who, last.to) == ('rollout', before) and 'guardrail' in last.why
    rolling.champion_is(rolling.champion)
    assert read_state(rolling.server.folder).plan['split'] == {'shares': {}, 'shadow': {}}


def test_a_rollout_that_begins_behind_another_never_counts_the_candidate_of_that_one(
    rolling, capsys
):
    folder = rolling.server.folder
    rolling.begin(capsys, rolling.numbers['nan'], '0,0.5', BEFORE)
    bad = read_state(folder).candidate
    with hold_file_lock(folder / '.publish.lock'):  # the publisher comes late
        rolling.mlref(capsys, 'abort', '--why', 'it answers nothing', '--who', 'ann', at=BEFORE)
        why = ('--why', 'the next one', '--who', 'ann', '--steps', '0,0.5', '--hours', '0')
        rolling.mlref(capsys, 'start', rolling.numbers['near'], *why, at=BEFORE)
        assert read_state(folder).candidate == bad
        rolling.settle()
        assert set(rolling.versions(range(200, 230)).values()) == {rolling.champion}
    wait_for(lambda: read_state(folder).tried not in ('', bad), 'a bundle of the next one')
    rolling.settle()
    assert set(rolling.versions(range(230, 260)).values()) == {rolling.champion}
    rollout = require_rollout(rolling.registry).rollout

    def counts():
        return read_counts(rollout, folder, 'late-visits')['candidate']

    wait_for(lambda: counts().requests == 30, 'what the next one said')
    assert counts().errors == 0
    rolling.mlref(capsys, 'abort', '--why', 'seen enough', '--who', 'ann', at=BEFORE)
    rolling.settle()


def test_an_equal_candidate_is_not_slow_on_a_busy_machine(rolling, capsys):
    "Its scores beside wait for their turn more often than answers do"
    rolling.begin(capsys, rolling.numbers['near'], '0,0.5', BUSY)
    loop = 'import time\nend = time.time() + 60\nwhile time.time() < end: sum(range(1000))'
    others = [subprocess.Popen([sys.executable, '-c', loop]) for _ in range(2 * os.cpu_count())]
    try:
        rolling.versions(range(200, 399))
    finally:
        for other in others:
            other.kill()
            other.wait()
    counts = read_counts(
        require_rollout(rolling.registry).rollout, rolling.server.folder, 'late-visits'
    )
    assert counts['candidate'].requests > 100 and check_guardrails(**counts) == ()
    assert counts['candidate'].slow <= counts['champion'].slow + 3, counts
    rolling.mlref(capsys, 'abort', '--why', 'shown', '--who', 'ann', at=BUSY)
    rolling.champion_is(rolling.champion)


def test_a_shadow_scores_vectors_and_visits_and_answers_nobody(rolling, capsys):
    champion = rolling.champion
    rolling.begin(capsys, rolling.numbers['near'], '0,0.5', LATER)
    before = [len(rolling.server.rows(topic)) for topic in ('shadows', 'vector_shadows')]
    assert set(rolling.versions(range(200, 260)).values()) == {champion}
    X = np.array([[3, 2], [np.nan, 1]], np.float32)
    for _ in range(20):
        status, said = rolling.server.post(rolling.server.infer, rolling.server.tensor(X))
        assert (status, said['model_version']) == (200, champion)
        assert said['outputs'][0]['data'] == pytest.approx(rolling.server.scores(X))

    def written():
        return [len(rolling.server.rows(topic)) for topic in ('shadows', 'vector_shadows')]

    wait_for(lambda: written() == [before[0] + 60, before[1] + 20], 'what shadows said')
    row = rolling.server.rows('vector_shadows')[-1]
    assert row['variant'] == 'candidate'
    logits = np.nan_to_num(X) @ np.array(NEAR, np.float32)
    assert row['p'] == pytest.approx((1 / (1 + np.exp(-logits))).tolist())
    standing = require_rollout(rolling.registry)
    counts = read_counts(standing.rollout, rolling.server.folder, 'late-visits')
    assert {name: each.requests for name, each in counts.items()} == {
        'champion': 80,
        'candidate': 80,
    }
    page = rolling.server.call('GET', '/metrics')[1].decode()
    of_candidate = 'mlref_variant_seconds_count{model="late-visits",variant="candidate"} 80.0'
    assert of_candidate in page.splitlines()


def test_half_of_the_visits_have_it_each_always_the_same_also_after_a_restart(rolling, capsys):
    decided = rolling.mlref(capsys, 'decide', at=LATER)
    assert decided['decision'] == 'hold', decided['why']  # 60 of 200 requests
    before = len(rolling.server.rows('shadows'))
    rolling.versions(range(260, 400))
    rollout = require_rollout(rolling.registry).rollout

    def scored():
        return read_counts(rollout, rolling.server.folder, 'late-visits')['candidate'].requests

    wait_for(lambda: scored() == 220, 'shadows of 200 visits and 20 vectors')
    wait_for(lambda: len(rolling.server.rows('shadows')) == before + 140, 'what they said')
    decided = rolling.mlref(capsys, 'decide', at=END)
    assert decided['decision'] == 'advance', decided['why']
    rolling.settle()
    rollout = require_rollout(rolling.registry).rollout
    router = Router(rollout_plan(rollout))
    of = {'champion': rolling.champion, 'candidate': rolling.candidate}
    planned = {f'v{n}': of[router.assign(f'v{n}').variant] for n in range(200, 300)}
    assert rolling.versions() == planned
    assert 30 < Counter(planned.values())[of['candidate']] < 70
    chosen = rolling.ask(203, {'x_variant': 'candidate'})
    assert chosen[1]['model_version'] == of['candidate']
    # half as answers, half beside, and not the one that was chosen
    wait_for(lambda: scored() == 100, 'all of them counted')

    rolling.stop()
    rolling.start()
    rolling.settle()
    assert rolling.versions() == planned
    wait_for(lambda: scored() == 200, 'counts that go on')


def test_the_log_of_a_rollout_is_evidence(rolling):
    from small import TASK, find_labels, make_events

    rollout = require_rollout(rolling.registry).rollout
    written = [read_messages(rolling.server.folder, topic) for topic in ('predictions', 'shadows')]
    assert [row for row in written[0] if row.get('counted') is False][-1]['variant'] == 'candidate'
    labels = find_labels(make_events().filter(kind='end'), 9).rename({'visit': 'entity_id'})
    evidence = gather_evidence(
        rollout, scored_rows(*written, rollout.started), labels, TASK.calendar, 9 * 1440
    )
    assert evidence.mature_days >= 1


def test_a_person_ends_a_rollout_either_way_and_is_a_row_like_any_other(rolling, capsys):
    ends = rolling.mlref(capsys, 'abort', '--why', 'complaints', '--who', 'bob', at=END)
    assert ends['status'] == 'rolled back'
    rolling.champion_is(rolling.champion)
    rolling.begin(capsys, rolling.numbers['near'], '0,0.5', LATER)
    rolling.mlref(capsys, 'promote', '--why', 'good enough', '--who', 'ann', at=END)
    rolling.champion_is(rolling.candidate)
    rolling.settle()
    assert set(rolling.versions().values()) == {rolling.candidate}
    rows = promotions(rolling.registry)
    assert [row.who for row in rows[-4:]] == ['rollout', 'bob', 'ann', 'ann']
    assert rows[-1].to == rolling.numbers['near'] and 'good enough' in rows[-1].why


def test_a_bundle_that_a_worker_still_holds_stays_and_goes_when_nobody_does(rolling):
    folder = rolling.server.folder
    rolling.settle()
    note = next(note for note in read_notes(folder) if note.index == 1)

    def bundles():
        return {place.name for place in (folder / 'bundles').iterdir()}

    os.kill(note.pid, signal.SIGSTOP)
    try:
        for number in ('1', rolling.numbers['near'], '1'):
            promote(rolling.registry, number, 9 * 1440, 'for the test')
            publish_champion(rolling.options)
        held = set(note.bundles) - set(read_state(folder).digests)
        assert held and held <= bundles()
    finally:
        os.kill(note.pid, signal.SIGCONT)
    rolling.settle()
    publish_champion(rolling.options)
    assert bundles() == set(read_state(folder).digests)
    assert len(bundles()) == 2  # the champion and the one before
    assert rolling.ask(399)[0] == 200
