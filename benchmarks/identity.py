"""How alike exams of different patients look, and altered copies of one exam: what the limits of `neuroseg3d.studies.identity` rest on.

    python benchmarks/identity.py --data ../shared/data ../shared/cohorts/glioma42
    python benchmarks/identity.py --data ../shared/data --split neuroseg3d/models/starter_split.json

The first compares every pair of cases below the folders, each case with altered copies of itself, and phantoms with each other; it writes
benchmarks/results/identity.json. Every fourth case is altered in all ways, the others in the quick ones. The second only adds identities to a split file whose cases lie below the folders; a file that is not the one
that was hashed is an error. Cases with less than four sequences are left out.
"""
from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from neuroseg3d.studies.cases import read_case
from neuroseg3d.core import MODALITIES, Case, Geometry
from neuroseg3d.studies.identity import SAME_EXAM, SAME_HEAD, Identity, as_text, identify, likeness, thumbnails
from neuroseg3d.studies.layouts import Study, find_cases
from neuroseg3d.phantom import make_phantom

RESULTS = Path(__file__).resolve().parent / 'results'
SCHEMAS = {'glioma42': 'brats2017'}  # whose BraTS-Africa labels were written with the ids of 2017
ONE_PATIENT = [{'BraTS-SSA-00076-000', 'BraTS-SSA-00081-000'}, {'BraTS-SSA-00115-000', 'BraTS-SSA-00121-000'}]  # at two dates
WAYS = {'cut to the brain': 'the field of view is the brain box', '48 grey levels': 'each sequence rounded to 48 levels between its 0.05th and 99.95th percentile',
        'stored in LPS': 'first and second axis mirrored, with the affine', 'other units': 'each sequence times 0.2 to 5, plus 7',
        'other contrast': 'grey values to the power of 0.6, 1.5, 0.7 and 1.4', 'shading': 'a smooth field of -25 to +35 %',
        'tighter stripping': '2 mm of the brain taken off all around', 'noise': 'a tenth of the standard deviation of each sequence',
        'registered otherwise': 'turned by 3 degrees, moved by 2 mm along each axis', '2 mm voxels': 'resampled to 2 mm', 'slices of 5 mm': 'resampled to 1 x 1 x 5 mm',
        'three sequences': 'the last one absent', 'one sequence': 'FLAIR alone', 'top cut off': 'the upper 10 mm of the brain outside the field of view'}


def cropped(case: Case, box: tuple[slice, ...]) -> Case:
    "A part of the field of view."
    affine = case.geometry.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [s.start or 0 for s in box]
    image = case.image[(slice(None), *box)]
    return replace(case, image=image, label=None, geometry=Geometry(image.shape[1:], affine), header=None)


def with_image(case: Case, image: np.ndarray) -> Case:
    return replace(case, image=image.astype(np.float32), label=None)


def moved(case: Case, matrix: np.ndarray, offset: np.ndarray, shape: tuple[int, ...]) -> Case:
    "Resampled: voxel `i` of the new grid is looked up at matrix @ i + offset."
    affine = case.geometry.affine @ np.vstack([np.column_stack([matrix, offset]), [0, 0, 0, 1]])
    image = np.stack([ndimage.affine_transform(v, matrix, offset, shape, order=1) for v in case.image])
    return replace(case, image=image, label=None, geometry=Geometry(shape, affine), header=None)


def resampled(case: Case, spacing_mm: tuple[float, float, float]) -> Case:
    steps = np.array(spacing_mm) / case.geometry.spacing_mm
    return moved(case, np.diag(steps), (steps - 1) / 2, tuple(int(n) for n in np.ceil(np.array(case.geometry.shape) / steps)))


def turned(case: Case, degrees: float, shift_mm: float) -> Case:
    "The head elsewhere on the same grid: the affine stays, so that it is another registration."
    c, s, size = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees)), np.diag(case.geometry.spacing_mm)
    matrix = np.linalg.inv(size) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ size
    middle = np.array(case.geometry.shape) / 2
    found = moved(case, matrix, middle - matrix @ middle + shift_mm / np.array(case.geometry.spacing_mm), case.geometry.shape)
    return replace(found, geometry=case.geometry)


def rounded(volume: np.ndarray, levels: int = 48) -> np.ndarray:
    "Few grey levels, as in small copies of a release."
    inside = volume != 0
    low, high = np.percentile(volume[inside], (0.05, 99.95))
    return np.where(inside, np.clip(np.round((volume - low) / (high - low) * (levels - 2)) + 1, 1, levels - 1), 0)


def copies(case: Case, all_ways: bool) -> Iterator[tuple[str, Case]]:
    "Altered copies of an exam, those of `QUICK` or all of `WAYS`; the case is that of its brain box and 8 voxels around."
    image, inside = case.image, case.image != 0
    brain = ndimage.find_objects(case.brain.astype(np.uint8))[0]
    yield 'cut to the brain', cropped(case, brain)
    yield '48 grey levels', with_image(case, np.stack([rounded(v) for v in image]))
    mirrored = case.geometry.affine @ np.array([[-1, 0, 0, image.shape[1] - 1], [0, -1, 0, image.shape[2] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    yield 'stored in LPS', replace(case, image=image[:, ::-1, ::-1], label=None, geometry=Geometry(image.shape[1:], mirrored), header=None)
    yield 'other units', with_image(case, np.where(inside, image * np.array([0.2, 5, 1.7, 0.6]).reshape(4, 1, 1, 1) + 7, 0))
    yield 'three sequences', with_image(case, image * np.array([1, 1, 1, 0]).reshape(4, 1, 1, 1))
    if all_ways:
        yield from slow_copies(case, brain, inside)


def slow_copies(case: Case, brain: tuple[slice, ...], inside: np.ndarray) -> Iterator[tuple[str, Case]]:
    "The other ways."
    image, rng = case.image, np.random.default_rng(0)
    tops = np.array([np.percentile(v, 99.9) for v in image]).reshape(4, 1, 1, 1)
    yield 'other contrast', with_image(case, np.clip(image / tops, 0, 1.2) ** np.array([0.6, 1.5, 0.7, 1.4]).reshape(4, 1, 1, 1))
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n, dtype=np.float32) for n in image.shape[1:]], indexing='ij')
    yield 'shading', with_image(case, image * np.exp(0.2 * x - 0.15 * y * z + 0.15 * z))
    yield 'tighter stripping', with_image(case, image * ndimage.binary_erosion(case.brain, iterations=2))
    spread = np.array([v[v != 0].std() for v in image]).reshape(4, 1, 1, 1)
    yield 'noise', with_image(case, np.where(inside, image + 0.1 * spread * rng.standard_normal(image.shape, np.float32), 0))
    yield 'registered otherwise', turned(case, 3, 2)
    yield '2 mm voxels', resampled(case, (2, 2, 2))
    yield 'slices of 5 mm', resampled(case, (1, 1, 5))
    yield 'one sequence', with_image(case, image * np.array([1, 0, 0, 0]).reshape(4, 1, 1, 1))
    axis = 'RASLPI'.index('S'), nib.aff2axcodes(case.geometry.affine)
    up = next(i for i, code in enumerate(axis[1]) if code in 'SI')
    n = round(10 / case.geometry.spacing_mm[up])
    kept = slice(None, brain[up].stop - n) if axis[1][up] == 'S' else slice(brain[up].start + n, None)
    yield 'top cut off', cropped(case, tuple(kept if i == up else slice(None) for i in range(3)))


def small(case: Case, margin_vox: int = 8) -> Case:
    "The brain box and some voxels around, so that altering is quick."
    brain = ndimage.find_objects(case.brain.astype(np.uint8))[0]
    return cropped(case, tuple(slice(max(0, s.start - margin_vox), s.stop + margin_vox) for s in brain))


def largest(alike: np.ndarray, names: list[str], n: int = 3) -> list[list]:
    "The most alike pairs."
    pairs = sorted(((float(alike[i, j]), names[i], names[j]) for i, j in combinations(range(len(names)), 2)), reverse=True)
    return [[a, b, round(r, 4)] for r, a, b in pairs[:n]]


QUICK = ('cut to the brain', '48 grey levels', 'stored in LPS', 'other units', 'three sequences')


def looks(case: Case) -> Identity:
    "An identity without the hashes, which altered copies do not share."
    return Identity({}, {m: as_text(t) for m, t in thumbnails(case).items()})


def measure(studies: list[Study]) -> dict:
    "Likeness of all pairs, of altered copies, of phantoms."
    exams, of_copies, seconds = {}, {way: {} for way in WAYS}, []
    for study in studies:
        case = read_case(study, with_label=False)
        began = time.perf_counter()
        exams[study.id] = identify(case)
        seconds.append(time.perf_counter() - began)
        for way, copy in copies(small(case), all_ways=len(exams) % 4 == 1):
            of_copies[way][study.id] = round(float(likeness([exams[study.id]], [looks(copy)])[0, 0]), 4)
        least = min((found[study.id], way) for way, found in of_copies.items() if study.id in found)
        print(f'[{len(exams)}/{len(studies)}] {study.id}: least alike {least}', flush=True)
    names = list(exams)
    strangers = pairs_of(exams, names)
    phantoms = {f'phantoms at {mm:g} mm': [identify(make_phantom(seed, mm)) for seed in range(n)] for mm, n in ((1.0, 6), (4.0, 24))}
    return {'cases': len(exams), 'pairs': len(names) * (len(names) - 1) // 2, 'limits': {'same_exam': SAME_EXAM, 'same_head': SAME_HEAD},
            'seconds_a_case_median': round(float(np.median(seconds)), 2), **strangers,
            'copies': {way: {'what': WAYS[way], 'least': min(found.values()), 'case': min(found, key=found.get), 'n': len(found)} for way, found in of_copies.items()},
            'phantoms': {name: {'n': len(e), 'most_alike': round(float(np.max(likeness(e, e)[np.triu_indices(len(e), 1)])), 4)} for name, e in phantoms.items()}}


def pairs_of(exams: dict[str, Identity], names: list[str]) -> dict:
    "The most alike pairs of different patients, of all sequences and of one; the known pairs of one patient."
    found: dict = {'one_patient_at_two_dates': {}}
    for kept in (MODALITIES, *((m,) for m in MODALITIES)):
        some = [Identity(exams[n].voxels, {m: t for m, t in exams[n].thumbnails.items() if m in kept}) for n in names]
        alike = likeness(some, some)
        for pair in ONE_PATIENT:
            if pair <= set(names):
                i, j = sorted(map(names.index, pair))
                if kept == MODALITIES:
                    found['one_patient_at_two_dates'][' and '.join(sorted(pair))] = round(float(alike[i, j]), 4)
                alike[i, j] = alike[j, i] = -1
        found['different_patients' if kept == MODALITIES else f'different_patients_by_{kept[0]}_alone'] = largest(alike, names)
        if kept == MODALITIES:
            rest = alike[np.triu_indices(len(names), 1)]
            found['different_patients_mean_sd'] = [round(float(v), 4) for v in (rest[rest > -1].mean(), rest[rest > -1].std())]
    return found


def upgrade(path: Path, studies: list[Study]) -> None:
    "Add identities to a split file."
    from neuroseg3d.studies.split import load_split, save_split, with_identities
    split = load_split(path)
    save_split(with_identities(split, [s for s in studies if s.id in split.cases], str(path)), path)
    print(f'{path}: {len(split.cases)} identities')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', type=Path, nargs='+', required=True, help='folders with cohorts')
    parser.add_argument('--split', type=Path, help='a split file to add identities to, in place of measuring')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    studies: dict[str, Study] = {}
    for folder in args.data:
        for sub in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
            studies = {s.id: s for s in found_in(sub)} | studies  # the first finding counts: the folder that is named knows more
    if args.split:
        upgrade(args.split, list(studies.values()))
        return
    path = RESULTS / 'identity.json'
    path.write_text(json.dumps(measure(list(studies.values())), indent=1) + '\n', encoding='utf-8')
    print(path)


def found_in(folder: Path) -> list[Study]:
    "The cases of a folder that is a cohort, none of one that is not."
    try:
        return [s for s in find_cases(folder, schema=SCHEMAS.get(folder.name)) if set(s.images) == set(MODALITIES)]
    except ValueError:
        return []


if __name__ == '__main__':
    main()
