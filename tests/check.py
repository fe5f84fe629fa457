"""What can be seen without running a page: ./run check [--lower] [--only STEP,STEP] [PAGE ...]

Every finding counts against tests/baseline.txt, which may only shrink: more findings of a rule in a
file than it allows, and the check fails. With fewer it passes and says so; `--lower` then writes
the smaller counts. With part of a file's name it prints every finding in that file, allowed or not.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable

from checks.glossary import check_glossary
from checks.notebooks import ROOT, Finding
from checks.pages import check_pages
from checks.parts import check_parts
from checks.ratchet import lower_baseline, over_baseline, read_baseline, write_baseline
from checks.tools import check_export, check_format, check_lint, check_readme, check_types

STEPS: dict[str, Callable[[], list[Finding]]] = {
    'format': check_format,
    'lint': check_lint,
    'types': check_types,
    'export': check_export,
    'pages': check_pages,
    'readme': check_readme,
    'parts': check_parts,
    'glossary': check_glossary,
}


def run_step(
    name: str,  # of the step
    step: Callable[[], list[Finding]],
) -> list[Finding] | None:
    "Its findings, and its seconds told; None when it broke"
    start = time.perf_counter()
    try:
        findings = step()
    except Exception as error:  # the other steps still say what they find
        print(f'== {name}: BROKE: {error}', flush=True)
        return None
    seconds = time.perf_counter() - start
    print(f'== {name}: {len(findings)} findings, {seconds:.1f} s', flush=True)
    return findings


def check(
    only: list[str] | None = None,  # names of steps; None: all of them
    files: list[str] | None = None,  # parts of file names whose findings are all shown
    lower: bool = False,  # write the baseline down to what there is?
) -> int:
    "Run the steps against the baseline; 0 when nothing is new"
    allowed = read_baseline()
    results = {name: run_step(name, STEPS[name]) for name in only or STEPS}
    findings = [finding for found in results.values() for finding in found or []]
    shown = [finding for finding in findings if any(part in finding.file for part in files or [])]
    for finding in shown:
        print(finding)
    new = over_baseline(findings, allowed)
    if new:
        print('\n'.join(['== above the baseline', *new]))
    if files is None and only is None:
        print(summarize(findings, allowed, lower))
    broke = [name for name, found in results.items() if found is None]
    if lower and not broke:
        write_baseline(lower_baseline(findings, allowed))
    return int(bool(new or broke))


def summarize(
    findings: list[Finding],
    allowed: dict[tuple[str, str], int],  # the baseline
    lower: bool,  # is it about to be lowered?
) -> str:
    "Findings a rule, and by how much the baseline could be lowered"
    rules = Counter(finding.rule for finding in findings)
    counts = ', '.join(f'{rule} {count}' for rule, count in rules.most_common())
    spare = sum(allowed.values()) - sum(lower_baseline(findings, allowed).values())
    text = f'== {len(findings)} findings in the baseline: {counts or "none"}'
    if spare and not lower:
        text += f'\n== {spare} fewer than allowed; lower the baseline: ./run check --lower'
    return text


def unknown_parts(
    parts: list[str],  # of file names
) -> list[str]:
    "Those that are part of no name"
    folders = ('nbs', 'mlref', 'tests')
    found = [*ROOT.glob('*'), *(path for name in folders for path in (ROOT / name).rglob('*'))]
    names = [path.relative_to(ROOT).as_posix() for path in found if path.is_file()]
    return [part for part in parts if not any(part in name for name in names)]


def main(
    words: list[str],  # of the command line
) -> int:
    "Parse, check, tell"
    parser = argparse.ArgumentParser(prog='./run check', description=__doc__.split('\n')[0])
    parser.add_argument('files', nargs='*', metavar='PAGE', help='part of the name of a file')
    parser.add_argument('--lower', action='store_true', help='lower the baseline')
    parser.add_argument('--only', help=f'steps, with commas between: {",".join(STEPS)}')
    given = parser.parse_args(words)
    only = given.only.split(',') if given.only else None
    if unknown := set(only or []) - set(STEPS):
        parser.error(f'expected steps of {",".join(STEPS)}, got {",".join(sorted(unknown))}')
    if unnamed := unknown_parts(given.files):
        said = ', '.join(map(repr, unnamed))
        parser.error(f'expected part of the name of a page, got {said}')
    if given.lower and only:
        parser.error('expected --lower with all steps: the others would lose their lines')
    start = time.perf_counter()
    status = check(only, given.files or None, given.lower)
    print(f'== {"FAILED" if status else "ok"}, {time.perf_counter() - start:.1f} s', flush=True)
    return status


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
