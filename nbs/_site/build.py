"""The docs site, without a network: build.py [FOLDER], default _docs

nbdev's pages become Markdown, and mkdocs-material makes the site of them.
"""

import argparse
import base64
import gc
import importlib
import inspect
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool
from pathlib import Path

import yaml
from fastcore import docments

ROOT = Path(__file__).resolve().parent.parent.parent
os.environ |= {'NO_MKDOCS_2_WARNING': '1', 'DISABLE_MKDOCS_2_WARNING': 'true'}
# a function of a page that imports what may not be installed is no mistake
warnings.filterwarnings('ignore', 'Found cells containing imports')
GROUPS = (  # of the menu: title, first and last number of its pages
    ('Begin', 0, 0),
    ('Data', 1, 5),
    ('Features', 6, 9),
    ('Models', 10, 14),
    ('Serving', 15, 18),
    ('The loop', 19, 29),
    ('Engines', 30, 39),
    ('The flights', 40, 44),
    ('Command line', 45, 99),
)
FOLDERS = (('Guides', 'guides'), ('Pipeline steps', 'steps'), ('Decisions', 'decisions'))
FOLDED = 'code-fold: true'  # directive of a cell that shows its title until a reader opens it
HIDDEN = ('include: false', 'hide')  # directives of cells of which nothing is shown
IMAGES = (('image/svg+xml', 'svg'), ('image/png', 'png'))
MODULE = re.compile(r'^#\|\s*default_exp\s+(\S+)', re.MULTILINE)
PUBLIC_LINK = r'([\w/.-]+?)\.html'
PRIVATE_LINK = re.compile(r'\[([^]]+)\]\([\w/.-]+\.md#(?:\w+\.)?_\w+(?:\.\w+)?\)')
NESTED_LINK = re.compile(r'\[((?:[^][]|\[[^][]*\]\([^)]*\))*)\](?=\()')
INNER_LINK = re.compile(r'\[([^][]*)\]\([^)]*\)')
METHOD_LINK = re.compile(r'(\.md#\w+)\.\w+\)')
NOTEBOOK_LINK = re.compile(r'\]\((?:nbs/)?([\w./-]*/)?(?:\d+[a-z]*_)?([\w-]+)\.ipynb')
RESULT_LINK = re.compile(r'\]\((?:\.\./)+reports/results/')
TARGET = re.compile(r'\{target="_blank" style="[^"]*"\}')
CALLOUT = re.compile(r'^:::\s*\{\.callout-(\w+)[^}]*\}\n(.*?)\n:::$', re.MULTILINE | re.DOTALL)
FRAME_STYLE = re.compile(r'<style.*?</style>| border="1"', re.DOTALL)
SOURCE_LINK = re.compile(r'^\[source\]\([^)]*\)\s*', re.MULTILINE)
ADDRESS = re.compile(r' at 0x[0-9a-f]+')  # of an object, another in each build
SYMBOL = re.compile(r'^(#{2,5}) ([\w.]+)$', re.MULTILINE)


def joined(
    text: str | list[str],  # as a notebook holds it
) -> str:
    "The text of a cell or an output"
    return text if isinstance(text, str) else ''.join(text)


def page_name(path: Path) -> str:
    "The name of a page without its number"
    return re.sub(r'^\d+[a-z]*_', '', path.stem)


def exported_module(path: Path) -> str | None:
    "The module that a notebook exports to, such as 'flights.events'; None for a page without one"
    sources = (joined(cell['source']) for cell in json.loads(path.read_text())['cells'])
    found = (MODULE.search(source) for source in sources)
    return next((match[1] for match in found if match), None)


def page_link(match: re.Match) -> str:
    "A link to a notebook as one to its page"
    return f']({match[1] or ""}{match[2]}.md'


def flat_link(match: re.Match) -> str:
    "The text of a link without the links that nbdev put into it"
    return '[' + INNER_LINK.sub(r'\1', match[1]) + ']'


def admonition(match: re.Match) -> str:
    "A callout as mkdocs writes it"
    return f'!!! {match[1]}\n\n' + re.sub('^', '    ', match[2], flags=re.MULTILINE)


def relink(
    text: str,  # Markdown of a page
    up: str,  # from the page to the root of the site, such as '../'
) -> str:
    "Links to notebooks and to the published site become links between these pages"
    from nbdev.config import get_config

    config = get_config()
    site = re.escape(f'{config.doc_host}{config.doc_baseurl}/')
    text = re.sub(site + PUBLIC_LINK, rf'{up}\1.md', text)
    text = PRIVATE_LINK.sub(r'\1', text)  # private names have no place in the reference
    text = NESTED_LINK.sub(flat_link, text)
    text = METHOD_LINK.sub(r'\1)', text)  # a method is described with its class
    text = NOTEBOOK_LINK.sub(page_link, text)
    text = RESULT_LINK.sub(f']({up}results/', text)
    text = TARGET.sub('', text)
    return CALLOUT.sub(admonition, text)


def api_text(
    text: str,  # what nbdev says of a symbol
    module: str,  # prefix of its anchor; '' for none
) -> str:
    "The entry of a symbol: without source link, under a heading that can be linked to"

    def heading(match: re.Match) -> str:
        prefix = f'{module}.' if module else ''
        return f'### `{match[2]}` {{#{prefix}{match[2].lower()}}}'

    text = relink(re.sub(r'^---\n', '', text.strip()), '../' if module else '')
    return SYMBOL.sub(heading, SOURCE_LINK.sub('', text))


def write_image(data: str, extension: str, file: Path) -> None:
    "A plot of a notebook as a file"
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if extension == 'svg' else base64.b64decode(data)
    file.write_bytes(raw)


def text_block(text: str) -> str:
    "Output of a cell as a block"
    return f'```{{.text .out}}\n{text.rstrip()}\n```'


def show_output(
    output: dict,  # of a cell
    image: Path,  # where its plot goes, without a suffix
    link: str,  # the same, as the page names it
) -> str:
    "An output as Markdown"
    if output['output_type'] == 'stream':
        return text_block(joined(output['text']))
    if output['output_type'] == 'error':
        return text_block(f'{output["ename"]}: {output["evalue"]}')
    data = {kind: joined(value) for kind, value in output['data'].items()}
    for kind, extension in IMAGES:
        if kind in data:
            write_image(data[kind], extension, image.with_suffix(f'.{extension}'))
            return f'![plot]({link}.{extension}){{.plot}}'
    if 'text/html' in data:
        html = FRAME_STYLE.sub('', data['text/html']).strip()
        return f'<div class="out html" markdown="0">\n{html}\n</div>'
    if 'text/markdown' in data:
        return relink(data['text/markdown'], '../' * link.count('../'))
    return text_block(data.get('text/plain', ''))


def show_code(
    cell: dict,
    folder: Path,  # where plots go
    up: str,  # from the page to the root of the site
) -> list[str]:
    "A code cell and its outputs as blocks of Markdown"
    source = joined(cell['source'])
    said = re.findall(r'^#\|\s*(.+?)\s*$', source, re.MULTILINE)
    code = re.sub(r'^#\|.*\n?', '', source, flags=re.MULTILINE).strip()
    if any(directive in said for directive in HIDDEN):
        return []
    outputs = []
    for place, output in enumerate(cell.get('outputs', [])):
        image = folder / f'{cell.get("id", "c")}-{place}'
        outputs.append(show_output(output, image, f'{up}img/{folder.name}/{image.name}'))
    if code.startswith('show_doc('):
        return [f'<div class="api" markdown>\n\n{api_text(text, "")}\n\n</div>' for text in outputs]
    blocks = [f'```python\n{code}\n```'] if code and 'echo: false' not in said else []
    blocks += [] if 'output: false' in said else outputs
    return [fold(code, blocks)] if FOLDED in said else blocks


def fold(
    code: str,  # of the cell, which says which exercises it answers in comments `# 2: ...`
    blocks: list[str],  # of Markdown
) -> str:
    "Blocks that a reader opens, such as the answer to an exercise"
    numbers = re.findall(r'^# (\d+): ', code, re.MULTILINE)
    title = f'Answer {" and ".join(numbers)}' if numbers else 'Code'
    inside = '\n\n'.join(blocks)
    return f'<details class="fold" markdown>\n<summary>{title}</summary>\n\n{inside}\n\n</details>'


def write_page(
    path: Path,  # a notebook that nbdev has processed
    name: str,  # of the page on the site, such as 'guides/roll_back.md'
    site: Path,  # folder of the Markdown
) -> str:
    "Write a notebook as a page of Markdown; its title"
    up = '../' * name.count('/')
    blocks: list[str] = []
    about: dict[str, str] = {}
    for cell in json.loads(path.read_text())['cells']:
        source = joined(cell['source'])
        if cell['cell_type'] == 'raw':
            about = yaml.safe_load(source.strip().strip('-'))
        elif cell['cell_type'] == 'code':
            blocks += show_code(cell, site / 'img' / Path(name).stem, up)
        elif 'AUTOGENERATED' not in source:
            blocks.append(relink(source, up))
    title = about.get('title', page_name(path))
    lead = f'{about["description"]}\n{{.lead}}\n\n' if about.get('description') else ''
    head = f'---\ntitle: {json.dumps(title)}\n---\n\n# {title}\n\n{lead}'
    file = site / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(head + '\n\n'.join(blocks) + '\n', encoding='utf-8')
    return title


def describe_symbol(module: str, name: str) -> str:
    "The entry of an exported name in the reference"
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc

    symbol = getattr(importlib.import_module(f'mlref.{module}'), name)
    if callable(symbol):
        shown = show_doc(symbol, renderer=BasicMarkdownRenderer, title_level=3)
        text = api_text(shown._repr_markdown_(), module)
    else:
        value = f'{name} = {ADDRESS.sub("", repr(symbol))[:200]}'
        text = f'### `{name}` {{#{module}.{name}}}\n\n```python\n{value}\n```'
    return f'<div class="api" markdown>\n\n{text}\n\n</div>'


def written_signature(symbol: Callable, **_) -> inspect.Signature:
    "A signature with its annotations as written: some names are imported for types alone"
    return inspect.signature(symbol)


# here, because the processes that make pages import this module anew
docments.signature = written_signature


# A link to a name of before each module had a page, such as reference.html#monitor.monitor
OLD_LINKS = """<script>
const name = location.hash.slice(1), module = name.slice(0, name.lastIndexOf('.'));
if (document.getElementById(module)) location.replace(`reference/${module}.html#${name}`);
</script>"""


def write_module(
    path: Path,  # a numbered notebook
    name: str,  # of its module, such as 'flights.events'
    folder: Path,  # of the reference
) -> str:
    "Write every exported symbol of a module: signature, what it says, its arguments; its entry"
    module = importlib.import_module(f'mlref.{name}')
    about = f'{module.__doc__}. [The page](../{page_name(path)}.md),'
    blocks = [f'# mlref.{name}', f'{about} [all modules](../reference.md).']
    blocks += [describe_symbol(name, symbol) for symbol in module.__all__]
    (folder / f'{name}.md').write_text('\n\n'.join(blocks) + '\n', encoding='utf-8')
    names = ', '.join(f'`{symbol}`' for symbol in module.__all__)
    return f'## [mlref.{name}](reference/{name}.md) {{#{name}}}\n\n{module.__doc__}.\n\n{names}'


def write_reference(site: Path) -> None:
    "A page for each module, and one that lists them"
    folder = site / 'reference'
    folder.mkdir()
    blocks = [
        '# Reference',
        'Every exported function and class, a page for each module; the pages of the menu show'
        ' each at work.',
    ]
    for path in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')):
        name = exported_module(path)
        if name is not None:
            blocks.append(write_module(path, name, folder))
    blocks.append(OLD_LINKS)  # behind what it looks for
    (site / 'reference.md').write_text('\n\n'.join(blocks) + '\n', encoding='utf-8')


def write_numbered(cache: Path, site: Path) -> list[dict]:
    "The numbered pages, and their part of the menu"
    pages = []
    for path in sorted(cache.glob('[0-9]*.ipynb')):
        file = f'{page_name(path)}.md'
        number = int(re.match(r'\d+', path.name)[0])
        pages.append((number, {write_page(path, file, site): file}))
    menu = []
    for title, first, last in GROUPS:
        group = [entry for number, entry in pages if first <= number <= last]
        if group:
            menu.append({title: group})
    return menu


def write_folder(cache: Path, folder: str, site: Path) -> list[dict]:
    "The pages of a folder, as entries of the menu"
    names = [
        (path, f'{folder}/{path.stem}.md') for path in sorted((cache / folder).glob('*.ipynb'))
    ]
    return [{write_page(path, name, site): name} for path, name in names]


def write_site(cache: Path, site: Path) -> list[dict]:
    "All pages but the reference as Markdown in `site`; the menu"
    for own in ('extra.css', 'iframe-worker.js'):
        shutil.copy(ROOT / 'nbs/_site' / own, site)
    (site / 'results').mkdir()
    for image in (ROOT / 'reports/results').glob('*.png'):
        shutil.copy(image, site / 'results')
    write_page(cache / 'index.ipynb', 'index.md', site)
    begin, *rest = write_numbered(cache, site)
    for title, folder in FOLDERS:
        rest.append({title: write_folder(cache, folder, site)})
    glossary = {write_page(cache / 'glossary.ipynb', 'glossary.md', site): 'glossary.md'}
    shutil.copy(ROOT / 'reports' / 'card.md', site / 'card.md')
    menu = [{'Home': 'index.md'}, begin, *rest, glossary]
    return [*menu, {'Reference': 'reference.md'}, {'Report card': 'card.md'}]


def find_notebooks() -> list[Path]:
    "Every notebook of the repository, the largest first"
    found = sorted((ROOT / 'nbs').rglob('[!_.]*.ipynb'), key=lambda path: -path.stat().st_size)
    return [path for path in found if '.ipynb_checkpoints' not in path.parts]


def introduction(
    path: Path,  # a notebook as it is written
) -> str:
    "What the cell of the title says below the first line; nbdev keeps title and line alone"
    cells = json.loads(path.read_text())['cells']
    told = [joined(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    first = told[0] if told else ''
    blocks = first.strip().split('\n\n')
    named = blocks[0].startswith('# ')
    rest = blocks[2:] if len(blocks) > 1 and blocks[1].startswith('> ') else blocks[1:]
    return '\n\n'.join(rest) if named else ''


def restore_introduction(
    path: Path,  # a notebook as it is written
    processed: Path,  # the same as nbdev shows it; a cell is put behind its front matter
) -> None:
    "No paragraph of a page is lost on the site"
    text = introduction(path)
    if text:
        notebook = json.loads(processed.read_text())
        kinds = [cell['cell_type'] for cell in notebook['cells']]
        cell = {'cell_type': 'markdown', 'id': 'introduction', 'metadata': {}, 'source': text}
        notebook['cells'].insert(kinds.index('raw') + 1, cell)
        processed.write_text(json.dumps(notebook))


def exported_modules() -> list[str]:
    "The modules that the numbered pages export, in their order"
    found = (exported_module(path) for path in sorted((ROOT / 'nbs').glob('[0-9]*.ipynb')))
    return [f'mlref.{name}' for name in found if name]


@contextmanager
def pool_of_pages() -> Iterator[Pool]:
    "A process for every core; what takes long to import is imported once, before they are forked"
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['nbdev.serve_drv', 'nannyml', *exported_modules()])
    # IPython ends every page with a garbage collection, which need not look at what was imported;
    # leaving the pool kills its processes
    with context.Pool(initializer=gc.freeze) as pool:
        yield pool


def process_notebooks(
    pool: Pool,
    folder: Path,  # of the notebooks as nbdev shows them
) -> None:
    "Let nbdev add what it says of exported names, on every core"
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import main

    given = []
    for path in find_notebooks():
        to = folder / path.relative_to(ROOT / 'nbs')
        to.parent.mkdir(parents=True, exist_ok=True)
        given.append((path, to, FilterDefaults))
    pool.map(main, given, chunksize=1)
    for path, to, _ in given:
        restore_introduction(path, to)


def build(
    out: Path,  # folder of the site
) -> None:
    "Build the site"
    from mkdocs.commands.build import build as build_mkdocs
    from mkdocs.config import load_config

    os.chdir(ROOT)
    settings = str(ROOT / 'nbs/_site/mkdocs.yml')
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / 'notebooks'
        site = Path(folder) / 'src'
        site.mkdir()
        with pool_of_pages() as pool:
            reference = pool.apply_async(write_reference, [site])
            process_notebooks(pool, cache)
            reference.get()
        menu = write_site(cache, site)
        logging.basicConfig(level=logging.WARNING, format='%(message)s')
        paths = {'docs_dir': str(site), 'site_dir': str(out)}
        build_mkdocs(load_config(settings, **paths, nav=menu, strict=True))
    print(f'{len(list(out.rglob("*.html")))} pages: {out / "index.html"}')


def main(
    words: list[str],  # of the command line
) -> None:
    "Build the site where the words say"
    about = 'The docs site, built without a network'
    parser = argparse.ArgumentParser(prog='./run docs', description=about, allow_abbrev=False)
    parser.add_argument(
        'folder',
        nargs='?',
        default=ROOT / '_docs',
        type=Path,
        metavar='FOLDER',
        help='of the site, made if need be; default: _docs',
    )
    build(parser.parse_args(words).folder.resolve())


if __name__ == '__main__':
    main(sys.argv[1:])
