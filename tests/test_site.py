"""The docs site as a reader meets it: built without a network, opened in a browser over loopback"""

import functools
import html
import http.server
import importlib
import json
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from programs import browser, need

ROOT = Path(__file__).parent.parent
SECONDS = 120  # that a browser may take on a busy machine
pytestmark = pytest.mark.timeout(900)  # the site is built in one


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *a):
        pass


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    at = tmp_path_factory.mktemp('site') / 'out'
    r = subprocess.run(
        [sys.executable, 'nbs/_site/build.py', at], cwd=ROOT, capture_output=True, text=True
    )
    assert r.returncode == 0, (r.stdout + r.stderr)[-2000:]
    assert 'Warning' not in r.stdout + r.stderr
    return at


@pytest.fixture(scope='module')
def url(site):
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{s.server_port}/'
    s.shutdown()


@pytest.fixture(scope='module')
def chromium():
    need('chromium')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as pw:
        opened = browser(pw)
        yield opened
        opened.close()


@contextmanager
def new_page(chromium, url):
    "A page that remembers nothing of others, and whose errors and other addresses are none"
    p = chromium.new_page(viewport={'width': 1360, 'height': 900})
    p.set_default_timeout(SECONDS * 1000)
    wrong = []
    p.on(
        'request',
        lambda r: wrong.append(r.url) if not r.url.startswith((url, 'data:', 'blob:')) else None,
    )
    p.on(
        'response',
        lambda r: (
            wrong.append(f'{r.status} {r.url}')
            if r.status >= 400 and 'favicon' not in r.url
            else None
        ),
    )
    p.on('console', lambda m: wrong.append(m.text) if m.type == 'error' else None)
    p.on('pageerror', lambda e: wrong.append(str(e)))
    yield p
    p.close()
    assert wrong == []


@pytest.fixture
def page(chromium, url):
    with new_page(chromium, url) as opened:
        yield opened


def test_search_finds_a_word_and_opens_the_page(page, url):
    page.goto(url + 'index.html')
    page.click('.md-search__input')
    page.keyboard.type('quarantine', delay=20)
    hit = page.locator('a.md-search-result__link[href*="contracts.html"]').first
    hit.wait_for()
    hit.click()
    page.wait_for_url('**/contracts.html*')
    assert 'quarantine' in page.inner_text('article').lower()


def width(image):
    image.scroll_into_view_if_needed()
    return image.evaluate('i => i.decode().then(() => i.naturalWidth)')


def test_plots_are_there(page, url):
    page.goto(url + 'index.html')
    assert width(page.locator('article img').first) > 600
    page.goto(url + 'monitor.html')
    assert width(page.locator('article img.plot').first) > 200


def test_light_and_dark(page, url):
    page.emulate_media(color_scheme='light')
    page.goto(url + 'index.html')

    def colour() -> str:
        return page.evaluate('getComputedStyle(document.body).backgroundColor')

    light = colour()
    page.locator('label[for=__palette_1]').click()
    page.wait_for_function('c => getComputedStyle(document.body).backgroundColor != c', arg=light)
    dark = colour()
    page.reload()
    assert colour() == dark  # it stays


def anchor(module: str, name: str) -> str:
    "The id of a name in the reference; a constant keeps its case: DAY is not day"
    return f'{module}.{name if name.isupper() else name.lower()}'


@pytest.mark.parametrize('module', ['monitor', 'flights.events'])
def test_the_reference_has_what_is_exported(page, url, module):
    page.goto(url + 'reference.html')
    page.click(f'article a[href="reference/{module}.html"]')
    page.wait_for_url(f'**/reference/{module}.html')
    ids = [anchor(module, name) for name in importlib.import_module(f'mlref.{module}').__all__]
    assert ids
    assert [at for at in ids if page.locator(f'[id="{at}"]').count() != 1] == []


def test_the_reference_tells_how_to_call_also_under_its_old_address(page, url):
    page.goto(url + 'reference.html#monitor.monitor')
    page.wait_for_url('**/reference/monitor.html#monitor.monitor')
    assert 'Monitor(' in page.inner_text('article').replace(' ', '')


def test_a_site_on_a_disk_can_be_searched(chromium, site):
    with new_page(chromium, site.as_uri()) as page:
        page.goto(f'{site.as_uri()}/index.html')
        page.click('.md-search__input')
        page.keyboard.type('quarantine', delay=20)
        page.locator('a.md-search-result__link[href*="contracts.html"]').first.wait_for()


def test_a_telephone_does_not_scroll_sideways(page, url):
    page.set_viewport_size({'width': 390, 'height': 844})
    for f in (
        'index.html',
        'glossary.html',
        'reference.html',
        'reference/monitor.html',
        'card.html',
        'steps/live.html',
    ):
        page.goto(url + f)
        assert page.evaluate('document.documentElement.scrollWidth') <= 390, f


def test_an_answer_is_folded_until_a_reader_opens_it(page, url):
    page.goto(url + 'arguments.html')
    answer = page.locator('article details.fold').first
    code = answer.locator('pre').first
    assert not code.is_visible()
    answer.locator('summary', has_text='Answer').click()
    code.wait_for()


def letters(text):
    "What is read of a text, without marks and spaces"
    return re.sub(r'[\W_]+', '', text)


def page_of(path, site):
    "The page of a notebook, as letters"
    folder = path.relative_to(ROOT / 'nbs').parent
    stem = path.stem if folder.parts else re.sub(r'^\d+[a-z]*_', '', path.stem)
    shown = (site / folder / f'{stem}.html').read_text()
    return letters(html.unescape(re.sub(r'<[^>]+>', '', shown)))


def prose(path):
    "The paragraphs of a notebook: no table, list, block or heading"
    cells = json.loads(path.read_text())['cells']
    told = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    blocks = [each for text in told if '```' not in text for each in text.split('\n\n')]
    return [each for each in blocks if re.match(r'[A-Z]', each) and '<' not in each]


def test_no_paragraph_of_a_notebook_is_lost_on_the_site(site):
    paths = [path for path in (ROOT / 'nbs').rglob('[!_.]*.ipynb') if '.' not in path.parent.name]
    lost = [
        (path.name, each)
        for path in paths
        for shown in [page_of(path, site)]
        for each in prose(path)
        if letters(re.sub(r'\]\([^)]*\)', '', each)) not in shown
    ]
    assert not lost
