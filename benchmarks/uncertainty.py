"""Is the uncertainty worth anything? Coverage of volume intervals, calibration, expected Dice and QU-BraTS on fresh phantoms.

    python benchmarks/uncertainty.py                                             # the starter model
    python benchmarks/uncertainty.py --ckpt_path runs/demo/train/checkpoints/best.ckpt

Makes phantoms that no model was trained on (seeds from 200000), calibrates the model on the first of them and scores it on the rest.
Writes one row a case and region, a summary, and its table for the page. The coverage of one split into calibration and test cases varies by chance, with a
standard deviation of 6 points for 60 and 60 cases and of 2.5 points for 300 and 300; its interval (Wilson), and how it varies over many
random splits of the same cases into calibration sets of several sizes, are given beside it. What is learnt here holds for in-silico
patients, and is not stored with the model.
"""
import argparse
import csv
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from neuroseg3d.networks.checkpoint import load_model
from neuroseg3d.core import REGIONS, labels_to_regions
from neuroseg3d.inference.calibration import SCALE_FLOOR_ML, calibrate, conformal_quantile, doubtful_ml, reliability, volume_scores
from neuroseg3d.networks.models import resolve_model
from neuroseg3d.phantom import make_phantom
from neuroseg3d.studies.split import file_digest
from neuroseg3d.studies.preprocess import to_native
from neuroseg3d.evaluation.uncertainty import assess_case, coin_entropy, near_tumour, qu_brats, score_doubt, validation_case

warnings.filterwarnings('ignore', category=FutureWarning, module='monai')


def score_case(model, calibration, case, pool) -> list[dict]:
    "A row a region; near-tumour probabilities and answers go into `pool`."
    found = assess_case(model, case, calibration=calibration)
    truth, ours = labels_to_regions(case.label), labels_to_regions(found.label)
    seen = labels_to_regions(found.model_case.label[0].numpy()) if found.model_case.label is not None else truth
    brain = (found.model_case.image != 0).any(0).numpy()
    p = found.doubt.raw.numpy()
    within = near_tumour(np.stack([p[0] >= 0.5, seen[0]]), brain, found.model_case.record.model.spacing_mm)
    rows = []
    for i, region in enumerate(REGIONS):
        low, high = found.intervals_ml[region]
        true = case.volume_ml(region)
        size = truth[i].sum() + ours[i].sum()
        u = np.clip(100 * found.native_map(region), 0, 100)
        raw = coin_entropy(to_native(found.doubt.raw[i:i + 1], found.model_case.record)[0].clamp(0, 1)).numpy()
        qu, before, plain = (qu_brats(ours[i], truth[i], x, case.brain) for x in (u, np.clip(100 * raw, 0, 100), np.zeros_like(u)))
        cooled = calibration.apply(found.doubt.raw)[i]
        scale = doubtful_ml(cooled, found.model_case.record.model.voxel_ml) + SCALE_FLOOR_ML
        rows.append({'case': case.id, 'region': region, 'true_ml': true, 'predicted_ml': found.volumes_ml[region], 'low_ml': low,
                     'high_ml': high, 'covered': int(low <= true <= high), 'score': abs(true - found.volumes_ml[region]) / scale,
                     'dice': 2 * (truth[i] & ours[i]).sum() / size if size else 1.0, 'expected_dice': found.expected_dice[region],
                     'qu_brats': qu.score, 'qu_brats_uncalibrated': before.score, 'qu_brats_never_in_doubt': plain.score})
        pool[region].append((p[i][within], cooled.numpy()[within], seen[i][within]))
    return rows


def split_coverage(scores: np.ndarray, n_calibration: int, alpha: float, splits: int = 1000) -> dict:
    "Coverage over random splits of the scores of one region."
    rng, found = np.random.default_rng(0), []
    for _ in range(splits):
        drawn = rng.permutation(scores)
        found.append(np.mean(drawn[n_calibration:] <= conformal_quantile(drawn[:n_calibration], alpha)))
    return {'mean': float(np.mean(found)), 'p5': float(np.quantile(found, 0.05)), 'p95': float(np.quantile(found, 0.95))}


def wilson(share: float, n: int, z: float = 1.96) -> list[float]:
    "95 % interval of a share of n cases."
    middle, half = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def bootstrap(values: np.ndarray) -> list[float]:
    "95 % interval of a mean, over cases."
    drawn = values[np.random.default_rng(0).integers(0, len(values), (2000, len(values)))].mean(1)
    return np.quantile(drawn, (0.025, 0.975)).tolist()


def agreement(dice: np.ndarray, expected: np.ndarray) -> dict:
    "How well the expected Dice tells the Dice."
    if not len(dice):
        return {'n': 0}
    rank = spearmanr(dice, expected)[0] if len(set(dice)) > 1 and len(set(expected)) > 1 else float('nan')
    return {'n': len(dice), 'dice': float(dice.mean()), 'expected': float(expected.mean()), 'mae': float(np.abs(dice - expected).mean()),
            'spearman': float(rank) if np.isfinite(rank) else None}


def summarise(rows, pool, calibration, calibration_scores, first_seed: int, model: dict) -> dict:
    "Numbers by region."
    summary = {**model, 'n_calibration': calibration.n_cases, 'n_test': len(rows) // 3, 'alpha': calibration.alpha, 'first_seed': first_seed,
               'temperature': dict(zip(REGIONS, calibration.temperature)), 'quantile': dict(zip(REGIONS, calibration.quantile))}
    for i, region in enumerate(REGIONS):
        own = [r for r in rows if r['region'] == region]
        column = {k: np.array([r[k] for r in own], float) for k in own[0] if k not in ('case', 'region')}
        before, after, truth = (np.concatenate(x) for x in zip(*pool[region]))
        found = column['predicted_ml'] > 0
        scores = np.concatenate([calibration_scores[:, i], column['score']])
        summary[region] = {
            'coverage': float(column['covered'].mean()), 'coverage_ci95': wilson(column['covered'].mean(), len(own)),
            'coverage_random_splits': {n: split_coverage(scores, n, calibration.alpha) for n in sorted({20, 60, calibration.n_cases}) if n < len(scores)},
            'median_interval_width_ml': float(np.median(column['high_ml'] - column['low_ml'])),
            'median_true_ml': float(np.median(column['true_ml'])),
            'dice': float(column['dice'].mean()), 'dice_ci95': bootstrap(column['dice']),
            **{f'expected_dice_{where}': agreement(column['dice'][mask], column['expected_dice'][mask])
               for where, mask in (('all', found | True), ('region_found', found), ('nothing_found', ~found))},
            'n_missed': int(((column['dice'] == 0) & (column['true_ml'] > 0)).sum()),
            'n_invented': int(((column['true_ml'] == 0) & (column['predicted_ml'] > 0)).sum()),
            'qu_brats': float(column['qu_brats'].mean()), 'qu_brats_ci95': bootstrap(column['qu_brats']),
            'qu_brats_uncalibrated': float(column['qu_brats_uncalibrated'].mean()),
            'qu_brats_never_in_doubt': float(column['qu_brats_never_in_doubt'].mean()),
            **{f'{name}_{when}': reliability(p, truth, adaptive=name == 'ace').error
               for name in ('ece', 'ace') for when, p in (('before', before), ('after', after))}}
    return summary


def table(summary: dict) -> str:
    "The summary as the page on uncertainty shows it."
    rows = ['| region | volumes within their 90 % interval | its median width; median volume, mL | expected calibration error | adaptive | QU-BraTS; '
            'without any doubt | Dice | expected | mean error | rank correlation |', '|---' * 10 + '|']
    for region in REGIONS:
        s = summary[region]
        low, high = s['coverage_ci95']
        told = s['expected_dice_all']
        rows.append(f'| {region} | {s["coverage"]:.1%} [{low:.1%}, {high:.1%}] | {s["median_interval_width_ml"]:.1f}; {s["median_true_ml"]:.1f} | '
                    f'{s["ece_before"]:.3f} → {s["ece_after"]:.3f} | {s["ace_before"]:.3f} → {s["ace_after"]:.3f} | {s["qu_brats"]:.3f}; '
                    f'{s["qu_brats_never_in_doubt"]:.3f} | {told["dice"]:.3f} | {told["expected"]:.3f} | {told["mae"]:.3f} | {told["spearman"]:.2f} |')
    return '\n'.join(rows) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt_path', default='starter')
    parser.add_argument('--n_calibration', type=int, default=300)
    parser.add_argument('--n_test', type=int, default=300)
    parser.add_argument('--seed', type=int, default=200_000)
    parser.add_argument('--alpha', type=float, default=0.1)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--output_dir', default='benchmarks/results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve_model(args.ckpt_path)
    model = load_model(path)
    spacing, out = model.space.spacing_mm, Path(args.output_dir)
    validation = []
    for seed in range(args.seed, args.seed + args.n_calibration):
        validation.append(validation_case(model, make_phantom(seed, spacing)))
        print(f'calibration {len(validation)}/{args.n_calibration}', flush=True)
    calibration = score_doubt(calibrate(validation, args.alpha, sample=20_000), validation)
    scores = np.array([volume_scores(c, calibration.temperature) for c in validation])
    del validation
    rows, pool = [], {region: [] for region in REGIONS}
    for n in range(args.n_test):
        rows += score_case(model, calibration, make_phantom(args.seed + args.n_calibration + n, spacing), pool)
        print(f'test {n + 1}/{args.n_test}', flush=True)
    summary = summarise(rows, pool, calibration, scores, args.seed, {'model': path.name, 'model_sha256': file_digest(path)})
    out.mkdir(parents=True, exist_ok=True)
    with open(out / 'uncertainty_cases.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f'{v:.5g}' if isinstance(v, float) else v for k, v in r.items()} for r in rows)
    (out / 'uncertainty.json').write_text(json.dumps(summary, indent=1) + '\n')
    (out / 'uncertainty.md').write_text(table(summary), encoding='utf-8')
    print(table(summary))


if __name__ == '__main__':
    main()
