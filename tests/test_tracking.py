"Weights & Biases without an account and without a network: nothing asks, nothing hangs, the run is kept."
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from neuroseg3d.phantom import write_cohort


def read_offline_run(file: Path) -> dict[str, list[float]]:
    "Every number that an offline run holds, by name."
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore
    store, found = DataStore(), {}
    store.open_for_scan(str(file))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.history.item if record.WhichOneof('record_type') == 'history' else []:
            name = item.key or '/'.join(item.nested_key)
            found.setdefault(name, []).append(float(item.value_json)) if name[:1] != '_' else None
    return found


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
    found = read_offline_run(runs[0])
    assert len(found['val/dice_ET']) == len(found['val/hd95_mm_WT']) == 2
    assert len(found['train/loss']) >= 2 and any(k.startswith('lr-') for k in found)
