"Weights & Biases without an account and without a network: nothing asks, nothing hangs, the run is kept."
from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from neuroseg3d.phantom import write_cohort


def values_of(content: bytes, key: str) -> list[float]:
    "Every value that an offline run's log holds of a key: a protobuf item is the key, then the value as JSON text."
    item = b'\x12' + bytes([len(key)]) + key.encode() + rb'\x82\x01.(-?[0-9][0-9.]*(?:e-?[0-9]+)?)'
    return [float(v) for v in re.findall(item, content, re.DOTALL)]


def test_offline_run_holds_losses_learning_rate_and_dice(tmp_path):
    write_cohort(tmp_path / 'cohort', n=4, spacing_mm=6, workers=1, progress=False)
    env = {k: v for k, v in os.environ.items() if not k.startswith('WANDB')}
    env |= {'HOME': str(tmp_path), 'NETRC': str(tmp_path / 'no-netrc')}
    words = ['train', '--data.root', 'cohort', '--data.n_folds', '2', '--data.patch_size', '16', '--space.spacing_mm', '6',
             '--model.preset', 'tiny', '--trainer.max_steps', '20', '--trainer.val_every_steps', '10',
             '--trainer.accelerator', 'cpu', '--trainer.output_dir', 'run', '--logger.kind', 'wandb']
    done = subprocess.run([Path(sys.executable).parent / 'neuroseg3d', *words], cwd=tmp_path, env=env, text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
    assert done.returncode == 0, done.stderr
    assert 'wandb sync' in done.stdout
    runs = list((tmp_path / 'run' / 'logs' / 'wandb').glob('offline-run-*/run-*.wandb'))
    assert len(runs) == 1
    content = runs[0].read_bytes()
    for key in ('val/dice_ET', 'val/hd95_mm_WT', 'train/loss', 'lr-AdamW/pg1'):
        assert len(values_of(content, key)) >= 2, key
    assert all(0 <= v <= 1 for v in values_of(content, 'val/dice_ET'))
    assert 1e-3 in [round(v, 6) for v in values_of(content, 'lr-AdamW/pg1')]
