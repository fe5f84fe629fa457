"""The steps of the pipeline with another task: nothing in them is about flights"""

import json
import os
from pathlib import Path

import pytest
from papermill import inspect_notebook

from mlref.pipeline import PipelineRun, changed_parameters, execute_run, read_parameters
from mlref.report import write_report
from test_second_task import in_two_files

STEPS = Path(__file__).parent.parent / 'nbs' / 'steps'
ADDRESS = 'replayed:SHOP'
SOURCE = """
from dataclasses import replace
from shop import SHOP, events

SHOP = replace(SHOP, source=lambda: events)
"""
BEGIN = '1997-09-01T00:00'


def given_to_steps() -> dict[str, dict[str, object]]:
    "Two days of the shop, with the server of the first"
    told = {'task': ADDRESS, 'kind': 'gbm', 'engines': ''}
    live = {'start': BEGIN, 'end': '1997-09-03T00:00', 'served': '1997-09-02T00:00'}
    return {
        'prepare': {'task': ADDRESS, 'until': BEGIN},
        'train': {**told, 'until': BEGIN},
        'live': {**told, **live},
        'monitor': {'task': ADDRESS},
        'report': {'task': ADDRESS, 'profile': 'shop'},
    }


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shop')
    in_two_files(folder)
    (folder / 'replayed.py').write_text(SOURCE)
    places = (folder / 'data', folder / 'reports')
    run = PipelineRun(STEPS, *places, 'shop', 'shop', given_to_steps())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', f'{folder}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
        patch.syspath_prepend(str(folder))
        execute_run(run)
        write_report(run)
    return run


def test_every_invariant_holds(shop):
    rows = json.loads((shop.report_folder / 'results' / 'shop.json').read_text())['rows']
    assert [row['name'] for row in rows if row['held'] is False] == []
    measured = {row['name']: row['ours'] for row in rows}
    assert measured['days lived'] == 2
    over_http = measured['visits scored over HTTP, taken from the log of the server']
    assert 0 < over_http < measured['visits scored']


def test_the_report_speaks_of_the_task(shop):
    text = (shop.report_folder / 'report.html').read_text()
    assert 'The probability that a visit buys again within 60 days' in text
    assert 'visits scored' in text and 'the first model' in text
    for word in ('flight', 'airport', 'carrier', 'departure'):
        assert word not in text.lower()


def test_what_was_changed_is_in_the_record_and_on_top_of_the_report(shop):
    changed = changed_parameters(shop)
    assert changed['live.kind'] == 'gbm' and changed['live.start'] == BEGIN
    assert 'live.block' not in changed and 'prepare.home' not in changed
    assert json.loads((shop.folder / 'run.json').read_text())['changed'] == changed
    text = (shop.report_folder / 'report.html').read_text()
    line = text[text.index('Changed for this run') :].split('<')[0]
    assert 'live.kind = gbm' in line and line.endswith('Threads of a library: 1.')
    assert text.index('Changed for this run') < text.index('Decisions')


@pytest.mark.parametrize('path', sorted(STEPS.glob('*.ipynb')), ids=lambda path: path.stem)
def test_papermill_reads_every_parameter(path, caplog):
    found = inspect_notebook(str(path))
    assert found.keys() == read_parameters(path).keys()
    assert not caplog.records  # 'Unable to parse line 21' is what a person would see of it
