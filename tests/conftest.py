"Paths and helpers that every test shares."
from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]


@pytest.fixture(scope='session')
def root() -> Path:
    "The top of the project."
    return ROOT


def toy_cohort(folder: Path, n: int) -> Path:
    "A cohort in MSD layout that costs next to nothing: ellipsoids of 24 x 28 x 22 voxels of 6 mm, a nested tumour in each."
    import json

    import nibabel as nib
    import numpy as np
    shape, affine = (24, 28, 22), np.diag([6.0, 6.0, 6.0, 1.0])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing='ij'), -1)
    names = [f'TOY_{i:03d}' for i in range(n)]
    for part in ('imagesTr', 'labelsTr'):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        distance = np.linalg.norm(grid - rng.uniform([9, 10, 9], [14, 17, 13]), axis=-1)
        brain = np.linalg.norm((grid - [11.5, 13.5, 10.5]) / [10, 12, 9], axis=-1) < 1
        label = np.where(brain, np.select([distance < 1.6, distance < 2.8, distance < 4.5], [2, 3, 1], 0), 0).astype(np.uint8)
        contrast = rng.uniform(60, 140, (4, 4))[:, label]  # a grey value for each sequence and tissue
        image = np.moveaxis(np.where(brain, contrast + rng.normal(0, 12, (4, *shape)), 0), 0, -1)
        nib.save(nib.Nifti1Image(image.clip(0).astype(np.int16), affine), folder / 'imagesTr' / f'{name}.nii.gz')
        nib.save(nib.Nifti1Image(label, affine), folder / 'labelsTr' / f'{name}.nii.gz')
    content = {'name': 'toy', 'modality': {'0': 'FLAIR', '1': 'T1w', '2': 't1gd', '3': 'T2w'}, 'numTraining': n, 'numTest': 0,
               'labels': {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'}, 'test': [],
               'training': [{'image': f'./imagesTr/{x}.nii.gz', 'label': f'./labelsTr/{x}.nii.gz'} for x in names]}
    (folder / 'dataset.json').write_text(json.dumps(content))
    return folder
