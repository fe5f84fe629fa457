"""What a new task gets wrong, and the sentence that `check_task` and `read_labels` answer with"""

from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from mlref.arguments import MlrefError
from mlref.contracts import Rule
from mlref.core import DAY
from mlref.features import Entity
from mlref.log import LocalLog
from mlref.task import check_task, load_task, read_labels
from small import FEATURES, SALES, TASK, WEEK, find_labels, make_events

EVENTS = make_events()


def task(**other: Any):
    return replace(TASK, **other)


def labels_with(**columns: Any):
    "A function that gives the labels with these columns instead"
    return lambda events, now: find_labels(events, now).with_columns(**columns)


def test_a_task_that_is_right_passes():
    check_task(TASK, EVENTS)
    check_task(TASK, EVENTS.reverse())


LAST_IS_NULL = pl.when(pl.int_range(pl.len()) < 399).then('label_time')


@pytest.mark.parametrize(
    ('columns', 'says'),
    [
        ({'y': pl.lit(None, pl.Int64)}, '400 of 400 without y; leave out what is not known yet'),
        ({'label_time': pl.lit(None)}, '400 of 400 without label_time; leave out'),
        ({'label_time': LAST_IS_NULL}, '1 of 400 without label_time; leave out'),
        ({'visit': pl.lit(None, pl.String)}, '400 of 400 without visit; leave out'),
    ],
)
def test_a_null_among_the_labels_is_refused(columns, says):
    wrong = task(labels=labels_with(**columns))
    with pytest.raises(MlrefError, match=says):
        read_labels(wrong, EVENTS, 9 * DAY)
    with pytest.raises(MlrefError, match=says):
        check_task(wrong, EVENTS)


def sales(**columns: Any):
    "The rows of the sales, with other columns"
    return replace(SALES, rows=lambda events: SALES.rows(events).with_columns(**columns))


def without(*names: str):
    return replace(SALES, rows=lambda events: SALES.rows(events).drop(names))


SOME_NULL = pl.when(pl.col('price') > 0).then('price')


@pytest.mark.parametrize(
    ('changed', 'says'),
    [
        ({'source': without('price')}, 'expected sales.price among the columns of its rows'),
        ({'source': without('t')}, 'expected the rows of sales to say in t the minute'),
        ({'source': sales(price=SOME_NULL)}, 'expected sales.price in every row, 58 missing'),
        ({'source': without('shop')}, 'the key shop of the entity shop among the columns of the r'),
        ({'source': sales(shop=pl.lit(None, pl.String))}, 'the key shop .* null in all 400'),
        ({'source': sales(shop=pl.lit(7.5))}, 'the key shop of shop as Float64'),
        ({'entity': Entity(name='account', keys=('acc',))}, 'the key acc of the entity account'),
        (
            {
                'entity': Entity(name='account', keys=('acc',)),
                'source': sales(acc=pl.col('shop')),
            },
            'the key acc of the entity account among the columns of a request',
        ),
    ],
)
def test_a_feature_that_cannot_be_computed_is_told_by_its_view(changed, says):
    wrong = replace(FEATURES, views=(replace(WEEK, **changed),))
    with pytest.raises(MlrefError, match=says) as told:
        check_task(task(features=wrong), EVENTS)
    assert 'the view week is computed from the rows of sales' in str(told.value)


@pytest.mark.parametrize(
    ('holds', 'says'),
    [
        (pl.lit(False), "got none of 800: the rule 'dear' refuses 800; mend the rule or the"),
        (pl.col('price') > 4, "got 228 of 800: the rule 'dear' refuses 572; mend the rule or"),
    ],
)
def test_a_contract_that_refuses_most_events_names_the_rule(holds, says):
    rules = (Rule(name='a visit', holds=pl.col('visit') != 'v0'), Rule(name='dear', holds=holds))
    with pytest.raises(MlrefError, match=says):
        check_task(task(contract=rules), EVENTS)
    check_task(task(contract=rules[:1]), EVENTS)
    with pytest.raises(MlrefError, match='got none of 0: give some events'):
        check_task(TASK, EVENTS.head(0))


def came_home(events: pl.DataFrame, now: int) -> pl.DataFrame:
    "Whether a visit has ended by now; needs both kinds"
    ended = events.filter(kind='end')['visit'].implode()
    visits = events.filter(kind='visit')
    y = pl.col('visit').is_in(ended).cast(pl.Int64)
    labels = visits.select('visit', y=y, label_time=pl.col('known_time') + 60)
    return labels.filter(pl.col('label_time') <= now)


def test_a_kind_that_is_missing_from_label_kinds_is_named():
    right = task(labels=came_home, label_kinds=('visit', 'end'))
    check_task(right, EVENTS)
    with pytest.raises(MlrefError, match='alone, got others with events of end; add them'):
        check_task(replace(right, label_kinds=('visit',)), EVENTS)


SECONDS = pl.col('event_time', 'known_time') * 60 + 1_790_000_000


@pytest.mark.parametrize(
    ('events', 'says'),
    [
        (EVENTS.lazy(), 'expected events of late-visits as a polars frame, got LazyFrame'),
        ({'visit': ['v0']}, 'expected events of late-visits as a polars frame, got dict'),
        (EVENTS.drop('shop'), 'got shop not among'),
        (EVENTS.cast({'price': pl.Float64}), 'expected price of events of late-visits as Int64'),
        (EVENTS.cast({'event_time': pl.Float64}), 'expected event_time of events of late-visits'),
        (EVENTS.with_columns(SECONDS), 'event_time of events of late-visits in whole minutes'),
        (EVENTS.with_columns(event_id=pl.lit(None, pl.String)), 'got 800 without; put contracts'),
    ],
)
def test_events_that_are_none_are_refused_in_a_sentence(events, says):
    with pytest.raises(MlrefError, match=says):
        check_task(TASK, events)


def test_an_event_that_is_delivered_twice_is_one():
    twice = pl.concat([EVENTS, EVENTS.sample(fraction=0.1, seed=0)])
    check_task(TASK, twice)
    renamed = EVENTS.filter(kind='visit').with_columns(event_id=pl.format('again-{}', 'event_id'))
    with pytest.raises(MlrefError, match='expected each visit announced once'):
        check_task(TASK, pl.concat([EVENTS, renamed]))


def test_an_unknown_feature_is_answered_with_those_of_like_names():
    with pytest.raises(MlrefError, match='got week_mean_price; .* such as week_price_10080m'):
        task(monitored=('week_mean_price',))
    with pytest.raises(MlrefError, match='got xyz; watch what is computed, such as week_n_10080m'):
        task(monitored=('xyz',))


def test_a_request_without_its_key_is_refused_unless_it_may_be_null():
    some = pl.when(pl.col('price') > 0).then('shop')
    without_shop = EVENTS.with_columns(shop=some)
    with pytest.raises(MlrefError, match='expected shop in every visit, got 58 of 400 without'):
        check_task(TASK, without_shop)
    check_task(task(nullable=('shop',)), without_shop)
    with pytest.raises(MlrefError, match='expected visit in every visit, got 400 of 400 without'):
        check_task(TASK, EVENTS.with_columns(visit=pl.lit(None, pl.String)))


@pytest.mark.parametrize(
    ('code', 'says'),
    [
        ('x = = 2', 'SyntaxError: invalid syntax'),
        ("{}['X']", "KeyError: 'X'"),
        ('1 / 0', 'division'),
    ],
)
def test_a_module_that_is_broken_is_one_sentence(code, says, tmp_path, monkeypatch):
    name = f'broken_{abs(hash(code))}'
    (tmp_path / f'{name}.py').write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MlrefError, match=f"expected a task at '{name}:X'.*{says}"):
        load_task(f'{name}:X')


def test_a_log_that_was_closed_says_so(tmp_path):
    log = LocalLog(tmp_path / 'log')
    log.append('orders', [b'{}'])
    log.close()
    for call in (lambda: log.append('orders', [b'{}']), lambda: log.read('orders', 0, 1)):
        with pytest.raises(MlrefError, match='it was closed; open it again'):
            call()
