"A cohort in another layout: the same voxels, geometry and labels, read by us and by others."
from __future__ import annotations

import gzip
import json

import nibabel as nib
import numpy as np
import pytest
from test_schemas import write_study

from neuroseg3d.studies.cases import read_case
from neuroseg3d.cli import main
from neuroseg3d.delivery.convert import LAYOUTS, convert_cohort
from neuroseg3d.core import MODALITIES, InputError
from neuroseg3d.studies.layouts import find_cases

OBLIQUE = np.array([[0, -1.1, 0, 3], [0.72, 0, -1.5, -7], [0.54, 0, 2, 4], [0, 0, 0, 1.0]])
SHAPE = (11, 12, 9)


def save(values, path, slope=1.0, inter=0.0, kind=nib.Nifti1Image):
    "A file with these stored values and this scaling."
    path.parent.mkdir(parents=True, exist_ok=True)
    image = kind(values, OBLIQUE)
    content = bytearray(image.to_bytes())
    content[112:120] = np.array([slope, inter], '<f4').tobytes() if kind is nib.Nifti1Image else content[112:120]
    path.write_bytes(gzip.compress(bytes(content), 1) if path.suffix == '.gz' else bytes(content))


def write_four(folder, case, types=(np.int16,) * 4, scaling=((1, 0),) * 4, suffix='.nii.gz', labelled=True, kind=nib.Nifti1Image):
    rng = np.random.default_rng(len(case))
    for name, dtype, (slope, inter) in zip(('flair', 't1', 't1ce', 't2'), types, scaling):
        values = rng.integers(0, 250, SHAPE).astype(dtype)
        save(values, folder / case / f'{case}_{name}{suffix}', slope, inter, kind)
    if labelled:
        save(rng.choice([0, 1, 2, 4], SHAPE).astype(np.uint8), folder / case / f'{case}_seg{suffix}', kind=kind)


def same(a, b):
    assert np.array_equal(a.image, b.image) and np.array_equal(a.geometry.affine, b.geometry.affine)
    assert (a.label is None) == (b.label is None) and (a.label is None or np.array_equal(a.label, b.label))


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    "Cases that differ in all that a file can: types, scalings, compression, NIfTI 2, no label."
    root = tmp_path_factory.mktemp('own')
    write_four(root, 'BraTS2021_00001')
    write_four(root, 'BraTS2021_00002', scaling=((0.25, 1),) * 4, labelled=False)
    write_four(root, 'bare', suffix='.nii')
    write_four(root, 'mixed', types=(np.uint8, np.int16, np.float32, np.uint16))
    write_four(root, 'scaled', scaling=((0.5, 0), (1, 0), (0.3, -7), (2, 1)))
    write_four(root, 'two', kind=nib.Nifti2Image)
    return root


@pytest.mark.parametrize('to', LAYOUTS)
def test_what_is_written_is_what_was_read(cohort, tmp_path, to):
    done = convert_cohort(cohort, tmp_path / 'out', to)
    assert not done.failures and len(done.names) == 6 and len(done.labelled) == 5
    before = {s.id: read_case(s) for s in find_cases(cohort)}
    after = {s.id: read_case(s) for s in find_cases(tmp_path / 'out', split='all')}
    assert set(after) == set(done.names.values())
    for old, new in done.names.items():
        same(before[old], after[new])


@pytest.mark.parametrize('first', LAYOUTS)
def test_there_and_back_through_every_layout(cohort, tmp_path, first):
    convert_cohort(cohort, tmp_path / 'a', first)
    convert_cohort(tmp_path / 'a', tmp_path / 'b', 'msd')
    before = sorted((read_case(s) for s in find_cases(cohort)), key=lambda c: c.image.sum())
    after = sorted((read_case(s) for s in find_cases(tmp_path / 'b', split='all')), key=lambda c: c.image.sum())
    for a, b in zip(before, after, strict=True):
        same(a, b)


def test_a_sequence_alone_is_copied_byte_by_byte_and_one_file_keeps_type_and_scaling(cohort, tmp_path):
    convert_cohort(cohort, tmp_path / 'n', 'nnunet')
    source = cohort / 'BraTS2021_00001' / 'BraTS2021_00001_t1ce.nii.gz'
    assert (tmp_path / 'n' / 'imagesTr' / 'BraTS2021_00001_0002.nii.gz').read_bytes() == source.read_bytes()
    convert_cohort(cohort, tmp_path / 'm', 'msd')
    def stored(case):
        path, = (tmp_path / 'm').glob(f'images*/{case}.nii.gz')
        image = nib.load(path)
        return image.get_data_dtype(), float(image.dataobj.slope), float(image.dataobj.inter), image.shape
    assert stored('BraTS2021_00001') == (np.int16, 1, 0, (*SHAPE, 4)) and stored('BraTS2021_00002') == (np.int16, 0.25, 1, (*SHAPE, 4))
    assert stored('mixed')[:3] == (np.float32, 1, 0) and stored('scaled')[0] in (np.float32, np.float64)
    assert stored('two')[0] == np.int16 and isinstance(nib.load(tmp_path / 'm' / 'imagesTr' / 'two.nii.gz'), nib.Nifti2Image)


def test_nnunet_finds_the_keys_that_it_documents(cohort, tmp_path):
    convert_cohort(cohort, tmp_path / 'n', 'nnunet')
    found = json.loads((tmp_path / 'n' / 'dataset.json').read_text())
    assert found == {'channel_names': {'0': 'FLAIR', '1': 'T1w', '2': 'T1gd', '3': 'T2w'},
                     'labels': {'background': 0, 'edema': 1, 'non-enhancing tumor': 2, 'enhancing tumor': 3}, 'numTraining': 5, 'file_ending': '.nii.gz'}
    assert sorted(found['labels'].values()) == list(range(4))  # nnU-Net wants them without a gap
    images = sorted(p.name for p in (tmp_path / 'n' / 'imagesTr').iterdir())
    labels = sorted(p.name for p in (tmp_path / 'n' / 'labelsTr').iterdir())
    assert len(labels) == 5 and images == sorted(f'{name[:-7]}_{n:04d}.nii.gz' for name in labels for n in range(4))
    assert sorted(p.name for p in (tmp_path / 'n' / 'imagesTs').iterdir()) == [f'BraTS2021_00002_{n:04d}.nii.gz' for n in range(4)]
    for name in labels:  # what nnU-Net checks first: one grid, no unexpected id
        label, image = (nib.load(tmp_path / 'n' / d) for d in (f'labelsTr/{name}', f'imagesTr/{name[:-7]}_0000.nii.gz'))
        assert label.shape == image.shape and np.array_equal(label.affine, image.affine)
        assert set(np.unique(label.dataobj)) <= {0, 1, 2, 3} and label.get_data_dtype() == np.uint8


def test_simpleitk_reads_the_same_grid_and_voxels(cohort, tmp_path):
    sitk = pytest.importorskip('SimpleITK')
    convert_cohort(cohort, tmp_path / 'n', 'nnunet')
    a = sitk.ReadImage(str(cohort / 'bare' / 'bare_t2.nii'))
    b = sitk.ReadImage(str(tmp_path / 'n' / 'imagesTr' / 'bare_0003.nii.gz'))
    assert np.array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b))
    assert (a.GetSpacing(), a.GetOrigin(), a.GetDirection()) == (b.GetSpacing(), b.GetOrigin(), b.GetDirection())


def test_the_decathlon_lists_its_files(cohort, tmp_path):
    convert_cohort(cohort, tmp_path / 'm', 'msd')
    found = json.loads((tmp_path / 'm' / 'dataset.json').read_text())
    assert list(found['modality'].values()) == list(MODALITIES) and found['labels']['3'] == 'enhancing tumor'
    assert found['numTraining'] == len(found['training']) == 5 and found['numTest'] == 1 and found['test'] == ['./imagesTs/BraTS2021_00002.nii.gz']
    assert all((tmp_path / 'm' / pair[k]).is_file() for pair in found['training'] for k in ('image', 'label'))


def test_bids_has_its_entities_descriptions_and_tables(cohort, tmp_path):
    convert_cohort(cohort, tmp_path / 'b', 'bids')
    root, anat = tmp_path / 'b', tmp_path / 'b' / 'sub-BraTS202100001' / 'anat'
    assert sorted(p.name for p in anat.iterdir()) == [f'sub-BraTS202100001_{s}.nii.gz' for s in ('FLAIR', 'T1w', 'T2w', 'ce-gadolinium_T1w')]
    drawn = root / 'derivatives' / 'labels' / 'sub-BraTS202100001' / 'anat'
    assert sorted(p.name for p in drawn.iterdir()) == [f'sub-BraTS202100001_desc-tumour_dseg.{e}' for e in ('nii.gz', 'tsv')]
    rows = [line.split('\t') for line in (drawn / 'sub-BraTS202100001_desc-tumour_dseg.tsv').read_text().splitlines()]
    assert rows[0] == ['index', 'name'] and [r[0] for r in rows[1:]] == ['0', '1', '2', '3']
    description = json.loads((root / 'dataset_description.json').read_text())
    assert {'Name', 'BIDSVersion'} <= set(description)
    assert 'GeneratedBy' in json.loads((root / 'derivatives' / 'labels' / 'dataset_description.json').read_text())
    assert len((root / 'participants.tsv').read_text().splitlines()) == 7


def test_a_cavity_and_a_cyst_stay_where_the_schema_has_them(tmp_path):
    write_study(tmp_path / 'own', 'BraTS-GLI-00005-100')
    write_study(tmp_path / 'own', 'BraTS-PED-00019-000')
    with pytest.warns(UserWarning, match='resection cavity'):
        convert_cohort(tmp_path / 'own', tmp_path / 'brats', 'brats')
    for case in ('BraTS-GLI-00005-100', 'BraTS-PED-00019-000'):
        old, new = (nib.load(tmp_path / d / case / f'{case}-seg.nii.gz').get_fdata() for d in ('own', 'brats'))
        assert np.array_equal(old, new) and set(np.unique(new)) == {0, 1, 2, 3, 4}
    with pytest.warns(UserWarning, match='resection cavity'):
        convert_cohort(tmp_path / 'own', tmp_path / 'msd', 'msd')
    counts = [np.bincount(nib.load(tmp_path / 'msd' / 'labelsTr' / f'{c}.nii.gz').get_fdata().astype(int).ravel(), minlength=4).tolist()[1:]
              for c in ('BraTS-GLI-00005-100', 'BraTS-PED-00019-000')]
    assert counts == [[20, 30, 10], [5, 30, 30]]


@pytest.mark.contract('refused', 'cohorts', 'a case that cannot be converted, or whose name is taken', 'nothing of it is written, the others are converted')
def test_a_bad_case_is_named_and_the_others_are_converted(cohort, tmp_path, capsys):
    own = tmp_path / 'own'
    for case in ('good', 'torn', 'odd', 'GOOD'):
        write_four(own, case)
    torn = own / 'torn' / 'torn_t2.nii.gz'
    torn.write_bytes(torn.read_bytes()[:-500])
    save(np.full(SHAPE, 9, np.uint8), own / 'odd' / 'odd_seg.nii.gz')
    assert main(['convert', '--input', str(own), '--output_dir', str(tmp_path / 'out'), '--to', 'msd']) == 1
    printed = capsys.readouterr()
    assert '1 of 4 cases, 1 of them labelled' in printed.out
    for case, why in (('torn', 'truncated'), ('odd', 'unknown label value'), ('good', 'its name here would be good')):
        assert any(f'failed: {case}: ' in line and why in line for line in printed.err.splitlines()), (case, printed.err)
    left = sorted(p.relative_to(tmp_path / 'out').as_posix() for p in (tmp_path / 'out').rglob('*') if p.is_file())
    assert left == ['dataset.json', 'imagesTr/GOOD.nii.gz', 'labelsTr/GOOD.nii.gz']  # nothing of a case that failed


@pytest.mark.contract('refused', 'outputs', 'an output folder of `convert` that is not empty', 'nothing in it is touched')
def test_nothing_is_replaced(cohort, tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('x')
    for folder in (tmp_path / 'out', cohort):
        assert main(['convert', '--input', str(cohort), '--output_dir', str(folder), '--to', 'brats']) == 2
        assert 'not empty' in capsys.readouterr().err
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['mine.txt']
    with pytest.raises(InputError, match='expected one of nnunet, msd, brats, bids'):
        convert_cohort(cohort, tmp_path / 'new', 'nifti')


@pytest.mark.contract('works', 'cohorts', 'a cohort that `convert` has written, in any of its layouts', 'read without `--channels`: the same voxels, affine and labels')
@pytest.mark.parametrize('seed', range(4))
def test_a_random_cohort_goes_through_all_layouts_and_comes_back_the_same(tmp_path, seed):
    "Any shape, affine, type and scaling; from each layout into the next, and each time the same four sequences in their order."
    rng = np.random.default_rng(seed)
    affine, shape = np.eye(4), rng.integers(5, 14, 3)
    affine[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0] @ np.diag(rng.uniform(0.4, 5, 3))
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    kind, slope, inter = [(np.int16, 1, 0), (np.uint8, 0.5, 3), (np.float32, 1, 0), (np.uint16, 2, -1)][seed]
    for case, labelled in (('BraTS2021_00007', True), ('BraTS2021_00009', False)):
        for name in ('flair', 't1', 't1ce', 't2', *(['seg'] if labelled else [])):
            values = rng.choice([0, 1, 2, 4], shape) if name == 'seg' else rng.integers(0, 250, shape)
            path, plain = tmp_path / '0' / case / f'{case}_{name}.nii.gz', (np.uint8, 1, 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            own, a, b = plain if name == 'seg' else (kind, slope, inter)
            content = bytearray(nib.Nifti1Image(values.astype(own), affine).to_bytes())
            content[112:120] = np.array([a, b], '<f4').tobytes()
            path.write_bytes(gzip.compress(bytes(content), 1))
    before = {s.label is not None: read_case(s) for s in find_cases(tmp_path / '0')}
    for step, to in enumerate(rng.permutation(list(LAYOUTS)), 1):
        assert main(['convert', '--input', str(tmp_path / str(step - 1)), '--output_dir', str(tmp_path / str(step)), '--to', to]) == 0
        if (described := tmp_path / str(step) / 'dataset.json').is_file():
            found = json.loads(described.read_text())
            assert list((found.get('modality') or found['channel_names']).values()) == list(MODALITIES)
        after = {s.label is not None: read_case(s) for s in find_cases(tmp_path / str(step), split='all')}
        assert after.keys() == before.keys()
        for labelled, case in before.items():
            same(case, after[labelled])
            assert after[labelled].geometry.shape == case.geometry.shape
