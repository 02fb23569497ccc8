"Patches are a function of seed and step: not of workers, threads, cache, resumption or the number of processes."
from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from balls import ball_cohort
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroseg3d.core import MODALITIES, InputError
from neuroseg3d.studies.identity import patient_of
from neuroseg3d.studies.layouts import Study, find_cases
from neuroseg3d.studies.preprocess import Space
from neuroseg3d.studies.split import load_split, make_split, save_split
from neuroseg3d.training.augment import Augment
from neuroseg3d.training.data import Data, Machine, PatchDataset, Prepare, SegmentationData, StepSampler, cached_cases, make_loader, plan_machine

STRONG = Augment(rotation_p=0.5, scaling_p=0.5, noise_p=0.5, blur_p=0.5, brightness_p=0.5, contrast_p=0.5,
                 low_resolution_p=0.5, gamma_p=0.5, gamma_inverted_p=0.5, modality_dropout_p=0.3)


def write_cohort(folder, n):
    "Cases of a size from which patches of the usual sizes can be cut."
    return ball_cohort(folder, n, shape=(48, 56, 44), spacing_mm=1.0)


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    return write_cohort(tmp_path_factory.mktemp('cohort') / 'balls', 6)


@pytest.fixture(scope='module')
def cases(cohort, tmp_path_factory):
    "The same cases in RAM and on disk."
    studies = find_cases(cohort)
    return {c: cached_cases(studies, Space(), c, tmp_path_factory.mktemp('cache'), 2, progress=False) for c in ('ram', 'disk')}


def same(a, b):
    return a['case_id'] == b['case_id'] and torch.equal(a['image'], b['image']) and torch.equal(a['label'], b['label'])


def batches(patches, loader, workers, start=0, end=6, rank=0, world=1):
    machine = Machine(cores=4, ram_gb=8, shm_gb=8)
    plan = plan_machine(Data(loader=loader, workers=workers), machine=machine)
    return list(make_loader(patches, StepSampler(2, start, end, rank, world), plan))


@pytest.mark.parametrize('cache,loader,workers', [('disk', 'process', 2), ('ram', 'thread', 1), ('disk', 'thread', 3)])
def test_workers_do_not_matter(cases, cache, loader, workers):
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # the main process has more threads than a worker: sums must not differ
    try:
        reference = batches(PatchDataset(cases['ram'], (40, 42, 44), seed=7, augment=STRONG), 'none', 0)
        patches = PatchDataset(cases[cache], (40, 42, 44), seed=7, augment=STRONG)
        for start in (2,) if loader == 'process' else (0, 4):  # a process takes seconds to start
            found = batches(patches, loader, workers, start)
            assert len(found) == 6 - start and all(same(a, b) for a, b in zip(found, reference[start:]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_workers_are_never_forked(cases):
    "A process forked after threads have multiplied matrices can hang in MKL's allocator."
    patches = PatchDataset(cases['ram'], (24, 24, 24), seed=7)
    plan = plan_machine(Data(loader='process', workers=1), machine=Machine(cores=4, ram_gb=8, shm_gb=8))
    loader = make_loader(patches, StepSampler(2, 0, 2), plan)
    assert loader.multiprocessing_context.get_start_method() != 'fork'
    assert plan_machine(Data(), machine=Machine(cores=4, ram_gb=8, shm_gb=8)).loader == 'thread'


def test_global_generators_neither_matter_nor_change(cases):
    patches = PatchDataset(cases['ram'], (24, 24, 24), seed=7, augment=STRONG)
    torch.manual_seed(1), np.random.seed(1)
    first = [patches[i] for i in range(6)]
    torch.manual_seed(2), np.random.seed(2)
    state, np_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert all(same(patches[i], first[i]) for i in reversed(range(6)))
    batches(patches, 'thread', 2)
    assert torch.equal(state, torch.random.get_rng_state()) and np.array_equal(np_state, np.random.get_state()[1])


def test_another_process_makes_the_same_patches(cohort, cases):
    code = '''
import hashlib, sys, torch
from neuroseg3d.training.augment import Augment
from neuroseg3d.training.data import PatchDataset, Prepare
from neuroseg3d.studies.layouts import find_cases
torch.set_num_threads(3)
patches = PatchDataset([Prepare()(s) for s in find_cases(sys.argv[1])], (24, 24, 24), seed=7, augment=Augment())
print([hashlib.sha256(patches[i]['image'].numpy().tobytes()).hexdigest() for i in range(40, 52)])
'''
    import hashlib
    patches = PatchDataset(cases['disk'], (24, 24, 24), seed=7, augment=Augment())
    expected = [hashlib.sha256(patches[i]['image'].numpy().tobytes()).hexdigest() for i in range(40, 52)]
    found = subprocess.run([sys.executable, '-c', code, str(cohort)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(expected)


def test_processes_of_a_run_share_the_batch(cases):
    patches = PatchDataset(cases['ram'], (16, 16, 16), augment=Augment.off())
    one = batches(patches, 'none', 0)
    two = [batches(patches, 'none', 0, rank=r, world=2) for r in (0, 1)]
    for whole, a, b in zip(one, *two):
        assert torch.equal(whole['image'], torch.cat([a['image'], b['image']]))


def test_patches_larger_than_the_volume(cases):
    patches = PatchDataset(cases['disk'], (96, 96, 96), augment=STRONG)
    for i in range(12):
        patch = patches[i]
        assert patch['image'].shape == (4, 96, 96, 96) and patch['label'].shape == (1, 96, 96, 96)
        assert torch.isfinite(patch['image']).all() and patch['label'].max() <= 3
        outside = (patch['image'] == 0).all(0)
        assert outside.float().mean() > 0.5


def test_labels_stay_on_the_image(cases):
    "Bright tumour and label move together, however a patch is turned."
    geometric = Augment(**{**vars(Augment.off()), 'rotation_p': 1.0, 'scaling_p': 1.0, 'mirror_p': 0.5})
    patches = PatchDataset(cases['ram'], (40, 40, 40), foreground_fraction=1.0, augment=geometric)
    for i in range(12):
        patch = patches[i]
        tumour, brain = patch['label'][0] > 0, patch['image'][0] != 0
        inside, outside = patch['image'][0][tumour], patch['image'][0][brain & ~tumour]
        assert len(inside) > 50 and inside.mean() > outside.mean() + 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(2, 40), visits=st.lists(st.integers(1, 4), min_size=40, max_size=40), folds=st.integers(2, 6),
       seed=st.integers(0, 99))
def test_no_patient_is_in_two_folds(tmp_path_factory, n, visits, folds, seed):
    file = tmp_path_factory.getbasetemp() / 'empty.nii.gz'
    studies = [Study(f'BraTS-GLI-{p:05d}-{v:03d}', 'brats2023', dict.fromkeys(MODALITIES, file)) for p in range(n)
               for v in range(visits[p])]
    with pytest.MonkeyPatch.context() as patch:  # by name alone: nothing is known of their voxels
        patch.setattr('neuroseg3d.studies.split._look_at_all', lambda studies, *_: {s.id: {'files': {}, 'identity': {'voxels': {}, 'thumbnails': {}}} for s in studies})
        split = make_split(studies, folds, seed)
    assert (split.n_folds, split.asked_folds) == ((folds, None) if n >= folds else (n, folds))
    folds = split.n_folds
    homes = {}
    for i, case in split.cases.items():
        assert homes.setdefault(patient_of(i), case['fold']) == case['fold']
    sizes = np.bincount(list(homes.values()), minlength=folds)
    assert sizes.max() - sizes.min() <= 1
    for fold in range(folds):
        assert sorted(split.train(fold) + split.val(fold)) == sorted(s.id for s in studies)


def test_module_refuses_what_it_cannot_train_on(cohort, tmp_path):
    with pytest.raises(InputError, match='data.download'):
        SegmentationData(Data(root=str(tmp_path / 'nowhere'))).prepare_data()
    bare = write_cohort(tmp_path / 'bare', 2)
    for file in (bare / 'labelsTr').iterdir():
        file.unlink()
    with pytest.raises(InputError, match='has a label map|no label'):
        SegmentationData(Data(root=str(bare), n_folds=2), progress=False).prepare_data()


@pytest.mark.contract('refused', 'splits', 'a file that was replaced since the cohort was split', 'the error names the file')
def test_module_notices_a_changed_cohort(tmp_path):
    root = write_cohort(tmp_path / 'balls', 4)
    config = Data(root=str(root), n_folds=2, cache_dir=str(tmp_path / 'cache'), cache='disk', patch_size=(16, 16, 16))
    module = SegmentationData(config, progress=False)
    module.prepare_data()
    module.setup()
    label = root / 'labelsTr' / 'BALL_Tr00.nii.gz'
    image = nib.load(label)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine), label)
    with pytest.raises(InputError, match='BALL_Tr00.nii.gz is not the file that was split .*; put back .*, or delete .*split_2folds_seed0.json'):
        SegmentationData(config, progress=False).setup()


def test_a_label_of_the_same_size_and_date_is_noticed(tmp_path):
    "By the split and by the cache, whose files are named after the content of a case."
    root = write_cohort(tmp_path / 'balls', 2)
    label, (study, _) = root / 'labelsTr' / 'BALL_Tr00.nii', find_cases(root).labelled
    plain = nib.load(study.label)
    ids = np.asarray(plain.dataobj)
    nib.save(nib.Nifti1Image(ids, plain.affine), label)  # without compression: another content has the same size
    study.label.unlink()
    study = replace(study, label=label)
    split, before = make_split([study, find_cases(root).labelled[1]], 2), label.stat()
    stored = cached_cases([study], Space(), 'disk', tmp_path / 'cache', progress=False, split=split)[0]
    assert cached_cases([study], Space(), 'disk', tmp_path / 'cache', progress=False)[0].path == stored.path  # with or without a split
    other = ids[::-1].copy()
    nib.save(nib.Nifti1Image(other, plain.affine), label)
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (label.stat().st_size, label.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    again = cached_cases([study], Space(), 'disk', tmp_path / 'cache', progress=False)[0]
    assert again.path != stored.path and not torch.equal(again.cut((0, 0, 0), again.shape)['label'], stored.cut((0, 0, 0), stored.shape)['label'])
    save_split(split, tmp_path / 'split.json')
    with pytest.raises(InputError, match='BALL_Tr00.nii is not the file that was split'):
        load_split(tmp_path / 'split.json', [study, find_cases(root).labelled[1]])


def test_a_missing_split_is_dealt_again_alike(tmp_path):
    root = write_cohort(tmp_path / 'balls', 5)
    config = Data(root=str(root), n_folds=2, cache_dir=str(tmp_path / 'cache'), cache='ram')
    first = SegmentationData(config, progress=False)
    first.setup()
    digest = first.split.digest
    first.split_path.unlink()
    second = SegmentationData(config, progress=False)
    second.setup()
    assert second.split.digest == digest
    assert sorted(c.id for c in second.train_cases) == second.split.train(0)


def test_preparing_is_the_one_preprocessing(cohort, cases):
    "What is cached, which MONAI's transforms made, is bit for bit what `to_model_space` gives inference."
    from neuroseg3d.studies.cases import read_case
    from neuroseg3d.studies.preprocess import to_model_space
    for study, stored in zip(find_cases(cohort), cases['disk']):
        model = to_model_space(read_case(study), Space())
        whole = stored.cut((0, 0, 0), stored.shape)
        assert torch.equal(whole['image'], model.image) and torch.equal(whole['label'], model.label)
        assert torch.equal(Prepare()(study).image, model.image)


def test_a_cache_folder_that_cannot_be_made_is_named(cohort, tmp_path):
    (tmp_path / 'file').write_text('in the way')
    config = Data(root=str(cohort), n_folds=2, cache_dir=str(tmp_path / 'file' / 'cache'))
    with pytest.raises(InputError, match='data.cache_dir: .*file/cache cannot be made'):
        SegmentationData(config, progress=False).prepare_data()
