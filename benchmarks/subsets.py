"""What missing sequences and hurry cost in Dice: all 15 subsets of the sequences, and the ways to look, on cases with a reference.

    python benchmarks/subsets.py                                       # the starter model, on fresh phantoms
    python benchmarks/subsets.py --data ../shared/data                 # and on real cases, for the ways to look

Makes phantoms that no model was trained on (seeds from 200000). Dice is 1 where a region is neither there nor found, 0 where it is
one of the two. Where --data names real cases, their Dice says what a way to look changes, not how good the model is: the starter
model was trained on those with expert labels. Writes benchmarks/results/subsets.json and subsets.md.
"""
from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import Model, load_model
from neuroseg3d.core import MODALITIES, REGIONS, Case, labels_to_regions
from neuroseg3d.inference.predict import predict_case
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.networks.models import resolve_models
from neuroseg3d.phantom import make_phantom
from neuroseg3d.networks.windows import FLIPS, fast_windows

RESULTS = Path(__file__).resolve().parent / 'results'
FIRST_SEED = 200_000
SUBSETS = [c for n in (4, 3, 2, 1) for c in combinations(MODALITIES, n)]


def dice(model: Model, case: Case, present: Iterable[str] = MODALITIES) -> list[float]:
    "Dice of WT, TC, ET with some sequences only."
    kept = np.array([m in present for m in MODALITIES], np.float32).reshape(4, 1, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that sequences are missing is the point
        label = predict_case(model, replace(case, image=case.image * kept), 'cpu').label
    pairs = zip(labels_to_regions(label), labels_to_regions(case.label))
    return [float(2 * (a & b).sum() / n) if (n := a.sum() + b.sum()) else 1.0 for a, b in pairs]


def ways(model: Model) -> dict[str, Model]:
    "The ways to look that are compared: as the model is, and through windows small enough for a brain to need several."
    looks = {}
    for name, windows in (('windows of 96', model.windows), ('windows of 48', replace(model.windows, size=(48, 48, 48)))):
        looks |= {name: windows, f'{name}, --fast': fast_windows(windows), f'{name}, --fast without the memory for one pass':
                  fast_windows(windows, whole=False), f'{name}, --tta all': replace(windows, flips=FLIPS)}
    return {name: replace(model, windows=w) for name, w in looks.items()}


def mean(rows: list[list[float]]) -> dict[str, float]:
    return dict(zip(REGIONS, np.mean(rows, 0).tolist()))


def table(head: list[str], rows: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    return lines + [f"| {name} | " + ' | '.join(f'{v:.3f}' for part in parts for v in part.values()) + ' |' for name, parts in rows.items()]


def page(found: dict) -> str:
    "The results in words."
    subsets = {' '.join(m if m in name.split('+') else '–' for m in MODALITIES): [d] for name, d in found['subsets'].items()}
    cohorts = found['ways']
    names = next(iter(cohorts.values()))['dice']
    looks = {name: [c['dice'][name] for c in cohorts.values()] for name in names}
    head = ['way to look', *(f'{r}, {c} ({v["cases"]})' for c, v in cohorts.items() for r in REGIONS)]
    return '\n'.join(['# What missing sequences and hurry cost', '',
                      f'Mean Dice of {found["model"]}. Written by `benchmarks/subsets.py`.', '', '## Missing sequences', '',
                      f'{found["phantoms"]} phantoms that the model was not trained on.', '',
                      *table(['sequences', *REGIONS], subsets), '', '## Ways to look', '',
                      'Real cases are those that the starter model was fine-tuned on: what counts is the difference between rows.', '',
                      *table(head, looks), ''])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt_path', nargs='+', help='checkpoint or exported model (default: the starter model)')
    parser.add_argument('--data', type=Path, help='folder with real cohorts msd and brats2021')
    parser.add_argument('--phantoms', type=int, default=16)
    parser.add_argument('--spacing_mm', type=float, default=2.0, help='of the phantoms')
    args = parser.parse_args()
    model = load_model(resolve_models(args.ckpt_path))
    phantoms, subsets = [], {c: [] for c in SUBSETS}
    looks = {'phantoms': {name: [] for name in ways(model)}} | ({'real': {name: [] for name in ways(model)}} if args.data else {})
    for number in range(args.phantoms):
        case = make_phantom(FIRST_SEED + number, args.spacing_mm)
        phantoms.append(case.id)
        for present in SUBSETS:
            subsets[present].append(dice(model, case, present))
        for name, way in ways(model).items():
            looks['phantoms'][name].append(dice(way, case))
        print(case.id, [round(d, 3) for d in subsets[tuple(MODALITIES)][-1]], flush=True)
    for study in [s for folder in ('msd', 'brats2021') for s in find_cases(args.data / folder)] if args.data else ():
        case = read_case(study)
        for name, way in ways(model).items():
            looks['real'][name].append(dice(way, case))
        print(case.id, [round(d, 3) for d in looks['real']['windows of 96'][-1]], flush=True)
    found = {'model': model.paths[0].stem, 'phantoms': len(phantoms), 'seeds': [FIRST_SEED, FIRST_SEED + len(phantoms) - 1],
             'spacing_mm': args.spacing_mm, 'subsets': {'+'.join(c): mean(rows) for c, rows in subsets.items()},
             'ways': {c: {'cases': len(next(iter(rows.values()))), 'dice': {n: mean(r) for n, r in rows.items()}} for c, rows in looks.items()}}
    (RESULTS / 'subsets.json').write_text(json.dumps(found, indent=1) + '\n')
    (RESULTS / 'subsets.md').write_text(page(found))
    print(page(found))


if __name__ == '__main__':
    main()
