"""Falsy values: '', 0, [], {} and False are values; nothing that was found is tested for truth"""

import ast
import json
import math

import numpy as np
import pytest

from checks.notebooks import Cell, Page
from checks.pages import check_pages
from checks.truth import check_truth
from mlref.core import MlrefError
from mlref.features import FeatureSet, FeatureView, Source
from mlref.last_values import get_online_features, push
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.mlflow_protocol import decode_mlflow
from mlref.oip import decode_oip
from mlref.policy import RetrainPolicy, retrain_reason
from mlref.protocols import Limits, RequestError, Signature, parse_numbers
from mlref.request_fields import make_served_task, parse_entities, request_fields
from small import SALES, SHOP, TASK

FALSY = ('', 0, 0.0, False, None, [], {}, ())

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
    'an empty default of its own': 'def f(hint: str = ""):\n    return hint or "start"',
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
        page = Page('nbs/store.ipynb', (top, Cell('code', 'c1', source)))
        assert [finding.rule for finding in check_pages([page])] == found


def test_day_0_is_a_day():
    "The last attempt of day 0 counts, not the first model of day -40"
    policy = RetrainPolicy(refresh=42)
    assert retrain_reason({}, last_attempt=0, first_model=-40, day=10, policy=policy) == ''
    assert retrain_reason({}, last_attempt=None, first_model=-40, day=10, policy=policy) == 'age'
    assert retrain_reason({}, last_attempt=0, first_model=-40, day=42, policy=policy) == 'age'


@pytest.mark.parametrize('field', request_fields(TASK), ids=lambda field: field.name)
@pytest.mark.parametrize('value', FALSY, ids=repr)
def test_a_request_takes_no_empty_value_of_another_type(field, value):
    good = {'visit': 'v1', 'shop': 's1', 'event_time': 5}
    request = {'entities': [good, {**good, field.name: value}]}
    if type(value) in field.types and not (field.is_time and value == ''):
        found = parse_entities(request, make_served_task(TASK))
        assert found[field.name][1] == value
        return
    with pytest.raises(RequestError, match=f'expected {field.name}'):
        parse_entities(request, make_served_task(TASK))


@pytest.mark.parametrize('value', ['', False, [], {}, ()], ids=repr)
def test_a_vector_takes_no_empty_value_for_a_number(value):
    signature = Signature(('a', 'b'))
    tensor = {'name': 'X', 'datatype': 'FP32', 'shape': [1, 2], 'data': [1.0, value]}
    oip = json.dumps({'inputs': [tensor]}).encode()
    split = {'columns': ['a', 'b'], 'data': [[1.0, value]]}
    frame = json.dumps({'dataframe_split': split}).encode()
    bodies = [
        lambda: parse_numbers([1.0, value], signature),
        lambda: decode_mlflow(frame, 'application/json', signature, Limits()),
        lambda: decode_oip(oip, {}, signature, Limits()),
    ]
    for body in bodies:
        with pytest.raises(RequestError, match='expected (numbers or null|rows of 2 values)'):
            body()
    found = parse_numbers([0, None], signature)
    assert found[0, 0] == 0 and math.isnan(found[0, 1])


@pytest.mark.parametrize('value', FALSY, ids=repr)
def test_a_log_takes_no_empty_value_for_a_message(tmp_path, value):
    log = LocalLog(tmp_path)
    with pytest.raises(MlrefError, match='messages of bytes'):
        log.append('events', [b'first', value])
    assert log.end('events') == 0
    log.append('events', [b'first', b''])
    assert log.read('events', 0, 9) == [b'first', b'']
    log.close()


def test_a_push_takes_no_empty_value_for_a_key(tmp_path):
    newest = Source(name='newest', values={'price': 'cent'}, rows=SALES.rows, kind='last')
    view = FeatureView(name='last', entity=SHOP, source=newest, stats=('price',))
    store = LmdbStore(tmp_path, FeatureSet(name='visits', views=(view,)))
    name = next(iter(store.layouts))
    t = np.array([5, 5])
    for value in FALSY[1:]:
        with pytest.raises(MlrefError, match='keys as text'):
            push(store, name, ['s1', value], t, np.ones((2, 1)))
    assert push(store, name, ['s1', 's2'], t, np.zeros((2, 1))) == 2
    found = get_online_features(store, [name], [['s1', 's2']], now=5)
    assert found.values.tolist() == [[0.0], [0.0]]  # 0 is a price
    store.close()


def test_of_two_columns_of_one_name_none_counts():
    twice = b'{"dataframe_split": {"columns": ["a", "b", "a"], "data": [[1.0, 2.0, 3.0]]}}'
    with pytest.raises(RequestError, match="'a' twice"):
        decode_mlflow(twice, 'application/json', Signature(('a', 'b')), Limits())
