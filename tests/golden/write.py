"""Write the golden values anew: a decision, never a way to make a test pass.

python tests/golden/write.py                 show what differs; exit status 1 when something does
python tests/golden/write.py --versions      add versions that compute listed values
python tests/golden/write.py --write         take everything as it is now
python tests/golden/write.py --run DATA      take the quick run in DATA (its --data) too
python tests/golden/write.py --models        train the frozen models, when their format changes
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from golden import adapter, measure


def write(name: str, values: dict) -> None:
    "Replace a file of golden values"
    text = json.dumps(values, indent=1, ensure_ascii=False)
    (measure.FOLDER / f'{name}.json').write_text(text + '\n')


def read(name: str) -> dict:
    "A file of golden values; empty when there is none yet"
    return measure.load(name) if (measure.FOLDER / f'{name}.json').exists() else {}


def add_versions(table: dict[str, list[dict]], found: dict[str, dict], anything: bool) -> bool:
    "List every version that is not in the table; one of other values only when `anything` goes"
    refused = False
    for name, entry in found.items():
        listed = table.setdefault(name, [])
        if entry in listed:
            continue
        equal = [e['version'] for e in listed if e['values'] == entry['values']]
        if listed and not equal and not anything:
            print(f'{name}: {entry["version"]} computes values that no listed version computes')
            refused = True
            continue
        print(f'{name}: {entry["version"]} added, same values as {", ".join(equal) or "none"}')
        listed.append(entry)
    return refused


def main() -> int:
    "Measure, show, and write what was asked for"
    ask = argparse.ArgumentParser(description='Golden values: show what differs, or write them')
    ask.add_argument('--write', action='store_true', help='take everything as it is now')
    ask.add_argument('--versions', action='store_true', help='add versions of listed values')
    ask.add_argument('--run', type=Path, help='take the quick run in this folder of runs too')
    ask.add_argument('--models', action='store_true', help='train the frozen models anew')
    args = ask.parse_args()
    if args.models:
        adapter.train_models()
    columns = measure.features(adapter.feature_week())
    found = {
        'training_sets': {
            name: measure.training_set(adapter.training_set(*span))
            for name, span in measure.TRAINING_SETS.items()
        },
        'scores': {day: measure.frozen_scores(day) for day in measure.SCORED_DAYS},
        'features': columns,
    }
    if args.run:
        folder = adapter.run_folder(args.run)
        found['quick_run'] = {
            'on every machine': measure.run(folder),
            'on one machine': {
                'machine': measure.machine(),
                **measure.run_with_network(folder),
            },
        }
    changed = False
    for name, values in found.items():
        for entry, (was, now) in measure.differences(read(name), values).items():
            print(f'{name}: {entry}: {was} -> {now}')
            changed = True
        if args.write:
            write(name, values)
    table = read('versions')
    refused = add_versions(table, measure.versions(columns), args.write)
    if args.write or args.versions:
        write('versions', table)
    return int(refused or (changed and not args.write))


if __name__ == '__main__':
    sys.exit(main())
