"""Guides as somebody types them: what is shown needs nothing that is hidden"""

import ast
import builtins
import json
import re
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


def lines_of_sections(cells: list[dict]) -> dict[str, int]:
    "Lines of code that are typed under each heading of a guide, without blank ones and comments"
    lines: dict[str, int] = {}
    section = ''
    for cell in cells:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            section = next(iter(re.findall(r'^## (.+)', source, re.MULTILINE)), section)
        elif not source.startswith('#| hide'):
            typed = [line.strip() for line in source.splitlines()]
            count = sum(bool(line) and not line.startswith(('#', '"')) for line in typed)
            lines[section] = lines.get(section, 0) + count
    return lines


def test_each_part_alone_is_under_twenty_lines_and_shows_what_came_out():
    cells = json.loads(next(each for each in GUIDES if each.stem == 'take_a_part').read_text())
    lines = lines_of_sections(cells['cells'])
    alone = {section: count for section, count in lines.items() if section.endswith('alone')}
    assert len(alone) == 6
    assert {section: count for section, count in alone.items() if count >= 20} == {}
    shown = [cell for cell in cells['cells'] if cell.get('outputs')]
    assert len(shown) == len(alone)


def test_a_long_part_is_seen():
    heading = {'cell_type': 'markdown', 'source': ['text\n', '\n', '## The log alone']}
    code = {'cell_type': 'code', 'source': ['x = 1\n', '\n', '# why\n', 'y = 2']}
    assert lines_of_sections([heading, code, code]) == {'The log alone': 4}


def test_a_hidden_import_is_found():
    hidden, shown = '#| hide\nimport json', 'json.loads("1")'
    cells = [{'cell_type': 'code', 'source': [text]} for text in (hidden, shown)]
    assert missing_names(cells) == {'json'}
