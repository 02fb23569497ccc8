"Waiting for another process that hangs: as long as patience lasts, then an error that names it."
from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from balls import ball_cohort

from neuroseg3d.cli import main
from neuroseg3d.core import InputError
from neuroseg3d.training.data import Data, SegmentationData, StepSampler, make_loader, plan_machine
from neuroseg3d.system.folders import FolderLock
from neuroseg3d.inference.predict import predictions
from neuroseg3d.phantom import _run
from neuroseg3d.system.processes import PATIENCE
from neuroseg3d.training.task import loader_error

HOLD = """
import sys, time
from pathlib import Path
from neuroseg3d.system.folders import FolderLock
lock, steps = FolderLock(Path(sys.argv[1]), 'caching cases'), int(sys.argv[2])
with lock.held():
    print('held', flush=True)
    for _ in range(steps):
        time.sleep(0.3)
        lock.advance()
    time.sleep(0 if steps else 600)
"""


@pytest.fixture
def hold(tmp_path, monkeypatch):
    "Starts another process that holds the lock of a folder: for ever, or while it gets on for some steps."
    monkeypatch.setenv(PATIENCE, '1')
    started = []

    def start(folder: Path, steps: int = 0) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, '-c', HOLD, folder, str(steps)], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == 'held\n'
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.contract('refused', 'processes', 'a cache, or a folder of results, that another process holds and does not get on with',
                      'after a minute (`NEUROSEG3D_PATIENCE_S`) the error names that process, its work, its machine; one that gets on is waited for')
def test_who_holds_the_cache_and_hangs_is_named(tmp_path, hold, capsys):
    root = ball_cohort(tmp_path / 'cohort', 1)
    other = hold(root / '.neuroseg3d')
    assert main(['train', '--data.root', str(root), '--trainer.output_dir', str(tmp_path / 'run'), '--data.n_folds', '1']) == 2
    said = capsys.readouterr().err
    assert "waited 1 s for another process" in said and f'(caching cases, process {other.pid} on {os.uname().nodename}, since ' in said, said
    assert 'internal error' not in said and PATIENCE in said


def test_who_holds_the_cache_and_gets_on_is_waited_for(tmp_path, hold):
    root = ball_cohort(tmp_path / 'cohort', 1)
    hold(root / '.neuroseg3d', steps=6)
    began = time.monotonic()
    assert SegmentationData(Data(root=str(root), n_folds=1), progress=False).deal().n_folds == 1
    assert time.monotonic() - began > 1


def test_making_the_cache_tells_that_it_gets_on(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(FolderLock, 'advance', lambda lock: steps.append(lock.work))
    data = SegmentationData(Data(root=str(ball_cohort(tmp_path / 'cohort', 2)), n_folds=1, cache='disk'), progress=False)
    data.prepare_data()
    assert {w: steps.count(w) for w in steps} == {'looking at the cases': 4, 'caching cases': 2}  # dealt, then checked


def test_who_holds_a_folder_of_predictions_is_named(tmp_path, hold):
    other = hold(tmp_path)
    with pytest.raises(InputError, match=f'waited 1 s for another process .*process {other.pid} on '):
        predictions(tmp_path).write('A.nii', 'x')


class Sleepy:
    "Patches that do not come."

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int):
        time.sleep(4)
        return {'image': np.zeros(1)}


@pytest.mark.contract('refused', 'processes', 'worker processes that hang, while patches or phantoms are made',
                      'after a minute (`NEUROSEG3D_PATIENCE_S`) the error names them')
def test_loader_workers_that_hang_are_named(monkeypatch):
    monkeypatch.setenv(PATIENCE, '1')
    loader = make_loader(Sleepy(), StepSampler(1, 0, 2), plan_machine(Data(loader='process', workers=1)))
    batches = iter(loader)
    with pytest.raises(RuntimeError) as error:
        next(batches)
    said = loader_error(error.value)
    assert isinstance(said, InputError) and f'waited 1 s for a batch of patches from worker process(es) {batches._workers[0].pid};' in str(said)


def test_workers_that_make_phantoms_and_hang_are_named(monkeypatch):
    monkeypatch.setenv(PATIENCE, '1')
    began = time.monotonic()
    with pytest.raises(InputError, match=r'phantoms: waited 1 s for process\(es\) \d+, \d+, which do nothing'):
        _run(partial(subprocess.run), [('sleep', '50')] * 2, 2, False)
    assert time.monotonic() - began < 30


def test_workers_that_make_phantoms_in_time_are_no_error(monkeypatch):
    monkeypatch.setenv(PATIENCE, '5')
    _run(partial(subprocess.run), [('sleep', '1.5')] * 3, 2, False)
