"""Alert rules: each stays quiet, fires and resolves; a running Prometheus tells of a real fault"""

import json
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import polars as pl
import pytest

from mlref.alert_rules import (
    AlertRule,
    BurnWindow,
    RecordingRule,
    ServingObjective,
    rule_file,
    serving_rules,
)
from mlref.core import DAY
from mlref.lmdb_store import LmdbStore
from mlref.materialize import apply_events
from mlref.observe import METRIC_FAMILIES
from programs import need
from server_fixture import start_copy
from small import FEATURES, make_events

OBJECTIVE = ServingObjective()
RULES = serving_rules(OBJECTIVE)
ALERTS = [rule for rule in RULES if isinstance(rule, AlertRule)]


@dataclass(frozen=True)
class Case:
    "A history of some series, and when its alert must be quiet, firing and resolved"

    series: dict[str, str]  # Prometheus's own notation
    quiet: str
    fires: str
    resolved: str
    labels: dict[str, str]  # Of the alert, beside its severity
    summary: str
    interval: str = '1m'  # Between two values
    evaluated: str = '5m'  # How often


def requests(bad: str, good: str) -> dict[str, str]:
    labels = 'model="late",route="/predict"'
    return {
        f'mlref_requests_total{{{labels},status="500"}}': bad,
        f'mlref_requests_total{{{labels},status="200"}}': good,
    }


def answers(late: str, every: str) -> dict[str, str]:
    labels = 'model="late",route="/predict"'
    name = 'mlref_request_duration_seconds'
    return {
        f'{name}_bucket{{{labels},le="0.1"}}': late,
        f'{name}_count{{{labels}}}': every,
    }


# one failure in an hour is no fault; 5 of 100 are, for half an hour, and then it is over
FAST = requests('0x30 0+5x60 300x300', '0+100x390')
# .3 % for two days: three times the budget, too slow for a page
SLOW = requests('0x290 0+30x290 8700x290', '0+10000x870')
LATE = answers('0+100x30 3000+70x60 7200+100x300', '0+100x390')
LATER = answers('0+1000x290 290000+970x290 571300+1000x290', '0+1000x870')
MODEL = {'model': 'late'}
VALUES = 'mlref_values_total{model="late",view="left"'
CASES = {
    'ErrorBurnFast': Case(FAST, '30m', '80m', '160m', MODEL, 'late burns its budget fast'),
    'ErrorBurnSlow': Case(
        SLOW, '48h', '95h', '143h', MODEL, 'late burns its budget slow', '10m', '1h'
    ),
    'LatencyBurnFast': Case(LATE, '30m', '80m', '160m', MODEL, 'late burns its budget fast'),
    'LatencyBurnSlow': Case(
        LATER, '48h', '95h', '143h', MODEL, 'late burns its budget slow', '10m', '1h'
    ),
    'ServerDown': Case(
        {'up{job="mlref",instance="a"}': '1x10 0x10 1x10'},
        '10m',
        '20m',
        '25m',
        {'job': 'mlref', 'instance': 'a'},
        'a server is down',
    ),
    'WorkerRestarts': Case(
        {
            'mlref_worker_restarts_total{reason="hung"}': '0x30 1x200',
            'mlref_worker_restarts_total{reason="ended"}': '3x230',  # long ago
        },
        '25m',
        '40m',
        '100m',
        {'reason': 'hung'},
        'a worker hung and was replaced',
    ),
    'StoreUnreadable': Case(
        {'test_lag{model="late"}': '3x10 0x10 3x10', 'test_there{model="late"}': '1x10 0x10 1x10'},
        '10m',
        '20m',
        '25m',
        MODEL,
        'late has no store',
    ),
    'StaleFeatures': Case(
        {'mlref_store_lag_minutes{model="late"}': '30x10 31+1x10 3x10'},
        '15m',
        '20m',
        '25m',
        MODEL,
        'late is fed nothing',
    ),
    'StaleFeed': Case(
        {
            # one kind stands still behind a clock that goes on, and comes again
            'mlref_feed_lag_seconds{model="late",kind="weather"}': '0+600x25 0x25',
            'mlref_feed_lag_seconds{model="late",kind="arrival"}': '0+600x25 0x25',
            'mlref_feed_lag_seconds{model="late",kind="rumour"}': '90000x50',  # no limit
            'mlref_feed_lag_limit_seconds{model="late",kind="weather"}': '10800x50',
            'mlref_feed_lag_limit_seconds{model="late",kind="arrival"}': '28800x50',
        },
        '18m',
        '25m',
        '35m',
        {**MODEL, 'kind': 'weather'},
        'late is fed no weather',
    ),
    'ValuesMissing': Case(
        {
            f'{VALUES},status="present"}}': '0+9x60 540x200 540+9x60',
            f'{VALUES},status="expired"}}': '0+4x400',
        },
        '60m',
        '180m',
        '320m',
        {**MODEL, 'view': 'left'},
        'late misses values of left',
    ),
    'MonitorSilent': Case(
        {'mlref_monitor_timestamp_seconds{model="late"}': '0x3000 180000x200'},
        '47h',
        '49h',
        '51h',
        MODEL,
        'late is measured by nobody',
    ),
    'CalibrationOld': Case(
        {'mlref_calibration_timestamp_seconds{model="late"}': '0x3000 180000x200'},
        '47h',
        '49h',
        '51h',
        MODEL,
        'late has an old calibration',
    ),
    'CalibrationOff': Case(
        {'mlref_monitor_alarms{model="late",measure="gap"}': '0x10 1x10 0x10'},
        '10m',
        '20m',
        '25m',
        MODEL,
        'late is not calibrated',
    ),
    'AucLow': Case(
        {
            'mlref_monitor_alarms{model="late",measure="auc"}': '0x10 1x10 0x10',
            'mlref_monitor_alarms{model="late",measure="gap"}': '1x30',
        },
        '10m',
        '20m',
        '25m',
        MODEL,
        'late ranks worse than its reference',
    ),
    'DeadLetters': Case(
        {'mlref_store_dead_letters{model="late"}': '0x10 2x10 0x10'},
        '10m',
        '20m',
        '25m',
        MODEL,
        'late has set events aside: mlref dead-letters list',
    ),
}


# promtool writes no NaN: nothing over nothing is one
BROKEN = [
    RecordingRule('mlref_store_lag_minutes', 'test_lag / test_there'),
    RecordingRule('mlref_monitor_timestamp_seconds', 'test_time / test_known'),
]
# as above, beside a time that stands still
UNREAD = Case(
    {'test_time{model="late"}': '60x10 0x10 600x10', 'test_known{model="late"}': '1x10 0x10 1x10'},
    '10m',
    '20m',
    '25m',
    MODEL,
    'late is measured by nobody',
)


def unit_test(name: str, severity: str, case: Case) -> dict:
    "As promtool reads it"
    labels = {**case.labels, 'severity': severity}
    told = {'exp_labels': labels, 'exp_annotations': {'summary': case.summary}}
    quiet = [
        {'eval_time': at, 'alertname': name, 'exp_alerts': []} for at in (case.quiet, case.resolved)
    ]
    return {
        'name': name,
        'interval': case.interval,
        'input_series': [{'series': k, 'values': v} for k, v in case.series.items()],
        'alert_rule_test': [
            *quiet,
            {'eval_time': case.fires, 'alertname': name, 'exp_alerts': [told]},
        ],
    }


def run_promtool(folder, rules, cases) -> subprocess.CompletedProcess:
    (folder / 'broken.yml').write_text(rule_file(BROKEN, 'broken'))
    (folder / 'rules.yml').write_text(rule_file(rules))
    severities = {rule.alert: rule.severity for rule in ALERTS}
    files = []
    for every in {case.evaluated for case in cases.values()}:
        own = {name: case for name, case in cases.items() if case.evaluated == every}
        content = {
            'rule_files': ['broken.yml', 'rules.yml'],
            'group_eval_order': ['broken', 'mlref'],  # else any, and an alert is a step late
            'evaluation_interval': every,
            'tests': [unit_test(name, severities[name], case) for name, case in own.items()],
        }
        files.append(f'tests_{every}.yml')
        (folder / files[-1]).write_text(json.dumps(content))
    command = [need('promtool'), 'test', 'rules', *files]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_every_alert_has_a_case():
    assert sorted(rule.alert for rule in ALERTS) == sorted(CASES)


def test_every_rule_stays_quiet_fires_and_resolves(tmp_path):
    done = run_promtool(tmp_path, RULES, CASES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_note_of_the_monitor_that_cannot_be_read_counts_as_silence(tmp_path):
    done = run_promtool(tmp_path, RULES, {'MonitorSilent': UNREAD})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('name', [*CASES])
@pytest.mark.parametrize('broken', ['({}) and on () vector(0) > 1', '({}) or vector(1)'])
def test_a_rule_that_is_deaf_or_rings_always_is_found(tmp_path, name, broken):
    rules = [
        replace(rule, expr=broken.format(rule.expr))
        if isinstance(rule, AlertRule) and rule.alert == name
        else rule
        for rule in RULES
    ]
    done = run_promtool(tmp_path, rules, {name: CASES[name]})
    assert done.returncode == 1 and f'alertname: {name}' in done.stdout + done.stderr


def test_prometheus_takes_the_file(tmp_path):
    (tmp_path / 'rules.yml').write_text(rule_file(RULES))
    command = [need('promtool'), 'check', 'rules', 'rules.yml']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


ROWS = np.zeros((1, 2), np.float32)


def test_a_running_server_exports_only_what_is_documented(served):
    assert served.post(served.infer, served.tensor(ROWS))[0] == 200
    page = served.call('GET', '/metrics')[1].decode()
    kinds = dict(line.split()[2:] for line in page.splitlines() if line.startswith('# TYPE'))
    assert 'untyped' not in kinds.values(), kinds
    assert {name.removesuffix('_total') for name in kinds} <= {*METRIC_FAMILIES}


class Webhook(BaseHTTPRequestHandler):
    "Keeps the alerts that it is told of, in the list `told` of its server"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        self.server.told += [(each['labels'], each['status']) for each in body['alerts']]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


def free_port() -> int:
    with socket.create_server(('127.0.0.1', 0)) as taken:
        return taken.getsockname()[1]


def wait_for(condition, what: str, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f'expected {what} within {seconds:g} s'
        time.sleep(0.2)


@pytest.fixture
def webhook():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Webhook)
    server.told = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def watch(tmp_path, webhook):
    "Start Prometheus and Alertmanager over some rules; gives the address of Prometheus"
    started = []

    def start(rules, target: str) -> str:
        manager, port = free_port(), free_port()
        hook = {'url': f'http://127.0.0.1:{webhook.server_port}/', 'send_resolved': True}
        route = {'receiver': 'hook', 'group_wait': '1s', 'group_interval': '1s'}
        notify = {'route': route, 'receivers': [{'name': 'hook', 'webhook_configs': [hook]}]}
        scrape = {'job_name': 'mlref', 'static_configs': [{'targets': [target]}]}
        peers = {'static_configs': [{'targets': [f'127.0.0.1:{manager}']}]}
        watched = {
            'global': {'scrape_interval': '1s', 'evaluation_interval': '1s'},
            'rule_files': ['rules.yml'],
            'scrape_configs': [scrape],
            'alerting': {'alertmanagers': [peers]},
        }
        (tmp_path / 'rules.yml').write_text(rule_file(rules))
        (tmp_path / 'manager.yml').write_text(json.dumps(notify))
        (tmp_path / 'prometheus.yml').write_text(json.dumps(watched))
        commands = (
            ('prometheus-alertmanager', 'manager', manager, '--cluster.listen-address='),
            ('prometheus', 'prometheus', port, '--storage.tsdb.path=data'),
        )
        for program, name, own, more in commands:
            words = [need(program), f'--config.file={name}.yml', more]
            words.append(f'--web.listen-address=127.0.0.1:{own}')
            with open(tmp_path / f'{name}.log', 'w') as log:
                started.append(subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log))
        return f'http://127.0.0.1:{port}'

    yield start
    for process in started:
        process.terminate()
        process.wait(10)


def ask_series(prometheus: str, query: str) -> list:
    try:
        with urlopen(f'{prometheus}/api/v1/query?query={query}', timeout=5) as answer:
            return json.load(answer)['data']['result']
    except URLError:  # not up yet
        return []


# minutes instead of days; what depends on this machine and on when the visits were, is let pass
LIVE = ServingObjective(
    within=2.5,
    in_time=0.5,
    windows=(BurnWindow(long='10s', short='5s', factor=14.4, severity='page'),),
    max_lag=1e12,
    patience='2s',
)


def test_a_running_server_that_fails_rings_one_alert_and_it_resolves(served, watch, webhook):
    prometheus = watch(serving_rules(LIVE), served.url.removeprefix('http://'))
    failed = 'model:mlref_requests_failed:ratio_rate5s'
    told = webhook.told
    random = np.random.default_rng()  # a cache would know the answer

    def fail() -> bool:
        "A request that nobody waits for any more, and a good one"
        body = served.tensor(random.normal(size=(1, 2)))
        status = served.post(served.infer, body, x_timeout_ms='0')[0]
        assert status == 504 and served.post(served.infer, body)[0] == 200
        return any(state == 'firing' for _, state in told)

    wait_for(lambda: ask_series(prometheus, 'up') != [], 'a scrape')
    wait_for(fail, 'an alert')
    assert ask_series(prometheus, failed)
    wait_for(lambda: any(state == 'resolved' for _, state in told), 'an end of the alert')
    assert {labels['alertname'] for labels, _ in told} == {'ErrorBurnFast'}
    assert {labels['model'] for labels, _ in told} == {'late-visits'}


def test_a_feed_that_stops_behind_a_lively_one_rings_and_stops_when_it_comes_again(
    served, watch, webhook, tmp_path
):
    later = make_events().with_columns(
        pl.col('event_time', 'known_time') + 8 * DAY, pl.col('event_id', 'visit') + 'later'
    )
    visits = later.filter(kind='visit').head(60)
    home = tmp_path / 'home'
    home.mkdir()
    (home / 'registry').symlink_to(served.home / 'registry')
    store = LmdbStore(home / 'online', FEATURES)
    apply_events(store, make_events())
    folder = tmp_path / 'server'
    folder.mkdir()
    with start_copy(served, folder, home) as (own, _):
        prometheus = watch(serving_rules(LIVE), own.url.removeprefix('http://'))
        wait_for(lambda: ask_series(prometheus, 'mlref_feed_lag_seconds') != [], 'a scrape')
        assert webhook.told == []
        apply_events(store, visits)
        wait_for(lambda: webhook.told != [], 'an alert')
        ends = later.filter(kind='end').join(visits, on='visit', how='semi')
        apply_events(store, ends)
        wait_for(lambda: 'resolved' in [state for _, state in webhook.told], 'an end of it')
    store.close()
    named = {(labels['alertname'], labels.get('kind')) for labels, _ in webhook.told}
    assert named == {('StaleFeed', 'end')}
