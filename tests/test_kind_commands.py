"""What a shell hands over: odd names, numbers and empty words give one sentence at every command

The commands are read off the application, so that a new one is tried too. None may leave a file
where nobody asked for one.
"""

import inspect
import io
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import typer

from mlref import cli
from mlref.arguments import MlrefError
from mlref.cli_models import Reason
from mlref.cli_rollout import RolloutPlace
from mlref.cli_serving import ServeSettings, serve_options
from mlref.core import parse_time, wall_clock
from mlref.edges import LIBRARIES
from mlref.log import LocalLog
from mlref.registry import Registry
from mlref.terminal import COMMAND_NAMES, CommandResult, check_option, print_result, run_cli
from small import TASK

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {'docs': 'nbs/_site/build.py', 'test': 'tests/suite.py', 'check': 'tests/check.py'}
TEXTS = ('/', '../x', "a'b", 'a%20b', 'a?b#c', 'ä€𝄞', 'nan', '-1', '01', '١', '²', '*', 'a\nb')
TEXTS += ('$(x)', '\udcff', 'x' * 5000)
PATHS = ('s3://bucket/x', 'redis://h/0', 'md:x', 'file/x', '/dev/null')
NUMBERS = ('nan', 'inf', '-inf', '1e400', '9' * 30, '9' * 5000, '²', 'x', '-1', '0')
GIVEN = {
    'version': '7',
    'first': '7',
    'second': '7',
    'view': 'week',
    'feature': 'week_count',
    'entity': 'v1',
    'parts': '1',
    'name': 'gate',
    'run': 'one',
    'key': 'x',
    'server': 'a:1',
    'why': 'so',
    'who': 'me',
    'at': '2013-04-01',
}


@dataclass(frozen=True)
class Word:
    "One parameter of a command"

    name: str
    option: str  # '' = an argument
    kind: str  # 'number', 'path', 'text' or 'flag'
    required: bool


def describe(name: str, parameter: inspect.Parameter) -> Word:
    about = parameter.annotation.__metadata__
    kind = str(parameter.annotation.__origin__)
    said = [text for each in about for text in getattr(each, 'param_decls', None) or ()]
    is_argument = any(type(each).__name__ == 'ArgumentInfo' for each in about)
    option = '' if is_argument else (said or [f'--{name.replace("_", "-")}'])[0]
    named = {'bool': 'flag', 'float': 'number', 'int': 'number', 'Path': 'path'}
    found = [word for part, word in named.items() if part in kind]
    return Word(name, option, (found or ['text'])[0], parameter.default is parameter.empty)


def list_commands(app: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple]:
    for each in app.registered_commands:
        words = inspect.signature(each.callback).parameters.items()
        yield (*path, each.name), [describe(name, parameter) for name, parameter in words]
    for group in app.registered_groups:
        name = (group.name,) if isinstance(group.name, str) else ()
        yield from list_commands(group.typer_instance, (*path, *name))


COMMANDS = dict(list_commands(cli.app))
# What they do with right words takes longer, or never ends; their own tests try their words
LONG = ('run', 'bench', 'serve', 'load', 'doctor')
TRIED = {path: words for path, words in COMMANDS.items() if path[0] not in LONG}


def compose(path: tuple[str, ...], words: list[Word], folder: Path, odd: str, value: str) -> list:
    "A command whose words are right, but one"
    usual = GIVEN | {'data': str(folder), 'lake': str(folder / 'x'), 'folder': str(folder / 'new')}
    line = [*path]
    for word in words:
        wanted = word.required or word.name in ('data', 'why', 'who', 'at')
        text = value if word.name == odd else usual.get(word.name) if wanted else None
        if word.name == 'task' and odd != 'task':
            text = 'small:TASK'
        if text is not None and word.kind != 'flag':
            line += [f'{word.option}={text}'] if word.option else ['--', text]
    arguments = [text for place, text in enumerate(line) if line[place - 1] == '--']
    options = [text for place, text in enumerate(line) if '--' not in (text, line[place - 1])]
    return [*options, '--', *arguments] if arguments else options


@pytest.fixture(scope='module', autouse=True)
def built_once():
    "The commands are made of their functions once, not at each of two thousand calls"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, 'get_command', cache(typer.main.get_command))
        yield


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'file').touch()
    return tmp_path / 'data'


@pytest.mark.parametrize('path', TRIED, ids=' '.join)
def test_odd_words_are_answered_by_a_sentence_or_taken_as_they_are(path, folder, capsys):
    for word in TRIED[path]:
        values = {'number': NUMBERS, 'text': TEXTS, 'path': PATHS}.get(word.kind, ())
        for value in values:
            line = compose(path, TRIED[path], folder, word.name, value)
            status = run_cli(cli.app, line)  # a fault of ours would be raised
            said = capsys.readouterr().err
            assert status in (0, 1, 2), (line, status)
            assert 'Traceback' not in said and len(said) < 2500, (line, said)
            refused = word.kind == 'number' and value in ('nan', 'inf', '1e400', '9' * 30)
            refused |= word.kind == 'path' and value in PATHS[:3]
            assert status or not refused, line
            assert status or '\udcff' not in value or word.kind == 'path', line
            assert 'operating system' not in said, (line, said)
    assert not [each for each in folder.parent.iterdir() if ':' in each.name]


@pytest.mark.parametrize('path', TRIED, ids=' '.join)
def test_an_empty_word_is_refused_and_makes_nothing(path, folder, capsys):
    for word in TRIED[path]:
        if word.kind != 'flag':
            line = compose(path, TRIED[path], folder, word.name, '')
            assert run_cli(cli.app, line) == 2, line
            assert 'got an empty one' in capsys.readouterr().err
    assert sorted(each.name for each in folder.parent.rglob('*')) == ['data', 'file']


@pytest.mark.parametrize('option', ['--folder', '--home'])
@pytest.mark.parametrize('command', ['models list', 'models show 1', 'rollout status'])
def test_a_look_at_a_registry_makes_none(command, option, folder, capsys):
    status = run_cli(cli.app, [*command.split(), option, str(folder), '--task', 'small:TASK'])
    assert (status, list(folder.rglob('*'))) == (1, [])
    assert 'expected a registry at' in capsys.readouterr().err


def test_a_store_is_not_made_among_the_files_of_others(folder, capsys):
    (folder / 'notes.txt').touch()
    line = ['features', 'reshard', '2', '--store']
    assert run_cli(cli.app, [*line, str(folder)]) == 1
    assert [each.name for each in folder.iterdir()] == ['notes.txt']
    assert run_cli(cli.app, [*line, str(folder / 'store')]) == 0
    assert run_cli(cli.app, [*line, str(folder / 'store')]) == 0


def test_a_time_that_has_not_come_and_a_server_that_is_not_there_are_refused(folder):
    registry = Registry(folder / 'registry', name=TASK.name)
    assert RolloutPlace(at='2013-04-01').now() == parse_time('2013-04-01')
    assert abs(RolloutPlace().now() - wall_clock()) <= 1
    for at in ('2099-01-01', '9999-01-01', '0001-01-01', 'tomorrow', '2013-04-01T00:00:00 '):
        with pytest.raises(MlrefError, match='^expected '):
            RolloutPlace(at=at).now()
    with pytest.raises(MlrefError, match='expected the folder of a server'):
        RolloutPlace(served=folder / 'servd').server_folder(registry)
    assert RolloutPlace().server_folder(registry) == folder / 'served'


def test_who_has_no_login_is_asked_for_a_name(monkeypatch):
    def nobody():
        raise KeyError('getpwuid(): uid not found: 4711')

    monkeypatch.setattr('getpass.getuser', nobody)
    with pytest.raises(MlrefError, match='say who decides with --who'):
        Reason(why='so').require('promotion')
    assert Reason(why='so', who='ann').require('promotion') == ('so', 'ann')
    with pytest.raises(MlrefError, match='got none; say why'):
        Reason(why=' \t').require('promotion')


def test_umlauts_reach_a_terminal_that_has_none(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(written, 'ascii'))
    print_result(CommandResult(None, 'Zürich \udcff'), False)
    assert written.getvalue() == b'Z\\xfcrich \\udcff\n'


@pytest.mark.parametrize('value', [2**63, -(2**63), float('nan'), float('inf'), '\udcff', ['\0']])
def test_what_nothing_behind_the_command_line_can_keep_is_refused(value):
    with pytest.raises(MlrefError, match='expected x as a'):
        check_option('x', value)


def fail(kind, **_):
    raise kind('no more')


def test_a_library_of_an_engine_speaks_in_one_line(capsys, monkeypatch):
    monkeypatch.delenv('MLREF_TRACEBACK', raising=False)
    for name in ('redis', 'cimpl', 'ray'):
        assert name in LIBRARIES
        foreign = type('Odd', (Exception,), {'__module__': f'{name}.exceptions'})

        assert run_cli(partial(fail, foreign), []) == 1
        assert f'expected {name} to do its part' in capsys.readouterr().err


GROUPS = sorted({path[0] for path in COMMANDS if len(path) > 1})


@pytest.mark.parametrize('group', GROUPS)
def test_a_group_without_a_command_says_what_is_missing(group, capsys):
    assert run_cli(cli.app, [group]) == 2
    said = capsys.readouterr()
    assert said.err.endswith(f'got none; see mlref {group} --help\n')
    assert 'Commands' in said.out


@pytest.mark.parametrize('group', GROUPS)
def test_the_help_of_a_group_ends_with_the_exit_statuses(group, capsys):
    assert run_cli(cli.app, [group, '--help']) == 0
    assert 'Exit status: 0 done' in capsys.readouterr().out


def test_a_seed_a_profile_or_a_change_that_cannot_be_is_refused_and_makes_nothing(folder, capsys):
    places = ['--data', str(folder / 'new'), '--reports', str(folder / 'reports')]
    for status, words, said in (
        (2, ['run', '--quick', '--seed', '-1', *places], "Invalid value for '--seed'"),
        (1, ['run', '--quick', '--profile', 'year', *places], 'got --quick and --profile year;'),
        (1, ['run', '--quick', '--profile', 'quick', *places], 'expected one profile'),
        (1, ['bench', 'serve', '--set', 'foo'], "expected --set NAME=VALUE, got 'foo'"),
        (1, ['bench', 'serve', '--set', 'a=\n'], r"expected --set NAME=VALUE, got 'a=\n'"),
        (1, ['bench', 'serve', '--set', 'a.b=1'], "expected --set NAME=VALUE, got 'a.b=1'"),
    ):
        assert run_cli(cli.app, words) == status
        assert said in capsys.readouterr().err
    assert not [*folder.iterdir()]


@pytest.mark.parametrize('group', GROUPS)
def test_where_commands_are_listed_a_group_is_no_command(group):
    for text in ((ROOT / 'README.md').read_text(), runpy.run_path(str(ROOT / 'run'))['__doc__']):
        assert re.findall(rf'^.*\./run {group}\b(.*)', text, re.MULTILINE)[0].startswith(' ...')


def test_each_command_is_named_as_it_is_typed(monkeypatch, capsys):
    assert sorted(COMMAND_NAMES) == sorted(typer.main.get_command(cli.app).commands)
    monkeypatch.setenv('MLREF_COMMAND', './run')
    assert run_cli(cli.app, ['serve', '--help']) == 0
    assert 'Usage: ./run serve' in capsys.readouterr().out
    assert run_cli(cli.app, ['features', 'lineage', 'nothing']) == 1
    assert capsys.readouterr().err.endswith('./run features list shows the views\n')


def test_a_hint_is_a_command_that_can_be_given():
    "`mlref log trim` wants a topic, so a sentence that advises it names one"
    texts = [file.read_text() for file in Path(cli.__file__).parent.glob('*.py')]
    hints = [line for text in texts for line in text.splitlines() if 'mlref log trim' in line]
    assert len(hints) > 2
    assert not [line for line in hints if not re.search(r'mlref log trim [a-z]+ --', line)]


@pytest.mark.parametrize('command', ['list', 'add gate', 'revoke x'])
def test_a_folder_of_a_server_that_is_a_file_or_a_slip_is_told(command, folder, capsys):
    for place in ('file', 'file/x', '/dev/null'):
        assert run_cli(cli.app, ['keys', *command.split(), '--log', place]) == 1
        said = capsys.readouterr().err
        assert re.search(
            r'expected (a folder|the folder of a server) at .*--log|name the one', said
        )
    made = run_cli(cli.app, ['keys', *command.split(), '--log', 'servd'])
    assert (made == 0) == (command == 'add gate') == Path('servd').exists()
    assert ('The folder servd is new' in capsys.readouterr().out) == Path('servd').exists()
    run_cli(cli.app, ['keys', *command.split(), '--log', 'servd'])
    assert 'is new' not in capsys.readouterr().out


def test_a_number_that_no_message_has_is_told_with_those_that_are_there(folder, capsys):
    with closing(LocalLog(folder / 'log')) as log:
        log.append('events', [b'1', b'2'])
    place = ['events', '--log', str(folder / 'log')]
    assert run_cli(cli.app, ['log', 'read', *place, '--offset', '99999999']) == 1
    said = capsys.readouterr().err
    assert 'expected --offset from 0 to 2, which events/0 holds, got 99,999,999; ' in said
    assert 'restore' not in said
    assert run_cli(cli.app, ['log', 'trim', *place, '--days', '-1']) == 1
    said = capsys.readouterr().err
    assert 'expected --days as a number' in said and 'seconds' not in said


@pytest.mark.parametrize('place', ['file', 'file/x', '/dev/null', 's3://bucket/x'])
def test_a_server_is_not_begun_in_a_file(place, folder):
    (folder / 'run').mkdir()
    with pytest.raises(MlrefError, match='--log|expected log as a file of this machine'):
        check_option('log', Path(place))
        serve_options(ServeSettings(log=Path(place)), folder / 'run')


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_command_of_the_checkout_has_help_and_refuses_what_it_does_not_know(name, tmp_path):
    script = [sys.executable, str(ROOT / SCRIPTS[name])]
    asked = {}
    for word in ('--help', '--wrong'):
        words = [*script, word]
        asked[word] = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert [each.returncode for each in asked.values()] == [0, 2]
    assert asked['--help'].stdout.startswith(f'usage: ./run {name} ')
    assert 'unrecognized arguments: --wrong' in asked['--wrong'].stderr
    assert not [*tmp_path.iterdir()] and not list(ROOT.glob('--*'))


def test_a_check_of_a_page_that_is_not_there_is_refused():
    words = [sys.executable, str(ROOT / 'tests/check.py'), '--only', 'glossary', 'nopage', 'index']
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected part of the name of a page, got 'nopage'\n" in done.stderr


def test_an_unknown_command_of_the_checkout_ends_as_that_of_the_package(capsys):
    assert runpy.run_path(str(ROOT / 'run'))['main'](['fly']) == run_cli(cli.app, ['fly']) == 2
    assert "got 'fly'; see ./run --help" in capsys.readouterr().err
