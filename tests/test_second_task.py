"""A second, real task through the same code: what the guide says, as a user would type it in"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / 'nbs' / 'guides' / 'bring_your_own_task.ipynb'
MOST_LINES = 100


def visible_code() -> list[str]:
    "The cells that a reader of the guide sees and types, without those about the trap"
    typed = []
    for cell in json.loads(GUIDE.read_text())['cells']:
        source = ''.join(cell['source'])
        if source.startswith('## The trap'):
            break
        if cell['cell_type'] == 'code' and not source.startswith('#| hide'):
            typed.append(source)
    return typed


def written_lines(code: str) -> list[str]:
    "Lines that hold code; neither blank nor a comment nor a docstring"
    lines = (line.strip() for line in code.splitlines())
    return [line for line in lines if line and not line.startswith(('#', '"'))]


def in_two_files(folder: Path) -> None:
    "`shop.py` and `live.py`, as the guide says to save them"
    cells = visible_code()
    task = 1 + next(k for k, text in enumerate(cells) if text.startswith('SHOP = '))
    (folder / 'shop.py').write_text('\n\n'.join(cells[:task]))
    live = ['from pathlib import Path', 'from shop import *', 'folder = Path()', *cells[task:]]
    (folder / 'live.py').write_text('\n\n'.join(live))


@pytest.fixture(scope='module')
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shop')
    in_two_files(folder)
    command = [sys.executable, 'live.py']
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return folder / 'run'


def test_the_code_of_a_user_is_short():
    lines = [line for cell in visible_code() for line in written_lines(cell)]
    assert 60 < len(lines) <= MOST_LINES


LOOK = """
import json
from pathlib import Path
from mlref.task import load_task
from mlref.workspace import open_lake

lake = open_lake(Path('run'), load_task('shop:SHOP'))
print(json.dumps({
    'actions': lake.sql('select action from decisions')['action'].to_list(),
    'scored': lake.sql('select count(*) as n from predictions')['n'][0],
    'aucs': lake.sql("select value from metrics where name = 'auc'")['value'].to_list(),
}))
"""


def test_it_lives_from_a_raw_file_to_a_retrained_model(shop):
    command = [sys.executable, '-c', LOOK]
    ran = subprocess.run(command, cwd=shop.parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout)
    assert sorted(found['actions']) == ['promote', 'refuse', 'retrain']
    assert found['scored'] > 200
    assert len(found['aucs']) == 2
    assert min(found['aucs']) > 0.65


BARE = """
from dataclasses import replace
from pathlib import Path

from shop import *
from mlref.challenger import bootstrap
from mlref.lifecycle import Stretch, run_days
from mlref.policy import RetrainPolicy
from mlref.task import check_task
from mlref.workspace import Workspace, deliver_events

bare = replace(SHOP, monitored=(), intended_use='')
check_task(bare, events)
shop = Workspace(Path('bare'), bare)
begin = parse_time('1997-09-01')
deliver_events(shop, events, begin)
policy = RetrainPolicy(kind='gbm')
bootstrap(shop, policy, begin)
run_days(shop, events, policy, Stretch(begin, begin + DAY))
print(shop.lake.sql('select name from metrics')['name'].to_list())
"""


def test_a_task_that_watches_no_feature_runs_too(shop):
    ran = subprocess.run(
        [sys.executable, '-c', BARE], cwd=shop.parent, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.strip() == "['auc_estimated']"


def test_no_flight_is_in_what_it_leaves(shop):
    card = next(shop.glob('registry/models/*/card.md')).read_text().lower()
    assert 'buys again within 60 days' in card and 'visit' in card
    for word in ('flight', 'newark', 'airport', 'carrier', 'landed'):
        assert word not in card
