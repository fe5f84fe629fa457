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

import pytest

from mlref.alert_rules import (
    AlertRule,
    BurnWindow,
    ServingObjective,
    rule_file,
    serving_rules,
)
from mlref.observe import METRICS
from programs import need

OBJECTIVE = ServingObjective()
RULES = serving_rules(OBJECTIVE)
ALERTS = [rule for rule in RULES if isinstance(rule, AlertRule)]


@dataclass(frozen=True)
class Case:
    "A history of some series, and when its alert must be quiet, firing and resolved"

    series: dict[str, str]  # Prometheus's own notation, a value a minute
    quiet: str
    fires: str
    resolved: str
    labels: dict[str, str]  # Of the alert, beside its severity
    summary: str


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
SLOW = requests('0x2900 0+3x2900 8700x2900', '0+1000x8700')
LATE = answers('0+100x30 3000+70x60 7200+100x300', '0+100x390')
LATER = answers('0+100x2900 290000+97x2900 571300+100x2900', '0+100x8700')
MODEL = {'model': 'late'}
CASES = {
    ('ErrorBudgetBurn', 'page'): Case(
        FAST, '30m', '80m', '160m', MODEL, 'late burns its budget fast'
    ),
    ('ErrorBudgetBurn', 'ticket'): Case(
        SLOW, '2900m', '5700m', '8600m', MODEL, 'late burns its budget slowly'
    ),
    ('SlowAnswerBudgetBurn', 'page'): Case(
        LATE, '30m', '80m', '160m', MODEL, 'late burns its budget fast'
    ),
    ('SlowAnswerBudgetBurn', 'ticket'): Case(
        LATER, '2900m', '5700m', '8600m', MODEL, 'late burns its budget slowly'
    ),
    ('ServerDown', 'page'): Case(
        {'up{job="mlref",instance="a"}': '1x10 0x10 1x10'},
        '10m',
        '20m',
        '24m',
        {'job': 'mlref', 'instance': 'a'},
        'a server is down',
    ),
    ('StoreUnreadable', 'page'): Case(
        {'mlref_store_lag_minutes{model="late"}': '3x10 NaNx10 3x10'},
        '10m',
        '20m',
        '24m',
        MODEL,
        'late has no store',
    ),
    ('StaleFeatures', 'page'): Case(
        {'mlref_store_lag_minutes{model="late"}': '30x10 31+1x10 3x10'},
        '15m',
        '20m',
        '24m',
        MODEL,
        'late is fed nothing',
    ),
    ('ValuesMissing', 'ticket'): Case(
        {
            'mlref_values_total{model="late",view="left",status="present"}': '0+9x60 540x200 540+9x60',
            'mlref_values_total{model="late",view="left",status="expired"}': '0+4x400',
        },
        '60m',
        '180m',
        '320m',
        {**MODEL, 'view': 'left'},
        'late misses values of left',
    ),
    ('DeadLetters', 'ticket'): Case(
        {'mlref_store_dead_letters{model="late"}': '0x10 2x10 0x10'},
        '10m',
        '20m',
        '24m',
        MODEL,
        'late has set events aside',
    ),
}


def unit_test(name: str, severity: str, case: Case) -> dict:
    "As promtool reads it"
    labels = {**case.labels, 'severity': severity}
    told = {'exp_labels': labels, 'exp_annotations': {'summary': case.summary}}
    # of the same name the other severity may fire as well, so this one is asked for alone
    firing = f'ALERTS{{alertname="{name}",severity="{severity}",alertstate="firing"}}'
    quiet = [
        {'expr': f'count({firing})', 'eval_time': at, 'exp_samples': []}
        for at in (case.quiet, case.resolved)
    ]
    fires = {'expr': f'count({firing})', 'eval_time': case.fires}
    return {
        'name': f'{name}, {severity}',
        'interval': '1m',
        'input_series': [{'series': k, 'values': v} for k, v in case.series.items()],
        'alert_rule_test': [
            {'eval_time': case.fires, 'alertname': name, 'exp_alerts': [told]}
        ],
        'promql_expr_test': [*quiet, {**fires, 'exp_samples': [{'labels': '{}', 'value': 1}]}],
    }


def run_promtool(folder, rules, cases) -> subprocess.CompletedProcess:
    (folder / 'rules.yml').write_text(rule_file(rules))
    tests = [unit_test(*key, case) for key, case in cases.items()]
    content = {'rule_files': ['rules.yml'], 'evaluation_interval': '1m', 'tests': tests}
    (folder / 'tests.yml').write_text(json.dumps(content))
    command = [need('promtool'), 'test', 'rules', 'tests.yml']
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_every_alert_has_a_case():
    assert {(rule.alert, rule.severity) for rule in ALERTS} == {*CASES}


def test_every_rule_stays_quiet_fires_and_resolves(tmp_path):
    done = run_promtool(tmp_path, RULES, CASES)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize('key', [*CASES], ids='-'.join)
def test_a_rule_that_never_fires_is_found(tmp_path, key):
    deaf = [
        replace(rule, expr=f'({rule.expr}) and vector(0) > 1')
        if isinstance(rule, AlertRule) and (rule.alert, rule.severity) == key
        else rule
        for rule in RULES
    ]
    assert run_promtool(tmp_path, deaf, {key: CASES[key]}).returncode == 1


def test_prometheus_takes_the_file(tmp_path):
    (tmp_path / 'rules.yml').write_text(rule_file(RULES))
    command = [need('promtool'), 'check', 'rules', 'rules.yml']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_running_server_exports_only_what_is_documented(served):
    served.post(served.infer, served.tensor(X=ROWS))
    page = served.call('GET', '/metrics')[1].decode()
    kinds = dict(line.split()[2:] for line in page.splitlines() if line.startswith('# TYPE'))
    assert 'untyped' not in kinds.values(), kinds
    assert {name.removesuffix('_total') for name in kinds} <= {*METRICS}
