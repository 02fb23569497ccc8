"What must hold of the repository as a whole: notebooks, modules, requirements."
from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
PACKAGE = 'neuroseg3d'
COLAB_CELL = f"""#| hide
import sys

if 'google.colab' in sys.modules:
    %pip install -q git+https://github.com/{PACKAGE}/{PACKAGE}"""
PATHS = re.compile(r'(?<![\w.:/])/(?:work|tmp|home|root|Users|content|usr|opt|var)/\w')
LONGEST = 40

ids = [p.stem for p in NOTEBOOKS]
each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=ids)


def read(path: Path) -> list[dict]:
    "Cells of a notebook with sources as strings."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [{**c, 'source': ''.join(c['source'])} for c in cells]


def module_of(path: Path) -> str | None:
    "What a notebook exports to, by its default_exp."
    for cell in read(path):
        found = re.search(r'^#\|\s*default_exp\s+(\S+)', cell['source'], flags=re.MULTILINE)
        if cell['cell_type'] == 'code' and found:
            return found.group(1)
    return None


MODULES = {module_of(p): p for p in NOTEBOOKS if module_of(p)}
SOURCES = sorted(p for p in (ROOT / PACKAGE).rglob('*.py') if p.name not in ('__init__.py', '__main__.py', '_modidx.py'))


def module_at(path: Path) -> str:
    "Dotted name of a module inside the package."
    return '.'.join(path.relative_to(ROOT / PACKAGE).with_suffix('').parts)


each_module = pytest.mark.parametrize('path', SOURCES, ids=[module_at(p) for p in SOURCES])
#: The wings in the order in which a study passes through them; an import points to the left, never to the right.
WINGS = ('system', 'studies', 'phantom', 'plots', 'networks', 'inference', 'evaluation', 'training', 'review', 'delivery')


def room_of(name: str) -> str | None:
    "The module of the package that a dotted import is of; None for a wing as a whole."
    parts = name.split('.')[1:]
    return next((found for n in (2, 1) if (found := '.'.join(parts[:n])) in MODULES), None)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


def functions(node: ast.AST, outside: str = '') -> list[tuple[str, ast.FunctionDef]]:
    "Functions and methods with dotted names; functions inside functions belong to these."
    out = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            out += functions(child, f'{outside}{child.name}.')
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            out.append((f'{outside}{child.name}', child))
        elif isinstance(child, (ast.If, ast.Try)):
            out += functions(child, outside)
    return out


def imported(path: Path) -> list[tuple[int, str]]:
    "Absolute names of what a module imports, anywhere in it, with line numbers."
    out = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            out += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parent.parts[:node.level and len(path.relative_to(ROOT).parent.parts) - node.level + 1]
            base = '.'.join([*above, *filter(None, [node.module])])
            out += [(node.lineno, f'{base}.{a.name}') for a in node.names]
    return out


# ---- notebooks

def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 10 and len(MODULES) > 8


@each_notebook
def test_notebook_opens_as_a_page(path):
    first = read(path)[0]
    lines = first['source'].split('\n')
    assert first['cell_type'] == 'markdown'
    assert re.match(r'# \S', lines[0]), 'the first line is the title'
    assert re.match(r'> \S', lines[2]), 'a one-line subtitle follows the title'
    badge = (f'[![Open in Colab](images/open-in-colab.svg)](https://colab.research.google.com/github/{PACKAGE}/{PACKAGE}'
             f'/blob/main/nbs/{path.name})')
    assert badge in lines, 'a Colab badge that opens this very notebook'
    assert '\n'.join(lines[lines.index(badge) + 1:]).strip(), 'two sentences follow the badge'


@each_notebook
def test_colab_cell_comes_first_and_acts_in_colab_only(path):
    code = next(c['source'] for c in read(path) if c['cell_type'] == 'code')
    assert code.strip() == COLAB_CELL
    plain = code.replace('%pip install', 'raise AssertionError("installed outside Colab") #')
    exec(compile(plain, path.name, 'exec'), {})


@each_notebook
def test_stored_outputs_are_fit_to_publish(path):
    assert path.stat().st_size < 1_500_000, 'a page is small'
    for n, cell in enumerate(read(path)):
        for output in cell.get('outputs', []):
            assert output['output_type'] != 'error', f'cell {n} stores an error'
            assert output.get('name') != 'stderr', f'cell {n} stores warnings or progress: {"".join(output["text"])[:200]}'
            shown = {k: v for k, v in output.get('data', {}).items() if not k.startswith('image/') or k == 'image/svg+xml'}
            found = PATHS.search(json.dumps([shown, output.get('text', '')]).replace('\\n', '\n'))
            assert not found, f'cell {n} stores a path of some machine: {found.group(0)}'
        assert not PATHS.search(cell['source']) or cell['cell_type'] == 'markdown' and '```' in cell['source'], f'cell {n} names a path of some machine'


@each_notebook
def test_exported_cells_have_prose_before_them(path):
    cells, exports = read(path), 0
    for cell in cells[1:]:
        directives = re.findall(r'^#\|\s*(.+?)\s*$', cell['source'], flags=re.MULTILINE)
        exports += cell['cell_type'] == 'code' and 'export' in directives
    prose = sum(c['cell_type'] == 'markdown' for c in cells[1:])
    assert prose >= exports / 2, f'{exports} exported cells and only {prose} cells of prose'


@each_notebook
def test_every_flag_is_one_that_the_tools_know(path):
    known = {'hide', 'export', 'exports', 'exporti', 'default_exp', 'slow', 'gpu', 'msd', 'eval:', 'echo:', 'output:', 'hide_line',
             'fig-cap:', 'fig-alt:', 'label:', 'code-fold:', 'code-summary:', 'column:', 'layout-ncol:', 'tbl-cap:'}
    for cell in read(path):
        if cell['cell_type'] == 'code':
            for directive in re.findall(r'^#\|\s*(\S+)', cell['source'], flags=re.MULTILINE):
                assert directive in known, f'unknown directive #| {directive}'


# ---- notebooks and modules

def test_modules_and_notebooks_are_the_same_set():
    exported = {module_at(p) for p in SOURCES}
    assert exported == set(MODULES), 'a module without notebook is left over; a notebook without module was not exported'


def test_modules_name_their_notebook():
    for path in SOURCES:
        up = '../' * len(path.relative_to(ROOT).parent.parts)
        assert f'File to edit: {up}nbs/{MODULES[module_at(path)].name}.' in path.read_text(encoding='utf-8'), module_at(path)


@each_module
def test_imports_point_to_lower_numbers(path):
    order = {module: n for n, module in enumerate(sorted(MODULES, key=lambda m: MODULES[m].stem))}
    here = module_at(path)
    for line, name in imported(path):
        if name.split('.')[0] == PACKAGE and name not in (PACKAGE, f'{PACKAGE}.__version__'):
            assert room_of(name), f'line {line}: {name} is no module of the package'
            assert order[room_of(name)] <= order[here], f'line {line}: {here} imports {room_of(name)}, which comes later'


def wing(module: str) -> str:
    "The folder of a module; the ground floor has none."
    return module.split('.')[0] if '.' in module or module in WINGS else ''


@each_module
def test_arrows_between_wings_point_one_way(path):
    here = wing(module_at(path))
    for line, name in imported(path):
        there = wing(room_of(name) or '') if name.startswith(f'{PACKAGE}.') else ''
        if here and there:
            assert WINGS.index(there) <= WINGS.index(here), f'line {line}: {here} imports {there}'
        if here and name.startswith(f'{PACKAGE}.') and not there:
            assert name == PACKAGE or (room_of(name) or '__version__') in ('core', 'config', 'records', '__version__'), f'line {line}: {name}'


@each_module
def test_no_wing_needs_private_names_of_another(path):
    private = [name for _, name in imported(path) if name.startswith(f'{PACKAGE}.') and wing(room_of(name) or '') != wing(module_at(path))
               and name.split('.')[-1].startswith('_') and not name.endswith('__version__')]
    assert not private


def test_the_page_how_it_is_built_lists_every_room():
    page = '\n'.join(c['source'] for c in read(ROOT / 'nbs' / '93_how_it_is_built.ipynb') if c['cell_type'] == 'markdown')
    listed = re.findall(r'^\|[^|]*\| `([\w.]+)` \| \[[^]]+\]\(([^)]+)\) \|$', page, flags=re.MULTILINE)
    assert dict(listed) == {module: path.name for module, path in MODULES.items()} and len(listed) == len(MODULES)


def test_every_module_is_in_a_wing_of_the_plan():
    assert {wing(m) for m in MODULES} - {''} <= set(WINGS)


@each_notebook
def test_notebooks_use_lower_numbers_too(path):
    "Lessons too, except that patients that never were may sit for any of them."
    if module_of(path) is None:
        return
    for cell in read(path):
        if cell['cell_type'] == 'code':
            for name in re.findall(rf'^\s*(?:from|import) ({PACKAGE}\.[\w.]+)', cell['source'], flags=re.MULTILINE):
                assert room_of(name) or name.split('.')[1] in WINGS, f'{name} is no module of the package'
                assert room_of(name) is None or wing(room_of(name)) == 'phantom' or MODULES[room_of(name)].stem <= path.stem, f'{path.stem} uses {MODULES[room_of(name)].stem}'


def test_every_file_of_tests_has_a_wing():
    from conftest import WINGS as wings
    names = {p.stem.removeprefix('test_') for p in (ROOT / 'tests').glob('test_*.py')}
    assert names == set(wings) and set(wings.values()) == {*WINGS, 'house'}


# ---- the code

@each_module
def test_functions_fit_a_screen(path):
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions(tree(path))}
    assert not {name: n for name, n in lengths.items() if n > LONGEST}, 'functions with so many lines'


def arguments(node: ast.FunctionDef) -> list[ast.arg]:
    a = node.args
    return [x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x and x.arg not in ('self', 'cls')]


@each_module
def test_public_functions_document_every_parameter(path):
    lines, missing = path.read_text(encoding='utf-8').split('\n'), []
    for node in tree(path).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith('_'):
            continue
        missing += [] if ast.get_docstring(node) else [f'{node.name}: docstring']
        if isinstance(node, ast.FunctionDef):
            commented = {x.arg: any('  # ' in lines[n - 1] for n in (x.end_lineno, _last_line(node, x))) for x in arguments(node)}
            missing += [f'{node.name}: {name}' for name, found in commented.items() if not found]
    assert not missing, f'no docstring or no comment behind the parameter: {"; ".join(missing)}'


def _last_line(node: ast.FunctionDef, argument: ast.arg) -> int:
    "Line on which an argument ends, its default included."
    a = node.args
    positional = [*a.posonlyargs, *a.args]
    defaults = dict(zip([x.arg for x in positional[len(positional) - len(a.defaults):]], a.defaults))
    defaults |= {x.arg: d for x, d in zip(a.kwonlyargs, a.kw_defaults) if d is not None}
    default = defaults.get(argument.arg)
    return default.end_lineno if default is not None else argument.end_lineno


def is_settings(node: ast.stmt) -> bool:
    "Whether a class is a frozen dataclass in which every field has a default: settings for a configuration file."
    frozen = isinstance(node, ast.ClassDef) and any('frozen=True' in ast.unparse(d) for d in node.decorator_list)
    fields = [x for x in node.body if isinstance(x, ast.AnnAssign)] if frozen else []
    return bool(fields) and all(f.value is not None for f in fields)


@each_module
def test_every_setting_is_documented(path):
    lines, missing = path.read_text(encoding='utf-8').split('\n'), []
    for node in filter(is_settings, tree(path).body):
        for field in (x for x in node.body if isinstance(x, ast.AnnAssign)):
            if '  # ' not in lines[field.end_lineno - 1] and not lines[field.lineno - 2].strip().startswith('#'):
                missing.append(f'{node.name}.{field.target.id}')
    assert not missing, f'no comment behind the field: {", ".join(missing)}'


@each_module
def test_no_dangerous_or_sloppy_code(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert all(a.name != '*' for a in node.names), f'line {node.lineno}: star import'
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False:
            assert node.arg != 'weights_only', f'line {node.value.lineno}: weights_only=False runs code from a file'
            assert node.arg != 'strict' or 'zip' in ast.unparse(node), f'line {node.value.lineno}: strict=False hides what does not fit'
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f'line {node.lineno}: bare except'
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ('exec', 'eval'), f'line {node.lineno}: {node.func.id}'


CODE = [*SOURCES, *(p for d in ('tests', 'tools', 'benchmarks') for p in sorted((ROOT / d).glob('*.py')))]


@pytest.mark.parametrize('path', CODE, ids=[p.relative_to(ROOT).with_suffix('').as_posix() for p in CODE])
def test_nothing_is_imported_for_nobody(path):
    lines, code = path.read_text(encoding='utf-8').splitlines(), tree(path)
    used = {n.id for n in ast.walk(code) if isinstance(n, ast.Name)}
    texts = ' '.join(n.value for n in ast.walk(code) if isinstance(n, ast.Constant) and isinstance(n.value, str))  # __all__, quoted types
    for node in ast.walk(code):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, 'module', '') != '__future__' and 'noqa: F401' not in lines[node.lineno - 1]:
            names = {(a.asname or a.name).split('.')[0] for a in node.names}
            assert not {n for n in names - used if not re.search(rf'\b{n}\b', texts)}, f'line {node.lineno}: imported, but not used'


# ---- what importing costs and needs

DEVELOPMENT = ('nbdev', 'fastcore', 'pytest', 'execnb', 'jupytext', 'nbclient', 'hypothesis', 'surface_distance')
HEAVY = ('torch', 'monai', 'pytorch_lightning', 'lightning', 'plotly', 'matplotlib', 'skimage', 'wandb', 'nilearn')


@each_module
def test_package_does_not_need_development_tools(path):
    for line, name in imported(path):
        assert name.split('.')[0] not in DEVELOPMENT, f'line {line}: imports {name}'


def python(code: str) -> str:
    "What a fresh interpreter prints."
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_package_imports_without_development_tools():
    python(f"""
import importlib, sys
for name in {DEVELOPMENT!r}:
    sys.modules[name] = None  # importing it is an error from here on
for name in {sorted(MODULES)!r}:
    importlib.import_module(f'{PACKAGE}.{{name}}')
""")


@pytest.mark.parametrize('module', ['core', 'config', 'studies.nifti', 'studies.layouts', 'studies.cases', 'cli'])
def test_light_modules_stay_light(module):
    loaded = python(f'import sys, {PACKAGE}.{module}; print(*sorted(m for m in sys.modules if "." not in m))').split()
    assert not set(loaded) & set(HEAVY)


def test_the_front_door_opens_at_once_and_leads_somewhere():
    "`import neuroseg3d as ns` loads nothing heavy, and each name of its stub is the one that a wing documents."
    loaded = python(f"""
import sys, {PACKAGE} as ns
print(*sorted(m for m in sys.modules if '.' not in m))
assert 'segment' in dir(ns) and len(ns.__all__) >= 12
for name in ns.__all__:
    assert getattr(ns, name).__name__ == name and getattr(ns, name).__doc__, name
""").split()
    assert not set(loaded) & {*HEAVY, 'numpy', 'nibabel'}


def test_command_line_answers_help_at_once():
    loaded = python(f"""
import sys
from {PACKAGE}.cli import main
sys.argv = ['{PACKAGE}', '--help']
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print('modules', *sorted(m for m in sys.modules if '.' not in m))
""")
    text, modules = loaded.rsplit('modules', 1)
    assert not set(modules.split()) & set(HEAVY), 'help must not wait for heavy imports'
    for command in ('demo', 'phantom', 'download', 'eda', 'train', 'infer', 'export', 'model', 'evaluate', 'calibrate', 'explain',
                    'report'):
        assert re.search(rf'\b{command}\b', text), f'--help does not mention {command}'


def test_the_package_runs_as_a_module():
    known = python('import runpy, sys; sys.argv = ["x", "--version"]; runpy.run_module("neuroseg3d", run_name="__main__")')
    assert known == f'neuroseg3d {settings()["version"]}\n'
    done = subprocess.run([sys.executable, '-m', PACKAGE, 'evaluate', '--pred', 'absent', '--ref', 'b', '--output_dir', 'o'], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, '', 'neuroseg3d: error: absent: no such file or folder\n')
    loaded = python(f'import sys, {PACKAGE}.__main__; print(*sorted(m for m in sys.modules if "." not in m))').split()
    assert not set(loaded) & {*HEAVY, 'numpy', 'nibabel'}, '--help must answer at once'


# ---- requirements and packaging

def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=['='], interpolation=None)
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return dict(parser['DEFAULT'])


def normal(name: str) -> str:
    return re.sub(r'[-_.]+', '-', name).lower()


def constraints() -> list[Requirement]:
    lines = (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
    return [Requirement(x) for x in lines if x and not x.startswith('#')]


@pytest.mark.parametrize('version', ['3.10', '3.11', '3.12', '3.13'])
def test_every_requirement_has_one_exact_version(version):
    environment = {'python_version': version, 'python_full_version': f'{version}.0'}
    pins: dict[str, Requirement] = {}
    for pin in constraints():
        if pin.marker is None or pin.marker.evaluate(environment):
            assert normal(pin.name) not in pins, f'{pin.name} is pinned twice on Python {version}'
            pins[normal(pin.name)] = pin
            assert re.fullmatch(r'==[^,+*]+', str(pin.specifier)), f'{pin}: an exact public version, without local suffix'
    for key in ('requirements', 'dev_requirements'):
        for need in map(Requirement, shlex.split(settings()[key])):
            if need.marker is None or need.marker.evaluate(environment):
                assert normal(need.name) in pins, f'{need.name} has no constraint'
                (pin,) = pins[normal(need.name)].specifier
                assert need.specifier.contains(pin.version), f'{pins[normal(need.name)]} contradicts {need}'


def test_pins_take_the_first_release_of_this_python():
    "Distributions stay with an early one for years: Debian 12's is 3.11.2."
    first = '.'.join(map(str, (*sys.version_info[:2], 0)))
    installed = {normal(d.metadata['Name']): d for d in metadata.distributions()}
    here = [p for p in constraints() if (p.marker is None or p.marker.evaluate()) and normal(p.name) in installed]
    late = [str(p) for p in here if first not in SpecifierSet(installed[normal(p.name)].metadata.get('Requires-Python') or '')]
    assert len(here) > 50 and not late


@each_module
def test_every_import_is_a_declared_requirement(path):
    provides = {'pytorch_lightning': 'pytorch-lightning', 'yaml': 'pyyaml', 'skimage': 'scikit-image', 'IPython': 'ipywidgets',
                'fast_simplification': 'fast-simplification', 'PIL': 'pillow', 'lightning_fabric': 'pytorch-lightning'}
    declared = {normal(Requirement(r).name) for r in shlex.split(settings()['requirements'])}
    for line, name in imported(path):
        top = name.split('.')[0]
        if top != PACKAGE and top not in sys.stdlib_module_names:
            assert normal(provides.get(top, top)) in declared, f'line {line}: {top} is not in the requirements'


def test_version_is_said_once():
    assert f'__version__ = "{settings()["version"]}"' in (ROOT / PACKAGE / '__init__.py').read_text(encoding='utf-8')


def test_setup_holds_nothing_of_its_own():
    text = (ROOT / 'setup.py').read_text(encoding='utf-8')
    assert settings()['version'] not in text
    for need in shlex.split(settings()['requirements']):
        assert not re.search(rf'\b{re.escape(Requirement(need).name)}\b', text)


# ---- README and site

def test_readme_is_the_rendered_index():
    import readme
    assert (ROOT / 'README.md').read_text(encoding='utf-8') == readme.render(), 'run tools/readme.py'


def test_readme_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if not re.match(r'\w+:|#', target):
            assert (ROOT / target.split('#')[0]).exists(), f'README.md links to {target}'


def sidebar(entries: list) -> list[str]:
    "Notebooks and pages of the sidebar, sections opened."
    out = []
    for entry in entries:
        if isinstance(entry, str):
            out.append(entry)
        else:
            out += [entry['href']] if 'href' in entry else []
            out += sidebar(entry.get('contents', []))
    return out


def test_sidebar_lists_every_notebook_once():
    config = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    listed = sidebar(config['website']['sidebar']['contents'])
    assert sorted(listed) == sorted([*(p.name for p in NOTEBOOKS), 'reference.qmd'])


def test_quarto_reads_the_same_configuration():
    link = ROOT / 'nbs' / '_quarto.yml'
    assert link.read_text(encoding='utf-8') == (ROOT / '_quarto.yml').read_text(encoding='utf-8')


def test_runner_fails_when_there_is_nothing_to_test():
    done = subprocess.run([sys.executable, 'tools/run_notebooks.py', 'no_such_notebook'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and 'no such notebook' in done.stderr


def test_runner_tells_which_cell_failed(tmp_path):
    from run_notebooks import run
    for name, cell in {'good': 'assert 1 == 1', 'bad': 'assert 1 == 2, "one is not two"'}.items():
        nbformat.write(new_notebook(cells=[new_code_cell(cell)]), tmp_path / f'{name}.ipynb')
        _, passed, output, _ = run(tmp_path / f'{name}.ipynb')
        assert passed == (name == 'good') and ('one is not two' in output) == (name == 'bad')


#: What Quarto's own schema allows of the settings that are used here; it refuses others (src/resources/schema/definitions.yml of
#: quarto-dev/quarto-cli, revision 001b4007: base-website, navigation-item-object, sidebar-contents, page-footer, all closed).
QUARTO = {
    'website': {'title', 'description', 'image', 'favicon', 'site-url', 'site-path', 'repo-url', 'repo-subdir', 'repo-branch', 'repo-actions', 'search',
                'navbar', 'sidebar', 'page-navigation', 'back-to-top-navigation', 'bread-crumbs', 'page-footer'},
    'search': {'location', 'type', 'limit', 'collapse-after', 'copy-button', 'keyboard-shortcut', 'show-item-context'},
    'navbar': {'title', 'logo', 'background', 'foreground', 'search', 'pinned', 'collapse', 'left', 'right'},
    'sidebar': {'id', 'title', 'logo', 'search', 'tools', 'contents', 'style', 'background', 'foreground', 'border', 'alignment', 'collapse-level'},
    'page-footer': {'left', 'right', 'center', 'border', 'background', 'foreground'},
    'item': {'text', 'href', 'icon', 'aria-label', 'menu', 'rel', 'target'}, 'section': {'section', 'contents'},
}


def test_quartos_schema_allows_the_settings():
    "Quarto is not needed for it: an unknown key, or a value that is none of those it names, would stop it before the first page."
    website = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))['website']
    assert set(website) <= QUARTO['website']
    for part in ('search', 'navbar', 'sidebar', 'page-footer'):
        assert set(website[part]) <= QUARTO[part], part
    assert set(website['repo-actions']) <= {'none', 'edit', 'source', 'issue'} and website['sidebar']['style'] in ('docked', 'floating')
    assert website['search']['location'] in ('navbar', 'sidebar') and website['search']['type'] in ('overlay', 'textbox')

    def check(items):
        for item in items:
            if isinstance(item, dict):
                assert set(item) <= QUARTO['section' if 'section' in item else 'item'], item
                check(item.get('contents', item.get('menu', [])))
            else:
                assert (ROOT / 'nbs' / item).is_file(), item
    check([*website['navbar']['left'], *website['navbar']['right'], *website['sidebar']['contents']])
