"""What a new task gets wrong, and the sentence that `check_task` and `read_labels` answer with"""

from dataclasses import replace
from typing import Any

import polars as pl
import pytest

from mlref.arguments import MlrefError
from mlref.core import DAY
from mlref.task import check_task, read_labels
from small import TASK, find_labels, make_events

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
