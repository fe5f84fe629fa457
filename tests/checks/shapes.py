"""The shape of one cell, counted from the syntax tree, so that no layout can evade it"""

import ast
import io
import tokenize
from collections.abc import Iterator

from checks.notebooks import Cell

STATEMENTS = {True: 20, False: 10}  # of an exported cell and of any other, classes apart
DECLARED = 20  # parameters that a cell declares as `name: type = literal`, as a class its fields
CLASS_LINES = 60  # formatted lines of a class
NODES = 60  # syntax nodes of one simple statement
COLUMNS = 100  # of a line of code
ONE_LETTER = set('ijknxyXtpqT_')  # the only names of one letter that may be stored

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SIMPLE = (
    ast.AnnAssign,
    ast.Assert,
    ast.Assign,
    ast.AugAssign,
    ast.Delete,
    ast.Expr,
    ast.Raise,
    ast.Return,
)
COMPUTED = (
    ast.Await,
    ast.BinOp,
    ast.BoolOp,
    ast.Call,
    ast.Compare,
    ast.IfExp,
    ast.JoinedStr,
    ast.Lambda,
    *LOOPS,
)
Found = Iterator[tuple[str, str]]  # (rule, message)


def check_shape(cell: Cell) -> Found:
    "What is out of shape in a cell of code"
    if cell.tree is None:
        return
    yield from check_text(cell.source)
    yield from check_size(cell)
    yield from check_shared_lines(cell.tree)
    for node in ast.walk(cell.tree):
        if isinstance(node, SIMPLE):
            yield from check_statement(node)
        if isinstance(node, ast.Assign):
            yield from check_assignment(node)
    yield from check_names(cell.tree)


def check_text(
    source: str,  # of a cell
) -> Found:
    "Long lines and semicolons"
    for number, line in enumerate(source.splitlines(), 1):
        if len(line) > COLUMNS:
            yield 'columns', f'line {number}: {len(line)} columns (limit {COLUMNS})'
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return  # a magic: the rest of the cell is checked by its syntax tree
    for token in tokens:
        if token.type == tokenize.OP and token.string == ';':
            yield 'semicolon', f'line {token.start[0]}: a semicolon'


def check_size(cell: Cell) -> Found:
    "Too many statements, or a class that is too long"
    classes = [node for node in cell.tree.body if isinstance(node, ast.ClassDef)]
    # what is exported has no papermill parameters
    declared = [node for node in cell.tree.body if is_declaration(node) and not cell.exported]
    apart = {id(node) for each in classes for node in ast.walk(each)}
    apart |= {id(node) for node in declared[:DECLARED]}
    statements = [node for node in ast.walk(cell.tree) if isinstance(node, ast.stmt)]
    outside = sum(id(node) not in apart for node in statements)
    limit = STATEMENTS[cell.exported]
    if outside > limit:
        yield 'statements', f'{outside} statements (limit {limit})'
    for each in classes:
        lines = each.end_lineno - each.lineno + 1
        if lines > CLASS_LINES:
            yield 'class-lines', f'class {each.name} of {lines} lines (limit {CLASS_LINES})'


def is_declaration(node: ast.stmt) -> bool:
    "Does a statement declare a parameter, `name: type = literal`?"
    return isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant)


def check_shared_lines(tree: ast.Module) -> Found:
    "Statements that share a line; `def f(): ...` of a protocol may"
    taken = set()
    stubs = {id(n.body[0]) for n in ast.walk(tree) if isinstance(n, FUNCTIONS) and is_stub(n)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or id(node) in stubs:
            continue
        if node.lineno in taken:
            yield 'shared-line', f'line {node.lineno}: more than one statement'
        taken.add(node.lineno)


def is_stub(
    node: ast.AST,  # a function
) -> bool:
    "Is the body only `...`?"
    first = node.body[0]
    value = first.value if isinstance(first, ast.Expr) else None
    return isinstance(value, ast.Constant) and value.value is ...


def check_statement(node: ast.stmt) -> Found:
    "A simple statement that holds too much"
    nodes = sum(1 for _ in ast.walk(node))
    if nodes > NODES:
        yield 'nodes', f'line {node.lineno}: a statement of {nodes} nodes (limit {NODES})'
    if depth(node, LOOPS) > 1:
        yield 'comprehension', f'line {node.lineno}: a comprehension in a comprehension'
    if depth(node, (ast.IfExp,)) > 1:
        yield 'conditional', f'line {node.lineno}: a conditional in a conditional'


def depth(
    node: ast.AST,
    kinds: tuple[type, ...],
    level: int = 0,  # how many of the kinds stand around the node
) -> int:
    "How deep nodes of some kinds stand inside one another"
    level += isinstance(node, kinds)
    return max([level, *(depth(child, kinds, level) for child in ast.iter_child_nodes(node))])


def check_assignment(node: ast.Assign) -> Found:
    "A class changed from outside, several values computed at once"
    targets = [part for target in node.targets for part in getattr(target, 'elts', [target])]
    for target in targets:
        owner = target.value if isinstance(target, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id[:1].isupper():
            message = f'line {node.lineno}: {owner.id}.{target.attr} is set from outside the class'
            yield 'class-attribute', message
    several = len(targets) > 1 and isinstance(node.value, ast.Tuple)
    if several and any(isinstance(part, COMPUTED) for part in ast.walk(node.value)):
        yield 'parallel', f'line {node.lineno}: several computed values assigned at once'


def check_names(tree: ast.Module) -> Found:
    "Names of one letter that no convention explains, each once in a cell"
    stored = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            stored.setdefault(node.id, node.lineno)
        elif isinstance(node, ast.arg):
            stored.setdefault(node.arg, node.lineno)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            stored.setdefault(node.name, node.lineno)
    for name, line in sorted(stored.items()):
        if len(name) == 1 and name not in ONE_LETTER:
            yield 'one-letter', f'line {line}: `{name}` is a name of one letter'
