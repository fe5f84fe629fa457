"""A page driven as a reader would: in JupyterLab, with a browser"""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import nbformat
from nbformat.reader import NotJSONError

from programs import browser, need, stop_process

ROOT = Path(__file__).parent.parent


def wait_until_saved(at, save):
    "The cells of code of a page, once each of them has run; JupyterLab writes while we read"
    cells = []
    for _ in range(60):
        save()  # again: a kernel also looks idle between two cells
        with suppress(NotJSONError):  # half written
            every = nbformat.read(at, 4).cells
            cells = [each for each in every if each.cell_type == 'code' and each.source.strip()]
        if cells and all(each.execution_count for each in cells):
            break
        time.sleep(0.5)
    return cells


def test_a_page_runs_in_jupyterlab_and_draws_its_plot(tmp_path):
    need('chromium')
    from playwright.sync_api import sync_playwright

    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    shutil.copy(ROOT / 'settings.ini', tmp_path)
    (tmp_path / 'nbs').mkdir()
    shutil.copytree(ROOT / 'reports' / 'results', tmp_path / 'reports' / 'results')
    nb = nbformat.read(ROOT / 'nbs/17_route.ipynb', 4)
    for c in nb.cells:
        c.update({'outputs': [], 'execution_count': None} if c.cell_type == 'code' else {})
    at = tmp_path / 'nbs' / 'page.ipynb'
    nbformat.write(nb, at)
    env = {
        **{k: v for k, v in os.environ.items() if k != 'MPLBACKEND'},
        'JUPYTER_PREFER_ENV_PATH': '1',
        'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
        'JUPYTER_CONFIG_DIR': str(tmp_path / 'config'),
        'JUPYTERLAB_SETTINGS_DIR': str(tmp_path / 'settings'),
        'JUPYTERLAB_WORKSPACES_DIR': str(tmp_path / 'workspaces'),
    }
    *words, _ = runpy.run_path(str(ROOT / 'run'))['DO']['lab']  # as `./run lab`, on another page
    with open(tmp_path / 'lab.log', 'w') as log:
        lab = subprocess.Popen(
            [
                sys.executable,
                *words,
                '--no-browser',
                f'--port={port}',
                '--ServerApp.port_retries=0',
                '--IdentityProvider.token=t',
                '--allow-root',
                f'--ServerApp.root_dir={tmp_path}',
            ],
            stdout=log,
            stderr=log,
            env=env,
        )
    try:
        for _ in range(120):
            try:
                urlopen(f'http://127.0.0.1:{port}/api?token=t', timeout=5)
                break
            except OSError:
                time.sleep(0.5)
                assert lab.poll() is None, (tmp_path / 'lab.log').read_text()[-2000:]
        with sync_playwright() as pw:
            b = browser(pw)
            p = b.new_page(viewport={'width': 1360, 'height': 1100})
            p.set_default_timeout(120_000)
            p.goto(f'http://127.0.0.1:{port}/lab/tree/nbs/page.ipynb?reset&token=t')
            p.wait_for_selector('.jp-Notebook .jp-Cell')
            p.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status=idle]')
            for _ in range(120):  # the page looks idle before its kernel is there
                if any(
                    k['execution_state'] == 'idle' and k['connections']
                    for k in json.load(urlopen(f'http://127.0.0.1:{port}/api/kernels?token=t'))
                ):
                    break
                time.sleep(0.5)
            p.wait_for_timeout(1000)
            assert p.locator('.Toastify__toast', has_text='news').count() == 0
            assert p.locator('.jp-RenderedImage img').count() == 0
            p.click('text=Run >> nth=0')
            p.click('[data-command="runmenu:run-all"]')
            p.wait_for_selector('.jp-RenderedImage img', state='attached')
            p.wait_for_function(
                "document.querySelector('.jp-Notebook-ExecutionIndicator').dataset.status == 'idle'"
            )
            p.locator('.jp-RenderedImage img').first.scroll_into_view_if_needed()
            p.screenshot(path=str(tmp_path / 'lab.png'))
            cells = wait_until_saved(at, lambda: p.keyboard.press('Control+S'))
            b.close()
        assert (
            cells
            and all(c.execution_count for c in cells)
            and [o for c in cells for o in c.outputs if o.output_type == 'error'] == []
        )
    finally:
        stop_process(lab)
