"The tutorial for the Decathlon's data, run as it stands on a folder with a single real patient."
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / 'shared' / 'data' / 'msd' / 'Task01_BrainTumour'


@pytest.mark.skipif(not REAL.is_dir(), reason='no real Decathlon case beside the project')
def test_it_runs_unchanged_on_one_patient(tmp_path):
    shutil.copytree(REAL, tmp_path / 'Task01_BrainTumour')
    notebook = json.loads((ROOT / 'nbs' / '91_tutorial_msd.ipynb').read_text(encoding='utf-8'))
    cells = [''.join(c['source']) for c in notebook['cells'] if c['cell_type'] == 'code']
    code = '\n'.join(c for c in cells if '%pip' not in c)
    assert code.count('#| msd') >= 8
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, 'NEUROSEG3D_MSD': str(tmp_path), 'NEUROSEG3D_RUN': str(tmp_path / 'run'),
                               'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': ''})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'run' / 'report' / 'index.html').is_file()
    assert json.loads((tmp_path / 'run' / 'scores' / 'summary.json').read_text())['WT']['n'] == 1
