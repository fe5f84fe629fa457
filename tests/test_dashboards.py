"""Dashboards as Grafana reads them, of metrics that a server has; files as Prometheus reads them"""

import json
import subprocess
from dataclasses import replace

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as GrafanaDashboard

from mlref.alert_rules import AlertRule, ServingObjective, metric_names, serving_rules
from mlref.cli import main
from mlref.dashboards import DASHBOARDS, dashboard_file
from mlref.observe import METRIC_FAMILIES
from programs import need


def is_kept(written: object, read: object) -> bool:
    "Does what a schema made of a file have everything that the file says?"
    if isinstance(written, dict):
        return all(name in read and is_kept(written[name], read[name]) for name in written)
    if isinstance(written, list):
        return len(written) == len(read) and all(map(is_kept, written, read))
    return written == read


def read_by_grafana(fields: dict) -> dict:
    "What Grafana's own schema keeps of a dashboard"
    return json.loads(JSONEncoder(sort_keys=True).encode(GrafanaDashboard.from_json(fields)))


@pytest.mark.parametrize('dashboard', DASHBOARDS, ids=lambda each: each.name)
def test_the_schema_of_grafana_knows_every_field(dashboard):
    fields = json.loads(dashboard_file(dashboard))
    assert is_kept(fields, read_by_grafana(fields))
    wrong = {**fields, 'titel': fields['title']}
    assert not is_kept(wrong, read_by_grafana(wrong))


@pytest.mark.parametrize('dashboard', DASHBOARDS, ids=lambda each: each.name)
def test_prometheus_understands_every_panel(dashboard, tmp_path):
    exprs = [expr for panel in dashboard.panels for expr in panel.lines.values()]
    rules = [
        {'record': f'panel:line:{i}', 'expr': expr.replace('$__rate_interval', '1m')}
        for i, expr in enumerate(exprs)
    ]
    (tmp_path / 'panels.yml').write_text(json.dumps({'groups': [{'name': 'a', 'rules': rules}]}))
    command = [need('promtool'), 'check', 'rules', 'panels.yml']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# neither on a panel nor in a rule, since another metric or the status page shows the same
UNSEEN = {
    'mlref_cache_hit_rate',  # the panel has its parts, rows by result
    'mlref_entities',  # follows the answers
    'mlref_gpu_memory_bytes',
    'mlref_host_cores',
    'mlref_host_cpu_seconds',  # the panel has the processes of the server
    'mlref_process_start_time_seconds',
    'mlref_samples_dropped',
    'mlref_store_clock_minutes',  # the panel has what it is behind the wall
    'mlref_store_snapshot_lag',
    'mlref_variant_absent',  # of a rollout, which reads both itself
    'mlref_variant_score',
    'mlref_worker_pid',
}


def test_every_metric_is_on_a_panel_or_in_a_rule_or_is_said_not_to_be():
    panels = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]
    exprs = [expr for panel in panels for expr in panel.lines.values()]
    exprs += [rule.expr for rule in serving_rules(ServingObjective())]
    looked_at = {name for expr in exprs for name in metric_names(expr)}
    ends = ('', '_total', '_bucket', '_sum', '_count')
    unseen = {
        name for name in METRIC_FAMILIES if not any(f'{name}{end}' in looked_at for end in ends)
    }
    assert unseen == UNSEEN


def test_what_wakes_somebody_or_makes_a_ticket_can_be_looked_at():
    panels = [panel for dashboard in DASHBOARDS for panel in dashboard.panels]
    shown = {name for panel in panels for e in panel.lines.values() for name in metric_names(e)}
    alerts = [rule for rule in serving_rules(ServingObjective()) if isinstance(rule, AlertRule)]
    for rule in alerts:
        read = [name for name in metric_names(rule.expr) if ':' not in name]
        assert set(read) <= shown, rule.alert


def test_the_command_writes_files_that_prometheus_takes(tmp_path, capsys):
    folder = tmp_path / 'watch'
    assert main(['observe', str(folder), '--target', '127.0.0.1:9', '--json']) == 0
    assert len(json.loads(capsys.readouterr().out)['files']) == 4
    command = [need('promtool'), 'check', 'config', 'prometheus.yml']
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert '127.0.0.1:9' in (folder / 'prometheus.yml').read_text()


def test_an_objective_that_leaves_no_budget_writes_nothing(tmp_path, capsys):
    folder = tmp_path / 'watch'
    assert main(['observe', str(folder), '--answered', '1']) != 0
    assert 'leaves no budget' in capsys.readouterr().err and not folder.exists()


def test_a_rule_may_not_name_what_nobody_exports():
    from mlref.alert_rules import check_metrics
    from mlref.core import MlrefError

    rules = [rule for rule in serving_rules(ServingObjective()) if isinstance(rule, AlertRule)]
    check_metrics(serving_rules(ServingObjective()))
    with pytest.raises(MlrefError, match='is none of them'):
        check_metrics([replace(rules[0], expr='mlref_gone > 0')])
