"""Committed outputs are those of the code: pages run afresh give what the repository shows"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ('index', 'guides/bring_your_own_table', '00_tour')
RUN = """
import json, sys
from pathlib import Path
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
path = Path(sys.argv[1])
page = read_nb(path)
CaptureShell(path).run_all(page, exc_stop=True)
Path(sys.argv[2]).write_text(json.dumps([cell.get('outputs', []) for cell in page.cells]))
"""
# a number with a unit of time, a path, an address, a version: they differ from run to run
VARIES = (
    (re.compile(r'\d[\d.,]*(e-?\d+)? ?(?=(s|ms|µs|seconds|minutes a)\b)'), '# '),
    (re.compile(r'/\S+'), '/PATH'),
    (re.compile(r'\b(0x)?[0-9a-f]{12}\b'), '#'),  # an address, or a version: a digest of weights
    (re.compile(r'(\d\.\d\d)\d+'), r'\1'),  # another processor may round otherwise
)


def shown(
    outputs: list[dict],  # of a cell
) -> str:
    "What a reader sees as text, without what differs from run to run"
    texts = []
    for output in outputs:
        if output['output_type'] == 'stream' and output['name'] == 'stdout':
            texts.append(''.join(output['text']))
        data = output.get('data', {})
        texts.append(''.join(data.get('text/markdown', data.get('text/plain', ''))))
    text = '\n'.join(texts).strip()
    if '<Figure' in text:
        return ''
    for pattern, instead in VARIES:
        text = pattern.sub(instead, text)
    return text


def run_afresh(path: Path, folder: Path) -> list[list[dict]]:
    "The outputs of every cell of a page, run in a process and a folder of its own"
    at = folder / 'outputs.json'
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'MPLBACKEND': 'agg', 'IN_TEST': '1'}
    command = [sys.executable, '-c', RUN, str(path), str(at)]
    ran = subprocess.run(command, cwd=path.parent, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(at.read_text())


@pytest.mark.parametrize('name', PAGES)
def test_a_page_shows_what_its_code_gives(name, tmp_path):
    path = ROOT / 'nbs' / f'{name}.ipynb'
    cells = json.loads(path.read_text())['cells']
    fresh = run_afresh(path, tmp_path)
    assert len(fresh) == len(cells)
    differ = {
        cell['id']: (shown(cell['outputs']), shown(now))
        for cell, now in zip(cells, fresh, strict=True)
        if cell['cell_type'] == 'code' and shown(cell['outputs']) != shown(now)
    }
    assert differ == {}, f'run the page again: {name}'


def test_a_wrong_output_is_seen():
    def stream(text):
        return [{'output_type': 'stream', 'name': 'stdout', 'text': text}]

    assert shown(stream('it says 49 %')) != shown(stream('it says 52 %'))
    assert shown(stream('in 1.23 s, at /tmp/a1')) == shown(stream('in 4.5 s, at /tmp/b2'))


PAGE_LINK = re.compile(r'\]\((?!\w+:)([^)#]+\.ipynb)')


def find_dead_links(path):
    "Links of a page to pages that are not there"
    cells = json.loads(path.read_text())['cells']
    texts = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    links = PAGE_LINK.findall('\n'.join(texts))
    return [link for link in links if not (path.parent / link).exists()]


def test_a_link_to_a_page_leads_to_one(tmp_path):
    pages = sorted((ROOT / 'nbs').rglob('*.ipynb'))
    assert {str(path): dead for path in pages if (dead := find_dead_links(path))} == {}
    planted = {'cells': [{'cell_type': 'markdown', 'source': ['[a](gone.ipynb)']}]}
    (tmp_path / 'page.ipynb').write_text(json.dumps(planted))
    assert find_dead_links(tmp_path / 'page.ipynb') == ['gone.ipynb']
