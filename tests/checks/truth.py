"""Values that are tested for truth although an empty one would be as good as any other

`if found := next(...)` lets '', [], {}, 0 and False pass for nothing found, `given or default`
puts the default in their place. What is asked is whether there *is* a value: `is None`, `in`, a
default of one's own. Four forms are findings, each by its syntax alone:

- a walrus whose value is tested for truth, unless it is a number or a container by construction;
- a value that was looked up (`next`, `.get`, `.pop`, `getattr` with a default), tested for truth at
  once or by the name it was given, unless its default says that an empty one means none, or its
  type is asked for as well;
- `parameter or default` where the default is no empty literal, which would change nothing, unless
  the parameter's own default says that an empty one means none;
- a parameter declared as a number, a text or bytes *or None* that is tested for truth.
"""

import ast
from collections.abc import Iterator

from checks.shapes import FUNCTIONS, Found

MADE = {'bool', 'dict', 'int', 'len', 'list', 'set', 'sorted', 'str', 'sum', 'tuple'}
LOOKED_UP = {'get', 'pop'}  # methods
SCALARS = {'Any', 'bool', 'bytes', 'float', 'int', 'object', 'str'}  # may be falsy and no container
ADVICE = 'ask `is None`, or name what is meant by none'


def check_truth(tree: ast.Module) -> Found:
    "Found values and arguments that are tested for truth"
    for scope in [tree, *(n for n in ast.walk(tree) if isinstance(n, FUNCTIONS))]:
        own = list(nodes_of(scope))
        tested = {id(part): part for node in own for part in tested_by(node)}
        optional = optional_scalars(scope)
        found = looked_up_names(own)
        for part in tested.values():
            what = describe(part, optional, found)
            if what:
                yield 'truth', f'line {part.lineno}: {what} is tested for truth; {ADVICE}'
        for node in own:
            if isinstance(node, ast.BoolOp) and id(node) not in tested:
                yield from check_default(node, set(parameters(scope)) - empty_by_default(scope))


def nodes_of(
    scope: ast.AST,  # a module or a function
) -> Iterator[ast.AST]:
    "What belongs to a scope, without the functions inside it"
    waiting = list(ast.iter_child_nodes(scope))
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, FUNCTIONS):
            waiting += ast.iter_child_nodes(node)


def tested_by(node: ast.AST) -> Iterator[ast.expr]:
    "The expressions whose truth a node asks for, down to the parts of and, or, not"
    waiting: list[ast.expr] = []
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        waiting = [node.test]
    elif isinstance(node, ast.comprehension):
        waiting = list(node.ifs)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        waiting = [node.operand]
    while waiting:
        part = waiting.pop()
        yield part
        if isinstance(part, ast.BoolOp):
            waiting += part.values


def parameters(scope: ast.AST) -> dict[str, ast.arg]:
    "Parameters of a function by their names"
    if not isinstance(scope, FUNCTIONS):
        return {}
    given = scope.args
    return {each.arg: each for each in [*given.posonlyargs, *given.args, *given.kwonlyargs]}


def empty_by_default(scope: ast.AST) -> set[str]:
    "Parameters whose default is an empty text, list or the like"
    if not isinstance(scope, FUNCTIONS):
        return set()
    given = scope.args
    ordered = [*given.posonlyargs, *given.args]
    last = ordered[len(ordered) - len(given.defaults) :]
    pairs = [*zip(last, given.defaults, strict=True)]
    pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return {each.arg for each, value in pairs if says_none(value)}


def says_none(value: ast.AST | None) -> bool:
    "Is it an empty literal of a type, as a default is that says what means none?"
    return value is not None and is_empty(value) and ast.unparse(value) != 'None'


def optional_scalars(scope: ast.AST) -> set[str]:
    "Parameters that may be None, and otherwise a number, a text or bytes"
    names = set()
    for name, each in parameters(scope).items():
        parts = ast.unparse(each.annotation).split(' | ') if each.annotation else []
        if 'None' in parts and SCALARS & set(parts):
            names.add(name)
    return names


def is_looked_up(value: ast.AST | None) -> bool:
    "Is it what was found somewhere, or a default?"
    if not isinstance(value, ast.Call):
        return False
    name = value.func
    if isinstance(name, ast.Name):
        looked_up = name.id == 'next' or (name.id == 'getattr' and len(value.args) == 3)
    else:
        looked_up = isinstance(name, ast.Attribute) and name.attr in LOOKED_UP
    default = value.args[-1] if len(value.args) > 1 else None
    return looked_up and not says_none(default)


def looked_up_names(nodes: list[ast.AST]) -> set[str]:
    "Names that hold nothing but what was looked up"
    values: dict[str, list[bool]] = {}
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    values.setdefault(target.id, []).append(is_looked_up(node.value))
    checked = {
        node.args[0].id
        for node in nodes
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == 'isinstance'
        and isinstance(node.args[0], ast.Name)
    }
    return {name for name, found in values.items() if all(found)} - checked


def describe(
    part: ast.expr,  # whose truth is asked for
    optional: set[str],  # parameters that may be None
    found: set[str],  # names of what was looked up
) -> str:  # '' where nothing is wrong
    "What should not be tested for truth"
    if isinstance(part, ast.NamedExpr):
        made = isinstance(part.value, ast.Call) and ast.unparse(part.value.func) in MADE
        return '' if made else f'`{part.target.id} := ...`'
    if is_looked_up(part):
        return f'`{ast.unparse(part)[:40]}`, which was looked up,'
    if isinstance(part, ast.Name) and part.id in found:
        return f'`{part.id}`, which was looked up,'
    if isinstance(part, ast.Name) and part.id in optional:
        return f'the parameter `{part.id}`, which may be None,'
    return ''


def check_default(
    node: ast.BoolOp,
    given: set[str],  # parameters
) -> Found:
    "`given or default` in the place of a value"
    if isinstance(node.op, ast.And):
        return
    for left, right in zip(node.values, node.values[1:], strict=False):
        name = left.id if isinstance(left, ast.Name) else ''
        if (name in given or is_looked_up(left)) and not is_empty(right):
            shown = ast.unparse(left)[:40]
            yield 'truth', f'line {node.lineno}: `{shown} or ...` drops an empty value; {ADVICE}'


def is_empty(value: ast.expr) -> bool:
    "Is it a literal that is falsy itself?"
    if isinstance(value, (ast.List, ast.Tuple)):
        return not value.elts
    if isinstance(value, ast.Dict):
        return not value.keys
    return isinstance(value, ast.Constant) and not value.value
