"Which voxels lie at the same places: the tolerance, and files that hold the same voxels in another order."
from __future__ import annotations

import warnings

import nibabel as nib
import numpy as np
import pytest

from neuroseg3d.core import Geometry, InputError
from neuroseg3d.evaluation.evaluate import evaluate
from neuroseg3d.studies.cases import read_case
from neuroseg3d.studies.grids import fit_grid, on_grid, turn_between

#: An oblique affine, with the decimals that registration leaves.
AFFINE = np.array([[-0.943217, 0.212344, 0.031249, 91.234561], [0.208701, 0.970127, -0.120339, -126.104951],
                   [0.041151, 0.110238, 0.992193, -72.516151], [0, 0, 0, 1]])
U, _, V = np.linalg.svd(AFFINE[:3, :3])
AFFINE[:3, :3] = U @ V  # at right angles, edges of 1 mm
SHAPE = (60, 72, 50)


def tumour(shift: int = 0) -> np.ndarray:
    "Nested boxes; a shift of one voxel along x takes a known share of Dice."
    label = np.zeros(SHAPE, np.uint8)
    for value, edge in ((1, 24), (2, 16), (3, 8)):
        label[10 + shift:10 + shift + edge, 20:20 + edge, 12:12 + edge] = value
    return label


def save(path, label, affine=AFFINE):
    image = nib.Nifti1Image(label, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


def scores(pred, ref) -> dict[str, dict]:
    "Rows by structure, without the name of the case."
    return {r['name']: {**r, 'case': ''} for r in evaluate(pred, ref, pred_schema='msd', ref_schema='msd')[0]}


@pytest.mark.contract('warned', 'labels', 'corners that lie up to 0.1 mm away (or a quarter of a voxel)', 'the same grid; the line gives the distance')
def test_an_affine_rounded_to_four_decimals_is_the_same_grid(tmp_path):
    ref, pred = save(tmp_path / 'ref.nii.gz', tumour()), save(tmp_path / 'pred.nii.gz', tumour(2))
    off = AFFINE.copy()
    off[:3, 3] += [0.016, 0, 0]  # what four decimals take away in a head of 240 voxels
    moved = save(tmp_path / 'off.nii.gz', tumour(2), off)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        save(tmp_path / 'rounded.nii.gz', tumour(2), AFFINE.round(4))
        wanted = scores(pred, ref)
        assert str(scores(tmp_path / 'rounded.nii.gz', ref)) == str(wanted)  # 0.003 mm: not worth a word
    assert wanted['WT']['dice'] == pytest.approx(22 / 24)
    with pytest.warns(UserWarning, match=r'off.nii.gz: its corners lie up to 0.016 mm from those of .*tolerance 0.1 mm'):
        assert str(scores(moved, ref)) == str(wanted)


@pytest.mark.contract('refused', 'labels', 'grids further apart', 'the error gives distance and tolerance')
@pytest.mark.parametrize(('voxels', 'mm'), [(0.5, '0.5'), (0.25, '0.25')])
def test_half_a_voxel_is_another_grid(tmp_path, voxels, mm):
    off = AFFINE.copy()
    off[:3, 3] += voxels * AFFINE[:3, 2]
    ref, pred = save(tmp_path / 'ref.nii.gz', tumour()), save(tmp_path / 'pred.nii.gz', tumour(), off)
    with pytest.raises(InputError, match=rf'pred.nii.gz: its affine puts voxels up to {mm}\d* mm away .*to 0.1 mm at the corners'):
        scores(pred, ref)


def test_small_voxels_have_a_small_tolerance(tmp_path):
    fine = AFFINE @ np.diag([0.1, 0.1, 0.1, 1])
    off = fine.copy()
    off[:3, 3] += 0.5 * fine[:3, 0]
    ref, pred = save(tmp_path / 'ref.nii.gz', tumour(), fine), save(tmp_path / 'pred.nii.gz', tumour(), off)
    with pytest.raises(InputError, match='up to 0.05 mm away .*to 0.025 mm at the corners'):
        scores(pred, ref)


@pytest.mark.contract('converted', 'labels', 'the same voxels with other axes, such as LPS against RAS', 'turned to match; the line says so')
@pytest.mark.parametrize('codes', ['LPS', 'LAS', 'RAI', 'PIR', 'SAR', 'ILP'])
def test_a_prediction_in_another_order_is_turned(tmp_path, codes):
    ref, pred = save(tmp_path / 'ref.nii.gz', tumour()), save(tmp_path / 'pred.nii.gz', tumour(2))
    ornt = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    nib.save(nib.load(pred).as_reoriented(ornt), tmp_path / 'turned.nii.gz')
    wanted = scores(pred, ref)
    with pytest.warns(UserWarning, match=f'turned.nii.gz: its axes run {codes}, those of .*ref.nii.gz LAS') if codes != 'LAS' else warnings.catch_warnings():
        assert str(scores(tmp_path / 'turned.nii.gz', ref)) == str(wanted)
    with pytest.warns(UserWarning, match='the same voxels in another order') if codes != 'LAS' else warnings.catch_warnings():
        back = scores(ref, tmp_path / 'turned.nii.gz')
    assert back['ET']['dice'] == wanted['ET']['dice'] and back['WT']['hd95_mm'] == pytest.approx(wanted['WT']['hd95_mm'])


@pytest.mark.contract('converted', 'images', 'sequences of one case with other axes', 'turned to match; the line says so')
@pytest.mark.parametrize('codes', ['RAS', 'LPS', 'PIR'])
def test_sequences_and_labels_in_another_order_are_turned(tmp_path, codes):
    rng, names = np.random.default_rng(0), ('flair', 't1', 't1ce', 't2')
    brain = np.linalg.norm((np.moveaxis(np.indices(SHAPE), 0, -1) - np.array(SHAPE) / 2) / (np.array(SHAPE) / 2 - 2), axis=-1) < 1
    images = {n: (rng.integers(200, 900, SHAPE) * brain).astype(np.int16) for n in names} | {'seg': tumour() * brain}
    for name, voxels in images.items():
        save(tmp_path / f'P_{name}.nii.gz', voxels)
    plain = read_case(tmp_path, schema='msd')
    ornt = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    for name in ('t1ce', 'seg'):
        nib.save(nib.load(tmp_path / f'P_{name}.nii.gz').as_reoriented(ornt), tmp_path / f'P_{name}.nii.gz')
    with pytest.warns(UserWarning, match=f'axes run {codes}, those of P_flair.nii.gz LAS') as said:
        turned = read_case(tmp_path, schema='msd')
    assert {w.message.args[0].split('P_')[1][:4] for w in said} == {'t1ce', 'seg.'}
    assert np.array_equal(turned.image, plain.image) and np.array_equal(turned.label, plain.label)
    assert np.array_equal(turned.image[2], images['t1ce'])


def test_a_volume_of_any_orientation_comes_back_voxel_by_voxel():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (33, 34, 35)).astype(np.uint8)
    shear = np.array([[0.9, 0.1, 0, 5], [-0.1, 1.1, 0.2, -7], [0, -0.2, 2.0, 3], [0, 0, 0, 1]])
    scan = nib.Nifti1Image(values, shear)
    for codes in ('RAS', 'LPS', 'LAS', 'PIR', 'SLA', 'AIL'):
        other = scan.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(shear), nib.orientations.axcodes2ornt(codes)))
        found, wanted = (Geometry(i.shape, i.affine) for i in (other, scan))
        back = on_grid(np.asarray(other.dataobj), wanted, wanted, 'a', 'b') if codes == 'RAS' else None
        if codes != 'RAS':
            with pytest.warns(UserWarning, match=f'pred.nii: its axes run {codes}, those of ref.nii RAS: the same voxels in another order'):
                back = on_grid(np.asarray(other.dataobj), found, wanted, 'pred.nii', 'ref.nii')
        assert np.array_equal(back, values), codes
    moved = Geometry(found.shape, found.affine + 0.5 * np.eye(4, k=3))
    assert turn_between(moved, wanted) is None
    with pytest.raises(InputError, match='found shape'):
        fit_grid(moved, wanted, 'pred.nii', 'ref.nii')
