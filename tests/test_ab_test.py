"""A/B tests: days by hand, labels that come late, splits that are not the plan"""

import numpy as np
import pytest

from mlref.ab_test import ServedScores, arm_differences, read_ab_test
from mlref.confidence import mean_sequence
from mlref.core import DAY, Calendar, MlrefError

CALENDAR = Calendar(label_delay=3 * DAY)
START = 15000 * DAY
PLAN = {'A': 0.5, 'B': 0.5}


def month(days=20, rows=60, worse=0.0, seed=0):
    "Rows of two arms; those of B are off by `worse`"
    g = np.random.default_rng(seed)
    n = days * rows
    cutoff = START + np.repeat(np.arange(days), rows) * DAY + g.integers(0, DAY, n)
    variant = np.where(g.random(n) < 0.5, 'A', 'B')
    p = g.uniform(0.2, 0.6, n)
    y = (g.random(n) < p).astype(float)
    score = np.clip(p + worse * (variant == 'B'), 0, 1)
    return ServedScores(cutoff, variant, score, y, cutoff + g.integers(1, 2 * DAY, n))


def change(served, **columns):
    return ServedScores(**{**vars(served), **columns})


def read(served, now=START + 40 * DAY, plan=PLAN):
    return read_ab_test(served, plan, CALENDAR, START, now)


def by_hand(served, day):
    "Mean loss of B less that of A, row by row"
    losses = {'A': [], 'B': []}
    for cutoff, arm, score, y in zip(
        served.cutoff, served.variant, served.score, served.y, strict=True
    ):
        if CALENDAR.day_of(np.array([cutoff]))[0] == day:
            losses[str(arm)].append((score - y) ** 2)
    return sum(losses['B']) / len(losses['B']) - sum(losses['A']) / len(losses['A'])


def test_every_day_is_the_one_worked_out_by_hand():
    served = month()
    days = arm_differences(served, ('A', 'B'), CALENDAR, START, START + 40 * DAY, least=1)
    assert len(days.found.day) > 15
    for day, found in zip(days.found.day, days.found.difference, strict=True):
        assert found == pytest.approx(by_hand(served, day), abs=1e-12)


def test_a_day_that_was_read_does_not_change():
    "Labels that come after the delay of the task are not taken in afterwards"
    served = month()
    late = served.label_time.copy()
    late[::7] = served.cutoff[::7] + 3 * DAY + 1
    served = change(served, label_time=late)
    last = arm_differences(served, ('A', 'B'), CALENDAR, START, START + 60 * DAY).found
    for now in range(START + 5 * DAY, START + 30 * DAY, DAY // 3):
        found = arm_differences(served, ('A', 'B'), CALENDAR, START, now).found
        assert np.array_equal(found.difference, last.difference[: len(found.day)])


def test_labels_count_by_their_age_and_not_by_their_value():
    "Every early label is a yes: read as they arrive, the first days would be all yes"
    served = month()
    slow = np.where(served.y > 0.5, served.cutoff + 60, served.cutoff + 3 * DAY - 60)
    served = change(served, label_time=slow)
    first = arm_differences(served, ('A', 'B'), CALENDAR, START, START + 4 * DAY + DAY // 2)
    whole = arm_differences(served, ('A', 'B'), CALENDAR, START, START + 60 * DAY)
    n = len(first.found.day)
    assert n and np.array_equal(first.found.rows, whole.found.rows[:n])


def test_a_worse_arm_is_seen_and_equal_ones_are_not():
    assert read(month(worse=0.3)).verdict == 'A is better'
    assert read(month(worse=0.0)).verdict == 'no difference shown yet'
    turned = month(worse=0.3)
    turned = change(turned, variant=np.where(turned.variant == 'A', 'B', 'A'))
    assert read(turned).verdict == 'B is better'


def test_a_lost_part_of_the_traffic_is_said_before_any_loss():
    served = month(days=40, rows=200, worse=0.3)
    kept = (served.variant == 'A') | (np.arange(len(served.y)) % 5 > 0)
    served = ServedScores(*[column[kept] for column in vars(served).values()])
    assert 'not the one of the plan' in read(served).verdict


def test_days_with_few_rows_are_counted_and_left_out():
    served = month(rows=10)
    with pytest.raises(MlrefError, match=r'a day with mature labels .* with too few rows'):
        read(served)
    days = arm_differences(served, ('A', 'B'), CALENDAR, START, START + 40 * DAY)
    assert days.thin > 15 and not len(days.found.day)


def test_rows_of_other_variants_take_no_part():
    served = month()
    third = ServedScores(*[np.concatenate([column, column]) for column in vars(served).values()])
    names = np.concatenate([served.variant, np.full(len(served.y), 'shadow')])
    assert read(change(third, variant=names)).difference == read(served).difference


@pytest.mark.parametrize('plan', [{}, {'A': 1.0}, {'A': 0.4, 'B': 0.3, 'C': 0.3}])
def test_more_or_fewer_than_two_arms_are_refused(plan):
    with pytest.raises(MlrefError, match='two variants'):
        read(month(), plan=plan)


def test_watched_tests_of_nothing_are_seldom_wrong():
    "500 months without a difference, each read every morning: 5 % at most, and chance"
    wrong = 0
    for seed in range(500):
        x = arm_differences(
            month(28, 60, seed=seed), ('A', 'B'), CALENDAR, START, START + 60 * DAY
        ).found.difference
        wrong += any_decided(x)
    assert wrong <= 41  # the 99.9 % point of a binomial of 500 and .05


def any_decided(x):
    found = mean_sequence(x, 0.02)
    return bool(((found.low > 0) | (found.high < 0)).any())
