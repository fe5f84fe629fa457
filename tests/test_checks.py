"""Every rule of ./run check can fail: planted pages, modules and trees"""

import pytest

from checks.notebooks import Cell, Finding, Page
from checks.pages import check_pages
from checks.ratchet import lower_baseline, over_baseline, read_baseline, write_baseline

TOP = Cell('markdown', 'top', '# A page\n\n> What it is for')
LONG = 'x = 1  # ' + 'long ' * 20
MODULE = Cell('code', 'exp', '#| default_exp store')


def code(source: str, **more) -> Cell:
    "A cell of a page, shown only"
    return Cell('code', 'c1', source, **more)


def exported(source: str) -> Cell:
    "A cell of the library"
    return Cell('code', 'c2', f'#| export\n{source}')


def rules(*cells: Cell, file: str = 'nbs/05_store.ipynb') -> list[str]:
    "Rules that a page of these cells breaks"
    return [finding.rule for finding in check_pages([Page(file, (TOP, *cells))])]


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


def test_what_only_looks_out_of_shape_is_not():
    fine = [
        'x, y = y, x',
        'good, bad = [], 0',
        'class A:\n    def f(self) -> int: ...',
        'self.x = 1',
        '%time x = 1',
        'x = [y for y in t]',
    ]
    assert rules(*map(code, fine)) == []


PAGES = {
    'one-module': [code('#| default_exp a\n#| default_exp b')],
    'cells': [code('x')] * 90,
    'outputs': [code('x', outputs=[{'text': 'long' * 20000}])],
    'counts': [code('x', count=3)],
    'traceback': [code('x', outputs=[{'output_type': 'error'}])],
    'warnings': [code('x', outputs=[{'name': 'stderr'}])],
    'prose': [code('# why\n' * 500)],
    'conflict': [Cell('markdown', 'm1', '<<<<<<< HEAD')],
    'markdown-code': [Cell('markdown', 'm1', "So:\nassert load('a') == 1")],
    'module-lines': [exported('# why\n' * 501), Cell('markdown', 'm1', 'word ' * 500)],
    'docstring': [exported('def load(): return\n'), code('load()')],
    'shown': [exported('def load():\n    "Load"')],
}


@pytest.mark.parametrize(('rule', 'cells'), PAGES.items(), ids=PAGES)
def test_a_page_out_of_shape_is_found(rule, cells):
    assert rule in rules(*cells)


def test_a_page_needs_a_title():
    assert [f.rule for f in check_pages([Page('nbs/a.ipynb', (code('x'),))])] == ['title']


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
    later = Page('nbs/07_late.ipynb', (TOP, code('#| default_exp late')))
    early = Page('nbs/05_store.ipynb', (TOP, MODULE, exported('from mlref.late import x')))
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
