"""Committed results: what is required is there, with the goal that was set; held is computed; the card shows what the files say"""

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
    looks = [
        json.loads(l)
        for l in (ROOT / 'reports' / 'results' / 'ledger.jsonl').read_text().splitlines()
    ]
    shown = {
        r['name'].split(':')[0]: round(r['ours'], 4)
        for r in FILES['train']['rows']
        if r['name'].endswith(': AUC') and ' - ' not in r['name']
    }
    assert shown.items() <= {l['model']: l['auc'] for l in looks}.items()
