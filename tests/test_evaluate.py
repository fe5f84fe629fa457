"""What the gates let through, in numbers a page has no time for: equal, mistaught, stale models"""

import json
import os
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest

from mlref.core import DAY, TrainingSet, known_by, parse_time
from mlref.evaluate import delong_interval, paired_auc_difference, paired_difference, swap_by_day
from mlref.flights.events import raw_folder, read_year
from mlref.flights.task import flights_task, gate_slices
from mlref.gates import Gate, all_passed, better_than_champion, no_slice_worse, well_calibrated
from mlref.recipes import fit_recipe
from mlref.slices import slice_differences
from mlref.training_set import training_set

DEEP = os.environ.get('MLREF_DEEP') == '1'
# of 50 equals a share cannot be told: the first 50 pass 5 times, the next 350 together 9
EQUALS = 200
BAD = 20 if DEEP else 5
START = parse_time('2013-01-08')
FEBRUARY = parse_time('2013-02-01')
EDGE = parse_time('2013-03-20')  # the champion is judged from here on
END = parse_time('2013-05-01')


@pytest.fixture(scope='module')
def spring():
    events = read_year(raw_folder()).filter(pl.col('known_time') < END)
    return training_set(events, flights_task(), START, END)


def learn(table, start, end, kind='logistic', seed=0):
    "A model of what was known by `end`, of cut-offs from `start` on; the last week is stopped on"
    edge = end - 7 * DAY
    past = table.take((table.cutoff >= start) & (table.cutoff < edge))
    week = table.take((table.cutoff >= edge) & (table.cutoff < end))
    return fit_recipe(kind, known_by(past, edge), known_by(week, end), seed)


@pytest.fixture(scope='module')
def judged(spring):
    "The flights that judge"
    return known_by(spring.take(spring.cutoff >= EDGE), END)


@pytest.fixture(scope='module')
def champion(spring, judged):
    "Scores of a champion of ten weeks"
    return learn(spring, START, EDGE).predict(judged.X)


def ask_gates(judged: TrainingSet, challenger: np.ndarray, champion: np.ndarray) -> list[Gate]:
    slices = gate_slices(judged)
    return [
        better_than_champion(paired_auc_difference(judged.y, challenger, champion, judged.day)),
        well_calibrated(judged.y, challenger, champion),
        no_slice_worse(slice_differences(judged.y, challenger, champion, judged.day, slices)),
    ]


def test_equals_seldom_pass_and_more_often_when_flights_count_as_independent(
    champion, judged, spring
):
    # a fourth of the flights: 6 and 19 pass, 8 and 21 with the next ones, 8 and 24 of a third
    some = slice(None, None, 1 if DEEP else 4)
    y = judged.y[some]
    day = judged.day[some]
    other = learn(spring, FEBRUARY, EDGE, kind='torch').predict(judged.X)[some]
    pairs = [swap_by_day(champion[some], other, day, seed) for seed in range(EQUALS)]
    by_days = 0
    for seed, pair in enumerate(pairs):
        found = paired_auc_difference(y, *pair, day, seed=seed)
        by_days += better_than_champion(found).passed
    by_flights = 0
    for seed, pair in enumerate(pairs[:20]):
        found = paired_difference(y, *pair, np.arange(len(y)), n=100, seed=seed)
        by_flights += better_than_champion(found).passed
    delongs = [better_than_champion(delong_interval(y, *pair)).passed for pair in pairs]
    print(
        f'of {EQUALS} equals {by_days} pass by days, {sum(delongs)} by DeLong; of the first 20,'
        f' {by_flights} by flights, {sum(delongs[:20])} by DeLong'
    )
    assert by_days <= 0.08 * EQUALS and sum(delongs) > by_days
    assert abs(by_flights - sum(delongs[:20])) <= 3  # two ways to take flights for independent


@pytest.mark.parametrize('seed', range(BAD))
def test_a_challenger_of_shuffled_labels_is_refused(champion, judged, spring, seed):
    known = spring.take(~np.isnan(spring.y))
    shuffled = replace(known, y=np.random.default_rng(seed).permutation(known.y))
    wild = learn(shuffled, FEBRUARY, EDGE, seed=seed)
    answers = ask_gates(judged, wild.predict(judged.X), champion)
    assert not all_passed(answers) and not answers[0].passed


@pytest.mark.parametrize('window', range(BAD))
def test_a_stale_challenger_is_refused(champion, judged, spring, window):
    start = START + window * DAY
    stale = learn(spring, start, start + 21 * DAY)
    answers = ask_gates(judged, stale.predict(judged.X), champion)
    assert not all_passed(answers) and not answers[0].passed


@pytest.fixture(scope='module')
def challenger(spring, judged):
    "Scores of a challenger of seven weeks"
    return learn(spring, FEBRUARY, EDGE).predict(judged.X)


def test_the_same_evidence_gives_the_same_answers_and_json_can_hold_them(
    champion, challenger, judged
):
    def written():
        gates = [asdict(gate) for gate in ask_gates(judged, challenger, champion)]
        return json.dumps(gates, allow_nan=False, default=float)

    assert written() == written()


def test_row_order_does_not_move_an_answer(champion, challenger, judged):
    order = np.random.default_rng(0).permutation(len(judged))
    answers = ask_gates(judged, challenger, champion)
    moved = ask_gates(judged.take(order), challenger[order], champion[order])
    for one, other in zip(answers, moved, strict=True):
        assert one.passed == other.passed
        assert abs(one.value - other.value) < 1e-9
