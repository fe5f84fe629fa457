"""Every benchmark runs to its end, as small as it can be: what nobody runs breaks unseen"""

import json
import os
import shutil
from pathlib import Path

import pytest

from mlref.pipeline import read_parameters, run_step

STEPS = Path(__file__).parent.parent / 'nbs' / 'steps'
BENCHES = sorted(path.stem.removeprefix('bench_') for path in STEPS.glob('bench_*.ipynb'))
# small enough to try the page; what they then say is worth nothing
SMALL = {
    'ab': {'tests': 20},
    'alarms': {'kind': 'logistic', 'seasons': 40},
    'arrivals': {'rounds': 1, 'seconds': 2},
    'balance': {'rounds': 1, 'seconds': 1},
    'compress': {'rounds': 2, 'kind': 'torch', 'thin': 10},
    'contracts': {'rounds': 1},
    'day': {'now': '2013-03-01T07:00', 'days': 2, 'rounds': 1},
    'evaluate': {'challengers': 4, 'bad': 2, 'thin': 5},
    'features': {'rounds': 1},
    'fleet': {'seconds': 4},
    'freshness': {},
    'gates': {'pairs': 20, 'kind': 'torch', 'seeds': 2},
    'gpu': {'rounds': 1},
    'ingest': {'rounds': 1},
    'lifecycle': {},
    'loop': {'rounds': 1, 'epochs': 1},
    'monitor': {'rounds': 1, 'rows': 50_000, 'chunks': 5},
    'online': {'rounds': 2},
    'outgrow': {'rounds': 1, 'failovers': 1, 'events': 5000, 'turns': 1, 'fits': 1},
    'ray': {'rounds': 1, 'fits': 1, 'epochs': 1, 'seconds': 1},
    'registry': {'rounds': 1, 'begun': 1, 'kills': 1},
    'rollout': {'rollouts': 20, 'kind': 'logistic', 'first': 8},
    'serve': {'rounds': 1, 'seconds': 1, 'only': 'nobody'},
    'tabm': {'seeds': 1, 'whole': 0, 'thin': 10},
    'train': {'thin': 20},
    'warm': {'links': 1},
}


def test_each_has_its_settings():
    assert sorted(SMALL) == BENCHES


@pytest.mark.skipif(os.environ.get('MLREF_DEEP') != '1', reason='an hour; ./run test --deep')
@pytest.mark.parametrize('bench', BENCHES)
def test_it_runs_to_its_end(bench, tmp_path):
    if bench == 'lifecycle' and not any((STEPS.parents[1] / 'data' / 'runs').glob('year-*')):
        pytest.skip('a year that was lived is compared; ./run')
    step = STEPS / f'bench_{bench}.ipynb'
    # neither the results nor the ledger of the repository: a copy
    ledger = tmp_path / 'results' / 'ledger.jsonl'
    ledger.parent.mkdir()
    shutil.copy(STEPS.parents[1] / 'reports' / 'results' / 'ledger.jsonl', ledger)
    elsewhere = {'reports': str(tmp_path), 'ledger': str(ledger)}
    known = read_parameters(step)
    given = {name: value for name, value in elsewhere.items() if name in known}
    run_step(step, tmp_path / step.name, given | SMALL[bench])
    written = json.loads((tmp_path / 'results' / f'{bench}.json').read_text())
    assert written['rows'] or written['not_run']
