"Whatever ends a run, it goes on where it was and ends with the same bits."
from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from balls import ball_cohort

from neuroseg3d.networks.checkpoint import load_checkpoint

STEPS, EPOCH = 12, 4


class Runs:
    "Trainings of a tiny network on coarse phantoms, each in a process of its own."

    def __init__(self, folder: Path):
        self.folder = folder
        ball_cohort(folder / 'cohort', 6)
        self.launcher = subprocess.Popen([sys.executable, Path(__file__).parent / 'launcher.py'], text=True, cwd=folder,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def __call__(self, name: str, *options: object, at: str | None = None, resume: bool = True, trainer: dict | None = None,
                 data: dict | None = None, optim: dict | None = None, **order) -> int:
        "Train by the command line; the exit status, negative for a signal."
        settings = {'data': {'root': 'cohort', 'patch_size': 16, 'n_folds': 3, 'loader': 'none', **(data or {})},
                    'optim': optim or {}, 'model': {'preset': 'tiny', 'filters': [4, 8, 12, 16], 'dropout': 0.2},
                    'space': {'spacing_mm': 6.0}, 'logger': {'every_steps': 1},
                    'trainer': {'output_dir': name, 'max_steps': STEPS, 'val_every_steps': EPOCH, 'checkpoint_every_steps': 3,
                                'accelerator': 'cpu', 'patience': 50, 'keep_best': 2, **(trainer or {})}}
        words = ['train', *(['--resume', 'auto'] if resume else []), *map(str, options)]
        words += [word for s, values in settings.items() for k, v in values.items() for word in (f'--{s}.{k}', str(v))]
        order |= {'words': words, 'log': f'{name}.log', **({'at': at} if at else {})}
        self.launcher.stdin.write(json.dumps(order) + '\n')
        self.launcher.stdin.flush()
        return json.loads(self.launcher.stdout.readline())

    def log(self, name: str) -> str:
        return (self.folder / f'{name}.log').read_text()

    def checkpoints(self, name: str) -> Path:
        return self.folder / name / 'checkpoints'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp('runs'))
    assert runs('whole', resume=False) == 0, runs.log('whole')
    yield runs
    runs.launcher.stdin.close()
    runs.launcher.wait(30)


def same(a, b, where: str = '') -> None:
    "Both are the same tree of the same bits."
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for n, (x, y) in enumerate(zip(a, b)):
            same(x, y, f'{where}/{n}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def check_ends_alike(runs: Runs, name: str) -> None:
    "The run has ended with the bits, the best checkpoint and the log of the uninterrupted one."
    ours, whole = (load_checkpoint(runs.checkpoints(n) / 'last.ckpt') for n in (name, 'whole'))
    for part in ('state_dict', 'optimizer_states', 'lr_schedulers', 'callbacks', 'global_step'):
        same(ours[part], whole[part], part)
    names = [sorted(p.name for p in runs.checkpoints(n).iterdir()) for n in (name, 'whole')]
    assert names[0] == names[1]
    assert load_checkpoint(runs.checkpoints(name) / 'best.ckpt')['global_step'] == load_checkpoint(
        runs.checkpoints('whole') / 'best.ckpt')['global_step']
    rows = [list(csv.DictReader(open(runs.folder / n / 'logs' / 'metrics.csv'))) for n in (name, 'whole')]
    metrics = [[[r[k] for k in ('step', 'train/loss', 'val/dice', 'val/hd95_mm_ET')] for r in of_run] for of_run in rows]
    assert metrics[0] == metrics[1] and [m[0] for m in metrics[0]] == [str(n) for n in range(STEPS)]
    assert all(loss for _, loss, _, _ in metrics[0]) and sum(bool(dice) for _, _, dice, _ in metrics[0]) == STEPS // EPOCH


def test_ten_kills_at_random_steps_validations_and_saves(runs):
    "One run after another, each killed at random in the middle of what it does, until it is through."
    rng, places = random.Random(7), ('step', 'validation', 'save', 'rename', 'step')
    kills = 0
    for attempt in range(3):
        name, lives = f'killed{attempt}', 4
        loader = {'loader': 'thread', 'workers': 2} if attempt else {}  # batches ahead of the step are lost too
        for life in range(lives):
            place = places[(attempt + life) % len(places)]
            n = rng.randint(*{'step': (2, 5), 'validation': (1, 3), 'save': (1, 3), 'rename': (3, 8)}[place])
            status = runs(name, at=place, n=n, data=loader)
            assert status in (0, -signal.SIGKILL), runs.log(name)
            kills += status != 0
        assert runs(name) == 0, runs.log(name)
        check_ends_alike(runs, name)
    assert kills >= 10


def test_a_network_that_ignores_air_goes_on_exactly_too(runs):
    "Its norms pick voxels and put them back; its patches reach out of the volume, its windows lie on the scan."
    air = ('--model.norm_over', 'brain', '--data.overhang', 0.5, '--infer.grid', 'scan', '--infer.size', 16)
    assert runs('air', *air, resume=False) == 0, runs.log('air')
    for place, n in (('step', 4), ('validation', 2)):
        assert runs('air killed', *air, at=place, n=n) == -signal.SIGKILL, runs.log('air killed')
    assert runs('air killed', *air) == 0, runs.log('air killed')
    ours, whole = (load_checkpoint(runs.checkpoints(n) / 'last.ckpt') for n in ('air killed', 'air'))
    for part in ('state_dict', 'optimizer_states', 'lr_schedulers', 'callbacks', 'global_step'):
        same(ours[part], whole[part], part)


def test_kills_at_random_times(runs):
    rng, kills = random.Random(1), 0
    for _ in range(2):
        kills += runs('timed', after_s=rng.uniform(0.2, 0.6)) != 0
    assert kills and runs('timed') == 0, runs.log('timed')
    check_ends_alike(runs, 'timed')


def test_a_kill_between_a_save_and_its_row_in_the_log(runs):
    assert runs('unlogged', at='saved', n=6) == -signal.SIGKILL
    assert load_checkpoint(runs.checkpoints('unlogged') / 'last.ckpt')['global_step'] == 6
    assert runs('unlogged') == 0, runs.log('unlogged')
    check_ends_alike(runs, 'unlogged')


def test_the_gradient_scaler_goes_on_too(runs):
    assert runs('scaled', scaler=True) == 0, runs.log('scaled')
    assert runs('scaled2', scaler=True, at='step', n=6) == -signal.SIGKILL
    assert runs('scaled2', scaler=True) == 0, runs.log('scaled2')
    whole, ours = (load_checkpoint(runs.checkpoints(n) / 'last.ckpt') for n in ('scaled', 'scaled2'))
    assert whole['MixedPrecision']['scale'] > 256  # it has grown on the way
    for part in ('state_dict', 'optimizer_states', 'MixedPrecision'):
        same(ours[part], whole[part], part)


@pytest.mark.parametrize('signum, place, n, saved', [(signal.SIGTERM, 'step', 5, 5), (signal.SIGINT, 'validation', 3, 8)])
def test_a_signal_ends_the_run_at_the_next_step_boundary(runs, signum, place, n, saved):
    name = f'{place}{signum}'
    assert runs(name, at=place, n=n, signal=signum) == 128 + signum, runs.log(name)
    assert f'interrupted by {signum.name}' in runs.log(name) and f'holds step {saved}' in runs.log(name)
    assert load_checkpoint(runs.checkpoints(name) / 'last.ckpt')['global_step'] == saved
    assert runs(name) == 0, runs.log(name)
    check_ends_alike(runs, name)


def test_full_disk_leaves_the_checkpoint_before(runs):
    assert runs('full', at='step', n=5) == -signal.SIGKILL
    last = runs.checkpoints('full') / 'last.ckpt'
    before = last.read_bytes()
    assert runs('full', largest_file=len(before) // 2) == 2, runs.log('full')
    assert 'next.ckpt: could not be written: File too large; what was there before is as it was' in runs.log('full')
    assert last.read_bytes() == before and not list(last.parent.glob('.*'))
    assert runs('full') == 0
    check_ends_alike(runs, 'full')


class Payload:
    def __reduce__(self):
        return exec, ("open('payload-ran', 'w')",)


@pytest.mark.parametrize('damage', ['truncated', 'malicious'])
def test_damaged_last_falls_back_to_previous(runs, damage):
    name = f'damaged {damage}'
    assert runs(name, at='step', n=8) == -signal.SIGKILL
    last = runs.checkpoints(name) / 'last.ckpt'
    if damage == 'truncated':
        os.truncate(last, last.stat().st_size // 2)
    else:
        last.unlink()
        torch.save({'state_dict': Payload()}, last)
    assert runs(name, trainer={'max_steps': 20}) == 2  # refused for another reason, after the fall-back
    assert 'last.ckpt: cannot be loaded as data' in runs.log(name) and 'the one before it (step 4)' in runs.log(name)
    assert 'trainer.max_steps: 12 in the checkpoint, 20 now; --extend_to makes a schedule longer' in runs.log(name)
    assert runs(name) == 0, runs.log(name)  # from previous.ckpt, which is still there
    (runs.checkpoints(name) / 'damaged.ckpt').unlink()
    assert not (runs.folder / 'payload-ran').exists()
    check_ends_alike(runs, name)


def test_kill_between_the_batches_of_a_step(runs):
    halves = {'accumulate': 2, 'max_steps': 4}
    assert runs('halves', trainer=halves) == 0
    assert runs('halves2', trainer=halves, at='step', n=8) == -signal.SIGKILL  # the second batch of step 4, saved is 3
    assert runs('halves2', trainer=halves) == 0, runs.log('halves2')
    a, b = (load_checkpoint(runs.checkpoints(n) / 'last.ckpt') for n in ('halves', 'halves2'))
    for part in ('state_dict', 'optimizer_states', 'global_step'):
        same(a[part], b[part])


@pytest.mark.contract('refused', 'settings', 'a checkpoint of a run with other data or settings', 'the error lists what differs')
def test_another_run_is_refused_with_the_difference(runs):
    ball_cohort(runs.folder / 'other', 5)
    assert runs('whole', data={'root': 'other'}) == 2
    for name in ('data_sha256', 'split_sha256', 'n_train'):
        assert f'{name}: ' in runs.log('whole'), runs.log('whole')
    assert runs('whole', '--model.residual', 'true', '--optim.weight_decay', 0.1) == 2
    assert 'model.residual: False in the checkpoint, True now; optim.weight_decay: 0.0001 in the checkpoint, 0.1 now' in runs.log('whole')


def test_longer_schedule_is_explicit_and_exact(runs):
    assert runs('longer', trainer={'max_steps': 4}) == 0
    shutil.copytree(runs.folder / 'longer', runs.folder / 'longer2')
    assert runs('longer', '--extend_to', 8, at='step', n=4) == -signal.SIGKILL
    assert 'extended from 4 to 8 steps: the cosine is drawn anew' in runs.log('longer')
    assert runs('longer', trainer={'max_steps': 8}) == 0, runs.log('longer')  # killed and resumed: it has 8 steps now
    assert runs('longer2', '--extend_to', 8) == 0, runs.log('longer2')
    a, b = (load_checkpoint(runs.checkpoints(n) / 'last.ckpt') for n in ('longer', 'longer2'))
    assert a['global_step'] == 8 and len(a['optimizer_states'][0]['state']) > 0
    same(a['state_dict'], b['state_dict'])
    assert runs('nothing', '--extend_to', 16) == 2 and 'there is no run to extend' in runs.log('nothing')


def test_early_stopping_survives_a_kill(runs):
    still = {'trainer': {'patience': 2, 'max_steps': 40}, 'optim': {'learning_rate': 1e-12, 'final_learning_rate': 1e-12}}
    assert runs('early', **still) == 0
    stopped = load_checkpoint(runs.checkpoints('early') / 'last.ckpt')
    assert stopped['global_step'] == 12 and stopped['callbacks']['Checkpoints']['since_best'] == 2
    assert runs('early', **still) == 0 and 'the run is finished' in runs.log('early')
    assert runs('early2', **still, at='step', n=11) == -signal.SIGKILL
    assert runs('early2', **still) == 0, runs.log('early2')
    same(load_checkpoint(runs.checkpoints('early2') / 'last.ckpt')['callbacks'], stopped['callbacks'])


def test_a_checkpoint_every_few_minutes(runs):
    often = {'checkpoint_every_steps': 1000, 'checkpoint_every_minutes': 1e-6}
    assert runs('minutes', trainer=often, at='step', n=3) == -signal.SIGKILL
    assert load_checkpoint(runs.checkpoints('minutes') / 'last.ckpt')['global_step'] == 2


def test_a_dead_worker_is_reported_with_its_remedy(runs):
    assert runs('worker', data={'loader': 'process', 'workers': 1}, at='worker', n=2) == 2
    assert 'data loader: DataLoader worker' in runs.log('worker') and '--data.loader thread' in runs.log('worker')


def test_out_of_memory_suggests_what_fits(runs):
    assert runs('memory', at='memory') == 2
    assert 'a step with these settings fits: --model.checkpointing True --data.batch_size 1 --trainer.accumulate 2' in runs.log('memory')


def test_a_network_that_cannot_be_compiled_is_trained_without(runs):
    assert runs('compiled', trainer={'compile': True, 'max_steps': 4}, at='compile') == 0
    assert 'trainer.compile: the network could not be compiled (RuntimeError: no compiler here)' in runs.log('compiled')
    assert load_checkpoint(runs.checkpoints('compiled') / 'last.ckpt')['global_step'] == 4


@pytest.fixture
def task():
    from neuroseg3d.config import build
    from neuroseg3d.training.task import Config, SegmentationTask
    return SegmentationTask(build(Config, {'model': {'preset': 'tiny', 'filters': [4, 8, 8, 8]}, 'trainer': {'accelerator': 'cpu'}}))


@pytest.mark.parametrize('has_bf16, before_s, after_s, chosen', [
    (True, 4.0, 2.9, 'bf16-mixed'), (True, 4.0, 3.1, '32-true'), (False, 4.0, 1.0, '32-true'), (True, 0.5, 0.1, '32-true')])
def test_sixteen_bits_where_a_step_is_long_and_they_are_faster(task, monkeypatch, has_bf16, before_s, after_s, chosen):
    import neuroseg3d.training.task as train
    monkeypatch.setattr(train, 'cpu_has_bf16', lambda: has_bf16)
    monkeypatch.setattr(train, 'try_step', lambda *args: after_s)
    assert train.faster_precision(task, 2, before_s) == (chosen, after_s if chosen == 'bf16-mixed' else before_s)


def test_checkpoints_of_earlier_versions_held_the_weights_twice(task):
    content = {'state_dict': dict(task.state_dict()), 'loops': {'fit_loop': {'epoch_loop.batch_progress': {}}}}
    kept = set(content['state_dict'])
    assert not any(k.startswith('forward_network.') for k in kept)
    content['state_dict'] |= {k.replace('network.', 'forward_network.', 1): v for k, v in task.state_dict().items() if k.startswith('network.')}
    task.on_load_checkpoint(content)
    assert set(content['state_dict']) == kept
    task.load_state_dict(content['state_dict'])
