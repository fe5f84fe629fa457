"""The installed package as a user meets it"""

import importlib
import inspect
import json
import os
import pkgutil
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.main import get_command

import mlref
from mlref.cli import app
from mlref.core import digest, parse_time
from mlref.documentation import full_documentation, parameter_comments
from mlref.events import disturb_delivery, encode_events, events_between
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_raw, read_year
from mlref.ingest import ingest
from mlref.lake import Lake, events_as_of
from mlref.log import LocalLog
from only_extra import read_extras, read_settings

ROOT = Path(__file__).parent.parent
DEEP = os.environ.get('MLREF_DEEP') == '1'
LIGHT = (
    'core',
    'schema',
    'events',
    'log',
    'contracts',
    'checks',
    'lake',
    'ingest',
    'snapshots',
    'features',
    'task',
    'offline',
    'records',
    'training_set',
    'online',
    'stream',
    'documentation',
    'flights',
    'cli',
)
AIRPORTS = ('SJU', 'BQN', 'STT', 'PSE')  # not in the file of airports


def test_light_modules_import_nothing_heavy():
    "One process imports all of them, so that none of them brings what is heavy"
    names = ', '.join(f'mlref.{module}' for module in LIGHT)
    code = (
        f'import sys, {names}; print([m for m in ("torch", "mlflow", "nannyml", "ray",'
        ' "lightgbm", "pandas", "pydoc") if m in sys.modules])'
    )
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')
    assert run.stdout.strip() == '[]', run.stdout + run.stderr


# A model in a format of one's own, in a registry
REGISTERED = """
import tempfile
from pathlib import Path
import numpy as np
from mlref.core import Calendar
from mlref.features import Entity, FeatureSet, FeatureView
from mlref.sources import from_table
from mlref.model import register_loader
from mlref.model_versions import load_champion
from mlref.own_model import OwnModel
from mlref.promotion import promote
from mlref.registry import Registry, TrainingRun, register_model

def make(names, until):
    return OwnModel('half', lambda X: np.full(len(X), 0.5), {'half': b'1/2'}, names, until)

@register_loader('half')
def load(saved, device):
    return make(saved.names, saved.trained_until)

sales = from_table('sales', known='known_time', keys=('shop',), values={'price': 'cent'})
shop = Entity(name='shop', keys=('shop',))
last = FeatureView(name='last', entity=shop, source=sales, stats=('price',))
features = FeatureSet(name='sales', views=(last,))
folder = Path(tempfile.mkdtemp())
registry = Registry(folder, name='half')
version = register_model(registry, make(features.names, 0), TrainingRun('none'), features)
promote(registry, version, 1, 'the first')
assert load_champion(registry, features=features).predict(np.zeros((1, 1), 'f4')) == 0.5
"""

# ... and what it says where a package that computes its scores has another major version
DIFFERS = """
import json
from mlref.core import MlrefError
noted = json.loads(registry.client.get_model_version('half', version).tags['environment'])
noted['packages']['numpy'] = '1.26.4'
registry.client.set_model_version_tag('half', version, 'environment', json.dumps(noted))
try:
    load_champion(registry, features=features)
except MlrefError as error:
    assert 'numpy 1.26.4 when registered' in str(error), error
    assert "to load it: pip install 'numpy==1.26.4'" in str(error), error
else:
    raise AssertionError('it was loaded to score under another NumPy')
"""

# What each extra is there for: code that runs when mlref, the extra and nothing else is installed
NO_CLUSTER = """
from mlref.core import MlrefError
from mlref.ext.ray_cluster import connect_ray
try:
    connect_ray('127.0.0.1:1')
except MlrefError as error:
    assert 'start one with ray start --head' in str(error), error
else:
    raise AssertionError('a cluster was joined where nobody listens')
"""
USES = {
    '': """
import mlref.catalog, mlref.ingest, mlref.lake, mlref.offline, mlref.online, mlref.stream
import mlref.gates, mlref.monitor, mlref.registry, mlref.task, mlref.training_set, mlref.workspace
from mlref.cli import main
from mlref.core import MlrefError
from mlref.flights.events import raw_folder
assert main(['--version']) == 0
try:
    raw_folder()
except MlrefError as error:
    assert "pip install 'mlref[flights]'" in str(error), error
else:
    raise AssertionError('the files of the flights were found')
""",
    'flights': """
from mlref.flights.events import raw_folder, read_raw
assert read_raw(raw_folder(), 'airports').height == 1458
""",
    'contracts': """
import polars as pl
from mlref.contracts import Rule, to_pandera
from mlref.schema import EventSchema
schema = EventSchema({'price': pl.Float64}, kinds=('sale',), entity_id='price')
rule = Rule(name='has a price', holds=pl.col('price') > 0)
assert 'price' in to_pandera((rule,), schema).columns
""",
    'train': """
import numpy as np
from mlref.core import TrainingSet
from mlref.recipes import fit_recipe
import mlref.challenger, mlref.compress, mlref.registry, mlflow, onnxruntime
cutoff = np.arange(4000) * 30
X = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
y = (X[:, 0] > 0).astype(np.float32)
table = TrainingSet(cutoff.astype(str), cutoff, cutoff + 1, y, X, ('a', 'b', 'c'), {})
for kind in ('logistic', 'gbm'):
    model = fit_recipe(kind, table.take(cutoff < 90000), table.take(cutoff >= 90000))
    p = model.predict(X)
    assert (p > 0).all() and (p < 1).all()
""",
    'monitor': 'import mlref.monitor, nannyml, statsmodels',
    'train,monitor,serve': 'import mlref.lifecycle, mlref.run_report',  # the whole loop
    'registry': REGISTERED + DIFFERS,
    'serve': REGISTERED
    + """
import onnxruntime, polars as pl, uvicorn
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.materialize import apply_events
from mlref.bundle import make_bundle
from mlref.model_versions import load_champion
from mlref.routes import make_app, open_server
from mlref.schema import EventSchema
from mlref.serve import LocalClient
from mlref.task import Task
columns = {'sale': pl.Int64, 'shop': pl.Int64, 'price': pl.Int64}
schema = EventSchema(columns, kinds=('sale',), entity_id='sale')
task = Task(name='half', entity='sale', outcome='is returned', schema=schema, contract=(),
    features=features, calendar=Calendar(), request_kind='sale', request_time='event_time',
    labels=lambda events, now: events, label_kinds=('sale',))
store = LmdbStore(folder / 'online', features)
row = ['s1', 'sale', 28_000_000, 28_000_000, 1, 1, 3]
apply_events(store, pl.DataFrame([row], schema=dict(schema.columns), orient='row'))
bundle = make_bundle(task, load_champion(registry, features=features))
client = LocalClient(make_app(open_server(bundle, store, LocalLog(folder / 'log'))))
body = b'{"entities": [{"sale": 7, "shop": 1, "event_time": "2023-05-02T08:30Z"}]}'
status, answer = client.ask('POST', '/predict', body)
assert answer['predictions'] == [{'entity_id': 7, 'p': 0.5}], answer
client.close()
"""
    + DIFFERS,
    'load': 'import locust, mlref.capacity',
    'kafka': """
from mlref.core import MlrefError
from mlref.ext.kafka_log import parse_kafka
try:
    parse_kafka('kafka://')
except MlrefError as error:
    assert 'expected an address as kafka://' in str(error), error
else:
    raise AssertionError('an address without a host was taken')
""",
    'redis': """
from mlref.core import MlrefError
from mlref.ext.redis_store import RedisStore
try:
    RedisStore('redis://127.0.0.1:1', 'half')
except MlrefError as error:
    assert 'start it, or correct its address' in str(error), error
else:
    raise AssertionError('a store was opened where nobody listens')
""",
    'ray': 'from mlref.ext import ray_backfill\n' + NO_CLUSTER,
    'ray,train,serve': """
import mlref.ext.ray_serve, mlref.ext.ray_train, mlref.recipes
import ray.serve, ray.train.torch
"""
    + NO_CLUSTER,
    'serve,trace': """
import asyncio
import os
os.environ['OTEL_EXPORTER_OTLP_ENDPOINT'] = 'http://127.0.0.1:9'
from mlref.traces import open_traces
traces = open_traces()
assert traces is not None
asyncio.run(traces.close())
""",
    'notebooks': 'import ipykernel, jupyterlab, mlref.pipeline, mlref.report, nbconvert, papermill',
    'docs': 'import material, mkdocs',
    'dev': 'import hypothesis, nbdev, pandera.polars, pytest, pytest_timeout, xdist',
}


def run_code(*words: object) -> subprocess.CompletedProcess:
    "Run a command outside the checkout, so that nothing is found by chance"
    command = [str(word) for word in words]
    return subprocess.run(command, capture_output=True, text=True, cwd='/')


def test_the_lock_installs_on_the_oldest_python_that_is_promised():
    "Debian 12 brings 3.11.2; who has a newer one never meets a package that asks for 3.11.5"
    oldest = read_settings()['min_python'] + '.0'
    lines = (ROOT / 'requirements.txt').read_text().splitlines()
    locked = {Requirement(line).name for line in lines if line and not line.startswith('#')}
    assert len(locked) > 200
    for name in locked:
        asked = distribution(name).metadata.get('Requires-Python') or ''
        assert SpecifierSet(asked).contains(oldest), f'{name} asks for Python {asked}'


def test_every_extra_has_a_use():
    "But for tensorrt, which needs a graphics processor"
    assert {*read_extras()} - {'tensorrt'} == {*','.join(USES).split(',')}


def test_the_readme_names_every_extra_and_installs_it_from_the_checkout():
    text = (ROOT / 'README.md').read_text()
    listed = re.search(r'extras bring the rest by use: (.*)', text)[1]
    assert {*re.findall(r'`([a-z]+)`', listed)} == {*read_extras(), 'all'} - {''}
    installed = re.findall(r"`pip install '(\S*)\[([a-z,]+)\]'`", text)
    assert len(installed) > 3 and {place for place, _ in installed} == {'.'}
    assert {*','.join(names for _, names in installed).split(',')} <= {*read_extras()}


def test_the_kills_that_the_readme_counts_are_those_of_the_results():
    "Its cell reads them from there; a number that is typed would stay behind"
    rows = json.loads((ROOT / 'reports' / 'results' / 'crashes.json').read_text())['rows']
    count = next(row['ours'] for row in rows if row['name'] == 'crash points')
    assert f'| messages lost in {count} kills | 0 |' in (ROOT / 'README.md').read_text()
    assert (
        str(count) not in (ROOT / 'nbs' / 'index.ipynb').read_text().split('HEADLINES = ')[1][:2000]
    )


@pytest.mark.parametrize('extra', USES)
def test_an_extra_brings_all_that_its_use_needs(extra):
    "Packages that pip would not install with it are hidden; --deep installs it"
    program = ROOT / 'tests' / 'only_extra.py'
    run = run_code(sys.executable, program, extra, USES[extra])
    assert run.returncode == 0, run.stderr[-1500:]


def test_what_an_extra_does_not_bring_is_hidden():
    run = run_code(sys.executable, ROOT / 'tests' / 'only_extra.py', 'serve', 'import torch')
    assert "No module named 'torch'" in run.stderr


# every module is imported where none of the extras is installed
IMPORT_ALL = """
import importlib, json, pkgutil, mlref
said = {}
for module in pkgutil.walk_packages(mlref.__path__, 'mlref.'):
    if module.name.startswith('mlref.nbs') or module.name.endswith('_modidx'):
        continue
    try:
        importlib.import_module(module.name)
    except Exception as error:
        said[module.name] = str(error)
print(json.dumps(said))
"""


def test_a_module_without_its_extra_is_one_sentence_that_names_it():
    run = run_code(sys.executable, ROOT / 'tests' / 'only_extra.py', '', IMPORT_ALL)
    assert run.returncode == 0, run.stderr[-1500:]
    said = json.loads(run.stdout)
    asked = {
        re.sub(r'expected .*, found none; run: pip install ', '', each) for each in said.values()
    }
    assert asked == {f"'mlref[{extra}]'" for extra in ('serve', 'train', 'kafka', 'redis', 'ray')}
    assert said['mlref.routes'].endswith("pip install 'mlref[serve]'")
    assert said['mlref.train'].endswith("pip install 'mlref[train]'")


def test_an_import_inside_a_function_names_the_extra_too():
    code = 'import mlref.contracts as c, mlref.schema; c.to_pandera((), None)'
    run = run_code(sys.executable, ROOT / 'tests' / 'only_extra.py', '', code)
    assert "pip install 'mlref[contracts]'" in run.stderr


def test_a_command_without_its_extra_ends_with_the_status_of_a_missing_package():
    code = "import mlref.cli; raise SystemExit(mlref.cli.main(['features', 'list']))"
    run = run_code(sys.executable, ROOT / 'tests' / 'only_extra.py', '', code)
    assert (run.returncode, run.stdout) == (3, '')
    assert run.stderr.strip().endswith("pip install 'mlref[flights]'")


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '--no-deps', '-w', folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob('mlref-*.whl'))


@pytest.mark.skipif(not DEEP, reason='installs every extra: minutes; ./run test --deep')
@pytest.mark.parametrize('extra', USES)
def test_an_extra_works_in_a_fresh_environment(extra, wheel, tmp_path):
    subprocess.run([sys.executable, '-m', 'venv', tmp_path / 'venv'], check=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    wanted = f'{wheel}[{extra}]' if extra else wheel
    # -I: a checkout on PYTHONPATH would be taken for an mlref that is installed already
    installed = run_code(python, '-I', '-m', 'pip', 'install', '-q', wanted)
    assert installed.returncode == 0, installed.stderr[-1500:]
    run = run_code(python, '-I', '-c', USES[extra])
    assert run.returncode == 0, run.stderr[-1500:]


def public_functions() -> list[object]:
    "Every function that a module of the package offers"
    found = []
    for module in pkgutil.walk_packages(mlref.__path__, 'mlref.'):
        if module.name.endswith('_modidx') or module.name.startswith('mlref.nbs'):
            continue
        loaded = importlib.import_module(module.name)
        offered = [getattr(loaded, name) for name in getattr(loaded, '__all__', ())]
        found += [each for each in offered if inspect.isfunction(each)]
    return found


def test_help_tells_what_each_parameter_is():
    "The comments stand in the text of help, and no default fills the screen"
    functions = public_functions()
    commented = [each for each in functions if parameter_comments(each)]
    assert len(commented) > 300
    for function in commented:
        text = full_documentation(function, function.__doc__ or '')
        assert all(comment in text for comment in parameter_comments(function).values())
    assert max(len(str(inspect.signature(each))) for each in functions) < 1500


def test_the_script_takes_every_command():
    run = runpy.run_path(str(ROOT / 'run'))
    commands = [each.name for each in get_command(app).commands.values()]
    assert sorted(run['COMMANDS']) == sorted(commands)
    for name in commands:
        assert f'./run {name}' in run['__doc__'] or name == 'run'


def test_a_signal_to_the_script_ends_the_command(tmp_path):
    beginning = 'import runpy; run = runpy.run_path("run"); run["become"]'
    sleeper = 'import os, time; print(os.getpid(), flush=True); time.sleep(100)'
    asleep = [sys.executable, '-c', sleeper]
    command = [sys.executable, '-c', f'{beginning}("serve", {asleep!r})']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert int(process.stdout.readline()) == process.pid
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM


def test_pages_and_tests_see_what_an_installed_package_says():
    environment = runpy.run_path(str(ROOT / 'run'))['environment']
    assert environment('serve')['MLREF_COMMAND'] == './run'
    given = os.environ.get('MLREF_COMMAND')
    assert {environment(name).get('MLREF_COMMAND') for name in ('test', 'lab', 'docs')} == {given}


def test_uv_is_told_what_pip_is_told_or_is_left_alone():
    run = runpy.run_path(str(ROOT / 'run'))
    mine = {'find-links': '/a /b', 'index-url': 'https://x/simple', 'cert': '/c.pem'}
    told = run['uv_environment'](mine | {'no-color': 'true'})
    assert told['UV_FIND_LINKS'] == '/a,/b'
    assert told['UV_DEFAULT_INDEX'] == 'https://x/simple'
    assert told['SSL_CERT_FILE'] == os.environ.get('SSL_CERT_FILE', '/c.pem')
    assert run['uv_environment'](mine | {'trusted-host': 'x'}) is None  # pip does it


def test_pip_is_asked_what_it_is_told(tmp_path, monkeypatch):
    (tmp_path / 'pip.conf').write_text('[global]\ntimeout = 7\n[install]\nfind-links = /a\n')
    monkeypatch.setenv('PIP_CONFIG_FILE', str(tmp_path / 'pip.conf'))
    monkeypatch.setenv('PIP_FIND_LINKS', '/b')
    settings = runpy.run_path(str(ROOT / 'run'))['pip_settings']
    monkeypatch.setitem(settings.__globals__, 'BIN', Path(sys.executable).parent)
    found = settings()
    assert (found['timeout'], found['find-links']) == ('7', '/b')


INGEST = f"""
import sys
from pathlib import Path
from mlref.flights.contract import flight_rules
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_raw
from mlref.ingest import ingest
from mlref.lake import Lake
from mlref.log import LocalLog
folder = Path(sys.argv[1])
lake = Lake(folder / 'lake.duckdb', FLIGHT_SCHEMA)
print('open', flush=True)
rules = flight_rules(read_raw(raw_folder(), 'airports')['faa'].to_list() + {[*AIRPORTS]})
ingest(lake, LocalLog(folder / 'log', readonly=True), 'events', rules, batch=100)
"""


def kill_while_ingesting(
    folder: Path,
    seconds: float,  # after it opened the lake
) -> bool:
    "Did the process still run when it was killed?"
    command = [sys.executable, '-c', INGEST, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'open\n'
    time.sleep(seconds)
    running = process.poll() is None
    if running:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return running


def test_kill_9_loses_and_doubles_nothing(tmp_path):
    "Five kills of a real ingesting process, at different points; then it finishes"
    days = (parse_time('2013-02-11'), parse_time('2013-02-16'))
    part = events_between(read_year(raw_folder()), *days)
    log = LocalLog(tmp_path / 'log')
    storm = disturb_delivery(part, seed=5, late=0.1, twice=0.1)
    log.append('events', encode_events(storm, FLIGHT_SCHEMA))
    log.append('events', [b'{broken', b'\xff'])
    airports = read_raw(raw_folder(), 'airports')['faa'].to_list()
    whole = Lake(tmp_path / 'whole.duckdb', FLIGHT_SCHEMA)
    ingest(whole, log, 'events', flight_rules([*airports, *AIRPORTS]))
    log.close()
    chance = random.Random(0)
    killed = sum(kill_while_ingesting(tmp_path, chance.uniform(0.02, 0.25)) for _ in range(5))
    assert killed >= 3
    command = [sys.executable, '-c', INGEST, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    lake = Lake(tmp_path / 'lake.duckdb', FLIGHT_SCHEMA)
    assert digest(events_as_of(lake)) == digest(events_as_of(whole))
    counts = 'select sum(messages), sum(good), sum(repeated), sum(dead) from commits'
    messages, *kept = lake.sql(counts).row(0)
    assert messages == sum(kept) == whole.sql(counts).row(0)[0]
    dead = 'select count(*), count(distinct (topic, part, off)) from dead_letters'
    assert lake.sql(dead).row(0) == whole.sql(dead).row(0)


def test_the_names_of_the_decision_on_names_are_there():
    "The third column of decision 0011 is what the library calls it now"
    page = json.loads((ROOT / 'nbs' / 'decisions' / '0011-names.ipynb').read_text())
    text = '\n'.join(''.join(cell['source']) for cell in page['cells'])
    rows = re.findall(r'^\| \S+ \| `[^`]+` \| `([\w.]+)` \|$', text, re.MULTILINE)
    words = set()
    for file in (ROOT / 'mlref').rglob('*.py'):
        words |= set(re.findall(r'\w+', file.read_text()))
    assert len(rows) > 250
    assert [name for name in rows if name.split('.')[-1] not in words] == []
