"""Refit and change gates beside loops, scipy and statsmodels, and how often they are wrong"""

import numpy as np
import pytest
from scipy import stats

from mlref.core import MlrefError
from mlref.evaluate import within_day_auc
from mlref.intervals import DailyDifferences, mean_by_day
from mlref.policy import RetrainPolicy
from mlref.verdicts import (
    ChangePolicy,
    auc_differences,
    judge_change,
    judge_refit,
    slice_verdicts,
)


def days_of(values):
    "Values of days, of as many rows each"
    count = len(values)
    return DailyDifferences(np.arange(count), np.asarray(values, float), np.full(count, 900))


def test_a_refit_at_the_margin_passes_as_seldom_as_stated():
    noise = np.random.default_rng(0).normal(0.002, 0.006, (1000, 28))
    passed = np.mean([judge_refit(days_of(x)).passed for x in noise])
    # one-sided 5 %, exact for normal days; four standard errors of 1,000 draws
    assert abs(passed - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 1000)


def test_what_is_detectable_is_detected_in_four_of_five():
    rng = np.random.default_rng(1)
    sizes = [judge_refit(days_of(rng.normal(0, 0.006, 90))).detectable for _ in range(200)]
    true = 0.002 - np.mean(sizes)
    noise = rng.normal(true, 0.006, (500, 90))
    passed = np.mean([judge_refit(days_of(x)).passed for x in noise])
    assert 0.7 < passed < 0.92


def test_what_is_detectable_follows_from_the_interval():
    verdict = judge_refit(days_of(np.random.default_rng(8).normal(size=28)))
    half = verdict.difference.high - verdict.difference.value
    error = half / stats.norm.ppf(0.95)
    assert verdict.detectable == pytest.approx(half + stats.norm.ppf(0.8) * error)


def test_looks_share_what_may_go_wrong():
    one = days_of(np.random.default_rng(2).normal(size=28))
    found = judge_refit(one, looks=5).difference
    assert found == pytest.approx(mean_by_day(one, 1 - 2 * 0.05 / 5))


def test_a_change_is_judged_by_the_mixture_of_de_la_pena():
    "The ends of the interval are where the supermartingale, mixed by a grid, is 1 / alpha"
    x = np.random.default_rng(3).normal(-0.004, 0.006, 60)
    policy = ChangePolicy()
    found = judge_change(days_of(x), policy).difference
    # the mixture integrated by numbers: lambda has precision rho
    rho = 4 * policy.spread**2
    grid = np.linspace(-4000, 4000, 200_001)
    density = stats.norm.pdf(grid, scale=1 / np.sqrt(rho))
    for end in (found.low, found.high):
        total = (x - end).sum()
        squares = ((x - end) ** 2).sum()
        mixed = np.trapezoid(np.exp(grid * total - grid**2 * squares / 2) * density, grid)
        assert mixed == pytest.approx(1 / (2 * policy.alpha_each), rel=1e-4)


def test_an_equal_change_seldom_passes_at_any_look():
    policy = ChangePolicy(alpha=0.3)  # 5 % for each, so that few draws can tell
    wrong = 0
    for x in np.random.default_rng(4).normal(0, 0.006, (200, 40)):
        verdicts = (judge_change(days_of(x[:n]), policy) for n in range(2, 41, 2))
        wrong += any(verdict.passed for verdict in verdicts)
    assert wrong / 200 <= 0.05 + 4 * np.sqrt(0.05 * 0.95 / 200)


def test_a_trial_without_an_answer_ends_and_later_days_change_nothing():
    x = np.random.default_rng(5).normal(0, 0.006, 60)
    policy = ChangePolicy(patience=30)
    assert judge_change(days_of(x[:29]), policy).kind == 'go on'
    ended = judge_change(days_of(x[:30]), policy)
    assert ended.kind == 'refuse'
    assert judge_change(days_of(x), policy) == ended


def test_within_day_auc_is_that_of_a_t_test_of_days():
    rng = np.random.default_rng(6)
    day = np.repeat(np.arange(12), 80)
    y = (rng.random(len(day)) < 0.3).astype(float)
    good = np.clip(0.3 * y + 0.6 * rng.random(len(day)), 0, 1)
    poor = rng.random(len(day))
    found = auc_differences(y, good, poor, day)
    each = []
    for one in range(12):
        mine = day == one
        both = (within_day_auc(y[mine], p[mine], day[mine]) for p in (good, poor))
        each.append(next(both) - next(both))
    expected = stats.ttest_1samp(each, 0).confidence_interval()
    assert found.within_day == pytest.approx((np.mean(each), *expected))


def test_harm_in_one_slice_is_found_and_others_pass():
    rng = np.random.default_rng(7)
    day = np.repeat(np.arange(28), 400)
    p = rng.uniform(0.05, 0.6, len(day))
    y = (rng.random(len(day)) < p).astype(float)
    side = rng.permutation(len(day)) % 2
    harmed = np.where(side == 1, np.clip(p + 0.3, 0, 0.99), p)
    found = slice_verdicts(y, harmed, p, day, {'side': side})
    assert dict(found.select('slice', 'kind').iter_rows()) == {'0': 'pass', '1': 'refuse'}


@pytest.mark.parametrize('confidence', [1, 1.0, 1 - 1e-12, np.float64(1)])
def test_a_confidence_that_no_interval_reaches_is_refused_wherever_it_is_set(confidence):
    daily = days_of(np.random.default_rng(0).normal(-0.01, 0.001, 60))
    day = np.repeat(np.arange(28), 40)
    p = np.full(len(day), 0.5)
    y = (np.arange(len(day)) % 2).astype(float)
    for ask in (
        lambda: judge_refit(daily, confidence=confidence),
        lambda: slice_verdicts(y, p, p, day, {'all': day * 0}, confidence=confidence),
        lambda: RetrainPolicy(confidence=confidence),
    ):
        with pytest.raises(MlrefError, match='below 1.*nothing could pass'):
            ask()
    almost = judge_refit(daily, confidence=1 - 1e-6, looks=50)
    assert almost.passed and np.isfinite(almost.detectable)
