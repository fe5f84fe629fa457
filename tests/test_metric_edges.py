"""Metrics at their edges, against scikit-learn and statsmodels: ties, one class, float32, 0, 1"""

import os
import warnings

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from mlref.arguments import MlrefError
from mlref.calibration import CalibrationPolicy, fit_calibration
from mlref.core import DAY
from mlref.evaluate import (
    auc,
    average_precision,
    brier,
    calibrated_ece,
    delong_interval,
    ece,
    log_loss,
    reliability_table,
    within_day_auc,
)
from mlref.gates import no_serving_skew

DEEP = os.environ.get('MLREF_DEEP') == '1'
TRIES = settings(max_examples=2000 if DEEP else 100, deadline=None, derandomize=True)
# few values, so that many scores are equal; the ends, and what lies next to them in both precisions
ENDS = (0.0, 1.0, 0.5, 0.25, 1e-8, 1e-300, 1 - 2**-24, 1 - 2**-53)
SCORE = st.one_of(st.sampled_from(ENDS), st.floats(0, 1, width=32))
ROWS = st.lists(st.tuples(st.integers(0, 1), SCORE), min_size=1, max_size=40)
DTYPES = st.sampled_from([(np.int64, np.float64), (np.float32, np.float32), (np.bool_, np.float32)])


def columns(rows, kinds) -> tuple[np.ndarray, np.ndarray]:
    y, p = zip(*rows, strict=True)
    return np.array(y).astype(kinds[0]), np.array(p).astype(kinds[1])


@TRIES
@given(ROWS, DTYPES)
def test_log_loss_and_brier_score_are_those_of_scikit_learn(rows, kinds):
    y, p = columns(rows, kinds)
    exact = np.clip(p.astype(float), 1e-15, 1 - 1e-15)
    theirs = metrics.log_loss(y, exact, labels=[0, 1])
    assert log_loss(y, p) == pytest.approx(theirs, rel=1e-9)
    theirs = metrics.brier_score_loss(y, p.astype(float), labels=[0, 1])
    assert brier(y, p) == pytest.approx(theirs, abs=1e-12)


@TRIES
@given(ROWS, DTYPES)
def test_auc_and_average_precision_are_those_of_scikit_learn(rows, kinds):
    y, p = columns(rows, kinds)
    if len(set(y.tolist())) < 2:
        assert np.isnan(auc(y, p))
    else:
        assert auc(y, p) == pytest.approx(metrics.roc_auc_score(y, p), abs=1e-12)
    if not y.any():
        assert np.isnan(average_precision(y, p))
    else:
        assert average_precision(y, p) == pytest.approx(
            metrics.average_precision_score(y, p), abs=1e-12
        )


@TRIES
@given(ROWS, DTYPES, st.randoms(use_true_random=False))
def test_no_metric_depends_on_the_order_of_the_rows(rows, kinds, random):
    y, p = columns(rows, kinds)
    random.shuffle(rows)
    moved = columns(rows, kinds)
    for metric in (auc, average_precision, ece):
        assert metric(y, p) == pytest.approx(metric(*moved), rel=1e-12, nan_ok=True), metric
    for metric in (log_loss, brier):
        assert metric(y, p) == pytest.approx(metric(*moved), rel=1e-12), metric


@TRIES
@given(ROWS, DTYPES, st.integers(1, 20))
def test_equal_scores_are_in_one_group_and_every_row_in_one(rows, kinds, groups):
    y, p = columns(rows, kinds)
    table = reliability_table(y, p, groups)
    assert table.n.sum() == len(p) and table.n.min() > 0 and len(table.n) <= groups
    assert np.average(table.rate, weights=table.n) == pytest.approx(y.mean())
    ends = np.cumsum(table.n)[:-1]
    ordered = np.sort(p)
    assert (ordered[ends] > ordered[ends - 1]).all()


def test_a_wrong_float32_score_of_1_costs_what_a_float64_does():
    wrong = np.array([0.0, 1.0])
    p = np.array([1.0, 1.0])
    assert log_loss(wrong, p.astype(np.float32)) == log_loss(wrong, p) == pytest.approx(17.27, 0.01)


def test_a_constant_calibrated_score_has_no_calibration_error():
    y = np.r_[np.ones(240), np.zeros(760)]  # all the positives first: the worst order there is
    for kind in (np.float32, np.float64):
        assert ece(y, np.full(1000, 0.24, kind)) == pytest.approx(0, abs=1e-7)


def test_chance_alone_shows_the_calibration_error_of_900_rows():
    p = np.clip(np.random.default_rng(0).beta(2, 6, 900), 0, 1)
    chance = calibrated_ece(p)
    assert chance.value == pytest.approx(0.037, abs=0.006)
    assert chance.low < chance.value < chance.high


@pytest.mark.parametrize('kind', [np.uint8, np.int8, np.int64, np.bool_])
def test_scores_of_any_number_type_are_ranked(kind):
    y = np.array([0, 1, 0, 1, 1])
    p = np.array([0, 1, 0, 1, 0]).astype(kind)
    assert average_precision(y, p) == pytest.approx(metrics.average_precision_score(y, p))
    assert auc(y, p) == pytest.approx(metrics.roc_auc_score(y, p))


def test_pooled_and_within_day_are_two_numbers():
    random = np.random.default_rng(0)
    day = np.repeat(np.arange(40), 50)
    level = random.uniform(0.1, 0.9, 40)[day]
    y = (random.random(2000) < level).astype(float)
    by_hand = [metrics.roc_auc_score(y[day == d], (level + y / 9)[day == d]) for d in range(40)]
    assert within_day_auc(y, level + y / 9, day) == pytest.approx(np.mean(by_hand))
    assert auc(y, level) > 0.7 and within_day_auc(y, level, day) == 0.5
    alone = np.append(day, 99)  # a day of one row is no day
    assert within_day_auc(np.append(y, 1), np.append(level, 0.5), alone) == 0.5


def test_one_row_of_a_class_has_no_interval():
    found = delong_interval(
        np.array([0, 0, 1]), np.array([0.1, 0.2, 0.3]), np.array([0.3, 0.2, 0.1])
    )
    assert found.value == 1 and np.isnan([found.low, found.high]).all()


def test_nothing_compared_is_no_parity():
    found = no_serving_skew(np.zeros(0), np.zeros(0))
    assert not found.passed and 'nothing could be compared' in found.why


def fit(p, y, l2):
    "Shift and slope of a map"
    cutoff = np.zeros(len(p), np.int64)
    policy = CalibrationPolicy(l2=l2)
    found = fit_calibration(p, y, cutoff, cutoff, 10 * DAY, policy)
    return found.shift, found.slope


def test_a_free_map_is_that_of_statsmodels():
    random = np.random.default_rng(0)
    odds = random.normal(-1, 1.5, 3000)
    y = (random.random(3000) < 1 / (1 + np.exp(-(0.3 + 0.6 * odds)))).astype(float)
    p = 1 / (1 + np.exp(-odds))
    theirs = sm.GLM(y, sm.add_constant(odds), sm.families.Binomial()).fit()
    assert fit(p, y, 0.0) == pytest.approx(tuple(theirs.params), abs=1e-6)


@pytest.mark.parametrize('l2', [1e-6, 1.0, 1000.0])
def test_scores_of_0_and_1_get_the_map_of_least_loss(l2):
    random = np.random.default_rng(0)
    p = (random.random(20_000) < 0.5).astype(np.float32)
    y = np.where(random.random(20_000) < 0.1, 1 - p, p).astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        shift, slope = fit(p, y, l2)
    odds = np.where(p > 0.5, 1, -1) * np.log((1 - 1e-7) / 1e-7)
    best = sm.GLM(y, sm.add_constant(odds), sm.families.Binomial()).fit().params
    assert (shift, slope) == pytest.approx(tuple(best), abs=0.1)


def test_a_map_that_has_no_end_is_refused_in_words():
    apart = (np.array([0.2, 0.3, 0.7, 0.8]), np.array([0.0, 0.0, 1.0, 1.0]))
    same = (np.full(4, 0.3), np.array([0.0, 1.0, 0.0, 0.0]))
    for p, y in (apart, same):
        with pytest.raises(MlrefError, match='^expected .* take a larger l2'):
            fit(p, y, 0.0)
        assert np.isfinite(fit(p, y, 0.01)).all()
