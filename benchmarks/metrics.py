"""Scores of one 240×240×155 case, three regions: seconds here, with MONAI and with surface-distance; values beside each other.

    python benchmarks/metrics.py --ref shared/data/msd/Task01_BrainTumour/labelsTr/BRATS_001.nii.gz

The predictions are made from the reference: shifted by two voxels, and shifted with 2,000 false voxels scattered over the volume.
Medians of five; results in benchmarks/results/metrics.json and metrics.md.
"""
from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from statistics import median

import numpy as np

warnings.filterwarnings('ignore')
RESULTS = Path(__file__).resolve().parent / 'results'
REGIONS = ('WT', 'TC', 'ET')


def predictions(ref: np.ndarray) -> dict[str, np.ndarray]:
    "A good and a bad prediction."
    rng, shifted = np.random.default_rng(0), np.roll(ref, 2, axis=0)
    scattered = shifted.copy()
    scattered.ravel()[rng.choice(ref.size, 2000, replace=False)] = 3
    return {'shifted by 2 voxels': shifted, 'and 2,000 scattered voxels': scattered}


def ours(pred, ref) -> list[float]:
    "HD95 and surface Dice by region."
    from neuroseg3d.metrics import score_case
    rows = score_case(pred, ref, (1, 1, 1), structures=REGIONS)
    return [v for row in rows for v in (row['hd95_mm'], row['nsd'])]


def ours_lesions(pred, ref) -> list[float]:
    "The same with lesion-wise scores."
    from neuroseg3d.metrics import score_case
    rows = score_case(pred, ref, (1, 1, 1), structures=REGIONS, lesions=True)
    return [v for row in rows for v in (row['hd95_mm'], row['nsd'])]


def monai(pred, ref) -> list[float]:
    "HD95 and surface Dice of MONAI."
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    from neuroseg3d.core import labels_to_regions
    p, r = (torch.from_numpy(labels_to_regions(x))[None].float() for x in (pred, ref))
    shared = {'include_background': True, 'spacing': (1.0, 1.0, 1.0)}
    hd95 = compute_hausdorff_distance(p, r, percentile=95, **shared)[0].tolist()
    nsd = compute_surface_dice(p, r, [1.0] * 3, use_subvoxels=True, **shared)[0].tolist()
    return [v for pair in zip(hd95, nsd) for v in pair]


def surface_distance(pred, ref) -> list[float]:
    "Surface Dice of DeepMind's package; its HD95 is of surfels, by area."
    import surface_distance as deepmind

    from neuroseg3d.core import labels_to_regions
    values = []
    for p, r in zip(labels_to_regions(pred), labels_to_regions(ref)):
        found = deepmind.compute_surface_distances(r, p, (1, 1, 1))
        values += [deepmind.compute_robust_hausdorff(found, 95), deepmind.compute_surface_dice_at_tolerance(found, 1.0)]
    return values


def main() -> None:
    import nibabel as nib
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--ref', required=True, help='label map in MSD ids')
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    ref = np.asarray(nib.load(args.ref).dataobj).astype(np.uint8)
    results = {}
    for name, pred in predictions(ref).items():
        for tool in (ours, ours_lesions, monai, surface_distance):
            seconds = []
            values = tool(pred, ref)
            for _ in range(args.repeats):
                began = time.perf_counter()
                tool(pred, ref)
                seconds.append(time.perf_counter() - began)
            results.setdefault(name, {})[tool.__name__] = {'seconds': median(seconds), 'hd95_mm': values[::2], 'nsd': values[1::2]}
            print(name, tool.__name__, round(median(seconds), 2), [round(v, 4) for v in values], flush=True)
            write(results, args.repeats)


def write(results: dict, repeats: int) -> None:
    "As JSON and as a page."
    RESULTS.mkdir(exist_ok=True)
    load = os.getloadavg()
    (RESULTS / 'metrics.json').write_text(json.dumps({'load_average': load, 'cores': os.cpu_count(), 'cases': results}, indent=1) + '\n')
    lines = ['# Metrics beside MONAI and surface-distance', '', f'240×240×155, three regions, medians of {repeats}, '
             f'{os.cpu_count()} cores, load average {load[0]:.1f}. Written by `benchmarks/metrics.py`.', '',
             '| prediction | tool | seconds | HD95 mm WT / TC / ET | surface Dice WT / TC / ET |', '|---|---|---|---|---|']
    for name, tools in results.items():
        for tool, r in tools.items():
            lines.append(f"| {name} | {tool.replace('_', ' ')} | {r['seconds']:.2f} | {' / '.join(f'{v:.3f}' for v in r['hd95_mm'])}"
                         f" | {' / '.join(f'{v:.4f}' for v in r['nsd'])} |")
    lines += ['', 'HD95 of surface-distance is between surfels and weighted by area, so that it differs from the other two.']
    (RESULTS / 'metrics.md').write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
