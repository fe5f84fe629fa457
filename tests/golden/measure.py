"""Golden values: what the adapter gives, as counts and hashes that JSON can hold"""

import hashlib
import json
import os
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import polars as pl
import polars.selectors as cs

from golden import adapter

FOLDER = Path(__file__).parent
TRAINING_SETS = {
    'January to March': ('2013-01-01', '2013-04-01'),
    'July': ('2013-07-01', '2013-08-01'),
}
SCORED_DAYS = ('2013-02-09', '2013-04-17', '2013-07-10', '2013-10-02', '2013-12-20')
DECIMALS = 9  # of a score that enters a hash: the last bits of exp() differ between C libraries

# Tables of a run that every machine fills with the same values
ROBUST = (
    'events',
    'messages refused',
    'flights scored',
    'missing values',
    'checks of the tables',
    'days',
)


def digest_of(values: np.ndarray) -> str:
    "sha256 over type, shape and bytes; every NaN counts as the same one"
    if values.dtype.kind == 'U':
        return hashlib.sha256('\n'.join(values.tolist()).encode()).hexdigest()
    if values.dtype.kind == 'f':
        values = np.where(np.isnan(values), values.dtype.type(np.nan), values)
    head = f'{values.dtype.str} {values.shape}\n'.encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()


def training_set(rows: adapter.Rows) -> dict[str, object]:
    "A training set's size, and a hash of everything in it"
    return {
        'rows': len(rows.ids),
        'labelled': int((~np.isnan(rows.label)).sum()),
        'late': int(np.nansum(rows.label)),
        'ids': digest_of(rows.ids),
        'cutoff': digest_of(rows.cutoff),
        'when the label became known': digest_of(rows.label_known),
        'label': digest_of(rows.label),
        'features': digest_of(rows.values),
        'names of the features': hashlib.sha256('\n'.join(rows.names).encode()).hexdigest(),
    }


def tree_scores(scores: np.ndarray) -> dict[str, object]:
    "Scores that are the same on every processor"
    return {
        'rows': len(scores),
        'sha256': digest_of(scores.round(DECIMALS)),
        'first': scores[:5].tolist(),
    }


def network_scores(scores: np.ndarray) -> dict[str, object]:
    "Scores that a processor may round its own way: no hash, some of them"
    return {
        'rows': len(scores),
        'mean': float(scores.mean()),
        'first': scores[:5].tolist(),
    }


def frozen_scores(day: str) -> dict[str, dict]:
    "What both frozen models say of a day"
    scores = adapter.frozen_scores(day)
    return {'trees': tree_scores(scores['trees']), 'network': network_scores(scores['network'])}


def features(week: dict[str, np.ndarray]) -> dict[str, dict]:
    "A hash and the missing values of every column"
    return {
        name: {'sha256': digest_of(column), 'missing': int(np.isnan(column).sum())}
        for name, column in week.items()
    }


def versions(columns: dict[str, dict]) -> dict[str, dict[str, str]]:
    "The version of every part, and one hash over the values of its columns, whatever their names"
    found = {}
    for name, part in adapter.parts().items():
        values = '\n'.join(columns[c]['sha256'] for c in part.columns)
        found[name] = {
            'version': part.version,
            'values': hashlib.sha256(values.encode()).hexdigest(),
        }
    return found


def _table(frame: pl.DataFrame) -> str:
    # without a header: a column may get another name. Bytes are shown as hexadecimal digits
    shown = frame.with_columns(cs.binary().bin.encode('hex'))
    return hashlib.sha256(shown.write_csv(include_header=False).encode()).hexdigest()


def run(folder: Path) -> dict[str, object]:
    "What must be the same of a quick run on every machine"
    tables = adapter.run_tables(folder, adapter.RUN_TABLES)
    decided = tables['decisions'].iter_rows()
    measured = Counter(adapter.golden_word(name) for name in tables['metrics']['name'])
    found = {
        'decisions': [[action, adapter.golden_word(why)] for action, why in decided],
        'measured': dict(sorted(measured.items())),
    }
    for name in ROBUST:
        found[f'sha256 of {name}'] = _table(tables[name])
    for name, table in tables.items():
        found[f'rows of {name}'] = table.height
    return found


def run_with_network(folder: Path) -> dict[str, object]:
    "What must be the same of a quick run on one machine"
    tables = adapter.run_tables(folder, adapter.NETWORK_TABLES)
    return {
        'decisions': adapter.decided(folder),
        **{f'sha256 of {name}': _table(table) for name, table in tables.items()},
    }


def machine() -> dict[str, object]:
    "All that the last bits of a network may depend on"
    about = Path('/proc/cpuinfo')
    lines = about.read_text().splitlines() if about.exists() else []
    kept = [line for line in lines if line.startswith(('model name', 'flags', 'Features'))]
    return {
        'processor': hashlib.sha256('\n'.join(sorted(set(kept))).encode()).hexdigest()[:12],
        'cores': os.cpu_count(),
        'threads': os.environ.get('OMP_NUM_THREADS', ''),
        'torch': metadata.version('torch'),
        'numpy': metadata.version('numpy'),
    }


def load(name: str) -> dict:
    "A file of golden values"
    return json.loads((FOLDER / f'{name}.json').read_text())


def differences(golden: dict, found: dict) -> dict[str, tuple]:
    "Name -> (golden, found) of every entry that is not the same, or on one side only"
    names = [*golden, *(name for name in found if name not in golden)]
    pairs = {name: (golden.get(name), found.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
