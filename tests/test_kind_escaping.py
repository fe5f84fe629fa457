"""Whatever comes from data stays text: in a report, a card, a plot and a terminal"""

import io
import json
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import mistune
import nbformat
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot
from matplotlib.text import Text
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from prometheus_client.parser import text_string_to_metric_families

from mlref import cli
from mlref.checks import plot_quality
from mlref.cost import BillItem, Growth, plot_growth
from mlref.evaluate import plot_reliability
from mlref.flights.task import flights_task
from mlref.gates import Gate
from mlref.log import LocalLog
from mlref.markup import (
    Html,
    escape_html,
    escape_markdown,
    escape_terminal,
    html_element,
    markdown_table,
    plot_label,
)
from mlref.modelcard import ModelRecord, SliceScore, render_model_card
from mlref.observe import Meters, add_samples, write_sample
from mlref.pipeline import PipelineRun, StepCost
from mlref.report import write_report
from mlref.results import render_card, result_row, write_results
from mlref.run_report import plot_run
from mlref.slices import plot_rolling_origin, plot_slices
from mlref.status import parse_samples
from mlref.terminal import CommandResult, align_columns, print_progress, print_result, run_cli

HOSTILE = (
    '<script>alert(1)</script>',
    '"><img src=x onerror=alert(1)>',
    'a|b `c` *d* _e_ [f](javascript:alert(1)) ~~g~~ $h$ \\| &lt; <b>i</b>',
    '# head\n| x | y |\n|---|---|\n<svg/onload=alert(1)>',
    '</td></tr></table></section>',
    '&amp;&#60;script&#62;',
    '``` ` ``',
)
ALL = ' / '.join(HOSTILE)
TAGS = {'script', 'style', 'img', 'svg', 'iframe', 'object', 'embed', 'link', 'base', 'form'}


class Elements(HTMLParser):
    "What a browser would make of a page"

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


def read_page(text: str) -> Elements:
    found = Elements()
    found.feed(text)
    return found


@given(st.text(), st.text())
@settings(max_examples=200, deadline=None)
def test_an_element_holds_its_text_and_nothing_else(text, attribute):
    page = read_page(html_element('p', text, title=attribute))
    plain = text.replace('\r\n', '\n').replace('\r', '\n')
    assert page.tags == ['p']
    assert ''.join(page.texts).replace('\r\n', '\n').replace('\r', '\n') == plain
    assert [name for name, _ in page.attributes] == ['title']
    assert escape_html(escape_html(text)) == escape_html(text)
    assert not isinstance('' + Html('x'), Html)  # glued: no mark, and escaped once more


SPECIAL = st.text(st.sampled_from('ab1 |`*_~$\\<>&;#[]()!-"\''), max_size=30)


@given(st.lists(st.tuples(SPECIAL, SPECIAL), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_a_cell_is_read_back_as_it_was(rows):
    "By another program that knows Markdown"
    lines = markdown_table(['first', 'second'], rows)
    page = read_table('\n'.join(lines))
    assert len(page) == len(rows)
    for cells, row in zip(page, rows, strict=True):
        assert cells == tuple(' '.join(cell.split()) for cell in row)


class Cells(Elements):
    "The rows of a table's body"

    def __init__(self):
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag, attrs):
        super().handle_starttag(tag, attrs)
        if tag == 'tr':
            self.rows.append([])
        if tag == 'td':
            self.rows[-1].append('')

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def read_table(text: str) -> list[tuple[str, ...]]:
    render = mistune.create_markdown(escape=False, plugins=['table', 'strikethrough'])
    found = Cells()
    found.feed(render(text))
    ours = {'table', 'thead', 'tbody', 'tr', 'th', 'td', 'strong'}  # strong: '**no**' of a card
    assert set(found.tags) <= ours, found.tags
    return [tuple(' '.join(cell.split()) for cell in row) for row in found.rows if row]


def fill_lake(file) -> None:
    "Every text that the report shows, hostile"
    file.parent.mkdir(parents=True)
    gate = {'name': 'better_than_champion', 'passed': True, 'why': ALL}
    alarm = {ALL: {'value': 0.1, 'low': -0.1, 'high': 0.1, 'out': 4}, 'table': ALL}
    decisions = [
        (22_760_000, 'alarm', ALL, json.dumps(alarm)),
        (22_760_001, 'refuse', f'{ALL}: {ALL}', '{}'),
        (22_760_002, 'promote', ALL, json.dumps({'gates': [gate]})),
        (22_760_003, ALL, ALL, '{}'),
    ]
    tables = {
        'metrics(name varchar, value double)': [('auc', 0.7)],
        'decisions(decided_at bigint, action varchar, why varchar, evidence varchar)': decisions,
        'dead_letters(reasons varchar)': [(ALL,)],
        'predictions(version varchar, scored_at bigint, trained_until bigint)': [
            (HOSTILE[0], 22_760_000, 22_750_000)
        ],
        'commits(messages bigint, good bigint, repeated bigint, dead bigint)': [(4, 1, 2, 1)],
        'quality(name varchar, action varchar, broken bigint, of_rows bigint, over boolean,'
        ' says varchar, measured_at bigint)': [
            (ALL, ALL, 3, 9, False, '', 1),
            (ALL, ALL, 0, None, True, ALL, 1),
        ],
    }
    with duckdb.connect(str(file)) as lake:
        for table, rows in tables.items():
            lake.execute(f'create table {table}')
            marks = ', '.join('?' * len(rows[0]))
            lake.executemany(f'insert into {table.split("(")[0]} values ({marks})', rows)


def hostile_step() -> nbformat.NotebookNode:
    "A step that displays what it read"
    step = new_notebook(cells=[new_markdown_cell(ALL), new_code_cell('1')])
    shown = {'text/html': ALL, 'application/javascript': 'alert(1)', 'image/svg+xml': HOSTILE[3]}
    step.cells[1].outputs = [
        new_output('stream', text=ALL),
        *(new_output('display_data', {kind: data}) for kind, data in shown.items()),
        new_output('error', ename=HOSTILE[0], evalue=HOSTILE[1], traceback=[ALL]),
    ]
    return step


def hostile_run(tmp_path) -> PipelineRun:
    "A run of whose texts none is ours"
    given_to = {'live': {'task': ALL}, 'cut': {}}
    run = PipelineRun(tmp_path, tmp_path / 'data', tmp_path / 'reports', 'one', 'year', given_to)
    run.done = {ALL: StepCost(1.0, 2.0)}
    fill_lake(run.folder / 'lake' / 'mlref.duckdb')
    rows = [
        result_row(ALL, 1.0, HOSTILE[0], '>= 2'),
        result_row('AUC of a day', 0.7, '', low=0.6, high=0.8),
        result_row(f'{ALL}s scored', 9, '', low=1.0, high=2.0),
    ]
    skipped = [{'name': ALL, 'why': ALL}]
    write_results(run.report_folder / 'results', 'year', ALL, rows, skipped, device=ALL)
    nbformat.write(hostile_step(), run.report_folder / 'live.ipynb')
    (run.report_folder / 'cut.ipynb').write_text('{"cells": [')
    return run


def test_a_report_of_hostile_texts_shows_them(tmp_path):
    page = read_page(write_report(hostile_run(tmp_path)).read_text())
    # an image that a step drew is data in the page: it loads nothing and runs nothing
    assert TAGS & set(page.tags) == {'style', 'img'} and page.tags.count('style') == 1
    events = [name for name, _ in page.attributes if name.startswith('on')]
    links = [text for name, text in page.attributes if name in ('href', 'src') and text]
    assert events == []
    assert [text for text in links if not text.startswith(('#', 'data:image/'))] == []
    text = ''.join(page.texts)
    assert text.count(HOSTILE[0]) > 15 and HOSTILE[4] in text
    assert 'cannot be shown' in text  # the step that was cut


def test_a_report_card_of_hostile_texts_has_its_columns(tmp_path):
    run = hostile_run(tmp_path)
    card = render_card(run.report_folder / 'results')
    render = mistune.create_markdown(escape=False, plugins=['table', 'strikethrough'])
    page = read_page(render(card))
    assert not TAGS & set(page.tags)
    for line in card.splitlines():
        if line.startswith('| ') and 'what' not in line:
            assert len(read_table(f'{header_of(line)}\n{line}')) == 1


def header_of(line: str) -> str:
    "A head with as many columns as Markdown sees in a row"
    columns = len(line.replace('\\|', '').strip('|').split('|'))
    return '| x ' * columns + '|\n' + '|---' * columns + '|'


def test_a_model_card_of_hostile_texts_shows_them():
    scores = (
        SliceScore(ALL, ALL, 9, 0.2, 0.7, 0.6, 0.8),
        SliceScore('all', ALL, 9, 0.2, 0.7, 0, 1),
    )
    record = ModelRecord(
        model=ALL,
        about={ALL: ALL},
        decided_at=22_760_000,
        why=ALL,
        instead_of=ALL,
        gates=(Gate(ALL, False, 0.1, 0.2, ALL),),
        slices=scores,
        lineage=((ALL, ALL),),
    )
    card = render_model_card(record, flights_task())
    render = mistune.create_markdown(escape=False, plugins=['table', 'strikethrough'])
    page = read_page(render(card))
    kept = {'h1', 'h2', 'p', 'code', 'strong', 'table', 'thead', 'tbody', 'tr', 'th', 'td'}
    assert set(page.tags) <= kept
    assert page.tags.count('table') == 4
    assert ' '.join(''.join(page.texts).split()).count(HOSTILE[0]) >= 10


@pytest.mark.parametrize('name', [r'$\frac$', r'\$x$ ^_{', HOSTILE[2], HOSTILE[3]])
def test_a_plot_takes_any_name(name):
    days = range(15_000, 15_020)
    metrics = pl.DataFrame(
        {
            'name': ['auc', f'missing:{name}'] * 20,
            'day': [day for day in days for _ in range(2)],
            'value': [0.7] * 40,
            'low': [None, 0.1] * 20,
            'high': [None, 0.2] * 20,
            'version': [name] * 40,
        },
        schema_overrides={'low': pl.Float64, 'high': pl.Float64},
    )
    at = [15_010 * 1440] * 3
    decisions = pl.DataFrame(
        {'decided_at': at, 'action': ['alarm', 'refuse', 'promote'], 'why': [name] * 3}
    )
    figure = plot_run(metrics, decisions)
    figure.savefig(io.BytesIO(), dpi=20)
    numbers = [text.get_text() for text in figure.axes[0].texts]
    lines = [text.get_text() for text in figure.axes[-1].texts]
    assert numbers == ['1', '2'] and lines[::2] == numbers  # each mark has a line


NAMES = (
    r'$\frac$',
    '$a$',
    r'\$x$ ^_{',
    '_hidden',
    '__',
    'a\nb',
    '\u202eevil\u200b',
    'x' * 5000,
    ALL,
)


def quality_rows(name):
    "Of two rules and two checks, each broken twice"
    return pl.DataFrame(
        {
            'measured_at': [1000, 1001] * 4,
            'name': [name, name, 'other', 'other'] * 2,
            'action': ['fail'] * 8,
            'of_rows': [9] * 4 + [None] * 4,
            'broken': [1] * 8,
        }
    )


def draw_all(name):
    "Every plot of a name; those with a legend first"
    y, p = np.array([0.0, 1.0] * 40), np.linspace(0.01, 0.7, 80)
    found = pl.DataFrame(
        {
            'by': [name],
            'slice': [name],
            'auc': [0.6],
            'low': [0.5],
            'high': [0.7],
            'base_rate': [0.5],
        }
    )
    bills = [Growth(times, None, (BillItem(name, times, '', 1.0),), 1e6) for times in (1.0, 2.0)]
    with_legend = [
        plot_reliability(y, {name: p}),
        plot_rolling_origin({name: found}),
        plot_quality(quality_rows(name)),
        plot_growth(bills),
    ]
    return with_legend, plot_slices(found)


@pytest.mark.parametrize('name', NAMES)
def test_a_name_is_shown_by_every_plot_that_is_given_one(name):
    with_legend, plain = draw_all(name)
    for figure in (*with_legend, plain):
        figure.savefig(io.BytesIO(), dpi=20)
        pyplot.close(figure)
    label = plot_label(name)
    for figure in with_legend:
        shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert any(text.startswith(label) for text in shown), shown
    assert len(label) <= 61 + label.count('$')


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_a_label_of_a_plot_is_no_formula_and_not_left_out(text):
    label = plot_label(text)
    assert not label.startswith('_')
    shown, is_formula = Text(0, 0, label)._preprocess_math(label)
    assert not is_formula
    if len(text) <= 60 and escape_terminal(text, breaks=False) == text:
        assert shown == (f' {text}' if text.startswith('_') else text)


def test_markdown_is_escaped_once():
    for text in HOSTILE:
        once = escape_markdown(text)
        assert escape_markdown(once) == once and '\n' not in once


OBEYED = ('\x1b[2J\x1b[31m', '\x1b]0;title\x07', '\r', '\x9b1A', '\u202e', '\x00', '\x08', '\u2028')


@given(st.text(), st.sampled_from(OBEYED))
@settings(max_examples=200, deadline=None)
def test_a_terminal_shows_text_and_obeys_none(text, order):
    shown = escape_terminal(text + order + text)
    kinds = {unicodedata.category(letter) for letter in shown if letter not in '\t\n'}
    assert not kinds & {'Cc', 'Zl', 'Zp'}
    assert order not in shown
    assert len(escape_terminal(text, breaks=False).splitlines()) <= 1
    assert escape_terminal(shown) == shown


def test_what_a_command_says_of_hostile_data_does_not_act(tmp_path, capsys, monkeypatch):
    hostile = ''.join(OBEYED)
    print_result(CommandResult(None, align_columns([['id', 'n'], [f'{hostile}\nx', 7]])), False)
    print_result(CommandResult(None, hostile), False)
    print_progress(hostile)
    log = LocalLog(tmp_path / 'log')
    log.append('events', [f'one{hostile}\ntwo'.encode()])
    log.close()
    run_cli(cli.app, ['log', 'read', 'events', '--log', str(tmp_path / 'log')])
    run_cli(cli.app, ['log', 'read', hostile.replace('\0', ''), '--log', str(tmp_path / 'log')])
    said = capsys.readouterr()
    assert not any(order in said.out + said.err for order in OBEYED)
    assert len(said.out.splitlines()) == 4  # a head, a row, an answer, a message


@given(st.lists(st.text(st.characters(codec='utf-8')), min_size=1, max_size=5, unique=True))
@settings(max_examples=200, deadline=None)
def test_a_label_of_a_metric_is_read_back_by_others_and_by_us(values):
    with TemporaryDirectory() as folder:
        file = Path(folder) / '0.meters'
        for value in values:
            labels = {'model': value, 'le': '+Inf'}
            Meters(file).add(
                write_sample('mlref_score_bucket', **labels), 2.0
            )  # by other processes
        counted = add_samples(Meters(file), Path(folder))
    ours = parse_samples(counted)
    text = ''.join(f'{name} {n}\n' for name, n in counted.items())
    families = text_string_to_metric_families(text)
    theirs = [sample for family in families for sample in family.samples]
    for read in (
        [each.labels for each in ours if each.metric == 'mlref_score_bucket'],
        [each.labels for each in theirs if each.name == 'mlref_score_bucket'],
    ):
        assert sorted(each['model'] for each in read) == sorted(values)
