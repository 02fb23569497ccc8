"What a notebook cannot show of the in-silico cohort: other processes, interruption, other machines' settings."
from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from neuroseg3d.studies.cases import read_case
from neuroseg3d.core import labels_to_regions
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.phantom import best_threshold_dice, label_contrast, make_phantom, write_cohort


def run(root: Path, code: str, **env: str) -> subprocess.CompletedProcess:
    "Run a script (not a module: it has no guard) in a process of its own."
    return subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PYTHONPATH': str(root), **env})


def test_a_script_without_a_guard_can_use_workers(root, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('from neuroseg3d.phantom import write_cohort\n'
                      f'write_cohort({str(tmp_path / "cohort")!r}, 2, spacing_mm=8, workers=2)\nprint("once")\n')
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PYTHONPATH': str(root)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'once\n' and done.stderr == ''  # the progress bar is for terminals only
    assert [s.id for s in find_cases(tmp_path / 'cohort')] == ['PHANTOM_001', 'PHANTOM_002']


def test_the_same_bits_whatever_the_threads(root):
    code = ('from neuroseg3d.phantom import make_phantom\nimport hashlib\ncase = make_phantom(11, 5)\n'
            'print(hashlib.sha256(case.image.tobytes() + case.label.tobytes()).hexdigest())')
    case = make_phantom(11, 5)
    here = hashlib.sha256(case.image.tobytes() + case.label.tobytes()).hexdigest()
    threads = '1' if os.environ.get('OMP_NUM_THREADS') == '3' else '3'  # than this process has
    done = run(root, code, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads, PYTHONHASHSEED=threads)
    assert done.stdout.strip() == here, done.stderr


def test_an_interrupted_cohort_holds_no_half_and_is_continued(root, tmp_path):
    folder = tmp_path / 'cohort'
    code = f'from neuroseg3d.phantom import write_cohort; write_cohort({str(folder)!r}, 4, spacing_mm=6, workers=1)'
    job = subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.DEVNULL,
                           env={**os.environ, 'PYTHONPATH': str(root)})
    first, deadline = folder / 'imagesTr/PHANTOM_001.nii.gz', time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert first.exists()
    for study in find_cases(folder):
        assert read_case(study).label.any()
    write_cohort(folder, 4, spacing_mm=6, workers=1, progress=False)
    assert len(find_cases(folder)) == 4 and not (folder / '.partial').exists()


def test_what_is_read_is_what_was_made(tmp_path):
    folder = write_cohort(tmp_path / 'cohort', 1, seed=3, spacing_mm=(6, 6, 8), n_test=1, workers=1, progress=False)
    for study in find_cases(folder, split='all'):
        case = read_case(study)
        assert case.schema == 'msd' and case.geometry.orientation == 'RAS'
        assert case.geometry.spacing_mm == pytest.approx((6, 6, 8)) and case.label.any()


@pytest.mark.parametrize('spacing, shape', [(1.9, (97, 101, 83)), ((3.1, 2.9, 5.0), None), (4, (33, 34, 35)),
                                            (6, (12, 40, 9))])
def test_any_grid(spacing, shape):
    case = make_phantom(5, spacing, shape)
    wt, tc, et = labels_to_regions(case.label)
    assert shape is None or case.geometry.shape == shape
    assert np.isfinite(case.image).all() and case.brain.any() and not (case.label > 0)[~case.brain].any()
    assert (wt >= tc).all() and (tc >= et).all()


def test_measures_agree_with_the_table_of_the_real_cases(root):
    folder = root.parent / 'shared' / 'data' / 'brats2021' / 'BraTS2021_00006'
    if not folder.is_dir():
        pytest.skip(f'no real cases at {folder}')
    case = read_case(folder, schema='brats2017')
    assert best_threshold_dice(case.image[0], case.label > 0) == pytest.approx(0.95, abs=0.006)
    assert label_contrast(case)['enhancing'] == pytest.approx(
        np.array([(2.7, 0.6), (0.7, 0.4), (3.0, 1.9), (1.3, 0.4)]), abs=0.06)
