"""The policy of a fleet under anything that may come, and what its simulation keeps account of"""

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.arguments import MlrefError
from mlref.core import DAY_S
from mlref.fleet import (
    Autoscaler,
    AutoscalingConfig,
    AutoscalingState,
    FleetObservation,
    ReplicaModel,
    decide_replicas,
    desired_replicas,
    response_quantile,
    simulate_fleet,
    slower_share,
    summarize_fleet,
)

CONFIG = AutoscalingConfig(
    min_replicas=1,
    max_replicas=10,
    target_ongoing_requests=2.0,
    upscale_delay_s=30.0,
    downscale_delay_s=600.0,
)
PRICE = 0.25
numbers = st.floats(0, 1e6, allow_nan=False)


def observe(at=0.0, running=1, ongoing=0.0, spent=0.0):
    return FleetObservation(at, running, ongoing, spent)


@st.composite
def configs(draw):
    "Any bounds and factors, with or without a cap that pays at least for the minimum"
    low = draw(st.integers(0, 5))
    price = draw(st.sampled_from([0.0, PRICE]))
    spare = draw(st.sampled_from([math.inf, 0.0, 1.0, 20.0]))
    return AutoscalingConfig(
        min_replicas=low,
        max_replicas=max(1, low + draw(st.integers(0, 20))),
        target_ongoing_requests=draw(st.floats(0.1, 20)),
        upscale_delay_s=draw(st.floats(0, 120)),
        downscale_delay_s=draw(st.floats(0, 1200)),
        downscale_to_zero_delay_s=draw(st.none() | st.floats(0, 1200)),
        upscaling_factor=draw(st.floats(0.1, 3)),
        downscaling_factor=draw(st.floats(0.1, 3)),
        replica_cost_per_hour=price,
        max_cost_per_day=low * price * 24 + spare,
    )


@given(configs(), st.integers(0, 30), numbers, numbers, st.integers(0, 30))
def test_what_is_wanted_is_within_the_bounds(config, running, ongoing, at, wanted):
    state = AutoscalingState(wanted)
    decision = decide_replicas(config, state, observe(at, running, ongoing))
    assert config.min_replicas <= decision.replicas <= config.max_replicas
    again = decide_replicas(config, state, observe(at, running, ongoing))
    assert again == decision


@given(configs(), st.integers(0, 30), numbers, numbers)
def test_more_load_never_wants_fewer(config, running, one, other):
    # factors of different size on both sides of the target may only make the step larger
    low, high = sorted((one, other))
    assert desired_replicas(config, running, low) <= desired_replicas(config, running, high)


def first_change(config, ongoing, running, seconds=2000):
    "When a steady load first changes a fleet, and to how many"
    state = AutoscalingState(running)
    for at in range(0, seconds, 10):
        decision = decide_replicas(config, state, observe(float(at), running, ongoing))
        if decision.replicas != running:
            return at, decision.replicas
        state = decision.state
    return None


def test_a_wish_must_last_as_long_as_its_delay():
    assert first_change(CONFIG, 9, 2) == (30, 5)
    assert first_change(CONFIG, 1, 5) == (600, 1)
    assert first_change(CONFIG, 10, 5) is None
    assert first_change(replace(CONFIG, upscale_delay_s=0.0), 9, 2) == (0, 5)


def test_a_wish_that_changes_its_direction_waits_anew():
    state = AutoscalingState(4)
    waits = []
    for at, ongoing in enumerate([20, 20, 1, 20, 20, 20, 20]):
        decision = decide_replicas(CONFIG, state, observe(10.0 * at, 4, ongoing))
        waits.append(decision.reason)
        state = decision.state
    assert waits == ['waiting'] * 6 + ['upscale']
    # without the turn it would have been the fourth
    assert first_change(CONFIG, 20, 4) == (30, 10)


def test_the_last_replica_goes_by_itself():
    config = replace(CONFIG, min_replicas=0, downscale_to_zero_delay_s=60.0)
    assert first_change(config, 0, 5) == (600, 1)
    assert first_change(config, 0, 1) == (60, 0)
    assert first_change(config, 1, 0) == (30, 1)
    assert first_change(CONFIG, 0, 1) is None


def traffic(days=3, seed=0):
    "Requests a minute: days with a plateau, and one burst that no fleet of ten can answer"
    minutes = np.arange(days * 1440)
    rate = np.where(minutes % 1440 > 400, 40.0, 0.0)
    rate[1440 + 900 : 1440 + 1100] = 900.0
    return np.random.default_rng(seed).poisson(rate * 60).astype(float)


REPLICA = ReplicaModel(requests_per_s=25.0)


@pytest.mark.parametrize('start_s', [0.0, 60.0, 600.0])
def test_every_request_is_answered_refused_or_waiting(start_s):
    came = traffic()
    replica = replace(REPLICA, start_s=start_s)
    lived = simulate_fleet(replace(CONFIG, min_replicas=0), replica, came)
    waiting = came.cumsum() - lived.served.cumsum() - lived.refused.cumsum()
    assert np.allclose(waiting[:-1], lived.queued[1:], atol=1e-6)
    assert (lived.queued >= 0).all() and (lived.refused >= 0).all()
    assert (lived.running <= lived.paid).all() and lived.paid.max() <= 10
    assert lived.refused.sum() > 0 and lived.running.min() == 0


@settings(max_examples=15, deadline=None)
@given(configs(), st.integers(0, 9), st.sampled_from([30.0, 60.0, 300.0]))
def test_the_cap_is_never_exceeded(config, seed, step_s):
    came = traffic(2, seed)[: int(2 * DAY_S / step_s)]
    lived = simulate_fleet(config, REPLICA, came, step_s)
    cost = lived.paid * config.replica_cost_per_hour * step_s / 3600
    day = (np.arange(len(cost)) * step_s // DAY_S).astype(int)
    assert (np.bincount(day, cost) <= config.max_cost_per_day + 1e-6).all()


def test_a_cap_costs_refusals_and_is_felt_only_in_the_burst():
    came = traffic()
    config = replace(CONFIG, target_ongoing_requests=0.7, replica_cost_per_hour=PRICE)
    free = simulate_fleet(config, REPLICA, came)
    capped = simulate_fleet(replace(config, max_cost_per_day=20.0), REPLICA, came)
    costs = capped.paid.reshape(3, 1440).sum(1) / 60 * PRICE
    assert costs.max() <= 20.0 < free.paid.reshape(3, 1440).sum(1).max() / 60 * PRICE
    assert summarize_fleet(capped, PRICE).refused > summarize_fleet(free, PRICE).refused
    assert (free.paid[:1440] == capped.paid[:1440]).all()


def test_every_day_has_its_own_money():
    came = np.full(3 * 1440, 60 * 200.0)  # always more than the cap pays for
    config = replace(CONFIG, replica_cost_per_hour=PRICE, max_cost_per_day=20.0)
    costs = simulate_fleet(config, REPLICA, came).paid.reshape(3, 1440).sum(1) / 60 * PRICE
    assert costs == pytest.approx([20.0] * 3, abs=0.05)


def test_a_replica_that_starts_is_paid_for():
    came = np.full(30, 60 * 100.0)
    config = replace(CONFIG, upscale_delay_s=0.0)
    lived = simulate_fleet(config, replace(REPLICA, start_s=600.0), came)
    assert lived.paid[1] == 10 and lived.running[1] == 1
    assert lived.running[10] == 1 and lived.running[11] == 10


def test_a_small_factor_holds_no_fleet_for_ever():
    config = replace(CONFIG, downscaling_factor=0.05)
    assert [desired_replicas(config, n, 2.0) for n in (5, 2, 1)] == [4, 1, 1]


def test_a_fleet_that_follows_is_cheaper_than_one_for_the_peak():
    came = np.minimum(traffic(), 180 * 60)
    follows = replace(CONFIG, target_ongoing_requests=0.7, upscale_delay_s=0.0)
    peak = AutoscalingConfig(10, 10)
    auto = summarize_fleet(simulate_fleet(follows, REPLICA, came), PRICE)
    safe = summarize_fleet(simulate_fleet(peak, REPLICA, came), PRICE)
    assert auto.cost < 0.5 * safe.cost and safe.refused == 0 and auto.refused < 0.02


@pytest.mark.parametrize('running', [1, 4])
@pytest.mark.parametrize('load', [0.3, 0.7, 0.9])
def test_waiting_agrees_with_a_queue_of_single_requests(running, load):
    "Requests one by one through the same servers: p99 within a third"
    random = np.random.default_rng(1)
    n = 60_000
    came = random.exponential(1 / (load * running * 25.0), n).cumsum()
    work = random.exponential(1 / 25.0, n)
    free = [0.0] * running
    took = []
    for at, seconds in zip(came.tolist(), work.tolist(), strict=True):
        i = free.index(min(free))
        free[i] = max(free[i], at)
        took.append(free[i] - at + 0.04)  # the service of the model is of fixed length
        free[i] += seconds
    config = AutoscalingConfig(running, running)
    lived = simulate_fleet(config, REPLICA, np.full(600, load * running * 25.0 * 60))
    assert response_quantile(lived) == pytest.approx(np.quantile(took, 0.99), rel=0.34)
    assert slower_share(lived, response_quantile(lived)) == pytest.approx(0.01, abs=1e-6)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'min_replicas': -1}, 'min_replicas as a whole number from 0'),
        ({'min_replicas': 11}, 'max_replicas as a whole number from 11'),
        ({'initial_replicas': 11}, 'initial_replicas as a whole number from 1 to 10'),
        ({'target_ongoing_requests': 0.0}, 'target_ongoing_requests as a number from'),
        ({'upscaling_factor': math.nan}, 'upscaling_factor of AutoscalingConfig as float'),
        ({'downscale_delay_s': -1.0}, 'downscale_delay_s as a number from 0'),
        ({'replica_cost_per_hour': 1.0, 'max_cost_per_day': 23.0}, 'of at least 24, which 1'),
        ({'max_cost_per_day': math.nan}, 'max_cost_per_day'),
        ({'max_replicas': '3'}, 'max_replicas of AutoscalingConfig as int'),
    ],
)
def test_settings_that_cannot_be_are_refused(change, words):
    with pytest.raises(MlrefError, match='^expected ') as caught:
        replace(CONFIG, **change)
    assert words in str(caught.value)


def test_a_controller_keeps_its_state_and_bears_a_restarted_counter():
    "Six at a time for a minute, of a counter that begins anew in its middle"
    counts = [1]
    clock = iter(range(0, 1000, 10))
    busy = iter([0.0, 60.0, 120.0, 60.0, 120.0, 180.0, *[180.0] * 20])
    config = replace(CONFIG, look_back_period_s=10.0, downscale_delay_s=60.0)
    scaler = Autoscaler(
        config, lambda: next(busy), lambda: counts[-1], counts.append, lambda: float(next(clock))
    )
    reasons = [scaler.look().reason for _ in range(13)]
    assert reasons[:5] == ['waiting'] * 3 + ['upscale', 'steady']
    assert reasons[5:] == ['waiting'] * 6 + ['downscale', 'steady']
    assert counts == [1, 3, 1]


def test_a_controller_counts_the_days_money():
    at = DAY_S - 3600.0
    clock = iter([at, at + 1800, DAY_S + 600.0, DAY_S + 1200.0])
    config = replace(CONFIG, replica_cost_per_hour=1.0, max_cost_per_day=100.0)
    scaler = Autoscaler(config, float, lambda: 1, lambda n: None, lambda: next(clock))
    spent = []
    for _ in range(3):
        scaler.look()
        spent.append(scaler.spent)
    # what an interval that spans midnight cost counts for the day in which it ends
    assert spent == pytest.approx([0.5, 2400 / 3600, 3000 / 3600])


def test_the_policy_is_light():
    "A controller imports neither frames nor plots nor a server"
    code = 'import sys, mlref.fleet; print(*sys.modules)'
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    heavy = {'polars', 'pandas', 'matplotlib', 'torch', 'mlflow', 'starlette', 'pydantic'}
    assert not heavy & set(run.stdout.split())
