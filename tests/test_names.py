"Names that nobody expects, of cohorts, cases and results: the same masks, scores and pages, and names that can be read."
from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from balls import SPACING_MM, ball_case, ball_model

from neuroseg3d.cli import main
from neuroseg3d.core import InputError
from neuroseg3d.evaluation.evaluate import find_labels
from neuroseg3d.studies.layouts import find_cases, find_study
from neuroseg3d.studies.names import channel_order, read_name

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


#: What a case is called beside those: each stands for a way in which a name has been taken for something else.
MORE = {'formula': '=1+1', 'home': '~', 'variable': '$HOME', 'escape': 'a\x1b[31mb', 'label': 'x_seg', 'file': 'case.nii.gz', 'drive': 'C:b'}


@pytest.fixture(scope='module')
def crowd(tmp_path_factory, ckpt) -> Path:
    "A cohort that has a case of every name, and what the network says of it."
    folder = tmp_path_factory.mktemp('crowd')
    for n, name in enumerate((NAMES | MORE).values()):
        brats_case(folder / 'cohort' / name, n)
    assert run('infer', '--ckpt_path', ckpt, '--input_image', folder / 'cohort', '--output_dir', folder / 'pred', '--device', 'cpu') == 0
    return folder


def called() -> set[str]:
    "What the cases of the crowd are called."
    return {READ_AS.get(name, name) for name in (NAMES | MORE).values()}


@pytest.mark.contract('works', 'names', 'a cohort whose cases are called `=1+1`, `~`, `$HOME`, `x_seg`, `case.nii.gz`, `C:b`, by odd bytes, quotes, a line break, an escape code',
                      'eda, infer, evaluate, report and explain take each for what it is')
@pytest.mark.parametrize('command', ['eda', 'evaluate', 'explain', 'report', 'convert'])
def test_a_crowd_of_odd_names(command, crowd, ckpt, tmp_path, capfd):
    few = tmp_path / 'few'
    few.mkdir()
    shutil.copy(crowd / 'pred' / f'{NAMES["tag"]}.nii.gz', few)
    shutil.copy(crowd / 'pred' / 'manifest.json', few)
    one = [m + '=' + str(crowd / 'cohort' / MORE['formula'] / f) for m, f in zip(('FLAIR', 'T1w', 'T1gd', 'T2w'), ('flair.nii.gz', 't1.nii.gz', 't1ce.nii.gz', 't2.nii.gz'))]
    words = {'eda': ['--data', crowd / 'cohort', '--schema', 'brats2017'],
             'evaluate': ['--pred', crowd / 'pred', '--ref', crowd / 'cohort', '--ref_schema', 'brats2017'],
             'explain': ['--ckpt_path', ckpt, '--input_image', *one, '--method', 'grad_cam', '--device', 'cpu'],
             'report': ['--pred', few, '--data', crowd / 'cohort', '--ref_schema', 'brats2017'],
             'convert': ['--input', crowd / 'cohort', '--to', 'nnunet', '--schema', 'brats2017']}[command]
    code, said = run(command, *words, '--output_dir', tmp_path / 'out'), capfd.readouterr()
    assert 'internal error' not in said.err and 'Traceback' not in said.err
    if command == 'convert':  # its layout has letters and digits only: of two that would be one, the second is refused
        lines = said.err.splitlines()
        assert code == 1 and all(re.fullmatch('neuroseg3d: failed: .*: its name here would be .*; rename one of them', x) for x in lines), said.err
        assert len(list((tmp_path / 'out' / 'labelsTr').iterdir())) + len(lines) == len(called())
        return
    assert code == 0 and not said.err, said.err
    if command == 'evaluate':
        assert {r['case'] for r in table(tmp_path / 'out' / 'metrics.csv')} == {cells(c) for c in called()}
    if command == 'eda':
        assert {c['case'] for c in json.loads((tmp_path / 'out' / 'fingerprint.json').read_text())['cases']} == called()
    if command == 'report':
        page = (tmp_path / 'out' / 'index.html').read_text()
        assert '&lt;b&gt;&amp;amp;' in page and '<b>&amp;' not in page and len(list((tmp_path / 'out' / 'cases').glob('*.html'))) == 1


@pytest.mark.contract('refused', 'names', 'a case of 255 bytes, whose mask or map would need a longer name', 'the error says so before the work')
@pytest.mark.parametrize('name', ['x' * 255, 'ä' * 127], ids=['letters', 'umlauts'])
def test_a_name_that_leaves_no_room_for_an_ending(name, tmp_path, ckpt, capfd):
    brats_case(tmp_path / 'cohort' / name)
    for words in (['infer', '--device', 'cpu'], ['explain', '--method', 'grad_cam', '--device', 'cpu']):
        assert run(*words, '--ckpt_path', ckpt, '--input_image', tmp_path / 'cohort', '--output_dir', tmp_path / 'out') == 2
        said = capfd.readouterr().err
        assert 'the name is too long for a file' in said and said.count('\n') == 1
    assert run('eda', '--data', tmp_path / 'cohort', '--output_dir', tmp_path / 'eda', '--schema', 'brats2017') == 0


@pytest.mark.contract('works', 'names', 'an error about a file whose name holds a line break or an escape code', 'it is one line all the same')
def test_an_error_is_one_line_whatever_the_name(tmp_path, capfd):
    assert run('eda', '--data', tmp_path / 'a\nb\x1b[31m\u202ec', '--output_dir', tmp_path / 'out') == 2
    said = capfd.readouterr().err
    assert said.count('\n') == 1 and '\x1b' not in said and '\u202e' not in said


def tied(folder: Path) -> dict[str, Path]:
    "Links of every kind to a cohort."
    decathlon_case(folder / 'real', 'A')
    (folder / 'link').symlink_to(folder / 'real')
    (folder / 'files' / 'imagesTr').mkdir(parents=True)
    (folder / 'files' / 'imagesTr' / 'A.nii.gz').symlink_to(folder / 'real' / 'imagesTr' / 'A.nii.gz')
    (folder / 'files' / 'labelsTr').symlink_to(folder / 'real' / 'labelsTr')
    (folder / 'files' / 'dataset.json').symlink_to(folder / 'real' / 'dataset.json')
    (folder / 'dangling').symlink_to(folder / 'absent')
    (folder / 'circle').symlink_to(folder / 'other')
    (folder / 'other').symlink_to(folder / 'circle')
    shutil.copytree(folder / 'real', folder / 'loop')
    (folder / 'loop' / 'imagesTr' / 'up').symlink_to(folder / 'loop')
    shutil.copytree(folder / 'real', folder / 'holes')
    (folder / 'holes' / 'imagesTr' / 'B.nii.gz').symlink_to(folder / 'absent.nii.gz')
    (folder / 'holes' / 'imagesTr' / 'C.nii.gz').symlink_to('C.nii.gz')
    return {p.name: p for p in folder.iterdir()}


def words_for(data: Path, out: Path, ckpt: Path) -> list[list]:
    "Every command that reads a cohort."
    return [['eda', '--data', data, '--output_dir', out / 'eda'], ['convert', '--input', data, '--output_dir', out / 'converted', '--to', 'bids'],
            ['infer', '--ckpt_path', ckpt, '--input_image', data, '--output_dir', out / 'pred', '--device', 'cpu'],
            ['evaluate', '--pred', out / 'pred', '--ref', data, '--output_dir', out / 'scores'],
            ['explain', '--ckpt_path', ckpt, '--input_image', data, '--output_dir', out / 'maps', '--method', 'grad_cam', '--device', 'cpu']]


@pytest.mark.contract('works', 'names', 'a cohort that is a link, consists of links, or has a link to itself within', 'it is read once')
@pytest.mark.parametrize('kind', ['link', 'files', 'loop'])
def test_a_cohort_of_links(kind, tmp_path, ckpt, masks, capfd):
    data = tied(tmp_path / 'disk')[kind]
    for words in words_for(data, tmp_path, ckpt):
        assert run(*words) == 0, capfd.readouterr().err
    assert np.array_equal(voxels(tmp_path / 'pred' / 'A.nii.gz'), masks[0])


@pytest.mark.contract('refused', 'names', 'links to nothing and circles of links: as a cohort, as a scan within one, as a folder for results', 'the error names the link')
@pytest.mark.parametrize('kind', ['dangling', 'circle', 'holes'])
def test_links_that_lead_nowhere(kind, tmp_path, ckpt, capfd):
    disk = tied(tmp_path / 'disk')
    if kind != 'holes':  # for which infer makes it
        shutil.copytree(disk['real'] / 'labelsTr', tmp_path / 'pred')
    for words in words_for(disk[kind], tmp_path, ckpt):
        code, said = run(*words), capfd.readouterr()
        assert 'internal error' not in said.err and 'Traceback' not in said.err, said.err
        assert code in ((0, 1) if kind == 'holes' else (2,)), (words, said.err)
    for words in words_for(disk['real'], disk[kind], ckpt) if kind != 'holes' else ():
        code, said = run(*words), capfd.readouterr()
        assert code == 2 and 'internal error' not in said.err, (words, said.err)


def test_words_tell_case_and_role():
    for name, role in {
        'BraTS2021_00006_flair': 'FLAIR', 'BraTS2021_00006_t1ce': 'T1gd', 'BraTS2021_00006_seg': 'label', 'BraTS-GLI-00000-000-t2f': 'FLAIR',
        'BraTS-GLI-00000-000-t1n': 'T1w', 'BRATS_001_T1C': 'T1gd', 'TCGA-DU-7294_fla_bet': 'FLAIR', 'CT1_reorient_bet_reg': 'T1gd',
        'T1_reorient_bet_mask': None, 'ax_t2_flair': 'FLAIR', 'T2-FLAIR': 'FLAIR', 'consensus_seg': 'label', 'dwi': None, 't1_to_t2': None,
        'P1_T1_Gad': 'T1gd', 'P1 T1+C': 'T1gd', 'P1_T1_post_contrast': 'T1gd', 'P1_post_contrast_T1': 'T1gd', 'P1_T1_pre_contrast': 'T1w', 'P1_pre_contrast_T1': 'T1w',
        'T1_native': 'T1w', 'P1-T2_t1': 'T1w', 'P1-T1_t2': 'T2w', 'P1-T2_flair': 'FLAIR', 't1_t2': None, 'flair_in_t1': None,
        'UCSF-PDGM-0004_brain_segmentation': None, 'UCSF-PDGM-0004_tumor_segmentation': 'label', 'brain_tumor_001_flair': 'FLAIR',
        'tumor_12': None, 'brain_tumour_12': None, 'P1_tumour_mask': 'label', 'P1_brain_mask': None, 'UPENN-GBM-00001_11_segm': 'label', 'tcga_06_1802_hd_glio_predict': None,
    }.items():
        assert read_name(name).role == role, name
    for name, case in {'BraTS2021_00006_flair': 'BraTS2021_00006', 'P1-T2_t1': 'P1-T2', 'T1_Gad': '', 'P1_t1ce_seg': 'P1', 'P1_post_contrast_T1': 'P1',
                       'P1_tumour_seg': 'P1', 'T2-FLAIR': ''}.items():
        assert read_name(name).case == case, name


def test_entities_of_bids_tell_case_and_role():
    for name, case, role in (
        ('sub-01_T1w', 'sub-01', 'T1w'), ('sub-01_ce-gadolinium_T1w', 'sub-01', 'T1gd'), ('sub-01_ses-2_acq-mprage_run-1_FLAIR', 'sub-01_ses-2', 'FLAIR'),
        ('sub-01_ses-T1_T2w', 'sub-01_ses-T1', 'T2w'), ('sub-01_space-T1w_desc-preproc_T2w', 'sub-01', 'T2w'), ('sub-01_acq-postgd_T1w', 'sub-01', 'T1gd'),
        ('sub-01_ce-none_T1w', 'sub-01', 'T1w'), ('sub-01_space-T1w_label-tumor_mask', 'sub-01', 'label'), ('sub-01_desc-lesion_mask', 'sub-01', 'label'),
        ('sub-01_desc-brain_mask', 'sub-01', None), ('sub-01_dseg', 'sub-01', 'label'), ('sub-01_desc-aseg_dseg', 'sub-01', None), ('sub-01_dwi', 'sub-01', None),
    ):
        assert (read_name(name).case, read_name(name).role) == (case, role), name


def test_an_order_of_channels_names_each_once():
    assert channel_order('T2,T1,flair,t1 post contrast') == ('T2w', 'T1w', 'FLAIR', 'T1gd') and channel_order(None) is None
    for wrong in ('FLAIR,T1w,T1w,T2w', 'FLAIR,DWI', ''):
        with pytest.raises(InputError, match='channels: found .*expected the sequences in the order of the channels'):
            channel_order(wrong)
