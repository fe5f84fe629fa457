"""Notebooks as the checks read them: pages, cells, syntax trees, and what a finding is"""

import ast
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = 'mlref'
EXPORT = re.compile(r'^\s*#\s*\|\s*(export|exports|exporti)\b', re.MULTILINE)
DIRECTIVE = re.compile(r'^\s*#\s*\|')
MODULE = re.compile(r'^\s*#\s*\|\s*default_exp\s+(\S+)', re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    "Something out of bounds"

    file: str  # relative to the root of the repository
    rule: str
    where: str  # 'cell 1a2b3c4d' or 'line 12'
    message: str

    def __str__(self) -> str:
        return f'{self.file}: {self.where + ": " if self.where else ""}{self.message} [{self.rule}]'


@dataclass(frozen=True)
class Cell:
    "A cell of a page"

    kind: str  # 'code' or 'markdown'
    id: str
    source: str
    outputs: list[dict] = field(default_factory=list)
    count: int | None = None  # the execution count that is stored
    metadata: dict = field(default_factory=dict)

    @cached_property
    def exported(self) -> bool:
        return self.kind == 'code' and bool(EXPORT.search(self.source))

    @cached_property
    def tree(self) -> ast.Module | None:
        "The syntax tree without magics; None where it does not parse"
        lines = self.source.splitlines()
        kept = ['' if line.lstrip().startswith(('%', '!')) else line for line in lines]
        try:
            return ast.parse('\n'.join(kept))
        except SyntaxError:
            return None

    @property
    def where(self) -> str:
        return f'cell {self.id}'


@dataclass(frozen=True)
class Page:
    "A notebook"

    file: str  # relative to the root of the repository
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return self.file.rsplit('/', 1)[-1]

    @cached_property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == 'code']

    @cached_property
    def text(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.kind == 'markdown']

    @cached_property
    def modules(self) -> list[str]:
        "The modules that the page exports to: one, or none"
        return [module for cell in self.code for module in MODULE.findall(cell.source)]


def read_page(
    path: Path,  # of the notebook
    root: Path = ROOT,  # what the names of files are relative to
) -> Page:
    "A notebook with its cells"
    cells = []
    for place, cell in enumerate(json.loads(path.read_text(encoding='utf-8'))['cells']):
        source = cell['source']
        cells.append(
            Cell(
                kind=cell['cell_type'],
                id=cell.get('id', str(place)),
                source=source if isinstance(source, str) else ''.join(source),
                outputs=cell.get('outputs', []),
                count=cell.get('execution_count'),
                metadata=cell.get('metadata', {}),
            )
        )
    return Page(path.relative_to(root).as_posix(), tuple(cells))


def page_paths(root: Path = ROOT) -> list[Path]:
    "Every notebook under nbs/ but hidden ones and Jupyter's copies, in the order of their names"
    return [
        path
        for path in sorted((root / 'nbs').rglob('*.ipynb'))
        if not path.name.startswith(('.', '_')) and '.ipynb_checkpoints' not in path.parts
    ]


def read_pages(root: Path = ROOT) -> list[Page]:
    "The pages, in the order of their names"
    return [read_page(path, root) for path in page_paths(root)]
