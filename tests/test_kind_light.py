"""What a serving worker imports stays light: no frames, no training, no registry client

The rule is read off the code: no module of the list, and none that it imports, says `import polars`
or the like where it is executed on import. One process then imports all of them, as a worker does.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlref

LIBRARY = Path(mlref.__file__).parent
HEAVY = (
    *('torch', 'mlflow', 'polars', 'pandas', 'matplotlib', 'duckdb', 'pyarrow', 'sklearn'),
    'opentelemetry',  # an extra that few want
)
WORKER = (  # what a worker may import of this library, those missing left out
    'features',
    'read_plan',
    'keys',
    'vectors',
    'compiled_vectors',
    'hot_keys',
    'record_search',
    'entity_code',
    'records',
    'online',
    'last_values',
    'manifest',
    'lmdb_store',
    'calibration',
    'messages',
    'protocols',
    'oip',
    'mlflow_protocol',
    'oip_metadata',
    'openapi',
    'body_schemas',
    'tensors',
    'plain_requests',
    'row_forms',
    'request_fields',
    'named_values',
    'definitions',
    'bundle',
    'engines',
    'workers',
    'model',
    'own_model',
    'compress',
    'environment',
    'log',
    'group_commit',
    'batching',
    'prediction_cache',
    'route',
    'guardrails',
    'confidence',
    'rollout',
    'observe',
    'traces',
    'flights.common',
    'flights.on_demand',
)


def path_of(module: str, root: Path = LIBRARY) -> Path:
    "The file of a module below mlref"
    return root / (module.replace('.', '/') + '.py')


def executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    "Statements that run when a module is imported; not those of functions, nor for types alone"
    for node in body:
        yield node
        if isinstance(node, ast.If):
            for_types = isinstance(node.test, ast.Name) and node.test.id == 'TYPE_CHECKING'
            yield from executed(node.orelse if for_types else node.body + node.orelse)
        elif isinstance(node, (ast.With, ast.Try, ast.ClassDef)):
            yield from executed(node.body)


def imported(file: Path, module: str) -> Iterator[str]:
    "Absolute names of the modules that a module imports when it is imported"
    package = ['mlref', *module.split('.')[:-1]]
    for node in executed(ast.parse(file.read_text()).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            yield '.'.join([*above, *([node.module] if node.module else [])])


def heavy_chains(module: str, root: Path = LIBRARY) -> list[str]:
    "Every way from a module to a heavy package, as 'features > keys > polars'"
    found = []
    seen = {module}
    waiting = [(module, module)]
    while waiting:
        current, chain = waiting.pop()
        for name in imported(path_of(current, root), current):
            inside = name.removeprefix('mlref.')
            if name.partition('.')[0] in HEAVY:
                found.append(f'{chain} > {name}')
            elif name.startswith('mlref.') and inside not in seen:
                seen.add(inside)
                if path_of(inside, root).exists():
                    waiting.append((inside, f'{chain} > {inside}'))
    return found


@pytest.mark.parametrize('module', [name for name in WORKER if path_of(name).exists()])
def test_what_a_worker_imports_reaches_nothing_heavy(module):
    assert heavy_chains(module) == []


def test_an_import_of_a_helper_is_found_and_one_for_types_is_not(tmp_path):
    "Planted mistakes"
    (tmp_path / 'a.py').write_text('from typing import TYPE_CHECKING\nfrom .b import f\n')
    (tmp_path / 'b.py').write_text('if TYPE_CHECKING:\n    import torch\nfrom mlref.c import g\n')
    (tmp_path / 'c.py').write_text('def g():\n    import mlflow\n')
    assert heavy_chains('a', tmp_path) == []
    (tmp_path / 'c.py').write_text('try:\n    import polars as pl\nexcept ImportError:\n    pass\n')
    assert heavy_chains('a', tmp_path) == ['a > b > c > polars']


def test_a_process_with_all_of_it_has_nothing_heavy():
    there = [name for name in WORKER if path_of(name).exists()]
    code = (
        f'import json, sys; {"; ".join(f"import mlref.{name}" for name in there)}; '
        f'print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == []
