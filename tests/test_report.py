"The report opens in a real browser without a network and without an error, and its meshes are drawn."
import tracemalloc

import numpy as np
import pytest
from browser import Browser, describe, find_chromium

from neuroseg3d.core import Case, Geometry
from neuroseg3d.report import CaseResult, ReportOptions, write_report

SMALL = ReportOptions(width_in=5, dpi=40, mesh_faces=300, mesh_grid_mm=8)


def toy(n=0, size=40):
    axes = np.indices((size, size + 2, size - 2)) - np.array([size / 2, size / 2 + 1, size / 2 - 1])[:, None, None, None]
    r = np.sqrt((axes ** 2).sum(0))
    label = ((r < 12).astype(np.uint8) + (r < 8) + (r < 5)) * np.uint8(1)
    image = np.stack([(r < size * 0.45) * (100.0 + 40 * label + 10 * c) for c in range(4)]).astype(np.float32)
    return Case(f'case <{n}>', image, Geometry(label.shape, np.diag([4.0, 4, 4, 1])), label)


def results(n, size=40):
    for i in range(n):
        case = toy(i, size)
        rows = [{'name': r, 'dice': 0.5 + i / 10, 'hd95_mm': 3.0 - i} for r in ('WT', 'TC', 'ET')]
        yield CaseResult(case, np.roll(case.label, 1, 0), rows)


LOOK = """(async () => {
  const wait = async (condition) => {
    for (let i = 0; i < 200 && !condition(); i++) await new Promise(r => setTimeout(r, 100));
    return Boolean(condition());
  };
  const plots = [...document.querySelectorAll('.plot')], drawn = [], first = () => document.querySelector('.cohort tbody a').textContent;
  for (const plot of plots) {
    plot.scrollIntoView({behavior: 'instant'});
    drawn.push(await wait(() => plot.querySelector('canvas') && plot.querySelector('.js-plotly-plot')._fullLayout.scene));
  }
  const traces = plots.at(-1).querySelector('.js-plotly-plot').data.length;
  window.scrollTo({top: 0, behavior: 'instant'});
  const given_back = await wait(() => !plots.at(-1).querySelector('canvas'));
  const dice = [...document.querySelectorAll('.cohort thead tr:last-child button')][4], order = [first()];
  dice.click(); order.push(first()); dice.click(); order.push(first());
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return {drawn, traces, given_back, order, wide, dark: matchMedia('(prefers-color-scheme: dark)').matches};
})()"""


@pytest.mark.skipif(find_chromium() is None, reason='no Chromium installed: the report was not opened in a browser')
def test_opens_in_a_browser(tmp_path):
    page = write_report(results(6), tmp_path / 'index.html', options=SMALL)
    with Browser() as browser:
        visit = browser.visit(page.as_uri())
        seen = browser.evaluate(LOOK)
        errors = [describe(e) for e in browser.events if describe(e)]
    assert visit.errors == [] and errors == []
    assert all(r.startswith(('file:', 'data:')) for r in visit.requests)
    assert seen['drawn'] == [True] * 6 and seen['traces'] == 8  # three regions, three references, brain, letters
    assert seen['given_back']  # a mesh far away gives its WebGL context back
    assert seen['order'] == ['case <0>', 'case <0>', 'case <5>']  # as written, by rising Dice, by falling Dice
    assert seen['wide'] <= 0


def test_memory_is_that_of_one_case(tmp_path):
    def peak(n):
        tracemalloc.start()
        write_report(results(n), tmp_path / f'{n}.html', options=SMALL)
        value = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return value

    peak(1)  # what is imported and cached the first time
    assert peak(6) < 1.5 * peak(2)


def test_a_failure_leaves_the_old_report(tmp_path):
    page = write_report(results(1), tmp_path / 'index.html', options=SMALL)
    before = page.read_bytes()

    def broken():
        yield from results(1)
        raise RuntimeError('power cut')

    with pytest.raises(RuntimeError, match='power cut'):
        write_report(broken(), page, options=SMALL)
    assert page.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['index.html']


def test_text_is_escaped(tmp_path):
    text = write_report(results(2), tmp_path / 'r.html', 'A <b>', {'command': 'x > y'}, SMALL).read_text()
    assert 'case &lt;0&gt;' in text and '<h1>A &lt;b&gt;</h1>' in text and 'x &gt; y' in text and 'case <0>' not in text
