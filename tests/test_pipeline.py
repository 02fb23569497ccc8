"The command line from an empty folder to scores, as a user runs it: each command once in a process of its own."
from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from neuroseg3d.cli import main

SMALL = ['--space.spacing_mm', '4', '--model.preset', 'tiny', '--data.patch_size', '32', '--data.batch_size', '2',
         '--data.n_folds', '2', '--trainer.max_steps', '6', '--trainer.val_every_steps', '3',
         '--trainer.checkpoint_every_steps', '1', '--trainer.accelerator', 'cpu', '--model.dropout', '0.1']


def run(*words: object, cwd: Path, code: int = 0, process: bool = False) -> subprocess.CompletedProcess:
    "The command line, within this process or as one of its own; its exit code must be `code`."
    arguments = [str(w) for w in words]
    if process:
        done = subprocess.run([Path(sys.executable).parent / 'neuroseg3d', *arguments], cwd=cwd, capture_output=True, text=True)
    else:
        out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
        os.chdir(cwd)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                found = main(arguments)
        except Exception:  # as Python would report it
            found = print(traceback.format_exc(), file=err) or 1
        finally:
            os.chdir(before)
        done = subprocess.CompletedProcess(arguments, found, out.getvalue(), err.getvalue())
    assert done.returncode == code, f'{words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}'
    return done


@pytest.fixture(scope='module')
def work(tmp_path_factory) -> Path:
    "A folder with a cohort and a trained model, both made by the command line."
    folder = tmp_path_factory.mktemp('work')
    run('phantom', '--output_dir', 'cohort', '--n', 4, '--n_test', 2, '--spacing_mm', 4, '--workers', 1, cwd=folder, process=True)
    run('train', '--data.root', 'cohort', '--trainer.output_dir', 'run', *SMALL, cwd=folder, process=True)
    return folder


def test_training_leaves_a_complete_run(work):
    names = {p.name for p in (work / 'run' / 'checkpoints').iterdir()}
    assert {'last.ckpt', 'previous.ckpt', 'best.ckpt'} <= names
    assert (work / 'run' / 'config.yaml').is_file() and (work / 'run' / 'logs' / 'metrics.csv').is_file()
    rows = list(csv.DictReader(open(work / 'run' / 'logs' / 'metrics.csv')))
    assert sum(bool(r.get('val/dice_ET')) for r in rows) == 2
    content = torch.load(work / 'run' / 'checkpoints' / 'last.ckpt', weights_only=True)
    assert content['global_step'] == 6 and content['neuroseg3d']['schema'] == 'msd'


def test_runs_are_never_overwritten_or_silently_restarted(work):
    words = ['train', '--data.root', 'cohort', '--trainer.output_dir', 'run', *SMALL]
    refused = run(*words, cwd=work, code=2).stderr
    assert 'already holds a run' in refused and '--resume auto' in refused and refused.count('\n') == 1
    assert 'no such checkpoint' in run(*words, '--ckpt_path', 'absent.ckpt', cwd=work, code=2).stderr
    assert 'the run is finished (6 of 6 steps)' in run(*words, '--resume', 'auto', cwd=work).stdout
    other = run(*words, '--ckpt_path', 'run/checkpoints/last.ckpt', '--model.filters', '[8, 16, 24, 32]', cwd=work, code=2)
    assert 'model.filters: [16, 32, 64, 128] in the checkpoint, [8, 16, 24, 32] now' in other.stderr


@pytest.mark.parametrize('how', ['4-D file', 'cohort', 'four files', 'named files', 'case folder'])
def test_infer_takes_every_kind_of_input(work, how):
    studies = sorted((work / 'cohort' / 'imagesTs').glob('*.nii.gz'))
    source, out = nib.load(studies[0]), work / f'out {how}'
    four = work / 'P1'
    four.mkdir(exist_ok=True)
    for channel, name in enumerate(('flair', 't1', 't1ce', 't2')):
        nib.save(nib.Nifti1Image(np.asarray(source.dataobj)[..., channel], source.affine), four / f'P1_{name}.nii.gz')
    files = [four / f'P1_{n}.nii.gz' for n in ('t2', 'flair', 't1ce', 't1')]
    words = {'4-D file': [studies[0]], 'cohort': [work / 'cohort' / 'imagesTs'], 'four files': files,
             'named files': [f'{m}={f}' for m, f in zip(('T2w', 'FLAIR', 'T1gd', 'T1w'), files)],
             'case folder': [four]}[how]
    run('infer', '--ckpt_path', 'run/checkpoints/best.ckpt', '--input_image', *words, '--output_dir', out, cwd=work,
        process=how == 'four files')
    made = sorted(out.glob('*.nii.gz'))
    assert len(made) == (2 if how == 'cohort' else 1)
    label = nib.load(made[0])
    assert label.shape == source.shape[:3] and np.array_equal(label.affine, source.affine)
    assert label.get_data_dtype() == np.uint8
    allowed = {0, 1, 2, 3} if how in ('4-D file', 'cohort') else {0, 1, 2, 4}
    assert set(np.unique(np.asarray(label.dataobj))) <= allowed


def test_evaluate_and_report(work):
    run('infer', '--ckpt_path', 'run/checkpoints/best.ckpt', '--input_image', 'cohort/imagesTs', '--output_dir', 'predictions',
        cwd=work)
    said = run('evaluate', '--pred', 'predictions', '--ref', 'cohort', '--output_dir', 'scores', cwd=work, process=True).stdout
    rows = list(csv.DictReader(open(work / 'scores' / 'metrics.csv')))
    assert {r['name'] for r in rows} >= {'WT', 'TC', 'ET'} and len({r['case'] for r in rows}) == 2
    assert json.loads((work / 'scores' / 'summary.json').read_text())
    for region in ('WT', 'TC', 'ET'):
        there, missed, invented = (sum(int(r[k]) for r in rows if r['name'] == region) for k in ('lesions', 'lesions_missed', 'lesions_invented'))
        assert f'{region} {there}, {missed} missed, {invented} invented' in said
    run('report', '--pred', 'predictions', '--data', 'cohort', '--output_dir', 'report', cwd=work, process=True)
    page = (work / 'report' / 'index.html').read_text()
    assert 'not a medical device' in page and 'http://' not in page.replace('http://www.w3.org', '')


def test_exported_model_gives_the_same_labels(work):
    study = sorted((work / 'cohort' / 'imagesTs').glob('*.nii.gz'))[0]
    run('export', '--ckpt_path', 'run/checkpoints/best.ckpt', '--output_path', 'model.safetensors', cwd=work, process=True)
    assert (work / 'model.json').is_file()
    for name, model in (('of checkpoint', 'run/checkpoints/best.ckpt'), ('of export', 'model.safetensors')):
        run('infer', '--ckpt_path', model, '--input_image', study, '--output_dir', name, cwd=work)
    maps = [np.asarray(nib.load(work / n / study.name).dataobj) for n in ('of checkpoint', 'of export')]
    assert np.array_equal(*maps) and maps[0].any()
    assert 'ends in .safetensors' in run('export', '--ckpt_path', 'run', '--output_path', 'model.pt', cwd=work, code=2).stderr


def test_mistakes_end_in_one_line(work):
    for words, message in {
        ('infer', '--ckpt_path', 'absent.ckpt', '--input_image', 'cohort/imagesTs', '--output_dir', 'o'): 'no such checkpoint',
        ('infer', '--ckpt_path', 'run/config.yaml', '--input_image', 'cohort/imagesTs', '--output_dir', 'o'): 'cannot be loaded',
        ('infer', '--ckpt_path', 'run/checkpoints/best.ckpt', '--input_image', 'cohort/dataset.json', '--output_dir', 'o'):
            'not .nii or .nii.gz',
        ('train', '--data.root', 'absent', *SMALL): 'absent',
        ('evaluate', '--pred', 'cohort/imagesTs', '--ref', 'cohort', '--output_dir', 'o'): 'found shape',
    }.items():
        done = run(*words, cwd=work, code=2, process='absent' in words)  # a process of its own: no warning slips out either
        assert message in done.stderr and 'Traceback' not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert 'Traceback' in run('infer', '--ckpt_path', 'absent.ckpt', '--input_image', 'cohort/imagesTs', '--output_dir', 'o',
                              '--debug', cwd=work, code=1).stderr
    assert not (work / 'o').exists()


def test_a_misspelt_option_is_named_before_what_it_leaves_missing(capsys):
    assert main(['infer', '--input_image', 'case', '--output_dirr', 'out']) == 2
    assert capsys.readouterr().err == "neuroseg3d: error: unknown argument '--output_dirr'; did you mean --output_dir?\n"
    assert main(['infer', '--input_image', 'case']) == 2
    assert 'required: --output_dir' in capsys.readouterr().err


@pytest.mark.parametrize('words', [['infer', '--input_image', 'absent', '--output_dir'], ['evaluate', '--pred', 'a', '--ref', 'b', '--output_dir'],
                                   ['train', '--trainer.output_dir']], ids=lambda w: w[0])
def test_an_output_folder_that_cannot_be_is_said_first(words, tmp_path, capsys):
    (tmp_path / 'taken').write_text('')
    for place, reason in ((tmp_path / 'taken', 'is a file, expected a folder'), ('/proc/absent', 'nothing can be written there')):
        assert main([*words, str(place)]) == 2
        said = capsys.readouterr().err
        assert reason in said and str(place) in said and said.count('\n') == 1, said


def test_who_has_read_enough_is_no_error(tmp_path):
    "As in `neuroseg3d model starter | head`: the pipe is closed before all is said."
    command = [Path(sys.executable).parent / 'neuroseg3d', 'model', 'starter']
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == ''
