"""The bill against arithmetic in another form, fleets against every fleet there is, odd input"""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.capacity import LoadStep
from mlref.core import MlrefError
from mlref.cost import (
    HOURS,
    MachineType,
    Prices,
    Workload,
    compare_levers,
    cost_per_million,
    grow,
    monthly_bill,
    right_size,
    size_fleet,
    sustained_rate,
    total_cost,
)

MANY = settings(max_examples=200, deadline=None, derandomize=True)
PRICES = Prices(core_hour=0.04, disk=0.1, network=0.09)
USED = Workload(
    worker_rate=400.0,
    worker_memory=0.5,
    answer_bytes=300,
    record_bytes=250,
    months_kept=2,
    training_seconds=120,
    trainings=4,
)
machines = st.builds(
    MachineType,
    name=st.sampled_from('abcd'),
    cores=st.integers(1, 64),
    memory=st.floats(0.25, 256),
    hour=st.floats(0.001, 10),
)


def steps(*found):
    return [LoadStep(n, rate, p99 / 2, p99, errors, 100.0) for n, rate, p99, errors in found]


def test_a_rate_counts_only_within_the_deadline_and_without_errors():
    measured = steps((1, 100, 5, 0), (4, 300, 9, 0), (16, 500, 40, 0), (64, 900, 8, 1))
    assert [sustained_rate(measured, limit) for limit in (5, 39.9, 40)] == [100, 300, 500]
    with pytest.raises(MlrefError, match='the best of 4 had 5 ms'):
        sustained_rate(measured, 4.9)
    with pytest.raises(MlrefError, match='steps of load, got none'):
        sustained_rate([], 10)


@MANY
@given(st.lists(machines, min_size=1, max_size=5), st.floats(0, 1e6), st.integers(1, 5))
def test_the_first_fleet_is_the_cheapest_that_holds_the_peak(types, peak, least):
    "Tried: every number of machines below its own is too few, and no other type is cheaper"
    if all(each.memory < USED.worker_memory for each in types):
        with pytest.raises(MlrefError, match='offer a larger one'):
            right_size(USED, types, peak, 0.2, least)
        return
    fleets = right_size(USED, types, peak, 0.2, least)
    for fleet in fleets:
        each = fleet.workers * USED.worker_rate
        assert fleet.machines * each >= peak * 1.2 * (1 - 1e-12) and fleet.machines >= least
        assert fleet.machines == least or (fleet.machines - 1) * each < peak * 1.2
        assert fleet.workers <= fleet.machine.cores
        assert fleet.workers * USED.worker_memory <= fleet.machine.memory
    assert fleets[0].month == min(fleet.month for fleet in fleets)
    assert len(fleets) == sum(each.memory >= USED.worker_memory for each in types)


@MANY
@given(machines.filter(lambda each: each.memory >= 0.5), st.floats(1, 1e9), st.floats(0, 1))
def test_a_bill_is_what_another_form_of_the_sum_gives(machine, answers, running):
    fleet = size_fleet(USED, machine, 1000)
    expected = fleet.month * running
    expected += 4 * 120 / 3600 * 0.04
    expected += answers * (250 * 2 * 0.1 + 300 * 0.09) / 1e9
    bill = monthly_bill(fleet, USED, PRICES, answers, running)
    assert total_cost(bill) == pytest.approx(expected)
    assert cost_per_million(bill, answers) == pytest.approx(expected * 1e6 / answers)
    assert fleet.month == pytest.approx(fleet.machines * machine.hour * HOURS)


def test_more_traffic_never_costs_less_and_a_million_never_more():
    types = [MachineType('a', 1, 2, 0.03), MachineType('b', 4, 16, 0.11)]
    found = grow(USED, types, PRICES, 1e6, 20, [2.0**i for i in range(16)])
    totals = [total_cost(one.bill) for one in found]
    assert totals == sorted(totals)
    million = [cost_per_million(one.bill, one.answers) for one in found]
    least = [one.fleet.machines == 2 for one in found]
    assert million[: sum(least)] == sorted(million[: sum(least)], reverse=True)
    assert not all(least)


def test_a_lever_saves_what_a_bill_without_it_says():
    types = [MachineType('a', 1, 2, 0.03)]
    saved = compare_levers(USED, types, PRICES, 1e9, 40_000)
    fleet = math.ceil(40_000 * 1.2 / 400)
    bill = total_cost(monthly_bill(size_fleet(USED, types[0], 40_000), USED, PRICES, 1e9))
    assert size_fleet(USED, types[0], 40_000).machines == fleet
    assert saved['record_bytes'] == pytest.approx(25 * 2 * 0.1 / bill)
    assert saved['training_seconds'] == pytest.approx(4 * 12 / 3600 * 0.04 / bill)
    assert saved['worker_memory'] == 0  # a core holds one worker
    assert list(saved.values()) == sorted(saved.values(), reverse=True)


@pytest.mark.parametrize(
    'make, says',
    [
        (lambda: replace(USED, worker_rate=math.nan), 'worker_rate'),
        (lambda: replace(USED, worker_memory=0), 'worker_memory'),
        (lambda: replace(USED, trainings=-1), 'trainings'),
        (lambda: replace(PRICES, disk=-0.1), 'disk'),
        (lambda: MachineType('a', 1.5, 4, 0.1), 'cores as a whole number'),
        (lambda: MachineType('a', 1, 4, math.inf), 'hour'),
        (lambda: size_fleet(USED, MachineType('a', 1, 0.4, 0.1), 10), 'choose a larger one'),
        (lambda: size_fleet(USED, MachineType('a', 1, 4, 0.1), math.nan), 'peak'),
        (lambda: size_fleet(USED, MachineType('a', 1, 4, 0.1), 10, least=0), 'least'),
        (lambda: right_size(USED, [], 10), 'none of 0'),
        (lambda: cost_per_million([], 0), 'answers'),
        (lambda: compare_levers(USED, [MachineType('a', 1, 4, 0.1)], PRICES, 1, 1, 1.0), 'better'),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(MlrefError, match=says):
        make()
