"What the numbers of a label map mean: by collection, by a user's own schema, and when nobody can know."
from __future__ import annotations

import argparse
import json
import re

import nibabel as nib
import numpy as np
import pytest

from neuroseg3d.cli import main, make_parser
from neuroseg3d.core import InputError, Label
from neuroseg3d.studies.cases import check_case, read_case
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.nifti import read_label, store_facts, stored_facts, write_label
from neuroseg3d.studies.schemas import (
    COLLECTIONS,
    NAME_IT,
    SCHEMAS,
    find_collection,
    from_canonical,
    get_schema,
    implied_schema,
    infer_schema,
    schema_of_labels,
    settle_schema,
    to_canonical,
)

NEW, OLD = ('t2f', 't1n', 't1c', 't2w'), ('flair', 't1', 't1ce', 't2')
AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
VOXELS = {1: 30, 2: 20, 3: 10, 4: 5}  # of each id; a voxel has 0.008 mL


def write_study(folder, case, ids=VOXELS, names=NEW, joint='-', label='seg'):
    "A folder with four sequences and a label map that holds so many voxels of each id."
    home = folder / case
    home.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in names:
        nib.save(nib.Nifti1Image(rng.integers(1, 900, (9, 8, 7)).astype(np.int16), AFFINE), home / f'{case}{joint}{name}.nii.gz')
    values = np.zeros(9 * 8 * 7, np.uint8)
    values[:sum(ids.values())] = np.repeat(list(ids), list(ids.values()))
    nib.save(nib.Nifti1Image(values.reshape(9, 8, 7), AFFINE), home / f'{case}{joint}{label}.nii.gz')
    return home


def read(folder, schema=None):
    "The one case of a cohort, in canonical ids."
    study, = find_cases(folder, schema=schema)
    check_case(study)
    return read_case(study)


def voxels(case):
    return {label.name: int((case.label == label).sum()) for label in list(Label)[1:]}


PEDS = {'ENHANCING': 30, 'NON_ENHANCING': 30, 'EDEMA': 5}


@pytest.mark.contract('converted', 'labels', 'BraTS-PEDs, where 1 is enhancing, 3 a cyst and 4 edema', 'the ids of its release, a cyst as non-enhancing')
@pytest.mark.parametrize('case', ['BraTS-PED-00019-000', 'brats_ped_00019_000', 'BraTS-PEDs-00019-000'])
def test_children_have_their_enhancing_tumour_and_their_edema(tmp_path, case):
    write_study(tmp_path, case)
    found = read(tmp_path)
    assert voxels(found) == PEDS and found.schema == 'brats-peds'
    assert found.volume_ml('ET') == pytest.approx(30 * 0.008) and found.volume_ml('WT') == pytest.approx(65 * 0.008)
    mask = write_label(tmp_path / 'out' / 'mask.nii.gz', found.label, found)  # a cyst is written as the non-enhancing tumour that it is read as
    assert stored_facts(nib.load(mask).header)['schema'] == 'brats-peds'
    assert dict(zip(*np.unique(nib.load(mask).dataobj, return_counts=True))) == {0: 439, 1: 30, 2: 30, 4: 5}
    assert np.array_equal(read_label(mask)[0], found.label)


def test_children_in_a_folder_of_their_collection_and_of_the_year_with_other_ids(tmp_path):
    write_study(tmp_path / 'BraTS-PEDs-v1' / 'Training', 'C1')
    assert voxels(read(tmp_path / 'BraTS-PEDs-v1')) == PEDS
    old = tmp_path / 'ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData'
    write_study(old, 'BraTS-PED-00002-000', {1: 30, 2: 20, 3: 10})
    assert voxels(read(old)) == {'NON_ENHANCING': 30, 'EDEMA': 20, 'ENHANCING': 10}


@pytest.mark.contract('warned', 'labels', 'BraTS-PEDs without id 4, which may be of 2023 or of 2024', 'read as of 2024, and the line says how 2023 differs')
def test_children_without_edema_may_be_of_either_year_which_is_said(tmp_path):
    write_study(tmp_path, 'BraTS-PED-00019-000', {1: 30, 2: 20, 3: 10})
    with pytest.warns(UserWarning, match='release of 2023 has 1 non-enhancing, 2 edema, 3 enhancing'):
        assert voxels(read(tmp_path)) == {'ENHANCING': 30, 'NON_ENHANCING': 30, 'EDEMA': 0}
    assert voxels(read(tmp_path, 'brats2023')) == {'NON_ENHANCING': 30, 'EDEMA': 20, 'ENHANCING': 10}


@pytest.mark.parametrize('case', ['BraTS-GLI-00005-100', 'BraTS-SSA-00002-000', 'BraTS-MET-00001-000', 'BraTS-MEN-00004-000', 'P1'])
def test_names_of_2023_have_enhancing_tumour_at_three(tmp_path, case):
    write_study(tmp_path, case, {1: 30, 2: 20, 3: 10})
    assert voxels(read(tmp_path)) == {'NON_ENHANCING': 30, 'EDEMA': 20, 'ENHANCING': 10}


@pytest.mark.parametrize('case', ['BraTS2021_00006', 'BraTS20_Training_001', 'Brats18_2013_11_1', 'UCSF-PDGM-0004', 'UPENN-GBM-00001_11', 'P1'])
def test_names_of_2017_have_enhancing_tumour_at_four(tmp_path, case):
    write_study(tmp_path, case, {1: 30, 2: 20, 4: 5}, OLD, '_')
    assert voxels(read(tmp_path)) == {'NON_ENHANCING': 30, 'EDEMA': 20, 'ENHANCING': 5}


@pytest.mark.contract('warned', 'labels', 'a resection cavity (id 4 of BraTS 2024)', 'background, with its number of voxels')
def test_a_cavity_beside_enhancing_tumour_is_background_and_said(tmp_path):
    write_study(tmp_path, 'BraTS-GLI-00005-100')
    with pytest.warns(UserWarning, match='5 voxels of resection cavity'):
        assert voxels(read(tmp_path)) == {'NON_ENHANCING': 30, 'EDEMA': 20, 'ENHANCING': 10}


@pytest.mark.contract('refused', 'labels', 'id 4 that its names do not explain', 'the error says which schemas it may be of, and the options that name one')
@pytest.mark.parametrize(('case', 'ids', 'meant'), [
    ('BraTS-GLI-00005-100', (1, 2, 4), r'no 3 .*enhancing tumour \(brats2017\) or resection cavity \(brats2023\)'),
    ('BraTS-GLI-00005-100', (4,), r'no 3 .*enhancing tumour \(brats2017\) or resection cavity \(brats2023\)'),
    ('P1', (1, 2, 4), r'enhancing tumour \(brats2017\) or resection cavity \(brats2023\) or edema \(brats-peds\)'),
    ('P1', (1, 2, 3, 4), r'resection cavity \(brats2023\) or edema \(brats-peds\)'),
    ('BraTS-MEN-00004-000', (1, 2, 4), 'expected those of BraTS-MEN'),
    ('BraTS-SSA-00004-000', (3, 4), 'expected those of BraTS-SSA'),
])
def test_a_four_that_may_be_something_else_is_refused_until_it_is_named(tmp_path, case, ids, meant):
    write_study(tmp_path, case, dict.fromkeys(ids, 10))
    with pytest.raises(InputError, match=rf'{case}-seg.nii.gz: .*{meant}.*; name the schema .*--ref_schema'):
        read(tmp_path)
    expected = {label: sum(10 for i in ids if SCHEMAS['brats-peds'].labels[i] == label) for label in list(Label)[1:]}
    assert list(voxels(read(tmp_path, 'brats-peds')).values()) == list(expected.values())


@pytest.mark.contract('refused', 'labels', 'labels of a collection whose ids mean something else', 'the error says what they are')
def test_collections_whose_ids_are_something_else_are_refused_with_the_reason(tmp_path):
    write_study(tmp_path / 'LUMIERE', 'Patient-001', {1: 9, 2: 9})
    with pytest.raises(InputError, match='labels of LUMIERE are not read without a schema: .*edema=1,enhancing=2'):
        read(tmp_path / 'LUMIERE')
    assert voxels(read(tmp_path / 'LUMIERE', 'edema=1,enhancing=2')) == {'EDEMA': 9, 'NON_ENHANCING': 0, 'ENHANCING': 9}


def test_a_schema_of_ones_own_maps_two_ids_to_one_label(tmp_path):
    write_study(tmp_path, 'P1', names=OLD, joint='_')
    found = read(tmp_path, 'edema=2,non_enhancing=1+3,enhancing=4')
    assert voxels(found) == {'EDEMA': 20, 'NON_ENHANCING': 40, 'ENHANCING': 5}
    mask = write_label(tmp_path / 'mask.nii.gz', found.label, found)
    assert np.array_equal(read_label(mask)[0], found.label)  # the file states its schema


def test_a_mask_that_names_a_schema_nobody_knows_is_named_in_the_error(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), AFFINE)
    store_facts(image.header, {'schema': 'brats2099'})
    nib.save(image, tmp_path / 'm.nii.gz')
    with pytest.raises(InputError, match=r"m\.nii\.gz: the file says that its ids are of unknown label schema 'brats2099'"):
        read_label(tmp_path / 'm.nii.gz')


@pytest.mark.contract('refused', 'labels', 'a schema such as `edema=²`, or one that names an id twice', 'the error says which part')
@pytest.mark.parametrize('schema', ['edema=²', 'edema=٣', 'edema=+1', f'edema={"9" * 5000}', 'edema=1,edema=2', 'edema=1,enhancing=1', 'nonsense'])
def test_a_schema_that_cannot_be_read_is_a_short_error(tmp_path, capsys, schema):
    write_study(tmp_path, 'BraTS-GLI-00001-000', {1: 3, 2: 3, 3: 3})
    assert main(['eda', '--data', str(tmp_path), '--output_dir', str(tmp_path / 'eda'), '--schema', schema]) == 2
    error = capsys.readouterr().err
    assert 'label schema' in error and len(error) < 600


def test_evaluate_scores_a_child_against_itself_in_another_schema(tmp_path, capsys):
    home = write_study(tmp_path / 'data', 'BraTS-PED-00019-000')
    case = read(tmp_path / 'data')
    write_label(tmp_path / 'pred' / 'BraTS-PED-00019-000.nii.gz', case.label, case, 'msd')
    assert main(['evaluate', '--pred', str(tmp_path / 'pred'), '--ref', str(tmp_path / 'data'), '--output_dir', str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr().out
    assert [re.search(rf'^{region} +([\d.]+)', printed, re.MULTILINE).group(1) for region in ('WT', 'TC', 'ET')] == ['1.000'] * 3
    assert home.name in (tmp_path / 'out' / 'metrics.csv').read_text()


def test_a_dataset_json_states_its_ids_whatever_the_cases_are_called(tmp_path, capsys):
    "Children, relabelled in the ids of BraTS 2023: what the description says counts, not the name."
    home = write_study(tmp_path / 'own', 'BraTS-PED-00019-000', {1: 30, 2: 20, 3: 10})
    images = np.stack([nib.load(home / f'{home.name}-{n}.nii.gz').get_fdata() for n in ('t2f', 't1n', 't1c', 't2w')], axis=-1)
    for folder, image in (('imagesTr', nib.Nifti1Image(images.astype(np.int16), AFFINE)), ('labelsTr', nib.load(home / f'{home.name}-seg.nii.gz'))):
        (tmp_path / 'msd' / folder).mkdir(parents=True)
        nib.save(image, tmp_path / 'msd' / folder / f'{home.name}.nii.gz')
    (tmp_path / 'msd' / 'dataset.json').write_text(json.dumps({'modality': {'0': 'FLAIR', '1': 'T1w', '2': 'T1gd', '3': 'T2w'}, 'labels': {
        '0': 'background', '1': 'necrotic core', '2': 'edema', '3': 'enhancing tumour'}}))
    case = read(tmp_path / 'msd')
    assert voxels(case) == {'NON_ENHANCING': 30, 'EDEMA': 20, 'ENHANCING': 10} and case.schema == 'brats2023'
    write_label(tmp_path / 'pred' / f'{home.name}.nii.gz', case.label, case, 'msd')
    assert main(['evaluate', '--pred', str(tmp_path / 'pred'), '--ref', str(tmp_path / 'msd'), '--output_dir', str(tmp_path / 'out')]) == 0
    printed = capsys.readouterr().out
    assert [re.search(rf'^{region} +([\d.]+)', printed, re.MULTILINE).group(1) for region in ('WT', 'TC', 'ET')] == ['1.000'] * 3


def test_the_sentence_with_the_options_names_options_that_there_are():
    commands = next(a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    named = re.findall(r'((?:\w+(?:, | and )?)+) --([\w.]+)', NAME_IT.split('command line ')[1])
    assert [option for _, option in named] == ['ref_schema', 'pred_schema', 'data.schema', 'schema']
    for who, option in named:
        for command in re.split(r', | and ', who):
            if command and option != 'data.schema' and command != 'convert':
                assert f'--{option}' in commands[command].format_help(), (command, option)


def test_every_row_cites_its_source():
    assert {c.schema for c in COLLECTIONS} <= {*SCHEMAS, None}
    assert all(re.match(r'https://(doi\.org|arxiv\.org)/', c.source) for c in COLLECTIONS)


def test_each_schema_gives_the_labels_of_its_paper():
    every, four = np.array([0, 1, 2, 3], dtype=np.uint8), np.arange(5)
    BG, ED, NE, ET = Label
    assert to_canonical(every, 'msd').tolist() == [BG, ED, NE, ET]
    assert to_canonical(four[[0, 1, 2, 4]], 'brats2017').tolist() == [BG, NE, ED, ET]
    assert to_canonical(every, 'brats2023').tolist() == [BG, NE, ED, ET]
    assert to_canonical(four, 'brats-peds').tolist() == [BG, ET, NE, NE, ED]
    assert to_canonical(four, 'brats2013').tolist() == [BG, NE, ED, NE, ET]
    assert from_canonical(every, 'brats-peds').tolist() == [0, 4, 2, 1]


def test_a_schema_that_is_spelt_out():
    BG, ED, NE, ET = Label
    every, four = np.array([0, 1, 2, 3], dtype=np.uint8), np.arange(5)
    own = 'edema=2,non_enhancing=1+3,enhancing=4'
    assert to_canonical(four, own).tolist() == [BG, NE, ED, NE, ET] and from_canonical(every, own).tolist() == [0, 2, 1, 4]
    assert to_canonical(np.array([0, 1, 2]), 'edema=1,enhancing=2').tolist() == [BG, ED, ET]
    with pytest.raises(InputError, match='has no id for non-enhancing or necrotic core'):
        from_canonical(every, 'edema=1,enhancing=2')
    with pytest.warns(UserWarning, match='1 voxels of id 7, which is ignored'):
        assert to_canonical(np.array([7, 3]), 'enhancing=3, ignored=7').tolist() == [BG, ET]

    for wrong in ('edema=²', 'edema=٣', 'edema=+1', 'edema=-1', 'edema=0', 'edema=01', 'edema=256', f'edema={"9" * 5000}', 'edema=1.0', 'edema=',
                  'edema', 'edema=1,', 'edema=1++2', 'edema=1,core=2', 'edema=1=2', 'edema=1\x00', 'ed ema=1', '=1', 'edema=1e2', 'edema=1_0'):
        with pytest.raises(InputError, match='cannot read|unknown label schema'):
            get_schema(wrong)
    for twice in ('edema=1,edema=2', 'edema=1,enhancing=1', 'edema=1+1', 'edema=1+2,enhancing=2', 'edema=1,ignored=1'):
        with pytest.raises(InputError, match='twice'):
            get_schema(twice)
    for odd in (2023, None, ['msd'], {'edema': 1}, '', 'ignored=4'):
        with pytest.raises(InputError, match='unknown label schema|names no tumour'):
            get_schema(odd)


def test_collections_are_known_by_their_paths():
    for path, name in {
        'ASNR-MICCAI-BraTS2023-GLI-Challenge-TrainingData/BraTS-GLI-00000-000/BraTS-GLI-00000-000-seg.nii.gz': 'BraTS-GLI',
        'BraTS2024-BraTS-GLI-TrainingData/training_data1_v2/BraTS-GLI-00005-100/BraTS-GLI-00005-100-seg.nii.gz': 'BraTS-GLI',
        'peds/BraTS-PED-00019-000/BraTS-PED-00019-000-seg.nii.gz': 'BraTS-PEDs', 'BraTS-PEDs-v1/Training/C1/C1-seg.nii.gz': 'BraTS-PEDs',
        'ASNR-MICCAI-BraTS2023-PED-Challenge-TrainingData/BraTS-PED-00002-000/BraTS-PED-00002-000-seg.nii.gz': 'BraTS-PEDs 2023',
        'BraTS-Africa/95_Glioma/BraTS-SSA-00002-000/BraTS-SSA-00002-000-seg.nii.gz': 'BraTS-SSA', 'BraTS-MET-00001-000-seg.nii.gz': 'BraTS-MET',
        'BraTS-MEN-00004-000-seg.nii.gz': 'BraTS-MEN', 'BraTS-MEN-RT-0005-1_gtv.nii.gz': 'BraTS-MEN-RT',
        'UCSF-PDGM-0004_nifti/UCSF-PDGM-0004_tumor_segmentation.nii.gz': 'UCSF-PDGM', 'images_segm/UPENN-GBM-00001_11_segm.nii.gz': 'UPENN-GBM',
        'Patient-001/week-000-1/HD-GLIO-AUTO-segmentation/registered/segmentation.nii.gz': 'LUMIERE',
        'BraTS20_Training_001/BraTS20_Training_001_seg.nii': 'BraTS 2017-2022', 'HGG/Brats18_2013_11_1/Brats18_2013_11_1_seg.nii.gz': 'BraTS 2017-2022',
        'Brats17_TCIA_121_1_seg.nii.gz': 'BraTS 2017-2022', 'BraTS2021_00006_seg.nii.gz': 'BraTS 2017-2022', 'brats_2013_pat0001_1/x.nii': 'BraTS 2012-2015',
        'Task01_BrainTumour/labelsTr/BRATS_001.nii.gz': 'MSD', 'my_BraTS2021_study/BraTS-PED-00019-000-seg.nii.gz': 'BraTS-PEDs',
    }.items():
        assert find_collection(path).name == name, (path, find_collection(path))
    for path in ('cohort/P1/P1-seg.nii.gz', 'BRATS_001.nii.gz', 'brats/pediatric.nii.gz', 'BraTS-GLIDE/x.nii', 'MEN-1_seg.nii.gz', 'BraTS2016x/a.nii'):
        assert find_collection(path) is None, path
    assert all(c.source.startswith('https://') and (c.schema is None) == bool(c.why) for c in COLLECTIONS)
    assert all(c.schema is None or {0, *c.ids} <= set(SCHEMAS[c.schema].values) for c in COLLECTIONS)


def test_ids_confirm_what_names_imply():
    def refused(match, values, path, implied=None):
        with pytest.raises(InputError, match=match):
            settle_schema(implied, values, path) if implied else infer_schema(np.array(values), path)

    gli, ped, bare = 'BraTS-GLI-00001-000-seg.nii.gz', 'BraTS-PED-00001-000-seg.nii.gz', 'P1-seg.nii.gz'
    assert implied_schema(['BraTS-PED-00001-000-t1n.nii.gz']) == 'brats-peds' and implied_schema(['P1-t1n.nii.gz']) is None
    assert settle_schema('brats2023', [0, 1, 2, 3, 4], gli) == 'brats2023'  # a cavity beside enhancing tumour
    refused(r'found ids 0, 1, 2, 4 and no 3 .* 4 is enhancing tumour \(brats2017\) or resection cavity \(brats2023\); name the schema', [0, 1, 2, 4], gli, 'brats2023')
    refused(r'4 is resection cavity \(brats2023\) or edema \(brats-peds\)', [0, 1, 2, 3, 4], bare, 'brats2023')
    refused('expected those of BraTS-SSA', [0, 4, 3], 'BraTS-SSA-00001-000-seg.nii.gz', 'brats2023')
    refused('gross tumour volume', [0, 1], 'BraTS-MEN-RT-0005-1_label.nii.gz')
    assert settle_schema('brats2023', [0, 1, 4], ped) == infer_schema(np.array([0, 1, 4]), ped) == 'brats-peds'
    with pytest.warns(UserWarning, match='release of 2023'):
        settle_schema('brats-peds', [0, 1, 2, 3], ped)
    refused('ids 0, 1, 2, 3 fit msd, brats2023, brats-peds and brats2013; name the schema', [0, 1, 2, 3], bare)
    refused('unknown label values: found 0, 7', [0, 7], bare)
    refused('ambiguous', [0, 1, 2, 4], 'BraTS-PED-00001-000.nii.gz')  # a prediction of some tool: its name says whose case it is, not whose ids
    assert infer_schema(np.array([0]), bare) == 'msd'


def test_labels_of_a_dataset_json():
    msd = {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'}
    assert schema_of_labels(msd) == schema_of_labels({v: int(k) for k, v in msd.items()}) == 'msd'
    assert schema_of_labels({'0': 'background', '1': 'necrotic core', '2': 'oedema', '4': 'enhancing'}) == 'brats2017'
    assert schema_of_labels({'background': 0, 'NETC': 1, 'SNFH': 2, 'ET': 3, 'RC': 4}) == 'brats2023'
    assert schema_of_labels({'background': 0, 'ET': 1, 'NET': 2, 'CC': 3, 'ED': 4}) == 'brats-peds'
    assert schema_of_labels({'background': 0, 'whole tumor': [1, 2, 3], 'tumor core': [2, 3], 'enhancing tumor': [3]}) == 'msd'
    assert schema_of_labels({'background': 0, 'enhancing': 7, 'edema': 9}) == 'edema=9,enhancing=7'
    for unclear in ({'0': 'background', '1': 'tumour'}, {}, {'background': 0, 'edema': '²'}, {'background': 3, 'edema': 1}, {'1': 'edema', '2': 'edema'},
                    {'background': 0, 'whole tumor': [1, 'x'], 'core': [2], 'et': [3]}, {'edema': {'a': 1}}, {'edema': None}):
        assert schema_of_labels(unclear) in (None, 'edema=1+2'), unclear
