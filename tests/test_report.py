"The report opens in a real browser without a network and without an error; tables sort and filter, meshes are drawn and coloured."
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, describe, find_chromium
from scipy.ndimage import uniform_filter

from neuroseg3d.review.casepage import CaseResult, ReportOptions, write_case
from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import Model
from neuroseg3d.core import REGIONS, Case, Geometry, labels_to_regions
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.evaluation.metrics import score_case
from neuroseg3d.review.report import _with_model, write_report
from neuroseg3d.studies.preprocess import Space
from neuroseg3d.evaluation.uncertainty import assess_case
from neuroseg3d.networks.unet import UNet, UNetConfig
from neuroseg3d.networks.windows import Windows

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
        prediction = np.roll(case.label, 1, 0)
        rows = score_case(prediction, case.label, case.geometry.spacing_mm, case=case.id)
        for row in rows:
            row['dice'] = 0.5 + i / 10
        yield CaseResult(case, prediction, rows)


LOOK_CASE = """(async () => {
  const wait = async (condition) => {
    for (let i = 0; i < 200 && !condition(); i++) await new Promise(r => setTimeout(r, 100));
    return Boolean(condition());
  };
  const place = document.querySelector('.plot'), plot = () => place.querySelector('.js-plotly-plot');
  place.scrollIntoView({behavior: 'instant'});
  const drawn = await wait(() => place.querySelector('canvas') && plot()._fullLayout.scene);
  const traces = plot().data.length, button = [...place.querySelectorAll('.updatemenu-button')].find(b => b.textContent.includes('signed'));
  place.scrollIntoView({behavior: 'instant', block: 'center'});
  const box = button.getBoundingClientRect(), hit = document.elementFromPoint((box.left + box.right) / 2, (box.top + box.bottom) / 2);
  const reached = Boolean(hit && button.contains(hit));  // a button that is cut off cannot be clicked
  if (reached) hit.dispatchEvent(new MouseEvent('click', {bubbles: true}));
  const painted = await wait(() => plot().data[0].intensity && plot().data[0].intensity.length === plot()._fullData[0].x.length);
  window.scrollTo({top: 0, behavior: 'instant'});
  const given_back = await wait(() => !place.querySelector('canvas'));
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return {drawn, traces, reached, painted, given_back, wide};
})()"""

LOOK_COHORT = """(async () => {
  const names = () => [...document.querySelectorAll('.cohort tbody tr:not([hidden]) a')].map(a => a.textContent), order = [names()[0]];
  const dice = [...document.querySelectorAll('.cohort thead tr:last-child button')][4];
  dice.click(); order.push(names()[0]); dice.click(); order.push(names()[0]);
  const set = (id, value) => { const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event('input')); };
  set('words', '<3'); const named = names(); set('words', '');
  set('column', '4'); set('bound', '0.75'); const high = names().length; set('sign', '-1'); const low = names().length;
  const count = document.getElementById('count').textContent;
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return {order, named, high, low, count, wide};
})()"""


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    "A cohort's page with four pages of cases."
    return write_report(results(4), tmp_path_factory.mktemp('report') / 'index.html', 'A <b>', {'command': 'x > y'}, SMALL)


@pytest.mark.skipif(find_chromium() is None, reason='no Chromium installed: the report was not opened in a browser')
def test_opens_in_a_browser(written):
    pages = {'cohort': (written, LOOK_COHORT), 'case': (written.parent / 'cases' / 'case_2.html', LOOK_CASE)}
    with Browser() as browser:
        for scheme, colour in (('light', 'rgb(251, 251, 250)'), ('dark', 'rgb(17, 19, 22)')):
            browser.call('Emulation.setEmulatedMedia', features=[{'name': 'prefers-color-scheme', 'value': scheme}])
            seen = {}
            for name, (path, script) in pages.items():
                visit = browser.visit(path.as_uri())
                seen[name] = browser.evaluate(script)
                assert visit.errors == [] and [describe(e) for e in browser.events if describe(e)] == []
                assert all(r.startswith(('file:', 'data:')) for r in visit.requests)
                assert seen[name]['wide'] <= 0 and browser.evaluate('getComputedStyle(document.body).backgroundColor') == colour
            case, cohort = seen['case'], seen['cohort']
            assert case['drawn'] and case['traces'] == 8  # three regions, three references, brain, letters
            assert case['reached'] and case['painted'] and case['given_back']  # a mesh far away gives its WebGL context back
            assert cohort['order'] == ['case <0>', 'case <0>', 'case <3>']  # worst first, by rising Dice, by falling Dice
            assert cohort['named'] == ['case <3>'] and cohort['high'] == 1 and cohort['low'] == 3 and cohort['count'] == '3 of 4'


def test_one_case_is_in_memory_at_a_time(tmp_path):
    kept = []

    def watched():
        for result in results(3):
            gc.collect()
            assert sum(ref() is not None for ref in kept) <= 1  # the one that is being written while the next is read
            kept.append(weakref.ref(result.case.image))
            yield result
            del result

    write_report(watched(), tmp_path / 'index.html', options=SMALL)
    assert len(kept) == 3


def test_a_failure_leaves_the_old_report(tmp_path):
    page = write_report(results(1), tmp_path / 'index.html', options=SMALL)
    before = page.read_bytes()

    def broken():
        yield from results(1)
        raise RuntimeError('power cut')

    with pytest.raises(RuntimeError, match='power cut'):
        write_report(broken(), page, options=SMALL)
    assert page.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ['.neuroseg3d.json', 'cases', 'index.html']


def test_text_is_escaped(written):
    text = written.read_text()
    assert 'case &lt;0&gt;' in text and '<h1>A &lt;b&gt;</h1>' in text and 'x &gt; y' in text and 'case <0>' not in text
    assert 'case &lt;0&gt;' in (written.parent / 'cases' / 'case_0.html').read_text()


def test_page_of_a_real_case_is_small(tmp_path):
    "With every figure, both ways to colour the mesh, and a prediction that is off by some voxels."
    folder = Path(__file__).resolve().parents[2] / 'shared' / 'data' / 'brats2021'
    if not folder.is_dir():
        pytest.skip('no real cases beside the repository')
    case = read_case(find_cases(folder)[0])
    assert case.geometry.shape == (240, 240, 155)
    prediction = np.roll(case.label, 2, axis=0)
    rows = score_case(prediction, case.label, case.geometry.spacing_mm, distances=False, structures=list(REGIONS), case=case.id)
    doubt = {r: uniform_filter(mask.astype(np.float32), 5) for r, mask in zip(REGIONS, labels_to_regions(prediction))}
    page = write_case(CaseResult(case, prediction, rows, entropy={r: 4 * p * (1 - p) for r, p in doubt.items()}), tmp_path / 'case.html')
    text = page.read_text()
    mesh = text[text.index('<script type="application/json">'):].split('</script>')[0]
    assert page.stat().st_size < 8_000_000 and len(mesh) < 5_000_000
    assert '"signed error"' in mesh and '"entropy"' in mesh and text.count('data:image/webp') >= 7


def test_uncertainty_of_another_label_map_is_told():
    "A few voxels of a border are no other label map; one that has moved is."
    torch.manual_seed(0)
    network = UNet(UNetConfig(preset='tiny', filters=(4, 8), strides=(1, 2))).eval()
    network.heads[0].bias.data = torch.tensor([3.0, 3.0, -9.0])
    model = Model([network], Space((8.0, 8.0, 8.0)), Windows((32, 32, 32)), 'regions', [{}], [])
    case = toy()
    own = assess_case(model, case, 'cpu').label
    other = own.copy()
    other.flat[np.flatnonzero(other)[:20]] = 0
    assert 20 < 0.01 * (own > 0).sum() and not _with_model(CaseResult(case, other), model, False).notes
    (note,) = _with_model(CaseResult(case, np.roll(own, 6, 0)), model, False).notes
    assert 'another one than that reported: Dice of the two 0.' in note
