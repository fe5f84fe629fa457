"""Rollout: a rule without a memory, a log that has it, and two clocks

Null and worse candidates at a small count (the large ones: `mlref bench rollout`); processes that
die between a decision and the routers; a person and a machine who decide at once; the commands.
"""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlref.confidence import PairedScores, bounded_sequence, mature_differences, mean_sequence
from mlref.core import DAY, Calendar, MlrefError, digest
from mlref.evaluate import Estimate
from mlref.gates import Gate
from mlref.guardrails import VariantCounts, check_guardrails, check_shift, excess_evidence
from mlref.history import model_lineage
from mlref.model import TorchPredictor
from mlref.networks import linear_net
from mlref.promotion import Promotion, promote, promotions, rollback
from mlref.registry import Registry, TrainingRun, register_model, version_by_alias
from mlref.rollout import (
    Rollout,
    RolloutDecision,
    RolloutEvidence,
    RolloutPolicy,
    RolloutStep,
    apply_decision,
    decide_rollout,
    decode_rollout,
    encode_rollout,
    rollout_plan,
    start_rollout,
)
from mlref.rollout_state import (
    begin_rollout,
    gather_evidence,
    publish_plan,
    read_rollout,
    require_rollout,
    scored_rows,
    sync_routing,
    take_decision,
)
from mlref.route import Router, encode_plan
from mlref.variants import VariantMeters, counts_folder

FORK = multiprocessing.get_context('forkserver')
NOW = 22_500_000  # a minute of 2012
GOOD = [Gate('better_than_champion', True, 0.01, -0.003, '')]
STEPS = (RolloutStep(0.0, 10, 60), RolloutStep(0.1, 5, 60), RolloutStep(0.5, 10, 60))
POLICY = RolloutPolicy(steps=STEPS, max_days=30)


# the rule


@st.composite
def evidences(draw):
    "Evidence of some thirty days, in order of time"
    now = 0
    found = []
    for _ in range(draw(st.integers(1, 30))):
        now += draw(st.sampled_from([7, 50, 70, DAY, 2 * DAY]))
        middle = draw(st.floats(-0.02, 0.02))
        width = draw(st.sampled_from([0.0, 0.001, 0.01, inf]))
        alarms = ('an alarm',) if draw(st.integers(0, 19)) == 0 else ()
        difference = Estimate(middle, middle - width, middle + width)
        requests = draw(st.integers(0, 20))
        found.append(RolloutEvidence(now, requests, alarms, now // DAY, difference))
    return found


def live(found, again=False):
    "How a rollout goes through evidence; with `again` it is written and read before each look"
    rollout = start_rollout('2', '1', 0, POLICY)
    taken = []
    for evidence in found:
        if again:
            rollout = decode_rollout(encode_rollout(rollout))
        decision = decide_rollout(rollout, evidence)
        after = apply_decision(rollout, decision, evidence.now)
        taken.append((rollout, evidence, decision, after))
        rollout = after
        if rollout.status != 'running':
            break
    return taken


@settings(max_examples=150, deadline=None)
@given(evidences())
def test_no_evidence_breaks_the_rules(found):
    for rollout, evidence, decision, after in live(found):
        step = rollout.policy.steps[rollout.step]
        worse = evidence.difference.low > 0
        if evidence.alarms or worse or evidence.now >= 30 * DAY:
            assert decision.action == 'roll back' and after.share == 0
            continue
        assert after.share >= rollout.share or after.status == 'promoted'
        if decision.action in ('advance', 'promote'):
            assert evidence.requests >= step.requests
            assert evidence.now >= rollout.since + step.minutes
        if decision.action == 'promote':
            assert rollout.step == 2 and evidence.difference.high < rollout.policy.margin
        assert decision.action != 'hold' or after == rollout


@settings(max_examples=60, deadline=None)
@given(evidences())
def test_a_restart_before_every_look_changes_nothing(found):
    assert live(found) == live(found, again=True)


def test_a_rollout_ends():
    forever = [RolloutEvidence(day * DAY, 900, (), day) for day in range(1, 60)]
    *_, (_, evidence, decision, _) = live(forever)
    assert (evidence.now, decision.action) == (30 * DAY, 'roll back')
    assert 'undecided after 30 days' in decision.why


def test_routers_never_leave_a_unit_that_the_candidate_has():
    units = [f'unit {i}' for i in range(2000)]
    rollout = start_rollout('2', '1', NOW, POLICY)
    before: set[str] = set()
    for step in range(3):
        router = Router(rollout_plan(replace(rollout, step=step)))
        mine = {unit for unit in units if router.assign(unit).variant == 'candidate'}
        assert before <= mine and len(mine) == pytest.approx(2000 * STEPS[step].share, abs=100)
        before = mine
    over = Router(rollout_plan(replace(rollout, status='rolled back')))
    assert {over.assign(unit).variant for unit in units} == {'champion'}


# the slow clock


def null_days(n, days, seed=0, correlation=0.0):
    "Days of candidates that are as good; neighbours may share their luck"
    draw = np.random.default_rng(seed)
    noise = draw.standard_t(5, size=(n, days + 20))
    for day in range(1, days + 20):
        noise[:, day] += correlation * noise[:, day - 1]
    return noise[:, 20:]


@pytest.mark.parametrize('correlation', [0.0, 0.15])
def test_null_rollouts_are_seldom_condemned_and_a_peeking_test_condemns_many(correlation):
    x = null_days(1000, 56, correlation=correlation)
    found = mean_sequence(x, 1.3)
    wrong = ((found.low > 0) | (found.high < 0)).any(1).sum()
    n = np.arange(1, 57)
    error = np.sqrt((np.cumsum(x**2, 1) / n - found.mean**2) / np.maximum(n - 1, 1))
    peeked = (np.abs(found.mean) > 1.96 * error)[:, 6:].any(1).sum()
    assert wrong <= 62 < 250 < peeked


def test_a_worse_candidate_is_found_in_weeks():
    found = mean_sequence(null_days(300, 42) / 1.29 + 0.9, 1.0)  # of one deviation a day
    assert (found.low > 0).any(1).mean() >= 0.9


def test_the_interval_is_the_supermartingale_turned_round():
    for x in null_days(20, 30):
        found = mean_sequence(x, 0.7, alpha=0.1, weight=3.0)
        rho = 3 * 0.7**2
        known = np.flatnonzero(np.isfinite(found.low))
        assert len(known) >= 8
        for look in known:
            for mu in (found.low[look], found.high[look]):
                inside = x[: look + 1] - mu
                squares = (inside**2).sum() + rho
                evidence = np.sqrt(rho / squares) * np.exp(inside.sum() ** 2 / (2 * squares))
                assert evidence == pytest.approx(10, rel=1e-6)


def test_a_spread_that_is_wrong_costs_width_and_not_truth():
    x = null_days(500, 56)
    for spread in (0.05, 1.3, 30.0):
        found = mean_sequence(x, spread)
        assert ((found.low > 0) | (found.high < 0)).any(1).sum() <= 40


def test_bounded_values_are_covered_at_all_looks():
    draw = np.random.default_rng(0)
    missed = 0
    for p in np.repeat([0.02, 0.5, 0.9], 100):
        found = bounded_sequence((draw.random(400) < p).astype(float), 0, 1)
        missed += bool(((found.low > p) | (found.high < p)).any())
    assert missed <= 15
    assert found.last.high - found.last.low < 0.2


def paired(days=6, rows=20, delay=2 * DAY):
    "Rows of some days whose yes is known at once and whose no is known late"
    cutoff = np.arange(days * rows) * DAY // rows
    y = (np.arange(days * rows) % 4 == 0).astype(float)
    label_time = np.where(y == 1, cutoff + 1, cutoff + delay - 1)
    half = np.full(days * rows, 0.5)
    return PairedScores(cutoff, half, half + 0.4 * (y - 0.5), y, label_time)


CALENDAR = Calendar(label_delay=2 * DAY)


def test_only_whole_mature_days_count_whatever_the_outcome():
    pairs = paired()
    for now in range(0, 10 * DAY, DAY // 3):
        found = mature_differences(pairs, CALENDAR, 0, now)
        assert found.day.tolist() == list(range(min(6, max(0, now // DAY - 2))))
        assert set(found.rows.tolist()) <= {20}
    later = mature_differences(pairs, CALENDAR, DAY + 1, 10 * DAY)
    assert later.day.tolist() == [2, 3, 4, 5]


def test_a_day_that_was_looked_at_does_not_change():
    pairs = paired()
    late = replace(pairs, label_time=np.where(pairs.cutoff == 0, 9 * DAY, pairs.label_time))
    before = mature_differences(late, CALENDAR, 0, 3 * DAY)
    after = mature_differences(late, CALENDAR, 0, 20 * DAY)
    assert before.difference[0] == after.difference[0] and before.rows[0] == after.rows[0] == 19


# the fast clock


def test_guardrails_ring_for_the_broken_and_not_for_the_honest():
    draw = np.random.default_rng(0)

    def rings(rate):
        mine = draw.random(3000) < 0.1
        bad = draw.random(3000) < np.where(mine, rate, 0.02)
        for i in np.flatnonzero(bad & mine):
            seen, own = bad[: i + 1], mine[: i + 1]
            champion = VariantCounts(int((~own).sum()), int((seen & ~own).sum()))
            candidate = VariantCounts(int(own.sum()), int((seen & own).sum()))
            if check_guardrails(champion, candidate):
                return int((seen & own).sum())
        return 0

    assert sum(rings(0.02) > 0 for _ in range(100)) <= 2
    broken = [rings(1.0) for _ in range(20)]
    assert min(broken) > 0 and max(broken) <= 12


@given(st.integers(0, 50), st.integers(0, 50), st.floats(0.01, 0.99), st.floats(1, 3))
def test_a_bad_event_of_the_candidate_is_evidence_and_one_of_the_champion_is_not(
    bad, others, share, ratio
):
    evidence = excess_evidence(bad, others, share, ratio)
    assert excess_evidence(bad + 1, others, share, ratio) >= evidence
    assert excess_evidence(bad, others + 1, share, ratio) <= evidence


def test_shifted_scores_are_seen():
    p = np.random.default_rng(0).beta(1, 4, 2000)
    assert check_shift(p, np.clip(p + 0.02, 0, 1)) == ()
    assert 'scores shifted by +0.' in check_shift(p, np.full(2000, 0.5))[0]
    assert check_shift(p[:0], p[:0]) == ()


# the log


def model(seed):
    torch.manual_seed(seed)
    return TorchPredictor(linear_net(('a', 'b'), {}), 22_000_000 + seed)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "Three versions, the first is champion"
    at = tmp_path_factory.mktemp('rollout') / 'registry'
    registry = Registry(at, name='late-visits')
    for seed in (0, 1, 2):
        register_model(registry, model(seed), TrainingRun(digest([seed])), gates=GOOD)
    promote(registry, '1', NOW - DAY, 'bootstrap')
    return at


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / 'registry'))


def opened(folder):
    return Registry(folder, name='late-visits')


def begin(folder, version='2'):
    return begin_rollout(opened(folder), version, NOW, 'all gates passed', 'ann', POLICY)


ADVANCE = RolloutDecision('advance', 'no alarm')
PROMOTE = RolloutDecision('promote', 'not worse')
BACK = RolloutDecision('roll back', 'an alarm')


def test_ids_of_rows_without_a_rollout_are_those_of_before():
    row = Promotion('', 10, 'ann', '', '1', 'm1', 'bootstrap', '', False)
    before = {'after': '', 'at': 10, 'who': 'ann', 'was': '', 'to': '1', 'model': 'm1'}
    before |= {'why': 'bootstrap', 'gates': '', 'forced': False}
    assert row.id == digest(before)
    assert replace(row, rollout='{}').id != row.id


def test_a_rollout_is_read_back_by_another_process_and_ends_in_a_promotion(folder):
    begun = begin(folder)
    assert read_rollout(opened(folder)) == begun
    second = take_decision(opened(folder), begun, ADVANCE, NOW + 60)
    assert (second.rollout.step, version_by_alias(opened(folder))) == (1, '1')
    assert take_decision(opened(folder), second, RolloutDecision('hold', ''), NOW) == second
    done = take_decision(opened(folder), second, PROMOTE, NOW + 120)
    registry = opened(folder)
    assert (done.rollout.status, version_by_alias(registry)) == ('promoted', '2')
    assert (version_by_alias(registry, 'previous'), read_rollout(registry)) == ('1', None)
    kinds = [step.kind for step in model_lineage(registry, '2')]
    assert kinds.count('rollout') == 3
    assert [row.to for row in promotions(registry)] == ['1', '1', '1', '2']
    assert rollback(registry, NOW + 180, 'worse').to == '1'


def test_a_rollback_during_a_rollout_goes_to_the_champion_before(folder):
    promote(opened(folder), '2', NOW - 60, 'better')
    begun = begin(folder, '3')
    row = rollback(opened(folder), NOW + 1, 'complaints', 'bob')
    assert (row.was, row.to, read_rollout(opened(folder))) == ('2', '1', None)
    with pytest.raises(MlrefError, match='bob has written another'):
        take_decision(opened(folder), begun, PROMOTE, NOW + 2)
    with pytest.raises(MlrefError, match='the last row is by bob: rollback: complaints'):
        require_rollout(opened(folder))
    assert version_by_alias(opened(folder)) == '1'


def test_of_two_who_decide_at_once_one_is_refused(folder):
    begun = begin(folder)
    gate = threading.Barrier(2, timeout=60)
    said = []

    def decide(decision):
        registry = opened(folder)
        gate.wait()
        try:
            said.append(take_decision(registry, begun, decision, NOW + 60).rollout.status)
        except MlrefError as error:
            said.append(str(error))

    threads = [threading.Thread(target=decide, args=[each]) for each in (PROMOTE, BACK)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [each for each in said if each.startswith('expected ')]
    assert len(refused) == 1 and len(promotions(opened(folder))) == 3
    live = {'promoted': '2', 'rolled back': '1'}[next(x for x in said if x not in refused)]
    assert version_by_alias(opened(folder)) == live


def test_a_version_that_may_not_become_champion_does_not_begin(folder):
    bad = [Gate('better_than_champion', False, -0.02, -0.003, '')]
    register_model(opened(folder), model(7), TrainingRun(digest([7])), gates=bad)
    with pytest.raises(MlrefError, match='did not: better_than_champion'):
        begin(folder, '4')
    with pytest.raises(MlrefError, match='version 1 for both'):
        begin(folder, '1')
    begin(folder)
    with pytest.raises(MlrefError, match='version 2 is at 0%'):
        begin(folder, '3')
    assert len(promotions(opened(folder))) == 2


def _die_before_routers(folder, server):
    registry = opened(folder)
    take_decision(registry, require_rollout(registry), ADVANCE, NOW + 60)
    os.kill(os.getpid(), signal.SIGKILL)
    sync_routing(registry, server)


def test_killed_between_row_and_routers_the_next_who_looks_finishes_it(folder, tmp_path):
    server = tmp_path / 'served'
    begun = begin(folder)
    assert sync_routing(opened(folder), server) == 1
    process = FORK.Process(target=_die_before_routers, args=(folder, server))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    state = json.loads((server / 'state.json').read_text())
    assert state['plan'] == encode_plan(rollout_plan(begun.rollout))
    assert sync_routing(opened(folder), server) == sync_routing(opened(folder), server) == 2
    state = json.loads((server / 'state.json').read_text())
    assert state['plan']['split']['shares'] == {'candidate': 0.1}


def test_the_state_of_a_server_keeps_what_others_wrote(folder, tmp_path):
    file = tmp_path / 'state.json'
    file.write_text(json.dumps({'champion': 'abc', 'epoch': 7}))
    plan = rollout_plan(start_rollout('2', '1', NOW))
    assert publish_plan(tmp_path, plan) == 8 == publish_plan(tmp_path, plan)
    found = json.loads(file.read_text())
    assert (found['champion'], found['epoch']) == ('abc', 8)
    file.write_text('[1]')
    with pytest.raises(MlrefError, match='state of a server'):
        publish_plan(tmp_path, plan)
    assert file.read_text() == '[1]'


# what it has seen


def messages(rollout, days, worse=0.0, rows=200):
    "What servers write: answers and shadows; and the labels"
    draw = np.random.default_rng(3)
    router = Router(rollout_plan(rollout))
    answers, shadows, labels = [], [], []
    for i in range(days * rows):
        cutoff = rollout.started + i * DAY // rows
        truth = draw.beta(1, 3)
        labels.append((f'v{i}', float(draw.random() < truth), cutoff + 60))
        scores = {'champion': truth, 'candidate': truth + worse * (0.9 - truth)}
        about = {'request_id': f'r{i}', 'entity_id': f'v{i}', 'cutoff': cutoff}
        assigned = router.assign(f'v{i}')
        for name in (assigned.variant, *assigned.shadow):
            said = {} if name == 'champion' else {'variant': name}  # as rows leave out defaults
            row = {**about, **said, 'scored_at': cutoff, 'p': scores[name]}
            (answers if name == assigned.variant else shadows).append(row)
    columns = {'entity_id': pl.String, 'y': pl.Float64, 'label_time': pl.Int64}
    return (answers, shadows), pl.DataFrame(labels, schema=columns, orient='row')


DAILY = Calendar(label_delay=DAY)
AT_STEP = Rollout('2', '1', NOW // DAY * DAY, NOW // DAY * DAY, step=1, policy=POLICY)


def seen(rollout, found, labels, day, **more):
    rows = scored_rows(*found, rollout.started)
    return gather_evidence(rollout, rows, labels, DAILY, rollout.started + day * DAY, **more)


def test_evidence_counts_a_unit_once_and_leaves_out_who_chose():
    found, labels = messages(AT_STEP, 4, worse=0.1)
    evidence = seen(AT_STEP, found, labels, 4)
    assert evidence.mature_days == 3 and evidence.alarms == ()
    assert evidence.difference.value > 0.001
    assert 50 < evidence.requests < 115  # a tenth of 800
    again = [[{**row, 'request_id': 'x', 'p': 0.9} for row in part] for part in found]
    chosen = [[{**row, 'counted': False, 'p': 0.1} for row in part] for part in found]
    every = [found[i] + again[i] + chosen[i] for i in (0, 1)]
    assert seen(AT_STEP, every, labels, 4) == evidence


def test_a_worse_candidate_goes_back_and_an_equal_one_is_promoted():
    last = replace(AT_STEP, step=2)
    for worse, action in ((0.35, 'roll back'), (0.0, 'promote')):
        found, labels = messages(last, 20, worse)
        taken = [decide_rollout(last, seen(last, found, labels, day)) for day in range(1, 20)]
        ends = [each for each in taken if each.action != 'hold']
        assert ends[0].action == action


def test_a_split_that_did_not_happen_stops_the_rollout():
    found, labels = messages(AT_STEP, 4)
    lost = [row for row in found[0] if 'variant' in row]
    evidence = seen(AT_STEP, (lost, found[1]), labels, 4)
    assert 'answers not divided as planned (10% for the candidate)' in evidence.alarms[0]
    counts = {'champion': VariantCounts(700, 1), 'candidate': VariantCounts(80, 9)}
    broken = seen(AT_STEP, found, labels, 4, counts=counts)
    assert '9 errors of 80 where the champion has 1 of 700' in broken.alarms[0]
    assert decide_rollout(AT_STEP, broken).action == 'roll back'


# the commands


def test_the_commands_follow_a_run(folder, tmp_path, capsys):
    from mlref.cli import main
    from mlref.lake import Lake, insert_rows
    from mlref.log import LocalLog
    from mlref.snapshots import publish_snapshot
    from small import TASK, make_events

    events = make_events().with_columns(pl.col('event_time', 'known_time') + NOW // DAY * DAY)
    (tmp_path / 'lake').mkdir()
    lake = Lake(tmp_path / 'lake' / 'mlref.duckdb', TASK.schema)
    insert_rows(lake, {'events': events.with_columns(commit_id=pl.lit(1))})
    lake.close()
    common = ['--folder', str(folder), '--task', 'small:TASK', '--at']

    def mlref(*words, at):
        status = main(['rollout', *words, *common, at])
        return status, capsys.readouterr()

    begun = '2012-10-12T00:00'
    why = ('--why', 'all gates passed', '--who', 'ann')
    assert mlref('start', '2', *why, '--steps', '0,0.5', '--hours', '1', at=begun)[0] == 0
    found, _ = messages(require_rollout(opened(folder)).rollout, 5, rows=50)
    for worker in (0, 1):
        log = LocalLog(tmp_path / 'served' / 'logs' / str(worker))
        for topic, rows in zip(('predictions', 'shadows'), found, strict=True):
            log.append(topic, [json.dumps(row).encode() for row in rows[worker::2]])
        log.close()
    status, said = mlref('status', '--json', at='2012-10-15T00:00')
    state = json.loads(said.out)
    assert (status, state['decision'], state['step']) == (0, 'hold', '1 of 2')
    publish_snapshot(Lake(tmp_path / 'lake' / 'mlref.duckdb', TASK.schema), tmp_path / 'shots')
    snapshots = ('--lake', str(tmp_path / 'shots'))
    place = counts_folder(
        tmp_path / 'served',
        encode_plan(rollout_plan(require_rollout(opened(folder)).rollout)),
    )
    for worker in (0, 1):
        meters = VariantMeters('late-visits', ('champion', 'candidate'), place / f'{worker}.meters')
        for _ in range(15):
            meters.count_error('candidate')
            meters.count_scores('champion', 0.002, 0.0, np.zeros((1, 2), np.float32), np.zeros(1))
    status, said = mlref('status', '--json', *snapshots, at='2012-10-15T00:00')
    assert '30 errors of 30' in json.loads(said.out)['why']
    shutil.rmtree(place)
    again = json.loads(mlref('status', '--json', *snapshots, at='2012-10-15T00:00')[1].out)
    assert again == state
    assert mlref('decide', at='2012-10-16T12:00')[0] == 0
    assert require_rollout(opened(folder)).rollout.step == 1
    assert mlref('abort', at=begun)[0] == 1
    assert mlref('abort', '--why', 'enough', '--who', 'bob', at='2012-10-16T13:00')[0] == 0
    assert mlref('status', at=begun)[0] == 1
    plan = json.loads((tmp_path / 'served' / 'state.json').read_text())['plan']
    assert plan['split'] == {'shares': {}, 'shadow': {}}
