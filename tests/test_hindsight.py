"""Policies of retraining replayed: nobody looks ahead, planted differences are found"""

import numpy as np
import pytest

from mlref.core import DAY, Calendar, MlrefError, TrainingSet
from mlref.evaluate import Estimate
from mlref.hindsight import (
    WEEK,
    Deployment,
    look_back,
    month_starts,
    replay_deployments,
    score_decision,
    weekly_gaps,
    weekly_oracle,
)
from mlref.intervals import mean_by_day, paired_losses

CALENDAR = Calendar(day_begins=420, label_delay=2 * DAY)
BEGIN = 15796 * DAY + 420  # 2013-04-01T07:00Z
WEEKS = 6
A_DAY = 400


def some_weeks(seed=0):
    "Days of true probabilities and what came of them, and labels that are known a day later"
    rng = np.random.default_rng(seed)
    n = WEEKS * 7 * A_DAY
    cutoff = BEGIN + np.arange(n) * (WEEKS * WEEK) // n
    true = rng.uniform(0.05, 0.6, n)
    y = (rng.random(n) < true).astype(np.float32)
    ids = cutoff.astype(str) + np.arange(n).astype(str)
    X = np.zeros((n, 1), np.float32)
    rows = TrainingSet(ids, cutoff, cutoff + DAY, y, X, ('x',), {}, CALENDAR)
    return rows, true


def moved(p, shift):
    "Scores whose log-odds are off"
    odds = np.log(p / (1 - p)) + shift
    return 1 / (1 + np.exp(-odds))


@pytest.mark.parametrize('seed', range(3))
def test_the_oracle_takes_the_best_of_those_trained_by_then(seed):
    rows, true = some_weeks(seed)
    scores = {'poor': moved(true, 1.0), 'fair': moved(true, 0.4), 'right': true}
    trained = [
        Deployment('poor', BEGIN),
        Deployment('fair', BEGIN + WEEK + 1),  # a minute into the second week
        Deployment('right', BEGIN + 4 * WEEK),  # as the fifth begins
    ]
    chosen = weekly_oracle(trained, scores, rows.y, rows.cutoff, BEGIN)
    assert [each.version for each in chosen] == ['poor', 'poor', 'fair', 'fair', 'right', 'right']
    assert [each.since for each in chosen] == [BEGIN + k * WEEK for k in range(WEEKS)]


def test_labels_of_later_weeks_change_no_choice_of_the_oracle():
    rows, true = some_weeks()
    scores = {'a': moved(true, 0.3), 'b': moved(true, -0.3)}
    trained = [Deployment(name, BEGIN) for name in scores]
    later = rows.cutoff >= BEGIN + 3 * WEEK
    turned = np.where(later, 1 - rows.y, rows.y)
    found = [weekly_oracle(trained, scores, y, rows.cutoff, BEGIN)[:3] for y in (rows.y, turned)]
    assert found[0] == found[1]


def test_an_oracle_without_a_model_says_so():
    rows, true = some_weeks()
    late = [Deployment('a', BEGIN + 1)]
    with pytest.raises(MlrefError, match='begin later'):
        weekly_oracle(late, {'a': true}, rows.y, rows.cutoff, BEGIN)


def test_a_row_is_scored_by_the_newest_deployment_of_its_minute():
    cutoff = BEGIN + np.arange(5)
    scores = {'a': np.full(5, 0.1), 'b': np.full(5, 0.2)}
    turns = [Deployment('a', BEGIN), Deployment('b', BEGIN + 2), Deployment('a', BEGIN + 4)]
    assert replay_deployments(scores, turns, cutoff).tolist() == [0.1, 0.1, 0.2, 0.2, 0.1]
    with pytest.raises(MlrefError, match='the first by 2013-04-01T07:00Z'):
        replay_deployments(scores, turns[1:], cutoff)


def test_months_begin_with_the_scoring_day_of_the_first():
    year = month_starts(BEGIN, BEGIN + 274 * DAY, CALENDAR)
    told = [np.datetime64(int(each), 'm').astype(str) for each in year]
    assert told == [f'2013-{month:02}-01T07:00' for month in range(5, 13)]
    # a run that ends on the morning of a first has no day of that month
    assert month_starts(BEGIN, BEGIN + 30 * DAY, CALENDAR) == []
    assert len(month_starts(BEGIN, BEGIN + 31 * DAY, CALENDAR)) == 1


def test_the_interval_of_planted_differences_holds_what_was_planted():
    held = 0
    for seed in range(40):
        rows, true = some_weeks(seed)
        off = moved(true, 0.25)
        rng = np.random.default_rng(seed + 1000)
        y = (rng.random(len(true)) < true).astype(np.float32)
        found = mean_by_day(paired_losses(y, off, true, rows.day))
        expected = np.mean(true * np.log(true / off) + (1 - true) * np.log((1 - true) / (1 - off)))
        held += found.low <= expected <= found.high
        assert found.value > 0
    assert held >= 34  # of 40 at .95: fewer has a chance of about one in a thousand


def test_equal_scores_differ_by_nothing():
    rows, true = some_weeks()
    seen = look_back('promote', rows, true, true, 0.002)
    assert (seen.verdict, seen.served, seen.days) == ('even', Estimate(0, 0, 0), WEEKS * 7)


@pytest.mark.parametrize(
    ('action', 'better', 'worse'),
    [('promote', 'gain', 'false promotion'), ('refuse', 'missed gain', 'rightly refused')],
)
def test_hindsight_finds_a_planted_gain_and_a_planted_harm(action, better, worse):
    rows, true = some_weeks()
    # what no map of two numbers can mend
    noisy = moved(true, np.random.default_rng(1).normal(0, 1, len(true)))
    assert look_back(action, rows, true, noisy, 0.002).verdict == better
    assert look_back(action, rows, noisy, true, 0.002).verdict == worse


def test_a_loss_within_the_margin_faults_no_promotion():
    assert score_decision('promote', Estimate(0.0018, 0.0016, 0.002), 0.002) == 'even'
    assert score_decision('promote', Estimate(0.0031, 0.0021, 0.004), 0.002) == 'false promotion'
    assert score_decision('refuse', Estimate(-0.001, -0.002, 0.0), 0.002) == 'even'


def test_the_gap_of_a_week_is_its_own():
    rows, true = some_weeks()
    level = rows.y.astype(float)
    second = (rows.cutoff - BEGIN) // WEEK == 1
    gaps = weekly_gaps(rows.y, np.where(second, level * 0.5, level), rows.cutoff, BEGIN)
    assert gaps['n'].to_list() == [7 * A_DAY] * WEEKS
    assert (gaps['gap'].abs() > 1e-12).to_list() == [False, True, False, False, False, False]
    assert gaps['gap'][1] == pytest.approx(-level[second].mean() / 2)
