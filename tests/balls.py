"A cohort that takes a moment to make: balls within a ball, in the layout of the Decathlon, for tests of what goes on around the network."
from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

import nibabel as nib
import numpy as np

SHAPE, SPACING_MM = (26, 31, 23), 6.0


def ball_case(seed: int, shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    "Image (x, y, z, 4) and label (x, y, z): a brain, in it edema, in that a core, in that what enhances."
    rng = np.random.default_rng(seed)
    grid = np.moveaxis(np.indices(shape), 0, -1) - np.array(shape) / 2
    brain = ((grid / (np.array(shape) / 2 - 2)) ** 2).sum(-1) < 1
    from_tumour = np.linalg.norm(grid - rng.uniform(-4, 4, 3), axis=-1)
    label = np.zeros(shape, np.uint8)
    for value, radius in zip((1, 2, 3), rng.uniform(0.85, 1.15) * np.array([6.5, 4.5, 2.8])):
        label[brain & (from_tumour < radius)] = value
    means = np.array([[100, 100, 100, 100], [190, 90, 95, 180], [170, 70, 80, 170], [160, 110, 200, 140]])[label]
    image = np.where(brain[..., None], means + rng.normal(0, 12, (*shape, 4)), 0).clip(0)
    return image.astype(np.float32), label


def state_order(folder: Path) -> Path:
    "A dataset.json that says in which order the channels of the 4-D files of a folder are."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'dataset.json').write_text(json.dumps({'modality': {'0': 'FLAIR', '1': 'T1w', '2': 'T1gd', '3': 'T2w'}}))
    return folder


def ball_cohort(folder: Path, n: int, n_test: int = 0, shape: tuple[int, int, int] = SHAPE, spacing_mm: float = SPACING_MM) -> Path:
    "Write cases for training and for test."
    affine = np.diag([spacing_mm] * 3 + [1.0])
    names = {part: [f'BALL_{part}{i:02}' for i in range(count)] for part, count in (('Tr', n), ('Ts', n_test))}
    for part, some in names.items():
        for kind in ('images', 'labels'):
            (folder / f'{kind}{part}').mkdir(parents=True)
        for name in some:
            image, label = ball_case(crc32(name.encode()), shape)
            nib.save(nib.Nifti1Image(image, affine), folder / f'images{part}' / f'{name}.nii.gz')
            nib.save(nib.Nifti1Image(label, affine), folder / f'labels{part}' / f'{name}.nii.gz')
    about = {'name': 'BALLS', 'tensorImageSize': '4D', 'modality': {'0': 'FLAIR', '1': 'T1w', '2': 't1gd', '3': 'T2w'},
             'labels': {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'},
             'numTraining': n, 'numTest': n_test, 'test': [f'./imagesTs/{x}.nii.gz' for x in names['Ts']],
             'training': [{'image': f'./imagesTr/{x}.nii.gz', 'label': f'./labelsTr/{x}.nii.gz'} for x in names['Tr']]}
    (folder / 'dataset.json').write_text(json.dumps(about))
    return folder


def ball_model(path: Path, **about) -> Path:
    "A checkpoint of a network with random weights, for balls of 6 mm."
    import torch

    from neuroseg3d.networks.checkpoint import KEY, describe, save_checkpoint
    from neuroseg3d.config import to_dict
    from neuroseg3d.studies.preprocess import Space
    from neuroseg3d.networks.unet import UNet, UNetConfig
    from neuroseg3d.networks.windows import Windows
    settings = UNetConfig(preset='tiny', filters=(4, 8), strides=(1, 2))
    config = {'model': to_dict(settings), 'space': to_dict(Space((SPACING_MM,) * 3)), 'infer': to_dict(Windows((32, 32, 32))),
              'loss': {'targets': 'regions'}, 'optim': {'ema_decay': 0.0}}
    torch.manual_seed(0)
    weights = {f'network.{k}': v for k, v in UNet(settings).state_dict().items()}
    save_checkpoint({'state_dict': weights, KEY: describe(config, {'schema': 'msd', **about})}, path)
    return path
