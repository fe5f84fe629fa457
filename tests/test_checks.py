"""Every rule of ./run check can fail: planted pages, modules and trees"""

import itertools
import json
import shutil
import subprocess
import sys
from configparser import ConfigParser, SectionProxy
from pathlib import Path

import pytest

import check
from checks.exercises import FOLD
from checks.glossary import check_glossary
from checks.notebooks import ROOT, Cell, Finding, Page
from checks.pages import check_pages
from checks.parts import check_parts, empty_cells
from checks.ratchet import lower_baseline, over_baseline, read_baseline, write_baseline
from checks.tools import (
    BIN,
    check_export,
    check_format,
    check_lint,
    check_readme,
    check_types,
    run_tool,
)
from readme import show_cell

TOP = Cell('markdown', 'top', '# A page\n\n> What it is for')
LONG = 'x = 1  # ' + 'long ' * 20
MODULE = Cell('code', 'exp', '#| default_exp store')
NUMBERS = itertools.count()


ASKED = Cell('markdown', 'asked', '## What to change\n\n1. Why?\n2. When?\n3. Where?')
FOLDED = {'jupyter': {'source_hidden': True}}
ANSWER = f'{FOLD}# 1: so\n# 2: now\n# 3: here\nassert answer() == 1'
ANSWERED = (ASKED, Cell('code', 'answers', ANSWER, metadata=FOLDED))


def code(source: str, **more) -> Cell:
    "A cell of a page, shown only"
    return Cell('code', f'c{next(NUMBERS)}', source, **more)


def exported(source: str) -> Cell:
    "A cell of the library"
    return Cell('code', f'c{next(NUMBERS)}', f'#| export\n{source}')


def exercise_rules(*cells: Cell, file: str = 'nbs/05_store.ipynb') -> list[str]:
    "Rules that a page which ends with these cells breaks"
    return [finding.rule for finding in check_pages([Page(file, (TOP, *cells))])]


def rules(*cells: Cell, file: str = 'nbs/05_store.ipynb') -> list[str]:
    "Rules that a page of these cells breaks, which has its exercises behind them"
    return exercise_rules(*cells, *ANSWERED, file=file)


SHAPES = {
    'columns': LONG,
    'semicolon': 'x;',
    'statements': 'x = 1\n' * 11,
    'class-lines': 'class A:\n' + '    x = 1\n' * 60,
    'shared-line': 'if x: y = 1',
    'nodes': f'x = [{"1," * 45}\n{"1," * 45}]',
    'comprehension': 'x = [[y for y in t] for t in T]',
    'conditional': 'x = 1 if y else (2 if t else 3)',
    'class-attribute': 'LocalLog.append = append',
    'parallel': 'x, y = load(1), 2',
    'one-letter': 'h = 1',
    'imports-apart': 'import os\nos.getcwd()',
}


@pytest.mark.parametrize(('rule', 'source'), SHAPES.items(), ids=SHAPES)
def test_a_cell_out_of_shape_is_found(rule, source):
    assert rules(code(source)) == [rule]


COMMENTS = {
    'comment': [
        'def wait(span: float) -> None:\n    "Wait"',
        'def wait(low: float, high: float):  # seconds\n    "Wait"',
        'class Clock:\n    def wait(self, span: float | None = None) -> None:\n        "Wait"',
        'class Clock:\n    "A clock"\n    def __init__(self, start):\n        self.start = start',
        '@dataclass\nclass Clock:\n    "A clock"\n    start: float',
        'class Clock(NamedTuple):\n    "A clock"\n    start: float | None = None',
    ],
    'raises': [
        'def wait() -> None:\n    "Wait"\n    raise MlrefError("now")',
        'def wait(clock: Clock) -> None:\n    "Wait"\n    check_type(clock, Clock, "a clock")',
        'class Clock:\n    "A clock"\n    def __init__(self):\n        raise Outage("no clock")',
        'def _look() -> None:\n    raise Outage("no clock")\n'
        'def wait() -> None:\n    "Wait"\n    _look()',
    ],
}
COMMENT_CASES = [(rule, source) for rule, sources in COMMENTS.items() for source in sources]


@pytest.mark.parametrize(('rule', 'source'), COMMENT_CASES)
def test_what_help_does_not_say_is_found(rule, source):
    found = rules(MODULE, exported(source), code('wait, Clock'))
    assert set(found) - {'docstring'} == {rule}


def test_what_help_says_is_said_once():
    fine = [
        'def wait(span: float) -> None:\n    "Wait `span` seconds"',
        'def wait(\n    # Seconds\n    span: float,\n) -> None:\n    "Wait"',
        'def wait(\n    span: float = 2.0,  # Seconds\n) -> None:\n    "Wait"',
        'def wait(clock: Clock, seed: int = 0) -> None:\n    "Wait"',
        'def wait() -> None:\n    "Wait; raises `Outage`"\n    raise Outage("no clock")',
        'class Clock:\n    "Time; raises `Outage`"\n    def __init__(self):\n        raise Outage',
        '@dataclass\nclass Clock:\n    "A clock"\n    start: float  # Seconds\n    of: Clock',
        'def _look() -> None:\n    raise Outage("no clock")\n'
        'def wait() -> None:\n    "Wait"\n    try:\n        _look()\n'
        '    except Outage:\n        return',
        'class Clock:\n    "Time"\n    def wait(self, span: float):\n        "Wait"\n'
        'class Real:\n    "Time"\n    def wait(self, span: float):\n        "Wait `span` seconds"',
    ]
    for source in fine:
        assert rules(MODULE, exported(source), code('wait, Clock, Real')) == []


def test_what_only_looks_out_of_shape_is_not():
    fine = [
        'x, y = y, x',
        'good, bad = [], 0',
        'class A:\n    def f(self) -> int: ...',
        'self.x = 1',
        '%time x = 1',
        'x = [y for y in t]',
        'n: int = 1  # a parameter\n' * 11,
    ]
    assert rules(*map(code, fine)) == []


PAGES = {
    'one-module': [code('#| default_exp a\n#| default_exp b')],
    'cells': [code('x')] * 90,
    'cell-id': [Cell('code', 'same', 'x'), Cell('markdown', 'same', 'A word')],
    'outputs': [code('x', outputs=[{'text': 'long' * 20000}])],
    'counts': [code('x', count=3)],
    'traceback': [code('x', outputs=[{'output_type': 'error'}])],
    'warnings': [code('x', outputs=[{'name': 'stderr'}])],
    'prose': [code('# why\n' * 500)],
    'conflict': [Cell('markdown', 'm1', '<<<<<<< HEAD')],
    'markdown-code': [Cell('markdown', 'm1', "So:\nassert load('a') == 1")],
    'defined-once': [exported('def one():\n    ...'), exported('def one():\n    pass')],
    'defined-once ': [exported('_FEW = 6'), exported('_FEW: int = 12')],
    'named': [Cell('markdown', 'm1', 'Leave out `_gone`.'), code('_here = 1')],
    'idle': [code('test_eq(load(1), load(1))')],
    'idle ': [code('rows = 1 if False else 2')],
    'module-lines': [exported('# why\n' * 501), Cell('markdown', 'm1', 'word ' * 500)],
    'docstring': [exported('def load(): return\n'), code('load()')],
    'shown': [exported('def load():\n    "Load"')],
    'shown ': [exported('def load():\n    "Load"'), code('assert load.__doc__')],
}


@pytest.mark.parametrize(('rule', 'cells'), PAGES.items(), ids=PAGES)
def test_a_page_out_of_shape_is_found(rule, cells):
    assert rule.strip() in rules(*cells)


def test_an_exercise_has_an_answer_that_is_run():
    assert exercise_rules(*ANSWERED) == []
    assert exercise_rules() == ['exercises']
    assert exercise_rules(file='nbs/guides/roll_back.ipynb') == []
    few = Cell('markdown', 'few', '## What to change\n\n1. Why?\n2. When?')
    assert exercise_rules(few, ANSWERED[1]) == ['exercises']
    assert exercise_rules(ASKED) == ['answer'] * 3
    open_cell = Cell('code', 'open', ANSWER.removeprefix(FOLD))
    assert exercise_rules(ASKED, open_cell) == ['answer'] * 3
    words = Cell('code', 'words', ANSWER.replace('assert answer() == 1', 'x = 1'), metadata=FOLDED)
    assert exercise_rules(ASKED, words) == ['answer'] * 3
    one = Cell('code', 'one', ANSWER.replace('# 2: now\n', ''), metadata=FOLDED)
    assert exercise_rules(ASKED, one) == ['answer']
    assert exercise_rules(ASKED, Cell('code', 'seen', ANSWER)) == ['answer']
    assert exercise_rules(*reversed(ANSWERED)) == ['answer'] * 3


def test_a_public_name_means_one_thing():
    top = Cell('markdown', 'm1', '# A\n\n> A page')
    pages = [Page(f'nbs/{n}.ipynb', (top, exported('Step = int\n_own = 1'))) for n in 'ab']
    assert [(f.file, f.rule) for f in check_pages(pages)] == [('nbs/b.ipynb', 'one-meaning')]
    assert not check_pages(pages[:1])


def test_a_page_needs_a_title():
    assert [f.rule for f in check_pages([Page('nbs/a.ipynb', (code('x'),))])] == ['title']


def test_the_first_line_of_a_module_is_not_too_long():
    for words, found in ((18, []), (19, ['columns'])):
        top = Cell('markdown', 'm0', '# A\n\n> ' + 'word ' * words + '.')
        cells = (top, code('#| default_exp a'), *ANSWERED)
        assert [f.rule for f in check_pages([Page('nbs/05_a.ipynb', cells)])] == found


def test_text_about_code_is_not_code():
    text = 'Call `load(x)`:\n```python\nassert load(1)\n```\n[a page](b.html)\n- one (two)'
    assert rules(Cell('markdown', 'm1', text)) == []


def test_a_patch_is_for_classes_of_others():
    own = exported('class Store:\n    "A store"')
    patch = exported('@patch\ndef put(self: Store):\n    "Put"')
    other = exported('@patch\ndef put(self: Path):\n    "Put"')
    assert 'patch' in rules(own, patch)
    assert 'patch' not in rules(own, other)


def test_a_general_page_does_not_know_the_flights():
    reach = exported('from mlref.flights import table')
    words = exported('x = "no carrier, and no tailnum"')
    assert rules(MODULE, reach) == ['flights-import', 'domain']
    assert rules(MODULE, words) == ['domain', 'domain']
    assert rules(MODULE, words, file='nbs/40_flights.ipynb') == []
    assert rules(MODULE, exported('in_flight = 1  # requests in flight')) == []


def test_imports_go_one_way():
    later = Page('nbs/07_late.ipynb', (TOP, code('#| default_exp late'), *ANSWERED))
    cells = (TOP, MODULE, exported('from mlref.late import x'), *ANSWERED)
    early = Page('nbs/05_store.ipynb', cells)
    assert [f.rule for f in check_pages([early, later])] == ['order']


def test_the_baseline_only_shrinks(tmp_path):
    one = Finding('nbs/a.ipynb', 'nodes', 'cell 1', 'heavy')
    new = Finding('nbs/b.ipynb', 'nodes', 'cell 2', 'heavy')
    file = tmp_path / 'baseline.txt'
    write_baseline({('nbs/a.ipynb', 'nodes'): 2, ('nbs/a.ipynb', 'gone'): 1}, file)
    allowed = read_baseline(file)
    assert over_baseline([one, one], allowed) == []
    assert len(over_baseline([one, one, one], allowed)) == 4  # a head line, and every candidate
    assert over_baseline([new], allowed) == [str(new)]
    write_baseline(lower_baseline([one, new], allowed), file)
    assert file.read_text() == '1 nbs/a.ipynb nodes\n'


def test_a_merge_of_two_baselines_can_be_read(tmp_path):
    file = tmp_path / 'baseline.txt'
    file.write_text('2 nbs/a.ipynb nodes\n1 nbs/a.ipynb nodes\n')
    assert read_baseline(file) == {('nbs/a.ipynb', 'nodes'): 2}


def test_a_part_that_is_not_there_is_found(tmp_path):
    (tmp_path / 'tests').mkdir()
    (tmp_path / 'reports' / 'results').mkdir(parents=True)
    (tmp_path / 'mlref').mkdir()
    (tmp_path / 'mlref' / 'log.py').touch()
    (tmp_path / 'reports' / 'results' / 'ingest.json').write_text('{"rows": [{"name": "wall"}]}')
    there = {
        'page': None,
        'module': 'mlref.log',
        'test': 'tests/parts.json',
        'row': ['ingest', 'wall'],
    }
    gone = {
        'page': 'nbs/a.ipynb',
        'module': 'mlref.gone',
        'test': 'tests/test_gone.py',
        'row': ['ingest', 'lost'],
    }
    parts = [{'part': str(k), **(gone if k == 7 else there)} for k in range(24)]
    (tmp_path / 'tests' / 'parts.json').write_text(json.dumps(parts))
    found = check_parts(tmp_path)
    assert [finding.where for finding in found] == ['7'] * 4
    assert empty_cells(tmp_path).startswith('0 (page); 1 (page);')
    (tmp_path / 'tests' / 'parts.json').write_text(json.dumps(parts[1:]))
    assert '24 different parts' in check_parts(tmp_path)[0].message


def read_settings() -> SectionProxy:
    "What nbdev reads"
    settings = ConfigParser(delimiters=['='], interpolation=None)
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    return settings['DEFAULT']


@pytest.fixture
def tree(tmp_path) -> Path:
    "A checkout with one page, exported by nbdev"
    for name in ('settings.ini', 'ruff.toml', 'pyrefly.toml'):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ('run', 'setup.py', 'README.md'):
        (tmp_path / name).touch()
    for name in ('nbs', 'mlref', 'tests'):
        (tmp_path / name).mkdir()
    version = read_settings()['version']
    (tmp_path / 'mlref' / '__init__.py').write_text(f'__version__ = "{version}"\n')
    subprocess.run(['git', 'init', '-q', str(tmp_path)], check=True)
    return tmp_path


def plant(
    tree: Path,
    source: str,  # of the one exported cell
) -> None:
    "Write nbs/01_store.ipynb and generate its module"
    sources = ['#| default_exp store', f'#| export\n{source}']
    cells = [
        {
            'cell_type': 'code',
            'execution_count': None,
            'id': f'c{k}',
            'metadata': {},
            'outputs': [],
            'source': text,
        }
        for k, text in enumerate(sources)
    ]
    notebook = {'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}
    (tree / 'nbs' / '01_store.ipynb').write_text(json.dumps(notebook))
    run_tool(BIN / 'nbdev_export', good=(0,), cwd=tree)


def test_what_is_not_formatted_is_found(tree):
    plant(tree, 'x = "1"')
    assert [finding.file for finding in check_format(tree)] == ['nbs/01_store.ipynb']


def test_what_the_linter_finds_is_told_as_page_and_cell(tree):
    plant(tree, 'def put(rows=[]):\n    return rows')
    (found,) = check_lint(tree)
    assert (found.file, found.rule) == ('nbs/01_store.ipynb', 'B006')
    assert found.where == 'cell c1: line 2'


def test_a_type_error_is_told_as_page_and_cell(tree):
    plant(tree, 'def put(rows: list[int]) -> str:\n    return rows')
    (found,) = check_types(tree)
    assert (found.file, found.rule) == ('nbs/01_store.ipynb', 'types')
    assert found.where.startswith('cell c1, line 2: `return rows`')


def test_untyped_arguments_are_found_in_strict_modules_only(tree):
    plant(tree, 'def put(rows):\n    return rows')
    assert check_types(tree) == []
    (tree / 'tests' / 'strict.txt').write_text('store\n')
    assert len(check_types(tree)) == 1


def test_a_module_changed_by_hand_is_found(tree):
    plant(tree, 'x = 1')
    assert check_export(tree) == []
    with (tree / 'mlref' / 'store.py').open('a') as file:
        file.write('y = 2\n')
    assert [finding.file for finding in check_export(tree)] == ['mlref/store.py']


def test_the_typed_marker_outlives_an_export(tree):
    (tree / 'mlref' / 'py.typed').touch()
    plant(tree, 'x = 1')
    assert (tree / 'mlref' / 'py.typed').exists()


def test_the_typed_marker_ships(tmp_path):
    for name in ('settings.ini', 'setup.py', 'README.md'):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ('nbs', 'mlref'):
        shutil.copytree(ROOT / name, tmp_path / name)
    run_tool(sys.executable, 'setup.py', '-q', 'build_py', '-d', 'built', good=(0,), cwd=tmp_path)
    assert (tmp_path / 'built' / 'mlref' / 'py.typed').exists()


def test_a_tool_that_cannot_work_is_no_pass(monkeypatch, capsys):
    def broken():
        raise RuntimeError('ruff gave 2')

    monkeypatch.setattr(check, 'STEPS', {'lint': broken})
    assert check.check() == 1
    assert 'lint: BROKE: ruff gave 2' in capsys.readouterr().out


def test_a_readme_that_is_not_the_index_is_found(tree):
    (tree / 'README.md').write_text('# Another\n')
    assert [finding.rule for finding in check_readme(tree)] == ['readme']


def glossary(folder: Path, *rows: str) -> list[str]:
    "Rules that a glossary of these rows breaks, beside one page that says **watermark**"
    (folder / 'nbs').mkdir()
    table = '\n'.join(['| term | what it means | page |', '|---|---|---|', *rows])
    pages = {'glossary': table, '05_store': '# Store\n\nHow far it came is its **watermarks**.'}
    for name, text in pages.items():
        cells = [{'cell_type': 'markdown', 'id': 'c', 'source': text}]
        (folder / 'nbs' / f'{name}.ipynb').write_text(json.dumps({'cells': cells}))
    return [finding.rule for finding in check_glossary(folder)]


@pytest.mark.parametrize(
    ('row', 'broken'),
    [
        ('| **watermark** | How far it came. | [store](05_store.ipynb) |', []),
        ('| **store** | Where it lies: a heading counts. | [store](05_store.ipynb) |', []),
        ('| **offset** | Never said there. | [store](05_store.ipynb) |', ['glossary-term']),
        ('| **offset** | Elsewhere. | [log](03_log.ipynb) |', ['glossary-link']),
    ],
)
def test_a_term_stands_in_bold_where_the_glossary_says(tmp_path, row, broken):
    assert glossary(tmp_path, row) == broken


def test_readme_shows_code_and_what_it_gives():
    said = {'output_type': 'stream', 'name': 'stdout', 'text': '42\n'}
    warned = {'output_type': 'stream', 'name': 'stderr', 'text': 'slow'}
    cell = {'cell_type': 'code', 'source': '#| echo: false\nprint(42)', 'outputs': [said, warned]}
    assert [block for block in show_cell(cell) if block] == ['```text\n42\n```']
    shown = show_cell({**cell, 'source': 'print(42)'})
    assert shown[:2] == ['```python\nprint(42)\n```', '```text\n42\n```']
    assert show_cell({**cell, 'source': '#| hide\nprint(42)'}) == []
