"Several processes: the losses of one, each case validated once, one that writes, and resuming with another number of them."
from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from balls import ball_cohort, state_order

from neuroseg3d.cli import main

BIN = Path(sys.executable).parent
STEPS = 4
# float64: in float32 the order of a sum shows in the weights, with one process and two threads as well, and training enlarges it
WORDS = ['train', '--data.root', 'cohort', '--data.n_folds', '2', '--data.patch_size', '16', '--data.batch_size', '2',
         '--data.loader', 'none', '--space.spacing_mm', '6', '--model.preset', 'tiny', '--model.filters', '[4, 8, 8, 8]',
         '--trainer.max_steps', STEPS, '--trainer.val_every_steps', '2', '--trainer.checkpoint_every_steps', '1',
         '--trainer.accelerator', 'cpu', '--trainer.precision', '64-true', '--logger.every_steps', '1', '--optim.warmup_steps', '1']


# ---- processes that are started as a launcher starts them

def free_port() -> str:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def torchrun(rank: int, port: str, world: int = 2) -> dict[str, str]:
    return {'RANK': rank, 'WORLD_SIZE': world, 'LOCAL_RANK': rank, 'LOCAL_WORLD_SIZE': world, 'GROUP_RANK': 0, 'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': port}


def srun(rank: int, port: str) -> dict[str, str]:
    "What a step of two tasks on one machine finds in its environment (srun --ntasks 2)."
    return {'SLURM_JOB_ID': port, 'SLURM_JOB_NAME': 'train', 'SLURM_NTASKS': 2, 'SLURM_NPROCS': 2, 'SLURM_NNODES': 1, 'SLURM_NODEID': 0,
            'SLURM_PROCID': rank, 'SLURM_LOCALID': rank, 'SLURM_STEP_ID': 0, 'SLURM_STEP_NUM_TASKS': 2, 'SLURM_STEP_NUM_NODES': 1,
            'SLURM_STEP_NODELIST': 'localhost', 'SLURM_JOB_NODELIST': 'localhost', 'SLURM_NODELIST': 'localhost'}


def two_machines(rank: int, port: str) -> dict[str, str]:
    "What a person sets who starts one process on each of two machines by hand."
    return {'NODE_RANK': rank, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}


def process(folder: Path, run: str, environment: dict, words: list, stop_at: int | None) -> None:
    "The command line, which notes what it says, validates and writes, and may end without goodbye before a step."
    os.environ.update({k: str(v) for k, v in environment.items()})
    os.chdir(folder)
    torch.set_num_threads(1)
    import neuroseg3d.training.task as train
    rank = next((environment[k] for k in ('RANK', 'SLURM_PROCID', 'NODE_RANK') if k in environment), 0)
    name = f'{run}.{rank}'
    validated, changed = [], []

    class Notes(train.pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == stop_at:
                os._exit(9)

        def on_validation_batch_end(self, trainer, module, outputs, batch, *args):
            validated.append([trainer.global_step, *batch['case_id']])

    make = train.make_trainer

    def noting(*args):
        trainer = make(*args)
        trainer.callbacks.append(Notes())
        return trainer
    train.make_trainer = noting

    def audit(event, args):
        writes = event in ('os.rename', 'os.link', 'os.remove', 'os.mkdir') or event == 'open' and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and f'{run}/' in f'{args[0]}/':
            changed.append(f'{event} {args[1] if event in ("os.rename", "os.link") else args[0]}')  # what has the name in the end
    sys.addaudithook(audit)
    with open(f'{name}.txt', 'w') as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(w) for w in words])
    Path(f'{name}.json').write_text(json.dumps({'validated': validated, 'changed': changed}))
    sys.exit(code)


SERVER = multiprocessing.get_context('forkserver')  # it imports once what its children, one a process, need
SERVER.set_forkserver_preload(['neuroseg3d.training.task', 'neuroseg3d.cli', 'test_devices'])


def together(folder: Path, run: str, environments: list[dict], words: list, stop_at: int | None = None, code: int = 0) -> list[dict]:
    "What the processes of a run have noted."
    children = [SERVER.Process(target=process, args=(folder, run, e, words, stop_at)) for e in environments]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    said = '\n'.join(f.read_text() for f in sorted(folder.glob(f'{run}.*.txt')))
    assert [c.exitcode for c in children] == [code if stop_at is None else 9] * len(children), said
    return [json.loads((folder / f'{run}.{rank}.json').read_text()) for rank in range(len(children))] if stop_at is None else []


def train(folder: Path, run: str, environments: list[dict], *more: str, stop_at: int | None = None) -> list[dict]:
    "Train in processes."
    return together(folder, run, environments, [*WORDS, '--trainer.output_dir', run, *more], stop_at)


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    "A folder with a cohort, and a run of one process."
    folder = tmp_path_factory.mktemp('work')
    ball_cohort(folder / 'cohort', n=5, n_test=3)
    train(folder, 'one', [{}])
    return folder


def table(run: Path) -> list[dict[str, float]]:
    "What a run has measured, without speed, memory and time."
    rows = list(csv.DictReader(open(run / 'logs' / 'metrics.csv')))
    return [{k: float(v) for k, v in r.items() if v and k.split('/')[0] in ('train', 'val') and 'per_s' not in k} for r in rows]


def assert_same(run: Path, other: Path) -> None:
    "The same numbers at each step, and the same weights at the end."
    ours, theirs = table(run), table(other)
    assert len(ours) == len(theirs) == STEPS and sum('val/dice' in r for r in ours) == 2
    for a, b in zip(ours, theirs):
        assert 'train/loss' in a and a == pytest.approx(b, abs=1e-5)
    a, b = (torch.load(r / 'checkpoints' / 'last.ckpt', weights_only=True) for r in (run, other))
    assert a['global_step'] == b['global_step'] == STEPS and a['state_dict'].keys() == b['state_dict'].keys()
    for key, value in a['state_dict'].items():
        assert torch.allclose(value, b['state_dict'][key], rtol=0, atol=1e-5), key


@pytest.fixture(scope='module')
def two(work) -> list[dict]:
    "What the two processes of run 'two' have noted."
    port = free_port()
    return train(work, 'two', [torchrun(rank, port) for rank in (0, 1)])


def test_two_processes_do_what_one_does(work, two):
    assert_same(work / 'two', work / 'one')


def test_the_loss_curve_in_single_precision(work):
    port = free_port()
    train(work, 'one32', [{}], '--trainer.precision', '32-true')
    train(work, 'two32', [torchrun(rank, port) for rank in (0, 1)], '--trainer.precision', '32-true')
    ours, theirs = ([r['train/loss'] for r in table(work / run)] for run in ('two32', 'one32'))
    assert len(ours) == STEPS and ours == pytest.approx(theirs, abs=1e-5)


def test_more_processes_than_cases_to_validate(work):
    words, port = ('--data.n_folds', '3', '--data.batch_size', '3'), free_port()
    train(work, 'few1', [{}], *words)
    notes = train(work, 'few3', [torchrun(rank, port, 3) for rank in range(3)], *words)
    assert_same(work / 'few3', work / 'few1')
    cases = [case for n in notes for at, case in n['validated'] if at == 2]
    assert len(cases) == 3 and len(set(cases)) == 2  # one is predicted twice, and counts once


def test_each_case_is_validated_once(work, two):
    split = json.loads((work / 'two' / 'split.json').read_text())['cases']
    held_out = sorted(c for c, about in split.items() if about['fold'] == 0)
    assert len(held_out) == 3  # odd: a sampler that pads would repeat one
    for step in (2, 4):
        each = [[case for at, case in notes['validated'] if at == step] for notes in two]
        assert all(each) and sorted(sum(each, [])) == held_out


def test_one_process_writes_and_speaks(work, two):
    first, second = two
    assert any('last.ckpt' in c for c in first['changed']) and any('metrics.csv' in c for c in first['changed'])
    assert second['changed'] == []
    assert (work / 'two.1.txt').read_text() == ''
    said = (work / 'two.0.txt').read_text()
    assert said.count('machine plan') == said.count('best checkpoint') == said.count('step 4/4') == 1 and 'Warning' not in said


def test_from_two_to_one(work):
    "Two processes that srun has started are lost; one goes on."
    port = free_port()
    train(work, 'fewer', [srun(rank, port) for rank in (0, 1)], stop_at=3)
    assert torch.load(work / 'fewer/checkpoints/last.ckpt', weights_only=True)['global_step'] == 3
    train(work, 'fewer', [{}], '--resume', 'auto')
    assert_same(work / 'fewer', work / 'one')


def test_from_one_to_two(work):
    "One process is lost; two go on, each on a machine of its own."
    train(work, 'more', [{}], stop_at=3)
    port = free_port()
    train(work, 'more', [two_machines(rank, port) for rank in (0, 1)], '--trainer.num_nodes', '2', '--resume', 'auto')
    assert_same(work / 'more', work / 'one')


# ---- a cohort

def infer(run: str) -> list[str]:
    return ['infer', '--ckpt_path', 'one/checkpoints/best.ckpt', '--input_image', 'new', '--output_dir', run, '--device', 'cpu']


@pytest.fixture(scope='module')
def new(work) -> list[str]:
    "Four new cases, of which one is damaged; the one that works alone segments them into 'alone'."
    shutil.copytree(work / 'cohort' / 'imagesTs', state_order(work / 'new'), dirs_exist_ok=True)
    files = sorted((work / 'new').glob('*.nii.gz'))
    (work / 'new' / f'A_{files[0].name}').write_bytes(files[0].read_bytes()[:3000])
    together(work, 'alone', [{}], infer('alone'), code=1)
    return [f.name.removesuffix('.nii.gz') for f in files]


def cases(folder: Path) -> dict[str, dict]:
    return json.loads((folder / 'manifest.json').read_text())['cases']


def test_processes_share_a_cohort(work, new):
    port = free_port()
    notes = together(work, 'shared', [torchrun(rank, port) for rank in (0, 1)], infer('shared'), code=1)
    made = [{Path(c.split()[-1]).name for c in n['changed'] if c.startswith('os.rename') and '.nii' in c} for n in notes]
    assert all(len(m) == 2 or len(m) == 1 for m in made) and sum(map(len, made)) == len(new) and not made[0] & made[1]
    ours, theirs = cases(work / 'shared'), cases(work / 'alone')
    assert sorted(ours) == sorted(theirs) == new
    for case in new:
        assert (work / 'shared' / f'{case}.nii.gz').read_bytes() == (work / 'alone' / f'{case}.nii.gz').read_bytes()
        assert ours[case]['sha256'] == theirs[case]['sha256']
    said = [(work / f'shared.{rank}.txt').read_text() for rank in (0, 1)]
    assert [s.count('neuroseg3d: failed: A_') for s in said] == [1, 0]  # all end with its exit code, one tells
    assert sorted(f.name for f in (work / 'shared').iterdir()) == sorted(['manifest.json', *(f'{c}.nii.gz' for c in new)])


def test_a_cohort_goes_on_after_a_loss(work, new):
    "Parts of a manifest that killed processes left behind count, and the case that is missing is made."
    folder = work / 'again'
    shutil.copytree(work / 'alone', folder)
    whole = cases(folder)
    for name, kept in (('manifest.json', new[:1]), ('.manifest.json.part1', new[1:2])):
        (folder / name).write_text(json.dumps({'cases': {c: whole[c] for c in kept}}))
    (folder / f'{new[2]}.nii.gz').unlink()
    (work / 'new' / f'A_{new[0]}.nii.gz').unlink()  # the damaged one
    done = subprocess.run([BIN / 'torchrun', '--nproc_per_node', '2', '--master_port', free_port(), '-m', 'neuroseg3d.cli', *infer('again')],
                          cwd=work, capture_output=True, text=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f'{c}: done before') for c in new] == [1, 1, 0] and done.stdout.count(f'[1/1] {new[2]}') == 1
    assert sorted(cases(folder)) == new and not list(folder.glob('.manifest*'))
    assert (folder / f'{new[2]}.nii.gz').read_bytes() == (work / 'alone' / f'{new[2]}.nii.gz').read_bytes()


def test_the_command_line_starts_processes_for_all_folds(work):
    "Lightning starts the second process, once for both folds; two processes share what their ensemble is scored on."
    words = [*WORDS, '--trainer.output_dir', 'cv', '--trainer.devices', '2', '--folds', 'all']
    done = subprocess.run([str(w) for w in (BIN / 'neuroseg3d', *words)], cwd=work, capture_output=True, text=True,
                          env={k: v for k, v in os.environ.items() if k not in torchrun(0, '')} | {'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(s) for s in ('fold 0 of 2: cv/fold_0', 'fold 1 of 2: cv/fold_1', 'machine plan')] == [1, 1, 2]
    assert_same(work / 'cv' / 'fold_0', work / 'one')
    port = free_port()
    notes = together(work, 'cv', [torchrun(rank, port) for rank in (0, 1)], ['ensemble', '--run_dir', 'cv', '--device', 'cpu'])
    made = [[c.split('/')[-1] for c in n['changed'] if c.startswith('os.rename') and 'out_of_fold/' in c] for n in notes]
    assert all(made) and len(cases(work / 'cv' / 'out_of_fold')) == 5
    assert not any('scores' in c or 'ensemble.json' in c for c in notes[1]['changed'])
    assert (work / 'cv' / 'ensemble.json').is_file() and 'mean Dice out of fold' in (work / 'cv.0.txt').read_text()


def test_stopping_the_cell_stops_the_training(work, monkeypatch):
    "What is launched from a notebook ends when the cell is interrupted, with all its processes, and leaves its checkpoint."
    from neuroseg3d.config import load_config
    from neuroseg3d.training.devices import launch
    from neuroseg3d.training.task import Config
    monkeypatch.chdir(work)
    given = dict(zip((w.removeprefix('--') for w in WORDS[1::2]), map(str, WORDS[2::2])))
    given |= {'trainer.max_steps': '100000', 'trainer.output_dir': 'stopped', 'trainer.devices': '2'}
    children = []

    def stop(line: str) -> None:
        if line.startswith('step 2/'):
            children.extend(c for c in psutil.Process().children(recursive=True) if 'neuroseg3d.cli' in c.cmdline())
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        launch(load_config(Config, None, given), report=stop)
    assert len(children) == 2 and psutil.wait_procs(children, timeout=10)[1] == []
    assert torch.load(work / 'stopped/checkpoints/last.ckpt', weights_only=True)['global_step'] >= 2
