"""The measures of this library beside MONAI and surface-distance, on whole volumes: seconds, and how far the values differ.

    python benchmarks/metrics.py --data data/brats2021

Every case of the cohort is scored for WT, TC and ET against a prediction made from its own reference, whose contours a smooth
random field moves to and fro by some millimetres. Each package gets the whole volume, as
its users give it. Medians of `--repeats` runs, on as many threads as `--threads`; the first run is not counted. The results go
into benchmarks/results/metrics.json and metrics.md.
"""
from __future__ import annotations

import argparse
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

RESULTS = Path(__file__).resolve().parent / 'results'
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument('--data', required=True, help='a cohort with references')
parser.add_argument('--repeats', type=int, default=3)
parser.add_argument('--threads', type=int, default=2)
args = parser.parse_args()
os.environ['OMP_NUM_THREADS'] = str(args.threads)
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.threads])
warnings.filterwarnings('ignore')

import monai.metrics  # noqa: E402
import numpy as np  # noqa: E402
import surface_distance  # noqa: E402
import torch  # noqa: E402
from scipy import ndimage  # noqa: E402

from neuroseg3d.core import REGIONS, labels_to_regions, regions_to_labels  # noqa: E402
from neuroseg3d.studies.layouts import find_cases  # noqa: E402
from neuroseg3d.evaluation.metrics import lesion_scores, score_case, surface_dice, surfel_hausdorff_mm  # noqa: E402
from neuroseg3d.studies.nifti import read_label  # noqa: E402

TOLERANCE_MM = 1.0


def moved(ref: np.ndarray, seed: int) -> np.ndarray:
    "A plausible prediction: the contours of a reference moved by a smooth random field."
    field = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=ref.shape), 4)
    field *= 1.5 / field.std()
    inside = lambda m: ndimage.distance_transform_edt(m) - ndimage.distance_transform_edt(~m)
    return regions_to_labels(np.stack([inside(m) + field > 0 if m.any() else m for m in labels_to_regions(ref)]))


def ours(pred, ref, spacing) -> list[list[float]]:
    "HD95, surface Dice, lesion Dice and lesion HD95 of each region, and all else that a table row holds."
    rows = score_case(pred, ref, spacing, structures=tuple(REGIONS), tolerance_mm=TOLERANCE_MM)
    return [[row[k] for k in ('hd95_mm', 'nsd', 'lesion_dice', 'lesion_hd95_mm')] for row in rows]


def of_monai(pred, ref, spacing) -> list[list[float]]:
    "HD95 and surface Dice."
    p, r = (torch.from_numpy(labels_to_regions(x))[None].float() for x in (pred, ref))
    shared = {'include_background': True, 'spacing': spacing}
    hd95 = monai.metrics.compute_hausdorff_distance(p, r, percentile=95, **shared)[0]
    nsd = monai.metrics.compute_surface_dice(p, r, [TOLERANCE_MM] * len(REGIONS), use_subvoxels=True, **shared)[0]
    return np.stack([hd95, nsd], axis=1).tolist()


def of_deepmind(pred, ref, spacing) -> list[list[float]]:
    "HD95 by area and surface Dice."
    found = []
    for p, r in zip(labels_to_regions(pred), labels_to_regions(ref)):
        if not (p.any() and r.any()):  # not defined, and an error with NumPy 2
            found.append([float('nan')] * 2)
            continue
        surfaces = surface_distance.compute_surface_distances(r, p, spacing)
        found.append([surface_distance.compute_robust_hausdorff(surfaces, 95),
                      surface_distance.compute_surface_dice_at_tolerance(surfaces, TOLERANCE_MM)])
    return found


def by_the_letter(pred, ref, spacing) -> list[list[float]]:
    "Lesion Dice and HD95 by the BraTS 2023 rule, each step on the whole volume, distances by surface-distance."
    eighteen, around, found = ndimage.generate_binary_structure(3, 2), np.ones((3, 3, 3)), []
    for p, r in zip(labels_to_regions(pred), labels_to_regions(ref)):
        grown, n = ndimage.label(ndimage.binary_dilation(r, eighteen, iterations=3), around)
        parts, n_parts = ndimage.label(p, around)
        scores, claimed = [], set()
        for k in range(1, n + 1):
            lesion = r & (grown == k)
            own = set(np.unique(parts[ndimage.binary_dilation(lesion, eighteen, iterations=3)])) - {0}
            claimed |= own
            if lesion.sum() * np.prod(spacing) > 50:
                hit = np.isin(parts, list(own))
                hd95 = surface_distance.compute_robust_hausdorff(
                    surface_distance.compute_surface_distances(lesion, hit, spacing), 95) if own else 374.0
                scores.append((2 * (lesion & hit).sum() / (lesion.sum() + hit.sum()), hd95))
        scores += [(0.0, 374.0)] * (n_parts - len(claimed))
        found.append(list(np.mean(scores, axis=0)) if scores else [1.0, 0.0])
    return found


def timed(function: Callable, *values) -> tuple[float, list[list[float]]]:
    "Median seconds, and the values."
    seconds = []
    for _ in range(args.repeats + 1):
        began = perf_counter()
        found = function(*values)
        seconds.append(perf_counter() - began)
    return median(seconds[1:]), found


def largest(a, b) -> float:
    "The largest difference where both are defined, relative to values above 1."
    a, b = np.array(a, float), np.array(b, float)
    both = np.isfinite(a) & np.isfinite(b)
    return float((np.abs(a - b) / np.maximum(1, np.abs(b)))[both].max(initial=0.0))


def measure(study) -> dict:
    "One case."
    ref, grid, _ = read_label(study.label, None, study.schema)
    pred, spacing = moved(ref, 0), grid.spacing_mm
    seconds, values = {}, {}
    for name, function in (('ours', ours), ('monai', of_monai), ('surface-distance', of_deepmind), ('rule', by_the_letter)):
        seconds[name], values[name] = timed(function, pred, ref, spacing)
    defined = [p.any() and r.any() for p, r in zip(labels_to_regions(pred), labels_to_regions(ref))]
    pairs = [[surfel_hausdorff_mm(p, r, spacing), surface_dice(p, r, spacing, TOLERANCE_MM)] if ok else [np.nan] * 2
             for p, r, ok in zip(labels_to_regions(pred), labels_to_regions(ref), defined)]
    lesions = [lesion_scores(p, r, spacing) for p, r in zip(labels_to_regions(pred), labels_to_regions(ref))]
    table = np.array(values['ours'])
    known = np.where(np.array(defined)[:, None], table[:, :2], np.nan)
    return {'case': study.id, 'shape': [int(n) for n in grid.shape], 'wt_ml': float((ref > 0).sum() * grid.voxel_ml), 'seconds': seconds,
            'lesions': {r: [s['lesions'], s['lesions_missed'], s['lesions_invented']] for r, s in zip(REGIONS, lesions)},
            'difference': {'monai': largest(known, values['monai']), 'surface-distance': largest(pairs, values['surface-distance']),
                           'rule': largest(table[:, 2:], values['rule'])}}


def write(cases: list[dict]) -> None:
    "The table, as JSON and as a page."
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / 'metrics.json').write_text(json.dumps({'threads': args.threads, 'repeats': args.repeats, 'cases': cases}, indent=1) + '\n')
    lines = ['# Metrics beside MONAI and surface-distance', '',
             f'Seconds a case for WT, TC and ET, on {args.threads} cores, medians of {args.repeats} runs. `score_case` gives HD95, '
             'surface Dice, lesion-wise Dice and HD95, and every other column of its table; MONAI HD95 and surface Dice; '
             '`surface-distance` both by surfels; the rule is that of BraTS 2023 by the letter, on whole volumes. '
             'Written by `benchmarks/metrics.py`.', '',
             '| case | grid | WT mL | lesions WT (missed, invented) | score_case | MONAI | surface-distance | rule | largest difference to each |',
             '|---|---|---|---|---|---|---|---|---|']
    for c in cases:
        s, d, (n, missed, invented) = c['seconds'], c['difference'], c['lesions']['WT']
        lines.append(f"| {c['case']} | {'×'.join(map(str, c['shape']))} | {c['wt_ml']:.0f} | {n} ({missed}, {invented}) | "
                     + ' | '.join(f'{s[k]:.2f}' for k in ('ours', 'monai', 'surface-distance', 'rule')) + ' | '
                     + ' / '.join(f'{d[k]:.0e}' for k in ('monai', 'surface-distance', 'rule')) + ' |')
    ours_s = [c['seconds']['ours'] for c in cases]
    lines += ['', f'Slowest case: {max(ours_s):.2f} s. Differences are relative to values above 1 and absolute below.']
    (RESULTS / 'metrics.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))


write([measure(study) for study in find_cases(args.data) if study.label])
