"Which files are a case: whatever lies in a cohort is a case, or an error of one, or said to be passed over."
from __future__ import annotations

import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from balls import ball_case
from scipy import ndimage

from neuroseg3d.cli import find_inputs, main
from neuroseg3d.core import MODALITIES, InputError
from neuroseg3d.evaluation.evaluate import find_labels
from neuroseg3d.phantom.cohort import make_phantom, write_cohort
from neuroseg3d.studies.cases import check_case, check_cases, check_sequences, read_case
from neuroseg3d.studies.layouts import find_cases, find_study
from neuroseg3d.studies.schemas import from_canonical
from neuroseg3d.training.data import Data, SegmentationData

AFFINE = np.diag([6.0, 6, 6, 1])
BRATS = ('flair', 't1', 't1ce', 't2')
ORDER = ('FLAIR', 'T1w', 'T1gd', 'T2w')


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, AFFINE), path)
    return path


def brats(folder: Path, seed: int = 0, label: str | None = 'seg', names=BRATS) -> Path:
    "A case of four files, named after its folder."
    image, ids = ball_case(seed)
    for name in names:
        save(folder / f'{folder.name}_{name}.nii.gz', image[..., BRATS.index(name)])
    if label:
        save(folder / f'{folder.name}_{label}.nii.gz', np.choose(ids, [0, 2, 1, 4]).astype(np.uint8))
    return folder


def four(path: Path, seed: int = 0, order=(0, 1, 2, 3)) -> Path:
    return save(path, ball_case(seed)[0][..., list(order)])


def state(folder: Path, order=ORDER) -> None:
    (folder / 'dataset.json').write_text(json.dumps({'modality': {str(i): m for i, m in enumerate(order)},
                                                     'labels': {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'}}))


# ---- the order of channels

@pytest.mark.contract('refused', 'images', 'a 4-D file that nothing states the order of channels of', 'the error prints the --channels to type')
def test_an_order_that_nobody_states_is_refused(tmp_path, capsys):
    path = four(tmp_path / 'a' / 'scan.nii.gz')
    with pytest.raises(InputError, match=r'scan.nii.gz: found 4 volumes and nothing .* --channels FLAIR,T1w,T1gd,T2w'):
        find_study(path)
    assert main(['infer', '--input_image', str(path), '--output_dir', str(tmp_path / 'out')]) == 2
    assert '--channels FLAIR,T1w,T1gd,T2w' in capsys.readouterr().err
    cohort = find_cases(tmp_path / 'a')
    assert list(cohort.broken) == ['scan'] and '--channels' in cohort.broken['scan']


@pytest.mark.parametrize('volumes', [1, 3, 7, 30])
def test_other_volumes_are_no_four_sequences(tmp_path, volumes):
    path = save(tmp_path / 'dwi.nii.gz', np.random.default_rng(0).random((5, 6, 7, volumes), np.float32))
    for channels in (None, ORDER):
        with pytest.raises(InputError, match='dwi.nii.gz: found'):
            read_case(path, channels=channels)


@pytest.mark.parametrize('says', ['beside', 'parent', 'argument', 'list'])
def test_a_stated_order_is_followed(tmp_path, says):
    expected, path = ball_case(0)[0], four(tmp_path / 'x' / 'scan.nii.gz', order=(3, 2, 0, 1))
    order = ('T2w', 'T1gd', 'FLAIR', 'T1w')
    if says in ('beside', 'parent'):
        state(path.parent if says == 'beside' else tmp_path, order)
    channels = {'argument': 't2,T1 post contrast,flair,t1', 'list': list(order)}.get(says)
    case = read_case(path, channels=channels)
    assert np.array_equal(case.image, np.moveaxis(expected, -1, 0).astype(np.float32))
    assert np.array_equal(read_case(find_cases(path.parent, channels=channels)[0]).image, case.image)
    assert find_inputs([str(path)], channels=channels)[0].images == dict.fromkeys(order, path)


def test_phantoms_state_their_order_themselves(tmp_path):
    write_cohort(tmp_path / 'c', 1, seed=0, spacing_mm=6.0, workers=1)
    (tmp_path / 'c' / 'dataset.json').unlink()
    (study,) = find_cases(tmp_path / 'c')
    assert tuple(study.images) == ORDER and not study.problem and not find_cases(tmp_path / 'c').broken


@pytest.mark.contract('refused', 'images', 'one file given as two sequences, by its name or as a copy', 'the error names both sequences')
def test_one_scan_under_two_names_is_refused(tmp_path):
    folder = brats(tmp_path / 'P1')
    t1 = folder / 'P1_t1.nii.gz'
    with pytest.raises(InputError, match='P1_t1.nii.gz: given as T1w and as T1gd.*--allow_missing'):
        find_inputs([f'T1w={t1}', f'T1gd={t1}', f'FLAIR={folder / "P1_flair.nii.gz"}', f'T2w={folder / "P1_t2.nii.gz"}'])
    with pytest.raises(InputError, match='T1w is given twice: .*P1_t1.nii.gz and .*P1_t2.nii.gz'):
        find_inputs([f'T1w={t1}', f'T1w={folder / "P1_t2.nii.gz"}'])
    (folder / 'P1_t1ce.nii.gz').write_bytes(t1.read_bytes())
    with pytest.raises(InputError, match='T1gd has the very voxels of T1w'):
        read_case(folder)
    path = four(tmp_path / 'all.nii.gz')
    with pytest.raises(InputError, match='4-D file; give it alone, with --channels'):
        find_study(dict.fromkeys(ORDER, path))


@pytest.mark.contract('warned', 'images', 'sequences that look exchanged by their voxels (FLAIR and T2w, T1w and T1gd)', 'the warning names both')
def test_exchanged_sequences_are_noticed(tmp_path, recwarn):
    write_cohort(tmp_path, 2, seed=0, spacing_mm=3.0, workers=1)
    for study in find_cases(tmp_path):
        path = next(iter(study.images.values()))
        enhances = (read_case(study).label == 3).any()
        assert not [w for w in recwarn if 'exchanged' in str(w.message)]
        state(tmp_path, ORDER)
        for wrong, pair in (('T2w,T1w,T1gd,FLAIR', 'FLAIR and T2w'), *([('FLAIR,T1gd,T1w,T2w', 'T1w and T1gd')] if enhances else [])):
            with pytest.warns(UserWarning, match=f'{pair} look exchanged'):
                read_case(path, channels=wrong)


@pytest.mark.contract('warned', 'images', 'a copy of one scan in another scale, given as a second or as all four sequences', 'the warning names both')
@pytest.mark.parametrize('copies', [('T1gd',), ('FLAIR', 'T1gd', 'T2w')])
def test_one_scan_in_another_scale_is_noticed(copies):
    case = make_phantom(0, 3.0)
    files = {m: Path(f'P1_{m}.nii.gz') for m in ORDER}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check_sequences(case.image, case.geometry, files)
    image, own = case.image.copy(), case.image[1]
    for n, m in enumerate(copies):
        image[ORDER.index(m)] = np.where(own != 0, np.round(own * (0.3 + 0.2 * n)) + 7 + n, 0)
    with pytest.warns(UserWarning) as said:
        check_sequences(image, case.geometry, files)
    text = [str(w.message) for w in said]
    for m in copies:
        assert any(f'{m} follows T1w' in t or f'T1w follows {m}' in t for t in text), text


def test_the_edge_of_the_brain_does_not_make_sequences_look_exchanged(recwarn):
    "T1gd stripped a little closer than T1w: dark along its rim, where T1w is bright; what enhances inside still tells."
    case, files = make_phantom(0, 3.0), {m: Path(f'P1_{m}.nii.gz') for m in ORDER}
    brain = case.brain
    rim = brain & ~ndimage.binary_erosion(brain)
    image = case.image.copy()
    image[1][rim], image[2][rim] = 1.6 * image[1][brain].max(), 0.02 * np.median(image[2][brain])
    check_sequences(image, case.geometry, files)
    assert not [w for w in recwarn if 'T1w and T1gd look exchanged' in str(w.message)]
    with pytest.warns(UserWarning, match='T1w and T1gd look exchanged'):
        check_sequences(image[[0, 2, 1, 3]], case.geometry, files)


SHARED = Path(__file__).resolve().parents[2] / 'shared'


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real cases are not here')
@pytest.mark.parametrize('name', ['cohorts/glioma42/BraTS-SSA-00057-000', 'cohorts/glioma42/BraTS-SSA-00076-000', 'data/brats2021/BraTS2021_01478', 'cohorts/no_tumour/MS-07'])
def test_t1w_and_t1gd_of_real_cases_are_told_apart(name, recwarn):
    case = read_case(SHARED / name, with_label=False)
    assert not [w for w in recwarn if 'exchanged' in str(w.message)]
    with pytest.warns(UserWarning, match='T1w and T1gd look exchanged'):
        check_sequences(case.image[[0, 2, 1, 3]], case.geometry, {m: Path(m) for m in ORDER})


# ---- cohorts

def test_layouts_beside_each_other_are_all_read(tmp_path):
    for n in range(3):
        four(tmp_path / 'Task01' / 'imagesTr' / f'M{n}.nii.gz', n)
        save(tmp_path / 'Task01' / 'labelsTr' / f'M{n}.nii.gz', ball_case(n)[1].astype(np.uint8))
    state(tmp_path / 'Task01')
    for n in range(2):
        brats(tmp_path / f'B{n}', n)
    cohort = find_cases(tmp_path)
    assert [s.id for s in cohort] == ['B0', 'B1', 'M0', 'M1', 'M2'] and len(cohort.labelled) == 5
    assert [s.schema for s in cohort] == ['brats2017'] * 2 + ['msd'] * 3


@pytest.mark.contract('works', 'names', 'hidden folders, trash and what this library wrote, inside a cohort', 'passed over, and said')
@pytest.mark.parametrize('name', ['.Trash', '.Trash-1000', '__MACOSX', '@eaDir', 'lost+found', '.ipynb_checkpoints', '.neuroseg3d', '$RECYCLE.BIN'])
def test_trash_is_passed_over_and_said(tmp_path, name, capsys):
    brats(tmp_path / 'P1')
    brats(tmp_path / name / 'P2')
    lines = []
    cohort = find_cases(tmp_path, say=lines.append)
    assert [s.id for s in cohort] == ['P1'] and list(cohort.passed_over) == [tmp_path / name]
    assert lines[0] == f'found 1 case(s) in {tmp_path}, 1 with a label' and lines[1].endswith(f': {name}')
    main(['eda', '--data', str(tmp_path), '--output_dir', str(tmp_path.parent / f'{tmp_path.name}-eda')])
    assert all(line in capsys.readouterr().out for line in lines[:1])


def test_outputs_inside_a_cohort_are_passed_over(tmp_path):
    brats(tmp_path / 'P1')
    for name in ('out', 'run', 'scores'):
        brats(tmp_path / name / 'P2')
    (tmp_path / 'out' / 'manifest.json').write_text(json.dumps({'cases': {'P1': {'model': {}}}}))
    (tmp_path / 'run' / 'checkpoints').mkdir()
    for path in ('run/config.yaml', 'scores/summary.json', 'scores/metrics.csv'):
        (tmp_path / path).touch()
    cohort = find_cases(tmp_path)
    assert [s.id for s in cohort] == ['P1'] and set(cohort.passed_over) == {tmp_path / n for n in ('out', 'run', 'scores')}


@pytest.mark.contract('refused', 'labels', 'a label map under a name that does not say so, beside a case without label', 'training names the file; other commands say it')
def test_a_label_under_another_name_is_not_dropped(tmp_path):
    brats(tmp_path / 'P1')
    brats(tmp_path / 'P2', 1, label='final')
    assert [s.id for s in find_cases(tmp_path).labelled] == ['P1', 'P2']
    with pytest.raises(InputError, match='P2_final.nii.gz: holds whole numbers as a label map does.*P2_seg.nii.gz'):
        SegmentationData(Data(root=str(tmp_path), n_folds=1)).studies()
    (tmp_path / 'P2' / 'P2_final.nii.gz').rename(tmp_path / 'P2' / 'P2_tumour_mask.nii.gz')
    assert len(SegmentationData(Data(root=str(tmp_path), n_folds=1)).studies()) == 2
    (tmp_path / 'P2' / 'P2_tumour_mask.nii.gz').rename(tmp_path / 'P2' / 'P2_brain_mask.nii.gz')
    assert [s.id for s in find_cases(tmp_path).labelled] == ['P1']


def test_training_names_every_broken_case_at_once(tmp_path):
    for n in range(4):
        brats(tmp_path / f'P{n}', n)
    (tmp_path / 'P1' / 'P1_t2.nii.gz').unlink()
    (tmp_path / 'P3' / 'P3_t1.nii.gz').write_bytes(b'\x1f\x8b damaged')
    with pytest.raises(InputError, match=r'2 case\(s\) cannot be read: .*--data.leave_out_broken true') as caught:
        SegmentationData(Data(root=str(tmp_path), n_folds=1)).studies()
    assert 'missing modality T2w' in str(caught.value) and 'P3_t1.nii.gz' in str(caught.value)
    data = SegmentationData(Data(root=str(tmp_path), n_folds=1, leave_out_broken=True))
    assert [s.id for s in data.studies()] == ['P0', 'P2'] and sorted(data.left_out) == ['P1', 'P3']


def test_one_case_without_a_sequence_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    for n in range(3):
        brats(tmp_path / 'in' / f'P{n}', n)
    (tmp_path / 'in' / 'P1' / 'P1_t2.nii.gz').unlink()
    assert main(['eda', '--data', str(tmp_path / 'in'), '--output_dir', str(tmp_path / 'out')]) == 1
    told = capsys.readouterr()
    assert 'failed: P1: ' in told.err and 'missing modality T2w' in told.err
    assert json.loads((tmp_path / 'out' / 'fingerprint.json').read_text())['n'] == 2
    assert f'found 3 case(s) in {tmp_path / "in"}, 3 with a label, 1 with a problem' in told.out


# ---- names

def test_bids_entities(tmp_path):
    image, ids = ball_case(0)
    for session in ('ses-1', 'ses-2'):
        for c, suffix in enumerate(('FLAIR', 'T1w', 'ce-gadolinium_T1w', 'T2w')):
            save(tmp_path / 'sub-01' / session / 'anat' / f'sub-01_{session}_{suffix}.nii.gz', image[..., c])
    save(tmp_path / 'derivatives' / 'expert' / 'sub-01' / 'ses-2' / 'anat' / 'sub-01_ses-2_label-tumor_mask.nii.gz', ids.astype(np.uint8))
    save(tmp_path / 'derivatives' / 'expert' / 'sub-01' / 'ses-2' / 'anat' / 'sub-01_ses-2_desc-brain_mask.nii.gz', (ids > 0).astype(np.uint8))
    cohort = find_cases(tmp_path)
    assert [(s.id, s.label is not None) for s in cohort] == [('sub-01_ses-1', False), ('sub-01_ses-2', True)]
    assert cohort[0].images['T1gd'].name == 'sub-01_ses-1_ce-gadolinium_T1w.nii.gz' and not cohort.broken
    assert np.array_equal(read_case(cohort[1], schema='msd').label, ids)


def test_a_visit_is_no_sequence(tmp_path):
    image = ball_case(0)[0]
    for visit in ('T1', 'T2', 'T3'):
        for c, name in enumerate(BRATS):
            save(tmp_path / f'P1-{visit}_{name}.nii.gz', image[..., c])
    cohort = find_cases(tmp_path)
    assert [s.id for s in cohort] == ['P1-T1', 'P1-T2', 'P1-T3'] and not cohort.broken
    assert cohort[1].images['FLAIR'].name == 'P1-T2_flair.nii.gz'


def test_nnunet(tmp_path):
    image, ids = ball_case(0)
    for n in (0, 1, 2, 3):
        save(tmp_path / 'imagesTr' / f'C_1_000{n}.nii.gz', image[..., (1, 2, 3, 0)[n]])
    save(tmp_path / 'labelsTr' / 'C_1.nii.gz', ids.astype(np.uint8))
    assert 'channel_names' in find_cases(tmp_path).broken['C_1']
    (tmp_path / 'dataset.json').write_text(json.dumps({'channel_names': {'0': 'T1', '1': 'T1ce', '2': 'T2', '3': 'FLAIR'}, 'file_ending': '.nii.gz',
                                                       'labels': {'background': 0, 'edema': 1, 'non-enhancing': 2, 'enhancing': 3}}))
    (study,) = find_cases(tmp_path)
    assert (study.id, study.layout, study.schema) == ('C_1', 'nnunet', 'msd')
    case = read_case(study)
    assert np.array_equal(case.image, np.moveaxis(image, -1, 0).astype(np.float32)) and np.array_equal(case.label, ids)
    assert find_study(tmp_path / 'imagesTr' / 'C_1_0002.nii.gz').images == study.images
    (tmp_path / 'imagesTr' / 'C_1_0001.nii.gz').unlink()
    assert 'missing modality T1gd' in find_cases(tmp_path).broken['C_1']


@pytest.mark.parametrize('content', ['[]', '3', '{"modality": [1]}', '{"modality": {"x": "FLAIR"}}', '{"modality": {"0": 5}}', '{"labels": []}', 'null', '"a"', '{',
                                     '{"modality": {"0": "FLAIR"}, "modality": {}}', '[' * 10_000, '\udcff'])
def test_an_odd_dataset_json_is_a_clear_error(tmp_path, content):
    four(tmp_path / 'imagesTr' / 'A.nii.gz')
    (tmp_path / 'dataset.json').write_bytes(content.encode('utf-8', 'surrogateescape'))
    with pytest.raises(InputError, match='dataset.json: '):
        find_study(tmp_path / 'imagesTr' / 'A.nii.gz')
    assert 'dataset.json: ' in find_cases(tmp_path).broken['A']


# ---- links, and two files for one thing

def test_links_are_followed_once(tmp_path):
    brats(tmp_path / 'elsewhere' / 'P2', 1)
    brats(tmp_path / 'elsewhere' / 'P3', 2)
    cohort = tmp_path / 'cohort'
    brats(cohort / 'P1')
    (cohort / 'site').symlink_to(tmp_path / 'elsewhere')
    (cohort / 'P1' / 'again').symlink_to(cohort)
    (cohort / 'site2').symlink_to(cohort / 'P1')
    found = find_cases(cohort)
    assert [s.id for s in found] == ['P1', 'P2', 'P3'] and len(found.labelled) == 3 and not found.broken
    assert set(found.passed_over) == {cohort / 'P1' / 'again', cohort / 'site2'}


@pytest.mark.contract('refused', 'names', 'a link to a scan or a label that is not there', 'an error of that case, which names link and target')
def test_a_link_without_a_target_is_an_error_of_its_case(tmp_path):
    for n in range(3):
        brats(tmp_path / f'P{n}', n)
    (tmp_path / 'P1' / 'P1_t1.nii.gz').unlink()
    (tmp_path / 'P1' / 'P1_t1.nii.gz').symlink_to('../.git/annex/objects/abc')
    (tmp_path / 'P2' / 'P2_seg.nii.gz').unlink()
    (tmp_path / 'P2' / 'P2_seg.nii.gz').symlink_to('/mnt/share/P2_seg.nii.gz')
    (tmp_path / 'P4').symlink_to('/mnt/share/P4')
    cohort = find_cases(tmp_path)
    assert [s.id for s in cohort] == ['P0', 'P1', 'P2', 'P4'] and [s.id for s in cohort.labelled] == ['P0', 'P1', 'P2']
    failed = check_cases(cohort)
    assert sorted(failed) == ['P1', 'P2', 'P4'] and 'a link to ../.git/annex/objects/abc, which is not there' in failed['P1']
    assert 'P2_seg.nii.gz: a link to /mnt/share/P2_seg.nii.gz' in failed['P2'] and 'a link to /mnt/share/P4' in failed['P4']
    assert sorted(check_cases(cohort, with_label=False)) == ['P1', 'P4']


@pytest.mark.contract('refused', 'names', 'two files for one case (P1.nii beside P1.nii.gz)', 'the error names both')
def test_two_files_for_one_thing_are_refused(tmp_path):
    image, ids = ball_case(0)
    state(tmp_path)
    for suffix in ('.nii', '.nii.gz'):
        four(tmp_path / 'imagesTr' / f'A{suffix}')
        save(tmp_path / 'pred' / f'A{suffix}', ids.astype(np.uint8))
    with pytest.raises(InputError, match=r'A.nii.gz: a second file for case A; the first is .*A.nii'):
        read_case(find_cases(tmp_path)[0])
    with pytest.raises(InputError, match=r'pred/A.nii.gz: a second label map for case A; the first is .*pred/A.nii'):
        find_labels(tmp_path / 'pred')
    (tmp_path / 'pred' / 'A.nii').rename(tmp_path / 'pred' / 'A_seg.nii.gz')
    with pytest.raises(InputError, match=r'a second label map for case A'):
        find_labels(tmp_path / 'pred')
    folder = brats(tmp_path / 'b' / 'P1')
    save(folder / 'P1_t1.nii', image[..., 1])
    with pytest.raises(InputError, match=r'a second file for T1w; the first is .*P1_t1.nii'):
        find_study(folder)
    (folder / 'P1_t1.nii').unlink()
    save(folder / 'P1_label.nii.gz', ids.astype(np.uint8))
    with pytest.raises(InputError, match='a second label map for case P1'):
        read_case(folder)


def test_a_prediction_named_after_a_visit_is_a_label(tmp_path):
    from neuroseg3d.studies.nifti import write_label
    case = read_case(brats(tmp_path / 'P1-T2'))
    write_label(tmp_path / 'pred' / 'P1-T2.nii.gz', case.label, case)
    assert list(find_labels(tmp_path / 'pred')) == ['P1-T2']


SKEWED = np.array([[-1, 0, 0, 30], [0, -1.5, 0, 40], [0, 0, 2, -10], [0, 0, 0, 1.0]])
FOUR = np.random.default_rng(0).integers(1, 900, (21, 22, 23, 4)).astype(np.int16)
IDS = np.random.default_rng(1).integers(0, 4, (21, 22, 23)).astype(np.uint8)


def stored(path, array, affine=SKEWED):
    "A file with these voxels."
    nib.save(nib.Nifti1Image(array, affine), path)


def refused_as(message, *args, **kwargs):
    "A case that cannot be read, with an error of one line."
    with pytest.raises(InputError, match=message) as caught:
        read_case(*args, **kwargs)
    assert '\n' not in str(caught.value)


def test_everything_that_can_be_wrong_with_a_case(tmp_path):
    four = {m: tmp_path / f'a_{m}.nii.gz' for m in MODALITIES}
    for c, path in enumerate(four.values()):
        stored(path, FOUR[..., c])
    assert read_case(list(four.values())).id == 'a'

    refused_as('no such file', tmp_path / 'absent.nii.gz')
    refused_as('missing modality T2w', list(four.values())[:3])
    stored(tmp_path / 'b_T1w.nii.gz', FOUR[..., 0])
    refused_as('a second file for T1w', [*four.values(), tmp_path / 'b_T1w.nii.gz'])
    refused_as("unknown modality 'DWI'", {**four, 'DWI': four['T1w']})
    stored(tmp_path / 'dwi.nii.gz', FOUR[..., 0])
    refused_as('the name does not say which of', [*four.values(), tmp_path / 'dwi.nii.gz'])

    stored(tmp_path / 'three.nii.gz', FOUR[..., :3])
    refused_as(r'found shape \(21, 22, 23, 3\), expected 4 channels', tmp_path / 'three.nii.gz', channels=MODALITIES)
    stored(tmp_path / 'slice.nii.gz', FOUR[:, :, 0, 0])
    refused_as(r'found a 2-D image of shape \(21, 22\)', {**four, 'FLAIR': tmp_path / 'slice.nii.gz'})

    stored(tmp_path / 'short.nii.gz', FOUR[:-1, ..., 0])
    refused_as(r'found shape \(20, 22, 23\), expected \(21, 22, 23\)', {**four, 'T2w': tmp_path / 'short.nii.gz'})
    moved = SKEWED.copy()
    moved[0, 3] += 2.5
    stored(tmp_path / 'moved.nii.gz', FOUR[..., 0], moved)
    refused_as('up to 2.5 mm away', {**four, 'T2w': tmp_path / 'moved.nii.gz'})

    for name, value in {'nan': np.nan, 'inf': np.inf}.items():
        broken = FOUR[..., 0].astype(np.float32)
        broken[3, 4, 5] = value
        stored(tmp_path / f'{name}.nii.gz', broken)
        refused_as('T1w has 1 NaN or infinite voxels', {**four, 'T1w': tmp_path / f'{name}.nii.gz'})
    for name, value in {'all zero': 0, r'constant \(7\)': 7}.items():
        stored(tmp_path / 'flat.nii.gz', np.full((21, 22, 23), value, np.int16))
        refused_as(f'T1gd is {name}', {**four, 'T1gd': tmp_path / 'flat.nii.gz'})


def test_sequences_that_are_not_there_are_zero(tmp_path):
    files = {m: tmp_path / f'a_{m}.nii.gz' for m in MODALITIES}
    for c, path in enumerate(files.values()):
        stored(path, FOUR[..., c])
    whole = read_case(files)
    for given in (['T1gd'], ['FLAIR', 'T2w']):
        part = read_case([files[m] for m in given], allow_missing=True)
        assert sorted(part.sources) == sorted(given) and part.id == 'a'
        for channel, modality in enumerate(MODALITIES):
            expected = whole.image[channel] if modality in given else 0
            assert np.array_equal(part.image[channel], np.broadcast_to(expected, part.geometry.shape))
    assert np.array_equal(read_case(files['T2w'], allow_missing=True).image[3], whole.image[3])
    refused_as('missing modality FLAIR, T1w, T1gd, T2w: found no file', {}, allow_missing=True)
    (tmp_path / 'cohort' / 'P1').mkdir(parents=True)
    refused_as('cohort: found 0 NIfTI files.* and 1 folders, expected the folder of one case .find_cases', tmp_path / 'cohort')


def test_a_label_map_is_checked_with_its_case(tmp_path):
    stored(tmp_path / 'image.nii.gz', FOUR)
    stored(tmp_path / 'l123.nii.gz', IDS)
    stored(tmp_path / 'l124.nii.gz', from_canonical(IDS, 'brats2017'))

    refused_as('ambiguous label schema: ids 0, 1, 2, 3 fit msd, brats2023, brats-peds and brats2013; name the schema',
           tmp_path / 'image.nii.gz', label=tmp_path / 'l123.nii.gz', channels=MODALITIES)
    found = read_case(tmp_path / 'image.nii.gz', tmp_path / 'l123.nii.gz', 'msd', channels=MODALITIES)
    study = find_study(tmp_path / 'image.nii.gz', label=tmp_path / 'l124.nii.gz', channels=MODALITIES)
    with pytest.raises(InputError, match='l124.nii.gz: ambiguous label schema'):
        check_case(study)
    assert check_case(study, 'brats2017').same_grid(found.geometry) and check_case(study, with_label=False).same_grid(found.geometry)
    stored(tmp_path / 'l_short.nii.gz', IDS[:-1])
    with pytest.raises(InputError, match=r'l_short.nii.gz: found shape \(20, 22, 23\), expected \(21, 22, 23\) as in image'):
        check_case(find_study(tmp_path / 'image.nii.gz', label=tmp_path / 'l_short.nii.gz', channels=MODALITIES), 'msd')


def write(folder, *names, shape=(3, 4, 5), value=1):
    "Files of one value."
    for name in names:
        path = Path(folder) / f'{name}.nii.gz'
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.full(shape, value, np.uint8), np.eye(4)), path)


def test_a_part_of_the_files_implies_the_schema_of_all(tmp_path):
    for given, schema in ((('flair', 't1ce'), 'brats2017'), (('t2f', 't1n', 't2w'), 'brats2023'), (('flair', 't1', 't2'), None)):
        files = [tmp_path / f'b_{name}.nii.gz' for name in given]  # the label ids of a part of the files are those of all of them
        for path in files:
            nib.save(nib.Nifti1Image(np.ones((3, 4, 5), np.int16), np.eye(4)), path)
        assert find_study(files, allow_missing=True).schema == schema


def test_a_cohort_of_every_layout(tmp_path):
    root, elsewhere = tmp_path / 'cohort', tmp_path / 'elsewhere'
    root.mkdir()
    write(root, 'msd/imagesTr/B_001', 'msd/imagesTr/B_002', shape=(3, 4, 5, 4))
    write(root, 'msd/labelsTr/B_001', 'nnu/labelsTr/N_1', *(f'nnu/imagesTr/N_1_000{c}' for c in range(4)))
    (root / 'msd/dataset.json').write_text('{"modality": {"0": "T2w", "1": "t1gd", "2": "T1w", "3": "FLAIR"}, "labels": {"0": "background"}}')
    (root / 'nnu/dataset.json').write_text('{"channel_names": {"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}, "file_ending": ".nii.gz"}')
    write(root, *(f'bids/sub-01/anat/sub-01_{s}' for s in ('T1w', 'ce-gadolinium_T1w', 'T2w', 'FLAIR')), 'bids/derivatives/x/sub-01/anat/sub-01_desc-tumor_mask')
    write(root, *(f'visits/P1-{v}_{s}' for v in ('T1', 'T2') for s in ('flair', 't1', 't1gd', 't2')), '.Trash-0/P9/P9_flair', 'few/P7_flair', 'few/P7_t1')
    write(elsewhere, *(f'L1/{s}' for s in ('ax_t2_flair', 'ax_t1', 'ax_t1_gad', 'ax_t2')))
    (root / 'linked').symlink_to(elsewhere)
    (root / 'circle').symlink_to(root)
    cohort = find_cases(root)
    assert len(cohort.lines()) > 1
    assert [(s.id, s.layout, s.label is not None) for s in cohort] == [
        ('B_001', 'msd', True), ('B_002', 'msd', False), ('L1', 'files', False), ('N_1', 'nnunet', True), ('P1-T1', 'files', False), ('P1-T2', 'files', False),
        ('few', 'files', False), ('sub-01', 'bids', True)]
    assert {s.id: [p.name for p in s.images.values()] for s in cohort if s.id in ('N_1', 'L1')} == {
        'N_1': ['N_1_0003.nii.gz', 'N_1_0000.nii.gz', 'N_1_0001.nii.gz', 'N_1_0002.nii.gz'],
        'L1': ['ax_t2_flair.nii.gz', 'ax_t1.nii.gz', 'ax_t1_gad.nii.gz', 'ax_t2.nii.gz']}
    assert list(cohort[0].images) == ['T2w', 'T1gd', 'T1w', 'FLAIR'] and list(cohort.broken) == ['few'] and 'missing modality T1gd, T2w' in cohort.broken['few']
