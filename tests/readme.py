"""README.md is the index page, with what its cells show: python tests/readme.py [--check]"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNSEEN = re.compile(r'^#\| *(hide|include: false)', re.MULTILINE)
SILENT = re.compile(r'^#\| *echo: false', re.MULTILINE)  # its outputs are shown, its code is not
DIRECTIVE = re.compile(r'^#\|.*\n?', re.MULTILINE)


def fenced(
    text: str,
    language: str,  # 'python' or 'text'
) -> str:
    "A block of code"
    return f'```{language}\n{text.strip()}\n```'


def show_output(output: dict) -> str:
    "What a cell gave, as Markdown; nothing for a plot or a warning"
    if output['output_type'] == 'stream':
        return fenced(''.join(output['text']), 'text') if output['name'] == 'stdout' else ''
    data = output.get('data', {})
    if 'text/markdown' in data:
        return ''.join(data['text/markdown']).strip()
    text = ''.join(data.get('text/plain', ''))
    return fenced(text, 'text') if text and 'image/png' not in data else ''


def show_cell(cell: dict) -> list[str]:
    "A cell as blocks of Markdown"
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown':
        return [source]
    if cell['cell_type'] != 'code' or UNSEEN.search(source):
        return []
    code = [] if SILENT.search(source) else [fenced(DIRECTIVE.sub('', source), 'python')]
    return [*code, *(show_output(output) for output in cell['outputs'])]


def readme() -> str:
    "The text of README.md"
    cells = json.loads((ROOT / 'nbs' / 'index.ipynb').read_text(encoding='utf-8'))['cells']
    blocks = [block for cell in cells for block in show_cell(cell) if block]
    text = '\n\n'.join(blocks)
    text = re.sub(r'\]\(((?:\w+/)?\w+\.ipynb)\)', r'](nbs/\1)', text)
    return re.sub(r'\]\(\.\./', '](', text) + '\n'


if __name__ == '__main__':
    file = ROOT / 'README.md'
    if '--check' not in sys.argv:
        file.write_text(readme(), encoding='utf-8')
    elif file.read_text(encoding='utf-8') != readme():
        sys.exit('expected README.md to be the index page, it differs; run: python tests/readme.py')
