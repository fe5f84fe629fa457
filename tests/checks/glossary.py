"""The glossary and the pages it links to: the page is there, and says the term in bold

A row is `| **term** | what it means | [page](page.ipynb) |`. A term counts as said when it stands
within bold text or a heading of that page, in the singular or the plural.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from checks.notebooks import ROOT, Finding, Page, read_page

FILE = 'nbs/glossary.ipynb'
ROW = re.compile(
    r'^\| \*\*(?P<term>[^*]+)\*\* \|.*\| \[[^]]*\]\((?P<link>[^)]+)\) \|$', re.MULTILINE
)
STRONG = re.compile(r'\*\*([^*]+)\*\*|^#+ (.+)$', re.MULTILINE)


def check_glossary(root: Path = ROOT) -> list[Finding]:
    "Rows whose page is missing, or does not say their term in bold"
    pages: dict[Path, Page] = {}
    found = []
    for where, term, link in glossary_rows(read_page(root / FILE, root)):
        path = root / 'nbs' / link
        if not path.exists():
            found.append(Finding(FILE, 'glossary-link', where, f'{term}: no page {link}'))
            continue
        page = pages.setdefault(path, read_page(path, root))
        if not any(term.lower() in text for text in strong_text(page)):
            found.append(Finding(FILE, 'glossary-term', where, f'{term}: not in bold on {link}'))
    return found


def glossary_rows(page: Page) -> Iterator[tuple[str, str, str]]:
    "(where, term, link) of every row"
    for cell in page.text:
        for row in ROW.finditer(cell.source):
            yield cell.where, row['term'], row['link']


def strong_text(page: Page) -> list[str]:
    "What a page says in bold or in a heading, in lower case"
    texts = (pair for cell in page.text for pair in STRONG.findall(cell.source))
    return [(bold or heading).replace('\n', ' ').lower() for bold, heading in texts]
