"The status page of a real server, in a real browser; and its alarms beside promtool's"

import json
import shutil
import subprocess
from dataclasses import asdict, replace

import numpy as np
import polars as pl
import pytest

from mlref.access import make_key, write_keys
from mlref.alert_rules import AlertRule, ServingObjective, serving_rules
from mlref.feed_times import REPLAY_KEY, encode_replay
from mlref.model_health import HEALTH_KEY, ModelHealth, encode_health
from mlref.observe import write_sample
from mlref.status import (
    Buckets,
    FeedStatus,
    ModelFacts,
    ModelStatus,
    ServerStatus,
    VersionStatus,
    WorkStatus,
    judge_rule,
    parse_samples,
)
from programs import browser, need
from server_fixture import start_copy, wait_gone

SECONDS = 60_000  # that a page may take, in milliseconds
RULES = serving_rules(ServingObjective())
ALERTS = [rule for rule in RULES if isinstance(rule, AlertRule)]


@pytest.fixture(scope='module')
def chromium():
    need('chromium')
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = browser(playwright)
        yield running
        running.close()


@pytest.fixture
def open_page(chromium):
    "Open pages of some width; afterwards, nothing went wrong in them, nor outside of their server"
    wrong = []
    pages = []

    def start(width: int = 1280):
        page = chromium.new_page(viewport={'width': width, 'height': 900})
        page.set_default_timeout(SECONDS)
        page.on('request', lambda asked: wrong.append(asked.url) if is_foreign(asked) else None)
        page.on('pageerror', lambda error: wrong.append(str(error)))
        page.on('console', lambda said: wrong.append(said.text) if is_wrong(said) else None)
        pages.append(page)
        return page

    yield start
    for page in pages:
        page.close()
    assert wrong == []


def is_foreign(asked) -> bool:
    return not asked.url.startswith(('http://127.0.0.1:', 'data:'))


def is_wrong(said) -> bool:
    return said.type == 'error' and 'ERR_CONNECTION' not in said.text


def wait_for_text(page, place: str, text: str) -> None:
    condition = '([place, text]) => document.querySelector(place)?.textContent.includes(text)'
    page.wait_for_function(condition, arg=[place, text])


def overflow(page) -> int:
    return page.evaluate('document.documentElement.scrollWidth - window.innerWidth')


def test_a_page_shows_what_its_server_does_until_it_stops(served, tmp_path, open_page):
    pages = [open_page(1280), open_page(400)]
    with start_copy(served, tmp_path) as (own, process):
        for page in pages:
            page.goto(own.url)
            wait_for_text(page, '#sentence', 'No request for late-visits yet')
            wait_for_text(page, '#latency', 'no data yet')
        rows = np.random.default_rng(0).uniform(0, 9, (30, 1, 2))
        for row in rows[:12]:
            assert own.post(own.infer, own.tensor(row))[0] == 200
        for page in pages:
            wait_for_text(page, '#answers b', '12')
        for row in rows[12:]:
            assert own.post(own.infer, own.tensor(row))[0] == 200
        assert own.post(own.infer, {'no': 'tensor'})[0] == 400
        assert own.post(own.infer, own.tensor(-rows[0]), x_timeout_ms='0')[0] == 504
        for page in pages:
            wait_for_text(page, '#answers b', '32')
            wait_for_text(page, '#failed', 'refused (4xx): 1')
            assert page.locator('#failed b').inner_text() == '1'
            assert page.locator('#half b').inner_text().endswith('s')
            assert own.versions[0] in page.locator('#versions').inner_text()
            assert '100 %' in page.locator('#versions').inner_text()
            assert 'ErrorBurnFast' in page.locator('#alarms').inner_text()
            page.wait_for_selector('#traffic path')
            assert overflow(page) <= 0
        process.terminate()
        wait_gone(process.pid)
        for page in pages:
            wait_for_text(page, '#state', 'No answer')
            wait_for_text(page, '#sentence', 'has not answered since')
            assert page.locator('#answers b').inner_text() == '32'  # what was known last


def test_a_page_counts_the_answers_of_all_workers_and_is_not_counted(served):
    def answered() -> float:
        [model] = served.call('GET', '/status.json')[1]['models']
        return sum(model['work']['answers'].values())

    for _ in range(20):  # connections of their own, so that both workers answer
        assert served.call('GET', '/')[0] == 200
    before = answered()
    rows = np.random.default_rng().uniform(0, 9, (20, 1, 2))
    for row in rows:
        assert served.post(served.infer, served.tensor(row))[0] == 200
    # others may ask at the same time, so at least as many
    assert answered() >= before + 20
    page = served.call('GET', '/metrics')[1].decode()
    assert 'route="/"' not in page and 'status.json' not in page


def test_the_page_needs_no_key_and_answers_no_foreign_name(served, tmp_path):
    token, key = make_key('shop', ('predict',))
    with start_copy(served, tmp_path) as (own, _):
        write_keys(tmp_path / 'keys.json', [key])
        while own.post(own.infer, own.tensor(np.ones((1, 2))))[0] != 401:
            pass  # until its worker has read the keys
        status, page, headers = own.call('GET', '/')
        assert (status, headers['content-type']) == (200, 'text/html; charset=utf-8')
        assert "default-src 'none'" in headers['content-security-policy']
        status, told, _ = own.call('GET', '/status.json')
        assert status == 200 and [each['facts']['name'] for each in told['models']] == [
            'late-visits'
        ]
        said = json.dumps(told) + page.decode()
        assert not any(part in said for part in (token, key.id, key.sha256, str(tmp_path)))
        for path in ('/', '/status.json'):
            assert own.call('GET', path, host='evil.example')[0] == 421
            assert own.call('GET', path, origin='http://evil.example')[0] == 403
            assert own.call('POST', path, b'')[0] == 405


def test_what_the_monitor_found_is_on_the_page_as_text(served, tmp_path, open_page):
    from mlref.lmdb_store import LmdbStore
    from small import FEATURES

    drifted = ('week_count_10080m', '<img src=x onerror=document.body.remove()>')
    found = ModelHealth(measured_at=1000, version='v', alarms=('gap',), drifted=drifted, auc=0.61)
    home = tmp_path / 'home'
    shutil.copytree(served.home / 'registry', home / 'registry')
    shutil.copytree(served.home / 'online', home / 'online')
    store = LmdbStore(home / 'online', FEATURES)
    store.write({HEALTH_KEY: encode_health(found)})
    store.close()
    folder = tmp_path / 'served'
    folder.mkdir()
    page = open_page()
    with start_copy(served, folder, home=home) as (own, _):
        page.goto(own.url)
        wait_for_text(page, '#health', drifted[1])
        wait_for_text(page, '#health', '0.610')
        assert page.locator('#health img').count() == 0
        assert page.locator('#alarms tr', has_text='CalibrationOff').inner_text().startswith('■ on')


def test_the_store_of_a_replay_is_called_that_until_something_newer_arrives(
    served, tmp_path, open_page
):
    from mlref.lmdb_store import LmdbStore
    from mlref.materialize import apply_events
    from small import FEATURES, make_events

    home = tmp_path / 'home'
    shutil.copytree(served.home / 'registry', home / 'registry')
    shutil.copytree(served.home / 'online', home / 'online')
    store = LmdbStore(home / 'online', FEATURES)
    end = store.clock()
    store.write({REPLAY_KEY: encode_replay(end)})
    folder = tmp_path / 'served'
    folder.mkdir()
    page = open_page()
    with start_copy(served, folder, home=home) as (own, _):
        page.goto(own.url)
        stale = page.locator('#alarms tr', has_text='StaleFeatures')
        wait_for_text(page, '#newest b', 'replay')
        assert stale.inner_text().startswith('– replay')
        assert 'holds a replay that ended' in page.locator('#sentence').inner_text()
        assert page.locator('#state').inner_text() == 'Ready'
        assert f'mlref_store_replay_end_seconds{{model="late-visits"}} {60.0 * end}' in (
            own.call('GET', '/metrics')[1].decode()
        )
        later = {'event_id': 'later', 'event_time': end + 1, 'known_time': end + 1}
        newest = make_events().tail(1)
        apply_events(store, newest.with_columns(**{k: pl.lit(x) for k, x in later.items()}))
        wait_for_text(page, '#state', '1 alarm on')  # live, and dead since
        assert stale.inner_text().startswith('■ on')
        assert 'replay' not in page.locator('#sentence').inner_text()
    store.close()


HISTOGRAM = Buckets((0.001, 0.002, 0.005), (0.0, 0.0, 0.0, 0.0), 0.0)
FACTS = ModelFacts('late-visits', (VersionStatus('champion', 'a1', 1.0),))
WORK = WorkStatus(
    answers={},
    seconds=HISTOGRAM,
    wait=HISTOGRAM,
    batch=Buckets((1.0,), (0.0, 0.0), 0.0),
    cache={},
    values={},
)
EMPTY = ModelStatus(facts=FACTS, work=WORK, alarms=(), clock=None, calibrated=None, feeds={})
QUIET = ServerStatus(0.0, '1', 1, (), {}, (EMPTY,))


def busy(n: int, seconds: tuple[float, ...], **facts) -> ModelStatus:
    "A model that has answered"
    work = replace(WORK, answers={'200': n}, seconds=replace(HISTOGRAM, counts=seconds))
    return replace(EMPTY, work=work, facts=replace(FACTS, **facts))


@pytest.fixture
def tell(served, open_page):
    "A page that is told these, one after the other, two seconds apart; then the last again"

    def start(*snapshots: ServerStatus):
        left = [asdict(each) for each in snapshots]
        at = [0.0]

        def answer(route) -> None:
            status = left.pop(0) if len(left) > 1 else left[0]
            at[0] += 2
            route.fulfill(json={**status, 'at': at[0]})

        page = open_page()
        page.route('**/status.json', answer)
        page.goto(served.url)
        return page

    return start


def test_quantiles_are_those_of_the_difference_of_two_snapshots(tell):
    before = busy(10, (10, 0, 0, 0))
    # ten more, 2 of them within 1 ms and 8 within 2 ms: half within 1.375, 99 % within 1.9875
    after = busy(20, (12, 8, 0, 0))
    page = tell(*(replace(QUIET, models=(each,)) for each in (before, after)))
    wait_for_text(page, '#half b', '1.4 ms')
    assert page.locator('#most b').inner_text() == '2 ms'
    assert 'half: 1.4 ms' in page.locator('#latency').inner_text()
    assert 'last' in page.locator('#half').inner_text()


def test_a_quantile_beyond_the_last_edge_is_said_and_drawn(tell):
    slow = busy(4, (0, 0, 0, 4))
    page = tell(QUIET, replace(QUIET, models=(slow,)))
    wait_for_text(page, '#most b', 'over 5 ms')
    wait_for_text(page, '#latency', '99 %: over 5 ms')
    assert ' 16.0' in page.locator('#latency path.s1').first.get_attribute('d')  # at the top


def test_a_server_that_was_started_anew_begins_a_new_history(tell):
    many = replace(QUIET, models=(busy(500, (500, 0, 0, 0)),))
    few = replace(QUIET, models=(busy(3, (3, 0, 0, 0)),))
    page = tell(many, many, few)
    wait_for_text(page, '#answers b', '500')
    wait_for_text(page, '#about', 'the server was restarted')
    wait_for_text(page, '#answers b', '3')
    assert '-' not in page.locator('#traffic').inner_text()


def test_each_task_of_a_server_has_its_numbers(tell):
    trial = (
        VersionStatus('champion', 'a1', 0.75, scored=70.0),
        VersionStatus('candidate', 'b2', 0.25, scored=25.0),
    )
    one = busy(7, (7, 0, 0, 0), versions=trial)
    two = busy(9, (0, 9, 0, 0), name='<b>early</b>')
    page = tell(replace(QUIET, models=(one, two)))
    wait_for_text(page, '#answers b', '7')
    shown = page.locator('#versions').inner_text().split()
    assert [each for each in shown if each in ('75', '25', '70')] == ['75', '70', '25', '25']
    page.click('text=<b>early</b>')
    wait_for_text(page, '#answers b', '9')


def test_a_feed_that_is_behind_its_limit_is_marked(tell):
    feeds = {
        'weather': FeedStatus(lag=14_400.0, limit=10_800.0),
        'departure': FeedStatus(lag=14_400.0, limit=28_800.0),
        'rumour': FeedStatus(lag=14_400.0, limit=None),
    }
    page = tell(QUIET, replace(QUIET, models=(replace(EMPTY, feeds=feeds),)))
    wait_for_text(page, '#feeds', 'weather')
    shown = page.locator('#feeds').inner_text().splitlines()
    rows = [line.split('\t') for line in shown if '\t' in line][1:]
    assert rows == [
        ['weather', '4 hours ■ out of its limits', '3 hours'],
        ['departure', '4 hours ○ in its limits', '8 hours'],
        ['rumour', '4 hours', '–'],
    ]


def test_a_server_that_is_not_ready_says_why(tell):
    lost = busy(0, (0, 0, 0, 0), troubles=('expected an online store, it is gone',))
    page = tell(replace(QUIET, models=(lost,)))
    wait_for_text(page, '#state', 'Not ready')
    wait_for_text(page, '#sentence', 'it is gone')


GAUGES = (
    write_sample('mlref_store_replay_end_seconds', model='late'),
    write_sample('mlref_store_lag_minutes', model='late'),
    write_sample('mlref_store_dead_letters', model='late'),
    write_sample('mlref_monitor_timestamp_seconds', model='late'),
    write_sample('mlref_calibration_timestamp_seconds', model='late'),
    *(
        write_sample('mlref_monitor_alarms', measure=each, model='late')
        for each in ('auc', 'auc_estimated', 'gap', 'missing')
    ),
    *(
        write_sample(f'mlref_feed_{each}_seconds', kind=kind, model='late')
        for kind in ('weather', 'arrival')
        for each in ('lag', 'lag_limit')
    ),
)
NOW = 200_000  # seconds; two days are 172,800


def draw_gauges(random: np.random.Generator) -> dict[str, float]:
    "Some gauges near the limits of the rules"
    drawn = (
        NOW - 1000,
        random.choice([0, 29, 30, 30.5, 31]),
        random.choice([0, 0, 1, 7]),
        *random.choice([0, NOW - 172_801, NOW - 172_800, NOW - 172_799, NOW], 2),
        *random.choice([0, 0, 0, 1], 4),
        *random.choice([59, 60, 61], 4),
    )
    kept = random.uniform(size=len(drawn)) < np.array([0.3, *[0.8] * (len(drawn) - 1)])
    return {name: float(x) for name, x, keep in zip(GAUGES, drawn, kept, strict=True) if keep}


def as_promtool(gauges: dict[str, float]) -> tuple[dict, dict[str, str]]:
    "What the server says of each rule, as a test that Prometheus must pass"
    states = {rule.alert: judge_rule(rule, parse_samples(gauges), NOW) for rule in ALERTS}
    judged = [rule for rule in ALERTS if states[rule.alert] != 'elsewhere']
    tests = [
        {
            'expr': f'count({rule.expr}) > bool 0 or vector(0)',
            'eval_time': f'{NOW}s',
            'exp_samples': [{'labels': '{}', 'value': int(states[rule.alert] == 'on')}],
        }
        for rule in judged
    ]
    series = [{'series': name, 'values': f'{x!r}x{NOW // 100}'} for name, x in gauges.items()]
    return {'interval': '100s', 'input_series': series, 'promql_expr_test': tests}, states


def test_alarms_that_a_server_judges_are_what_prometheus_finds(tmp_path):
    random = np.random.default_rng(0)
    cases = [as_promtool(draw_gauges(random)) for _ in range(40)]
    seen = {(name, state) for _, states in cases for name, state in states.items()}
    judged = {name for name, state in seen if state != 'elsewhere'}
    assert len(judged) >= 7
    assert {name for name, state in seen if state == 'off'} == judged
    assert {name for name, state in seen if state == 'on'} == judged - {'StoreUnreadable'}
    by_clock = {'StaleFeatures', 'StaleFeed', 'MonitorSilent', 'CalibrationOld'}
    assert {name for name, state in seen if state == 'replay'} == by_clock
    (tmp_path / 'test.json').write_text(json.dumps({'tests': [case for case, _ in cases]}))
    command = [need('promtool'), 'test', 'rules', 'test.json']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('rule', ALERTS, ids=lambda rule: rule.alert)
def test_a_rule_that_needs_a_history_is_left_to_prometheus(rule):
    gauges = {name: 1.0 for name in GAUGES}
    found = judge_rule(rule, parse_samples(gauges), NOW)
    over_time = any(word in rule.expr for word in ('rate(', 'increase(', 'ratio_rate'))
    needs_more = over_time or rule.expr.startswith('up{')
    assert (found == 'elsewhere') == needs_more
