"""The shape of a page, and the one-way order of imports

Numbered notebooks (`07_offline.ipynb`) define the order: a module may import only modules exported
by lower-numbered notebooks. General pages (below `40_`) may not reach or name the flights in what
they export.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator

from checks.comments import check_comments
from checks.exercises import check_exercises, is_folded
from checks.notebooks import DIRECTIVE, LIBRARY, ROOT, Cell, Finding, Page, read_pages
from checks.shapes import COLUMNS, FUNCTIONS, Found, check_shape
from checks.truth import check_truth

CELLS = 90  # in one notebook
OUTPUT_KB = 64  # of stored outputs in one notebook
WORDS = 40  # of prose per 1,000 characters of code, at least
SHORT = 2000  # characters of code: below, a page owes no prose
MODULE_LINES = 500  # of a generated module
WING = 40  # the first number of a page that may know the flights
DOMAIN = re.compile(
    r'nycflights\w*|(?<!in[-_ ])(?<!in)flights?|airports?|airlines?|carriers?|tail_?nums?',
    re.IGNORECASE,
)
WORD = re.compile(r'\w+')
PRIVATE = re.compile(r'`(_\w+)`')
COMPARES = ('test_eq', 'test_close', 'check_equal')
RUNS = (ast.Assert, ast.Import, ast.ImportFrom, ast.With)  # statements that no prose looks like


def check_pages(pages: list[Page] | None = None) -> list[Finding]:
    "Findings of all pages (default: those of the repository)"
    pages = read_pages(ROOT) if pages is None else pages
    order = import_order(pages)
    own = own_classes(pages)
    code = {word for page in pages for cell in page.code for word in WORD.findall(cell.source)}
    findings = []
    for page in pages:
        for where, rule, message in check_page(page, order, own):
            findings.append(Finding(page.file, rule, where, message))
        findings += [Finding(page.file, rule, '', said) for rule, said in check_named(page, code)]
    return findings + check_one_meaning(pages) + check_comments(pages)


def check_one_meaning(pages: list[Page]) -> list[Finding]:
    "Public names that two modules define: one name means one thing"
    first: dict[str, str] = {'main': ''}  # an entry point is called so in every module
    found = []
    for page in pages:
        for name in sorted(set(defined_names(page))):
            other = first.setdefault(name, page.file)
            if other not in ('', page.file) and not name.startswith('_'):
                said = f'`{name}` is defined on {other} too; name one of them otherwise'
                found.append(Finding(page.file, 'one-meaning', '', said))
    return found


def import_order(pages: list[Page]) -> dict[str, int]:
    "Place of each module among the numbered pages"
    numbered = [
        page for page in pages if re.match(r'\d', page.name) and '/decisions/' not in page.file
    ]
    return {module: k for k, page in enumerate(numbered) for module in page.modules}


def own_classes(pages: list[Page]) -> set[str]:
    "Names of the classes that the library exports"
    cells = [cell for page in pages for cell in page.code if cell.exported and cell.tree]
    return {node.name for c in cells for node in c.tree.body if isinstance(node, ast.ClassDef)}


def check_page(
    page: Page,
    order: dict[str, int],  # place of each module
    own: set[str],  # classes that may not be patched
) -> Iterator[tuple[str, str, str]]:
    "(where, rule, message) of everything out of bounds"
    for check in CHECKS:
        for rule, message in check(page):
            yield '', rule, message
    for cell in page.text:
        for rule, message in check_markdown(cell):
            yield cell.where, rule, message
    for place, cell in enumerate(page.code):
        shown = ' '.join(later.source for later in page.code[place + 1 :] if not later.exported)
        for rule, message in check_code(page, cell, shown, order, own):
            yield cell.where, rule, message


def check_top(page: Page) -> Found:
    "Title, number of modules and of cells, and that each cell has its own name"
    first = page.text[0].source if page.text else ''
    if not re.match(r'\s*# .+\n+> .+', first):
        yield 'title', 'no "# Title" and "> one-line summary" at the top'
    if len(page.modules) > 1:
        yield 'one-module', f'exports to {len(page.modules)} modules'
    if len(page.cells) > CELLS:
        yield 'cells', f'{len(page.cells)} cells (limit {CELLS})'
    for name, count in Counter(cell.id for cell in page.cells).items():
        if count > 1:
            yield 'cell-id', f'{count} cells are called {name}; a finding would name both'


def check_stored(page: Page) -> Found:
    "What a notebook keeps of its last run"
    outputs = [output for cell in page.code for output in cell.outputs]
    size = sum(len(json.dumps(cell.outputs)) for cell in page.code) / 1024
    if size > OUTPUT_KB:
        yield 'outputs', f'{size:.0f} KB of stored outputs (limit {OUTPUT_KB})'
    if any(cell.count for cell in page.code):
        yield 'counts', 'execution counts stored; run nbdev_clean'
    if any(output.get('output_type') == 'error' for output in outputs):
        yield 'traceback', 'a stored traceback'
    if any(output.get('name') == 'stderr' for output in outputs):
        yield 'warnings', 'stored warnings (stderr)'


def check_prose(page: Page) -> Found:
    "Enough words for the code"
    # an answer to an exercise has its words in its comments
    characters = sum(len(cell.source) for cell in page.code if not is_folded(cell))
    words = sum(len(cell.source.split()) for cell in page.text)
    if characters > SHORT and 1000 * words / characters < WORDS:
        rate = 1000 * words / characters
        yield 'prose', f'{rate:.0f} words per 1,000 characters of code (at least {WORDS})'


def check_module(page: Page) -> Found:
    "Lines of the module, and what its first line says"
    sources = [cell.source for cell in page.code if cell.exported]
    lines = [line for source in sources for line in source.splitlines()]
    count = sum(not DIRECTIVE.match(line) for line in lines)
    if count > MODULE_LINES:
        yield 'module-lines', f'a module of {count} lines (limit {MODULE_LINES})'
    line = re.search(r'^> (.+)', page.text[0].source, re.MULTILINE) if page.text else None
    summary = line[1] if line else ''
    if page.modules and len(f'"""{summary}"""') > COLUMNS:
        yield 'columns', f'a first line of {len(summary)} columns (limit {COLUMNS - 6})'
    if is_general(page):
        yield from check_domain(summary)


def check_defined_once(page: Page) -> Found:
    "A second definition hides the first, also from those who read it"
    for name, count in Counter(defined_names(page)).items():
        if count > 1:
            yield 'defined-once', f'`{name}` is defined {count} times'


CHECKS = (
    check_top,
    check_stored,
    check_prose,
    check_module,
    check_defined_once,
    check_exercises,
)


def defined_names(page: Page) -> list[str]:
    "What the module of a page defines, each as often as it is defined"
    trees = [cell.tree for cell in page.code if cell.exported and cell.tree]
    return [name for tree in trees for node in tree.body for name in bound_by(node)]


def bound_by(node: ast.stmt) -> Iterator[str]:
    "The names that a statement of a module defines"
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        names = [part for part in ast.walk(target) if isinstance(part, ast.Name)]
        yield from (name.id for name in names if isinstance(name.ctx, ast.Store))


def check_named(
    page: Page,
    code: set[str],  # words of the code of all pages
) -> Found:
    "A private name in prose that no code has (any more)"
    for cell in page.text:
        for name in PRIVATE.findall(cell.source):
            if name not in code:
                yield (
                    'named',
                    f'`{name}` is spoken of, and nothing is called so; name what there is',
                )


def check_idle(tree: ast.Module) -> Found:
    "What compares a thing with itself, or asks what is known beforehand"
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.IfExp)) and isinstance(node.test, ast.Constant):
            yield (
                'idle',
                f'line {node.lineno}: `if {node.test.value}`; leave out what never happens',
            )
        compares = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if compares and node.func.id in COMPARES and len(node.args) > 1:
            one, other = map(ast.dump, node.args[:2])
            if one == other:
                yield 'idle', f'line {node.lineno}: compares a thing with itself; it cannot fail'


def is_general(page: Page) -> bool:
    "Does it export a module that must not know the flights?"
    number = re.match(r'\d+', page.name)
    wing = number and int(number[0]) >= WING
    flights = any(module.split('.')[0] == 'flights' for module in page.modules)
    return bool(page.modules) and not wing and not flights


def check_domain(text: str) -> Found:
    "Words of the flights"
    for word in DOMAIN.findall(text):
        yield 'domain', f'a general module names `{word}`'


def check_markdown(cell: Cell) -> Found:
    "Code that has become text, and so never runs; an unresolved merge"
    if re.search(r'^\s*`?(<<<<<<<|>>>>>>>)', cell.source, re.MULTILINE):
        yield 'conflict', 'an unresolved merge conflict'
    outside = re.sub(r'^ *```.*?^ *```', '', cell.source, flags=re.MULTILINE | re.DOTALL)
    for line in outside.splitlines():
        if line.startswith('%%') or runs(line):
            yield 'markdown-code', f'Markdown that is code: {line.strip()[:60]}'
            return


def runs(
    line: str,  # of Markdown
) -> bool:
    "Is it a statement that does something?"
    try:
        body = ast.parse(line).body
    except (SyntaxError, ValueError):
        return False
    values = [node.value for node in body if isinstance(node, (ast.Expr, ast.Assign))]
    calls = [value for value in values if isinstance(value, ast.Call)]
    if any(isinstance(call.func, (ast.Name, ast.Attribute)) for call in calls):
        return True
    return any(isinstance(node, RUNS) for node in body)


def check_code(
    page: Page,
    cell: Cell,
    shown: str,  # source of the later cells that are not exported
    order: dict[str, int],  # place of each module
    own: set[str],  # classes that may not be patched
) -> Found:
    "A cell of code: imports apart, its shape, and what is exported"
    if cell.tree is None:
        return
    imported = [n for n in cell.tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    if imported and len(imported) < len(cell.tree.body):
        yield (
            'imports-apart',
            'imports and code in one cell (the site runs such a cell, and breaks)',
        )
    if not imported:
        yield from check_shape(cell)
        yield from check_truth(cell.tree)
        yield from check_idle(cell.tree)
    if cell.exported:
        yield from check_exported(cell, shown)
        yield from check_patches(cell, own)
        yield from check_order(page, cell, order)
        if is_general(page):
            yield from check_domain(cell.source)


def check_exported(
    cell: Cell,
    shown: str,  # source of the later cells that are not exported
) -> Found:
    "What is public has a docstring and is shown or tested on its page"
    for node in cell.tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith('_'):
            continue
        if not ast.get_docstring(node):
            yield 'docstring', f'`{node.name}` has no docstring'
        if not re.search(rf'\b{node.name}\b(?!\.__(?:doc|name)__)', shown):  # these prove nothing
            yield 'shown', f'`{node.name}` is never shown or tested'


def check_patches(
    cell: Cell,
    own: set[str],  # classes that may not be patched
) -> Found:
    "`@patch` is for classes of other packages"
    for node in cell.tree.body:
        if not isinstance(node, FUNCTIONS) or not node.args.args:
            continue
        names = [ast.unparse(each).split('(')[0] for each in node.decorator_list]
        first = node.args.args[0].annotation
        owner = ast.unparse(first) if first else ''
        if 'patch' in names and owner in own:
            yield 'patch', f'`{owner}.{node.name}` is patched onto a class of this package'


def check_order(
    page: Page,
    cell: Cell,
    order: dict[str, int],  # place of each module
) -> Found:
    "A module imports only from lower numbers"
    if not page.modules:
        return
    here = order.get(page.modules[0], len(order))
    for module in imports(cell.tree):
        if order.get(module, -1) >= here:
            yield 'order', f'imports `{module}`, which comes later'
        if is_general(page) and module.split('.')[0] == 'flights':
            yield 'flights-import', f'a general module imports `{module}`'


def imports(tree: ast.Module) -> Iterator[str]:
    "Modules of the library that a cell imports, also inside functions"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == LIBRARY:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith(f'{LIBRARY}.'):
            yield node.module.removeprefix(f'{LIBRARY}.')
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (n.removeprefix(f'{LIBRARY}.') for n in names if n.startswith(f'{LIBRARY}.'))
