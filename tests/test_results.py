"""Committed results: required rows with their goals, held as computed, the card as the files say"""

import json
from pathlib import Path

import pytest

from mlref.results import goal_held, render_card

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


def test_every_look_at_the_test_months_is_in_the_ledger():
    file = ROOT / 'reports' / 'results' / 'ledger.jsonl'
    looks = [json.loads(line) for line in file.read_text().splitlines()]
    shown = {
        row['name'].split(':')[0]: round(row['ours'], 4)
        for row in FILES['train']['rows']
        if row['name'].endswith(': AUC') and ' - ' not in row['name']
    }
    assert shown.items() <= {look['model']: look['auc'] for look in looks}.items()
