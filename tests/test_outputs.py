"""Committed outputs are those of the code: pages run afresh give what the repository shows"""

import ast
import builtins
import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from checks.exercises import FOLD
from checks.notebooks import page_paths

ROOT = Path(__file__).resolve().parent.parent
PAGES = ('index', 'guides/bring_your_own_table', '00_tour')
RUN = """
import json, sys
from pathlib import Path
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
path = Path(sys.argv[1])
page = read_nb(path)
CaptureShell(path).run_all(page, exc_stop=True)
Path(sys.argv[2]).write_text(json.dumps([cell.get('outputs', []) for cell in page.cells]))
"""
# a number with a unit of time, a path, an address, a version: they differ from run to run
VARIES = (
    (re.compile(r'\d[\d.,]*(e-?\d+)? ?(?=(s|ms|µs|seconds|minutes a)\b)'), '# '),
    (re.compile(r'/\S+'), '/PATH'),
    (re.compile(r'\b(0x)?[0-9a-f]{12}\b'), '#'),  # an address, or a version: a digest of weights
    (re.compile(r'(\d\.\d\d)\d+'), r'\1'),  # another processor may round otherwise
)


def shown_exactly(
    outputs: list[dict],  # of a cell
) -> str:
    "What a reader sees as text; '' where that is a figure"
    texts = []
    for output in outputs:
        if output['output_type'] == 'stream' and output['name'] == 'stdout':
            texts.append(''.join(output['text']))
        data = output.get('data', {})
        texts.append(''.join(data.get('text/markdown', data.get('text/plain', ''))))
    text = '\n'.join(texts).strip()
    return '' if '<Figure' in text else text


def shown(
    outputs: list[dict],  # of a cell
) -> str:
    "What a reader sees as text, without what differs from run to run"
    text = shown_exactly(outputs)
    for pattern, instead in VARIES:
        text = pattern.sub(instead, text)
    return text


def run_afresh(path: Path, folder: Path) -> list[list[dict]]:
    "The outputs of every cell of a page, run in a process and a folder of its own"
    at = folder / 'outputs.json'
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg', 'IN_TEST': '1'}
    command = [sys.executable, '-c', RUN, str(path), str(at)]
    ran = subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(at.read_text())


@pytest.mark.parametrize('name', PAGES)
def test_a_page_shows_what_its_code_gives(name, tmp_path):
    path = ROOT / 'nbs' / f'{name}.ipynb'
    cells = json.loads(path.read_text())['cells']
    fresh = run_afresh(path, tmp_path)
    assert len(fresh) == len(cells)
    differ = {
        cell['id']: (shown(cell['outputs']), shown(now))
        for cell, now in zip(cells, fresh, strict=True)
        if cell['cell_type'] == 'code' and shown(cell['outputs']) != shown(now)
    }
    assert differ == {}, f'run the page again: {name}'


def test_a_wrong_output_is_seen():
    def stream(text):
        return [{'output_type': 'stream', 'name': 'stdout', 'text': text}]

    assert shown(stream('it says 49 %')) != shown(stream('it says 52 %'))
    assert shown(stream('in 1.23 s, at /tmp/a1')) == shown(stream('in 4.5 s, at /tmp/b2'))


READERS = {'find_result', 'print_rows'}  # what a cell reads the committed results by


def code_cells(path: Path) -> list[dict]:
    "The cells of a page that hold code, each with its syntax tree"
    cells = json.loads(path.read_text())['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    for cell in code:
        source = [line for line in cell['source'] if not line.startswith(('%', '!'))]
        cell['tree'] = ast.parse(''.join(source))
        # an answer shows what its page computes, which that page checks
        cell['folded'] = source[:1] == [FOLD]
    return code


def loaded_names(tree: ast.AST) -> set[str]:
    "Names that code takes from elsewhere: read in it and not bound by it, nor by Python"
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    bound |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return {node.id for node in names} - bound - {*dir(builtins)}


def bound_names(statement: ast.stmt) -> set[str]:
    "Names that a statement at the top of a cell makes"
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(name.asname or name.name).split('.')[0] for name in statement.names}
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    names = [node for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Store)}


def needed_statements(
    cells: list[dict],  # Of code
    at: int,  # The cell that is to run
) -> list[ast.stmt]:
    "Statements of the cells before one that it cannot do without, first to last"
    wanted = loaded_names(cells[at]['tree'])
    needed: list[ast.stmt] = []
    for cell in reversed(cells[:at]):
        for statement in reversed(cell['tree'].body):
            made = bound_names(statement) & wanted
            if made:
                needed.append(statement)
                wanted = (wanted - made) | loaded_names(statement)
    return needed[::-1]


def result_cells(cells: list[dict]) -> list[int]:
    "Which cells read the committed results, or call a function of such a cell"
    reading = [bool(loaded_names(cell['tree']) & READERS) for cell in cells]
    readers = {
        statement.name
        for cell, reads in zip(cells, reading, strict=True)
        for statement in cell['tree'].body
        if reads and isinstance(statement, ast.FunctionDef)
    }
    return [
        at
        for at, cell in enumerate(cells)
        if cell['outputs']
        and not cell['folded']
        and (reading[at] or readers & loaded_names(cell['tree']))
    ]


def show_again(cells: list[dict], at: int) -> list[dict]:
    "The outputs of a cell when it runs with only the statements it needs"
    needed = ast.Module(needed_statements(cells, at), [])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        room = {}
        exec(compile(needed, 'needed', 'exec'), room)
        body = cells[at]['tree'].body
        if isinstance(body[-1], ast.Expr):  # as a notebook shows it
            body = [*body[:-1], ast.parse(f'_last = {ast.unparse(body[-1])}').body[0]]
        exec(compile(ast.Module(body, []), cells[at]['id'], 'exec'), room)
    outputs = [{'output_type': 'stream', 'name': 'stdout', 'text': printed.getvalue()}]
    last = room.get('_last')
    if last is not None:
        outputs.append({'output_type': 'execute_result', 'data': {'text/plain': repr(last)}})
    return outputs


def result_pages() -> list[str]:
    pages = page_paths()
    names = [str(page.relative_to(ROOT / 'nbs').with_suffix('')) for page in pages]
    own = '23_results'  # shows results that it makes itself
    return [name for name in names if name not in (*PAGES, own)]


def test_a_page_shows_the_results_of_today(monkeypatch):
    differ, tried = {}, 0
    for name in result_pages():
        path = ROOT / 'nbs' / f'{name}.ipynb'
        if not any(reader in path.read_text() for reader in READERS):
            continue
        monkeypatch.chdir(path.parent)
        cells = code_cells(path)
        for at in result_cells(cells):
            tried += 1
            was = shown_exactly(cells[at]['outputs'])
            now = shown_exactly(show_again(cells, at))
            if was and was != now:
                differ[name, cells[at]['id']] = (was, now)
    assert tried > 15
    assert differ == {}, 'run these pages again'


PAGE_LINK = re.compile(r'\]\((?!\w+:)([^)#]+\.ipynb)')


def find_dead_links(path):
    "Links of a page to pages that are not there"
    cells = json.loads(path.read_text())['cells']
    texts = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    links = PAGE_LINK.findall('\n'.join(texts))
    return [link for link in links if not (path.parent / link).exists()]


def test_a_link_to_a_page_leads_to_one(tmp_path):
    pages = page_paths()
    assert {str(path): dead for path in pages if (dead := find_dead_links(path))} == {}
    planted = {'cells': [{'cell_type': 'markdown', 'source': ['[a](gone.ipynb)']}]}
    (tmp_path / 'page.ipynb').write_text(json.dumps(planted))
    assert find_dead_links(tmp_path / 'page.ipynb') == ['gone.ipynb']


def test_every_page_and_guide_stands_in_the_index():
    index = (ROOT / 'nbs' / 'index.ipynb').read_text()
    pages = [*(ROOT / 'nbs').glob('[0-9]*.ipynb'), *(ROOT / 'nbs' / 'guides').glob('*.ipynb')]
    names = [str(page.relative_to(ROOT / 'nbs')) for page in pages]
    assert [name for name in sorted(names) if f'({name})' not in index] == []
