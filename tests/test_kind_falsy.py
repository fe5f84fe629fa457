"""Falsy values: '', 0, [], {} and False are values; nothing that was found is tested for truth"""

import ast
import json

import numpy as np
import polars as pl
import pytest

from checks.notebooks import Cell, Page, read_pages
from checks.pages import check_pages
from checks.truth import check_truth
from mlref.core import Calendar
from mlref.policy import RetrainPolicy, retrain_reason

CALENDAR = Calendar()

PLANTED = {
    'a walrus': 'if found := load():\n    send(found)',
    'a walrus in a condition': 'while size and (line := read()):\n    send(line)',
    'next': 'odd = next((each for each in rows if bad(each)), None)\nif odd:\n    stop()',
    'get': 'rows = request.get("rows")\nassert rows',
    'get at once': 'if not request.get("rows"):\n    stop()',
    'get and a default': 'limit = settings.get("limit") or 10',
    'getattr': 'keep = getattr(settings, "keep", None)\nlast = 1 if keep else 2',
    'a filter': 'kept = [row for row in rows if row.get("value")]',
    'a default': 'def f(limit: int | None = None):\n    return limit or 10',
    'a default of any type': 'def f(config=None):\n    config = config or Config()',
    'an optional number': 'def f(last: int | None):\n    if last:\n        stop()',
    'an optional text': 'def f(*, name: str | None = None):\n    return a if not name else b',
}
FINE = {
    'a count': 'if missing := int(odd.sum()):\n    stop()',
    'a container': 'while some := dict(islice(rows, 10)):\n    send(some)',
    'a comparison': 'if (found := load()) is not None:\n    send(found)',
    'a list': 'odd = [each for each in rows if bad(each)]\nif odd:\n    stop()',
    'is None': 'odd = next(rows, None)\nif odd is None:\n    stop()',
    'a default that says so': 'wait = environment.get("WAIT", "")\nif wait:\n    stop()',
    'a default of True or False': 'if getattr(kind, "is_open", False):\n    stop()',
    'a type that is asked for': 'a = x.get("a")\nif not isinstance(a, list) or not a:\n    stop()',
    'an empty default': 'def f(tables: dict | None = None):\n    return tables or {}',
    'a text to show': 'print(", ".join(names) or "none")',
    'a flag': 'def f(exact: bool, names: list | None = None):\n    return a if exact else b',
    'a name of two kinds': 'x = d.get("x")\nx = [*y]\nif x:\n    stop()',
    'an object': 'def f(client: Client | None):\n    if client:\n        stop()',
}


@pytest.mark.parametrize('source', PLANTED.values(), ids=PLANTED)
def test_a_planted_truth_test_is_found_once(source):
    assert [rule for rule, _ in check_truth(ast.parse(source))] == ['truth']


@pytest.mark.parametrize('source', FINE.values(), ids=FINE)
def test_what_is_no_value_may_be_tested(source):
    assert list(check_truth(ast.parse(source))) == []


def test_the_rule_is_part_of_the_check_of_pages():
    top = Cell('markdown', 'top', '# A page\n\n> What it is for')
    for source, found in ((PLANTED['next'], ['truth']), (FINE['is None'], [])):
        page = Page('nbs/05_store.ipynb', (top, Cell('code', 'c1', source)))
        assert [finding.rule for finding in check_pages([page])] == found


def test_no_page_tests_a_found_value():
    found = [
        f'{page.file} {cell.id} {message}'
        for page in read_pages()
        for cell in page.code
        if cell.tree is not None
        for _, message in check_truth(cell.tree)
    ]
    assert found == []


def test_day_0_is_a_day():
    "The last attempt of day 0 counts, not the first model of day -40"
    policy = RetrainPolicy(refresh=42)
    assert retrain_reason({}, last_attempt=0, first_model=-40, day=10, policy=policy) == ''
    assert retrain_reason({}, last_attempt=None, first_model=-40, day=10, policy=policy) == 'age'
    assert retrain_reason({}, last_attempt=0, first_model=-40, day=42, policy=policy) == 'age'
