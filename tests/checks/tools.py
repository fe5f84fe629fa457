"""Findings of the formatter, the linter, the type checker, the exporter and the README

All of them work without a network. The type checker reads the generated modules; a finding is told
as page and cell, since that is where it is mended.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checks.notebooks import LIBRARY, ROOT, Finding, Page, read_page
from readme import readme

BIN = Path(sys.executable).parent
SOURCES = ('nbs', 'tests', 'run', 'setup.py')  # what ruff looks at; ruff.toml says how
STRICT = 'tests/strict.txt'  # modules whose every type is known, one a line
STRICT_RULES = {
    'implicit-any-empty-container',
    'implicit-any-parameter',
    'implicit-any-type-argument',
    'method-assign',
    'missing-override-decorator',
}
MARKER = re.compile(r'^# %% \.\./(\S+\.ipynb) #(\w+)')


def run_tool(
    *command: str | Path,
    good: tuple[int, ...] = (0, 1),  # exit statuses that mean the tool did its work
    cwd: Path = ROOT,
) -> str:
    "Standard output of a command; raises `RuntimeError` when it could not do its work"
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    if done.returncode not in good:
        raise RuntimeError(f'{words[0]} gave {done.returncode}: {done.stdout}{done.stderr}')
    return done.stdout


def relative_name(
    name: str,  # of a file, absolute
    root: Path,
) -> str:
    "The name as it is told"
    return Path(name).relative_to(root.resolve()).as_posix()


def check_format(root: Path = ROOT) -> list[Finding]:
    "Files that the formatter would change"
    command = ('ruff', 'format', '--check', '--output-format', 'json', *SOURCES)
    found = json.loads(run_tool(BIN / command[0], *command[1:], cwd=root))
    files = dict.fromkeys(relative_name(each['filename'], root) for each in found)
    message = 'not formatted; run: ruff format nbs tests run setup.py'
    return [Finding(file, 'format', '', message) for file in files]


def check_lint(root: Path = ROOT) -> list[Finding]:
    "Findings of the linter"
    command = ('ruff', 'check', '--no-fix', '--no-cache', '--output-format', 'json', *SOURCES)
    found = json.loads(run_tool(BIN / command[0], *command[1:], cwd=root))
    pages: dict[str, Page] = {}
    findings = []
    for each in found:
        file = relative_name(each['filename'], root)
        where = f'line {each["location"]["row"]}'
        if each['cell']:
            page = pages.setdefault(file, read_page(root / file, root))
            where = f'{page.cells[each["cell"] - 1].where}: {where}'
        findings.append(Finding(file, each['code'] or 'syntax', where, each['message']))
    return findings


def check_types(root: Path = ROOT) -> list[Finding]:
    "Findings of the type checker; in the modules of strict.txt nothing may be untyped"
    said = run_tool(
        *(BIN / 'pyrefly', 'check', '--python-interpreter-path', sys.executable),
        *('--output-format', 'json', '--summary=none'),
        cwd=root,
    )
    strict = read_lines(root / STRICT)
    findings = []
    for each in json.loads(said)['errors']:
        path = root / each['path']
        if each['name'] in STRICT_RULES and path.stem not in strict:
            continue
        file, where = find_cell(path, each['line'], root)
        message = f'{each["concise_description"]} ({each["name"]})'
        findings.append(Finding(file, 'types', where, message))
    return findings


def read_lines(path: Path) -> set[str]:
    "Lines of a file, none where it is missing"
    return set(path.read_text(encoding='utf-8').split()) if path.exists() else set()


def find_cell(
    path: Path,  # of a generated module
    number: int,  # of a line in it, from 1
    root: Path = ROOT,
) -> tuple[str, str]:
    "The page a line comes from, and where in it: cell, line of the cell, and the line's text"
    lines = path.read_text(encoding='utf-8').splitlines()
    for start in range(number - 1, -1, -1):
        if marker := MARKER.match(lines[start]):
            inside = number - 1 - start
            return marker[1], f'cell {marker[2]}, line {inside}: `{lines[number - 1].strip()[:60]}`'
    return path.relative_to(root).as_posix(), f'line {number}'


def check_export(root: Path = ROOT) -> list[Finding]:
    "Generated modules that are not what the notebooks say"
    with tempfile.TemporaryDirectory() as folder:
        for name in ('settings.ini', 'setup.py', 'nbs', LIBRARY):
            copy = shutil.copytree if (root / name).is_dir() else shutil.copy
            copy(root / name, Path(folder) / name)
        run_tool(BIN / 'nbdev_export', good=(0,), cwd=Path(folder))
        return compare_modules(root, Path(folder))


def compare_modules(root: Path, fresh: Path) -> list[Finding]:
    "Generated files that differ between two trees"
    names = {
        path.relative_to(tree).as_posix()
        for tree in (root, fresh)
        for path in (tree / LIBRARY).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }
    message = 'not what the notebooks say; run nbdev_export'
    return [
        Finding(name, 'export', '', message)
        for name in sorted(names)
        if read_bytes(root / name) != read_bytes(fresh / name)
    ]


def read_bytes(path: Path) -> bytes | None:
    "What a file holds; None where there is none"
    return path.read_bytes() if path.exists() else None


def check_readme(root: Path = ROOT) -> list[Finding]:
    "README.md is the index page"
    if (root / 'README.md').read_text(encoding='utf-8') == readme():
        return []
    message = 'not the index page; run: python tests/readme.py'
    return [Finding('README.md', 'readme', '', message)]
