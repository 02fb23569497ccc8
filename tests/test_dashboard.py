"The dashboard in a real browser: served by Voila, driven by mouse, its pictures compared."
from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from browser import Browser, describe, find_chromium

from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import KEY, describe as describe_model, save_checkpoint
from neuroseg3d.config import build, to_dict
from neuroseg3d.review.dashboard import dashboard
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.nifti import write_label
from neuroseg3d.phantom import write_cohort
from neuroseg3d.training.task import Config
from neuroseg3d.networks.unet import UNet

SHOTS = os.environ.get('NEUROSEG3D_SCREENSHOTS')  # a folder that gets what the test saw


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    "A cohort of two, a prediction for the first, and a checkpoint of an untrained network."
    folder = tmp_path_factory.mktemp('review')
    root = write_cohort(folder / 'cohort', n=2, seed=3, spacing_mm=3, workers=1, progress=False)
    case = read_case(find_cases(root)[0])
    write_label(folder / 'pred' / f'{case.id}.nii.gz', np.roll(case.label, 2, axis=0), case)
    config = build(Config, {'model': {'preset': 'tiny'}, 'space': {'spacing_mm': 4.0}})
    torch.manual_seed(0)
    weights = {f'ema.module.{k}': v for k, v in UNet(config.model).state_dict().items()}
    save_checkpoint({KEY: describe_model(to_dict(config), {'schema': 'msd'}), 'state_dict': weights}, folder / 'model.ckpt')
    return folder


@pytest.fixture(scope='module')
def address(work):
    "Address of the dashboard, served by Voila."
    pytest.importorskip('voila', reason='Voila is not installed: the dashboard was not opened in a browser')
    code = "from neuroseg3d.review.dashboard import dashboard\ndashboard('cohort', 'pred', 'model.ckpt', 'out', device='cpu')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)],
                                        metadata={'kernelspec': {'name': 'python3', 'display_name': 'python3'}})
    nbformat.write(notebook, work / 'review.ipynb')
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, 'PYTHONPATH': str(root), 'OMP_NUM_THREADS': '1', 'JUPYTER_PLATFORM_DIRS': '1'}
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    log = open(work / 'voila.log', 'w+')
    server = subprocess.Popen([sys.executable, '-m', 'voila', 'review.ipynb', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1'],
                              cwd=work, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        for _ in range(300):
            found = f':{port}/' in (work / 'voila.log').read_text()
            if found or server.poll() is not None:
                break
            time.sleep(0.1)
        assert found, (work / 'voila.log').read_text()
        yield f'http://127.0.0.1:{port}/'
    finally:
        server.terminate()
        server.wait(20)
        log.close()


class Hand:
    "What a person does with the page."

    def __init__(self, browser: Browser):
        self.browser = browser

    def wait(self, condition: str, timeout_s: float = 60) -> object:
        "Until a JavaScript expression is true; its value."
        end = time.monotonic() + timeout_s
        while not (value := self.browser.evaluate(condition)):
            assert time.monotonic() < end, f'{condition} did not become true; the page says: ' + str(
                self.browser.evaluate('document.body.innerText'))[-800:]
            time.sleep(0.05)
        return value

    def click(self, script: str, x: float = 0.5, y: float = 0.5) -> None:
        "Press the mouse on an element, at a share of its width and height."
        box = self.browser.evaluate(f"(() => {{ const e = {script}; e.scrollIntoView({{block: 'center'}});"
                                    "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()")
        where = {'x': box[0] + x * box[2], 'y': box[1] + y * box[3], 'button': 'left', 'clickCount': 1}
        for kind in ('mousePressed', 'mouseReleased'):
            self.browser.call('Input.dispatchMouseEvent', type=kind, **where)

    def key(self, name: str) -> None:
        for kind in ('keyDown', 'keyUp'):
            self.browser.call('Input.dispatchKeyEvent', type=kind, key=name, code=name,
                              windowsVirtualKeyCode={'ArrowUp': 38, 'ArrowRight': 39}[name])

    def pictures(self) -> list[str]:
        return self.browser.evaluate("[...document.querySelectorAll('img[alt*=\" slice at \"]')].map(i => i.alt + i.src)")

    def changed(self, before: list[str]) -> list[str]:
        "Pictures once one of them differs from before."
        end = time.monotonic() + 20
        while (now := self.pictures()) == before:
            assert time.monotonic() < end, 'no picture changed'
            time.sleep(0.03)
        return self.settled(now)

    def settled(self, now: list[str]) -> list[str]:
        "Pictures once they stay as they are: all three have come."
        while (later := (self.browser.settle(None, 0.15), self.pictures())[1]) != now:
            now = later
        return now

    def shot(self, name: str) -> None:
        if SHOTS:
            import base64
            time.sleep(1)  # for what moves
            data = self.browser.call('Page.captureScreenshot', format='png')['data']
            (Path(SHOTS) / f'{name}.png').write_bytes(base64.b64decode(data))


BUTTON = "[...document.querySelectorAll('button')].find(b => b.textContent.trim() === '{}')"
FITS = ("(() => { const p = document.querySelector('.js-plotly-plot');"
        "return p && p._fullLayout && p._fullLayout.width <= p.getBoundingClientRect().width + 1; })()")
WATCH_BAR = """(() => {
  const bar = document.querySelector('.progress-bar'), box = bar.closest('.widget-hprogress, .jupyter-widgets');
  window.lengths = []; window.shown = false;
  new MutationObserver(() => { window.lengths.push(bar.style.width); window.shown ||= getComputedStyle(bar).visibility === 'visible'; })
    .observe(box, {attributes: true, subtree: true, attributeFilter: ['style']});
})()"""
STATUS = "document.body.innerText.includes('{}')"


@pytest.mark.skipif(find_chromium() is None, reason='no Chromium installed: the dashboard was not opened in a browser')
def test_review_in_a_browser(address, work):
    with Browser() as browser:
        hand = Hand(browser)
        visit = browser.visit(address)
        hand.wait("document.querySelectorAll('img[alt*=\" slice at \"]').length === 3 && "
                  "[...document.querySelectorAll('img[alt*=\" slice at \"]')].every(i => i.naturalWidth > 50)")
        hand.wait("Boolean(document.querySelector('canvas'))")
        hand.wait(FITS)  # the mesh takes its place and no more
        hand.shot('1_opened')
        first = hand.pictures()

        image = "document.querySelector('img[alt*=\"axial slice\"]')"
        hand.click(image, 0.3, 0.35)  # click to centre: the other two planes follow
        centred = hand.changed(first)
        assert [a.split('blob:')[0] == b.split('blob:')[0] for a, b in zip(first, centred)] == [True, False, False]
        hand.shot('2_centred')

        hand.click("document.querySelectorAll('.widget-slider .noUi-handle, .widget-hslider .noUi-handle')[3]")  # axial slider
        hand.key('ArrowRight')
        moved = hand.changed(centred)
        assert moved[0].split('blob:')[0] != centred[0].split('blob:')[0]

        hand.click(BUTTON.format('Error'))  # toggle an overlay
        hand.changed(moved)
        hand.wait(STATUS.format('WT missed'))
        hand.shot('3_error')

        hand.click(BUTTON.format('Save view'))
        hand.wait(STATUS.format('written: out/'))
        assert hand.browser.evaluate("document.querySelector('a[download]').href.startsWith('data:image/png')")
        assert len(list((work / 'out').glob('*.png'))) == 1

        before = hand.pictures()  # another case, which has no prediction yet
        browser.evaluate("(() => { const s = document.querySelector('select'); s.selectedIndex = 1;"
                         "s.dispatchEvent(new Event('change', {bubbles: true})); })()")
        hand.changed(before)
        assert hand.browser.evaluate(BUTTON.format('Error') + '.disabled')
        hand.shot('4_other_case')
        browser.evaluate(WATCH_BAR)
        hand.click(BUTTON.format('Segment this case'))
        hand.wait(STATUS.format('segmented PHANTOM_002'), 120)
        assert browser.evaluate('window.shown') and browser.evaluate('window.lengths')[-1] == '100%'  # the bar came, and grew to its end
        assert browser.evaluate(STATUS.format('Not known whether the model was trained on this case'))
        assert not hand.browser.evaluate(BUTTON.format('Entropy') + '.disabled')
        before = hand.pictures()
        hand.click(BUTTON.format('Entropy'))
        hand.changed(before)
        hand.wait(STATUS.format('entropy of WT'))
        hand.click("[...document.querySelectorAll('.updatemenu-button')].find(b => b.textContent === 'entropy')")  # of the mesh
        hand.wait("Boolean(document.querySelector('.colorbar'))")
        hand.wait(FITS)
        hand.shot('5_segmented')
        hand.click(BUTTON.format('Save report'))
        hand.wait(STATUS.format('PHANTOM_002.html'), 60)
        page = (work / 'out' / 'PHANTOM_002.html').read_text()
        assert all(part in page for part in ('Research use only', 'id="model-card"', 'id="uncertainty"', 'id="mesh"'))
        errors = visit.errors + [describe(e) for e in browser.events if describe(e)]
    # what Voila itself asks for in vain: its icon font from a network, an extension of JupyterLab that is no widget
    own = ('fontawesome', 'ERR_NAME_NOT_RESOLVED', 'ERR_INTERNET_DISCONNECTED', 'jupyterlab-jupytext', 'favicon')
    assert not [e for e in errors if not any(o in e for o in own)]


def test_falls_back_to_a_picture(work):
    import nbconvert
    board = dashboard(work / 'cohort', work / 'pred')
    output = nbformat.v4.new_output('display_data', board._repr_mimebundle_())
    page, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell('board', outputs=[output])]))
    assert 'data:image/png;base64,' in page  # no widget state in the file: the static view
    json.dumps(board._repr_mimebundle_())


def test_colab_is_told_to_load_the_widgets(work, monkeypatch):
    "Colab shows widgets of others only where its manager for them is on; its module is played here."
    from types import SimpleNamespace

    import anywidget._util
    called = []
    output = SimpleNamespace(enable_custom_widget_manager=lambda: called.append(1), _widgets=SimpleNamespace(_installed_url='https://manager'))
    monkeypatch.setitem(sys.modules, 'google.colab.output', output)
    anywidget._util.enable_custom_widget_manager_once.cache_clear()
    board = dashboard(work / 'cohort', work / 'pred')
    assert called == [1]
    anywidget._util.enable_custom_widget_manager_once.cache_clear()
    assert 'application/vnd.jupyter.widget-view+json' in board._repr_mimebundle_()


def test_what_cannot_be_read_is_told(work, tmp_path):
    board = dashboard(work / 'cohort', work / 'pred', tmp_path / 'absent.ckpt')
    board.segment()
    board.thread.join()
    assert 'no such checkpoint' in board.controls['status'].value and not board.controls['segment'].disabled
    study = board.cohort.studies['PHANTOM_002']
    kept = next(iter(study.images.values()))
    content = kept.read_bytes()
    try:
        kept.write_bytes(content[:3000])
        board.controls['case'].value = 'PHANTOM_002'
        assert 'PHANTOM_002' in board.controls['status'].value and board.scene.case.id == 'PHANTOM_001'
    finally:
        kept.write_bytes(content)
