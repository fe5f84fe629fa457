"""A serving bundle, opened by a process that has nothing of what made it

Scores and vectors are the same to the last bit, no frame and no training is imported, and what is
damaged, changed or cannot be imported is one sentence.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
from onnx import TensorProto, helper, numpy_helper

from mlref.bundle import make_bundle, open_bundle, write_bundle
from mlref.contracts import validate
from mlref.core import DAY, MlrefError, digest, parse_time
from mlref.events import events_between
from mlref.feature_ranges import FeatureRanges, measure_ranges
from mlref.features import OnDemand
from mlref.flights.events import raw_folder, read_year
from mlref.flights.task import flights_task
from mlref.lmdb_store import LmdbStore
from mlref.materialize import apply_events
from mlref.model import register_loader
from mlref.own_model import OwnModel, onnx_model
from mlref.request_fields import entity_rows, make_served_task, parse_entities
from mlref.task import load_task, select_requests
from mlref.vectors import read_vectors
from test_second_task import in_two_files

NOW = parse_time('2013-03-15T07:00')
HEAVY = ('torch', 'mlflow', 'polars', 'pandas', 'matplotlib', 'pydantic', 'starlette', 'duckdb')
MEMORY = 120  # MB of a worker


def logistic(names: tuple[str, ...]) -> OwnModel:
    "A logistic regression of any features as an ONNX file, missing ones taken as 0"
    weights = np.random.default_rng(0).normal(size=(len(names), 1)).astype(np.float32) / 1000
    inside = [
        helper.make_node('IsNaN', ['X'], ['missing']),
        helper.make_node('Where', ['missing', 'zero', 'X'], ['filled']),
        helper.make_node('MatMul', ['filled', 'w'], ['z']),
        helper.make_node('Sigmoid', ['z'], ['p']),
    ]
    graph = helper.make_graph(
        inside,
        'logistic',
        [helper.make_tensor_value_info('X', TensorProto.FLOAT, ['rows', len(names)])],
        [helper.make_tensor_value_info('p', TensorProto.FLOAT, ['rows', 1])],
        [
            numpy_helper.from_array(weights, 'w'),
            numpy_helper.from_array(np.float32(0), 'zero'),
        ],
    )
    opset = helper.make_opsetid('', 17)
    proto = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.checker.check_model(proto)
    return onnx_model(proto.SerializeToString(), names, trained_until=NOW)


def run(code: str, *args: object, path: tuple[Path, ...] = (), cwd: Path | None = None) -> str:
    "The last line that a fresh process prints; the last of what it says when it fails"
    paths = os.pathsep.join(map(str, (*path, *(part for part in sys.path if part))))
    done = subprocess.run(
        [sys.executable, '-c', code, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': paths},
        cwd=cwd,
    )
    said = done.stdout if done.returncode == 0 else done.stderr
    return said.strip().splitlines()[-1]


# Opens a bundle and a store, answers a request, and says what it has imported for it
ANSWER = """
import json, sys
from pathlib import Path
from mlref.bundle import open_bundle
from mlref.compiled_vectors import compile_vectors
from mlref.lmdb_store import LmdbStore
from mlref.request_fields import parse_entities
from mlref.vectors import read_vectors

bundle = open_bundle(Path(sys.argv[1]))
store = LmdbStore(Path(sys.argv[2]), bundle.features, readonly=True)
columns = parse_entities(json.loads(Path(sys.argv[3]).read_text()), bundle.task)
columns['cutoff'] = columns[bundle.task.request_time] - bundle.task.horizon
found = read_vectors(store, columns, bundle.features, bundle.lookups)
compiled = compile_vectors(bundle.plan, store.layouts)
ones = [{name: values[k : k + 1] for name, values in columns.items()} for k in range(len(found.X))]
rows = [compiled.read(store, one, bundle.lookups).X.tobytes().hex() for one in ones]
memory = Path('/proc/self/status').read_text().partition('VmRSS:')[2].split()[0]
print(json.dumps({
    'X': found.X.tobytes().hex(),
    'compiled': ''.join(rows),
    'status': {name: codes.tolist() for name, codes in found.status.items()},
    'p': bundle.model.predict(found.X).tolist(),
    'modules': sorted({name.partition('.')[0] for name in sys.modules}),
    'memory': int(memory) // 1024,
}))
"""


@pytest.fixture(scope='module')
def flights(tmp_path_factory):
    "A store of a few days, requests of a morning, a model, and its bundle"
    folder = tmp_path_factory.mktemp('flights')
    task = flights_task()
    stretch = events_between(read_year(raw_folder()), NOW - 8 * DAY, NOW + 300)
    events = validate(stretch, task.contract).good
    store = LmdbStore(folder / 'online', task.features)
    apply_events(store, events)
    store.close()
    requests = select_requests(task, events, NOW, NOW + 300).head(60)
    served = make_served_task(task)
    rows = entity_rows(requests, served.fields)
    (folder / 'request.json').write_text(json.dumps({'entities': rows}))
    model = logistic(task.features.names)
    return folder, task, model, write_bundle(task, model, folder / 'bundles')


@pytest.fixture(scope='module')
def answered(flights):
    "What a fresh process says"
    folder, _, _, place = flights
    return json.loads(run(ANSWER, place, folder / 'online', folder / 'request.json'))


def answer_here(folder: Path, task, model):
    store = LmdbStore(folder / 'online', task.features, readonly=True)
    rows = json.loads((folder / 'request.json').read_text())
    columns = parse_entities(rows, make_served_task(task))
    columns['cutoff'] = columns[task.request_time] - task.calendar.horizon
    found = read_vectors(store, columns, task.features, task.lookups)
    store.close()
    return found, model.predict(found.X)


def test_a_fresh_process_gives_the_same_vectors_and_scores_to_the_last_bit(flights, answered):
    folder, task, model, _ = flights
    found, p = answer_here(folder, task, model)
    assert found.X.shape == (60, 132)
    assert answered['X'] == found.X.tobytes().hex()
    assert answered['compiled'] == answered['X']  # one by one, by the compiled plan
    assert answered['status'] == {name: codes.tolist() for name, codes in found.status.items()}
    assert answered['p'] == p.tolist()
    assert len(set(answered['p'])) > 50  # rows that differ, and scores that do


def test_a_fresh_process_has_imported_nothing_heavy(flights, answered):
    assert [name for name in HEAVY if name in answered['modules']] == []
    assert 'onnxruntime' in answered['modules']
    loads = json.loads((flights[3] / 'bundle.json').read_text())['loads']
    assert set(loads) <= set(answered['modules'])
    assert open_bundle(flights[3]).heavy == ()


def test_a_fresh_process_is_small(answered):
    assert 20 < answered['memory'] <= MEMORY


def test_equal_content_is_one_bundle_and_nothing_is_left_aside(flights):
    folder, task, model, place = flights
    assert write_bundle(task, model, folder / 'bundles') == place
    assert [each.name for each in (folder / 'bundles').iterdir()] == [place.name]
    other = logistic(task.features.names)
    other.trained_until = NOW - DAY
    assert write_bundle(task, other, folder / 'others').name != place.name


def test_ranges_come_through_a_bundle_exactly_and_one_of_before_has_none(flights, tmp_path):
    folder, task, model, place = flights
    X = answer_here(folder, task, model)[0].X
    X[:, 0] = np.nan  # no row has it
    ranges = measure_ranges(X)
    assert None in ranges.low and len({*ranges.low}) > 20
    other = write_bundle(task, model, tmp_path, ranges=ranges)
    assert open_bundle(other).signature.ranges == ranges
    assert other.name != place.name  # what is said of a model is part of its content
    assert open_bundle(place).signature.ranges is None
    about = json.loads((place / 'bundle.json').read_text())
    del about['ranges'], about['digest']
    before = shutil.copytree(place, tmp_path / 'before')
    (before / 'bundle.json').write_text(json.dumps({**about, 'digest': digest(about)[:12]}))
    assert open_bundle(before).signature.ranges is None
    with pytest.raises(MlrefError, match='expected the ranges of 132 features, got 1'):
        write_bundle(task, model, tmp_path, ranges=FeatureRanges((0.0,), (1.0,)))


@pytest.mark.parametrize('name', ['lookups.json', 'kept.safetensors', 'model/model.onnx'])
@pytest.mark.parametrize('harm', ['gone', 'one byte', 'empty'])
def test_a_damaged_file_is_named(flights, tmp_path, name, harm):
    place = shutil.copytree(flights[3], tmp_path / 'copy')
    file = place / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if harm != 'gone':
        file.write_bytes(data if harm == 'one byte' else b'')
    with pytest.raises(
        MlrefError, match=f'{Path(name).name} with sha256 .* write the bundle again'
    ):
        open_bundle(place)


def rewritten(place: Path, change) -> Path:
    "A bundle whose description was changed by somebody who computes the digest anew"
    about = json.loads((place / 'bundle.json').read_text())
    about.pop('digest')
    change(about)
    about['digest'] = digest(about)[:12]
    (place / 'bundle.json').write_text(json.dumps(about))
    return place


FOREIGN = {
    'format': (lambda about: about.update(format=2), 'of format 1'),
    'no format': (lambda about: about.pop('format'), 'of format 1'),
    'a window': (
        lambda about: about['features']['views'][0].update(ttl=None, ahead=1),
        'expected the feature set flights of version',
    ),
    'a formula that is gone': (
        lambda about: about['features']['on_demand'][0]['make'].update(
            function='mlref.flights.on_demand:gone'
        ),
        'expected the formula of schedule at mlref.flights.on_demand:gone',
    ),
    'a formula with other code': (
        lambda about: about['features']['on_demand'][0]['make'].update(code='0' * 12),
        'expected the formula of schedule as it was written down',
    ),
    'a loader that is gone': (
        lambda about: about['model'].update(loader='mlref.gone'),
        'expected the module mlref.gone with the loader',
    ),
}


@pytest.mark.parametrize('what', FOREIGN)
def test_a_bundle_of_other_code_is_refused_by_name(flights, tmp_path, what):
    change, said = FOREIGN[what]
    place = rewritten(shutil.copytree(flights[3], tmp_path / 'copy'), change)
    with pytest.raises(MlrefError, match=said):
        open_bundle(place)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{"format": 1}'])
def test_a_description_that_is_none_is_refused(tmp_path, text):
    (tmp_path / 'bundle.json').write_text(text)
    with pytest.raises(MlrefError, match='expected'):
        open_bundle(tmp_path)


def test_a_model_of_other_columns_is_refused(flights, tmp_path):
    with pytest.raises(MlrefError, match='a model of the 132 columns of flights, got one of 2'):
        write_bundle(flights[1], logistic(('a', 'b')), tmp_path)
    assert list(tmp_path.iterdir()) == []


# The second task


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    "The task of the guide, in a module as a user saves it"
    folder = tmp_path_factory.mktemp('shop')
    in_two_files(folder)
    sys.path.insert(0, str(folder))
    yield folder, load_task('shop:SHOP')
    sys.path.remove(str(folder))
    sys.modules.pop('shop', None)


def test_the_second_task_is_served_without_its_module(shop, tmp_path):
    _, task = shop
    place = write_bundle(task, logistic(task.features.names), tmp_path / 'bundles')
    visits = sys.modules['shop'].events.head(3000)
    store = LmdbStore(tmp_path / 'online', task.features)
    apply_events(store, visits)
    store.close()
    served = make_served_task(task)
    rows = entity_rows(visits.tail(20), served.fields)
    (tmp_path / 'request.json').write_text(json.dumps({'entities': rows}))
    told = json.loads(run(ANSWER, place, tmp_path / 'online', tmp_path / 'request.json'))
    found, p = answer_here(tmp_path, task, logistic(task.features.names))
    assert (told['X'], told['p']) == (found.X.tobytes().hex(), p.tolist())
    assert not {'shop', *HEAVY} & set(told['modules'])


FORMULA = """
def price_of_one(request, inputs, lookups):
    cents, items = inputs
    return [cents / items{more}]
"""
OPEN = 'import sys; from mlref.bundle import open_bundle; open_bundle(sys.argv[1]); print("opened")'


def with_formula(shop, folder: Path, name: str):
    "The second task with a formula in a module of the user's own, which imports Polars"
    (folder / f'{name}.py').write_text('import polars as pl\n' + FORMULA.format(more=''))
    sys.path.insert(0, str(folder))
    module = __import__(name)
    sys.path.remove(str(folder))
    part = OnDemand(
        name='price',
        outputs=('price_of_one',),
        make=module.price_of_one,
        inputs=('customer_sum_cents_43200m', 'customer_sum_items_43200m'),
    )
    task = shop[1]
    return replace(task, features=replace(task.features, on_demand=(part,)))


def test_a_heavy_module_works_and_is_noted(shop, tmp_path, monkeypatch):
    task = with_formula(shop, tmp_path, 'shop_heavy')
    monkeypatch.syspath_prepend(tmp_path)
    place = write_bundle(task, logistic(task.features.names), tmp_path / 'bundles')
    assert open_bundle(place).heavy == ('polars',)


def test_a_formula_that_was_changed_since_is_refused(shop, tmp_path, monkeypatch):
    task = with_formula(shop, tmp_path, 'shop_changed')
    monkeypatch.syspath_prepend(tmp_path)
    place = write_bundle(task, logistic(task.features.names), tmp_path / 'bundles')
    assert run(OPEN, place, path=(tmp_path,)) == 'opened'
    (tmp_path / 'shop_changed.py').write_text('# a comment\n' + FORMULA.format(more=''))
    assert run(OPEN, place, path=(tmp_path,)) == 'opened'
    (tmp_path / 'shop_changed.py').write_text(FORMULA.format(more=' + 1'))
    said = run(OPEN, place, path=(tmp_path,))
    assert 'expected the formula of price as it was written down' in said
    assert 'it was changed' in said
    (tmp_path / 'shop_changed.py').unlink()
    assert "No module named 'shop_changed'" in run(OPEN, place, path=(tmp_path,))


def test_a_formula_of_a_notebook_is_refused_with_what_to_do(shop, tmp_path):
    task = with_formula(shop, tmp_path, 'shop_main')
    part = task.features.on_demand[0]

    def inside(request, inputs, lookups):
        return inputs[:1]

    for make in (inside, lambda request, inputs, lookups: inputs[:1]):
        other = replace(task.features, on_demand=(replace(part, make=make),))
        with pytest.raises(MlrefError, match='define it at the top level of a module'):
            write_bundle(
                replace(task, features=other), logistic(task.features.names), tmp_path / 'none'
            )
    inside.__module__ = '__main__'
    other = replace(task.features, on_demand=(replace(part, make=inside),))
    with pytest.raises(MlrefError, match='save it in a module, such as shop.py'):
        make_and_write = replace(task, features=other)
        write_bundle(make_and_write, logistic(task.features.names), tmp_path / 'none')
    # in the notebook itself it serves all the same
    assert make_bundle(make_and_write, logistic(task.features.names)).plan.width == 12


LOADER = """
import numpy as np
from mlref.model import register_loader
from mlref.own_model import OwnModel


def make(names, until):
    return OwnModel('{kind}', lambda X: np.full(len(X), 0.25), {{'quarter': b'1/4'}}, names, until)


@register_loader('{kind}')
def load(saved, device):
    return make(saved.names, saved.trained_until)
"""


def test_a_kind_of_model_of_ones_own(shop, tmp_path, monkeypatch):
    (tmp_path / 'quarter.py').write_text(LOADER.format(kind='quarter'))
    monkeypatch.syspath_prepend(tmp_path)
    import quarter

    task = shop[1]
    model = quarter.make(task.features.names, NOW)
    place = write_bundle(task, model, tmp_path / 'bundles')
    assert run(OPEN, place, path=(tmp_path,)) == 'opened'
    assert json.loads((place / 'bundle.json').read_text())['model']['loader'] == 'quarter'


def test_a_loader_of_a_notebook_is_refused_with_what_to_do(shop, tmp_path):
    def load(saved, device):
        raise AssertionError

    load.__module__ = '__main__'
    register_loader('fifth')(load)
    names = shop[1].features.names
    model = OwnModel('fifth', lambda X: np.full(len(X), 0.2), {'fifth': b'1/5'}, names, NOW)
    with pytest.raises(MlrefError, match='register_loader decorates in a module'):
        write_bundle(shop[1], model, tmp_path)


def test_values_that_changed_places_are_refused(flights, tmp_path):
    "Their order is that of the records of a store, and no version knows it"

    def swap(about):
        values = next(one for one in about['features']['sources'] if one['name'] == 'arr')['values']
        values[0], values[1] = values[1], values[0]

    opened = open_bundle(rewritten(shutil.copytree(flights[3], tmp_path / 'copy'), swap))
    with pytest.raises(MlrefError, match='values late, delay, .* put them back in that order'):
        LmdbStore(flights[0] / 'online', opened.features, readonly=True)


def test_frames_and_arrays_read_the_same(flights):
    "The way without frames gives what the way with them gives"
    folder, task, model, _ = flights
    rows = json.loads((folder / 'request.json').read_text())['entities']
    frame = pl.DataFrame(rows)
    store = LmdbStore(folder / 'online', task.features, readonly=True)
    by_frame = read_vectors(store, frame, task.features, task.lookups)
    store.close()
    by_arrays, _ = answer_here(folder, task, model)
    assert by_frame.X.tobytes() == by_arrays.X.tobytes()
