"""What `help()` must say of a public function: units and shapes of its parameters, errors it raises

A type such as `Task` says what is wanted; a number, a text, an array or a frame does not, so the
parameter has a comment, beside it or on the line above, or the docstring names it in backticks.
The same holds for the fields of a dataclass. What a class says of a method holds for other classes
with that method. An error that a function raises itself, by checking its arguments or by a private
function that it calls outside of a `try`, stands in its docstring.
"""

import ast
import re

from checks.notebooks import Cell, Finding, Page
from checks.shapes import FUNCTIONS, Found

UNTOLD = re.compile(r'\b(int|float|str|bytes|Any|ndarray|Tensor|DataFrame|Series|Mapping)\b')
TOLD = {'seed', 'topic', 'partition'}  # the same everywhere: a draw's seed, and as `Log` says
CHECKS = re.compile(
    r'check_(array|choice|distinct|frame|minutes?|name|number|probabilities|scores|type)'
    r'|validate_tables'
)
PROTOCOL = {'NotImplementedError', 'StopIteration'}  # said by the language, not by us
OURS = {'MlrefError', 'Outage', 'RegistryUnreachable', 'RequestError'}  # that others may catch
COMMENT = re.compile(r'^(.*?)# ')
Function = ast.FunctionDef | ast.AsyncFunctionDef
Method = tuple[str, str]  # names of a method and of its parameter


def check_comments(pages: list[Page]) -> list[Finding]:
    "Findings of the numbered pages, which are the library"
    said = said_of_methods(pages)
    found = []
    for page in pages:
        if not page.name[:1].isdigit():
            continue
        helpers = errors_of_helpers(page)
        for cell in page.code:
            if cell.exported and cell.tree:
                for rule, message in check_cell(cell, said, helpers):
                    found.append(Finding(page.file, rule, cell.where, message))
    return found


def check_cell(
    cell: Cell,
    said: set[Method],  # what an interface says of its methods
    helpers: dict[str, set[str]],  # private function of the page -> errors that it raises
) -> Found:
    "Parameters without a comment, errors without a word"
    commented = commented_lines(cell.source)
    for owner, node in public_functions(cell.tree):
        name = f'{owner}.{node.name}' if owner else node.name
        text = documentation(cell.tree, owner, node)
        for each in parameters_of(node):
            known = each.arg in TOLD or (bool(owner) and (node.name, each.arg) in said)
            if not known and is_untold(each) and not is_told(node, each, commented):
                yield 'comment', f'`{name}`: no comment on `{each.arg}` (unit, shape, meaning)'
        checks = set() if owner else raised_by_checks(node)
        for error in sorted(raised_by(node) | checks | raised_by_helpers(node, helpers)):
            if error not in text:
                yield 'raises', f'`{name}` raises {error}, and its docstring does not say so'
    yield from check_classes(cell.tree)
    yield from check_fields(cell.tree, commented)


def check_classes(tree: ast.Module) -> Found:
    "Classes whose objects check what they are made of, and do not say so"
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith('_'):
            continue
        text = ast.get_docstring(node) or ''
        for method in node.body:
            if isinstance(method, FUNCTIONS) and method.name == '__post_init__':
                for error in sorted(raised_by(method) | raised_by_checks(method)):
                    if error not in text:
                        yield 'raises', f'`{node.name}` raises {error} when it is made, untold'


def check_fields(
    tree: ast.Module,
    commented: dict[int, bool],  # from `commented_lines`
) -> Found:
    "Fields of public dataclasses, named tuples and structs without a comment"
    for owner in tree.body:
        if not isinstance(owner, ast.ClassDef) or owner.name.startswith('_') or not is_data(owner):
            continue
        text = ast.get_docstring(owner) or ''
        for each in owner.body:
            if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
                continue
            name = each.target.id
            kind = ast.unparse(each.annotation)
            is_clear = not UNTOLD.search(kind) or kind.startswith(('Annotated', 'ClassVar'))
            is_named = name.startswith('_') or f'`{name}`' in text
            lines = {each.lineno, each.end_lineno}
            is_beside = not lines.isdisjoint(commented) or commented.get(each.lineno - 1)
            if not (is_clear or is_named or is_beside):
                yield 'comment', f'`{owner.name}.{name}`: no comment (unit, shape, meaning)'


def is_data(owner: ast.ClassDef) -> bool:
    "Is it a class whose annotations are its fields?"
    decorators = [ast.unparse(each) for each in owner.decorator_list]
    bases = [ast.unparse(each) for each in owner.bases]
    return any('dataclass' in each for each in decorators) or any(
        each.endswith(('NamedTuple', 'Struct', 'TypedDict')) for each in bases
    )


def public_functions(tree: ast.AST) -> list[tuple[str, Function]]:
    "(class, function) of what others may call; '' for none"
    found: list[tuple[str, Function]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS) and not node.name.startswith('_'):
            found.append(('', node))
        elif isinstance(node, ast.ClassDef) and not node.name.startswith('_'):
            methods = [each for each in node.body if isinstance(each, FUNCTIONS)]
            public = [m for m in methods if m.name == '__init__' or not m.name.startswith('_')]
            found += [(node.name, method) for method in public]
    return found


def documentation(
    tree: ast.Module,
    owner: str,  # name of its class, '' for none
    node: Function,
) -> str:
    "Its docstring; of a constructor also that of its class"
    classes = [each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == owner]
    of_class = classes if node.name == '__init__' else []
    return ' '.join(ast.get_docstring(each) or '' for each in [node, *of_class])


def parameters_of(node: Function) -> list[ast.arg]:
    "All its parameters but `self` and `cls`"
    given = node.args
    rest = [each for each in (given.vararg, given.kwarg) if each is not None]
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, *rest]
    return [each for each in named if each.arg not in ('self', 'cls')]


def is_untold(parameter: ast.arg) -> bool:
    "Does its type leave open what is wanted?"
    return parameter.annotation is None or bool(UNTOLD.search(ast.unparse(parameter.annotation)))


def commented_lines(
    source: str,  # of a cell
) -> dict[int, bool]:  # line -> does the comment stand alone on it?
    "Lines of a cell that have a comment; of signatures, where no text holds a ` # `"
    found = enumerate(map(COMMENT.search, source.splitlines()), 1)
    return {number: not match[1].strip() for number, match in found if match}


def is_told(
    node: Function,
    parameter: ast.arg,
    commented: dict[int, bool],  # from `commented_lines`
) -> bool:
    "Is there a comment beside it or on the line above, or its name in the docstring?"
    if f'`{parameter.arg}`' in (ast.get_docstring(node) or ''):
        return True
    above = parameter.lineno - 1
    if above > node.lineno and commented.get(above):
        return True
    others = {each.lineno for each in parameters_of(node) if each is not parameter}
    ends = {parameter.end_lineno, defaults_end(node).get(parameter.arg)}
    return parameter.lineno not in others and not ends.isdisjoint(commented)


def defaults_end(node: Function) -> dict[str, int | None]:
    "Parameter -> the last line of its default"
    given = node.args
    ordered = [*given.posonlyargs, *given.args]
    pairs = [*zip(ordered[len(ordered) - len(given.defaults) :], given.defaults, strict=True)]
    keywords = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    pairs += [(each, value) for each, value in keywords if value is not None]
    return {each.arg: value.end_lineno for each, value in pairs}


def said_of_methods(pages: list[Page]) -> set[Method]:
    "What classes say of the parameters of their methods: it holds for those that do the same"
    said = set()
    for page in pages:
        for cell in page.code:
            if not cell.exported or cell.tree is None:
                continue
            commented = commented_lines(cell.source)
            for owner, node in public_functions(cell.tree):
                if owner and node.name != '__init__':
                    told = [p for p in parameters_of(node) if is_told(node, p, commented)]
                    said |= {(node.name, each.arg) for each in told}
    return said


def raised_by(node: Function) -> set[str]:
    "Names of the errors that stand in its own `raise` statements"
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Raise) and isinstance(each.exc, (ast.Call, ast.Name)):
            error = each.exc.func if isinstance(each.exc, ast.Call) else each.exc
            name = ast.unparse(error).rsplit('.', 1)[-1]
            if name[:1].isupper():
                found.add(name)
    return found - PROTOCOL


def raised_by_checks(node: Function) -> set[str]:
    "The error of the checks of arguments that a function calls"
    calls = [each.func for each in ast.walk(node) if isinstance(each, ast.Call)]
    names = [call.id for call in calls if isinstance(call, ast.Name)]
    return {'MlrefError'} if any(map(CHECKS.fullmatch, names)) else set()


def errors_of_helpers(page: Page) -> dict[str, set[str]]:
    "Private function of a page -> errors of ours that it raises"
    found = {}
    for cell in page.code:
        for node in cell.tree.body if cell.exported and cell.tree else ():
            if isinstance(node, FUNCTIONS) and node.name.startswith('_'):
                found[node.name] = (raised_by(node) | raised_by_checks(node)) & OURS
    return found


def raised_by_helpers(node: Function, helpers: dict[str, set[str]]) -> set[str]:
    "Errors of the private functions that it calls itself, where nothing is caught"
    inside = {
        id(each)
        for block in ast.walk(node)
        if isinstance(block, (ast.Try, ast.With))
        for part in block.body
        for each in ast.walk(part)
    }
    found = set()
    for each in ast.walk(node):
        is_named = isinstance(each, ast.Call) and isinstance(each.func, ast.Name)
        if is_named and id(each) not in inside:
            found |= helpers.get(each.func.id, set())
    return found
