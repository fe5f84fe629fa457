"""README.md is the index page: python tests/readme.py [--check]"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme():
    cells = json.loads((ROOT / 'nbs' / 'index.ipynb').read_text())['cells']
    text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return (
        re.sub(r'\]\(\.\./', '](', re.sub(r'\]\(((?:\w+/)?\w+\.ipynb)\)', r'](nbs/\1)', text))
        + '\n'
    )


if __name__ == '__main__':
    f = ROOT / 'README.md'
    if '--check' not in sys.argv:
        f.write_text(readme())
    elif f.read_text() != readme():
        sys.exit('expected README.md to be the index page, it differs; run: python tests/readme.py')
