"""Build the documentation site: notebooks -> _proc (pages without plumbing) -> _docs (HTML).

    python tools/site.py                  # with smalldocs (pure Python), if anything has changed
    python tools/site.py --force          # in any case
    python tools/site.py --quarto         # with Quarto, where it is installed

The notebooks are not run. Their stored outputs are shown; what the package exports is described from the package itself
(nbdev's `show_doc`), and its source lies folded below. plotly figures are stored as data (`application/vnd.plotly.v1+json`);
here they become divs, and plotly.js is put beside the pages once, so that they draw without a network.
"""
from __future__ import annotations

import argparse
import ast
import hashlib
import html
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

from refresh import settings  # noqa: E402

NBS, PROC, DOCS = ROOT / 'nbs', ROOT / '_proc', ROOT / '_docs'
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

def public_names(source: str) -> list[str]:
    "Public functions and classes that a piece of code defines."
    body = ast.parse(source).body
    return [n.name for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]


def symbol_pages() -> dict[str, str]:
    "Public name -> the notebook that documents it; a name that two notebooks define belongs to neither."
    pages: dict[str, str] = {}
    for path in sorted(NBS.glob('*.ipynb')):
        for cell in read(path)['cells']:
            if cell['cell_type'] == 'code' and 'export' in directives(cell['source']):
                for name in public_names(cell['source']):
                    pages[name] = '' if name in pages else path.name
    return {name: page for name, page in pages.items() if page}


def link_names(text: str, pages: dict[str, str], here: str) -> str:
    "Make each public name in backticks a link to where it is documented (code blocks, headings and links are left alone)."
    def link(match: re.Match) -> str:
        name = match.group(1).split('(')[0]
        page = pages.get(name)
        return f'[{match.group(0)}]({"" if page == here else page}#{name.lower()})' if page else match.group(0)

    parts = re.split(r'(^```.*?^```|^#.*?$|\[[^\]]*\]\([^)]*\))', text, flags=re.MULTILINE | re.DOTALL)
    return ''.join(p if i % 2 else re.sub(r'(?<!`)`(\w+(?:\(\))?)`(?!`)', link, p) for i, p in enumerate(parts))


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


def describe(module: str, name: str) -> str:
    "Signature, docstring and table of parameters of something public, as Markdown."
    from nbdev.showdoc import BasicMarkdownRenderer
    shown = getattr(importlib.import_module(f'{PACKAGE}.{module}'), name)
    text = BasicMarkdownRenderer(shown)._repr_markdown_()
    text = re.sub(r'^---\n\n', '', text)
    return re.sub(rf'^### {name}$', f'### {name} {{#{name.lower()} .api}}', text, flags=re.MULTILINE)


def is_imports(source: str) -> bool:
    "Whether code does nothing but import."
    body = ast.parse(source).body
    plain = (ast.Import, ast.ImportFrom, ast.Expr)
    return all(isinstance(n, plain) or isinstance(n, ast.If) and all(isinstance(m, plain) for m in n.body) for n in body)


def exported(cell: dict, module: str) -> list[dict]:
    "An exported cell: what it defines, described, and its source, folded where it holds more than constants."
    source = without_directives(cell['source'])
    if not source or is_imports(source):
        return []
    described = [markdown(describe(module, name)) for name in public_names(source)]
    defines = any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.parse(source).body)
    fold = '#| code-fold: true\n#| code-summary: "Source"\n' if defines else ''
    return [*described, {**cell, 'source': fold + source}]


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


def page(path: Path, pages: dict[str, str]) -> dict:
    "A notebook as a page: no plumbing, what it exports described, figures that draw."
    notebook = read(path)
    module, cells, figures = module_name(notebook), [], False
    cells += front_matter(notebook['cells'][0]['source'])
    for n, cell in enumerate(notebook['cells'][1:], 1):
        if cell['cell_type'] == 'markdown':
            cells.append({**cell, 'source': link_names(cell['source'], pages, path.name)})
            continue
        marks = directives(cell['source'])
        if any(m.split()[0] in LOCAL_DIRECTIVES for m in marks):
            continue
        figures |= with_plotly(cell, f'figure-{n}', not figures)
        cells += exported(cell, module) if 'export' in marks else [{**cell, 'source': without_directives(cell['source'])}]
    for i, cell in enumerate(cells):
        cell['id'] = f'cell-{i}'
    return {**notebook, 'cells': cells, 'nbformat': 4, 'nbformat_minor': 5}


def reference(pages: dict[str, str]) -> str:
    "The index of everything public, by module."
    lines = ['---', 'title: "Everything by name"', 'subtitle: "Every public function and class, with the page that explains it"', '---', '']
    for path in sorted(NBS.glob('*.ipynb')):
        module = module_name(read(path))
        names = [n for n, p in pages.items() if p == path.name]
        if not module or not names:
            continue
        loaded = importlib.import_module(f'{PACKAGE}.{module}')
        lines += [f'## {PACKAGE}.{module}', '', f'[{page_name(path)}]({path.name})', '', '| name | what it is |', '|---|---|']
        for name in names:
            doc = (getattr(loaded, name).__doc__ or '').strip().split('\n')[0].replace('|', '\\|')
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
