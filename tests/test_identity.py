"An exam is known by its voxels and its looks, a patient by the names of each collection; what was trained on is recognised under other bytes."
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from balls import ball_case, ball_cohort, ball_model

from neuroseg3d.inference.calibration import stored_calibration
from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import load_model
from neuroseg3d.cli import main
from neuroseg3d.config import build
from neuroseg3d.core import InputError
from neuroseg3d.training.crossval import new_studies
from neuroseg3d.evaluation.evaluate import evaluate
from neuroseg3d.inference.guard import training_exams, training_of
from neuroseg3d.studies.identity import SAME_EXAM, identify, likeness, one_patient, patient_of
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.training.resume import load_checkpoint
from neuroseg3d.studies.split import Split, load_split, make_split, save_split
from neuroseg3d.training.task import Config, fit

REAL = Path(__file__).parents[2] / 'shared' / 'data'
MIRROR = np.array([[-1, 0, 0, 25], [0, -1, 0, 30], [0, 0, 1, 0], [0, 0, 0, 1]])  # the first two axes of 26 x 31 voxels the other way


def write_four(folder: Path, image: np.ndarray, affine: np.ndarray, suffix: str = '.nii.gz', kind=nib.Nifti1Image) -> dict[str, Path]:
    "Sequences in files of their own."
    folder.mkdir(parents=True)
    paths = {m: folder / f'X_{m}{suffix}' for m in ('flair', 't1', 't1ce', 't2')}
    for path, volume in zip(paths.values(), np.moveaxis(image, -1, 0)):
        nib.save(kind(volume, affine), path)
    return paths


def test_storage_does_not_matter(tmp_path):
    "Type, scaling, compression, NIfTI's version, the order of the axes, one file or four, air around: the same hashes."
    whole = np.round(ball_case(3)[0]).astype(np.int16)
    affine = np.diag([6.0, 6, 6, 1])
    found = [identify(read_case(write_four(tmp_path / 'a', whole, affine))).images]
    found.append(identify(read_case(write_four(tmp_path / 'b', whole.astype(np.float64), affine, '.nii', nib.Nifti2Image))).images)
    found.append(identify(read_case(write_four(tmp_path / 'c', whole[::-1, ::-1], affine @ MIRROR))).images)
    found.append(identify(read_case(write_four(tmp_path / 'd', np.pad(whole, ((3, 0), (0, 2), (1, 1), (0, 0))), affine))).images)
    scaled = nib.Nifti1Image((whole * 2).astype(np.int16), affine)
    scaled.header.set_slope_inter(0.5, 0)
    (tmp_path / 'e' / 'imagesTr').mkdir(parents=True)
    order = {'0': 'FLAIR', '1': 'T1w', '2': 't1gd', '3': 'T2w'}
    (tmp_path / 'e' / 'dataset.json').write_text(json.dumps({'modality': order, 'labels': {'0': 'background'}}))
    nib.save(nib.Nifti1Image(whole.astype(np.float32), affine), tmp_path / 'e' / 'imagesTr' / 'X.nii.gz')
    found.append(identify(read_case(tmp_path / 'e' / 'imagesTr' / 'X.nii.gz')).images)
    assert len(set(found[0].values())) == 4 and all(f == found[0] for f in found[1:])
    other = whole.copy()
    other[13, 15, 11, 2] += 1  # one voxel of T1gd
    changed = identify(read_case(write_four(tmp_path / 'f', other, affine))).images
    assert [m for m in changed if changed[m] != found[0][m]] == ['T1gd']


def test_two_names_of_one_exam_share_a_fold():
    "By voxels under the names of two years; by names alone where the voxels differ; strangers stay apart."
    exams = {}
    for name, seed in {'old_17': 1, 'BraTS2021_00001': 1, 'BraTS-GLI-00001-001': 2, 'UPENN-GBM-00001_11': 3, 'UPENN-GBM-00001_21': 4, 'P9': 5}.items():
        image, label = ball_case(seed)
        exams[name] = identify(make_case(name, image, label))
    assert one_patient(exams) == {'old_17': 'BraTS-GLI-00001', 'BraTS2021_00001': 'BraTS-GLI-00001', 'BraTS-GLI-00001-001': 'BraTS-GLI-00001',
                                  'UPENN-GBM-00001_11': 'UPENN-GBM-00001', 'UPENN-GBM-00001_21': 'UPENN-GBM-00001', 'P9': 'P9'}


def make_case(name, image, label):
    from neuroseg3d.core import Case, Geometry
    return Case(name, np.moveaxis(image, -1, 0).astype(np.float32), Geometry(label.shape, np.diag([6.0, 6, 6, 1])), label)


def test_a_recompressed_training_case_is_refused(tmp_path):
    "The images as they were, stored in another way: files differ, the exam does not. Old split files say what they cannot know."
    cohort = ball_cohort(tmp_path / 'cohort', 3)
    split = make_split(find_cases(cohort).labelled, 3)
    save_split(split, tmp_path / 'split.json')
    fold = split.cases['BALL_Tr02']['fold']
    again = tmp_path / 'again'
    for part in ('imagesTr', 'labelsTr'):
        (again / part).mkdir(parents=True)
        for n in (0, 2):
            image = nib.load(cohort / part / f'BALL_Tr0{n}.nii.gz')
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float64)[::-1, ::-1], image.affine @ MIRROR), again / part / f'N{n}.nii')
    (again / 'dataset.json').write_text((cohort / 'dataset.json').read_text())
    with pytest.raises(InputError, match=r'1 of 2 cases were trained on .*: N0 \(N0: its .* voxels of BALL_Tr00\)'):
        evaluate(again / 'labelsTr', again, split=tmp_path / 'split.json', fold=fold)
    rows, summary = evaluate(again / 'labelsTr', again, split=tmp_path / 'split.json', fold=fold, allow_training=True)
    assert summary['training_cases'] == ['N0'] and summary['compared_by_files_alone'] == []
    old = Split(3, 0, {i: {k: v for k, v in c.items() if k != 'identity'} for i, c in split.cases.items()})
    save_split(old, tmp_path / 'split.json')
    _, summary = evaluate(again / 'labelsTr', again, split=tmp_path / 'split.json', fold=fold)
    assert summary['training_cases'] == [] and summary['compared_by_files_alone'] == ['N0', 'N2']


def small_run(folder: Path, root: Path, **changes):
    values = {'data': {'root': str(root), 'n_folds': 5, 'patch_size': [16, 16, 16], 'batch_size': 1, 'loader': 'none', 'cache': 'ram'},
              'space': {'spacing_mm': [6.0, 6.0, 6.0]}, 'model': {'preset': 'tiny', 'filters': [4, 8], 'strides': [1, 2]},
              'trainer': {'output_dir': str(folder), 'max_steps': 4, 'val_every_steps': 3, 'accelerator': 'cpu', 'precision': '32-true'}}
    return build(Config, {**values, **{k: {**values.get(k, {}), **v} for k, v in changes.items()}})


def test_the_last_step_is_validated_and_folds_are_what_patients_allow(tmp_path, capsys):
    cohort = ball_cohort(tmp_path / 'cohort', 3)
    fit(small_run(tmp_path / 'run', cohort))
    said = capsys.readouterr().out
    assert '3 patients make 3 folds, not the 5 of data.n_folds' in said and 'step 3/4' in said and 'step 4/4' in said
    content = load_checkpoint(tmp_path / 'run' / 'checkpoints' / 'last.ckpt')
    assert content['global_step'] == 4 and content['callbacks']['Checkpoints']['best'][0][1] in (3, 4)
    split = load_split(tmp_path / 'run' / 'split.json')
    assert (split.n_folds, split.asked_folds) == (3, 5)
    about = content['neuroseg3d']
    assert sorted(about['training_exams']) == split.train(0) and training_of([{**about, 'split_sha256': None}]).knows_exams
    with pytest.raises(InputError, match='data.fold: found 4; 3 patients make 3 folds, not the 5 of data.n_folds, expected 0 to 2'):
        fit(small_run(tmp_path / 'other', cohort, data={'fold': 4}), verbose=False)


def test_a_run_that_diverges_stops_and_keeps_no_weights(tmp_path):
    cohort = ball_cohort(tmp_path / 'cohort', 2)
    with pytest.raises(InputError, match=r'step \d: the loss is (nan|inf); training has diverged .* try a lower optim.learning_rate'):
        fit(small_run(tmp_path / 'run', cohort, optim={'learning_rate': 1e30}), verbose=False)
    assert not list((tmp_path / 'run').rglob('*.ckpt'))


def test_real_exams_apart_and_copies_together():
    "Six patients of BraTS 2021 and one of the Decathlon; the limits were measured on more (benchmarks/identity.py)."
    if not REAL.is_dir():
        pytest.skip('no real cases beside the repository')
    cases = [read_case(REAL / 'brats2021' / f'BraTS2021_{n}', with_label=False) for n in ('00006', '01480')]
    exams = [identify(c) for c in cases]
    image, inside = cases[0].image, cases[0].image != 0
    tops = np.percentile(image.reshape(4, -1), 99.9, axis=1).reshape(4, 1, 1, 1)
    rounded = np.where(inside, np.clip(np.round(image / tops * 46) + 1, 1, 47), 0)[:, 20:-20, 10:, :-5]
    copy = identify(replace(cases[0], image=rounded, geometry=replace(cases[0].geometry, shape=rounded.shape[1:]), header=None))
    alike = likeness([exams[0], copy], exams)
    assert alike[1, 0] > 0.95 > SAME_EXAM > alike[0, 1] and alike[0, 1] < 0.65
    assert not set(copy.voxels.values()) & set(exams[0].voxels.values())


@pytest.fixture
def again(tmp_path):
    "A training case and one that was held out, stored in another way; the split, its fold, and a model of it."
    cohort = ball_cohort(tmp_path / 'cohort', 3)
    split = make_split(find_cases(cohort).labelled, 3)
    save_split(split, tmp_path / 'split.json')
    fold = split.cases['BALL_Tr02']['fold']
    for part in ('imagesTr', 'labelsTr'):
        (tmp_path / 'again' / part).mkdir(parents=True)
        for n in (0, 2):
            image = nib.load(cohort / part / f'BALL_Tr0{n}.nii.gz')
            nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float64)[::-1, ::-1], image.affine @ MIRROR), tmp_path / 'again' / part / f'N{n}.nii')
    (tmp_path / 'again' / 'dataset.json').write_text((cohort / 'dataset.json').read_text())
    model = ball_model(tmp_path / 'model.ckpt', split_sha256=split.digest, fold=fold, training_exams=training_exams(split, fold))
    return tmp_path / 'again', split, model


@pytest.mark.contract('refused', 'splits', 'a training case under another name and stored in another way', 'report, postprocess, calibrate and ensemble do not score it; eda calls it the same')
def test_every_command_knows_a_recompressed_training_case(again, tmp_path, capsys):
    folder, split, model = again
    pred = tmp_path / 'pred'
    words = ['--output_dir', str(pred), '--ckpt_path', str(model), '--device', 'cpu', '--save_probabilities']
    assert main(['infer', '--input_image', str(folder), *words]) == 0
    capsys.readouterr()
    known = ['--pred', str(pred), '--data', str(folder), '--split', str(tmp_path / 'split.json')]
    for words in (['report', *known, '--output_dir', str(tmp_path / 'report')], ['postprocess', *known]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert '1 of 2 cases were trained on by the model that predicted them: N0 (N0: its ' in said and 'voxels of BALL_Tr00)' in said, words
        assert main([*words, '--allow_training']) == 0
    page = (tmp_path / 'report' / 'index.html').read_text()
    assert '1 case(s) were trained on (N0): their scores say nothing about new patients' in page
    assert main(['calibrate', '--ckpt_path', str(model), '--data', str(folder), '--device', 'cpu']) == 0
    assert stored_calibration(load_model(model)).n_cases == 1  # N2
    for part in ('imagesTr', 'labelsTr'):
        (folder / part / 'N2.nii').unlink()
    capsys.readouterr()
    assert main(['calibrate', '--ckpt_path', str(model), '--data', str(folder), '--device', 'cpu']) == 2
    assert 'found 1 labelled case(s), all of them training cases of the model' in capsys.readouterr().err
    with pytest.raises(InputError, match='found 1 case.s. with a reference, none that the ensemble was not trained on'):
        new_studies(folder, split)


def test_eda_calls_a_recompressed_case_the_same(again, tmp_path):
    assert main(['eda', '--data', str(tmp_path), '--output_dir', str(tmp_path / 'eda')]) == 0
    twice = json.loads((tmp_path / 'eda' / 'fingerprint.json').read_text())['duplicates']
    assert {(*d['cases'], d['kind']) for d in twice if d['kind'] == 'identical'} == {('BALL_Tr00', 'N0', 'identical'), ('BALL_Tr02', 'N2', 'identical')}


@pytest.mark.contract('works', 'splits', 'visits in a folder a patient, as in LUMIERE: Patient-001/week-000-1', 'each visit is a case, and those of a patient share a fold')
def test_visits_of_a_patient_share_a_fold(tmp_path):
    for n, case in enumerate([f'Patient-{p:03}/{week}' for p in range(1, 5) for week in ('week-000-1', 'week-000-2', 'week-044')]):
        image, label = ball_case(n)
        (tmp_path / case).mkdir(parents=True)
        for channel, name in enumerate(('FLAIR', 'T1', 'CT1', 'T2')):
            nib.save(nib.Nifti1Image(image[..., channel], np.diag([6.0, 6, 6, 1])), tmp_path / case / f'{name}.nii.gz')
        nib.save(nib.Nifti1Image(np.array([0, 2, 1, 4], np.uint8)[label], np.diag([6.0, 6, 6, 1])), tmp_path / case / 'seg.nii.gz')
    studies = find_cases(tmp_path, schema='brats2017').labelled
    assert [s.id for s in studies][:3] == ['Patient-001_week-000-1', 'Patient-001_week-000-2', 'Patient-001_week-044'] and len(studies) == 12
    split = make_split(studies, 4)
    folds = {patient_of(i): {split.cases[j]['fold'] for j in split.cases if patient_of(j) == patient_of(i)} for i in split.cases}
    assert set(folds) == {f'Patient-{p:03}' for p in range(1, 5)} and all(len(f) == 1 for f in folds.values())
    assert {f for own in folds.values() for f in own} == {0, 1, 2, 3}
    assert [s.id for s in find_cases(tmp_path / 'Patient-001', schema='brats2017')] == [s.id for s in studies][:3]
