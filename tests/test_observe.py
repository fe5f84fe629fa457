"""What a real server tells of its work, its processes and its model"""

import os
import time

import numpy as np

from mlref.model_health import HEALTH_KEY, ModelHealth, encode_health

ROWS = np.random.default_rng(0).uniform(0, 9, (3, 2)).astype(np.float32)


def read_samples(served) -> dict[str, float]:
    "The page of a scraper, by its samples"
    page = served.call('GET', '/metrics')[1].decode()
    lines = [line.rsplit(' ', 1) for line in page.splitlines() if not line.startswith('#')]
    return {name: float(value) for name, value in lines}


def grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after.get(name, 0.0) - before.get(name, 0.0)


def test_runs_waits_and_scores_are_counted(served):
    before = read_samples(served)
    rows = np.random.default_rng().uniform(0, 9, (3, 2)).astype(np.float32)  # in no cache
    assert served.post(served.infer, served.tensor(rows))[0] == 200
    after = read_samples(served)
    labels = '{model="late-visits"}'
    # others may ask at the same time, so at least as much
    assert grown(before, after, f'mlref_score_count{labels}') >= 3
    assert grown(before, after, f'mlref_batch_rows_sum{labels}') >= 3
    assert grown(before, after, f'mlref_queue_wait_seconds_count{labels}') >= 1


def test_remembered_scores_are_counted_over_all_workers(served):
    def lookups() -> float:
        found = read_samples(served)
        name = 'mlref_cache_rows_total{model="late-visits",result="%s"}'
        return sum(found.get(name % result, 0.0) for result in ('hit', 'joined', 'miss'))

    before = lookups()
    for _ in range(20):
        assert served.post(served.infer, served.tensor(ROWS))[0] == 200
    # each worker tells within two looks at the state
    for _ in range(200):
        if lookups() >= before + 60:
            return
        time.sleep(0.05)
    raise AssertionError(f'expected 60 more rows looked up, got {lookups() - before:g}')


def test_the_processes_of_the_server_are_told_apart(served):
    found = read_samples(served)
    cpu = {
        name.split('"')[1]: value
        for name, value in found.items()
        if name.startswith('mlref_process_cpu_seconds_total')
    }
    assert {'supervisor', '0', '1'} <= {*cpu} and all(value > 0 for value in cpu.values())
    pids = {found[f'mlref_worker_pid{{process="{index}"}}'] for index in (0, 1)}
    assert len(pids) == 2 and os.getpid() not in pids
    assert found['mlref_disk_bytes{folder="log",kind="free"}'] > 0
    assert found['mlref_host_cores'] >= 1


def test_a_server_tells_what_the_loop_published(served):
    from mlref.lmdb_store import LmdbStore
    from small import FEATURES

    health = ModelHealth(measured_at=1000, version='v', alarms=('auc',), auc=0.61)
    store = LmdbStore(served.home / 'online', FEATURES)
    try:
        store.write({HEALTH_KEY: encode_health(health)})
        told = read_samples(served)
        store.write({HEALTH_KEY: None})
    finally:
        store.close()
    assert told['mlref_auc{kind="realised",model="late-visits"}'] == 0.61
    assert told['mlref_monitor_alarms{measure="auc",model="late-visits"}'] == 1
    assert told['mlref_monitor_timestamp_seconds{model="late-visits"}'] == 60_000
    assert 'mlref_auc{kind="realised",model="late-visits"}' not in read_samples(served)
