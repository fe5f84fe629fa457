"""Intervals beside loops, scipy and statsmodels, and how often they miss"""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import fft, stats
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from mlref.evaluate import Estimate
from mlref.intervals import (
    DailyDifferences,
    auc_difference_by_day,
    cosine_count,
    jackknife_error,
    mean_by_day,
    minimum_detectable_effect,
    not_worse,
    paired_losses,
    t_interval,
)


@pytest.fixture(scope='module')
def scored():
    "Outcomes, two models' scores and days that differ in size and in how many are late"
    rng = np.random.default_rng(0)
    day = np.repeat(np.arange(20), rng.integers(40, 90, 20))
    level = rng.normal(-1, 0.7, 20)[day]
    signal = rng.normal(size=len(day))
    y = (rng.random(len(day)) < 1 / (1 + np.exp(-level - signal))).astype(float)
    good, poor = (1 / (1 + np.exp(1 - signal - rng.normal(0, s, len(day)))) for s in (0.5, 0.9))
    return y, good, poor, day


def test_the_jackknife_of_an_auc_is_that_of_a_loop(scored):
    y, good, poor, day = scored
    left = []
    for one in np.unique(day):
        kept = day != one
        left.append(roc_auc_score(y[kept], good[kept]) - roc_auc_score(y[kept], poor[kept]))
    error = np.sqrt(19 / 20 * ((left - np.mean(left)) ** 2).sum())
    value = roc_auc_score(y, good) - roc_auc_score(y, poor)
    found = auc_difference_by_day(y, good, poor, day)
    expected = stats.t.interval(0.95, 19, loc=value, scale=error)
    np.testing.assert_allclose(found, (value, *expected), rtol=1e-9)
    # the jackknife of rows, not of days, would be another number
    rows = jackknife_error(np.array(left)[:10])
    assert abs(rows - error) > 1e-4


def test_losses_of_days_are_those_of_scikit_learn(scored):
    y, good, poor, day = scored
    daily = paired_losses(y, good, poor, day)
    for one, value in zip(daily.day, daily.value, strict=True):
        mine = day == one
        labels = {'labels': [0, 1]}
        expected = sklearn_log_loss(y[mine], good[mine], **labels)
        expected -= sklearn_log_loss(y[mine], poor[mine], **labels)
        assert abs(value - expected) < 1e-12


def test_the_long_run_variance_is_that_of_the_slowest_cosines():
    x = np.random.default_rng(1).normal(size=60).cumsum() / 10
    waves = fft.dct(x - x.mean(), norm='ortho')[1 : cosine_count(60) + 1]
    error = np.sqrt((waves**2).mean() / 60)
    expected = stats.t.interval(0.95, cosine_count(60), loc=x.mean(), scale=error)
    found = mean_by_day(DailyDifferences(np.arange(60), x, np.full(60, 900)))
    np.testing.assert_allclose(found, (x.mean(), *expected), rtol=1e-9)


def test_days_weigh_by_their_rows_as_in_a_regression_of_all_rows():
    rng = np.random.default_rng(2)
    rows = rng.integers(100, 900, 40)
    x = rng.normal(size=40)
    found = mean_by_day(DailyDifferences(np.arange(40), x, rows), cosines=39)
    fit = sm.WLS(x, np.ones(40), weights=rows).fit(cov_type='HC0')
    assert abs(found.value - fit.params[0]) < 1e-12
    width = found.high - found.value
    assert abs(width / stats.t.ppf(0.975, 39) - fit.bse[0] * np.sqrt(40 / 39)) < 1e-3


def alike_days(size, days, by):
    rng = np.random.default_rng(3)
    x = np.zeros((size, days + 40))
    noise = rng.normal(size=x.shape)
    for i in range(1, days + 40):
        x[:, i] = by * x[:, i - 1] + noise[:, i]
    return x[:, 40:]


@pytest.mark.parametrize('by', [0.0, 0.2, 0.5])
def test_an_interval_of_daily_losses_misses_about_as_often_as_it_says(by):
    rows = np.full(28, 900)
    found = [mean_by_day(DailyDifferences(rows, x, rows)) for x in alike_days(2000, 28, by)]
    missed = np.mean([each.low > 0 or each.high < 0 for each in found])
    assert missed < 0.085
    plain = [t_interval(x.mean(), x.std(ddof=1) / 28**0.5, 27) for x in alike_days(2000, 28, by)]
    beside = np.mean([each.low > 0 or each.high < 0 for each in plain])
    assert beside > 0.13 if by == 0.5 else beside < 0.13  # what it is there for


def test_the_minimum_detectable_effect_is_found_as_often_as_it_says():
    x = np.random.default_rng(4).normal(size=(3000, 60))
    found = [t_interval(each.mean(), each.std(ddof=1) / 60**0.5, 59) for each in x]
    gain = np.median([minimum_detectable_effect(each, 0.8) for each in found])
    assert abs(np.mean([each.low + gain > 0 for each in found]) - 0.8) < 0.03


@pytest.mark.parametrize('high, passed', [(0.0019, True), (0.002, False), (0.01, False)])
def test_not_worse_asks_the_upper_end(high, passed):
    assert not_worse(Estimate(0.0, -high, high), 0.002).passed is passed
