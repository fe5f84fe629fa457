"""The installed package as a user meets it"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIGHT = [
    m
    for m in 'core events log contracts lake features flights offline records online stream'.split()
    if (ROOT / f'mlref/{m}.py').exists()
]


@pytest.mark.parametrize('module', LIGHT)
def test_light_modules_import_nothing_heavy(module):
    code = (
        f'import sys, mlref.{module}; print([m for m in ("torch", "mlflow", "nannyml", "ray",'
        ' "lightgbm", "pandas") if m in sys.modules])'
    )
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')
    assert r.stdout.strip() == '[]', r.stdout + r.stderr


def test_kill_9_loses_and_doubles_nothing(tmp_path):
    "Five kills of a real ingesting process, at different points; then it finishes"
    import os
    import random
    import signal
    import time

    from mlref.core import digest, parse_time
    from mlref.events import disturb_delivery, encode_events, events_between
    from mlref.flights.contract import flight_rules
    from mlref.flights.events import FLIGHT_SCHEMA, raw_folder, read_raw, read_year
    from mlref.ingest import ingest
    from mlref.lake import Lake, events_as_of
    from mlref.log import LocalLog

    part = events_between(
        read_year(raw_folder()), parse_time('2013-02-11'), parse_time('2013-02-16')
    )
    log = LocalLog(tmp_path / 'log')
    log.append(
        'events', encode_events(disturb_delivery(part, seed=5, late=0.1, twice=0.1), FLIGHT_SCHEMA)
    )
    log.append('events', [b'{broken', b'\xff'])
    airports = read_raw(raw_folder(), 'airports')['faa'].to_list() + ['SJU', 'BQN', 'STT', 'PSE']
    whole = Lake(tmp_path / 'whole.duckdb', FLIGHT_SCHEMA)
    ingest(whole, log, 'events', flight_rules(airports))
    log.close()
    code = """
import sys; from pathlib import Path; from mlref.ingest import ingest; from mlref.lake import *; from mlref.flights.contract import flight_rules; from mlref.log import LocalLog; from mlref.events import *; from mlref.flights.events import *
folder = Path(sys.argv[1])
lake = Lake(folder/'lake.duckdb', FLIGHT_SCHEMA)
print('open', flush=True)
ingest(lake, LocalLog(folder/'log', readonly=True), 'events', flight_rules(read_raw(raw_folder(), 'airports')['faa'].to_list() + ['SJU', 'BQN', 'STT', 'PSE']), batch=100)
"""
    g, killed = random.Random(0), 0
    for i in range(5):
        p = subprocess.Popen(
            [sys.executable, '-c', code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert p.stdout.readline() == 'open\n'
        time.sleep(g.uniform(0.02, 0.25))
        killed += p.poll() is None
        os.kill(p.pid, signal.SIGKILL) if p.poll() is None else None
        p.wait()
    assert killed >= 3
    subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=True, capture_output=True)
    lake = Lake(tmp_path / 'lake.duckdb', FLIGHT_SCHEMA)
    assert digest(events_as_of(lake)) == digest(events_as_of(whole))
    total = lake.sql(
        'select sum(messages) m, sum(good) g, sum(repeated) r, sum(dead) d from commits'
    ).row(0)
    assert (
        total[0] == total[1] + total[2] + total[3]
        and total[0] == whole.sql('select sum(messages) m from commits')['m'][0]
    )
    assert lake.sql(
        'select count(*) n, count(distinct (topic, part, off)) k from dead_letters'
    ).row(0) == whole.sql('select count(*) n, count(*) k from dead_letters').row(0)
