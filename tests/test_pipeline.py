"""The quick pipeline as a user runs it: story, digests twice and after a kill -9, bad input"""

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from golden import measure
from mlref.flights.common import FLIGHT_CALENDAR
from mlref.flights.events import FLIGHT_SCHEMA, raw_folder
from mlref.log import LocalLog
from mlref.pipeline import PipelineRun, StepCost, read_profile, save_run
from mlref.serving_state import prediction_logs
from programs import MLREF

pytestmark = pytest.mark.timeout(1500)  # whole runs of the pipeline: 400 s each
ROOT, DEEP = Path(__file__).parent.parent, os.environ.get('MLREF_DEEP') == '1'
FOLDER = ROOT / 'nbs' / 'steps'
STEPS = [*read_profile(FOLDER, 'quick')]
NO_TABLES = ('compress', 'load')  # steps that measure, and write no table
RUN = [*MLREF, 'run']


def mlref(at, *args):
    return subprocess.run(
        [*RUN, '--data', at / 'data', '--reports', at / 'reports', *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def only(folder):
    return next(folder.glob('runs/*'))


def last(r):
    return (r.stdout + r.stderr).strip().splitlines()[-1]


def stop_all(process):
    "Let a process stand still and then all that it has started; those that do"
    process.suspend()
    below = [stop_all(child) for child in process.children()]
    return [process, *(each for family in below for each in family)]


def copy_stopped(pid, at, to):
    """Copy a run while its processes stand still

    Files are as they would be after kill -9 at this moment, and nobody holds a lock on the copy.
    """
    run = only(at / 'data')
    family = stop_all(psutil.Process(pid))
    try:
        shutil.copytree(run, to / 'data' / 'runs' / run.name)
    finally:
        for process in family:
            process.resume()
    assert len(family) > 3  # this one, its kernel, a server with a worker


@pytest.fixture(scope='module')
def quick(tmp_path_factory):
    at = tmp_path_factory.mktemp('quick')
    told = [
        '--quick',
        '--set',
        'load.seconds=2',
        '--data',
        at / 'data',
        '--reports',
        at / 'reports',
    ]
    said = []
    with (at / 'out').open('w') as out:
        process = subprocess.Popen(
            [*RUN, *told], cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True
        )
        for line in process.stderr:
            said.append(line)
            # one challenge behind it, and one before it
            if re.search(r'\| (1[6-9]|2[0-4])/30 \[', line) and not (at / 'april').exists():
                copy_stopped(process.pid, at, at / 'april')
        process.stderr.close()
        assert process.wait() == 0, ''.join(said)[-2000:]
    return at, (at / 'out').read_text()


def test_the_rehearsed_failure_raises_alarms_and_a_challenger_takes_over(quick):
    import duckdb

    con = duckdb.connect(only(quick[0] / 'data') / 'lake' / 'mlref.duckdb', read_only=True)
    made = con.sql(
        'select action, why, evidence, decided_at from decisions order by decided_at'
    ).fetchall()
    rang = [m[1] for m in made if m[0] == 'alarm']
    assert 'missing all_dep_delay_180m' in rang[0]
    # while days of both worlds would judge, nothing is trained
    assert rang[1:3] == ['challenge postponed', 'auc_surprise falls']
    assert 'departure has stopped while days judged' in next(m[2] for m in made if m[1] == rang[1])
    assert [m[0] for m in made].count('retrain') == 2
    assert made[0][:2] == ('promote', 'bootstrap')
    promoted = [m for m in made if m[0] == 'promote'][-1]
    assert promoted[1] == 'all gates passed'
    last = json.loads(promoted[2])
    assert len(last['gates']) == 22 + 4 and last['slices']
    # it scored for a day beside the champion, who answered
    tried = next(m for m in made if m[0] == 'trial')
    assert promoted[3] - tried[3] == 1440 and json.loads(tried[2])['version'] == last['version']
    beside = con.sql('select count(*), min(version), max(version) from trial_predictions')
    assert beside.fetchall() == [(981, last['version'], last['version'])]
    # what was judged is not what is promoted: it was fitted again on what judged
    tried = [json.loads(m[2]) for m in made if m[0] == 'retrain'][-1]
    assert last['judged'] == tried['version'] != last['version']
    assert tried['challenge'] == 'refit'
    card = (
        only(quick[0] / 'data') / 'registry' / 'models' / last['version'] / 'card.md'
    ).read_text()
    assert all(g['name'] in card for g in last['gates'])
    new = con.sql(
        'select distinct version from predictions where scored_at >= ?', params=[promoted[3]]
    ).fetchall()
    assert new == [(last['version'],)]
    assert con.sql(
        'select count(*) from predictions where trained_until > scored_at'
    ).fetchall() == [(0,)]


def test_a_client_of_the_run_got_the_map_of_each_morning(quick):
    import duckdb

    home = only(quick[0] / 'data')
    con = duckdb.connect(str(home / 'lake' / 'mlref.duckdb'), read_only=True)
    maps = dict(con.sql('select day, digest from calibrations').fetchall())
    con.close()
    wrote = []
    for folder in prediction_logs(home / 'served').values():
        log = LocalLog(folder, readonly=True)
        wrote += [json.loads(m) for m in log.read('predictions', 0, 10**6)]
        log.close()
    assert (
        len(maps) > 25
        and {m.get('calibration') == maps.get(FLIGHT_CALENDAR.day_of(m['cutoff'])) for m in wrote}
        == {True}
        and {m['calibration'] for m in wrote if 'calibration' in m} == {*maps.values()}
    )


def test_what_a_run_leaves(quick):
    at, said = quick
    run = only(at / 'reports')
    assert {p.name for p in run.iterdir()} >= {f'{s}.ipynb' for s in STEPS} | {
        'report.html',
        'card.md',
    }
    assert (at / 'data' / 'current').read_text().strip() == only(at / 'data').name and str(
        run / 'report.html'
    ) in said.strip().splitlines()[-1]
    rows = json.loads((run / 'results' / 'quick.json').read_text())['rows']
    # April goes through a real server
    n = {x['name']: x['ours'] for x in rows}
    assert (
        n['flights scored over HTTP, taken from the log of the server']
        == n['flights scored']
        > 28_000
    )
    assert (
        len(rows) > 10
        and not [x['name'] for x in rows if x['held'] is False]
        and '| flights scored |' in (run / 'card.md').read_text()
    )


def test_the_report_is_understood_by_a_stranger(quick):
    at, _ = quick
    text = (only(at / 'reports') / 'report.html').read_text()
    order = ('The probability that a flight', 'goals held', 'AUC, all days', 'Two AUCs')
    order += ('Decisions', 'Which model served', 'Data quality', 'Cost of the run', 'Not run')
    places = [text.index(each) for each in (*order, 'as they were executed')]
    assert places == sorted(places)
    assert 'must lie below' in text and '(gate not_worse_than_champion failed)' in text
    assert str(at) not in text and str(ROOT) not in text  # no path of this machine
    assert not re.search(r'\d+%\|', text)  # no progress bar
    assert 'src="http' not in text and len(text) < 2**20


def test_the_run_is_the_golden_one(quick):
    "tests/golden/README.md says what is compared where, and why"
    folder = only(quick[0] / 'data')
    golden = measure.load('quick_run')
    assert measure.differences(golden['on every machine'], measure.run(folder)) == {}
    here = golden['on one machine']
    if here['machine'] == measure.machine():
        found = {'machine': here['machine'], **measure.run_with_network(folder)}
        assert measure.differences(here, found) == {}


def move_registry(run, old):
    "Let a copied registry keep what it is sent in its own folder"
    with closing(sqlite3.connect(run / 'registry' / 'mlflow.db')) as con, con:
        for table, column in (
            ('experiments', 'artifact_location'),
            ('runs', 'artifact_uri'),
            ('logged_models', 'artifact_location'),
            ('model_versions', 'source'),
            ('model_versions', 'storage_location'),
        ):
            con.execute(f'update {table} set {column} = replace({column}, ?, ?)', (old, str(run)))


def begin_tables(at, quick):
    """The id of a quick run of the steps that write tables

    It goes on from the middle of April of the other one; in a deep test it lives by itself.
    """
    given = read_profile(FOLDER, 'quick', seed=0)
    wanted = {step: own for step, own in given.items() if step not in NO_TABLES}
    run_id = 'killed'
    done = {}
    if not DEEP:
        shutil.copytree(only(quick / 'april' / 'data'), at / 'data' / 'runs' / run_id)
        move_registry(at / 'data' / 'runs' / run_id, str(only(quick / 'data')))
        done = {step: StepCost(0.0, 0.0) for step in ('prepare', 'train')}
    save_run(PipelineRun(FOLDER, at / 'data', at / 'reports', run_id, 'quick', wanted, done))
    return run_id


def kill_in_april(at, run_id):
    "Go on with a run and kill it after a day; in a deep test between its tenth and its twentieth"
    process = subprocess.Popen(
        [*RUN, '--resume', run_id, '--data', at / 'data', '--reports', at / 'reports'],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seen = b''
    while not re.search(rb'\| 1\d/30 \[' if DEEP else rb'\| [1-9]\d*/\d+ \[', seen):
        got = os.read(process.stdout.fileno(), 4096)
        assert got, seen[-500:]
        seen = seen[-200:] + got
    process.kill()
    process.wait()
    process.stdout.close()


def read_digests(at):
    return json.loads((only(at / 'data') / 'digests.json').read_text())


def test_killed_and_resumed_it_is_the_same_run(quick, tmp_path):
    """Another folder, the same seed, kill -9 in the middle of April: the tables have equal digests

    Twice, unless it lived from the first day on: where the other was copied, and a day later.
    """
    run_id = begin_tables(tmp_path, quick[0])
    kill_in_april(tmp_path, run_id)
    for _ in range(60):  # its kernel notices that nobody is left and lets go of the lake
        r = mlref(tmp_path, '--resume', run_id)
        if 'only writer' not in r.stdout + r.stderr:
            break
        time.sleep(1)
    assert r.returncode == 0, (r.stdout + r.stderr)[-2000:]
    lived = int(re.search(r'(\d+) days lived', r.stderr)[1])
    assert 5 < lived < 25 if DEEP else 0 < lived < 14
    assert read_digests(tmp_path) == read_digests(quick[0])


@pytest.mark.parametrize(
    'spoil, says',
    [
        (lambda f: (f / 'weather.csv').unlink(), 'expected the data file weather.csv'),
        (
            lambda f: (f / 'weather.csv').write_text((f / 'weather.csv').read_text()[:-1]),
            'expected weather.csv with sha256',
        ),
    ],
    ids=['missing', 'altered'],
)
def test_a_missing_or_altered_file_stops_prepare_by_name(spoil, says, tmp_path):
    raw = tmp_path / 'raw'
    shutil.copytree(raw_folder(), raw)
    spoil(raw)
    r = mlref(tmp_path, '--quick', '--set', f'prepare.raw={raw}')
    assert (
        r.returncode == 1
        and 'prepare failed in cell' in last(r)
        and says in last(r)
        and '--resume quick-' in last(r)
    )
    assert 'MlrefError' in (only(tmp_path / 'reports') / 'prepare.ipynb').read_text()


@pytest.mark.parametrize(
    'arg, says',
    [
        ('live.tempo=3', 'expected parameters of live among home, raw,'),
        ('live.block=many', 'expected live.block as int'),
        ('lives.block=3', 'expected a step among'),
        ('live.alarms=none.json', 'expected alarm rules'),
        ('live.watched=another set', 'expected a policy among'),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(arg, says, tmp_path):
    r = mlref(tmp_path, '--quick', '--set', arg)
    assert r.returncode == 1 and says in last(r) and not (tmp_path / 'data').exists()


def test_a_second_opener_of_the_lake_is_told_who_holds_it(tmp_path):
    from mlref.lake import Lake

    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    r = subprocess.run(
        [
            sys.executable,
            '-c',
            (
                'from pathlib import Path; from mlref.flights.events import FLIGHT_SCHEMA;'
                ' from mlref.lake import Lake;'
                f' Lake(Path({str(tmp_path / "l.duckdb")!r}), FLIGHT_SCHEMA)'
            ),
        ],
        capture_output=True,
        text=True,
    )
    lake.close()
    assert r.returncode and f'process {os.getpid()} holds it' in last(r)


def test_a_corrupt_event_and_an_unknown_airport_are_kept_with_their_reason_and_the_rest_goes_in(
    tmp_path,
):
    import polars as pl

    from mlref.events import encode_events
    from mlref.flights.contract import flight_rules
    from mlref.flights.events import read_raw, read_year
    from mlref.flights.features import static
    from mlref.ingest import ingest
    from mlref.lake import Lake
    from mlref.log import LocalLog

    st = static(read_raw(raw_folder(), 'airports'), read_raw(raw_folder(), 'planes'))
    good = read_year(raw_folder()).head(1000)
    odd = (
        good.filter(pl.col('kind') == 'schedule')
        .head(1)
        .with_columns(origin=pl.lit('XXX'), event_id=pl.lit('odd'))
    )
    log, lake = LocalLog(tmp_path / 'log'), Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    log.append(
        'flights',
        [
            b'{"kind": "sched',
            *encode_events(odd, FLIGHT_SCHEMA),
            *encode_events(good, FLIGHT_SCHEMA),
        ],
    )
    ingest(lake, log, 'flights', flight_rules(list(st.airports)))
    dead = lake.sql('select off, raw, reasons from dead_letters order by off')
    assert lake.sql('select count(*) as n from events')['n'][0] == 1000 and dead[
        'off'
    ].to_list() == [0, 1]
    assert dead['raw'][0] == b'{"kind": "sched' and dead['reasons'].to_list() == [
        'not a JSON object with the fields of an event',
        'origin is known',
    ]
    lake.close()
