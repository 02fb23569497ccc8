"""Write constraints.txt: the exact versions that this environment was tested with.

    .venv/bin/python tools/lock.py                                  # this Python alone
    .venv/bin/python tools/lock.py python3.10 python3.12 python3.13 # and what other Pythons need instead

Each further interpreter resolves the requirements of settings.ini with this environment's versions where they support it.
"""
from __future__ import annotations

import importlib.metadata as metadata
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from refresh import ROOT, settings

SKIPPED = re.compile(r'^(nvidia-|cuda-|triton$|pip$|setuptools$)')  # torch pins its own companions


def norm(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


def requirements() -> list[str]:
    "What settings.ini asks for, at run time and for development."
    return [r for key in ('requirements', 'dev_requirements') for r in shlex.split(settings()[key])]


def closure(names: list[str]) -> dict[str, metadata.Distribution]:
    "Distributions that the requirements need, transitively, in this environment."
    found: dict[str, metadata.Distribution] = {}
    todo, seen = [Requirement(n) for n in names], set()
    todo = [r for r in todo if not r.marker or r.marker.evaluate()]
    while todo:
        need = todo.pop()
        key = (norm(need.name), frozenset(need.extras))
        if key in seen:
            continue
        seen.add(key)
        found[key[0]] = metadata.distribution(need.name)
        for child in map(Requirement, found[key[0]].requires or []):
            if not child.marker or any(child.marker.evaluate({'extra': e}) for e in need.extras or {''}):
                todo.append(child)
    return found


def resolve(python: str, pins: list[str]) -> dict[str, str]:
    "Versions that pip chooses on another Python."
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / 'constraints.txt').write_text('\n'.join(pins))
        command = [sys.executable, '-m', 'pip', '--python', python, 'install', '--dry-run', '--ignore-installed', '--quiet',
                   '--report', f'{folder}/report.json', '-c', f'{folder}/constraints.txt', *requirements()]
        subprocess.run(command, check=True)
        report = json.loads((Path(folder) / 'report.json').read_text())
    return {norm(i['metadata']['name']): i['metadata']['version'].split('+')[0] for i in report['install']}


def lines(name: str, versions: dict[tuple[int, int], str]) -> list[str]:
    "Constraint lines of a package: one, or one for each range of Python versions."
    pythons, out = sorted(versions), []
    for version in dict.fromkeys(versions[p] for p in pythons):
        mine = [p for p in pythons if versions[p] == version]
        later = [p for p in pythons if p > mine[-1]]
        low = [f'python_version >= "{mine[0][0]}.{mine[0][1]}"'] if mine[0] != pythons[0] else []
        high = [f'python_version < "{later[0][0]}.{later[0][1]}"'] if later else []
        marker = ' and '.join(low + high)
        out.append(f'{name}=={version}' + (f'; {marker}' if marker else ''))
    return out


def main(others: list[str]) -> None:
    mine = closure(requirements())
    first = '.'.join(map(str, (*sys.version_info[:2], 0)))  # a marker tells Python 3.11 from 3.10, not 3.11.5 from 3.11.2
    late = [f'{n} {d.version}' for n, d in mine.items() if first not in SpecifierSet(d.metadata.get('Requires-Python') or '')]
    if late:
        raise SystemExit(f'{", ".join(late)}: too new for Python {first}; install versions that it takes, and lock again')
    table: dict[str, dict[tuple[int, int], str]] = {}
    for name, dist in mine.items():
        table.setdefault(name, {})[sys.version_info[:2]] = dist.version.split('+')[0]
    for python in others:
        full = subprocess.check_output([python, '-c', 'import platform; print(platform.python_version())'], text=True).strip()
        pins = [f'{n}=={d.version.split("+")[0]}' for n, d in mine.items()
                if full in SpecifierSet(d.metadata.get('Requires-Python') or '')]
        for name, version in resolve(python, pins).items():
            table.setdefault(name, {})[tuple(map(int, full.split('.')[:2]))] = version
    text = ['# The exact versions that this commit was tested with: `pip install -c constraints.txt -e ".[dev]"`.',
            '# Written by tools/lock.py from the requirements in settings.ini.']
    text += [line for name in sorted(table) if not SKIPPED.match(name) for line in lines(name, table[name])]
    (ROOT / 'constraints.txt').write_text('\n'.join(text) + '\n')
    print(f'wrote constraints.txt: {len(text) - 2} lines')


if __name__ == '__main__':
    main(sys.argv[1:])
