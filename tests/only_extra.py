"""Run code as if only mlref and some of its extras were installed: only_extra.py EXTRAS CODE"""

import re
import sys
from configparser import ConfigParser, SectionProxy
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def plain(name: str) -> str:
    "A distribution's name as packaging compares it"
    return re.sub(r'[-_.]+', '-', name).lower()


def read_settings() -> SectionProxy:
    "What settings.ini declares"
    settings = ConfigParser(delimiters=['='])
    settings.read(ROOT / 'settings.ini', encoding='utf-8')
    return settings['DEFAULT']


def read_extras() -> dict[str, list[str]]:
    "Extra -> requirements, as settings.ini declares them; '' = always"
    declared = read_settings()
    extras = {'': declared['requirements'].split(), 'dev': declared['dev_requirements'].split()}
    for key, value in declared.items():
        if key.endswith('_extra'):
            extras[key.removesuffix('_extra')] = value.split()
    return extras


def needed_by(line: str, extras: tuple[str, ...]) -> Requirement | None:
    "A requirement, unless its marker excludes it here"
    need = Requirement(line)
    asked = [{'extra': extra} for extra in ('', *extras)]
    wanted = need.marker is None or any(need.marker.evaluate(each) for each in asked)
    return need if wanted else None


def all_needed(lines: list[str]) -> set[str]:
    "Names of the distributions that pip would install for some requirements"
    todo = [Requirement(line) for line in lines]
    seen = set()
    while todo:
        need = todo.pop()
        key = (plain(need.name), tuple(sorted(need.extras)))
        if key in seen:
            continue
        seen.add(key)
        try:
            more = metadata.requires(need.name) or []
        except metadata.PackageNotFoundError:  # for another platform
            continue
        found = [needed_by(line, key[1]) for line in more]
        todo += [each for each in found if each is not None]
    return {name for name, _ in seen}


class Hiding:
    "A finder that does not find what would not be installed"

    def __init__(self, finder: object, hidden: set[str]):
        self.finder = finder
        self.hidden = hidden

    def __getattr__(self, name):  # e.g. find_distributions
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        "As the finder says, but for what is hidden; a package may bring some inside itself"
        found = self.finder.find_spec(name, path, target)
        hidden = found is not None and name.split('.')[0] in self.hidden
        return None if hidden and 'thirdparty_files' not in str(found.origin) else found


def hidden_modules(installed: set[str]) -> set[str]:
    "Modules that are here and would not be there"
    owners = metadata.packages_distributions()
    ours = {module for module, names in owners.items() if installed & {*map(plain, names)}}
    return {*owners} - ours - {'mlref'}


def main(
    extras: str,  # names, commas between them
    code: str,
) -> None:
    "Hide the rest, then run the code"
    declared = read_extras()
    lines = [line for extra in ('', *filter(None, extras.split(','))) for line in declared[extra]]
    hidden = hidden_modules(all_needed(lines))
    sys.meta_path[:] = [Hiding(finder, hidden) for finder in sys.meta_path]
    exec(compile(code, 'code', 'exec'), {'__name__': '__main__'})


if __name__ == '__main__':
    main(*sys.argv[1:3])
