"""Write nbs/95_contracts.ipynb, the page *What is refused, what is warned of, what is converted*, from the tests.

A test that holds a promise about odd input says so with a mark, and the mark becomes a row of the page:

    @pytest.mark.contract('refused', 'images', 'a 4-D file without an order of channels', 'the error prints the `--channels` to type')

The tests are read, not run, so the four texts are written out. A row of a parametrised test is marked in its
`pytest.param(..., marks=pytest.mark.contract(...))`.
"""
from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from refresh import NBS, ROOT, settings

PAGE = NBS / '95_contracts.ipynb'
TESTS = ROOT / 'tests'
#: What may become of an input; its heading and what that says.
KINDS = {
    'refused': ('What is refused', 'A line on stderr that names the file, what was found and what was expected; exit code 2 (for a case of a '
                                   'cohort: that case fails, the others are done, and the exit code is 1). Nothing is written over.'),
    'warned': ('What is warned of', 'The work is done, and a line says what was odd.'),
    'converted': ('What is converted', 'Brought into the one form in which everything else computes; what is written goes back to the '
                                       'form of the input.'),
    'works': ('What works all the same', 'Odd surroundings, odd names, old files: the result is the same as elsewhere.'),
}
#: What the input is, in the order of the page.
AREAS = ('images', 'labels', 'cohorts', 'names', 'settings', 'splits', 'models', 'downloads', 'outputs', 'processes', 'surroundings')


@dataclass(frozen=True)
class Row:
    "One promise, and the test that holds it."
    kind: str  # of KINDS
    area: str  # of AREAS
    given: str  # what comes in
    happens: str  # what becomes of it
    test: str  # file and function


def marks(path: Path) -> list[Row]:
    "The rows that a file of tests holds, in its order; a mark that cannot be read is an error with its line."
    out = []
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        name = getattr(node, 'name', None)
        for call in (c for c in ast.walk(node) if isinstance(c, ast.Call) and ast.unparse(c.func).endswith('mark.contract')):
            texts = [a.value if isinstance(a, ast.Constant) else None for a in call.args]
            where = f'{path.name}, line {call.lineno}'
            if len(texts) != 4 or call.keywords or not all(isinstance(t, str) and t for t in texts):
                raise SystemExit(f'{where}: expected four texts: kind, area, what is given, what happens')
            for found, known in zip(texts, (KINDS, AREAS)):
                if found not in known:
                    raise SystemExit(f'{where}: found {found!r}, expected one of {", ".join(known)}')
            out.append(Row(*texts, f'{path.stem}.{name}' if name else path.stem))
    return out


def rows(folder: Path = TESTS) -> list[Row]:
    "All of them."
    return [row for path in sorted(folder.rglob('test_*.py')) for row in marks(path)]


def in_cell(text: str) -> str:
    "A text as a cell of a Markdown table: bars, dollars and angle brackets are themselves."
    parts = re.split(r'(`[^`]*`)', ' '.join(text.split()))
    plain = [p if n % 2 else re.sub(r'([$*_])', r'\\\1', p).replace('<', '&lt;') for n, p in enumerate(parts)]
    return ''.join(plain).replace('|', r'\|')


def table(some: list[Row]) -> str:
    "Rows as a table."
    lines = [f'| {in_cell(r.given)} | {in_cell(r.happens)} | `{r.test}` |' for r in some]
    return '\n'.join(['| given | what happens | held by |', '|:--|:--|:--|', *lines])


def texts(found: list[Row]) -> list[str]:
    "The Markdown cells of the page."
    out = []
    for kind, (title, about) in KINDS.items():
        of_kind = [r for r in found if r.kind == kind]
        out += [f'## {title}\n\n{about}'] if of_kind else []
        for area in AREAS:
            some = [r for r in of_kind if r.area == area]
            out += [f'### {area.capitalize()}, {kind}\n\n{table(some)}'] if some else []
    return out


def head(n: int) -> str:
    "How the page opens."
    package = settings()['lib_name']
    return f"""# What is refused, warned of, converted

> Reference: {n} odd inputs, what becomes of each, and the test that holds it

[![Open in Colab](images/open-in-colab.svg)](https://colab.research.google.com/github/{package}/{package}/blob/main/nbs/{PAGE.name})

A result that is wrong without a word is worse than an error. So each input that is not what it should be is refused, or used with a
warning, or converted to what is meant; which of the three, this page says. It is written from the marks of the tests by
`tools/contracts.py`: no row is here that no test holds."""


def cell(kind: str, source: str, **more) -> dict:
    "A cell with a name that its text gives it."
    name = hashlib.sha256(source.encode()).hexdigest()[:8]
    return {'cell_type': kind, **({'execution_count': None} if kind == 'code' else {}), 'id': name, 'metadata': {}, **more,
            'source': source.splitlines(keepends=True)}


def colab() -> str:
    "The cell that every notebook begins with."
    cells = json.loads((NBS / 'index.ipynb').read_text(encoding='utf-8'))['cells']
    return ''.join(next(c['source'] for c in cells if c['cell_type'] == 'code'))


def render() -> str:
    "The text of the notebook."
    found = rows()
    parts = texts(found)
    cells = [cell('markdown', head(len(found))), cell('code', colab(), outputs=[]), *(cell('markdown', t) for t in parts)]
    about = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    return json.dumps({'cells': cells, 'metadata': about, 'nbformat': 4, 'nbformat_minor': 5}, indent=1, ensure_ascii=False) + '\n'


if __name__ == '__main__':
    PAGE.write_text(render(), encoding='utf-8')
    print(f'wrote {PAGE.name}')
