"""The registry between processes

A real tracking server, kills, two promotions at once, a pickle with a trap, another lock, the
command line.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch

from killed import kill_at_call, kill_at_number
from mlref.core import MlrefError, digest
from mlref.environment import (
    installed_packages,
    lock_file,
    lock_hash,
    locked_packages,
    mismatched_packages,
)
from mlref.feature_ranges import measure_ranges
from mlref.flights.features import FLIGHTS
from mlref.gates import Gate
from mlref.model import EnsemblePredictor, LightGBMPredictor, TorchPredictor
from mlref.model_versions import (
    attach_file,
    get_version,
    list_versions,
    load_champion,
    load_version,
    read_attached,
    read_ranges,
)
from mlref.networks import linear_net
from mlref.promotion import promote, promotions, rollback, sync_aliases
from mlref.registry import (
    Registry,
    TrainingRun,
    pending_uploads,
    register_model,
    upload_model,
    version_by_alias,
)
from mlref.tracking_store import RegistryUnreachable, local_uri
from programs import FORK, run_commands

ROOT, DEEP = Path(__file__).parent.parent, os.environ.get('MLREF_DEEP') == '1'
X = np.random.default_rng(0).normal(size=(64, len(FLIGHTS.names))).astype(np.float32)
GOOD = [Gate('better_than_champion', True, 0.01, -0.003, '')]
BAD = [Gate('better_than_champion', False, -0.02, -0.003, '')]
LOG = 'late-promotions'


def late(at, uri=None):
    "The registry of the flights in a folder"
    return Registry(at, uri, name='late')


def register(registry, seed, gates=None, sample=None, lake=''):
    "A version of a small network"
    run = TrainingRun(digest([seed]), {'auc': 0.7 + seed / 100}, {'seed': seed}, lake)
    return register_model(registry, model(seed), run, FLIGHTS, gates, sample)


def model(seed):
    torch.manual_seed(seed)
    return TorchPredictor(linear_net(FLIGHTS.names, {}), 22_000_000 + seed)


def env(**more):
    return {
        **{k: v for k, v in os.environ.items() if k != 'MLFLOW_TRACKING_URI'},
        'PYTHONPATH': str(ROOT),
        **more,
    }


def python(code, *args, **k):
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd='/',
        env=env(**k),
    )


def cli(*lines, **k):
    "Commands, one after another, in one process: status, stdout and stderr of each"
    return run_commands([shlex.split(line) for line in lines], **k)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Three versions, none promoted: without gates, passed, failed"
    at = tmp_path_factory.mktemp('whole') / 'registry'
    r = late(at, local_uri(at))
    assert r.client  # its tables are made once, that takes seconds
    shutil.copy(at / 'mlflow.db', at.parent / 'bare.db')
    for i, gates in enumerate((None, GOOD, BAD)):
        register(r, i, gates, X, f'commit {40 + i}')
    return at


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / 'registry'))


def test_this_process_runs_on_the_lock_that_serving_and_promotion_compare():
    locked = locked_packages(lock_file().read_text())
    others = mismatched_packages(locked, installed_packages())
    expected = hashlib.sha256((ROOT / 'requirements.txt').read_bytes()).hexdigest()[:12]
    assert lock_hash() == expected, (
        f'installed otherwise than locked: {others}; ./run test installs the lock'
    )
    # one lock, installed in one place
    assert 'pip install' not in (ROOT / '.ci' / 'run').read_text()
    assert 'requirements.txt' in (ROOT / 'run').read_text()


def test_the_command_line(folder):
    import duckdb

    (folder.parent / 'lake').mkdir()
    con = duckdb.connect(str(folder.parent / 'lake' / 'mlref.duckdb'))
    con.execute(
        'create table decisions (decided_at bigint, action varchar, why varchar, evidence varchar)'
    )
    con.execute(
        'insert into decisions values (22000000, ?, ?, ?), (22000001, ?, ?, ?)',
        [
            'promote',
            'all gates passed',
            json.dumps({'version': model(1).version}),
            'refuse',
            'calibrated',
            json.dumps({'version': model(2).version}),
        ],
    )
    con.close()
    f, names = (
        f' --folder {folder}',
        {
            'list': 'list',
            'none': 'promote 1',
            'first': 'promote 1 --why bootstrap',
            'bad': 'promote 3 --why hope',
            'good': "promote 2 --why 'all gates passed' --who ann",
            'forced': 'promote 3 --why storm --force --who bob',
            'back': "rollback --why 'worse at once' --who bob",
            'diff': 'diff 1 2',
            'same': 'diff 2 2',
            'lineage': 'lineage 2',
            'show': 'show 2',
            'missing': 'show 9',
            'after': 'list',
        },
    )
    lines = [f'models {line}{f}' for line in names.values()]
    got = dict(zip(names, cli(*lines), strict=True))
    assert [k for k, (rc, *_) in got.items() if rc] == ['none', 'bad', 'missing']
    assert all(
        err.startswith('mlref: ') and err.count('\n') == 1 for rc, _, err in got.values() if rc
    )
    assert (
        '--why' in got['none'][2]
        and 'better_than_champion' in got['bad'][2]
        and 'among 1, 2, 3' in got['missing'][2]
    )
    assert [line.split()[:2] for line in got['after'][1].splitlines()[1:]] == [
        ['1', 'torch'],
        ['2', 'champion'],
        ['3', 'previous'],
    ]
    assert (
        'FORCED' in got['forced'][1]
        and 'version 2' in got['back'][1]
        and got['same'][1] == 'nothing differs\n'
    )
    differ = {tuple(line.split()[:2]) for line in got['diff'][1].splitlines()}
    assert {('tag', 'data'), ('param', 'seed'), ('metric', 'auc')} <= differ
    steps = [line.split()[0] for line in got['lineage'][1].splitlines()]
    assert list(dict.fromkeys(steps)) == [
        'data',
        'lake',
        'feature',
        'view',
        'model',
        'gate',
        'decision',
        'promotion',
    ] and (steps.count('decision'), steps.count('promotion')) == (1, 3)
    assert 'aliases: champion' in got['show'][1] and 'metric auc: 0.71' in got['show'][1]
    r = late(folder)
    assert [(p.who, p.was, p.to, p.forced) for p in promotions(r)][1:] == [
        ('ann', '1', '2', False),
        ('bob', '2', '3', True),
        ('bob', '3', '2', False),
    ] and load_champion(r).version == model(1).version


def test_a_version_without_ranges_stays_as_it_was_sent_when_it_is_registered_again(folder):
    r = late(folder, local_uri(folder))
    number = register(r, 7)
    assert register(r, 7, sample=X) == number
    assert read_ranges(r, load_version(r, number, FLIGHTS)) is None  # and its files are accepted
    other = register(r, 8, sample=X)
    assert read_ranges(r, load_version(r, other, FLIGHTS)) == measure_ranges(X)


def test_a_mean_of_trees_and_a_network_is_kept_like_any_other(folder):
    import lightgbm as lgb

    trees = lgb.train(
        {'verbose': -1, 'num_threads': 1},
        lgb.Dataset(np.tile(X, (8, 1)), np.tile(X[:, 0] > 0, 8)),
        3,
    )
    parts = LightGBMPredictor(trees.model_to_string(), FLIGHTS.names, 22_000_009), model(5)
    mean = EnsemblePredictor(*parts)
    r = late(folder)
    run = TrainingRun(digest([9]), {'auc': 0.8}, {'seed': 9})
    promote(r, register_model(r, mean, run, FLIGHTS, GOOD, X), 30, 'bootstrap', features=FLIGHTS)
    got = load_champion(r)
    assert (
        (got.kind, got.version) == ('mean', mean.version)
        and np.array_equal(got.predict(X), sum(p.predict(X) for p in parts) / 2)
        and got.size() == sum(part.size() for part in parts)
    )


DO = {'promote': promote, 'rollback': rollback, 'register': register}


def _killed(folder, at, do, *more):
    kill_at_call(lambda call: call[: len(at)] == at)
    DO[do](late(folder), *more)


def killed(*a):
    "A process that dies by kill -9 at a call to MLflow"
    p = FORK.Process(target=_killed, args=a)
    p.start()
    p.join()
    assert p.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    'at, rows',
    [
        (['create_model_version', LOG], 1),
        (['set_registered_model_alias', 'late', 'previous'], 2),
        (['set_registered_model_alias', 'late', 'champion'], 2),
    ],
    ids=['before the row', 'before previous', 'before champion'],
)
def test_a_promotion_killed_with_9_is_finished_and_not_doubled(folder, at, rows):
    r = late(folder)
    promote(r, '1', 30, 'bootstrap')
    killed(folder, at, 'promote', '2', 40, 'better')
    assert (version_by_alias(r), len(promotions(r))) == ('1', rows)
    promote(r, '2', 40, 'better')
    assert (
        version_by_alias(r),
        version_by_alias(r, 'previous'),
        len(promotions(r)),
        sync_aliases(r),
    ) == ('2', '1', 2, False)


@pytest.mark.parametrize('first', ['a call', 'the client'])
@pytest.mark.parametrize('how', ['moved', 'deleted', 'unlinked', 'replaced'])
def test_a_registry_that_is_gone_while_it_is_open_is_unreachable_and_what_is_new_waits(
    folder, how, first
):
    r = late(folder)
    assert (r.client if first == 'the client' else version_by_alias(r, 'challenger')) is not None
    if how == 'moved':
        folder.rename(folder.with_name('elsewhere'))
    elif how == 'deleted':
        shutil.rmtree(folder)
    elif how == 'unlinked':
        (folder / 'mlflow.db').unlink()
    else:
        shutil.copy(folder / 'mlflow.db', folder / 'other.db')
        (folder / 'other.db').replace(folder / 'mlflow.db')
    for ask in (version_by_alias, load_champion, lambda each: promote(each, '2', 30, 'better')):
        with pytest.raises(RegistryUnreachable, match='deleted, moved or replaced'):
            ask(r)
    with pytest.warns(UserWarning, match='is kept in'):
        assert register(r, 7, GOOD, X) is None
    assert model(7).version in pending_uploads(r)
    assert version_by_alias(late(folder), 'champion') is None  # a registry that is opened anew


@pytest.mark.parametrize(
    'at',
    [
        ['create_logged_model'],
        ['create_model_version', 'late'],
        ['set_registered_model_alias', 'late', 'challenger'],
    ],
    ids=' '.join,
)
def test_sending_a_model_is_cut_off_by_kill_9_and_done_again_without_doubling(folder, at):
    r = late(folder)
    killed(folder, at, 'register', 9, GOOD, X)
    assert (
        pending_uploads(r) == [model(9).version]
        and upload_model(r, model(9).version) == version_by_alias(r, 'challenger') == '4'
        and pending_uploads(r) == []
    )
    experiment, mine = (
        [r.client.get_experiment_by_name('late').experiment_id],
        f"tags.model = '{model(9).version}'",
    )
    assert [
        len(r.client.search_runs(experiment, mine)),
        len(r.client.search_logged_models(experiment, mine)),
        len(r.client.search_model_versions(f"name = 'late' and {mine}")),
    ] == [1, 1, 1]
    assert (
        promote(r, '4', 30, 'bootstrap').to == '4' and load_champion(r).version == model(9).version
    )


def test_a_rollback_killed_with_9_is_not_turned_round_when_somebody_tries_again_a_minute_later(
    folder,
):
    r = late(folder)
    promote(r, '1', 30, 'bootstrap')
    promote(r, '2', 40, 'better')
    killed(folder, ['set_registered_model_alias', 'late', 'champion'], 'rollback', 50, 'worse')
    assert version_by_alias(r) == '2'
    rollback(r, 51, 'worse')
    assert (version_by_alias(r), [x.to for x in promotions(r)]) == ('1', ['1', '2', '1'])


def _killed_at(folder, k, do, *more):
    kill_at_number(k)
    DO[do](late(folder), *more)


def test_killed_at_any_call_to_mlflow(whole, tmp_path):
    "Two rows at the end, whatever call it died at; a sample of the calls in the first tier"
    for do, more in (('promote', ('2', 40, 'better')), ('rollback', (50, 'worse'))):
        for k in range(0, 100, 1 if DEEP else 13):
            folder = Path(shutil.copytree(whole, tmp_path / f'{do}{k}'))
            r = late(folder)
            promote(r, '1', 30, 'bootstrap')
            if do == 'rollback':
                promote(r, '2', 35, 'better')
            p = FORK.Process(target=_killed_at, args=(folder, k, do, *more))
            p.start()
            p.join()
            DO[do](r, *more)
            want = ['1', '2', '1'][: 3 if do == 'rollback' else 2]
            assert (
                [x.to for x in promotions(r)],
                version_by_alias(r),
                version_by_alias(r, 'previous'),
            ) == (
                want,
                want[-1],
                want[-2],
            ), k
            if p.exitcode == 0:
                break
            assert p.exitcode == -signal.SIGKILL
        assert p.exitcode == 0 and k > 9


def _both(folder, version, meet, said):
    real = Registry.call

    def call(self, method, *args, **kwargs):
        if [method, *args][:2] == ['create_model_version', LOG]:
            meet.wait(60)
        return real(self, method, *args, **kwargs)

    Registry.call = call
    try:
        promote(late(folder), version, 40, f'{version} is better', f'process {version}', True)
        said.put((version, 'won'))
    except MlrefError as error:
        said.put((version, str(error)))


def test_two_processes_promote_at_once_one_wins_and_the_other_is_told(folder):
    r = late(folder)
    promote(r, '1', 30, 'bootstrap')
    meet, said = FORK.Barrier(2), FORK.Queue()
    both = [FORK.Process(target=_both, args=(folder, v, meet, said)) for v in '23']
    [p.start() for p in both]
    got = dict(said.get(timeout=120) for _ in both)
    [p.join() for p in both]
    (winner,), (loser,) = [v for v in got if got[v] == 'won'], [v for v in got if got[v] != 'won']
    assert f'process {winner} promoted {winner} at the same time' in got[loser]
    assert [x.to for x in promotions(r)] == ['1', winner] and version_by_alias(r) == winner
    assert promote(r, loser, 41, 'again', force=True).was == winner  # and the log goes on


def free():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def serve(at, port):
    "A real `mlflow server`; its process group"
    store = ['--backend-store-uri', f'sqlite:///{at}/server.db']
    files = ['--artifacts-destination', str(at / 'artifacts')]
    where = ['--host', '127.0.0.1', '--port', str(port), '--workers', '1']
    with open(at / 'server.log', 'w') as said:
        p = subprocess.Popen(
            [sys.executable, '-m', 'mlflow', 'server', *store, *files, *where],
            cwd=at,
            start_new_session=True,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=env(MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false', MLFLOW_DISABLE_TELEMETRY='true'),
        )
    for _ in range(600):
        try:
            urlopen(f'http://127.0.0.1:{port}/health', timeout=2)
            return p
        except OSError:
            assert p.poll() is None, (at / 'server.log').read_text()[-2000:]
            time.sleep(0.2)
    raise AssertionError('no server')


def test_a_server_that_is_away_keeps_nobody_from_training_and_gets_everything_later(
    tmp_path, whole
):
    port = free()
    uri, here = f'http://127.0.0.1:{port}', tmp_path / 'here'
    away, up = late(here, uri), f'models upload --folder {here} --uri {uri}'
    for i, gates in ((0, None), (1, GOOD)):
        t = time.time()
        with pytest.warns(UserWarning, match=f'mlref {up}'):
            assert register(away, i, gates, X) is None
        assert time.time() - t < 60  # MLflow alone goes on for minutes
    with pytest.raises(MlrefError, match='to answer'):
        upload_model(away, model(0).version)
    assert len(pending_uploads(away)) == 2
    shutil.copy(whole.parent / 'bare.db', tmp_path / 'server.db')
    server = serve(tmp_path, port)
    try:
        first, again = cli(up, up, MLFLOW_TRACKING_URI=uri)
        assert (
            first[0] == 0
            and sorted(line.split()[-1] for line in first[1].splitlines()) == ['1', '2']
            and again[1] == 'nothing waits\n'
        )
        # another machine: the address and nothing else
        there = late(tmp_path / 'there', uri)
        order = {
            i: v
            for i in (0, 1)
            for v in '12'
            if there.client.get_model_version('late', v).tags['model'] == model(i).version
        }
        promote(there, order[0], 30, 'bootstrap')
        promote(there, order[1], 40, 'all gates passed', features=FLIGHTS)
        assert (
            np.array_equal(load_champion(there).predict(X), model(1).predict(X))
            and (there.folder / 'models' / model(1).version / 'weights.safetensors').exists()
        )
        (there.folder / 'models' / model(1).version / 'card.md').write_text('# A card')
        attach_file(there, order[1], 'card.md')
        third = late(tmp_path / 'third', uri)
        assert read_attached(third, order[1], 'card.md').read_text() == '# A card'
        rollback(third, 50, 'worse')
        logged = there.client.get_logged_model(get_version(there, order[1]).tags['logged'])
        assert [(m.key, m.value) for m in logged.metrics] == [
            ('auc', 0.71)
        ] and there.client.get_run(logged.source_run_id).outputs.model_outputs[
            0
        ].model_id == logged.model_id
        assert (
            version_by_alias(there),
            load_champion(third).version,
            [p.to for p in promotions(third)],
        ) == (
            order[0],
            model(0).version,
            [order[0], order[1], order[0]],
        )
        assert (
            register(there, 0) == order[0]
            and len(there.client.search_model_versions("name = 'late'")) == 2
            and len(
                there.client.search_logged_models(
                    [there.client.get_experiment_by_name('late').experiment_id]
                )
            )
            == 2
        )
        w = there.folder / 'models' / model(1).version / 'weights.safetensors'
        w.write_bytes(w.read_bytes()[:-1] + b'x')
        with pytest.raises(MlrefError, match='altered'):
            promote(there, order[1], 60, 'again')
        ((rc, listed, _),) = cli(
            'models list --data ' + str(tmp_path / 'data'), MLFLOW_TRACKING_URI=uri
        )
        assert rc == 0 and 'champion' in listed
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    with pytest.raises(RegistryUnreachable, match='to answer'):
        load_champion(there)
    with pytest.raises(RegistryUnreachable, match='to answer'):
        rollback(there, 70, 'worse')


TRAP = """
import pickle
import sys
import warnings
from pathlib import Path

warnings.simplefilter('ignore')
at, mark = Path(sys.argv[1]), sys.argv[2]

import mlflow
import mlflow.sklearn


class Trap(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        return model_input

    def __reduce__(self):
        return (open, (mark, 'w'))


class Tree:
    def __reduce__(self):
        return (open, (mark, 'w'))


mlflow.pyfunc.save_model(at / 'trap', python_model=Trap(), pip_requirements=['numpy'])
(at / 'tree').mkdir()
(at / 'tree' / 'model.pkl').write_bytes(pickle.dumps(Tree()))
(at / 'tree' / 'MLmodel').write_text(sys.argv[3])
"""
TREE = """flavors:
  python_function:
    loader_module: mlflow.sklearn
    model_path: model.pkl
    predict_fn: predict
    python_version: 3.11.7
  sklearn:
    pickled_model: model.pkl
    serialization_format: pickle
    sklearn_version: 1.9.1
"""
SPRUNG = """
import sys
import warnings
from pathlib import Path

warnings.simplefilter('ignore')
with_mlref = sys.argv[3] == 'mlref'
if with_mlref:
    from mlref.model_versions import load_version
    from mlref.registry import Registry

import mlflow


def attempt(load, *arguments):
    try:
        load(*arguments)
        print('loaded')
    except Exception as error:
        print(type(error).__name__, str(error)[:300].replace(chr(10), ' '))


for name in ('trap', 'tree'):
    attempt(mlflow.pyfunc.load_model, f'{sys.argv[1]}/{name}')
if with_mlref:
    registry = Registry(Path(sys.argv[2]), name='late')
    for name in ('trap', 'tree'):
        tags = {'kind': 'torch', 'model': name}
        made = registry.client.create_model_version('late', f'{sys.argv[1]}/{name}', tags=tags)
        registry.client.set_registered_model_alias('late', 'champion', made.version)
        attempt(load_version, registry, str(made.version))
"""


def test_a_pickle_with_a_trap_is_refused_and_does_not_go_off(folder, tmp_path):
    mark = tmp_path / 'sprung'
    p = python(TRAP, tmp_path, mark, TREE)
    _, err = p.communicate()
    assert p.returncode == 0, err
    mark.unlink(missing_ok=True)
    out, err = (p := python(SPRUNG, tmp_path, folder, 'mlref')).communicate()
    assert p.returncode == 0 and len(out.splitlines()) == 4 and 'loaded' not in out.split(), (
        out + err
    )
    assert (
        [line.split()[0] for line in out.splitlines()]
        == ['MlflowException'] * 2 + ['MlrefError'] * 2
        and out.count('disallowed') == 2
        and not mark.exists()
    ), out
    python(
        SPRUNG, tmp_path, folder, 'plain', MLFLOW_ALLOW_PICKLE_DESERIALIZATION='true'
    ).communicate()
    assert mark.exists()  # without mlref it does: the trap is one


OTHER_LOCK = """
import sys
from pathlib import Path

from mlref.cli import main
from mlref.model_versions import load_version
from mlref.registry import Registry

folder = ['--folder', sys.argv[1]]
first = main(['models', 'promote', '1', '--why', 'bootstrap', *folder])
forced = main(['models', 'promote', '1', '--why', 'hope', '--force', *folder])
print(first, forced)
load_version(Registry(Path(sys.argv[1]), name='late'), '1')
print('loaded')
"""


def test_a_model_of_another_lock_is_loaded_with_a_warning_and_not_promoted(folder, tmp_path):
    shutil.copytree(
        ROOT / 'mlref', tmp_path / 'mlref', ignore=shutil.ignore_patterns('__pycache__')
    )
    # a checkout with another lock, which this process strays from
    (tmp_path / 'requirements.txt').write_text(
        (ROOT / 'requirements.txt').read_text().replace('tqdm==', 'tqdm==0.')
    )
    out, err = python(OTHER_LOCK, folder, PYTHONPATH=str(tmp_path)).communicate()
    refused = [line for line in err.splitlines() if line.startswith('mlref: ')]
    assert (
        out == '1 1\nloaded\n'
        and len(refused) == 2
        and all('under the lock' in line and '+' in line for line in refused)
        and all('train it again here' in line for line in refused)
        and promotions(late(folder)) == []
    )
    assert 'Differs: late 1' in err and f'lock {lock_hash()} when registered' in err


@pytest.mark.parametrize(
    'change, says',
    [
        ({}, ''),
        ({'python': '3.11.0'}, 'warning'),
        ({'flags': ['sse4_2', 'amx_fp8']}, 'warning'),
        ({'features': 'other'}, 'check out the commit'),
        ({'python': '4.0.0'}, 'install Python 4.0.0'),
    ],
    ids=['same', 'patch', 'processor', 'features', 'python'],
)
def test_what_the_environment_was_is_compared_at_loading(folder, change, says, recwarn):
    r = late(folder)
    tag = json.loads(r.client.get_model_version('late', '1').tags['environment'])
    r.client.set_model_version_tag('late', '1', 'environment', json.dumps({**tag, **change}))
    if says in ('', 'warning'):
        promote(r, '1', 30, 'bootstrap', features=FLIGHTS)
        assert bool([w for w in recwarn if 'when registered' in str(w.message)]) == (
            says == 'warning'
        )
        return
    with pytest.raises(MlrefError, match=says):
        promote(r, '1', 30, 'bootstrap', features=FLIGHTS)
    assert version_by_alias(r) is None and promotions(r) == []


def test_an_operator_without_the_task_promotes_and_goes_back_and_a_server_with_another_one_refuses(
    folder,
):
    import dataclasses

    r = late(folder)
    mine = dataclasses.replace(FLIGHTS, only=FLIGHTS.names[:9])
    torch.manual_seed(7)
    small = TorchPredictor(linear_net(mine.names, {}), 22_000_007)
    version = register_model(r, small, TrainingRun(digest([7])), mine, GOOD, X[:, :9])
    promote(r, '1', 30, 'bootstrap')
    promote(r, version, 40, 'all gates passed')
    assert load_champion(r, features=mine).version == small.version
    with pytest.raises(MlrefError, match='feature set'):
        load_champion(r, features=FLIGHTS)
    assert rollback(r, 50, 'worse').to == '1'
    assert load_champion(r, features=FLIGHTS).version == model(0).version


def test_two_tasks_on_one_tracking_server_do_not_see_each_other(folder):
    r = late(folder)
    other = Registry(folder.parent / 'rebuy', r.uri, name='rebuy')
    assert register(other, 8, GOOD, X) == '1'
    promote(r, '1', 30, 'bootstrap')
    promote(other, '1', 31, 'bootstrap')
    assert (list_versions(r), list_versions(other)) == (['1', '2', '3'], ['1'])
    assert [row.at for row in promotions(r)] == [30]
    assert [row.at for row in promotions(other)] == [31]
    assert (load_champion(r).version, load_champion(other).version) == (
        model(0).version,
        model(8).version,
    )
