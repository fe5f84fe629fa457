"""The step that lives: a person answers by the command while it does, in a file, or by silence"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlref.challenger import bootstrap
from mlref.core import parse_time
from mlref.duckdb_files import connect_duckdb
from mlref.pipeline import StepFailed, run_step
from mlref.policy import RetrainPolicy
from mlref.task import load_task, read_stream
from mlref.workspace import Workspace, deliver_events

STEPS = Path(__file__).parent.parent / 'nbs' / 'steps'
ADDRESS = 'march:flights'
# a first model that knows two weeks, so that a challenger passes within another
SOURCE = """
from dataclasses import replace
from functools import cache

import polars as pl

from mlref.core import parse_time
from mlref.flights.task import flights_task

SINCE = parse_time('2013-03-01T07:00')


@cache
def flights(raw=''):
    task = flights_task(raw)
    known = pl.coalesce('sched', 'known_time') >= SINCE
    return replace(task, source=lambda: task.source().filter(known), address='march:flights')
"""
BEGIN = '2013-03-17T07:00'
LIVE = {
    'kind': 'torch',
    'engines': '',
    'start': BEGIN,
    'served': BEGIN,
    'end': '2013-03-27T07:00',
    'stop': 3,
    'block': 7,
    'cooldown': 7,
    'refresh': 7,
}


@pytest.fixture(scope='module')
def begun(tmp_path_factory):
    "A run with a champion, at the morning of its first day"
    folder = tmp_path_factory.mktemp('march')
    (folder / 'march.py').write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
        patch.syspath_prepend(str(folder))
        task = load_task(ADDRESS)
        workspace = Workspace(folder / 'home', task)
        deliver_events(workspace, read_stream(task, seed=0), parse_time(BEGIN))
        bootstrap(workspace, RetrainPolicy('logistic', stop=3, block=7), parse_time(BEGIN))
        workspace.close()
        yield folder


@pytest.fixture
def live(begun, tmp_path):
    "Live through ten days; the words of its decisions, and what the step printed"

    def start(name='home', **given):
        home = Path(shutil.copytree(begun / 'home', tmp_path / name))
        told = {'home': str(home), 'task': ADDRESS, **LIVE, **given}
        run_step(STEPS / 'live.ipynb', tmp_path / f'{name}.ipynb', told)
        with connect_duckdb(home / 'lake' / 'mlref.duckdb', read_only=True) as lake:
            query = 'select day, action, why, evidence from decisions order by decided_at, action'
            return [
                (day, action, why, json.loads(evidence))
                for day, action, why, evidence in lake.execute(query).fetchall()
            ]

    return start


ANSWER = """
import json
import sys
import time

from mlref.approval import waiting_approvals
from mlref.cli import main
from mlref.registry import Registry

folder, word = sys.argv[1:]
while True:
    try:
        waiting = waiting_approvals(Registry(folder, name='late'))
    except Exception:  # not there yet
        waiting = []
    if waiting:
        break
    time.sleep(0.2)
number = waiting[0].approval.version
sys.exit(main(['models', word, number, '--why', 'I have read it', '--who', 'ann',
               '--folder', folder]))
"""


@pytest.mark.parametrize('word', ['approve', 'reject'])
def test_a_person_answers_while_the_run_waits_and_the_same_answers_give_the_same_run(
    live, tmp_path, word
):
    folder = tmp_path / 'home' / 'registry'
    person = subprocess.Popen([sys.executable, '-c', ANSWER, str(folder), word])
    began = time.monotonic()
    try:
        found = live(approval='person', pause=500.0)
        assert person.wait(60) == 0
    finally:
        person.kill()
    assert time.monotonic() - began < 400  # it went on at the answer
    asked = next(i for i, each in enumerate(found) if each[1] == 'wait')
    day, _, _, evidence = found[asked]
    action = 'promote' if word == 'approve' else 'refuse'
    answers = [each for each in found if each[3].get('asked')]
    assert [(each[0], each[1]) for each in answers][:1] == [(day, action)]
    assert evidence['approval_days'] == 14 and evidence['silence'] == 'refuse'
    gate = answers[0][3]['gates'][-1]
    assert gate['name'] == 'approved' and gate['why'].endswith('I have read it, by ann')
    file = tmp_path / 'home' / 'answers.jsonl'
    rows = file.read_text().splitlines()
    assert 'I have read it' in rows[0] and len(rows) == len(answers)
    if word == 'reject':
        return
    # the run again, and nobody there: one answer more than it has a use for
    stray = json.dumps(json.loads(rows[0]) | {'decision': 'cafe00cafe00'})
    (tmp_path / 'more.jsonl').write_text('\n'.join([*rows, stray]))
    again = live('again', approval='person', answers=str(tmp_path / 'more.jsonl'))
    assert again == found
    assert (tmp_path / 'again' / 'answers.jsonl').read_text().splitlines() == rows
    printed = (tmp_path / 'again.ipynb').read_text()
    assert printed.count('answer not used') == 1
    assert 'decision cafe00cafe00: that decision never came' in printed


def test_answers_to_a_run_that_asks_nobody_stop_it_in_one_sentence(live, tmp_path):
    with pytest.raises(StepFailed, match='set approval to person or silence'):
        live(answers=str(tmp_path / 'answers.jsonl'))


def test_silence_promotes_after_its_days_and_the_evidence_has_what_was_changed(live):
    found = live(approval='silence', approval_days=2)
    actions = [(day, action) for day, action, *_ in found]
    day = next(day for day, action in actions if action == 'wait')
    assert (day + 2, 'promote') in actions
    answer = next(each[3] for each in found if each[3].get('asked'))
    assert answer['gates'][-1]['why'].endswith('nobody objected in 2 days, by lifecycle')
    trained = next(each[3] for each in found if each[1] == 'retrain')['policy']
    changed = trained['changed']
    assert (changed['silence'], changed['approval_days'], changed['block']) == ('promote', 2, 7)
    assert 'seed' not in changed and len(trained['digest']) == 12
