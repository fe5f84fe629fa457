"""What a person edits is read exactly, or refused in one sentence that names the file

A name given twice, NaN, a number no float carries, a wrong type, text behind the end, half a file:
tried on every file that a person may open in an editor, and on the rows of the promotion log.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlref.access import AccessKey, make_key, read_keys, write_keys
from mlref.alarms import AlarmRule, Baseline, ControlLimit, Cusum, encode_rules
from mlref.approval import Approval, decode_approval, encode_approval
from mlref.arguments import MlrefError
from mlref.core import DAY, write_json
from mlref.edges import LIBRARIES, parse_json, read_json_object
from mlref.engines import find_address
from mlref.pipeline import (
    PipelineRun,
    check_parameters,
    load_run,
    read_profile,
    save_run,
    set_parameters,
)
from mlref.policy import RetrainPolicy
from mlref.rollout import (
    RolloutDecision,
    RolloutPolicy,
    RolloutStep,
    apply_decision,
    decode_rollout,
    encode_rollout,
    start_rollout,
)
from mlref.serving_state import ServingState, prediction_logs, publish_state, read_state
from mlref.watch import read_rules

RULE = AlarmRule('low', 'realized_auc', 'falls', Baseline(0.7, 0.01, 90), Cusum())
APRIL = 22_744_800  # minute UTC of 2013-04-01T00:00
DECLARED = 'rows: int = 3\nshare: float = 0.5\n'


def write_step(folder: Path, declared: str = DECLARED) -> None:
    cell = {
        'cell_type': 'code',
        'metadata': {'tags': ['parameters']},
        'source': declared,
    }
    notebook = {'cells': [cell], 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}
    write_json(folder / 'count.ipynb', notebook)


def read_run(file: Path) -> Any:
    return load_run(file.parents[3] / 'steps', file.parents[2], file.parents[2], 'one')


def write_run(folder: Path) -> Path:
    steps = folder / 'steps'
    write_step(steps)
    run = PipelineRun(steps, folder / 'data', folder / 'data', 'one', 'all', {'count': {'rows': 5}})
    return save_run(run)


def write_profile(folder: Path) -> Path:
    write_step(folder)
    return write_json(folder / 'profiles.json', {'all': {'steps': {'count': {'rows': 5}}}})


def write_rules(folder: Path) -> Path:
    return write_json(folder / 'rules.json', {'policies': {'all': encode_rules([RULE])}})


def write_access(folder: Path) -> Path:
    write_keys(folder / 'keys.json', [make_key('gate', ('predict',), 9.5)[1]])
    return folder / 'keys.json'


def write_state(folder: Path) -> Path:
    publish_state(folder, lambda state: ServingState(champion='aa'))
    return folder / 'state.json'


FILES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    'a run': (write_run, read_run),
    'profiles': (write_profile, lambda file: read_profile(file.parent, 'all', seed=1)),
    'alarm rules': (write_rules, lambda file: read_rules(file, 'all', ())),
    'keys': (write_access, read_keys),
    'state': (write_state, lambda file: read_state(file.parent)),
}


def twice(text: str) -> str:
    "The last name of the outermost object, or of the first in a list, once more"
    place = text.rindex('}')
    name = [*(json.loads(text)[0] if text.lstrip().startswith('[') else json.loads(text))][-1]
    return f'{text[:place].rstrip()}, "{name}": 1{text[place:]}'


SPOILT = {
    'a name twice': twice,
    'NaN': lambda text: text.rstrip()[:-1] + (', NaN]' if text.startswith('[') else ', "x": NaN}'),
    'no float': lambda text: (
        text.rstrip()[:-1] + (', 1e999]' if text.startswith('[') else ', "x": 1e999}')
    ),
    'many digits': lambda text: (
        text.rstrip()[:-1]
        + (f', {"9" * 5000}]' if text.startswith('[') else f', "x": {"9" * 5000}}}')
    ),
    'half a character': lambda text: (
        text.rstrip()[:-1] + (r', "\ud800"]' if text.startswith('[') else r', "x": "\ud800"}')
    ),
    'text behind the end': lambda text: text + '{}',
    'half of it': lambda text: text[: len(text) // 2],
    'nothing': lambda text: '',
    'a number': lambda text: '7',
    'a text': lambda text: '"text"',
    'a deep list': lambda text: '[' * 100_000,
    'a list of a number': lambda text: '[7]',
    'another object': lambda text: '{"x": 1}',
    'values of another type': lambda text: json.dumps(
        json.loads(text, object_hook=lambda found: dict.fromkeys(found, [1]))
    ),
}


@pytest.mark.parametrize('spoil', SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize('kind', FILES)
def test_a_spoilt_file_is_one_sentence_with_its_name(kind, spoil, tmp_path):
    write, read = FILES[kind]
    file = write(tmp_path)
    read(file)
    file.write_text(spoil(file.read_text()))
    with pytest.raises(MlrefError, match='^expected ') as error:
        read(file)
    said = str(error.value)
    assert ('run one' if kind == 'a run' else file.name) in said and '; ' in said
    assert '\n' not in said and len(said) < 800


RULES = {
    'two of one name': ([RULE, RULE], "'low' twice"),
    'a measure that nobody takes': (
        [AlarmRule('low', 'realised_auc', 'falls', RULE.baseline, Cusum())],
        'realised_auc of no feature',
    ),
    'a feature of a measure without any': (
        [AlarmRule('low', 'realized_auc', 'falls', RULE.baseline, Cusum(), feature='wind')],
        'realized_auc of wind',
    ),
    'a missing share of nothing': (
        [AlarmRule('low', 'missing_share', 'rises', RULE.baseline, ControlLimit())],
        'missing_share of no feature',
    ),
}


@pytest.mark.parametrize(('rules', 'words'), RULES.values(), ids=RULES)
def test_a_rule_that_never_could_ring_is_refused_when_it_is_read(rules, words, tmp_path):
    file = write_json(tmp_path / 'rules.json', {'policies': {'all': encode_rules(rules)}})
    with pytest.raises(MlrefError, match='^expected ') as error:
        read_rules(file, 'all', ('wind',))
    assert words in str(error.value)


@pytest.mark.parametrize(
    'changed',
    [
        {'detector': {'kind': 'cusum', 'slack': 1.0, 'cut': 1.0}},
        {'detector': {'kind': 'cusum', 'limit': 1e400}},
        {'detector': {'kind': 'evidence', 'stakes': []}},
        {'detector': {'kind': 'evidence', 'stakes': 'abc'}},
        {'detector': {'kind': ['cusum']}},
        {'detector': []},
        {'baseline': {'mean': 1e400, 'spread': 0.1, 'days': 9}},
        {'baseline': {'mean': 0.7, 'spread': 0.1}},
        {'name': ''},
        {'name': 7},
        {'window': True},
        {'side': 'down'},
    ],
    ids=repr,
)
def test_a_rule_of_other_values_is_refused(changed, tmp_path):
    row = encode_rules([RULE])[0] | changed
    file = tmp_path / 'rules.json'
    file.write_text(json.dumps({'policies': {'all': [row]}}).replace('Infinity', '1e400'))
    with pytest.raises(MlrefError, match='^expected '):
        read_rules(file, 'all', ())


@pytest.mark.parametrize(
    'changed',
    [
        {'scopes': 'predict'},
        {'scopes': ['everything']},
        {'scopes': []},
        {'rows': '5'},
        {'rows': 0},
        {'rows': True},
        {'client': ''},
        {'created': '2013'},
        {'sha256': 7},
        {'colour': 'red'},
    ],
    ids=repr,
)
def test_a_key_of_other_values_is_refused(changed, tmp_path):
    file = write_access(tmp_path)
    row = json.loads(file.read_text())[0]
    file.write_text(json.dumps([row | changed]))
    with pytest.raises(MlrefError, match=r'keys\.json, found something else'):
        read_keys(file)


def test_of_two_keys_of_one_id_none_counts(tmp_path):
    file = write_access(tmp_path)
    rows = json.loads(file.read_text())
    file.write_text(json.dumps(rows * 2))
    with pytest.raises(MlrefError, match='found something else'):
        read_keys(file)


@pytest.mark.parametrize('rows', [float('nan'), float('inf'), 0, -1, True, '5'])
def test_a_limit_that_is_none_makes_no_key(rows):
    with pytest.raises(MlrefError, match='rows'):
        make_key('gate', ('predict',), rows)
    assert isinstance(make_key('gate', ('predict',), 5)[1], AccessKey)


# Rows of the promotion log

ROWS = {
    'an approval': (encode_approval(Approval('2', '1', APRIL, 14)), decode_approval),
    'a rollout': (encode_rollout(start_rollout('2', '1', APRIL)), decode_rollout),
}


@pytest.mark.parametrize('spoil', SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize('kind', ROWS)
def test_a_spoilt_row_of_the_log_is_one_sentence(kind, spoil):
    text, read = ROWS[kind]
    read(text)
    with pytest.raises(MlrefError, match='^expected ') as error:
        read(spoil(text))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    'time', [APRIL * 60, APRIL * 60_000, -1, 1.5, True, '2013-04-01', float('nan')]
)
def test_a_question_or_a_rollout_has_no_time_of_another_unit(time):
    for act in (
        lambda: Approval('2', '1', time, 14),
        lambda: start_rollout('2', '1', time),
        lambda: apply_decision(start_rollout('2', '1', APRIL), RolloutDecision('hold', ''), time),
    ):
        with pytest.raises(MlrefError, match='^expected '):
            act()


@pytest.mark.parametrize(
    'act',
    [
        lambda: RolloutStep(0.5, requests=10**30),
        lambda: RolloutStep(0.5, minutes=10**30),
        lambda: RolloutPolicy(margin=float('inf')),
        lambda: RolloutPolicy(spread=float('inf')),
        lambda: RolloutPolicy(max_days=10**30),
        lambda: Approval('2', '1', APRIL, days=10**30),
        lambda: RetrainPolicy(approval_days=10**30),
        lambda: RetrainPolicy(block=10**30),
        lambda: RetrainPolicy(seed=2**63),
    ],
)
def test_a_plan_that_never_ends_is_refused_when_it_is_made(act):
    with pytest.raises(MlrefError, match=' to '):
        act()


def test_a_step_that_began_later_is_not_decided_on_before():
    begun = start_rollout('2', '1', APRIL)
    with pytest.raises(MlrefError, match='which clock is right'):
        apply_decision(begun, RolloutDecision('promote', 'good'), APRIL - 1)
    assert apply_decision(begun, RolloutDecision('advance', ''), APRIL + DAY).since == APRIL + DAY


# Parameters of steps


@pytest.mark.parametrize(
    'text',
    ['rows=1e999', 'share=1e999', 'rows=' + '9' * 5000, f'rows={2**63}', 'share=nan', 'rows=True']
    + ['rows=' + '(' * 5000, 'rows=' + '-' * 100_000 + '1', 'rows=[1]'],
    ids=lambda text: text[:20],
)
def test_a_parameter_that_is_no_number_is_refused_before_a_step_runs(text, tmp_path):
    write_step(tmp_path)
    given = set_parameters({'count': {}}, [f'count.{text}'])
    with pytest.raises(MlrefError, match=r'expected count\.') as error:
        check_parameters(tmp_path / 'count.ipynb', given['count'])
    assert len(str(error.value)) < 300


@pytest.mark.parametrize('line', ['rows = 3', 'rows: int', 'rows += 1', 'import os', "'three'"])
def test_a_line_that_declares_no_parameter_is_refused_before_a_step_runs(line, tmp_path):
    write_step(tmp_path, f'share: float = 0.5\n{line}\n')
    with pytest.raises(MlrefError, match='expected lines such as .* got .*; give it a type'):
        check_parameters(tmp_path / 'count.ipynb', {'share': 0.25})


@pytest.mark.parametrize('threads', [0, -1, '2', 1.5, None, 10**9])
def test_a_record_with_odd_threads_is_refused(threads, tmp_path):
    file = write_run(tmp_path)
    write_json(file, json.loads(file.read_text()) | {'threads': threads})
    with pytest.raises(MlrefError, match='threads'):
        read_run(file)


# settings.ini


@pytest.mark.parametrize(
    'text',
    [
        '[mlref]\nonline = redis://cache:6379\n',
        '[DEFAULT]\nlog = kafka://a:1\n[mlref]\nonline = redis://cache:6379\n',
        '[DEFAULT]\nonline = redis://a:1\n[mlref]\nonline = redis://cache:6379\n',
        '[DEFAULT]\nonline = redis://a:1\nonline = redis://b:1\n',
        'online = redis://a:1\n',
        '[DEFAULT]\nonline: redis://a:1\n',
        '[DEFAULT\n',
    ],
)
def test_a_line_that_nobody_would_read_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.delenv('MLREF_ONLINE', raising=False)
    (tmp_path / 'settings.ini').write_text(text)
    with pytest.raises(MlrefError, match=r'settings\.ini'):
        find_address('online', tmp_path)


def test_lines_of_others_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.delenv('MLREF_LOG', raising=False)
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nversion = 1\n[tool]\nlog = debug\n')
    assert find_address('log', tmp_path) == ''


# Shared


def test_a_file_with_a_mark_of_its_encoding_is_read(tmp_path):
    for encoding in ('utf-8', 'utf-8-sig', 'utf-16', 'utf-32'):
        (tmp_path / 'x.json').write_text('{"a": "ä"}', encoding=encoding)
        assert read_json_object(tmp_path / 'x.json', 'a record', 'x') == {'a': 'ä'}
    assert parse_json('[1e308, -0.0, 5e-324]', 'numbers', 'x') == [1e308, 0.0, 5e-324]


def test_a_folder_that_is_no_workers_is_named(tmp_path):
    for name in ('0', '12', 'backup'):
        (tmp_path / 'logs' / name).mkdir(parents=True)
        (tmp_path / 'logs' / name / 'data.mdb').touch()
    with pytest.raises(MlrefError, match="found 'backup'"):
        prediction_logs(tmp_path)


def test_the_libraries_of_the_extras_are_known_to_the_command_line():
    assert {'redis', 'cimpl', 'ray', 'opentelemetry', 'psutil', 'msgspec'} <= set(LIBRARIES)
