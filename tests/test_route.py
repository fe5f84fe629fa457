"""Routing: the same model for the same unit, everywhere, for the share that the plan says"""

import json
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlref.arguments import MlrefError
from mlref.route import (
    Assignment,
    Router,
    RoutingPlan,
    SegmentRule,
    Split,
    check_sample_ratio,
    decode_plan,
    encode_plan,
)

UNITS = [f'UA{i}-EWR-2013-01-{i % 28 + 1:02}' for i in range(20_000)]
BOTH = {'champion': 1.0, 'candidate': 1.0}
HEAVY = ('polars', 'torch', 'mlflow', 'pandas', 'matplotlib', 'duckdb', 'pyarrow', 'sklearn')
SHARES = st.floats(0, 1)


def canary(share, salt='may', **more):
    return Router(RoutingPlan(salt, Split(shares={'candidate': share}, **more)))


def python(code, text=''):
    "What a process of its own prints"
    words = [sys.executable, '-c', code]
    asked = subprocess.run(words, input=text, capture_output=True, text=True, timeout=60)
    assert asked.returncode == 0, asked.stderr
    return asked.stdout


def test_a_worker_that_routes_loads_nothing_heavy():
    code = f'import sys, mlref.route; print([n for n in {HEAVY} if n in sys.modules])'
    assert python(code).strip() == '[]'


def test_another_process_and_every_thread_assign_alike():
    code = """
import sys
from mlref.route import Router, RoutingPlan, Split
router = Router(RoutingPlan('may', Split(shares={'candidate': 0.3})))
print(''.join(router.assign(line.strip()).variant[1] for line in sys.stdin))
"""
    router = canary(0.3)
    mine = ''.join(router.assign(unit).variant[1] for unit in UNITS)
    assert python(code, '\n'.join(UNITS)).strip() == mine
    with ThreadPoolExecutor(8) as pool:
        assert ''.join(a.variant[1] for a in pool.map(router.assign, UNITS)) == mine


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), SHARES, SHARES, SHARES)
@example('', 0.0, 1.0, 1.0)
@example('\ud800', 0.5, 0.5, 0.5)
def test_a_raised_share_lets_nobody_out(unit, one, two, other):
    low, high = sorted((one, two))
    third = min(other, 1 - high)
    before = Router(RoutingPlan('s', Split(shares={'candidate': low, 'third': third})))
    after = Router(RoutingPlan('s', Split(shares={'candidate': high, 'third': third})))
    was, now = before.assign(unit).variant, after.assign(unit).variant
    assert was == before.assign(unit).variant
    assert now == was or (was, now) == ('champion', 'candidate')


def test_a_third_model_takes_from_the_default_alone():
    before = canary(0.3)
    mine = {unit for unit in UNITS if before.assign(unit).variant == 'candidate'}
    taken: set[str] = set()
    for third in (0.0, 0.05, 0.3, 0.7):
        router = Router(RoutingPlan('may', Split(shares={'candidate': 0.3, 'third': third})))
        units = {unit for unit in UNITS if router.assign(unit).variant == 'third'}
        assert {router.assign(unit).variant for unit in mine} == {'candidate'}
        assert taken <= units
        assert abs(len(units) / len(UNITS) - third) < 0.015
        taken = units


@pytest.mark.parametrize('share', [0.0, 0.001, 0.01, 0.05, 0.5, 0.999, 1.0])
def test_a_share_is_delivered(share):
    taken = sum(canary(share).assign(unit).variant == 'candidate' for unit in UNITS)
    spread = (share * (1 - share) / len(UNITS)) ** 0.5
    assert abs(taken / len(UNITS) - share) <= 4 * spread
    assert share not in (0.0, 1.0) or taken == share * len(UNITS)


def test_salts_are_independent_and_prefixes_no_trick():
    first = {unit for unit in UNITS if canary(0.1, 'may').assign(unit).variant == 'candidate'}
    second = {unit for unit in UNITS if canary(0.1, 'may1').assign(unit).variant == 'candidate'}
    assert 0.07 < len(first & second) / len(first) < 0.13
    with pytest.raises(MlrefError, match='letters, digits'):
        RoutingPlan('may:')


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), SHARES)
def test_both_score_every_request_whoever_answers(unit, share):
    assigned = canary(share, shadow=BOTH).assign(unit)
    assert {assigned.variant, *assigned.shadow} == {'champion', 'candidate'}
    assert len(assigned.shadow) == 1


def test_a_shadow_of_a_share_samples_every_variant_alike():
    router = canary(0.3, shadow={'third': 0.2})
    seen = Counter((a.variant, bool(a.shadow)) for a in map(router.assign, UNITS))
    for variant in ('champion', 'candidate'):
        all_of_it = seen[variant, True] + seen[variant, False]
        assert abs(seen[variant, True] / all_of_it - 0.2) < 0.02


def test_an_override_answers_and_does_not_count():
    router = canary(0.0, shadow=BOTH)
    for name in ('champion', 'candidate'):
        assert router.assign('x', override=name) == Assignment(name, counted=False)
    for odd in ('', 'Candidate', 'third'):
        with pytest.raises(MlrefError, match='a model of the plan among champion, candidate'):
            router.assign('x', override=odd)


def test_the_first_rule_that_fits_decides():
    everything = Split(shares={'candidate': 1.0})
    rules = (
        SegmentRule({'origin': ('EWR', 'JFK'), 'carrier': ('UA',)}, everything),
        SegmentRule({'origin': ('EWR',)}, Split()),
    )
    router = Router(RoutingPlan('may', everything, rules, default='old'))
    asked = [
        ({'origin': 'JFK', 'carrier': 'UA'}, 'candidate'),
        ({'origin': 'EWR', 'carrier': 'AA'}, 'old'),
        ({'origin': 'EWR'}, 'old'),
        ({}, 'candidate'),
        (None, 'candidate'),
    ]
    for segment, variant in asked:
        assert router.assign('x', segment).variant == variant


PLANS = [
    RoutingPlan('a'),
    RoutingPlan('b', Split(shares={'x': 0.25, 'y': 0.75}, shadow={'x': 0.5})),
    RoutingPlan('c', rules=(SegmentRule({'n': (1, None, 'a')}, Split()),), default='blue'),
]


@pytest.mark.parametrize('plan', PLANS, ids=lambda plan: plan.salt)
def test_a_plan_comes_back_from_a_file(plan):
    again = decode_plan(json.loads(json.dumps(encode_plan(plan))))
    assert again == plan
    assert [Router(again).assign(u) for u in UNITS[:99]] == [
        Router(plan).assign(u) for u in UNITS[:99]
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
KEYS = st.sampled_from(['salt', 'split', 'rules', 'default'])


@settings(max_examples=150, deadline=None)
@given(KEYS, JSON, st.sampled_from(PLANS))
def test_a_plan_with_anything_in_it_is_a_plan_or_one_sentence(key, value, plan):
    data = {**encode_plan(plan), key: value}
    try:
        found = decode_plan(data)
    except MlrefError as error:
        assert str(error).startswith('expected ') and '\n' not in str(error)
    else:
        assert encode_plan(found) == data or key in ('split', 'rules')


def test_a_misspelt_key_is_refused():
    data = encode_plan(PLANS[1])
    data['split']['share'] = data['split'].pop('shares')
    with pytest.raises(MlrefError, match='a split with shares, shadow, got'):
        decode_plan(data)


def test_a_ratio_that_is_right_never_rings_and_a_wrong_one_does():
    random = Random(0)
    planned = {'candidate': 0.1, 'champion': 0.9}

    def rings(share):
        counts = {'candidate': 0, 'champion': 0}
        for _ in range(4000):
            counts['candidate' if random.random() < share else 'champion'] += 1
            if check_sample_ratio(counts, planned).mismatch(0.01):
                return True
        return False

    assert sum(rings(0.1) for _ in range(60)) <= 3
    assert all(rings(0.15) for _ in range(10))


def test_what_no_plan_sent_is_a_mismatch():
    assert check_sample_ratio({'third': 1}, {'champion': 1.0}).mismatch()
    assert check_sample_ratio({'candidate': 3}, {'candidate': 0.0, 'champion': 1.0}).mismatch()
    assert not check_sample_ratio({}, {'candidate': 0.5, 'champion': 0.5}).mismatch()


def test_an_assignment_is_a_matter_of_microseconds():
    router = canary(0.05, shadow=BOTH)
    start = time.process_time()
    for unit in UNITS:
        router.assign(unit)
    assert (time.process_time() - start) / len(UNITS) < 15e-6  # 2 is asked of `mlref bench rollout`
