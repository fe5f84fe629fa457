"""A folder may be called anything: every store opens the one it was given, or says why it cannot"""

import io
import os
import shutil
import sqlite3
import time
from functools import partial

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.addresses import check_place, local_file, note_place, sqlite_uri
from mlref.core import MlrefError
from mlref.duckdb_files import connect_duckdb, parquet_query
from mlref.events import encode_events
from mlref.flights.events import FLIGHT_SCHEMA
from mlref.ingest import ingest
from mlref.lake import Lake
from mlref.lmdb_store import LmdbStore
from mlref.log import LocalLog
from mlref.pipeline import PipelineRun
from mlref.registry import Registry
from mlref.report import write_report
from mlref.snapshots import clear_snapshots, open_snapshot, publish_snapshot
from mlref.tracking_store import local_uri
from mlref.workspace import read_reference, write_reference

DEEP = os.environ.get('MLREF_DEEP') == '1'
MANY = settings(max_examples=500 if DEEP else 40, deadline=None, derandomize=not DEEP)
ODD = (
    'a%b',
    'my%20run',
    'what?x=1',
    'h#sh',
    '[x]',
    '[!x]',
    'st*r',
    "it's",
    'q"uote',
    'a b',
    ' a ',
    'ünï',
    '-dash',
    'key=3',
    '{a,b}',
    'a&b;c',
    'back\\slash',
)
UNQUOTABLE = ('?', '\\')  # DuckDB has no way to write them in the path of a database
REMOTE = ('s3://bucket/x', 'https://host/x', 'md:x', 'gs://bucket/x', 'motherduck:x')


def entries(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.iterdir())


@pytest.fixture
def odd(request, tmp_path):
    folder = tmp_path / request.param
    folder.mkdir()
    yield folder
    assert entries(tmp_path) == [request.param]  # nothing came into being beside it


every_name = pytest.mark.parametrize('odd', ODD, indirect=True)


@every_name
def test_a_log(odd):
    log = LocalLog(odd / 'log')
    log.append('t', [b'1', b'2'])
    log.close()
    log = LocalLog(odd / 'log', readonly=True)
    assert log.read('t', 0, 9) == [b'1', b'2']
    log.close()
    assert entries(odd / 'log') == ['data.mdb', 'lock.mdb']


@every_name
def test_a_store(odd):
    store = LmdbStore(odd / 'online')
    store.write({b'!note': b'1'})
    store.close()
    store = LmdbStore(odd / 'online', readonly=True)
    assert store.note(b'!note') == b'1'
    store.close()


@every_name
def test_a_lake_and_its_snapshots(odd):
    if any(letter in odd.name for letter in UNQUOTABLE):
        with pytest.raises(MlrefError, match='expected a path without'):
            Lake(odd / 'lake' / 'l.duckdb', FLIGHT_SCHEMA)
        assert not list(odd.rglob('*.duckdb*'))
        return
    log = LocalLog(odd / 'log')
    lake = Lake(odd / 'lake' / 'l.duckdb', FLIGHT_SCHEMA)
    log.append('t', [b'{}', b'[]'])
    ingest(lake, log, 't', ())
    assert set(entries(odd / 'lake')) <= {'l.duckdb', 'l.duckdb.wal'}
    publish_snapshot(lake, odd / 'shots')
    shot = open_snapshot(odd / 'shots')
    assert shot.sql('select sum(messages) as n from commits')['n'][0] == 2
    assert 'key' not in shot.sql('select * from commits').columns
    log.append('t', [b'{}'])
    ingest(lake, log, 't', ())
    publish_snapshot(lake, odd / 'shots')
    del shot
    assert len(clear_snapshots(odd / 'shots', 1)) == 1
    assert open_snapshot(odd / 'shots').sql('select count(*) as n from commits')['n'][0] == 2
    lake.close()
    log.close()


def test_a_snapshot_in_a_folder_with_a_star_is_not_mixed_with_its_neighbours(tmp_path):
    log = LocalLog(tmp_path / 'log')
    log.append('t', [b'{}'])
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    ingest(lake, log, 't', ())
    publish_snapshot(lake, tmp_path / 'run*')
    for neighbour in ('run1', 'run2'):  # a copy has files of the same names
        shutil.copytree(tmp_path / 'run*', tmp_path / neighbour)
    shot = open_snapshot(tmp_path / 'run*')
    assert shot.sql('select sum(messages) as n from commits')['n'][0] == 1
    lake.close()
    log.close()


@every_name
def test_a_reference_of_a_model_and_a_report(odd):
    registry = type('Folder', (), {'folder': odd})()
    frame = pl.DataFrame({'p': [0.5]})
    write_reference(registry, 'v1', frame)
    assert read_reference(registry, 'v1').equals(frame)
    run = PipelineRun(odd, odd / 'data', odd / 'reports', 'bare', 'year', {})
    assert 'run bare' in write_report(run).read_text()


@pytest.fixture(scope='module')
def tables(tmp_path_factory):
    "The file of a registry with all its tables, made once"
    folder = tmp_path_factory.mktemp('registry')
    registry = Registry(folder, local_uri(folder), name='late')
    registry.client.create_experiment('made once')
    registry.client.create_experiment('another')
    return folder / 'mlflow.db'


def test_a_registry(tables, tmp_path):
    names = (*ODD, 'my run') if DEEP else ('my run', 'my%20run', 'what?x=1', '[#*"\'] ü')
    for name in names:
        folder = tmp_path / name / 'registry'
        folder.mkdir(parents=True)
        shutil.copy(tables, folder / 'mlflow.db')
        with sqlite3.connect(folder / 'mlflow.db') as con:
            con.execute("update experiments set name = ? where name = 'another'", [name])
        con.close()
    for name in names:
        registry = Registry(tmp_path / name / 'registry', name='late')
        assert registry.file == tmp_path / name / 'registry' / 'mlflow.db'
        found = {each.name for each in registry.call('search_experiments')}
        assert found == {'Default', 'made once', name}
        artifacts = (registry.folder / 'artifacts').as_uri()
        experiment = registry.call('create_experiment', 'here', artifact_location=artifacts)
        run = registry.call('create_run', experiment)
        registry.call('log_text', run.info.run_id, 'text', 'card.md')
        assert [path.read_text() for path in registry.folder.rglob('card.md')] == ['text']
        assert registry.call('list_artifacts', run.info.run_id)[0].path == 'card.md'
        assert registry.call('create_registered_model', 'late').name == 'late'
    assert entries(tmp_path) == sorted(names)


TEXT = st.text(st.sampled_from('ab%?#[]*\'"{}!^-=&+;:. ü20'), min_size=1, max_size=12)


@MANY
@given(TEXT)
def test_the_address_of_an_sqlite_file_is_read_back_as_the_file(name):
    from sqlalchemy.engine import make_url

    path = f'/runs/{name}/mlflow.db'
    url = make_url(sqlite_uri(path))
    assert (url.database, dict(url.query)) == (os.path.abspath(path), {})


@pytest.fixture(scope='module')
def parquet():
    "One row that says which file it is"
    buffer = io.BytesIO()
    pl.DataFrame({'x': [1]}).write_parquet(buffer)
    return buffer.getvalue()


@MANY
@given(TEXT)
def test_the_name_of_a_parquet_file_fits_itself_and_nothing_else(tmp_path_factory, parquet, name):
    if name.strip('.') == '':
        return
    folder = tmp_path_factory.mktemp('files')
    for each in (name, 'a', 'b', 'ab', 'a%b', name.replace('*', 'a').replace('?', 'b')):
        (folder / each).mkdir(exist_ok=True)
        (folder / each / 'rows.parquet').write_bytes(parquet)
    with connect_duckdb() as con:
        query = f'select * from {parquet_query([folder / name / "rows.parquet"])}'
        found = con.execute(query)
        columns = [column[0] for column in found.description]
        rows = found.fetchall()
    shutil.rmtree(folder)
    assert (columns, rows) == (['x'], [(1,)])


@pytest.mark.parametrize('address', REMOTE)
@pytest.mark.parametrize(
    'store',
    [
        LocalLog,
        LmdbStore,
        partial(Lake, schema=FLIGHT_SCHEMA),
        partial(Registry, name='late'),
        connect_duckdb,
    ],
)
def test_the_address_of_another_machine_is_no_file(address, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MlrefError, match='as a file of this machine, got'):
        store(address)
    assert entries(tmp_path) == []


def test_snapshots_are_not_published_to_another_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lake = Lake(tmp_path / 'l.duckdb', FLIGHT_SCHEMA)
    with pytest.raises(MlrefError, match='as a file of this machine'):
        publish_snapshot(lake, 's3://bucket/shots')
    lake.close()
    assert not (tmp_path / 's3:').exists()


@pytest.mark.parametrize('path', ['', 'a\0b'])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(MlrefError, match='as a file of this machine'):
        local_file(path, 'a log')


@pytest.mark.parametrize('path', ['run:1', '2013-02-12T08:00', 'c:', ':memory:', './md:x', '~x'])
def test_a_colon_alone_makes_no_address(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_file(path, 'a log') == tmp_path / path


def test_duckdb_loads_nothing_by_itself(tmp_path):
    with connect_duckdb(tmp_path / 'l.duckdb') as con:
        for setting in ('autoinstall_known_extensions', 'autoload_known_extensions'):
            assert con.execute(f"select current_setting('{setting}')").fetchone() == (False,)


def test_events_come_back_from_a_lake_under_an_odd_name(tmp_path):
    folder = tmp_path / "50% [it's] #ü *"
    events = pl.DataFrame(schema=dict(FLIGHT_SCHEMA.columns))
    log = LocalLog(folder / 'log')
    assert log.append('t', encode_events(events, FLIGHT_SCHEMA)) == 0
    lake = Lake(folder / 'l.duckdb', FLIGHT_SCHEMA)
    assert ingest(lake, log, 't', ()).messages == 0
    assert publish_snapshot(lake, folder / 's').exists()
    assert open_snapshot(folder / 's').events(FLIGHT_SCHEMA).height == 0
    lake.close()
    log.close()


def _replace(file):
    other = file.with_name('other')
    other.write_text('other')
    other.rename(file)


def _link_elsewhere(file):
    folder = file.parent
    shutil.copytree(folder, folder.with_name('copy'))
    shutil.rmtree(folder)
    folder.symlink_to(folder.with_name('copy'))


LEAVES = {  # how the path of an open file comes to lead elsewhere
    'deleted': lambda file: file.unlink(),
    'replaced': _replace,
    'moved': lambda file: file.rename(file.with_name('moved')),
    'folder deleted': lambda file: shutil.rmtree(file.parent),
    'folder moved': lambda file: file.parent.rename(file.parent.with_name('moved')),
    'folder replaced by a link': _link_elsewhere,
    'folder above moved': lambda file: file.parents[1].rename(file.parents[1].with_suffix('.old')),
    'target of a link replaced': lambda file: _replace(file.resolve()),
}


def _open_place(home, how):
    file = home / how / 'run' / 'data'
    file.parent.mkdir(parents=True)
    if 'link' in how and 'target' in how:
        (home / how / 'target').write_text('first')
        file.symlink_to(home / how / 'target')
    else:
        file.write_text('first')
    return file, note_place(file)


def test_a_path_that_leads_elsewhere_is_seen_also_when_only_its_folder_was_asked(tmp_path):
    opened = {how: _open_place(tmp_path, how) for how in (*LEAVES, 'stays', 'another came')}
    for _, place in opened.values():
        check_place(place, 'it')
    assert not any(place.mark for _, place in opened.values())  # too new to tell times apart
    time.sleep(2.1)
    for _, place in opened.values():
        check_place(place, 'it')
    assert {how for how in opened if not opened[how][1].mark} == {'target of a link replaced'}
    (opened['another came'][0].parent / 'another').touch()
    for how, leave in LEAVES.items():
        file, place = opened[how]
        leave(file)
        for _ in range(2):
            with pytest.raises(MlrefError, match='while it was in use'):
                check_place(place, 'it')
    for how in ('stays', 'another came'):
        check_place(opened[how][1], 'it')
