"The documentation site, as a reader meets it: built, served, opened in a browser."
from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest
from browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
PLOTLY = 'application/vnd.plotly.v1+json'
needs_browser = pytest.mark.skipif(find_chromium() is None, reason='no Chromium installed (Debian: apt install chromium): '
                                   'the site was built, but not opened in a browser')


@pytest.fixture(scope='session')
def site() -> Path:
    "The site, built unless it is up to date."
    done = subprocess.run([sys.executable, 'tools/docs.py'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / '_docs'


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope='session')
def address(site: Path):
    "Where the site is served."
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='session')
def browser():
    with Browser() as opened:
        yield opened


class Links(HTMLParser):
    "Addresses and anchors of a page."

    def __init__(self, text: str):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.targets += [given[k] for k in ('href', 'src') if given.get(k) and not given[k].startswith('data:')]
        self.anchors |= {given[k] for k in ('id', 'name') if given.get(k)}


def figures(path: Path) -> int:
    "How many plotly figures a notebook stores."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return sum(PLOTLY in o.get('data', {}) for c in cells for o in c.get('outputs', []))


def test_every_notebook_has_a_page(site):
    pages = {p.stem for p in site.glob('*.html')}
    assert pages >= {p.stem for p in NOTEBOOKS} | {'reference'}


def test_links_and_images_lead_somewhere(site):
    pages = {p.name: Links(p.read_text(encoding='utf-8')) for p in site.glob('**/*.html')}
    broken = []
    for name, page in pages.items():
        for target in page.targets:
            parts = urlsplit(urljoin(f'http://site/{name}', target))
            if parts.netloc != 'site' or parts.scheme != 'http':
                continue
            file = unquote(parts.path).lstrip('/') or 'index.html'
            if not (site / file).is_file():
                broken.append(f'{name}: {target}')
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
                broken.append(f'{name}: {target} (no such anchor)')
    assert not broken, '\n'.join(broken)


def test_search_knows_every_page(site):
    entries = json.loads((site / 'search.json').read_text(encoding='utf-8'))
    assert {e['href'].split('#')[0] for e in entries} >= {f'{p.stem}.html' for p in NOTEBOOKS}


def test_plumbing_is_left_out(site):
    for path in NOTEBOOKS:
        text = (site / f'{path.stem}.html').read_text(encoding='utf-8')
        assert 'google.colab' not in text.replace('colab.research.google.com', '') or path.stem == 'index', path.name
        assert 'default_exp' not in text, path.name


LOOK = """(() => {
  const shown = e => { const r = e.getBoundingClientRect(); return r.width > 5 && r.height > 5; };
  const drawn = f => [...f.querySelectorAll('.main-svg, canvas')].some(shown)
  return {
    title: document.title,
    images: [...document.images].filter(i => i.complete && i.naturalWidth === 0).map(i => i.src.slice(0, 200)),
    figures: document.querySelectorAll('.plotly-figure').length,
    blank: [...document.querySelectorAll('.plotly-figure')].filter(f => !drawn(f)).map(f => f.id),
    traces: [...document.querySelectorAll('.plotly-figure')].map(f => (f.data || []).length),
    wide: Math.max(...[document.documentElement, document.querySelector('main')].map(e => e.scrollWidth - e.clientWidth)),
    sidebar: document.querySelectorAll('#quarto-sidebar a.sidebar-link').length,
  };
})()"""


@needs_browser
@pytest.mark.parametrize('name', [*(p.stem for p in NOTEBOOKS), 'reference'])
def test_page_in_a_browser(browser, address, name):
    visit = browser.visit(f'{address}{name}.html', LOOK)
    seen = visit.value
    assert not visit.errors, '\n'.join(visit.errors)
    assert not seen['images'], f'images that did not load: {seen["images"]}'
    outside = [r for r in visit.requests if not r.startswith((address, 'data:', 'blob:'))]
    assert not outside, f'the page needs a network: {outside}'
    source = ROOT / 'nbs' / f'{name}.ipynb'
    expected = figures(source) if source.exists() else 0
    assert seen['figures'] == expected and not seen['blank'] and all(seen['traces']), f'{expected} plotly figures expected: {seen}'
    assert seen['wide'] <= 0, f'the page is {seen["wide"]} pixels wider than its place'
    assert seen['sidebar'] > 10


@needs_browser
def test_search_finds_a_name(browser, address):
    browser.visit(f'{address}index.html')
    found = browser.evaluate("""(async () => {
      const box = document.querySelector('input[type=search], .smalldocs-search input, #quarto-search input');
      box.focus(); box.value = 'read_case';
      for (const kind of ['input', 'keyup']) box.dispatchEvent(new Event(kind, {bubbles: true}));
      for (let i = 0; i < 50; i++) {
        await new Promise(r => setTimeout(r, 100));
        const hits = [...document.querySelectorAll('a')].filter(a => /15_studies.cases/.test(a.href) && !a.closest('#quarto-sidebar') && !a.closest('main'));
        if (hits.length) return hits.length;
      }
      return 0;
    })()""")
    assert found, 'searching for read_case does not lead to the page that explains it'


@needs_browser
def test_dark_theme_can_be_chosen(browser, address):
    browser.visit(f'{address}index.html')
    colours = browser.evaluate("""(async () => {
      const back = () => getComputedStyle(document.body).backgroundColor;
      const light = back();
      document.querySelector('.quarto-color-scheme-toggle').click();
      await new Promise(r => setTimeout(r, 500));
      const dark = back();
      document.querySelector('.quarto-color-scheme-toggle').click();
      return [light, dark];
    })()""")
    brightness = [sum(map(float, c[c.index('(') + 1:-1].split(',')[:3])) for c in colours]
    assert brightness[0] > 600 > 200 > brightness[1], colours


@needs_browser
def test_browser_reports_what_is_wrong(browser, address, site):
    page = site / 'broken-for-a-test.html'
    page.write_text('<!doctype html><title>x</title><img src="absent.png"><script>console.error("told"); missing()</script>')
    try:
        errors = '\n'.join(browser.visit(f'{address}{page.name}').errors)
    finally:
        page.unlink()
    assert 'console: told' in errors and 'ReferenceError' in errors and '404' in errors
