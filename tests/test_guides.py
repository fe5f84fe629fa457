"""Guides as somebody types them: what is shown needs nothing that is hidden"""

import ast
import builtins
import json
from pathlib import Path

import pytest

GUIDES = sorted((Path(__file__).parent.parent / 'nbs' / 'guides').glob('*.ipynb'))
NOT_TYPED = {'observe_it', 'when_to_move'}  # a browser and a chart are looked at
EXPLAINED = {'shell', 'folder'}  # a terminal, a path: where the text of a guide says what it is


def bound_names(tree: ast.AST) -> set[str]:
    "Names that code gives a meaning to"
    found = set()
    for each in ast.walk(tree):
        if isinstance(each, (ast.Import, ast.ImportFrom)):
            found |= {(name.asname or name.name).split('.')[0] for name in each.names}
        elif isinstance(each, (ast.FunctionDef, ast.ClassDef)):
            found.add(each.name)
        elif isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            found.add(each.id)
        elif isinstance(each, ast.arg):
            found.add(each.arg)
        elif isinstance(each, ast.ExceptHandler) and each.name:
            found.add(each.name)
    return found


def missing_names(cells: list[dict]) -> set[str]:
    "Names in the cells of a guide that are shown, and that no cell shown before gives a meaning"
    known = set(dir(builtins))
    missing: set[str] = set()
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and not source.startswith('#| hide'):
            tree = ast.parse(source)
            known |= bound_names(tree)
            names = [each for each in ast.walk(tree) if isinstance(each, ast.Name)]
            missing |= {each.id for each in names if isinstance(each.ctx, ast.Load)} - known
    return missing


@pytest.mark.parametrize('guide', GUIDES, ids=lambda guide: guide.stem)
def test_what_is_shown_needs_nothing_that_is_hidden(guide):
    if guide.stem in NOT_TYPED:
        pytest.skip('nothing of it is typed in Python')
    cells = json.loads(guide.read_text())['cells']
    missing = missing_names(cells)
    text = ''.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    missing -= {name for name in EXPLAINED if f'`{name}`' in text}
    assert not missing, f'{guide.stem}: hidden, or not there: {sorted(missing)}'


def test_a_hidden_import_is_found():
    hidden, shown = '#| hide\nimport json', 'json.loads("1")'
    cells = [{'cell_type': 'code', 'source': [text]} for text in (hidden, shown)]
    assert missing_names(cells) == {'json'}
