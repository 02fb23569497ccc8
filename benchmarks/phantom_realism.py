"""Phantoms beside real cases: the same statistics, and the same pictures.

    python benchmarks/phantom_realism.py ../shared/data --out phantom_realism.png

Prints, for every real case with a label and for as many phantoms as asked for: volumes, the best single FLAIR threshold, and
z-scores by label. Writes one row of pictures a case: four sequences and the label, in the axial slice that holds most tumour
core. The picture shows real patients: it is for looking at, not for the repository.
"""
import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np

from neuroseg3d.studies.cases import read_case
from neuroseg3d.core import MODALITIES, REGIONS, Case, InputError
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.phantom import best_threshold_dice, label_contrast, make_phantom


def real_cases(folder: Path) -> list[Case]:
    "Every labelled case below a folder whose files can be read; the others are named."
    cases = []
    for study in find_cases(folder):
        try:
            case = read_case(study)
        except InputError as error:
            print(f'left out: {error}')
            continue
        if case.label is not None:
            cases.append(case)
    return cases


def case_row(case: Case) -> str:
    "Volumes, threshold Dice and z-scores of one case, as a line of text."
    ml = ' / '.join(f'{case.volume_ml(region):5.1f}' for region in REGIONS)
    dice = best_threshold_dice(case.image[0], case.label > 0)
    scores = '; '.join(f'{name} ' + ' '.join(f'{m:+.1f}±{s:.1f}' for m, s in values)
                       for name, values in label_contrast(case).items())
    brain = case.brain.sum() * case.geometry.voxel_ml
    return f'{case.id:24s} {brain:5.0f} mL  {ml} mL  threshold {dice:.2f}  {scores}'


def summary(title: str, cases: list[Case]) -> str:
    "Mean over cases, with the range of the cases' means in brackets."
    dice = [best_threshold_dice(case.image[0], case.label > 0) for case in cases]
    lines = [f'{title} ({len(cases)} cases): best single FLAIR threshold, mean Dice {np.mean(dice):.2f}']
    tables = [label_contrast(case) for case in cases]
    for name in ('necrotic/non-enh.', 'edema', 'enhancing', 'rest of the brain'):
        values = np.array([table[name] for table in tables if name in table])
        if len(values):
            cells = (f'{m.mean():+.1f}±{s.mean():.1f} [{m.min():+.1f}, {m.max():+.1f}]'
                     for m, s in zip(values[:, :, 0].T, values[:, :, 1].T))
            lines.append(f'  {name:18s} ' + '  '.join(cells))
    return '\n'.join(lines)


def axial(case: Case) -> tuple[np.ndarray, np.ndarray, float]:
    "Images (4, x, y) and label (x, y) of the slice with most core, in RAS, cut to the brain; height over width of a pixel."
    turn = nib.io_orientation(case.geometry.affine)
    image = np.stack([nib.apply_orientation(channel, turn) for channel in case.image])
    label = nib.apply_orientation(case.label, turn)
    spacing = [case.geometry.spacing_mm[int(np.flatnonzero(turn[:, 0] == axis)[0])] for axis in range(3)]
    at = int(np.argmax((label >= 2).sum(axis=(0, 1)) * 1000 + (label > 0).sum(axis=(0, 1))))
    x, y = (np.flatnonzero((image[0, :, :, at] != 0).any(axis=a)) for a in (1, 0))
    box = (slice(x[0], x[-1] + 1), slice(y[0], y[-1] + 1), at)
    return image[(slice(None), *box)], label[box], spacing[1] / spacing[0]


def draw_row(panels: np.ndarray, case: Case) -> None:
    "Four sequences and the label of a case."
    images, label, aspect = axial(case)
    for panel, name, image, volume in zip(panels, MODALITIES, images, case.image):
        brain = volume[volume != 0]
        low, high = brain.mean() - 2.5 * brain.std(), brain.mean() + 3.5 * brain.std()
        panel.imshow(np.where(image != 0, image, low).T, cmap='gray', origin='lower', vmin=low, vmax=high, aspect=aspect)
        panel.set_title(f'{case.id}\n{name}' if name == MODALITIES[0] else name, fontsize=7)
    panels[4].imshow(images[0].T, cmap='gray', origin='lower', aspect=aspect)
    panels[4].imshow(np.ma.masked_equal(label.T, 0), vmin=1, vmax=3, alpha=0.6, origin='lower', aspect=aspect)


def main() -> None:
    "Read, print, draw."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('real', type=Path, help='folder with real cases in any layout that neuroseg3d reads')
    parser.add_argument('--out', type=Path, default=Path('phantom_realism.png'), help='picture to write')
    parser.add_argument('--phantoms', type=int, default=8, help='how many phantoms')
    parser.add_argument('--spacing', type=float, default=1.0, help='edge length of their voxels in mm')
    given = parser.parse_args()
    real = real_cases(given.real)
    made = [make_phantom(seed, given.spacing) for seed in range(given.phantoms)]
    for case in [*real, *made]:
        print(case_row(case))
    for title, cases in (('real', real), ('phantoms', made)):
        if cases:
            print(summary(title, cases))
    figure, panels = plt.subplots(len(real) + len(made), 5, figsize=(9, 2.1 * (len(real) + len(made))), squeeze=False)
    for row, case in zip(panels, [*real, *made]):
        draw_row(row, case)
    for panel in panels.ravel():
        panel.axis('off')
    figure.tight_layout(pad=0.3)
    figure.savefig(given.out, dpi=80)
    print(f'wrote {given.out}')


if __name__ == '__main__':
    main()
