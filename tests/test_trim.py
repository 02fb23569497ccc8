"A scan without its air tells the same: place in the patient, scores to the bit, remarks, identity and pages; and takes little memory."
import tracemalloc

import nibabel as nib
import numpy as np
import pytest

from neuroseg3d.casepage import ReportOptions, case_html
from neuroseg3d.cases import widen
from neuroseg3d.core import Case, Geometry
from neuroseg3d.identity import identify
from neuroseg3d.nifti import write_label
from neuroseg3d.phantom import make_phantom
from neuroseg3d.report import _row, read_results

SMALL = ReportOptions(width_in=4, dpi=40, mesh_faces=300, mesh_grid_mm=8)
SPACING, SHAPE, NAMES = (2.0, 2.5, 4.0), (130, 104, 60), ('flair', 't1', 't1ce', 't2')


def scan_of(image, label, affine):
    return Case('P1', image, Geometry(label.shape, affine), label, 'msd')


@pytest.fixture(scope='module')
def patient():
    "A head in a large field of view, in which it lies off the middle."
    case = make_phantom(3, SPACING, SHAPE)
    affine = case.geometry.affine.copy()
    affine[:3, 3] = np.round(affine[:3, 3])  # sums of halves are exact wherever they begin
    return scan_of(np.roll(case.image, (9, -6), (1, 2)), np.roll(case.label, (9, -6), (0, 1)), affine)


def write(case, folder, prediction, dtype=np.int16, orientation=None):
    "A cohort of one case, of four files, and a folder of one prediction."
    def turned(volume):
        image = nib.Nifti1Image(volume, case.geometry.affine)
        if orientation is None:
            return image
        codes = [nib.orientations.axcodes2ornt(c) for c in ('RAS', orientation)]
        return image.as_reoriented(nib.orientations.ornt_transform(*codes))

    place = folder / 'cohort' / case.id
    place.mkdir(parents=True)
    for name, volume in zip(NAMES, case.image):
        nib.save(turned(volume.astype(dtype)), place / f'{case.id}_{name}.nii.gz')
    nib.save(turned(case.label), place / f'{case.id}_seg.nii.gz')
    nib.save(turned(prediction), folder / f'{case.id}.nii.gz')
    (folder / 'predictions').mkdir()
    (folder / f'{case.id}.nii.gz').rename(folder / 'predictions' / f'{case.id}.nii.gz')
    return folder / 'predictions', folder / 'cohort'


def both(predictions, cohort):
    "What is read whole and what is read without the air."
    return [next(read_results(predictions, cohort, 'msd', 'msd', trim=trim)) for trim in (False, True)]


def inside(values, case):
    "Whether a volume of the scan is nothing but what the case holds of it."
    return np.count_nonzero(values) == np.count_nonzero(values[case.box])


def check_same(whole, held):
    "Everything that a report says."
    assert held.case.image.size < 0.7 * whole.case.image.size and held.case.geometry.voxel_ml == whole.case.geometry.voxel_ml
    assert held.case.scan.same_grid(whole.case.geometry, 0) and held.case.geometry.spacing_mm == whole.case.geometry.spacing_mm
    for ours, theirs in [(held.prediction, whole.prediction), (held.reference, whole.reference), *zip(held.case.image, whole.case.image)]:
        assert np.array_equal(ours, theirs[held.case.box]) and inside(theirs, held.case) and ours.dtype == theirs.dtype
    start = [b.start for b in held.case.box]
    for voxel in ((0, 0, 0), (5, 7, 11)):
        assert np.allclose(held.case.geometry.affine @ [*voxel, 1], whole.case.geometry.affine @ [*np.add(voxel, start), 1], atol=1e-9)
    assert held.rows == whole.rows and held.flags == whole.flags and held.expected_dice == pytest.approx(whole.expected_dice, rel=1e-6)
    assert identify(held.case) == identify(whole.case)
    assert case_html(held, options=SMALL) == case_html(whole, options=SMALL)
    ours, theirs = (_row(r, 'p.html') for r in (held, whole))
    assert ours.thumbnail == theirs.thumbnail and ours.volumes == theirs.volumes and np.array_equal(ours.confusion, theirs.confusion)


def wrong(label):
    "A prediction with errors of each kind, some of them in the air."
    found = np.roll(label, (2, -1, 1), (0, 1, 2))
    found[(found == 3) & (np.indices(found.shape)[2] % 5 == 0)] = 2
    found[2:6, 50:54, 20:24] = 1
    return found


def test_without_the_air(patient, tmp_path):
    whole, held = both(*write(patient, tmp_path, wrong(patient.label), orientation='PIL'))
    assert 0.5 < whole.rows[0]['dice'] < 0.95
    check_same(whole, held)


def test_faults_of_the_scan(patient, tmp_path):
    "A sequence that lies beside the others, one that is not there, tumour at the edge of the image, a voxel in a corner of it."
    image, label = patient.image.copy(), patient.label.copy()
    image[1], image[2] = np.roll(image[1], 5, 0), 0
    image[3, 0, 0, 0], label[:4, 40:44, 20:24] = 7, 1
    predictions, cohort = write(scan_of(image, label, patient.geometry.affine), tmp_path, label, np.float32)
    (cohort / 'P1' / 'P1_t1ce.nii.gz').unlink()
    whole, held = both(predictions, cohort)
    assert {'T1w lies', 'T1gd is', 'the prediction'} <= {' '.join(f.split()[:2]) for f in whole.flags}
    assert any('edge of the image' in f for f in whole.flags)
    check_same(whole, held)


def test_what_lies_beside_the_prediction(patient, tmp_path):
    "Probabilities far from the brain widen the box."
    label = patient.label
    predictions, cohort = write(patient, tmp_path, label)
    p = np.stack([np.where(np.isin(label, ids), 240, 0) for ids in ((1, 2, 3), (2, 3), (3,))]).astype(np.uint8)
    p[0, 120:124, 5:9, 3:6] = 90
    (predictions / 'probabilities').mkdir()
    nib.save(nib.Nifti1Image(np.moveaxis(p, 0, -1), patient.geometry.affine), predictions / 'probabilities' / 'P1.nii.gz')
    whole, held = both(predictions, cohort)
    assert np.array_equal(held.entropy['WT'], held.case.cut(whole.entropy['WT'])) and inside(whole.entropy['WT'], held.case)
    check_same(whole, held)


def test_memory(tmp_path):
    "Four sequences are never whole in memory at once: what is held, and the peak, stay far below the scan's as single precision."
    shape = (220, 200, 180)
    image, label = np.zeros((4, *shape), np.float32), np.zeros(shape, np.uint8)
    box = (slice(80, 120), slice(60, 130), slice(90, 125))
    image[(slice(None), *box)], label[box] = np.random.default_rng(0).integers(1, 900, (4, 40, 70, 35)), 1
    predictions, cohort = write(scan_of(image, label, np.diag([1.5, 1.5, 1.5, 1])), tmp_path, label)
    full = image.nbytes
    tracemalloc.start()
    try:
        result = next(read_results(predictions, cohort, 'msd', 'msd', trim=True))
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert result.case.image.shape[1:] != shape and now < full / 10 and peak < 0.6 * full


def test_a_label_map_of_a_box_lies_where_it_should(patient, tmp_path):
    _, held = both(*write(patient, tmp_path, patient.label))
    assert widen(held.case, patient.label) is held.case
    path = write_label(tmp_path / 'label.nii.gz', held.prediction, held.case)
    stored = nib.load(path)
    assert np.allclose(stored.affine, held.case.geometry.affine, atol=1e-4) and np.array_equal(np.asarray(stored.dataobj), held.prediction)
