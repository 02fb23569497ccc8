"A scan as it is goes in, its label map comes out on the same grid: every orientation, type, scale, layout, in one process."
from __future__ import annotations

import json
import subprocess
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from io import StringIO
from itertools import combinations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from balls import state_order
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from neuroseg3d.core import MODALITIES, Case, Geometry, InputError, labels_to_regions
from neuroseg3d.inference.cohort import infer_cohort, tune_rules
from neuroseg3d.inference.predict import infer_file, predict_case, read_probabilities, write_extra
from neuroseg3d.networks import windows
from neuroseg3d.networks.checkpoint import Model, load_model
from neuroseg3d.networks.windows import FLIPS, Windows, predict_probabilities
from neuroseg3d.phantom.cohort import make_phantom
from neuroseg3d.review.dashboard import Cohort
from neuroseg3d.review.report import read_results
from neuroseg3d.studies.cases import read_case
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.nifti import store_facts, write_label
from neuroseg3d.studies.preprocess import Space, to_model_space

CODES = [''.join(c) for axes in ('RAS', 'RSA', 'ARS', 'ASR', 'SRA', 'SAR')
         for c in product(*[{'R': 'RL', 'A': 'AP', 'S': 'SI'}[a] for a in axes])]
GEOMETRY = ('qform_code', 'sform_code', 'quatern_b', 'quatern_c', 'quatern_d', 'qoffset_x', 'qoffset_y', 'qoffset_z',
            'srow_x', 'srow_y', 'srow_z', 'xyzt_units')


class Threshold(torch.nn.Module):
    "A network that is exact by construction: what it says of a voxel depends on that voxel alone."

    def forward(self, x):
        flair, t1gd = x[:, 0], x[:, 2]
        return 20 * torch.stack([flair - 1.2, torch.minimum(flair - 1.2, t1gd - 0.2), torch.minimum(flair - 1.2, t1gd - 1.5)], 1)


def model(spacing_mm=(4.0, 4.0, 4.0), network=None) -> Model:
    return Model([network or Threshold()], Space(spacing_mm), Windows(roi_size=(24, 24, 24), precision='32'), 'regions', [{'schema': 'msd'}], [Path('stand-in')])


@pytest.fixture(scope='module')
def phantom():
    return make_phantom(3, spacing_mm=4)


def stored(case, code='RAS', turn=np.eye(4), dtype=np.int16, slope=None) -> nib.Nifti1Image:
    "The phantom as a 4-D image, along other axes, placed obliquely, as another type."
    ornt = ornt_transform(axcodes2ornt('RAS'), axcodes2ornt(code))
    voxels = apply_orientation(np.moveaxis(case.image, 0, -1), ornt)
    affine = turn @ case.geometry.affine @ inv_ornt_aff(ornt, case.geometry.shape)
    image = nib.Nifti1Image(np.ascontiguousarray(voxels), affine)
    image.header.set_data_dtype(dtype)
    image.header.set_slope_inter(slope or 1, 0)
    image.header.set_qform(affine, code=2)
    image.header.set_sform(affine, code=4)
    image.header.set_xyzt_units('mm', 'sec')
    return image


def check_space(written: Path, source: Path) -> np.ndarray:
    "Shape and every field of the geometry, byte for byte; returns the label map."
    label, image = nib.load(written), nib.load(source)
    assert label.shape == image.shape[:3] and label.get_data_dtype() == np.uint8
    for name in GEOMETRY:
        assert label.header[name].tobytes() == image.header[name].tobytes(), name
    assert np.array_equal(label.header['pixdim'][:4], image.header['pixdim'][:4])
    assert np.array_equal(label.affine, image.affine)
    return np.asarray(label.dataobj)


def dice(a, b):
    return [2 * (x & y).sum() / max(1, x.sum() + y.sum()) for x, y in zip(labels_to_regions(a), labels_to_regions(b))]


def test_every_orientation_gives_the_same_mask_in_the_world(phantom, tmp_path):
    state_order(tmp_path)
    expected = predict_case(model(), phantom).label
    assert np.bincount(expected.ravel(), minlength=4).min() > 0  # every label is found, else nothing is tested
    for code in CODES:
        source = tmp_path / f'{code}.nii'
        nib.save(stored(phantom, code), source)
        infer_file(model(), source, tmp_path / 'out' / f'{code}.nii')
        label = check_space(tmp_path / 'out' / f'{code}.nii', source)
        back = apply_orientation(label, ornt_transform(axcodes2ornt(code), axcodes2ornt('RAS')))
        assert min(dice(back, expected)) >= 0.99, code
    assert len(CODES) == 48


def test_a_tilted_head_gives_the_same_mask(phantom, tmp_path):
    "The affine turns, the voxels stay: model space follows the nearest axes, so that the mask is the same voxel by voxel."
    state_order(tmp_path)
    expected = predict_case(model(), phantom).label
    for angles in ((0.1, 0.2, 0.3), (-0.4, 0.3, -0.2)):
        turn = np.eye(4)
        turn[:3, :3] = nib.eulerangles.euler2mat(*angles)
        turn[:3, 3] = 11, -7, 3
        nib.save(stored(phantom, 'LPS', turn), tmp_path / 'tilted.nii.gz')
        infer_file(model(), tmp_path / 'tilted.nii.gz', tmp_path / 'out.nii.gz')
        label = check_space(tmp_path / 'out.nii.gz', tmp_path / 'tilted.nii.gz')
        assert min(dice(label[::-1, ::-1], expected)) >= 0.99


@pytest.mark.parametrize('suffix', ['.nii', '.nii.gz'])
@pytest.mark.parametrize('kind,slope', [(np.int16, None), (np.uint16, None), (np.float32, None), (np.float64, None),
                                        (np.int16, 0.25)])
def test_every_type_is_read_as_nibabel_reads_it(phantom, tmp_path, kind, slope, suffix):
    state_order(tmp_path)
    source = tmp_path / f'a{suffix}'
    nib.save(stored(phantom, 'LAS', dtype=kind, slope=slope), source)
    case = read_case(source)
    reference = np.moveaxis(nib.load(source).get_fdata(dtype=np.float32), -1, 0)
    assert case.image.dtype == np.float32 and np.array_equal(case.image, reference)
    infer_file(model(), source, tmp_path / 'out' / f'a{suffix}')
    check_space(tmp_path / 'out' / f'a{suffix}', source)


def test_anisotropic_voxels_and_four_files(phantom, tmp_path):
    "Every other slice of the phantom, as four files: same grid out, and about the same tumour."
    image = stored(phantom, 'LPS')
    affine = image.affine @ np.diag([1, 1, 2, 1])
    files = {m: tmp_path / f'P_{m}.nii.gz' for m in MODALITIES}
    for c, path in enumerate(files.values()):
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:, :, ::2, c].astype(np.int16), affine), path)
    infer_file(model(), files, tmp_path / 'out.nii.gz')
    label = check_space(tmp_path / 'out.nii.gz', files['FLAIR'])
    whole = predict_case(model(), phantom).label[::-1, ::-1]
    assert dice(label, whole[:, :, ::2])[0] > 0.9


def test_a_mirrored_head_gets_the_mirrored_mask_from_a_network_that_is_not_symmetric(phantom):
    "With all flips, and windows that lie the same from both ends, on axes that windows cannot divide."
    from neuroseg3d.networks.unet import UNet, UNetConfig
    torch.manual_seed(0)
    network = UNet(UNetConfig(filters=(4, 6), strides=(1, 2), deep_supervision=0))
    image = to_model_space(phantom, Space((4.0, 4.0, 4.0))).image[:, :21, :33, :15]
    config = Windows(roi_size=(12, 16, 16), tta_flips=FLIPS, precision='32')
    straight = predict_probabilities(network, image, config)
    for axes in ((1,), (2, 3)):
        assert torch.allclose(predict_probabilities(network, image.flip(axes), config).flip(axes), straight, atol=1e-5)


class Witness(Threshold):
    "Keeps the first window that it is shown: the whole volume, where windows are as large."

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x):
        self.seen = x[0].clone() if self.seen is None else self.seen
        return super().forward(x)


def cohort_of(case, folder: Path) -> Path:
    "A cohort of one case in the layout of the Decathlon."
    names = {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'}
    for part, image in (('imagesTr', stored(case)), ('labelsTr', nib.Nifti1Image(case.label, case.geometry.affine))):
        (folder / part).mkdir(parents=True)
        nib.save(image, folder / part / 'P_1.nii.gz')
    (folder / 'dataset.json').write_text(json.dumps({'modality': dict(enumerate(MODALITIES)), 'labels': names}))
    return folder


def holds_patch(volume: torch.Tensor, patch: torch.Tensor) -> bool:
    "Whether a patch is a part of a volume, with zeros around it."
    size = patch.shape[1]
    padded, middle = torch.nn.functional.pad(volume, [size] * 6), size // 2
    places = (padded[0] == patch[0, middle, middle, middle]).nonzero() - middle
    return any(torch.equal(padded[:, x:x + size, y:y + size, z:z + size], patch) for x, y, z in places.tolist())


def test_training_validation_inference_uncertainty_and_explanation_see_the_same_arrays(phantom, tmp_path):
    "What reaches the network is the same in every room, bit for bit: there is one preprocessing."
    from neuroseg3d.evaluation import attribution as xai
    from neuroseg3d.evaluation.uncertainty import assess_case, validation_case
    from neuroseg3d.training.augment import Augment
    from neuroseg3d.training.data import Data, SegmentationData
    root = cohort_of(phantom, tmp_path / 'cohort')
    case = read_case(find_cases(root)[0])
    whole = replace(model(), windows=Windows(roi_size=(999, 999, 999), precision='32'))
    expected = to_model_space(case, whole.space).image
    rooms = {'inference': lambda m: predict_case(m, replace(case, label=None)), 'uncertainty': lambda m: assess_case(m, case),
             'calibration': lambda m: validation_case(m, case), 'Shapley values': lambda m: xai.shapley_values(m, case),
             'maps': lambda m: xai.ask(m, case, 'WT').score()}
    for room, enter in rooms.items():
        witness = Witness()
        enter(replace(whole, networks=[witness]))
        assert torch.equal(witness.seen, expected), room
    for cache in ('ram', 'disk'):
        settings = Data(root=str(root), cache_dir=str(tmp_path / cache), n_folds=1, loader='none', cache=cache, patch_size=(9, 9, 9))
        module = SegmentationData(settings, whole.space, Augment.off(), progress=False)
        module.setup('fit')
        assert torch.equal(next(iter(module.val_dataloader()))['image'][0], expected), cache
        module.end_step = 2
        patches = torch.cat([batch['image'] for batch in module.train_dataloader()])
        assert len(patches) == 4 and all(holds_patch(expected, patch) for patch in patches), cache
        assert not holds_patch(expected, patches[0] + 1e-3)


FITS = ('one window', 'sums on the CPU', 'the CPU alone')


@pytest.mark.parametrize('fits', FITS)
def test_out_of_memory_steps_down_and_says_so(fits, monkeypatch):
    "The steps from a GPU that is too small; the last one is taken for real, whatever plan it belongs to."
    real, tried, said = windows._predict, [], []
    enough = {'one window': lambda p: p.batch == 1, 'sums on the CPU': lambda p: p.sums.type == 'cpu',
              'the CPU alone': lambda p: p.device.type == 'cpu'}[fits]

    def cramped(networks, image, config, activation, plan, *rest):
        tried.append(plan)
        if not enough(plan):
            raise torch.OutOfMemoryError('CUDA out of memory')
        return real(networks, image, config, activation, windows._Plan(torch.device('cpu'), torch.device('cpu'), 1), *rest)

    monkeypatch.setattr(windows, '_predict', cramped)
    monkeypatch.setattr(torch.nn.Module, 'to', lambda self, *args, **kwargs: self)  # there is no GPU to move to
    image = torch.rand(4, 20, 21, 22)
    found = predict_probabilities(Threshold(), image, Windows(roi_size=(16, 16, 16), batch=4, precision='32'), device='cuda', say=said.append)
    monkeypatch.undo()
    assert torch.equal(found, predict_probabilities(Threshold(), image, Windows(roi_size=(16, 16, 16), precision='32')))
    names = ['network on cuda, sums on cuda, 4 window(s) at a time', 'network on cuda, sums on cuda, 1 window(s) at a time',
             'network on cuda, sums on cpu, 1 window(s) at a time', 'network on cpu, sums on cpu, 1 window(s) at a time']
    assert [str(plan) for plan in tried] == names[:len(tried)] and len(tried) == 2 + FITS.index(fits)
    assert said == [f'out of memory ({a}); trying again: {b}' for a, b in zip(names, names[1:len(tried)])]


def test_memory_that_never_suffices_is_an_error():
    class Full(Threshold):
        def forward(self, x):
            raise torch.OutOfMemoryError('out of memory')

    with pytest.raises(torch.OutOfMemoryError):
        predict_probabilities(Full(), torch.rand(4, 20, 21, 22), Windows(roi_size=(16, 16, 16), batch=2), say=lambda line: None)


def test_nothing_is_found_where_nothing_was_measured(phantom, tmp_path):
    "A network that calls all it sees enhancing tumour, asked about voxels of 3 mm of a brain of 4 mm voxels: the brain and no more."
    class Everywhere(torch.nn.Module):
        def forward(self, x):
            return torch.full_like(x[:, :3], 2.0)

    asked = model((3.0, 3.0, 3.0), Everywhere())
    for missing in ((), (0, 1, 3)):
        image = phantom.image.copy()
        image[list(missing)] = 0
        case = replace(phantom, image=image)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            prediction = predict_case(asked, case, 'cpu')
        assert np.array_equal(prediction.label > 0, (image != 0).any(0)) and set(np.unique(prediction.label)) == {0, 3}
        for kind in ('probabilities', 'entropy'):
            volume = nib.load(write_extra(tmp_path / 'extra.nii.gz', prediction, case, kind)).get_fdata()
            assert not volume[~case.brain].any() and volume[case.brain].any()


def test_the_starter_model_gives_the_same_mask_in_the_world(phantom):
    "Flipped, rotated and re-oriented copies, through a network that is neither local nor symmetric."
    starter = load_model()
    expected = predict_case(starter, phantom, 'cpu').label
    assert labels_to_regions(expected).sum((1, 2, 3)).min() > 10
    for code in ('LAS', 'RPI', 'ARS', 'LPS', 'IPR'):  # mirrored; turned over; a quarter turn; as DICOM has it; all at once
        ornt = ornt_transform(axcodes2ornt('RAS'), axcodes2ornt(code))
        image = np.moveaxis(apply_orientation(np.moveaxis(phantom.image, 0, -1), ornt), -1, 0)
        grid = Geometry(image.shape[1:], phantom.geometry.affine @ inv_ornt_aff(ornt, phantom.geometry.shape))
        label = predict_case(starter, Case('copy', image, grid), 'cpu').label
        back = apply_orientation(label, ornt_transform(axcodes2ornt(code), axcodes2ornt('RAS')))
        assert min(dice(back, expected)) >= 0.99, code


def test_stored_probabilities_say_which_region_each_volume_is(phantom, tmp_path):
    "Also to whoever reads them: the report, the dashboard and the search for rules read by name, not by place."
    cohort, pred = tmp_path / 'cohort', tmp_path / 'pred'
    for c, name in enumerate(('flair', 't1', 't1ce', 't2')):
        (cohort / 'P').mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(phantom.image[c], phantom.geometry.affine), cohort / 'P' / f'P_{name}.nii.gz')
    write_label(cohort / 'P' / 'P_seg.nii.gz', phantom.label, phantom, 'brats2017')
    infer_cohort(model(), find_cases(cohort), pred, report=lambda line: None, extras=('probabilities', 'entropy'))
    path = pred / 'probabilities' / 'P.nii.gz'
    image, shape = nib.load(path), phantom.geometry.shape
    check_space(pred / 'P.nii.gz', cohort / 'P' / 'P_flair.nii.gz')
    assert all(image.header[name].tobytes() == nib.load(pred / 'P.nii.gz').header[name].tobytes() for name in GEOMETRY)
    assert json.loads(image.header.extensions[0].get_content())['volumes'] == ['WT', 'TC', 'ET']
    assert image.header['descrip'].item() == b'WT, TC, ET along the fourth axis'
    assert json.loads(nib.load(pred / 'entropy' / 'P.nii.gz').header.extensions[0].get_content())['unit'] == 'bit'
    stored, rules = read_probabilities(path, shape), tune_rules(pred, cohort)
    assert np.array_equal(stored, np.moveaxis(np.asarray(image.dataobj.get_unscaled()), -1, 0)) and not np.array_equal(*stored[:2])
    doubt = [next(read_results(pred, cohort)).entropy, Cohort(cohort, pred).open('P').entropy]

    def rewrite(volumes, order=(2, 0, 1), dtype=np.uint8):
        header = nib.Nifti1Header()
        header.set_data_dtype(dtype)
        store_facts(header, {'volumes': volumes} if volumes else {})
        nib.save(nib.Nifti1Image(np.moveaxis(stored[list(order)], 0, -1).astype(dtype), phantom.geometry.affine, header), path)

    rewrite(['ET', 'WT', 'TC'])  # the same in another order
    assert np.array_equal(read_probabilities(path, shape), stored) and tune_rules(pred, cohort) == rules
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(doubt[0].values(), next(read_results(pred, cohort)).entropy.values()))
    assert np.array_equal(doubt[1], Cohort(cohort, pred).open('P').entropy)
    rewrite(None, (0, 1, 2))  # as before they said it
    assert np.array_equal(read_probabilities(path, shape), stored)
    rewrite(['WT', 'TC', 'necrosis'])
    with pytest.raises(InputError, match='P.nii.gz: found volumes WT, TC, necrosis, expected WT, TC, ET'):
        read_probabilities(path, shape)
    rewrite(['WT', 'TC', 'ET'], dtype=np.float32)
    with pytest.raises(InputError, match=r'P.nii.gz: found shape .* of float32, expected .* of uint8'):
        tune_rules(pred, cohort)


@pytest.mark.parametrize('codes', [(1, 0), (0, 1), (3, 2), (0, 0)])
@pytest.mark.parametrize('kind', [nib.Nifti1Image, nib.Nifti2Image])
def test_codes_units_and_kind_of_file_are_kept(phantom, tmp_path, kind, codes):
    "Files that say where they lie by one of the two ways, by both with different words, or not at all."
    state_order(tmp_path)
    like, header = stored(phantom, 'LPS'), kind.header_class()
    header.set_data_shape(like.shape)
    header.set_qform(like.affine, codes[0])
    header.set_sform(like.affine @ np.diag((1, 1, 1.01, 1)), codes[1])
    header.set_xyzt_units('unknown', 'msec')
    nib.save(kind(np.asarray(like.dataobj, np.float32), None, header), source := tmp_path / 'a.nii')
    with pytest.warns(UserWarning, match='neither qform nor sform') if codes == (0, 0) else nullcontext():
        infer_file(model(), source, tmp_path / 'out.nii.gz')
    check_space(tmp_path / 'out.nii.gz', source)
    assert type(nib.load(tmp_path / 'out.nii.gz')) is kind and [int(nib.load(source).header[f'{f}form_code']) for f in 'qs'] == list(codes)


def test_every_subset_of_the_sequences_is_taken(phantom, tmp_path):
    files, image = {}, stored(phantom)
    for c, modality in enumerate(MODALITIES):
        files[modality] = tmp_path / f'P_{modality}.nii'
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., c].astype(np.int16), image.affine), files[modality])
    for n in (1, 2, 3):
        for names in combinations(MODALITIES, n):
            with pytest.warns(UserWarning, match=', '.join(m for m in MODALITIES if m not in names)):
                made = infer_file(model(), [files[m] for m in names], tmp_path / 'out.nii', allow_missing=True)
            assert made.missing == [m for m in MODALITIES if m not in names] and (tmp_path / 'out.nii').is_file()
            (tmp_path / 'out.nii').unlink()


def test_missing_sequences_are_zeros_and_said(phantom, tmp_path):
    image = stored(phantom)
    for c, modality in enumerate(MODALITIES):
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., c].astype(np.int16), image.affine), tmp_path / f'P_{modality}.nii.gz')
    some = [tmp_path / 'P_FLAIR.nii.gz', tmp_path / 'P_T2w.nii.gz']
    with pytest.raises(InputError, match='missing modality T1w, T1gd'):
        infer_file(model(), some, tmp_path / 'out.nii.gz')
    with pytest.warns(UserWarning, match='T1w, T1gd missing, taken as zeros'):
        prediction = infer_file(model(), some, tmp_path / 'out.nii.gz', allow_missing=True)
    assert not prediction.model_case.image[1:3].any() and prediction.model_case.image[0].any()
    assert torch.isfinite(prediction.model_case.image).all()
    check_space(tmp_path / 'out.nii.gz', some[0])
    assert prediction.missing == ['T1w', 'T1gd'] and prediction.volumes_text.endswith('ET not assessable without T1gd')
    assert replace(prediction, model_case=replace(prediction.model_case, image=torch.ones(4, 2, 2, 2))).volumes_text.endswith(' mL')


def test_a_failed_case_leaves_nothing(phantom, tmp_path):
    state_order(tmp_path)
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise RuntimeError('no such kernel')

    (tmp_path / 'in').mkdir()
    nib.save(stored(phantom), tmp_path / 'in' / 'a.nii.gz')
    whole = (tmp_path / 'in' / 'a.nii.gz').read_bytes()
    (tmp_path / 'in' / 'b.nii.gz').write_bytes(whole[:len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (tmp_path / 'in' / 'c.nii.gz').write_bytes(bytes(damaged))
    studies, lines = find_cases(tmp_path / 'in'), []
    failures = infer_cohort(model(), studies, tmp_path / 'out', report=lines.append, extras=('probabilities', 'entropy'))
    assert 'about' in lines[0] and lines[0].endswith('the first of 3 case(s)') and [line[:5] for line in lines[1:]] == ['[1/3]', '[2/3]', '[3/3]']
    assert sorted(failures) == ['b', 'c'] and all('truncated or damaged' in e for e in failures.values()), failures
    assert sorted(p.relative_to(tmp_path / 'out').as_posix() for p in (tmp_path / 'out').rglob('*') if p.is_file()) == [
        'a.nii.gz', 'entropy/a.nii.gz', 'manifest.json', 'probabilities/a.nii.gz']
    failures = infer_cohort(model(network=Broken()), studies[:1], tmp_path / 'broken', report=lines.append)
    assert failures == {'a': 'RuntimeError: no such kernel'} and not list((tmp_path / 'broken').rglob('*.nii.gz'))


def test_ensembles_and_flips_average_probabilities(phantom):
    class Says(torch.nn.Module):
        def __init__(self, logit):
            super().__init__()
            self.logit = logit

        def forward(self, x):
            return torch.full((len(x), 3, *x.shape[2:]), self.logit)

    pair = replace(model(), networks=[Says(-1.0), Says(8.0)])
    p = predict_case(pair, phantom).probabilities
    inside = p[p > 0]
    mean = (torch.tensor([-1.0, 8.0]).sigmoid()).mean()
    assert torch.allclose(inside, mean.expand_as(inside), atol=1e-5) and abs(mean - torch.tensor(3.5).sigmoid()) > 0.1


def test_a_segmentation_imports_nothing_heavy_that_it_does_not_need(phantom, tmp_path):
    "With the starter model, whose rules drop small parts."
    state_order(tmp_path)
    nib.save(stored(phantom), tmp_path / 'a.nii.gz')
    code = f"""
import sys
from neuroseg3d.cli import main
sys.argv = ['neuroseg3d', 'infer', '--input_image', {str(tmp_path / 'a.nii.gz')!r}, '--output_dir', {str(tmp_path / 'out')!r}, '--save_probabilities']
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{'monai', 'pytorch_lightning', 'matplotlib', 'plotly', 'pandas', 'scipy.ndimage', 'scipy.optimize', 'skimage', 'sklearn'}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'about' in done.stdout and 'window(s)' in done.stdout and (tmp_path / 'out' / 'a.nii.gz').is_file()


def test_a_cohort_has_a_bar_with_the_time_left_where_someone_watches(monkeypatch):
    class Terminal(StringIO):
        def isatty(self):
            return True

    from neuroseg3d.cli import _case_bar
    for screen in (Terminal(), StringIO()):
        monkeypatch.setattr(sys, 'stderr', screen)
        with _case_bar(3, True) as report:
            report('[1/3] a: WT 1.0 mL')
            report('[2/3] b: WT 1.0 mL')
        assert ('1/3 [00:00<' in screen.getvalue()) == screen.isatty()  # cases, time so far < time left


MEASURE = """
import re, sys
from pathlib import Path
import torch
from neuroseg3d.networks.unet import PRESETS, UNet
from neuroseg3d.networks.windows import Windows, predict_cost, predict_probabilities
name, edge = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
torch.set_num_threads(1)
network = UNet(PRESETS[name]).eval().requires_grad_(False).to(memory_format=torch.channels_last_3d)
image, windows = torch.randn(4, edge + 3, edge, edge - 2), Windows((edge,) * 3, overlap=0, precision='32')
def peak():  # of this process alone: ru_maxrss begins with that of its parent
    return int(re.search('VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024 / 1e6
before = peak()
predict_probabilities(network, image, windows)
print(peak() - before, predict_cost(network, image, windows).memory_mb)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak is read from /proc')
@pytest.mark.parametrize('name, edge', [('tiny', 48), ('tiny', 112), ('base', 56)])
def test_the_forecast_of_memory_is_within_a_factor_of_two(name, edge):
    "A small window, for which what kernels keep counts most; a large one; one of a network without a strided stem."
    done = subprocess.run([sys.executable, '-c', MEASURE, name, str(edge)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, forecast = map(float, done.stdout.split())
    assert 0.5 < peak / forecast < 2, f'{name}, window of {edge}: forecast {forecast:.0f} MB, peak {peak:.0f} MB'


MEMBERS = """
import re, sys
from pathlib import Path
import torch
from neuroseg3d.networks.unet import PRESETS, UNet
from neuroseg3d.networks.windows import FLIPS, Windows, predict_probabilities
torch.set_num_threads(1)
networks = [UNet(PRESETS['tiny']).eval().requires_grad_(False) for _ in range(3)]
image, many = torch.rand(4, 128, 128, 128), sys.argv[1] == 'many'
predict_probabilities(networks if many else networks[0], image, Windows((64,) * 3, overlap=0, precision='32', tta_flips=FLIPS if many else FLIPS[:1]))
print(int(re.search('VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024 / 1e6)
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='the peak is read from /proc')
def test_networks_and_flips_add_memory_for_one_volume_only():
    "Three networks and eight flips are 24 members; kept side by side they would take 24 volumes of probabilities."
    peaks = []
    for members in ('one', 'many'):
        done = subprocess.run([sys.executable, '-c', MEMBERS, members], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(float(done.stdout))
    volume = 3 * 128 ** 3 * 4 / 1e6
    assert peaks[1] - peaks[0] < 3 * volume, f'{peaks[0]:.0f} MB, with 24 members {peaks[1]:.0f} MB; a volume takes {volume:.0f} MB'
