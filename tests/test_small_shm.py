"A run of the data path where /dev/shm is 64 MB, as in containers: worker processes die there, the plan's threads do not."
from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap

import pytest

MOUNT = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
PREPARE = textwrap.dedent('''
    import hashlib, os, sys, time, torch
    from neuroseg3d.training.augment import Augment
    from neuroseg3d.core import Geometry
    from neuroseg3d.training.data import Data, MemoryCase, PatchDataset, StepSampler, make_loader, plan_machine, tumour_voxels

    torch.manual_seed(0)
    image = torch.randn(4, 100, 110, 104)
    label = torch.zeros(1, 100, 110, 104, dtype=torch.uint8)
    label[:, 40:60, 40:60, 40:60] = 1
    cases = [MemoryCase('a', image, label, tumour_voxels(label), None)]
    patches = PatchDataset(cases, augment=Augment(rotation_p=0, scaling_p=0))

    def run(loader, steps=6, workers=2):
        plan = plan_machine(Data(loader=loader, workers=workers))
        print(plan, flush=True)
        digest = hashlib.sha256()
        for batch in make_loader(patches, StepSampler(2, 0, steps), plan):
            time.sleep(0.3)  # the step: batches pile up meanwhile
            digest.update(batch['image'].numpy().tobytes())
        return plan.loader, digest.hexdigest()
''')


def in_small_shm(code: str) -> subprocess.CompletedProcess:
    "Run Python code in a mount namespace of its own, where /dev/shm is 64 MB."
    command = ['unshare', '-m', 'sh', '-c', MOUNT, 'sh', sys.executable, '-c', PREPARE + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module', autouse=True)
def small_shm():
    if not sys.platform.startswith('linux') or not shutil.which('unshare'):
        pytest.skip('a /dev/shm of 64 MB needs Linux and unshare')
    command = ['unshare', '-m', 'sh', '-c', MOUNT, 'sh', 'df', '-k', '/dev/shm']
    tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode or ' 65536 ' not in tried.stdout:
        pytest.skip(f'mounting a /dev/shm of 64 MB is not permitted here: {tried.stderr.strip()[:100]}')


def test_the_plan_survives():
    found = in_small_shm('''
        shm = os.statvfs('/dev/shm')
        assert shm.f_blocks * shm.f_frsize == 64 * 2 ** 20
        loader, digest = run('auto')
        assert loader == 'thread', loader
        assert (loader, digest) == ('thread', run('none')[1])
        print('done', digest)
    ''')
    assert found.returncode == 0, found.stderr[-2000:]
    assert 'patches are made by' in found.stdout and 'done' in found.stdout


def test_worker_processes_would_not():
    "What the plan avoids is real: the same batches through two worker processes end the run."
    found = in_small_shm("print(run('process')); print('done')")
    assert found.returncode != 0 and 'done' not in found.stdout
    assert 'expect a bus error' in found.stdout
    assert 'bus error' in found.stderr.lower() or 'shared memory' in found.stderr.lower() or 'No space left' in found.stderr
