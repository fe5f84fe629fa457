"""Waiting for a person, between processes

The commands, kills at every call to the registry, two people at once, a loop that dies between
the answer and its own decision.
"""

import json
import os
import shutil
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from killed import kill_at_number
from mlref.approval import Approval, ApprovalAnswer, answer_approval, ask_approval, read_approvals
from mlref.core import DAY, MlrefError, digest, parse_time
from mlref.flights.features import FLIGHTS
from mlref.flights.task import flights_task
from mlref.gates import Gate
from mlref.lake import insert_rows
from mlref.model import TorchPredictor
from mlref.model_versions import get_version
from mlref.networks import linear_net
from mlref.policy import decision_rows, make_decision, verdict
from mlref.promotion import promote, promotions
from mlref.registry import Registry, TrainingRun, register_model, version_by_alias
from mlref.tracking_store import local_uri
from mlref.waiting import settle_approval, waiting_challenger
from mlref.workspace import Workspace
from programs import FORK, run_commands

ROOT, DEEP = Path(__file__).parent.parent, os.environ.get('MLREF_DEEP') == '1'
GOOD = [Gate('better_than_champion', True, 0.01, -0.003, '')]
APRIL = parse_time('2013-04-01T07:00')
YES = ApprovalAnswer('approved', APRIL + DAY, 'ann', 'the slices look right')
NO = ApprovalAnswer('rejected', APRIL + DAY, 'bob', 'worse at JFK')


def late(run):
    "The registry of a run of the flights"
    return Registry(run / 'registry', name='late')


def register(registry, seed):
    "A version of a small network that passed its gates"
    torch.manual_seed(seed)
    model = TorchPredictor(linear_net(FLIGHTS.names, {}), 22_000_000 + seed)
    return register_model(registry, model, TrainingRun(digest([seed])), FLIGHTS, GOOD)


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A run with a champion, a version that is asked about, and another"
    run = tmp_path_factory.mktemp('begun') / 'run'
    registry = Registry(run / 'registry', local_uri(run / 'registry'), name='late')
    for seed in range(3):
        register(registry, seed)
    promote(registry, '1', APRIL - DAY, 'bootstrap')
    ask_approval(registry, Approval('2', '1', APRIL, days=14), 'all gates passed', 'lifecycle')
    return run


@pytest.fixture
def run(begun, tmp_path):
    return Path(shutil.copytree(begun, tmp_path / 'run'))


def mlref(run, *lines):
    "Commands about the models of a run, in one process: status, stdout and stderr of each"
    place = ['--folder', str(run / 'registry')]
    return run_commands([['models', *words, *place] for words in lines])


def status(run, version='2'):
    return read_approvals(promotions(late(run)))[version].approval.status


def test_a_person_approves_by_the_command_once(run):
    listed, approved, again, rejected, later, shown = mlref(
        run,
        ['list'],
        ['approve', '2', '--why', 'looks right', '--who', 'ann', '--json'],
        ['approve', '2', '--why', 'again', '--who', 'bob'],
        ['reject', '2', '--why', 'on second thoughts'],
        ['list'],
        ['show', '2'],
    )
    codes = [each[0] for each in (listed, approved, again, rejected, later, shown)]
    assert codes == [0, 0, 0, 1, 0, 0]
    assert 'version 2 waits for approval: all gates passed' in listed[1]
    found = json.loads(approved[1])
    assert (found['champion'], found['added'], found['who']) == ('2', True, 'ann')
    assert version_by_alias(late(run)) == '2' and version_by_alias(late(run), 'previous') == '1'
    assert 'already, nothing is added' in again[1] and 'by ann' in again[1]
    assert len(promotions(late(run))) == 3
    assert 'it was approved by ann' in rejected[2] and rejected[2].count('\n') == 1
    assert 'waits for approval' not in later[1]
    assert shown[1].count('\napproval: ') == 2


def test_a_person_rejects_by_the_command_and_the_champion_stays(run):
    rejected, approved = mlref(
        run,
        ['reject', '2', '--why', 'worse at JFK', '--who', 'bob'],
        ['approve', '2', '--why', 'looks right'],
    )
    assert rejected[0] == 0 and 'version 2 is rejected, 1 is champion' in rejected[1]
    assert version_by_alias(late(run)) == '1' and status(run) == 'rejected'
    assert approved[0] == 1 and 'it was rejected by bob' in approved[2]


def test_an_approval_beside_a_newer_champion_is_refused_in_one_sentence(run):
    promote(late(run), '3', APRIL + 9, 'the storm', 'cem')
    ((code, _, error),) = mlref(run, ['approve', '2', '--why', 'looks right'])
    assert code == 1 and 'cem has made 3 champion since (the storm)' in error
    assert error.count('\n') == 1 and version_by_alias(late(run)) == '3'


def test_an_approval_that_comes_after_its_days_is_refused_in_one_sentence(run):
    with sqlite3.connect(run / 'registry' / 'mlflow.db') as tables:
        # the row was written fifteen days ago; when that was is no part of its digest
        tables.execute(
            'update model_versions set creation_time = creation_time - ?'
            " where name like '%-promotions'",
            (15 * DAY * 60_000,),
        )
    tables.close()
    approved, rejected = mlref(
        run,
        ['approve', '2', '--why', 'looks right'],
        ['reject', '2', '--why', 'too old'],
    )
    assert approved[0] == 1 and 'expected an approval within 14 days' in approved[2]
    assert approved[2].count('\n') == 1 and version_by_alias(late(run)) == '1'
    assert rejected[0] == 0 and 'version 2 is rejected' in rejected[1]


def test_what_was_not_asked_cannot_be_approved_and_a_reason_is_asked_for(run):
    unasked, silent = mlref(run, ['approve', '3', '--why', 'looks right'], ['approve', '2'])
    assert unasked[0] == 1 and 'waits for approval among 2, got 3' in unasked[2]
    assert silent[0] == 1 and 'say why' in silent[2] and status(run) == 'waits'


def dies_at(run, k, act):
    "A process that is killed at its k-th call to MLflow; True = it was"
    process = FORK.Process(target=_act_and_die, args=(run, k, act))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _act_and_die(run, k, act):
    kill_at_number(k)
    ACTS[act](run)


def _approve(run):
    answer_approval(late(run), '2', YES)


def _ask(run):
    ask_approval(late(run), Approval('3', '1', APRIL, days=14), 'all gates passed', 'lifecycle')


def _settle(run):
    workspace = Workspace(run, flights_task())
    settle_approval(workspace, APRIL + DAY)
    workspace.close()


ACTS = {'approve': _approve, 'ask': _ask, 'settle': _settle}


@pytest.mark.parametrize('act, champion', [('approve', '2'), ('ask', '1')])
def test_killed_at_any_call_a_row_is_written_once(begun, tmp_path, act, champion):
    for k in range(0, 100, 1 if DEEP else 5):
        run = Path(shutil.copytree(begun, tmp_path / f'{act}{k}'))
        killed = dies_at(run, k, act)
        ACTS[act](run)
        assert len(promotions(late(run))) == 3, k
        assert version_by_alias(late(run)) == champion, k
        if not killed:
            break
    assert not killed and k > 3


def waiting_run(run):
    "The run's lake with the first promotion and the decision to wait, committed with its day"
    workspace = Workspace(run, flights_task())
    calendar = workspace.task.calendar
    day = calendar.day_of(APRIL) - 1
    first = {'number': '1', 'version': get_version(late(run), '1').tags['model']}
    asked = {'number': '2', 'version': get_version(late(run), '2').tags['model']}
    asked |= {'approval_days': 14, 'instead_of': first['version']}
    decisions = [
        make_decision(day - 1, 'promote', 'bootstrap', first, calendar),
        verdict(GOOD, asked, day, calendar, approval=True),
    ]
    insert_rows(workspace.lake, {'decisions': decision_rows(decisions)})
    return workspace


def decided(workspace):
    rows = workspace.lake.sql('select id, action from decisions order by decided_at, action')
    return rows['id'].to_list(), rows['action'].to_list()


def test_a_loop_that_dies_while_it_settles_decides_the_same_once(begun, tmp_path):
    whole = Path(shutil.copytree(begun, tmp_path / 'whole'))
    answer_approval(late(whole), '2', YES)
    workspace = waiting_run(whole)
    workspace.close()
    once = Path(shutil.copytree(whole, tmp_path / 'once'))
    _settle(once)
    workspace = Workspace(once, flights_task())
    want = decided(workspace)
    workspace.close()
    assert want[1] == ['promote', 'wait', 'promote']
    for k in range(0, 100, 1 if DEEP else 3):
        run = Path(shutil.copytree(whole, tmp_path / f'settle{k}'))
        killed = dies_at(run, k, 'settle')
        _settle(run)
        _settle(run)
        workspace = Workspace(run, flights_task())
        assert decided(workspace) == want, k
        workspace.close()
        if not killed:
            break
    assert not killed and k


@pytest.mark.parametrize(
    'answer, action, words',
    [
        (YES, 'promote', 'all gates passed'),
        (NO, 'refuse', 'approved: version 2 rejected: worse at JFK, by bob'),
    ],
    ids=['approved', 'rejected'],
)
def test_the_loop_adopts_what_a_person_said(run, answer, action, words):
    workspace = waiting_run(run)
    assert settle_approval(workspace, APRIL + DAY) is None
    assert len(promotions(late(run))) == 2  # asked before, and not again
    answer_approval(late(run), '2', answer)
    decision = settle_approval(workspace, APRIL + DAY)
    assert (decision.action, decision.why) == (action, words)
    assert waiting_challenger(workspace.lake) is None
    workspace.close()


def test_the_loop_refuses_what_stands_beside_a_newer_champion(run):
    workspace = waiting_run(run)
    promote(late(run), '3', APRIL + 9, 'the storm', 'cem')
    decision = settle_approval(workspace, APRIL + DAY)
    assert decision.action == 'refuse' and 'the storm, by cem' in decision.why
    workspace.close()


def test_the_loop_stops_waiting_and_a_person_who_comes_too_late_is_told(run):
    workspace = waiting_run(run)
    assert settle_approval(workspace, APRIL + 14 * DAY) is None
    decision = settle_approval(workspace, APRIL + 15 * DAY)
    assert decision.action == 'refuse' and 'nobody answered in 14 days' in decision.why
    workspace.close()
    ((code, _, error),) = mlref(run, ['approve', '2', '--why', 'looks right'])
    assert code == 1 and 'it was expired by lifecycle on 2013-04-16' in error


def _answer_when_both_are_there(run, answer, meet, said):
    real = Registry.call

    def call(self, method, *args, **kwargs):
        if [method, *args][:2] == ['create_model_version', 'late-promotions']:
            meet.wait(60)
        return real(self, method, *args, **kwargs)

    Registry.call = call
    try:
        answer_approval(late(run), '2', answer)
        said.put((answer.status, 'stands'))
    except MlrefError as error:
        said.put((answer.status, str(error)))


def test_of_two_people_who_answer_at_once_one_is_told_about_the_other(run):
    meet, said = FORK.Barrier(2), FORK.Queue()
    both = [
        FORK.Process(target=_answer_when_both_are_there, args=(run, each, meet, said))
        for each in (YES, replace(NO, at=YES.at))
    ]
    for process in both:
        process.start()
    got = dict(said.get(timeout=120) for _ in both)
    for process in both:
        process.join()
    stands = [answer for answer, what in got.items() if what == 'stands']
    assert stands == [status(run)], got
    assert version_by_alias(late(run)) == ('2' if stands == ['approved'] else '1')
    assert len(promotions(late(run))) == 3
