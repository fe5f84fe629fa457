"""Committed results: required rows with their goals, held as computed, the card as the files say"""

import json
from pathlib import Path

import pytest

from mlref.core import MlrefError
from mlref.ledger import append_look, read_ledger
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
