"""Detectors beside loops a reader can check, and the constants that were fixed before the look"""

import json
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

from mlref.alarm_scores import exact_interval, harm_ahead, harm_episodes, score_alarms
from mlref.alarms import (
    NEVER,
    AlarmRule,
    Baseline,
    Cusum,
    DaysOut,
    EvidenceProcess,
    decode_rules,
    draw_seasons,
    encode_rules,
    first_alarms,
    limit_for,
    raise_alarms,
)
from mlref.core import digest
from mlref.ledger import read_ledger

ROOT = Path(__file__).parent.parent
RULES = json.loads((ROOT / 'nbs' / 'steps' / 'alarm_rules.json').read_text())
UNIT = Baseline(mean=0.0, spread=1.0, days=100)


@pytest.fixture
def deviations():
    x = np.random.default_rng(0).standard_t(3, (20, 60))
    x[:, 30:] += 1.0
    x[0, 5] = np.nan
    return x


def cusum_by_hand(x, slack, cut):
    found = []
    total = 0.0
    for value in x:
        step = 0.0 if np.isnan(value) else min(max(value, -cut), cut) - slack
        total = max(0.0, total + step)
        found.append(total)
    return found


def bets_by_hand(x, stakes, cut, horizon):
    "One bet begun every day and kept"
    z = np.nan_to_num(np.clip(x, -cut, cut))
    worth = []
    for day in range(len(z)):
        bets = [
            np.exp(sum(b * z[i] - (b * z[i]) ** 2 / 2 for i in range(start, day + 1)))
            for b in stakes
            for start in range(day + 1)
        ]
        worth.append(sum(bets) / horizon / len(stakes))
    return worth


def test_a_cusum_is_the_sum_that_never_falls_below_zero(deviations):
    for row in deviations:
        expected = cusum_by_hand(row, 0.3, 1.5)
        np.testing.assert_allclose(Cusum(0.3, 5.0, 1.5).statistic(row), expected, atol=1e-9)


def test_evidence_is_what_all_bets_are_worth(deviations):
    detector = EvidenceProcess()
    for row in deviations[:3]:
        expected = bets_by_hand(row, detector.stakes, detector.cut, detector.horizon)
        np.testing.assert_allclose(np.exp(detector.statistic(row)), expected, rtol=1e-9)


def test_evidence_rings_no_more_often_than_it_says_whatever_the_tails():
    rng = np.random.default_rng(1)
    for quiet in (rng.normal(size=(4000, 90)), rng.standard_t(3, (4000, 90))):
        detector = EvidenceProcess(alpha=0.05)
        rang = (detector.statistic(quiet) >= detector.limit).any(1).mean()
        assert rang <= 0.05


def test_a_limit_rings_as_often_as_it_was_set_for_and_one_day_less_slack_shows():
    quiet = np.random.default_rng(2).normal(size=(4000, 90))
    rule = AlarmRule('auc', 'auc', 'rises', UNIT, Cusum())
    limit = limit_for(rule, quiet, 0.02)
    strict = AlarmRule('auc', 'auc', 'rises', UNIT, Cusum(limit=limit))
    loose = AlarmRule('auc', 'auc', 'rises', UNIT, Cusum(slack=0.0, limit=limit))
    rang = (first_alarms((strict, loose), (quiet, quiet)) != NEVER).mean(1)
    assert abs(rang[0] - 0.02) < 0.005 and rang[1] > 0.2
    assert rang[2] == rang[1]  # what rings with an allowance rings without


def test_a_rule_begins_anew_after_it_rang():
    days = [date(2013, 1, 1) + timedelta(days=i) for i in range(20)]
    metrics = pl.DataFrame({'day': days, 'metric': 'auc', 'feature': '', 'value': [5.0] * 20})
    rule = AlarmRule('auc', 'auc', 'rises', UNIT, Cusum(slack=0.0, limit=5.0))
    rang = raise_alarms(metrics, (rule,))['day'].to_list()
    assert rang == days[4::5]


def test_seasons_are_made_of_days_that_follow_one_another():
    places = draw_seasons(100, 90, 7, 50)
    inside = np.diff(places[:, :84].reshape(50, 12, 7), axis=2)
    assert (inside == 1).all() and places.min() >= 0 and places.max() < 100


def test_the_fixed_rules_are_those_of_the_ledger():
    looks = read_ledger(ROOT / 'reports' / 'results' / 'ledger.jsonl')
    fixed = digest(RULES)[:12]
    about = [look for look in looks if look.get('constants') == fixed]
    assert about[0]['what'].endswith('before a look at July to December')
    later = [look for look in looks if str(look.get('what')).endswith('labels of July to December')]
    assert later and all(look['constants'] == fixed for look in later)
    assert looks.index(about[0]) < looks.index(later[0])
    RULES['policies']['the set'][0]['detector']['limit'] += 0.1
    assert digest(RULES)[:12] != fixed  # the test can fail
    RULES['policies']['the set'][0]['detector']['limit'] -= 0.1


def test_the_fixed_rules_can_be_read_and_written():
    for rows in RULES['policies'].values():
        rules = decode_rules(rows)
        assert decode_rules(json.loads(json.dumps(encode_rules(rules)))) == rules
    assert type(decode_rules(RULES['policies']['the set'])[0].detector) is Cusum


@pytest.mark.parametrize('count, n', [(0, 1), (0, 7), (3, 7), (7, 7), (40, 177)])
def test_exact_intervals_are_those_of_scipy(count, n):
    found = exact_interval(count, n)
    expected = stats.binomtest(count, n).proportion_ci(method='exact')
    np.testing.assert_allclose(found[1:], (expected.low, expected.high))


def test_harm_and_scores_beside_a_loop():
    rng = np.random.default_rng(3)
    days = [date(2013, 7, 1) + timedelta(days=i) for i in range(80)]
    totals = pl.DataFrame(
        {
            'day': days,
            'predicted': np.full(80, 0.25),
            'observed': np.clip(0.25 + np.cumsum(rng.normal(0, 0.03, 80)), 0, 1),
            'n': rng.integers(500, 1000, 80),
        }
    )
    harm = harm_ahead(totals)
    off = (totals['observed'] - totals['predicted']) * totals['n']
    for i in range(73):
        gap = off[i + 1 : i + 8].sum() / totals['n'][i + 1 : i + 8].sum()
        assert abs(harm['gap'][i] - gap) < 1e-9 and harm['harmed'][i] == (abs(gap) > 0.06)
    assert harm['harmed'][73:].null_count() == 7
    covered = sum((each.last - each.first).days + 1 for each in harm_episodes(harm))
    assert covered == harm['harmed'].sum() > 0
    always = score_alarms(days, harm)
    assert always.right == covered and always.found == always.episodes


def test_the_rule_of_old_counts_days():
    x = np.array([3.0, 0, 3, 3, 0, 0, 3, 0, 0])
    assert DaysOut().statistic(x).tolist() == [1, 1, 2, 3, 3, 3, 4, 3, 3]


def test_harm_is_of_the_days_of_the_calendar_and_not_of_the_next_rows():
    random = np.random.default_rng(4)
    every = pl.DataFrame(
        {
            'day': [date(2013, 7, 1) + timedelta(days=i) for i in range(60)],
            'predicted': random.uniform(0.1, 0.3, 60),
            'observed': random.uniform(0.1, 0.5, 60),
            'n': random.integers(1, 900, 60),
        }
    )
    gone = every.filter(random.random(60) < 0.7)
    empty = every.with_columns(
        n=pl.when(pl.col('day').is_in(gone['day'].implode())).then('n').otherwise(0),
        observed=pl.when(pl.col('day').is_in(gone['day'].implode())).then('observed'),
    )
    found = harm_ahead(gone)
    for row in found.iter_rows(named=True):
        last = row['day'] + timedelta(days=7)
        ahead = gone.filter((pl.col('day') > row['day']) & (pl.col('day') <= last))
        wanted = None
        if last <= gone['day'].max() and ahead.height:
            off = (ahead['observed'] - ahead['predicted']).dot(ahead['n'].cast(pl.Float64))
            wanted = pytest.approx(off / ahead['n'].sum())
        assert row['gap'] == wanted, row
    # a day that is missing and one without rows are the same
    same = harm_ahead(empty.filter(pl.col('day') <= gone['day'].max()))
    both = same.join(found, on='day', how='semi')
    assert both['harmed'].to_list() == found['harmed'].to_list()
    assert 0 < found['harmed'].sum() < found.height
