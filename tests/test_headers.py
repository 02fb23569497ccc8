"What a header says of space: forms that disagree, units, edges; other formats; label maps that are scaled. SimpleITK and nibabel are the references."
from __future__ import annotations

import gzip
import tracemalloc
import warnings

import nibabel as nib
import numpy as np
import pytest
from balls import ball_case

from neuroseg3d.core import Case, Geometry, InputError
from neuroseg3d.evaluation.evaluate import evaluate
from neuroseg3d.plots.meshes import error_paint, mesh_figure
from neuroseg3d.plots.planes import show_distances
from neuroseg3d.studies.cases import read_case
from neuroseg3d.studies.headers import check_affine, settle_header
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.nifti import (
    check_memory,
    grid_shape,
    header_geometry,
    read_header,
    read_label,
    read_volumes,
    write_label,
)
from neuroseg3d.studies.schemas import SCHEMAS, from_canonical

SHAPE = (20, 22, 24)
TWO, ONE = np.diag([2, 2, 2, 1.0]), np.diag([1, 1, 1, 1.0])
OBLIQUE = np.array([[-1.9, 0.4, 0.1, 30], [0.4, 1.9, -0.3, -20], [0.075, 0.3, 2.0, 7], [0, 0, 0, 1]])
u, s, v = np.linalg.svd(OBLIQUE[:3, :3])
OBLIQUE[:3, :3] = u @ v * 2  # at right angles, with edges of 2 mm
BALL = (np.linalg.norm(np.moveaxis(np.indices(SHAPE), 0, -1) - np.array(SHAPE) / 2, axis=-1) < 8)


def image(sform=None, qform=None, unit='mm', pixdim=None, voxels=None, kind=nib.Nifti1Image) -> nib.Nifti1Image:
    "An image with exactly this header."
    made = kind((BALL * 100).astype(np.int16) if voxels is None else voxels, None)
    made.header.set_qform(qform, 1) if qform is not None else None
    made.header.set_sform(sform, 1) if sform is not None else None
    made.header.set_xyzt_units(unit)
    if pixdim is not None:
        made.header['pixdim'][1:4] = pixdim
    return made


def save(path, made: nib.Nifti1Image):
    "To disk byte by byte: nibabel's own saving would mend pixdim."
    nib.save(made, path)
    return path


def poke(path, field: str, value, index=None):
    "Change a field of a .nii on disk."
    content = bytearray(path.read_bytes())
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    if index is None:
        header[field] = value
    else:
        header[field][index] = value
    content[:348] = header.binaryblock
    path.write_bytes(bytes(content))
    return path


def four(folder, made: nib.Nifti1Image, change=None):
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(('flair', 't1', 't1ce', 't2')):
        own = np.asarray(made.dataobj) + (np.asarray(made.dataobj) != 0) * np.array(number, made.get_data_dtype())  # no two sequences are alike
        path = save(folder / f'P_{name}.nii', type(made)(own, None, made.header))
        if change:
            poke(path, *change)
    return folder


def itk_affine(path) -> np.ndarray:
    sitk = pytest.importorskip('SimpleITK')
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    read = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(read.GetDirection(), (3, 3)) * read.GetSpacing()
    affine[:3, 3] = read.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


DISAGREE = {
    'size': (dict(sform=TWO, qform=ONE), None, 'sform and qform disagree by up to .* 2 x 2 x 2 mm in RAS, qform of 1 x 1 x 1 mm in RAS'),
    'flip': (dict(sform=OBLIQUE, qform=OBLIQUE @ np.diag([-1, 1, 1, 1])), None, 'sform has voxels .* in LAS, qform of .* in RAS'),
    'position': (dict(sform=OBLIQUE, qform=OBLIQUE + 5 * np.eye(4, k=3)), None, 'sform and qform disagree by up to 5 mm'),
    'pixdim 1': (dict(sform=OBLIQUE), ('pixdim', [1, 1, 1], slice(1, 4)), 'pixdim and affine disagree: pixdim has voxels of 1 x 1 x 1 mm, the affine of 2 x 2 x 2'),
    'pixdim 0': (dict(sform=OBLIQUE), ('pixdim', [0, 0, 0], slice(1, 4)), 'pixdim and affine disagree: pixdim has voxels of 0 x 0 x 0 mm'),
    'pixdim 0 and qform': (dict(sform=OBLIQUE, qform=OBLIQUE), ('pixdim', [0, 0, 0], slice(1, 4)), 'pixdim and affine disagree'),
}


@pytest.mark.contract('warned', 'images', '`sform`, `qform` and `pixdim` that disagree', 'the `sform` is used; what is written agrees in all three')
@pytest.mark.parametrize('how', DISAGREE)
def test_what_disagrees_is_said_and_what_is_written_agrees(tmp_path, how):
    arguments, change, message = DISAGREE[how]
    with pytest.warns(UserWarning, match=message):
        case = read_case(four(tmp_path / 'P', image(**arguments), change))
    assert np.allclose(case.geometry.affine, arguments['sform'], atol=1e-5)
    path = write_label(tmp_path / 'mask.nii.gz', BALL.astype(np.uint8), case)
    written = nib.load(path)
    for affine in (written.get_sform(coded=True)[0], written.get_qform(coded=True)[0], itk_affine(path)):
        assert np.allclose(affine, arguments['sform'], atol=1e-4)
    assert np.allclose(written.header.get_zooms(), 2) and BALL.sum() * np.prod(written.header.get_zooms()) == pytest.approx(BALL.sum() * 8, rel=1e-5)


@pytest.mark.parametrize('arguments', [dict(sform=OBLIQUE, qform=OBLIQUE), dict(sform=OBLIQUE, pixdim=2), dict(qform=OBLIQUE)])
def test_a_header_that_agrees_stays_byte_for_byte(tmp_path, arguments):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        case = read_case(four(tmp_path / 'P', image(**arguments)))
    written = nib.load(write_label(tmp_path / 'mask.nii', BALL.astype(np.uint8), case)).header
    given = nib.load(tmp_path / 'P' / 'P_flair.nii').header
    for field in ('qform_code', 'sform_code', 'quatern_b', 'quatern_c', 'quatern_d', 'qoffset_x', 'qoffset_y', 'qoffset_z', 'srow_x', 'srow_y', 'srow_z', 'xyzt_units'):
        assert written[field].tobytes() == given[field].tobytes(), field
    assert written['pixdim'][:4].tobytes() == given['pixdim'][:4].tobytes()


@pytest.mark.contract('converted', 'images', 'headers in metres or micrometres', 'millimetres, as ITK has them')
@pytest.mark.parametrize('form', ['sform', 'qform', 'both'])
@pytest.mark.parametrize(('unit', 'factor'), [('meter', 1e-3), ('micron', 1e3)])
def test_units_become_millimetres_as_itk_does_it(tmp_path, unit, factor, form):
    small = np.diag([factor, factor, factor, 1]) @ OBLIQUE
    made = image(small if form != 'qform' else None, small if form != 'sform' else None, unit, pixdim=2 * factor)
    with pytest.warns(UserWarning, match=f'its unit is {"metres" if unit == "meter" else "micrometres"}; converted to mm'):
        case = read_case(four(tmp_path / 'P', made))
    assert np.allclose(case.geometry.affine, itk_affine(tmp_path / 'P' / 'P_t1.nii'), atol=1e-3)
    path = write_label(tmp_path / 'mask.nii.gz', BALL.astype(np.uint8), case)
    assert np.allclose(nib.load(path).affine, OBLIQUE, atol=1e-4) and np.allclose(itk_affine(path), OBLIQUE, atol=1e-4)
    assert nib.load(path).header.get_xyzt_units()[0] == 'mm' and np.allclose(nib.load(path).header.get_zooms(), 2)


def test_an_unknown_unit_is_millimetres(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        case = read_case(four(tmp_path / 'P', image(OBLIQUE, OBLIQUE, 'unknown')))
    assert np.allclose(case.geometry.affine, itk_affine(tmp_path / 'P' / 'P_t1.nii'), atol=1e-4)


@pytest.mark.contract('refused', 'images', 'a header without any voxel size', 'nothing is invented')
@pytest.mark.parametrize('pixdim', [0, np.nan, np.inf])
@pytest.mark.parametrize('form', ['none', 'qform'])
def test_no_spacing_is_not_invented(tmp_path, pixdim, form):
    path = poke(save(tmp_path / 'a.nii', image(qform=OBLIQUE if form == 'qform' else None)), 'pixdim', [pixdim] * 3, slice(1, 4))
    with pytest.raises(InputError, match='a.nii: no voxel size is known: pixdim is (0|nan|inf) x'):
        read_header(path)


SPOILT = {
    'edge of a micrometre': (1e-3 * OBLIQUE, r'edges of 0.002 x 0.002 x 0.002 mm, expected 0.05 to 20 mm; if the affine is in another unit'),
    'edge of 1e30': (np.diag([1e30, 1, 1, 1]), 'edges of 1e.30 x 1 x 1 mm'), 'edge of 40 mm': (20 * OBLIQUE, 'edges of 40 x 40 x 40 mm'),
    'nan': (np.diag([np.nan, 1, 1, 1]), 'expected finite numbers'), 'infinite offset': (OBLIQUE + np.array([[0, 0, 0, np.inf]] + 3 * [[0, 0, 0, 0]]), 'expected finite numbers'),
    'singular': (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), 'singular'), 'zeros': (np.zeros((4, 4)), 'singular'),
    'sheared flat': (np.array([[1, 1.9, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), 'a voxel has 47% of the volume'), 'far': (OBLIQUE + 3e4 * np.eye(4, k=3), 'its first voxel lies .* mm from the origin'),
}


@pytest.mark.contract('refused', 'images', 'voxel edges outside 0.05 to 20 mm, axes that lean too far, offsets beyond ten metres, affines that are no numbers', 'the error shows them')
@pytest.mark.parametrize('how', SPOILT)
def test_affines_of_no_head_are_refused(tmp_path, how):
    affine, message = SPOILT[how]
    path = save(tmp_path / 'a.nii', image(OBLIQUE, OBLIQUE))
    for row, field in enumerate(('srow_x', 'srow_y', 'srow_z')):
        poke(path, field, np.asarray(affine, np.float32)[row])
    with np.errstate(all='ignore'), pytest.raises(InputError, match=f'a.nii: .*{message}'):
        read_header(path)


@pytest.mark.contract('refused', 'images', 'a `vox_offset` that is infinite, negative or absurd', 'the error names the field')
@pytest.mark.parametrize('offset', [np.inf, np.nan, -352, 1e12, 3e38])
@pytest.mark.parametrize('packed', [False, True])
def test_voxels_that_begin_nowhere_are_refused(tmp_path, offset, packed):
    path = poke(save(tmp_path / 'a.nii', image(OBLIQUE)), 'vox_offset', offset)
    if packed:
        (path := path.rename(tmp_path / 'a.nii.gz')).write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match=r'a.nii.*voxels begin at byte .* .vox_offset., expected 0 to'):
        read_header(path)


@pytest.mark.contract('warned', 'images', 'gzip under the name .nii, or plain NIfTI under .nii.gz', 'read as what it is; the line says what to call it')
def test_gzip_under_the_name_nii_and_the_other_way_round(tmp_path):
    sound = four(tmp_path / 'sound', image(OBLIQUE))
    wanted = nib.load(sound / 'P_t1.nii').get_fdata()
    for pack, name, remedy in ((gzip.compress, 'c.nii', 'holds gzip data under the name .nii: read as it is; call it c.nii.gz'),
                               (bytes, 'd.nii.gz', 'is called .gz and is not compressed: read as it is; call it d.nii')):
        (tmp_path / name).mkdir()
        for path in sound.iterdir():
            (tmp_path / name / path.name.replace('.nii', name[1:])).write_bytes(pack(path.read_bytes()))
        with pytest.warns(UserWarning, match=remedy.split(';')[0]):
            case = read_case(tmp_path / name)
        assert np.array_equal(case.image[1], wanted) and np.allclose(case.geometry.affine, OBLIQUE, atol=1e-5)


@pytest.mark.contract('refused', 'images', 'a page of HTML, a pointer of git-lfs, DICOM or a ZIP archive under the name of a scan', 'the error says what it is')
@pytest.mark.parametrize(('start', 'what'), [(b'version https://git-lfs.github.com/spec/v1\noid', 'a pointer of git-lfs'), (b'<!DOCTYPE html><html>', 'a page of HTML'),
                                             (bytes(128) + b'DICM', 'a DICOM file'), (b'PK\x03\x04', 'a ZIP archive'), (b'', 'an empty file')])
@pytest.mark.parametrize('name', ['a.nii', 'a.nii.gz'])
def test_what_is_no_nifti_is_named(tmp_path, start, what, name):
    (tmp_path / name).write_bytes(start + bytes(600) * bool(start))
    with pytest.raises(InputError, match=f'{name}: truncated or not a NIfTI file: found {what}'):
        read_header(tmp_path / name)


@pytest.mark.contract('converted', 'images', '.mha, .mhd, .nrrd, .nhdr, pairs of .hdr and .img', 'the same case as from .nii.gz; masks are NIfTI')
@pytest.mark.parametrize('suffix', ['.mha', '.mhd', '.nrrd', '.nhdr', '.img'])
def test_other_formats_give_the_same_case(tmp_path, suffix):
    sitk = pytest.importorskip('SimpleITK')
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    rng, folder = np.random.default_rng(0), tmp_path / 'P'
    folder.mkdir()
    for name in ('flair', 't1', 't1ce', 't2', 'seg'):
        voxels = (BALL * (rng.integers(1, 4, SHAPE) if name == 'seg' else rng.integers(100, 900, SHAPE))).astype(np.uint8 if name == 'seg' else np.int16)
        path = save(tmp_path / f'P_{name}.nii.gz', image(OBLIQUE, OBLIQUE, voxels=voxels))
        if suffix == '.img':
            nib.save(nib.Nifti1Pair(voxels, OBLIQUE), folder / f'P_{name}.img')
        else:
            sitk.WriteImage(sitk.ReadImage(str(path)), str(folder / f'P_{name}{suffix}'))
    wanted, (study,) = read_case(tmp_path, schema='msd'), find_cases(folder)
    case = read_case(study, schema='msd')
    assert np.array_equal(case.image, wanted.image) and np.array_equal(case.label, wanted.label) and wanted.label.any()
    assert np.allclose(case.geometry.affine, OBLIQUE, atol=1e-4) and case.id == 'P'
    path = write_label(tmp_path / 'mask.nii.gz', case.label, case)
    assert np.allclose(nib.load(path).affine, OBLIQUE, atol=1e-4) and np.array_equal(np.asarray(nib.load(path).dataobj) > 0, wanted.label > 0)


@pytest.mark.contract('refused', 'images', '.mha or .nrrd where SimpleITK is not installed', 'the error says what to install')
def test_formats_of_itk_ask_for_simpleitk(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'SimpleITK', None)
    (tmp_path / 'a.nrrd').write_bytes(b'NRRD0004\n')
    with pytest.raises(InputError, match=r'a.nrrd: reading .nrrd needs SimpleITK, which is not installed; pip install SimpleITK, or convert'):
        read_header(tmp_path / 'a.nrrd')


def test_nrrd_without_spacing_is_refused(tmp_path):
    pytest.importorskip('SimpleITK')
    (tmp_path / 'a.nrrd').write_bytes(b'NRRD0004\ntype: uint8\ndimension: 3\nsizes: 4 4 4\nencoding: raw\n\n' + bytes(64))
    with pytest.raises(InputError, match='a.nrrd: no voxel size is known: its header has no space directions or spacings'):
        read_header(tmp_path / 'a.nrrd')


def scaled(path, ids: np.ndarray, slope: float, inter: float = 0.0):
    "Integers that stand for ids by a scaling, as the file has it."
    stored = np.round((ids.astype(float) - inter) / slope).astype(np.int16 if abs(slope) > 1e-4 or inter else np.uint16)
    made = nib.Nifti1Image(stored, OBLIQUE)
    nib.save(made, path)
    for field, value in (('scl_slope', slope), ('scl_inter', inter)):
        poke(path, field, value)
    return path


@pytest.mark.contract('converted', 'labels', 'ids such as 2.00003 from a scaling', 'rounded by what the scaling explains, 0.05 at most')
@pytest.mark.parametrize(('slope', 'inter'), [(4 / 65535, 0), (3 / 32767, 0.5), (0.01, 0), (2 / 255, 1), (0.5, 0), (1 / 3, 0), (1, 1)])
def test_scaled_ids_are_rounded(tmp_path, slope, inter):
    ids = (np.indices(SHAPE).sum(0) % 4).astype(np.uint8)
    path = scaled(tmp_path / 'seg.nii', ids, slope, inter)
    assert np.array_equal(read_label(path, 'msd')[0], ids)


@pytest.mark.contract('refused', 'labels', 'fractional ids that the scaling does not explain', 'the error names slope and intercept')
@pytest.mark.parametrize(('slope', 'value'), [(0.5, 1.5), (0.01, 2.2), (4 / 65535, 2.01)])
def test_what_scaling_does_not_explain_names_the_scaling(tmp_path, slope, value):
    ids = np.zeros(SHAPE)
    ids[3, 4, 5] = value
    with pytest.raises(InputError, match=rf'seg.nii: found fractional .* such as {value:.2g}\d*.*scl_slope {slope:g}.*expected integers'):
        read_label(scaled(tmp_path / 'seg.nii', ids, slope), 'msd')


@pytest.mark.contract('refused', 'labels', 'infinite or NaN voxels in a label map', 'the error counts them')
@pytest.mark.parametrize('value', [np.inf, -np.inf, np.nan])
def test_an_infinite_id_is_an_error(tmp_path, value):
    ids = np.zeros(SHAPE, np.float32)
    ids[3, 4, 5] = value
    nib.save(nib.Nifti1Image(ids, OBLIQUE), tmp_path / 'seg.nii.gz')
    with pytest.raises(InputError, match=r'seg.nii.gz: .*1 voxel.s. are NaN or infinite, expected integers'):
        read_label(tmp_path / 'seg.nii.gz', 'msd')


SHEAR = np.array([[1, 0.2, 0.05, 0], [0, 1, 0.1, 0], [0, 0, 1.2, 0], [0, 0, 0, 1.0]])


@pytest.mark.contract('works', 'images', 'axes that are not at right angles', 'volumes by the determinant, distances in the world')
def test_sheared_grids_have_volumes_and_distances_in_the_world(tmp_path):
    shape, pred, ref = (40, 44, 42), np.zeros((40, 44, 42), np.uint8), np.zeros((40, 44, 42), np.uint8)
    ref[10:30, 12:32, 10:30] = 3
    pred[12:33, 11:30, 8:29] = 3
    for name, voxels in (('pred', pred), ('ref', ref)):
        nib.save(nib.Nifti1Image(voxels, SHEAR), tmp_path / f'{name}.nii.gz')
    row = next(r for r in evaluate(tmp_path / 'pred.nii.gz', tmp_path / 'ref.nii.gz', pred_schema='msd', ref_schema='msd')[0] if r['name'] == 'ET')
    voxel_ml = abs(np.linalg.det(SHEAR[:3, :3])) / 1000
    assert row['volume_ref_ml'] == pytest.approx(8000 * voxel_ml) and row['volume_pred_ml'] == pytest.approx(21 * 19 * 21 * voxel_ml)
    assert Case('P', np.zeros((4, *shape), np.float32), Geometry(shape, SHEAR), ref).volume_ml('ET') == pytest.approx(row['volume_ref_ml'])
    hd95, assd = brute(pred > 0, ref > 0)
    assert row['hd95_mm'] == pytest.approx(hd95) and row['assd_mm'] == pytest.approx(assd)


def brute(pred, ref) -> tuple[float, float]:
    "HD95 and ASSD between border voxels, every pair measured in the world."
    from scipy import ndimage
    from scipy.spatial.distance import cdist
    a, b = (np.argwhere(m & ~ndimage.binary_erosion(m)) @ SHEAR[:3, :3].T for m in (pred, ref))
    apart = cdist(a, b)
    there, back = apart.min(1), apart.min(0)
    return max(np.percentile(there, 95), np.percentile(back, 95)), (there.sum() + back.sum()) / (len(there) + len(back))


def test_diameters_of_a_sheared_grid():
    from neuroseg3d.evaluation.diameters import lesion_diameters
    mask = np.zeros((40, 44, 42), bool)
    mask[10:30, 12:32, 20] = True
    (found,) = lesion_diameters(mask, Geometry(mask.shape, SHEAR), min_ml=0)
    ends = np.array([[9.5, 12, 0], [9.5, 31, 0], [29.5, 12, 0], [29.5, 31, 0], [10, 11.5, 0], [29, 11.5, 0], [10, 31.5, 0], [29, 31.5, 0]]) @ SHEAR[:3, :3].T
    longest = max(np.linalg.norm(p - q) for p in ends for q in ends)
    assert found.longest_mm == pytest.approx(longest)
    assert np.linalg.norm(found.ends_mm[0] - found.ends_mm[1]) == pytest.approx(longest)


def test_a_sheared_mask_has_no_qform(tmp_path):
    case = read_case(four(tmp_path / 'P', image(SHEAR)))
    written = nib.load(write_label(tmp_path / 'mask.nii.gz', BALL.astype(np.uint8), case))
    assert np.allclose(written.affine, SHEAR) and written.header['qform_code'] == 0
    made = Case('P', case.image, header_geometry(case.header, SHAPE))
    written = nib.load(write_label(tmp_path / 'made.nii.gz', BALL.astype(np.uint8), made))
    assert np.allclose(written.affine, SHEAR) and written.header['qform_code'] == 0


@pytest.mark.contract('refused', 'images', 'a header that claims more voxels than its file can hold', 'the error counts both; nothing is allocated')
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('shape, message', [((400, 400, 400), 'truncated: the header claims [0-9,]+ bytes of voxels, the file can hold [0-9,]+'),
                                            ((32000, 32000, 32000), 'the header claims 32,768,000,000,000 voxels, which need [0-9,.]+ GiB as float32')])
def test_a_header_that_claims_more_than_its_file_can_hold(tmp_path, shape, message, packed):
    folder = four(tmp_path / 'P', image(TWO, TWO), change=('dim', shape, slice(1, 4)))
    if packed:
        for path in sorted(folder.iterdir()):
            path.with_suffix('.nii.gz').write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        read_case(folder)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 20e6


@pytest.mark.contract('warned', 'images', 'signed distances of errors on a grid whose axes are not at right angles', 'the scale beside the picture and the mesh says that they are approximate')
@pytest.mark.parametrize('lean', [0.0, 0.3])
def test_distances_on_a_sheared_grid_are_called_approximate_beside_them(lean):
    image, label = ball_case(0)
    affine = np.diag([6.0, 6, 6, 1])
    affine[0, 2] = 6 * lean
    case, wrong = Case('P', np.moveaxis(image, -1, 0).copy(), Geometry(label.shape, affine), label), np.roll(label, 2, 0)
    shown = [t.get_text() for t in show_distances(case, wrong).texts]
    scale, _ = paint = error_paint(wrong, label, case.geometry)
    mesh = mesh_figure(case, wrong, label, paint={'signed error': paint}).to_json()
    for text in (' '.join(shown), scale.unit, mesh):
        assert 'mm from the border of the reference' in text
        assert ('mm from the border of the reference, approximate, as the axes of the scan lean on each other' in text) == bool(lean)


def test_an_affine_of_no_head_says_why():
    ok = np.array([[-0.9, 0.1, 0, 90], [0.1, 0.9, 0, -120], [0, 0, 3, -70], [0, 0, 0, 1.0]])
    check_affine(ok, 'ok')
    for spoilt, message in ((np.diag([np.nan, 1, 1, 1]), 'expected finite numbers'), (np.diag([1, 1, 0, 1.0]), 'singular'),
                            (np.diag([1, 1, 0.01, 1]), r'edges of 1 x 1 x 0.01 mm, expected 0.05 to 20 mm'), (np.diag([1e30, 1, 1, 1]), 'edges of 1e.30'),
                            (ok + 1e6 * np.eye(4, k=3), r'its first voxel lies 1,000,090 mm from the origin'),
                            (ok @ (np.eye(4) + 2 * np.eye(4, k=1) * [0, 1, 0, 0]), r'a voxel has 4\d% of the volume of its box')):
        with pytest.raises(InputError, match=message):
            check_affine(spoilt, 'a.nii')


def test_a_settled_header_has_one_affine():
    def header_of(sform=None, qform=None, unit='mm', pixdim=None, shape=(40, 44, 46)):
        header = nib.Nifti1Header()
        header.set_data_shape(shape)
        header.set_qform(qform, 1) if qform is not None else None
        header.set_sform(sform, 1) if sform is not None else None
        header.set_xyzt_units(unit)
        if pixdim is not None:
            header['pixdim'][1:4] = pixdim
        return header, np.array(header['pixdim'][1:4])

    two, one = np.diag([2, 2, 2, 1.0]), np.diag([1, 1, 1, 1.0])
    flipped = np.diag([-2, 2, 2, 1.0])
    for arguments, message, orientation in ((dict(sform=two, qform=one), 'sform has voxels of 2 x 2 x 2 mm in RAS, qform of 1 x 1 x 1 mm in RAS', 'RAS'),
                                            (dict(sform=two, qform=flipped), 'in RAS, qform of 2 x 2 x 2 mm in LAS', 'RAS'),
                                            (dict(sform=flipped, pixdim=1), 'pixdim has voxels of 1 x 1 x 1 mm, the affine of 2 x 2 x 2 mm', 'LAS')):
        with pytest.warns(UserWarning, match=message):
            settled = settle_header(*header_of(**arguments), 'a.nii')
        assert np.array_equal(settled.get_sform(), settled.get_qform()) and settled['pixdim'][1] == 2
        assert Geometry((2, 2, 2), settled.get_best_affine()).orientation == orientation
    for unit, factor in (('meter', 1e-3), ('micron', 1e3)):
        small = np.diag([factor, factor, factor, 1]) @ flipped
        with pytest.warns(UserWarning, match='converted to mm'):
            settled = settle_header(*header_of(small, small, unit), 'a.nii')
        assert np.allclose(settled.get_best_affine(), flipped) and settled.get_xyzt_units()[0] == 'mm' and settled['pixdim'][2] == 2
    header, pixdim = header_of(flipped, flipped)
    assert settle_header(header, pixdim, 'a.nii') is header  # not a byte is changed
    header, pixdim = header_of(pixdim=0)
    with pytest.raises(InputError, match='a.nii: no voxel size is known: pixdim is 0 x 0 x 0 mm'):
        settle_header(header, pixdim, 'a.nii')


SKEWED = np.array([[-1, 0, 0, 30], [0, -1.5, 0, 40], [0, 0, 2, -10], [0, 0, 0, 1.0]])
FOUR = np.random.default_rng(0).integers(1, 900, (21, 22, 23, 4)).astype(np.int16)
IDS = np.random.default_rng(1).integers(0, 4, (21, 22, 23)).astype(np.uint8)


def stored(path, array):
    "A file with these voxels."
    nib.save(nib.Nifti1Image(array, SKEWED), path)


def expect(message, call, *args):
    "An error of one line."
    with pytest.raises(InputError, match=message) as caught:
        call(*args)
    assert '\n' not in str(caught.value)


def read_all(path):
    "The four volumes of a file, checked as `read_case` does it."
    header = read_header(path)
    grid_shape(header, path, 4)
    check_memory(path, header)
    return [volume.copy() for volume in read_volumes(path)]  # the next one is read into the same memory


def test_damaged_files_are_refused_without_reading_voxels(tmp_path):
    stored(tmp_path / 'good.nii.gz', FOUR)
    content = (tmp_path / 'good.nii.gz').read_bytes()
    assert np.array_equal(np.stack(read_all(tmp_path / 'good.nii.gz'), -1), FOUR)

    (tmp_path / 'half.nii.gz').write_bytes(content[:len(content) // 2])
    expect('half.nii.gz: truncated', read_all, tmp_path / 'half.nii.gz')
    (tmp_path / 'head.nii.gz').write_bytes(content[:100])
    expect('head.nii.gz: truncated', read_all, tmp_path / 'head.nii.gz')
    (tmp_path / 'text.nii.gz').write_bytes(b'not gzip at all')
    expect("truncated or not a NIfTI file: found bytes b'not '", read_all, tmp_path / 'text.nii.gz')
    (tmp_path / 'empty.nii').write_bytes(b'')
    expect('truncated or not a NIfTI', read_all, tmp_path / 'empty.nii')
    expect('no such file', read_all, tmp_path / 'absent.nii.gz')
    stored(tmp_path / 'three.nii.gz', FOUR[..., :3])
    expect(r'found shape \(21, 22, 23, 3\), expected 4 channels', read_all, tmp_path / 'three.nii.gz')
    stored(tmp_path / 'slice.nii.gz', FOUR[:, :, 0, 0])
    expect(r'found a 2-D image of shape \(21, 22\)', read_all, tmp_path / 'slice.nii.gz')

    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000, 4))
    header.set_data_dtype(np.int16)
    header.set_sform(SKEWED, code=1)
    header['magic'], header['vox_offset'] = b'n+1', 352
    (tmp_path / 'huge.nii').write_bytes(header.binaryblock + b'\0' * 100)
    expect('the header claims 108,000,000,000,000 voxels', read_all, tmp_path / 'huge.nii')
    header.set_data_shape((210, 220, 230, 4))
    (tmp_path / 'hollow.nii').write_bytes(header.binaryblock + b'\0' * 100)
    expect('truncated: the header claims 85,008,000 bytes', read_all, tmp_path / 'hollow.nii')


def test_labels_without_a_schema_unknown_or_fractional(tmp_path):
    stored(tmp_path / 'l123.nii.gz', IDS)
    stored(tmp_path / 'l124.nii.gz', from_canonical(IDS, 'brats2017'))
    stored(tmp_path / 'l7.nii.gz', IDS + 4)
    stored(tmp_path / 'frac.nii.gz', IDS * np.float32(0.5))

    expect('ambiguous label schema: ids 0, 1, 2, 3 fit msd, brats2023, brats-peds and brats2013; name the schema', read_label, tmp_path / 'l123.nii.gz')
    for schema in ('msd', 'brats2023'):
        assert np.array_equal(from_canonical(read_label(tmp_path / 'l123.nii.gz', schema)[0], schema), IDS)
    expect(r'unknown label value\(s\) 3; schema .brats2017.', read_label, tmp_path / 'l123.nii.gz', 'brats2017')
    expect('ambiguous label schema: ids 0, 1, 2, 4 fit brats2017, brats2023, brats-peds and brats2013', read_label,
           tmp_path / 'l124.nii.gz')  # in BraTS 2024 the 4 is a resection cavity
    expect('unknown label values: found 4, 5, 6, 7', read_label, tmp_path / 'l7.nii.gz')
    expect('fractional or non-finite label values such as 0.5', read_label, tmp_path / 'frac.nii.gz')


def test_a_written_label_map_has_the_header_of_its_scan(tmp_path):
    image = nib.Nifti1Image(FOUR, SKEWED)
    image.header.set_qform(SKEWED, code=2)
    oblique = SKEWED.copy()
    oblique[:3, :3] = nib.eulerangles.euler2mat(0.1, 0.2, 0.3) @ SKEWED[:3, :3]
    image.header.set_sform(oblique, code=4)
    image.header.set_xyzt_units('mm', 'sec')
    nib.save(image, tmp_path / 'input.nii.gz')
    header = read_header(tmp_path / 'input.nii.gz')
    case = Case('input', np.moveaxis(FOUR, -1, 0).astype(np.float32), header_geometry(header, grid_shape(header, 'input', 4)), header=header)

    fields = ('qform_code', 'sform_code', 'quatern_b', 'quatern_c', 'quatern_d', 'qoffset_x', 'qoffset_y', 'qoffset_z',
              'srow_x', 'srow_y', 'srow_z', 'xyzt_units')
    for schema in SCHEMAS:
        written = nib.load(write_label(tmp_path / 'out' / f'{schema}.nii.gz', IDS, case, schema))
        for name in fields:
            assert written.header[name].tobytes() == case.header[name].tobytes(), name
        assert np.array_equal(written.header['pixdim'][:4], case.header['pixdim'][:4])
        assert written.shape == (21, 22, 23) and written.get_data_dtype() == np.uint8
        assert np.array_equal(written.affine, nib.load(tmp_path / 'input.nii.gz').affine)
        assert np.array_equal(np.asarray(written.dataobj), from_canonical(IDS, schema))
        back, grid, told = read_label(tmp_path / 'out' / f'{schema}.nii.gz')  # no schema named: the extension says it
        assert np.array_equal(back, IDS) and told == schema and grid.same_grid(case.geometry)
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == sorted(f'{schema}.nii.gz' for schema in SCHEMAS)

    with pytest.raises(InputError, match=r'label has shape \(21, 22, 22\), expected \(21, 22, 23\)'):
        write_label(tmp_path / 'out' / 'bad.nii.gz', IDS[..., 1:], case)
    assert not (tmp_path / 'out' / 'bad.nii.gz').exists()
