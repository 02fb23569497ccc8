"Real patients in every layout and orientation, where they are at hand (../shared/data)."
from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuroseg3d.networks.checkpoint import Model, load_model
from neuroseg3d.evaluation.evaluate import evaluate
from neuroseg3d.inference.predict import infer_file
from neuroseg3d.studies.layouts import find_cases, find_study

REAL = Path(__file__).resolve().parent.parent.parent / 'shared' / 'data'
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason=f'no real cases at {REAL.name}/ beside the project')


def studies():
    return [*find_cases(REAL / 'msd'), *find_cases(REAL / 'brats2021'), *find_cases(REAL / 'tcga')] if REAL.is_dir() else []


@pytest.fixture(scope='module')
def model() -> Model:
    "The model that comes with the package."
    return load_model()


FIELDS = ('qform_code', 'sform_code', 'quatern_b', 'quatern_c', 'quatern_d', 'qoffset_x', 'qoffset_y', 'qoffset_z',
          'srow_x', 'srow_y', 'srow_z', 'xyzt_units')


@pytest.mark.parametrize('study', studies(), ids=lambda s: s.id)
def test_label_map_lies_on_the_patients_own_grid(study, model, tmp_path):
    schema = study.schema or 'msd'
    infer_file(model, study, tmp_path / f'{study.id}.nii.gz')
    source = nib.load(next(iter(study.images.values())))
    label = nib.load(tmp_path / f'{study.id}.nii.gz')
    assert label.shape == source.shape[:3]
    assert np.array_equal(label.affine, source.affine)
    for field in FIELDS:
        assert label.header[field].tobytes() == source.header[field].tobytes(), field
    found = np.unique(np.asarray(label.dataobj))
    assert set(found) <= ({0, 1, 2, 4} if schema == 'brats2017' else {0, 1, 2, 3}) and len(found) > 1
    measured = np.any([np.asanyarray(nib.load(p).dataobj) != 0 for p in study.images.values()], axis=0)
    assert not np.asarray(label.dataobj)[~(measured.any(-1) if measured.ndim == 4 else measured)].any(), 'tumour in air'
    reference, ref_schema = study.label, None
    if study.id == 'TCGA-DU-7294':
        ref_schema = 'brats2017'
    if study.id == 'TCGA-06-1802':
        reference, ref_schema = REAL / 'tcga/TCGA-06-1802/tcga_06_1802_hd_glio_predict.nii.gz', 'edema=1,enhancing=2'
    rows, _ = evaluate(tmp_path / f'{study.id}.nii.gz', reference, tmp_path / 'scores', ref_schema=ref_schema
                       or study.schema)
    assert {r['name'] for r in rows} >= {'WT', 'TC', 'ET'}
    assert next(r for r in rows if r['name'] == 'WT')['missed'] == 0, 'the tumour was not found at all'
    assert (tmp_path / 'scores' / 'metrics.csv').is_file() and (tmp_path / 'scores' / 'summary.json').is_file()


@pytest.mark.parametrize('name', ['BRATS_001', 'TCGA-06-1802'])  # a 4-D file, RAS; four files, thick slices, LAS
def test_model_space_is_that_of_monais_own_chain(name, model):
    "From the files on, and back: MONAI's reader, crop, orientation, spacing and normalisation."
    import torch
    from monai.transforms import Compose, ConcatItemsd, EnsureChannelFirstd, Invertd, LoadImaged

    from neuroseg3d.training.augment import model_space_transforms
    from neuroseg3d.studies.cases import read_case
    from neuroseg3d.studies.preprocess import regions_to_native, to_model_space
    study = next(s for s in studies() if s.id == name)
    files = {path.name: str(path) for path in study.images.values()}
    chain = Compose([LoadImaged(files), EnsureChannelFirstd(files), ConcatItemsd(files, 'image'), *model_space_transforms(model.space).transforms])
    theirs, ours = chain(files), to_model_space(read_case(study, with_label=False), model.space)
    assert theirs['image'].shape == ours.image.shape and np.allclose(theirs['image'].affine, ours.record.model.affine, atol=1e-5)
    assert (theirs['image'].as_tensor() - ours.image).abs().max() < 1e-3
    p = torch.nn.functional.avg_pool3d(ours.image[:3], 5, 1, 2).sigmoid()  # anything smooth, in the place of a prediction
    back = Invertd('pred', chain, orig_keys='image', nearest_interp=False, to_tensor=True)({**theirs, 'pred': theirs['image'][:3].set_array(p)})
    masks = regions_to_native(p, ours.record, 0.6)
    assert masks.any() and ((back['pred'].numpy() >= 0.6) == masks).mean() > 0.9999


@pytest.mark.parametrize('study', [s for s in studies() if s.label and s.schema], ids=lambda s: s.id)
def test_training_sees_what_inference_sees(study, model):
    "MONAI's transforms, by which training cases come into model space, against the way that inference takes: not a bit differs."
    import torch

    from neuroseg3d.studies.cases import read_case
    from neuroseg3d.training.data import Prepare
    from neuroseg3d.studies.preprocess import to_model_space
    there = to_model_space(read_case(study), model.space)
    trained = Prepare(model.space)(study)
    assert torch.equal(trained.image, there.image) and torch.equal(trained.label, there.label)


def test_orientations_are_those_that_the_data_is_known_for():
    from neuroseg3d.studies.cases import read_case
    codes = {s.id: read_case(s, with_label=False).geometry.orientation for s in studies()
             if s.id in ('BRATS_001', 'BraTS2021_01477', 'TCGA-06-1802', 'TCGA-DU-7294')}
    assert codes == {'BRATS_001': 'RAS', 'BraTS2021_01477': 'LPS', 'TCGA-06-1802': 'LAS', 'TCGA-DU-7294': 'LPS'}


def test_regions_of_the_decathlon_case_have_their_published_volumes():
    "WT / TC / ET of BRATS_001 in mL, as counted by hand from the label map: sum of voxels / 1000."
    from neuroseg3d.studies.cases import read_case
    study = find_study(REAL / 'msd/Task01_BrainTumour/imagesTr/BRATS_001.nii.gz')
    case, ids = read_case(study), np.asarray(nib.load(study.label).dataobj)
    for region, members in {'WT': (1, 2, 3), 'TC': (2, 3), 'ET': (3,)}.items():
        assert np.isclose(case.volume_ml(region), sum((ids == m).sum() for m in members) / 1000)
