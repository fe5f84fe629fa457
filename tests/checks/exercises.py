"""Every page of the library ends with exercises, each with a folded cell that checks its answer

An exercise is a numbered line below the last heading *What to change*. A folded cell begins with
`#| code-fold: true` and says the answer to exercise 2 in a comment `# 2: ...` above code that shows
it. Jupyter folds by what the cell's metadata says, so that is there too.
"""

import ast
import re

from checks.notebooks import Cell, Page
from checks.shapes import Found

HEADING = re.compile(r'^#+ What to change$', re.MULTILINE)
NUMBERED = re.compile(r'^(\d+)\. ', re.MULTILINE)
FOLD = '#| code-fold: true\n'
ANSWER = re.compile(r'^# (\d+): \S', re.MULTILINE)
EXERCISES = 3  # of a page, at least


def check_exercises(page: Page) -> Found:
    "Exercises, and an answer to each that is run"
    if not page.name[:1].isdigit() or '/decisions/' in page.file:
        return
    places = [
        k for k, c in enumerate(page.cells) if c.kind == 'markdown' and HEADING.search(c.source)
    ]
    if not places:
        yield 'exercises', 'no heading "What to change" with exercises'
        return
    source = page.cells[places[-1]].source
    asked = NUMBERED.findall(HEADING.split(source)[-1])
    if len(asked) < EXERCISES:
        yield 'exercises', f'{len(asked)} numbered exercises (at least {EXERCISES})'
    folded = [cell for cell in page.cells[places[-1] + 1 :] if is_folded(cell)]
    answered = {
        number for cell in folded if does_something(cell) for number in ANSWER.findall(cell.source)
    }
    for number in asked:
        if number not in answered:
            yield 'answer', f'no folded cell below answers exercise {number} ("# {number}: ...")'
    for cell in folded:
        if not cell.metadata.get('jupyter', {}).get('source_hidden'):
            yield 'answer', f'cell {cell.id} is not folded in Jupyter (metadata, source_hidden)'


def is_folded(cell: Cell) -> bool:
    "Is it a cell whose code is hidden until a reader opens it?"
    return cell.kind == 'code' and cell.source.startswith(FOLD)


def does_something(cell: Cell) -> bool:
    "An answer is shown or asserted: words alone could say anything"
    parts = ast.walk(cell.tree) if cell.tree else ()
    return any(isinstance(part, (ast.Assert, ast.Call)) for part in parts)
