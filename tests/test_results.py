"""Committed results: required rows with their goals, held as computed, the card as the files say"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from mlref.core import MlrefError
from mlref.ledger import append_look, read_ledger
from mlref.results import goal_held, read_choices, render_card
from programs import MLREF

ROOT = Path(__file__).parent.parent
FILES = {f.stem: json.loads(f.read_text()) for f in (ROOT / 'reports' / 'results').glob('*.json')}


@pytest.mark.parametrize(
    'want',
    json.loads((ROOT / 'tests' / 'required_rows.json').read_text()),
    ids=lambda w: f'{w["bench"]}: {w["name"]}',
)
def test_a_required_row_is_there_with_its_goal(want):
    rows = {r['name']: r for r in FILES[want['bench']]['rows']}
    assert rows[want['name']]['goal'] == want['goal']


def test_held_is_what_the_numbers_say():
    rows = [r for f in FILES.values() for r in f['rows']]
    assert rows and all(r['held'] == goal_held(r['ours'], r['goal']) for r in rows)


def test_the_card_is_what_the_files_say():
    assert (ROOT / 'reports' / 'card.md').read_text() == render_card(ROOT / 'reports' / 'results')


CHOICES = read_choices(ROOT / 'reports' / 'chosen.json')
OF_OUTCOMES = re.compile(r'\bAUC\b|log-loss|\bECE\b|Brier')
NOT_JUDGED = {'monitor'}  # its AUC is compared with another library's, of made-up rows


@pytest.mark.parametrize('bench', sorted(FILES))
def test_a_file_that_is_judged_by_outcomes_says_what_was_chosen_on_which_months(bench):
    judged = any(OF_OUTCOMES.search(row['name']) for row in FILES[bench]['rows'])
    said = [each for each in CHOICES if each.bench == bench]
    assert said or not judged or bench in NOT_JUDGED
    card = (ROOT / 'reports' / 'card.md').read_text()
    for each in said:
        assert f'| {bench} | {each.what} | {each.months} |' in card


def test_only_files_that_exist_say_what_was_chosen():
    assert {each.bench for each in CHOICES} <= FILES.keys()


LEDGER = ROOT / 'reports' / 'results' / 'ledger.jsonl'
UNCHAINED = 39  # lines from before each held the digest of those above


def test_every_look_at_the_test_months_is_in_the_ledger():
    looks = read_ledger(LEDGER)
    shown = {
        row['name'].split(':')[0]: round(row['ours'], 4)
        for row in FILES['train']['rows']
        if row['name'].endswith(': AUC') and ' - ' not in row['name']
    }
    seen = {look['model']: look['auc'] for look in looks if 'model' in look}
    assert shown.items() <= seen.items()


def counted_lines():
    "Lines that result files say there were"
    name = 'lines in the ledger after this look'
    return [r['ours'] for f in FILES.values() for r in f['rows'] if r['name'] == name]


def test_the_ledger_has_as_many_lines_as_result_files_say():
    looks = read_ledger(LEDGER)
    counted = counted_lines()
    assert counted and len(looks) >= max(counted) > UNCHAINED
    assert sum('above' in look for look in looks) == len(looks) - UNCHAINED


def test_a_line_taken_from_the_ledger_shows(tmp_path):
    lines = LEDGER.read_text().splitlines(keepends=True)
    file = tmp_path / 'ledger.jsonl'
    for missing in range(len(lines) - 1):
        file.write_text(''.join(lines[:missing] + lines[missing + 1 :]))
        with pytest.raises(MlrefError, match='changed, added or removed'):
            read_ledger(file)
        with pytest.raises(MlrefError):
            append_look(file, 'mlref bench train', {})
    file.write_text(''.join(lines[:-1]))
    assert len(read_ledger(file)) < max(counted_lines())  # the last one: the count says so


def test_what_a_run_changed_is_said_beside_the_committed_results(tmp_path):
    (tmp_path / 'settings.ini').write_text('')
    (tmp_path / 'nbs').mkdir()
    committed = json.loads((ROOT / 'reports/results/quick.json').read_text())
    changed = json.loads(json.dumps(committed))
    row = next(row for row in changed['rows'] if row['name'] == 'flights scored twice')
    row |= {'ours': 3, 'held': False}
    for folder, file in (('results', committed), ('runs/quick-1/results', changed)):
        (tmp_path / 'reports' / folder).mkdir(parents=True)
        (tmp_path / 'reports' / folder / 'quick.json').write_text(json.dumps(file))
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    ran = subprocess.run(
        [*MLREF, 'card', '--run', 'quick-1'],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert '| flights scored twice | 0 | 3 | +3 | 0 | **no** |' in ran.stdout
    assert '1 of ' in ran.stdout and 'numbers moved' in ran.stdout
    lost = subprocess.run(
        [*MLREF, 'card', '--run', 'gone'], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert lost.returncode != 0 and 'name a finished run' in lost.stderr


def test_the_workflow_of_a_model_looks_at_pages_that_exist():
    workflow = yaml.safe_load((ROOT / '.github/workflows/model.yml').read_text())
    for pattern in workflow[True]['pull_request']['paths']:  # YAML reads 'on' as true
        assert list(ROOT.glob(pattern)), pattern
    steps = [step.get('run', '') for step in workflow['jobs']['quick']['steps']]
    assert any('card --run' in step and 'GITHUB_STEP_SUMMARY' in step for step in steps)
