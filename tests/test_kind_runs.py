"""Runs: what is resumed, under which code, and what a broken disk, record or kernel says"""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from mlref import cli
from mlref.checked_files import read_checked_json
from mlref.core import MlrefError, write_json
from mlref.pipeline import (
    THREADS,
    Layout,
    PipelineRun,
    StepFailed,
    check_run_id,
    current_run,
    execute_run,
    load_run,
    read_profile,
    run_step,
    save_run,
    set_parameters,
)
from mlref.results import publish_results, render_card, write_results

KERNEL = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}


def write_step(folder: Path, name: str, *code: str, home: str = "home: str = ''") -> Path:
    "A notebook with a cell of parameters and some of code"
    first = new_code_cell(home, metadata={'tags': ['parameters']})
    cells = [first, *map(new_code_cell, code)]
    file = folder / f'{name}.ipynb'
    nbformat.write(new_notebook(cells=cells, metadata={'kernelspec': KERNEL}), file)
    return file


@pytest.fixture
def layout(tmp_path) -> Layout:
    "Two steps and a profile; nothing was run"
    steps = tmp_path / 'nbs' / 'steps'
    steps.mkdir(parents=True)
    (tmp_path / 'settings.ini').touch()
    for name in ('first', 'second'):
        write_step(steps, name, 'print(home)')
    profiles = {'all': {'about': '', 'steps': {'first': {}, 'second': {}}}}
    write_json(steps / 'profiles.json', profiles)
    return Layout(steps, tmp_path / 'data', tmp_path / 'reports')


def make_run(layout: Layout, name: str = 'one') -> PipelineRun:
    "A run that is noted and has done nothing"
    given_to = read_profile(layout.steps, 'all')
    run = PipelineRun(layout.steps, layout.data, layout.reports, name, 'all', given_to)
    save_run(run)
    return run


def load(layout: Layout, name: str, anyway: bool = False) -> PipelineRun:
    return load_run(layout.steps, layout.data, layout.reports, name, anyway)


# A kernel that dies


@pytest.mark.parametrize(
    'code',
    [
        'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)',
        'import ctypes\nctypes.string_at(0)',
    ],
    ids=['killed', 'segfault'],
)
def test_a_kernel_that_dies_names_its_step_and_the_way_on(layout, code):
    write_step(layout.steps, 'second', 'print(1)', code)
    run = make_run(layout)
    run.done['first'] = cli_cost()
    with pytest.raises(StepFailed) as error:
        execute_run(run)
    said = str(error.value)
    assert 'second stopped: its process died' in said and '--resume one' in said
    assert '\n' not in said and (run.report_folder / 'second.ipynb').exists()


def cli_cost():
    from mlref.pipeline import StepCost

    return StepCost(1.0, 1.0)


# What is resumed


def test_a_path_is_no_id_and_what_lies_there_is_not_executed(layout, tmp_path):
    "A record outside, and one inside that names a notebook elsewhere"
    trap = tmp_path / 'trap'
    evil = tmp_path / 'evil'
    evil.mkdir()
    write_step(evil, 'second', f"open({str(trap)!r}, 'w').close()")
    record = read_checked_json(make_run(layout).folder / 'run.json', 'a run', 'start another')
    outside = record | {'id': 'evil', 'steps': ['../../evil/second']}
    outside |= {'given': {'../../evil/second': {}}}
    write_json(evil / 'run.json', outside)
    words = ['run', '--data', str(layout.data), '--reports', str(layout.reports), '--resume']
    for name in ('../../evil', str(evil), '..', '.', '', 'a/../../../evil'):
        with pytest.raises(MlrefError, match='without its path'):
            load(layout, name)
        assert cli.main([*words, name]) == (1 if name else 2)  # an empty word is a wrong line
    write_json(layout.data / 'runs' / 'one' / 'run.json', outside | {'id': 'one'})
    with pytest.raises(MlrefError, match='the steps of mlref'):
        load(layout, 'one')
    (layout.data / 'runs' / 'evil').symlink_to(evil)
    with pytest.raises(MlrefError, match='inside'):
        load(layout, 'evil')
    assert not trap.exists()


@given(st.text(max_size=120))
@settings(max_examples=200, deadline=None)
def test_an_id_is_a_plain_name_of_a_folder(text):
    try:
        assert check_run_id(text) == text
    except MlrefError:
        return
    assert Path(text).name == text and text not in ('.', '..') and not text.startswith('-')


def test_a_record_that_was_cut_or_altered_is_a_sentence(layout):
    "Cut after every twentieth byte; each value replaced by one of another kind"
    file = make_run(layout).folder / 'run.json'
    whole = file.read_bytes()
    record = json.loads(whole)
    cut = [whole[:size] for size in range(0, len(whole) - 2, 20)]
    odd = (None, 7, 'x', [], {}, [None], {'first': 7}, ['first', 3])
    altered = [json.dumps(record | {key: value}).encode() for key in record for value in odd]
    missing = [json.dumps({k: v for k, v in record.items() if k != key}).encode() for key in record]
    refused = 0
    for data in (*cut, *altered, *missing, b'\xff\xfe', b'[' * 100_000):
        file.write_bytes(data)
        try:
            load(layout, 'one')
        except MlrefError as error:
            assert '\n' not in str(error)
            refused += 1
    assert refused > len(cut) + 2 * len(record)
    file.write_bytes(whole)
    assert load(layout, 'one').id == 'one'


# Under which code


def test_other_code_is_refused_or_noted(layout, tmp_path, monkeypatch):
    "Of a step, and of the module of a task"
    make_run(layout)
    assert len(load(layout, 'one').code) == 1
    write_step(layout.steps, 'second', 'print(home, home)')
    with pytest.raises(MlrefError, match='--anyway'):
        load(layout, 'one')
    run = load(layout, 'one', anyway=True)
    save_run(run)
    assert len(load(layout, 'one').code) == 2
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'shop_of_runs.py').write_text('SHOP = 1\n')
    run.given['first']['task'] = 'shop_of_runs:SHOP'
    run.code.clear()
    save_run(run)
    load(layout, 'one')
    (tmp_path / 'shop_of_runs.py').write_text('SHOP = 2\n')
    with pytest.raises(MlrefError, match='--anyway'):
        load(layout, 'one')


def test_the_commits_of_outputs_and_of_ids_of_cells_are_no_code(layout):
    "A step that was executed in place is the same step"
    make_run(layout)
    notebook = nbformat.read(layout.steps / 'first.ipynb', 4)
    notebook.cells[1].outputs = [nbformat.v4.new_output('stream', text='x')]
    nbformat.write(notebook, layout.steps / 'first.ipynb')
    assert len(load(layout, 'one').code) == 1


def test_what_a_resumed_run_would_pass_over_is_refused(layout):
    make_run(layout)
    for more in ({'seed': 3}, {'profile': 'quick'}, {'quick': True}, {'task': 'shop:SHOP'}):
        wanted = cli.RunSettings(resume='one', **more)
        with pytest.raises(MlrefError, match='leave it out'):
            cli.make_run(wanted, layout, datetime(2026, 1, 2))


# Disks and folders


def test_a_full_disk_names_the_step(tmp_path):
    "/dev/full takes nothing, as a full disk does"
    step = write_step(tmp_path, 'count', 'print(1)')
    with pytest.raises(StepFailed, match='count stopped: .*No space left on device'):
        run_step(step, Path('/dev/full'), {})


FULL = """
import resource, sys
from mlref.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_under_a_run_is_one_sentence(layout, tmp_path):
    words = [sys.executable, '-c', FULL, 'run', '--profile', 'all']
    words += ['--data', str(layout.data), '--reports', str(layout.reports)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={**os.environ})
    assert done.returncode == 1, done.stderr
    assert 'Traceback' not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith('mlref: ') and 'File too large' in last and '--resume' in last


@pytest.mark.parametrize('option', ['--data', '--reports'])
def test_a_folder_that_is_none_is_refused_before_anything_is_made(layout, tmp_path, option, capsys):
    file = tmp_path / 'file'
    file.touch()
    folders = {'--data': str(tmp_path / 'd'), '--reports': str(tmp_path / 'r')}
    for place, said in ((file, 'is a file'), (file / 'runs', 'is a file')):
        words = [word for pair in (folders | {option: str(place)}).items() for word in pair]
        assert cli.main(['run', '--quick', *words]) == 1
        error = capsys.readouterr().err
        assert said in error and f'choose another with {option}' in error
    assert not (tmp_path / 'd').exists() and not (tmp_path / 'r').exists()


def test_a_folder_where_nothing_can_be_made_is_one_sentence(layout, capsys):
    "Where even root cannot write"
    words = ['run', '--quick', '--data', '/proc/nowhere', '--reports', str(layout.reports)]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith('mlref: expected') and len(said.splitlines()) == 1
    assert not layout.reports.exists()


@pytest.mark.parametrize('text', ['', '\n', '../../x', 'gone', '\x00', 'a\nb'])
def test_a_current_run_that_is_none_is_one_sentence(tmp_path, text):
    (tmp_path / 'current').write_text(text)
    with pytest.raises(MlrefError, match='expected'):
        current_run(tmp_path)


def test_the_command_that_is_named_is_the_one_there_is(tmp_path, monkeypatch):
    "./run only for who called it"
    monkeypatch.delenv('MLREF_COMMAND', raising=False)
    with pytest.raises(MlrefError, match='call mlref run first'):
        current_run(tmp_path)
    monkeypatch.setenv('MLREF_COMMAND', './run')
    with pytest.raises(MlrefError, match='call ./run first'):
        current_run(tmp_path)


def test_publish_takes_an_id_and_no_path(capsys):
    assert cli.main(['publish', '../../x']) == 1
    assert 'without its path' in capsys.readouterr().err


# Threads

FIT = """
import torch
from mlref.recipes import fit_recipe
from small import make_table
table = make_table(4000)
model = fit_recipe('torch', table, table)
print('learnt', torch.get_num_threads(), model.version)
"""


def learn(layout, name, threads) -> tuple[str, str]:
    "Threads and version of a network that a step has fitted"
    out = layout.reports / f'{name}.ipynb'
    run_step(layout.steps / 'fit.ipynb', out, {}, threads=threads)
    text = ''.join(
        output.get('text', '')
        for cell in nbformat.read(out, 4).cells
        for output in cell.get('outputs', ())
    )
    _, n, version = next(line for line in text.splitlines() if line.startswith('learnt')).split()
    return n, version


def test_a_step_learns_the_same_whatever_the_shell_says_of_threads(layout, monkeypatch):
    write_step(layout.steps, 'fit', FIT)
    tests = str(Path(__file__).parent)
    monkeypatch.setenv('PYTHONPATH', f'{tests}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
    found = []
    for asked in ('1', '2'):
        for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
            monkeypatch.setenv(name, asked)
        found.append(learn(layout, asked, THREADS))
        assert os.environ['OMP_NUM_THREADS'] == asked
    assert found[0] == found[1] and found[0][0] == str(THREADS)
    assert learn(layout, 'other', 2)[0] == '2'  # and the test can fail


def test_a_run_goes_on_with_the_threads_that_it_began_with(layout):
    run = make_run(layout)
    run.threads = 3
    save_run(run)
    assert json.loads((run.folder / 'run.json').read_text())['threads'] == 3
    write_step(layout.steps, 'second', 'import os\nassert os.environ["OMP_NUM_THREADS"] == "3"')
    execute_run(load(layout, 'one', anyway=True))
    assert load(layout, 'one').done.keys() == {'first', 'second'}


def test_what_was_changed_for_a_run_is_noted(layout):
    write_step(layout.steps, 'second', 'print(n)', home="home: str = ''\nn: int = 3\nseed: int = 0")
    given_to = set_parameters(read_profile(layout.steps, 'all', seed=7), ['second.n=4'])
    run = PipelineRun(layout.steps, layout.data, layout.reports, 'two', 'all', given_to)
    save_run(run)
    noted = json.loads((run.folder / 'run.json').read_text())
    assert noted['changed'] == {'second.n': 4, 'second.seed': 7}
    plain = make_run(layout)
    assert json.loads((plain.folder / 'run.json').read_text())['changed'] == {}


ROW = {'name': 'a', 'ours': 1.0, 'unit': 's', 'goal': '', 'held': None, 'n': 1}
SPOILT = {
    'empty': '',
    'cut': '{"bench": "year", "rows": [',
    'a list': '[]',
    'without rows': lambda found: found.pop('rows'),
    'without a machine': lambda found: found.pop('machine'),
    'without a reason': lambda found: found['not_run'].append({'name': 'x'}),
    'rows of another kind': lambda found: found.update(rows=[7]),
    'of another': lambda found: found.update(bench='../../x'),
    'a number as text': lambda found: found['rows'][0].update(ours='1'),
    'a number that is true': lambda found: found['rows'][0].update(ours=True),
    'half an interval': lambda found: found['rows'][0].update(low=0.5),
    'a goal that is none': lambda found: found['rows'][0].update(goal='many'),
    'a text that is none': lambda found: found['rows'][0].update(name=None),
}


@pytest.mark.parametrize('how', SPOILT)
def test_a_result_that_is_none_is_refused_before_it_is_published(how, tmp_path):
    reports = tmp_path / 'reports'
    write_results(tmp_path / 'good', 'year', 'mlref run', [ROW])
    publish_results(tmp_path / 'good', reports)
    before = {file: file.read_bytes() for file in reports.rglob('*') if file.is_file()}
    file = write_results(tmp_path / 'run', 'year', 'mlref run', [dict(ROW)])
    spoil = SPOILT[how]
    if isinstance(spoil, str):
        file.write_text(spoil)
    else:
        found = json.loads(file.read_text())
        spoil(found)
        file.write_text(json.dumps(found))
    for act in (
        lambda: publish_results(tmp_path / 'run', reports),
        lambda: render_card(file.parent),
    ):
        with pytest.raises(
            MlrefError, match='measure it again, or delete the file|expected a goal'
        ):
            act()
    assert {file: file.read_bytes() for file in reports.rglob('*') if file.is_file()} == before


def test_a_record_that_is_no_file_is_not_waited_for(tmp_path):
    (tmp_path / 'runs' / 'one').mkdir(parents=True)
    os.mkfifo(tmp_path / 'runs' / 'one' / 'run.json')
    with pytest.raises(MlrefError, match='expected a run one in'):
        load_run(tmp_path, tmp_path, tmp_path, 'one')
