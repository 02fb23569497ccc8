"""Build the documentation site: notebooks -> _proc (pages without plumbing) -> _docs (HTML).

    python tools/docs.py                  # with smalldocs (pure Python), if anything has changed
    python tools/docs.py --force          # in any case
    python tools/docs.py --quarto         # with Quarto, where it is installed

Nothing is run: a page shows a notebook's prose, code and stored outputs. What is exported gets a heading of its own, to
link to; private helpers are folded; plumbing is left out. plotly figures are stored as data (`application/vnd.plotly.v1+json`):
here they become divs, and plotly.js is put beside the pages once, so that they draw without a network.
"""
from __future__ import annotations

import argparse
import ast
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert
from refresh import NBS, ROOT, settings

PROC, DOCS = ROOT / '_proc', ROOT / '_docs'
PLOTLY = 'application/vnd.plotly.v1+json'
PACKAGE = settings()['lib_name']
LOCAL_DIRECTIVES = ('hide', 'default_exp')


# ---- reading a notebook

def directives(source: str) -> list[str]:
    "What a cell says behind `#|`."
    return re.findall(r'^#\|\s*(.+?)\s*$', source, flags=re.MULTILINE)


def without_directives(source: str) -> str:
    "The code of a cell without its nbdev directives; Quarto's own (`key: value`) stay."
    lines = [x for x in source.split('\n') if not (x.startswith('#|') and (':' not in x or re.match(r'#\|\s*eval:', x)))]
    return '\n'.join(lines).strip('\n')


def module_name(notebook: dict) -> str | None:
    "The module that a notebook exports."
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', '\n'.join(''.join(c['source']) for c in notebook['cells']), flags=re.MULTILINE)
    return found.group(1) if found else None


def read(path: Path) -> dict:
    "A notebook with its sources as single strings."
    notebook = json.loads(path.read_text(encoding='utf-8'))
    for cell in notebook['cells']:
        cell['source'] = ''.join(cell['source'])
    return notebook


def page_name(path: Path) -> str:
    "Title of a notebook."
    return re.search(r'^# (.+)$', read(path)['cells'][0]['source'], flags=re.MULTILINE).group(1)


# ---- what the package exports, and on which page

DEFINITION = (ast.FunctionDef, ast.ClassDef)


def is_public(node: ast.stmt) -> bool:
    "Whether a statement defines a public function or class."
    return isinstance(node, DEFINITION) and not node.name.startswith('_')


def symbol_pages() -> dict[str, tuple[str, str]]:
    "Public name -> the notebook that defines it and its docstring; a name that two notebooks define belongs to neither."
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(NBS.glob('*.ipynb')):
        for cell in read(path)['cells']:
            if cell['cell_type'] == 'code' and 'export' in directives(cell['source']):
                for node in filter(is_public, ast.parse(cell['source']).body):
                    doc = (ast.get_docstring(node) or '').split('\n')[0]
                    found[node.name] = ('', '') if node.name in found else (path.name, doc)
    return {name: entry for name, entry in found.items() if entry[0]}


def prose(text: str, change: Callable[[str], str]) -> str:
    "Change Markdown, but no code block, heading, link or picture in it."
    parts = re.split(r'(^```.*?^```|^#.*?$|!?\[[^\]]*\]\([^)]*\))', text, flags=re.MULTILINE | re.DOTALL)
    return ''.join(p if i % 2 else change(p) for i, p in enumerate(parts))


def link_names(text: str, pages: dict[str, tuple[str, str]], here: str) -> str:
    "Make each public name in backticks a link to where it is documented."
    def link(match: re.Match) -> str:
        name = match.group(1).split('(')[0]
        page = pages.get(name, [''])[0]
        return f'[{match.group(0)}]({"" if page == here else page}#{name.lower()})' if page else match.group(0)
    return prose(text, lambda part: re.sub(r'(?<!`)`(\w+(?:\(\))?)`(?!`)', link, part))


def formulas(text: str) -> str:
    "TeX between dollars as MathML, which browsers draw by themselves."
    def mathml(match: re.Match) -> str:
        code, display, inline = match.groups()
        if code:
            return code
        return convert(display or inline, display='block' if display else 'inline')
    pattern = r'(`[^`]*`)|\$\$(.+?)\$\$|(?<!\\)\$(?=\S)([^$`\n]*?\S)\$(?!\d)'
    return prose(text, lambda part: re.sub(pattern, mathml, part, flags=re.DOTALL))


# ---- cells of a page

def markdown(text: str) -> dict:
    return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


def front_matter(text: str) -> list[dict]:
    "The first cell as Quarto wants it: title and subtitle as front matter, the rest as prose."
    title = re.search(r'^# (.+)$', text, flags=re.MULTILINE).group(1)
    subtitle = re.search(r'^> (.+)$', text, flags=re.MULTILINE)
    rest = re.sub(r'^(# .+|> .+)$', '', text, count=2, flags=re.MULTILINE).strip()
    meta = f'title: {json.dumps(title)}\n' + (f'subtitle: {json.dumps(subtitle.group(1))}\n' if subtitle else '')
    return [{'cell_type': 'raw', 'metadata': {}, 'source': f'---\n{meta}---'}, markdown(rest)]


def kind(node: ast.stmt) -> str:
    "What a statement is to a reader."
    if isinstance(node, DEFINITION):
        return node.name if is_public(node) else '_'
    imports = isinstance(node, (ast.Import, ast.ImportFrom)) or isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)
    return 'import' if imports else 'value'


def chunks(source: str) -> list[tuple[str, str]]:
    "Code cut into pairs (kind, text): each public definition alone, helpers together, values together."
    lines, out, start = source.split('\n'), [], 0
    for node in ast.parse(source).body:
        text = '\n'.join(lines[start:node.end_lineno]).strip('\n')
        start = node.end_lineno
        if out and out[-1][0] == kind(node) and not is_public(node):
            text = out.pop()[1] + '\n\n' * (2 if kind(node) == '_' else 1) + text
        out.append((kind(node), text))
    return out


def exported(cell: dict) -> list[dict]:
    "An exported cell: a heading for each public definition, private helpers folded, imports left out."
    out: list[dict] = []
    for name, text in chunks(without_directives(cell['source'])):
        if name == 'import':
            continue
        if name not in ('value', '_'):
            out.append(markdown(f'### {name} {{#{name.lower()} .api}}'))
        fold = '#| code-fold: true\n#| code-summary: "Helpers"\n' if name == '_' else ''
        out.append({**cell, 'source': fold + text, 'outputs': []})
    if out:
        out[-1]['outputs'] = cell.get('outputs', [])
    return out


def plotly_div(figure: dict, name: str, first: bool) -> str:
    "A figure as a div that draws itself; the first of a page also fetches plotly.js."
    height = figure.get('layout', {}).get('height', 450)
    config = figure.pop('config', {}) | {'responsive': True, 'displaylogo': False}
    data = json.dumps({'data': figure['data'], 'layout': figure['layout'], 'config': config}).replace('</', '<\\/')
    library = '<script src="plotly.min.js"></script>\n' if first else ''
    return (f'{library}<div id="{name}" class="plotly-figure" style="height:{height}px"></div>\n'
            f'<script>(function () {{ const f = {data};\nPlotly.newPlot("{name}", f.data, f.layout, f.config); }})();</script>')


def with_plotly(cell: dict, name: str, first: bool) -> bool:
    "Replace the plotly data among a cell's outputs by HTML; whether there was any."
    found = False
    for i, output in enumerate(cell.get('outputs', [])):
        figure = output.get('data', {}).get(PLOTLY)
        if figure is not None:
            output['data'] = {'text/html': plotly_div(figure, f'{name}-{i}', first and not found)}
            found = True
    return found


def page(path: Path, pages: dict[str, tuple[str, str]]) -> dict:
    "A notebook as a page: no plumbing, what it exports described, figures that draw."
    notebook = read(path)
    cells, figures = front_matter(notebook['cells'][0]['source']), False
    cells[1]['source'] = link_names(formulas(cells[1]['source']), pages, path.name)
    for n, cell in enumerate(notebook['cells'][1:], 1):
        if cell['cell_type'] == 'markdown':
            cells.append({**cell, 'source': link_names(formulas(cell['source']), pages, path.name)})
            continue
        marks = directives(cell['source'])
        if any(m.split()[0] in LOCAL_DIRECTIVES for m in marks):
            continue
        figures |= with_plotly(cell, f'figure-{n}', not figures)
        cells += exported(cell) if 'export' in marks else [{**cell, 'source': without_directives(cell['source'])}]
    for i, cell in enumerate(cells):
        cell['id'] = f'cell-{i}'
    return {**notebook, 'cells': cells, 'nbformat': 4, 'nbformat_minor': 5}


def reference(pages: dict[str, tuple[str, str]]) -> str:
    "The index of everything public, by module."
    lines = ['---', 'title: "Everything by name"', 'subtitle: "Every public function and class, with the page that explains it"', '---', '']
    for path in sorted(NBS.glob('*.ipynb')):
        module = module_name(read(path))
        mine = {name: doc for name, (page_, doc) in pages.items() if page_ == path.name}
        if not mine:
            continue
        lines += [f'## {PACKAGE}.{module}', '', f'[{page_name(path)}]({path.name})', '', '| name | what it is |', '|---|---|']
        for name, doc in mine.items():
            lines.append(f'| [`{name}`]({path.name}#{name.lower()}) | {html.escape(doc, quote=False)} |')
        lines.append('')
    return '\n'.join(lines)


# ---- the site

def process() -> None:
    "Write _proc: everything a renderer needs."
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    pages = symbol_pages()
    for path in sorted(NBS.glob('*.ipynb')):
        (PROC / path.name).write_text(json.dumps(page(path, pages)), encoding='utf-8')
    (PROC / 'reference.qmd').write_text(reference(pages), encoding='utf-8')
    shutil.copytree(NBS / 'images', PROC / 'images', dirs_exist_ok=True)
    shutil.copy(NBS / 'styles.css', PROC)
    shutil.copy(ROOT / '_quarto.yml', PROC)
    import plotly
    shutil.copy(Path(plotly.__file__).parent / 'package_data' / 'plotly.min.js', PROC)


def render(quarto: bool) -> list[str]:
    "Render _proc into _docs; the renderer's complaints."
    warnings: list[str] = []
    if quarto:
        subprocess.run(['quarto', 'render', str(PROC), '--no-execute'], check=True)
    else:
        import datetime
        if not hasattr(datetime, 'UTC'):  # smalldocs uses the name that Python 3.11 gave it
            datetime.UTC = datetime.timezone.utc
        from smalldocs.site import build
        warnings = build(PROC, quiet=True).warnings
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / '_docs', DOCS)
    for sheet in DOCS.rglob('*.css'):  # themes fetch fonts from the web; the site does without
        text = sheet.read_text(encoding='utf-8')
        sheet.write_text(re.sub(r'@import\s*(?:url\(["\']?https?:[^)]*\)|["\']https?:[^"\']*["\'])[^;]*;', '', text), encoding='utf-8')
    return warnings


def fingerprint() -> str:
    "A digest of everything that the site is made from."
    files = [ROOT / '_quarto.yml', ROOT / 'settings.ini', Path(__file__), NBS / 'styles.css',
             *NBS.glob('*.ipynb'), *NBS.glob('images/*'), *(ROOT / PACKAGE).glob('*.py')]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b'\0' + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--force', action='store_true', help='build although nothing has changed')
    parser.add_argument('--quarto', action='store_true', help='render with Quarto instead of smalldocs')
    args = parser.parse_args()
    stamp, now = DOCS / '.built-from', fingerprint()
    if stamp.exists() and stamp.read_text() == now and not args.force:
        print('_docs is up to date')
        return 0
    process()
    warnings = render(args.quarto)
    for warning in warnings:
        print(f'warning: {warning}', file=sys.stderr)
    if warnings:
        return 1
    stamp.write_text(now)
    print(f'wrote {len(list(DOCS.glob("*.html")))} pages to _docs/index.html')
    return 0


if __name__ == '__main__':
    sys.exit(main())
