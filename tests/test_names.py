"Names that nobody expects, of cohorts, cases and results: the same masks, scores and pages, and names that can be read."
from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from balls import SPACING_MM, ball_case, ball_model

from neuroseg3d.cli import main
from neuroseg3d.evaluation.evaluate import find_labels
from neuroseg3d.studies.layouts import find_cases, find_study

#: What a folder is called on the disk.
NAMES = {
    'bytes': os.fsdecode(b'M\xfcller'), 'long': 'n' * 200, 'equals': 'T1w=a=b', 'quotes': '"A" \'B\'', 'spaces': ' two  words ', 'hash': 'A#1?x',
    'percent': '100%20%s{0}', 'dash': '-rf', 'mathematics': r'$\foo$', 'tag': '<b>&amp;', 'newline': 'one\ntwo',
    'emoji': '🧠 脳', 'right to left': 'שלום\u202eאבג', 'stars': '[a]*', 'half an emoji': os.fsdecode(b'x\xf0\x9f'),
}
#: What is called otherwise on pages and in tables, and how.
READ_AS = {NAMES['bytes']: 'Müller', NAMES['half an emoji']: 'xð\x9f'}
AFFINE = np.diag([SPACING_MM] * 3 + [1.0])


def brats_case(folder: Path, seed: int = 0) -> Path:
    "A folder with the four sequences and the label of a case, in files whose names do not tell whose they are."
    image, label = ball_case(seed)
    folder.mkdir(parents=True)
    for n, name in enumerate(('flair', 't1', 't1ce', 't2')):
        nib.save(nib.Nifti1Image(image[..., n], AFFINE), folder / f'{name}.nii.gz')
    nib.save(nib.Nifti1Image(np.array([0, 2, 1, 4], np.uint8)[label], AFFINE), folder / 'seg.nii.gz')
    return folder


def decathlon_case(root: Path, name: str, seed: int = 0) -> None:
    "The image and the label of a case in the layout of the Decathlon."
    image, label = ball_case(seed)
    for kind, values in (('images', image), ('labels', label)):
        (root / f'{kind}Tr').mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(values, AFFINE), root / f'{kind}Tr' / f'{name}.nii.gz')
    (root / 'dataset.json').write_text(json.dumps({
        'modality': {'0': 'FLAIR', '1': 'T1w', '2': 't1gd', '3': 'T2w'},
        'labels': {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'}}))


@pytest.fixture(scope='module')
def ckpt(tmp_path_factory) -> Path:
    "A network with random weights."
    return ball_model(tmp_path_factory.mktemp('model') / 'model.ckpt')


@pytest.fixture(scope='module')
def masks(tmp_path_factory, ckpt) -> list[np.ndarray]:
    "What that network says of each case, where all are called by numbers."
    folder = tmp_path_factory.mktemp('plain')
    for n in range(len(NAMES)):
        brats_case(folder / 'cohort' / f'P{n:02}', n)
    assert run('infer', '--ckpt_path', ckpt, '--input_image', folder / 'cohort', '--output_dir', folder / 'out', '--device', 'cpu') == 0
    return [voxels(folder / 'out' / f'P{n:02}.nii.gz') for n in range(len(NAMES))]


def run(*words) -> int:
    return main([str(w) for w in words])


def voxels(path: Path) -> np.ndarray:
    return np.asanyarray(nib.load(path).dataobj)


def table(path: Path) -> list[dict]:
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def cells(name: str) -> str:
    "A name in a table, where a spreadsheet would take some for a formula."
    return f"'{name}" if name.lstrip().startswith(('=', '+', '-', '@')) else name


@pytest.mark.contract('works', 'names', 'cohorts, cases and folders of results whose names hold odd bytes, quotes, spaces, `=`, `#`, `%`, `$`, `<b>`, a line break, emoji, 200 letters',
                      'they are segmented and scored as any, under names that are text')
@pytest.mark.parametrize('name', NAMES.values(), ids=NAMES)
def test_folders_of_odd_names(name, tmp_path, ckpt, masks, monkeypatch, capfd):
    decathlon_case(tmp_path / name / 'in', name, 0)
    monkeypatch.chdir(tmp_path)
    called, out = READ_AS.get(name, name), tmp_path / name / 'out'
    assert run('infer', '--ckpt_path', ckpt, '--input_image', f'./{name}/in', f'--output_dir={name}/out', '--device', 'cpu') == 0
    assert np.array_equal(voxels(out / f'{called}.nii.gz'), masks[0])
    assert run('evaluate', '--pred', out, '--ref', tmp_path / name / 'in', f'--output_dir={name}/scores') == 0
    assert {r['case'] for r in table(tmp_path / name / 'scores' / 'metrics.csv')} == {cells(called)}
    said = capfd.readouterr()
    assert 'error' not in said.err and 'Traceback' not in said.err


@pytest.mark.contract('works', 'names', 'a file or folder whose name is no text (`M\\xfcller`)', 'the case is called by what can be read (`Müller`); its files keep their names')
def test_a_name_of_bytes_is_read_and_the_file_keeps_it(tmp_path):
    name = NAMES['bytes']
    brats_case(tmp_path / 'brats' / name)
    decathlon_case(tmp_path / 'msd', name)
    for root, image in (('brats', f'{name}/flair.nii.gz'), ('msd', f'imagesTr/{name}.nii.gz')):
        study, = find_cases(tmp_path / root)
        assert study.id == 'Müller' and study.images['FLAIR'] == tmp_path / root / image and study.label is not None and not study.label_problem
        assert list(find_labels(tmp_path / root)) == ['Müller']
    assert find_study(tmp_path / 'brats' / name).id == 'Müller'
    label = tmp_path / 'msd' / 'labelsTr'
    assert list(find_labels(label)) == list(find_labels(label / f'{name}.nii.gz')) == ['Müller']
    (tmp_path / 'msd' / 'imagesTr' / f'{name}.nii.gz').unlink()
    decathlon_case(tmp_path / 'msd', 'other')
    assert find_cases(tmp_path / 'msd').passed_over == {label / f'{name}.nii.gz': 'a label map without scans'}


@pytest.mark.contract('refused', 'names', 'two cases whose names read alike, one of them in odd bytes', 'the error names both files')
def test_two_names_that_read_alike_are_not_one_case(tmp_path):
    for n, name in enumerate((NAMES['bytes'], 'Müller', 'other')):
        brats_case(tmp_path / name, n)
    cohort = find_cases(tmp_path)
    assert [s.id for s in cohort] == ['Müller', 'other'] and 'two cases are called' in cohort.broken['Müller'] and 'other' not in cohort.broken


@pytest.mark.contract('works', 'names', 'label maps in a folder of their own, under names of odd bytes', 'they go to the cases of the same name')
def test_labels_elsewhere_find_their_case(tmp_path):
    name = NAMES['bytes']
    brats_case(tmp_path / 'scans' / name)
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'scans' / name / 'seg.nii.gz').rename(tmp_path / 'labels' / f'{name}_seg.nii.gz')
    study, = find_cases(tmp_path)
    assert study.label == tmp_path / 'labels' / f'{name}_seg.nii.gz'
