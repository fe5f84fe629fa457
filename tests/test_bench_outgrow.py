"The benchmark of growing load says where engines cross, and counts what ended processes took"

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = ROOT / 'nbs' / 'steps'
sys.path.insert(0, str(STEPS))
from peers.outgrow_rows import LOG, SERVING, find_crossover, limit_row, part_rows, shorter_from
from peers.outgrow_sender import EVERY, PARTS, Sent, carried_rate, send_at_rate, waits_of
from peers.outgrow_workers import Watch, marking

from mlref.log import LocalLog

sys.path.remove(str(STEPS))


def rounds_of(*rates, p99=0.01):
    return [
        {'rate': rate, 'p50': p99 / 2, 'p99': p99, 'memory': 1.0, 'cpu': 1e-6} for rate in rates
    ]


def two_sides(ours, theirs):
    "Load -> rounds of both, for the part of serving"
    found = {(SERVING.default, load): runs for load, runs in ours.items()}
    return found | {(SERVING.engine, load): runs for load, runs in theirs.items()}


@pytest.mark.parametrize(
    'ratios, crosses, earliest, latest',
    [
        ({1: [0.5, 0.6], 8: [0.7, 0.9]}, None, None, None),
        ({1: [0.5, 0.6, 0.7], 8: [0.9, 0.95, 1.1]}, None, 8, None),
        ({1: [0.5, 0.6, 1.2], 8: [0.9, 1.1, 1.2], 32: [1.5, 1.6, 1.7]}, 8, 1, 32),
        ({1: [2.0, 2.1], 8: [0.5, 0.6]}, None, None, None),  # ahead where little is asked
        ({1: [2.0, 2.1], 8: [3.0, 3.1]}, 1, 1, 1),
    ],
)
def test_an_engine_is_ahead_from_where_it_stays_ahead(ratios, crosses, earliest, latest):
    wanted = {'crosses': crosses, 'earliest': earliest, 'latest': latest}
    assert find_crossover(ratios) == wanted


def test_a_limit_is_the_most_that_was_carried_or_where_it_crosses():
    ours = {1: rounds_of(90, 100, 110), 8: rounds_of(190, 200, 220)}
    theirs = {1: rounds_of(10, 11, 12), 8: rounds_of(50, 60, 70, p99=0.001)}
    row = limit_row(SERVING, two_sides(ours, theirs))
    assert (row['ours'], row['low'], row['high'], row['load']) == (200, 190, 220, 8)
    assert row['crosses'] is None and row['theirs'] == 60 and row['shorter_from'] == 8
    assert row['with_16_cores'] == 16 * 200 and row['formula'].startswith('16 / 1 cores')
    theirs[1] = rounds_of(120, 130, 140)
    theirs[8] = rounds_of(300, 310, 320)
    row = limit_row(SERVING, two_sides(ours, theirs))
    assert (row['crosses'], row['ours'], row['low'], row['high']) == (1, 100, 90, 110)


def test_rows_have_what_the_chart_draws_and_units_that_people_read():
    found = two_sides({1: rounds_of(100)}, {1: rounds_of(10, p99=0.5)})
    first, second, limit = part_rows(SERVING, found)
    assert first['name'] == 'serving, mlref serve, 1 connections: answers'
    assert (second['engine'], second['load'], second['p99'], second['cpu']) == (
        SERVING.engine,
        1,
        500.0,
        1.0,
    )
    assert limit['part'] == 'serving' and limit['shorter_from'] is None
    assert shorter_from(SERVING, found) is None and part_rows(LOG, {}) == []


def test_a_batch_has_waited_until_all_of_it_is_in_the_lake():
    sent = [Sent(0, 10, 1.0, 1.1), Sent(1, 10, 2.0, 2.1), Sent(0, 20, 3.0, 3.1)]
    taken = [(0, 15, 4.0), (1, 10, 5.0), (0, 20, 6.0)]
    assert waits_of(sent, taken) == [3.0, 3.0, 3.0]
    with pytest.raises(ValueError):  # one that never arrived has not waited for nothing
        waits_of(sent, taken[:2])


def test_a_sender_sends_every_message_once_and_to_each_partition(tmp_path):
    log = LocalLog(tmp_path / 'log')
    messages = [b'%d' % i for i in range(1000)]
    sent = send_at_rate(log, messages, 10_000)
    kept = [log.read('events', 0, 1000, part) for part in range(PARTS)]
    log.close()
    assert sorted(each for part in kept for each in part) == sorted(messages)
    assert [batch.part for batch in sent] == [0, 1, 2, 3, 0]
    assert sent[-1].due - sent[0].due == pytest.approx(4 * EVERY)


def test_what_a_process_took_is_counted_when_it_has_ended():
    burn = 'import time\nwhile time.process_time() < 1.2: pass'
    with marking('test-outgrow-watch') as mark:
        watch = Watch(mark)
        subprocess.run([sys.executable, '-c', burn], check=True)
        cpu = watch.stop()
    assert 0.7 < cpu < 2.5 and watch.memory > 2


def test_the_published_chart_has_every_part_on_both_sides_at_three_loads_or_more():
    rows = json.loads((ROOT / 'reports' / 'results' / 'outgrow.json').read_text())['rows']
    for part in ('store', 'log', 'serving', 'training'):
        loads = [row for row in rows if row.get('part') == part and 'engine' in row]
        sides = {row['engine'] for row in loads}
        asked = [{row['load'] for row in loads if row['engine'] == side} for side in sides]
        assert len(sides) >= 2 and len(asked[0]) >= 3 and all(each == asked[0] for each in asked)
        assert all({'p50', 'memory', 'cpu', 'spread'} <= row.keys() for row in loads)


def test_what_a_log_carries_is_the_slope_of_its_commits():
    taken = [(0, 100, 11.0), (1, 50, 11.5), (0, 300, 12.0)]  # 100, 150 and 350 events
    slope = (0.5 * 100 - 0.5 * 0 + 0.5 * 150) / (0.5**2 + 0.5**2)  # around 11.5 and 200
    assert carried_rate(taken, 10.0, 1000) == pytest.approx(slope)
    assert carried_rate(taken[:1], 10.0, 1000) == 100 / (11.0 - 10.0)  # its only one
    assert carried_rate(taken, 10.0, 200) == 200  # it caught up; more was never sent


@pytest.mark.parametrize('delay', [0.0, 0.3, 5.0])
def test_a_follower_that_is_never_behind_carries_what_is_sent(delay):
    every = 50  # events a commit, of one partition after the other, 1,000 a second
    commits = range(40)
    taken = [(i % 4, (i // 4 + 1) * every, delay + (i + 1) * every / 1000) for i in commits]
    assert carried_rate(taken, 0.0, 1000) == pytest.approx(1000)
    late = [(part, end, 2 * at) for part, end, at in taken]  # it keeps up with half of it
    assert carried_rate(late, 0.0, 1000) == pytest.approx(500)
