"""The 24 parts of a production system: where each stands, and that it stands there

tests/parts.json gives each part its page, module, file of tests and result row; null is a cell that
is still empty, and the last line of `./run test` names it.
"""

import json
from pathlib import Path

from checks.notebooks import ROOT, Finding

FILE = 'tests/parts.json'
COLUMNS = ('page', 'module', 'test', 'row')
PARTS = 24


def read_parts(root: Path = ROOT) -> list[dict]:
    "One dictionary a part: part, page, module, test, row"
    return json.loads((root / FILE).read_text(encoding='utf-8'))


def check_parts(root: Path = ROOT) -> list[Finding]:
    "Cells that name what is not there"
    parts = read_parts(root)
    found = []
    if len({part['part'] for part in parts}) != PARTS:
        found.append(Finding(FILE, 'parts', '', f'expected {PARTS} different parts'))
    for part in parts:
        for column in COLUMNS:
            cell = part[column]
            if cell is not None and not exists(column, cell, root):
                message = f'{column} {cell!r} does not exist'
                found.append(Finding(FILE, 'parts', part['part'], message))
    return found


def exists(
    column: str,  # of COLUMNS
    cell: str | list[str],  # a path, a module, or [bench, name of a row]
    root: Path,
) -> bool:
    "Is there such a file, such a module, such a row?"
    if column == 'module':
        stem = root / cell.replace('.', '/')
        return stem.with_suffix('.py').exists() or (stem / '__init__.py').exists()
    if column != 'row':
        return (root / cell).exists()
    bench, name = cell
    file = root / 'reports' / 'results' / f'{bench}.json'
    if not file.exists():
        return False
    rows = json.loads(file.read_text(encoding='utf-8'))['rows']
    return name in {row['name'] for row in rows}


def empty_cells(root: Path = ROOT) -> str:
    "Parts with what each still lacks, in one line"
    lacks = {p['part']: [c for c in COLUMNS if p[c] is None] for p in read_parts(root)}
    texts = [
        f'{part} ({"all" if len(columns) == len(COLUMNS) else ", ".join(columns)})'
        for part, columns in lacks.items()
        if columns
    ]
    return '; '.join(texts) or 'none'
