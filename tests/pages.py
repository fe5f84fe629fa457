"""Check notebooks against a page budget and a one-way import order.

Usage: python tests/pages.py NBS_DIR [--lib NAME]
Exit status 1 when anything is out of bounds; one line per finding. Findings marked `look` are for a reader and do not fail.
Numbered notebooks (`07_evaluate.ipynb`) define the order: a module may import
only modules exported by lower-numbered notebooks.
"""

import ast, json, re, sys
from pathlib import Path

CELL_LINES = 25  # exported cell, non-blank lines
DEMO_LINES = 15  # any other code cell
CELLS = 90  # cells in one notebook
OUTPUT_KB = 64  # outputs stored in one notebook
WORDS = 1.5  # words of prose per line of code, at least
EXP = re.compile(r'^\s*#\s*\|\s*(export|exports|exporti)\b', re.M)
DIRECTIVE = re.compile(r'^\s*#\s*\|')


def source(cell):
    s = cell['source']
    return s if isinstance(s, str) else ''.join(s)


def tree(s):
    s = '\n'.join(l for l in s.splitlines() if not l.lstrip().startswith(('%', '!')))
    try:
        return ast.parse(s)
    except SyntaxError:
        return None


def imports(t, lib):
    "Submodules of `lib` that the parsed cell imports"
    for n in ast.walk(t):
        if isinstance(n, ast.ImportFrom) and n.module:
            if n.module == lib:
                yield from (a.name for a in n.names)
            elif n.module.startswith(lib + '.'):
                yield n.module[len(lib) + 1 :]
        elif isinstance(n, ast.Import):
            yield from (a.name[len(lib) + 1 :] for a in n.names if a.name.startswith(lib + '.'))


def check(path, order, lib):
    nb = json.loads(path.read_text())
    cells = nb['cells']
    code = [c for c in cells if c['cell_type'] == 'code']
    text = [c for c in cells if c['cell_type'] == 'markdown']
    first = next((source(c) for c in text), '')
    mods = [m for c in code for m in re.findall(r'#\s*\|\s*default_exp\s+(\S+)', source(c))]
    if not re.match(r'\s*# .+\n+> .+', first):
        yield 'no "# Title" + "> one-line summary" at the top'
    if len(mods) > 1:
        yield f'exports to {len(mods)} modules'
    if len(cells) > CELLS:
        yield f'{len(cells)} cells (budget {CELLS})'
    if any(re.match(r'\s*`?(<<<<<<<|>>>>>>>)', source(c)) for c in text):
        yield 'unresolved merge conflict'
    kb = sum(len(json.dumps(c.get('outputs', []))) for c in code) / 1024
    if kb > OUTPUT_KB:
        yield f'{kb:.0f} KB of stored outputs (budget {OUTPUT_KB})'
    if any(c.get('execution_count') for c in code):
        yield 'execution counts stored; run nbdev_clean'
    if any(o.get('output_type') == 'error' for c in code for o in c.get('outputs', [])):
        yield 'a stored traceback'
    if any(o.get('name') == 'stderr' for c in code for o in c.get('outputs', [])):
        yield 'stored warnings (stderr)'
    lines = sum(1 for c in code for l in source(c).splitlines() if l.strip())
    words = sum(len(source(c).split()) for c in text)
    if lines and words / lines < WORDS:
        yield f'look: {words / lines:.1f} words of prose per line of code (at least {WORDS})'
    for i, c in enumerate(code):
        s = source(c)
        exp = bool(EXP.search(s))
        t = tree(s)
        n = sum(1 for l in s.splitlines() if l.strip() and not DIRECTIVE.match(l))
        where = f'cell {c.get("id", i)}'
        if n > (CELL_LINES if exp else DEMO_LINES):
            yield f'{"" if exp else "look: "}{where}: {n} lines'
        if t is None:
            continue
        imp = [x for x in t.body if isinstance(x, (ast.Import, ast.ImportFrom))]
        if imp and len(imp) < len(t.body):
            yield (
                f'{where}: imports and code in one cell (the docs build runs such a cell alone, and'
                ' breaks)'
            )
        if not exp:
            continue
        for x in t.body:
            if isinstance(
                x, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            ) and not x.name.startswith('_'):
                if not ast.get_docstring(x):
                    yield f'{where}: `{x.name}` has no docstring'
                later = ' '.join(source(d) for d in code[i + 1 :] if not EXP.search(source(d)))
                if not re.search(rf'\b{x.name}\b', later):
                    yield f'look: {where}: `{x.name}` is never shown or tested'
        for m in imports(t, lib):
            if mods and m in order and order[m] >= order.get(mods[0], 1e9):
                yield f'{where}: imports `{m}`, which comes later'


if __name__ == '__main__':
    root = Path(sys.argv[1])
    lib = sys.argv[3] if '--lib' in sys.argv else 'mlref'
    order, bad = {}, 0
    nbs = sorted(
        p
        for p in root.rglob('*.ipynb')
        if not p.name.startswith(('.', '_')) and '.ipynb_checkpoints' not in str(p)
    )
    for k, p in enumerate(q for q in nbs if re.match(r'\d', q.name)):
        for m in re.findall(r'default_exp\s+([\w.]+)', p.read_text()):
            order[m] = k
    for p in nbs:
        for f in check(p, order, lib):
            print(f'{p.relative_to(root)}: {f}')
            bad += not f.startswith('look')
    print(f'{len(nbs)} notebooks, {bad} findings')
    sys.exit(bool(bad))
