"""The baseline: how many findings a file may have of a rule. It may only shrink

One line a file and rule, sorted, so that two branches merge: `count file rule`. Git's `union`
driver keeps the lines of both sides of a conflict; of two lines about the same, the larger counts,
until the next `--lower`.
"""

from collections import Counter
from pathlib import Path

from checks.notebooks import Finding

BASELINE = Path(__file__).resolve().parents[1] / 'baseline.txt'
Key = tuple[str, str]  # (file, rule)


def read_baseline(path: Path = BASELINE) -> dict[Key, int]:
    "Findings allowed, by file and rule"
    allowed: dict[Key, int] = {}
    for line in path.read_text(encoding='utf-8').splitlines():
        count, file, rule = line.split()
        allowed[file, rule] = max(int(count), allowed.get((file, rule), 0))
    return allowed


def write_baseline(allowed: dict[Key, int], path: Path = BASELINE) -> None:
    "One line a file and rule, sorted; nothing for zero"
    keys = sorted(key for key, count in allowed.items() if count)
    lines = [f'{allowed[file, rule]} {file} {rule}\n' for file, rule in keys]
    path.write_text(''.join(lines), encoding='utf-8')


def count_findings(findings: list[Finding]) -> dict[Key, int]:
    "Findings there are, by file and rule"
    return Counter((finding.file, finding.rule) for finding in findings)


def over_baseline(findings: list[Finding], allowed: dict[Key, int]) -> list[str]:
    "What fails: every finding of a file and rule that has more of them than it may"
    lines = []
    for key, count in sorted(count_findings(findings).items()):
        limit = allowed.get(key, 0)
        if count > limit:
            if limit:
                lines.append(f'{key[0]}: {count} findings of {key[1]}, {limit} allowed; one is new')
            lines.extend(str(f) for f in findings if (f.file, f.rule) == key)
    return lines


def lower_baseline(findings: list[Finding], allowed: dict[Key, int]) -> dict[Key, int]:
    "The same keys, none of them higher: what is new does not enter"
    found = count_findings(findings)
    return {key: min(count, found[key]) for key, count in allowed.items() if key in found}
