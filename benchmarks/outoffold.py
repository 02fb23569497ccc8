"""Score the networks of benchmarks/starter49.py on the patients that each has not seen, and the starter of before beside them.

    python benchmarks/outoffold.py predict --out runs/starter49 --shared ../shared  # what is trained so far; again when more is
    python benchmarks/outoffold.py collect --out runs/starter49 --shared ../shared  # benchmarks/results/starter49.json

Probabilities are kept in model space, so that scoring can be done again without the networks. Every case is scored on its own grid.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy import ndimage, stats

from neuroseg3d.inference.calibration import Calibration, Validation, calibrate, doubtful_ml, volume_interval
from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import Model, load_checkpoint, load_model
from neuroseg3d.core import MODALITIES, REGIONS, Case, Geometry, labels_to_regions
from neuroseg3d.inference.predict import label_by_rules, masks_by_rules, rules_of
from neuroseg3d.networks.losses import get_targets, to_regions
from neuroseg3d.evaluation.metrics import score_case
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.phantom import GENERATOR, Population, case_seed
from neuroseg3d.inference.postprocess import Postprocess, drop_small
from neuroseg3d.studies.split import patient_of
from neuroseg3d.studies.preprocess import ModelCase, Space, to_model_space
from neuroseg3d.evaluation.uncertainty import expected_dice, near_tumour, score_doubt
from neuroseg3d.networks.windows import predict_probabilities
from starter import settings_of
from starter49 import HERE, SEED, all_studies, folds, healthy_phantom, network_folder

RESULTS = HERE / 'results' / 'starter49.json'
PLAIN = Postprocess()
ET_ML = 0.5  # enhancing tumour is scored where the reference has more
FRESH = 40  # phantoms without a tumour that no network has seen
THRESHOLDS = (0.5, 0.45, 0.55, 0.4, 0.6, 0.35, 0.65, 0.3, 0.7)
PART_ML = (0.0, 0.05, 0.1, 0.2, 0.5)  # parts below this are dropped: what is tried
GAIN, COST = 0.002, 0.001  # Dice that another threshold has to bring, and that dropping parts may cost
KEPT = ('dice', 'hd95_mm', 'lesion_dice', 'lesions', 'lesions_missed', 'lesions_invented')
STRATA: dict[str, Callable[[dict], bool]] = {
    'core below a quarter of the whole': lambda r: r['ml']['TC'] < 0.25 * r['ml']['WT'],
    'core a quarter or more': lambda r: r['ml']['TC'] >= 0.25 * r['ml']['WT'],
    'enhancing 0.5 to 5 mL': lambda r: ET_ML < r['ml']['ET'] <= 5,
    'enhancing above 5 mL': lambda r: r['ml']['ET'] > 5,
    'whole below 50 mL': lambda r: r['ml']['WT'] < 50,
    'whole 50 mL or more': lambda r: r['ml']['WT'] >= 50,
    'no enhancement (0.5 mL or less)': lambda r: r['ml']['ET'] <= ET_ML,
    'BraTS-Africa': lambda r: 'SSA' in r['case'],
    'BraTS 2018 to 2021': lambda r: 'SSA' not in r['case'],
}


# ---- predicting

def probabilities(model: Model, seen: ModelCase, missing: str = '') -> torch.Tensor:
    "WT, TC and ET in model space; one sequence may be taken away."
    image = seen.image.clone()
    if missing:
        image[MODALITIES.index(missing)] = 0
    activation = get_targets(model.targets).activation
    p = predict_probabilities(model.networks, image, model.windows, activation, torch.device('cpu'), around=seen.record.around)
    return to_regions(p, model.targets).float()


def predict(model: Model, seen: ModelCase, folder: Path, variants: Sequence[str]) -> None:
    "Probabilities of a case, of each variant that is not there yet."
    for missing in variants:
        path = kept(folder, seen.id, missing)
        if not path.is_file():
            began = time.perf_counter()
            p = probabilities(model, seen, missing)
            seconds = time.perf_counter() - began
            folder.mkdir(parents=True, exist_ok=True)
            save_file({'regions': p.contiguous(), 'seconds': torch.tensor(seconds)}, path.with_suffix('.tmp'))
            path.with_suffix('.tmp').rename(path)


def kept(folder: Path, case_id: str, missing: str = '') -> Path:
    "The file of a prediction."
    return folder / f'{case_id}{"-" + missing if missing else ""}.safetensors'


def stored(out: Path, tag: str, case_id: str, missing: str = '') -> torch.Tensor:
    "Probabilities that `predict` has kept."
    return load_file(kept(out / 'probabilities' / tag, case_id, missing))['regions']


def fresh_phantom(number: int, spacing_mm: float) -> Case:
    "A phantom without a tumour that no network has seen, of the usual population."
    return replace(healthy_phantom(case_seed(SEED, f'fresh{number}'), spacing_mm, Population(), 0.0), id=f'fresh{number:02d}')


@dataclass
class Exam:
    "What is needed of a case once its voxels are in model space; kept in a file, as every command asks for it."
    id: str
    label: np.ndarray | None  # canonical ids, native grid
    geometry: Geometry
    seen: ModelCase


def exam(out: Path, case_id: str, space: Space, make: Callable[[], Case]) -> Exam:
    "A case in model space with its reference."
    path = out / 'exams' / f'{case_id}.pt'
    if not path.is_file():
        case = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(Exam(case_id, case.label, case.geometry, to_model_space(case, space)), path.with_suffix('.tmp'))
        path.with_suffix('.tmp').rename(path)
    return torch.load(path, weights_only=False)


def without_tumour(out: Path, shared: Path, space: Space) -> Iterable[Exam]:
    "Two patients with multiple sclerosis and none, and fresh phantoms."
    for study in find_cases(shared / 'cohorts' / 'no_tumour'):
        yield exam(out, study.id, space, lambda: read_case(replace(study, label=None)))
    for number in range(FRESH):
        yield exam(out, f'fresh{number:02d}', space, lambda: fresh_phantom(number, space.spacing_mm[0]))


def finished(out: Path, settings: dict, fold: int) -> bool:
    "Whether a network counts: the settings name it, and it has had all its steps."
    if fold not in settings['networks']:
        return False
    last = network_folder(out, fold) / 'checkpoints' / 'last.ckpt'
    return last.is_file() and load_checkpoint(last)['global_step'] >= settings['run']['trainer']['max_steps']


def networks(out: Path, settings: dict) -> dict[str, Model]:
    "The starter of before, and the networks that are trained so far."
    found = {'before': load_model(out / 'init.safetensors')}
    for fold in settings['networks']:
        if finished(out, settings, fold):
            found[f'fold{fold}'] = load_model(network_folder(out, fold) / 'checkpoints' / 'last.ckpt')
    shipped = out / 'shipped.safetensors'
    return {**found, **({'shipped': load_model(shipped)} if shipped.is_file() else {})}


def predict_all(out: Path, shared: Path, settings: dict) -> None:
    "Every network on what it has not seen; those without a tumour; some cases that a network and the shipped one have both seen."
    models, dealt, studies = networks(out, settings), folds(shared, settings), all_studies(shared)
    space, folder = models['before'].space, out / 'probabilities'
    for fold, names in enumerate(dealt):
        for number, name in enumerate(names):
            wanted = {'before': ('',), f'fold{fold}': ('', *MODALITIES)}
            wanted |= {tag: ('',) for tag in (seen_by(fold, number, settings), 'shipped')}
            todo = {tag: v for tag, v in wanted.items() if tag in models and not all(kept(folder / tag, name, m).is_file() for m in v)}
            seen = exam(out, name, space, lambda: read_case(studies[name])).seen if todo else None
            for tag, variants in todo.items():
                predict(models[tag], seen, folder / tag, variants)
                print(name, tag, flush=True)
    for case in without_tumour(out, shared, space):
        for tag, model in models.items():
            if not case.id.startswith('fresh') or tag in ('before', 'shipped'):
                predict(model, case.seen, folder / tag, ('',))


def seen_by(fold: int, number: int, settings: dict) -> str:
    "One of the networks that were trained on a case: each network gets a part of its training cases."
    others = [f for f in settings['networks'] if f != fold]
    return f'fold{others[number % len(others)]}'


# ---- scoring

def measures(label: np.ndarray, case: Exam, distances: bool = True) -> dict:
    "Dice and volumes by region, with distances and lesions."
    rows = score_case(label, case.label, case.geometry.spacing_mm, distances=distances, structures=tuple(REGIONS), case=case.id)
    out = {}
    for row in rows:
        kept = {k: round(float(row[k]), 4) for k in KEPT if k in row}
        out[row['name']] = {**kept, 'found_ml': round(row['volume_pred_ml'], 3)}
    return out


def reference_ml(case: Exam) -> dict[str, float]:
    "Volumes of the reference."
    return {r: round(float(m.sum() * case.geometry.voxel_ml), 3) for r, m in zip(REGIONS, labels_to_regions(case.label))}


def remembered(path: Path, make: Callable[[], dict]) -> dict:
    "A result that is kept in a file."
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()), encoding='utf-8')
    return json.loads(path.read_text(encoding='utf-8'))


def score_plain(out: Path, case: Exam, tag: str) -> dict:
    "A case by the plain cut at one half, complete and with each sequence missing."
    cut = lambda missing: label_by_rules(stored(out, tag, case.id, missing), case.seen, PLAIN)
    missing = {} if tag == 'before' else {m: measures(cut(m), case, distances=False) for m in MODALITIES}
    return {'plain': measures(cut(''), case), **({'missing': missing} if missing else {})}


def choice_table(p: torch.Tensor, seen: ModelCase) -> dict:
    "For each region, threshold and part size: Dice and false parts, in model space."
    truth, voxel_ml = labels_to_regions(seen.label[0].numpy()), seen.record.model.voxel_ml
    inside, out = (seen.image != 0).any(0).numpy(), {}
    for number, region in enumerate(REGIONS):
        values, true = p[number].numpy() * inside, truth[number]
        box = ndimage.find_objects(((values >= min(THRESHOLDS)) | true).astype(np.uint8))
        values, true = (v[box[0]] if box else v[:1] for v in (values, true))
        dice, false = [], []
        for threshold in THRESHOLDS:
            masks = [drop_small(values >= threshold, ml / voxel_ml) for ml in PART_ML]
            sizes = [m.sum() + true.sum() for m in masks]
            dice.append([float(2 * (m & true).sum() / s) if s else 1.0 for m, s in zip(masks, sizes)])
            false.append([false_parts(m, true) for m in masks])
        out[region] = {'dice': dice, 'false': false}
    return out


def false_parts(mask: np.ndarray, true: np.ndarray) -> int:
    "Connected parts of a mask that touch nothing true."
    parts, count = ndimage.label(mask, np.ones((3, 3, 3)))
    return count - len(np.unique(parts[true & mask]))


def choose_rules(tables: Sequence[dict]) -> Postprocess:
    "Thresholds by mean Dice; then the part size with fewest false parts that costs next to no Dice."
    thresholds, sizes = [], []
    for region in REGIONS:
        dice, false = (np.mean([t[region][k] for t in tables], axis=0) for k in ('dice', 'false'))  # (thresholds, sizes)
        at = int(dice[:, 0].argmax())
        at = at if dice[at, 0] >= dice[0, 0] + GAIN else 0
        allowed = [s for s in range(len(PART_ML)) if dice[at, s] >= dice[at].max() - COST]
        size = min(allowed, key=lambda s: (false[at, s], PART_ML[s]))
        thresholds.append(THRESHOLDS[at])
        sizes.append(PART_ML[size])
    return Postprocess(tuple(thresholds), tuple(sizes))


# ---- summaries

def scored(row: dict, region: str) -> bool:
    "Whether a region of a case counts for mean Dice."
    return row['ml'][region] > (ET_ML if region == 'ET' else 0)


def interval(values: Sequence[float], patients: Sequence[str], samples: int = 10_000) -> list[float]:
    "Bootstrap 95 % interval of a mean, patients drawn with all their exams."
    groups = [[v for v, p in zip(values, patients) if p == patient] for patient in dict.fromkeys(patients)]
    sums, sizes = (np.array([f(g) for g in groups]) for f in (sum, len))
    drawn = np.random.default_rng(0).integers(0, len(groups), (samples, len(groups)))
    return [round(float(v), 4) for v in np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))]


def summary(rows: Sequence[dict], pick: Callable[[dict], dict]) -> dict:
    "Mean Dice with interval, HD95, false and missed lesions, by region."
    out = {}
    for region in REGIONS:
        own = [r for r in rows if scored(r, region)]
        if not own:
            continue
        values = [pick(r)[region]['dice'] for r in own]
        out[region] = {'n': len(own), 'patients': len({patient(r) for r in own}), 'dice': round(float(np.mean(values)), 4),
                       'ci95': interval(values, [patient(r) for r in own]), 'median': round(float(np.median(values)), 4)}
        if 'hd95_mm' in pick(own[0])[region]:
            of_all = [pick(r)[region] for r in rows]
            out[region] |= {'hd95_mm': round(float(np.mean([pick(r)[region]['hd95_mm'] for r in own])), 2),
                            'hd95_median_mm': round(float(np.median([pick(r)[region]['hd95_mm'] for r in own])), 2),
                            'lesion_dice': round(float(np.mean([v['lesion_dice'] for v in of_all])), 4),
                            'false_lesions_a_case': round(float(np.mean([v['lesions_invented'] for v in of_all])), 3),
                            'missed_lesions': int(sum(v['lesions_missed'] for v in of_all)),
                            'lesions': int(sum(v['lesions'] for v in of_all))}
    return out


PATIENTS = {'BraTS-SSA-00081-000': 'BraTS-SSA-00076', 'BraTS-SSA-00121-000': 'BraTS-SSA-00115'}  # second dates of a patient


def patient(row: dict) -> str:
    "Whose exam it is."
    return PATIENTS.get(row['case'], patient_of(row['case']))


def difference(rows: Sequence[dict], pick: Callable[[dict], dict], other: Callable[[dict], dict]) -> dict:
    "Mean gain in Dice, case by case, with its interval."
    out = {}
    for region in REGIONS:
        own = [r for r in rows if scored(r, region)]
        gains = [pick(r)[region]['dice'] - other(r)[region]['dice'] for r in own]
        out[region] = {'n': len(own), 'gain': round(float(np.mean(gains)), 4), 'ci95': interval(gains, [patient(r) for r in own]),
                       'better': int(sum(g > 0 for g in gains))}
    return out


def summaries(rows: Sequence[dict], name: str) -> dict:
    "The out-of-fold numbers of one way to score: of all, in strata."
    pick = lambda row: row[name]
    return {'all': summary(rows, pick), 'strata': {text: summary([r for r in rows if belongs(r)], pick) for text, belongs in STRATA.items()}}


# ---- volumes, intervals, expected Dice

def validation(p: torch.Tensor, case: Exam, rules: Postprocess) -> Validation:
    "What `neuroseg3d.inference.calibration.calibrate` needs, from stored probabilities."
    seen = case.seen
    truth, brain = labels_to_regions(seen.label[0].numpy()), (seen.image != 0).any(0).numpy()
    near = near_tumour(np.stack([p[0].numpy() >= 0.5, truth[0]]), brain, seen.record.model.spacing_mm)
    volumes = [tuple(float(m.sum() * case.geometry.voxel_ml) for m in labels_to_regions(x))
               for x in (label_by_rules(p, seen, rules), case.label)]
    return Validation(p, masks_by_rules(p, seen, rules), truth, brain, near, seen.record.model.voxel_ml, *volumes)


def intervals_of(fit: Calibration, seen: Validation, case_id: str) -> dict:
    "What a calibration says about a case that it has not seen, and what is true."
    cooled, row = fit.apply(seen.regions), {'case': case_id}
    for n, region in enumerate(REGIONS):
        low, high = volume_interval(seen.predicted_ml[n], doubtful_ml(cooled[n], seen.voxel_ml), fit.quantile[n])
        mask = torch.from_numpy(seen.predicted[n])
        both, size = int((seen.predicted[n] & seen.truth[n]).sum()), int(seen.predicted[n].sum() + seen.truth[n].sum())
        row[region] = {'low_ml': round(low, 2), 'high_ml': round(high, 2), 'true_ml': round(seen.true_ml[n], 2),
                       'expected_dice': round(expected_dice(cooled[n], mask, seen.voxel_ml, fit.presence[n]), 4),
                       'dice': round(2 * both / size, 4) if size else 1.0}
    return row


def coverage(rows: Sequence[dict]) -> dict:
    "How often intervals hold, how wide they are, and how well expected Dice ranks the cases."
    out = {}
    for region in REGIONS:
        own = [r[region] for r in rows]
        width, true = ([v['high_ml'] - v['low_ml'] for v in own], [v['true_ml'] for v in own])
        rank = stats.spearmanr([v['expected_dice'] for v in own], [v['dice'] for v in own])[0]
        out[region] = {'n': len(own), 'covered': int(sum(v['low_ml'] <= v['true_ml'] <= v['high_ml'] for v in own)),
                       'median_width_ml': round(float(np.median(width)), 1), 'median_volume_ml': round(float(np.median(true)), 1),
                       'expected_dice_rank_correlation': round(float(rank), 3)}
    return out


# ---- all of it

def each_case(out: Path, shared: Path, settings: dict, space: Space) -> Iterable[tuple[int, Exam]]:
    "Fold and exam, one after the other."
    studies = all_studies(shared)
    for fold in settings['networks']:
        for name in folds(shared, settings)[fold]:
            yield fold, exam(out, name, space, lambda: read_case(studies[name]))


def rows_of(out: Path, shared: Path, settings: dict, space: Space) -> list[dict]:
    "Everything that can be said of each case before rules are chosen."
    rows = []
    for fold, names in enumerate(folds(shared, settings)):
        if not finished(out, settings, fold):
            continue
        for name in names:
            rows.append({'case': name, 'fold': fold})
    for fold, case in pending(out, shared, settings, space, {r['case'] for r in rows}):
        for tag in ('before', f'fold{fold}'):
            remembered(out / 'scores' / tag / f'{case.id}.json', partial(score_plain, out, case, tag))
        remembered(out / 'tables' / f'{case.id}.json', lambda: choice_table(stored(out, f'fold{fold}', case.id), case.seen))
        remembered(out / 'reference' / f'{case.id}.json', lambda: reference_ml(case))
        print(case.id, flush=True)
    for row in rows:
        read = lambda *parts: json.loads((out.joinpath(*parts) / f'{row["case"]}.json').read_text(encoding='utf-8'))
        row |= {'ml': read('reference'), **read('scores', f'fold{row["fold"]}'), 'before': read('scores', 'before'), 'table': read('tables')}
    return rows


def pending(out: Path, shared: Path, settings: dict, space: Space, wanted: set[str]) -> Iterable[tuple[int, Exam]]:
    "The exams that are not scored yet."
    studies = all_studies(shared)
    for fold, names in enumerate(folds(shared, settings)):
        for name in names:
            if name in wanted and not (out / 'reference' / f'{name}.json').is_file():
                yield fold, exam(out, name, space, lambda: read_case(studies[name]))


def with_rules(out: Path, shared: Path, settings: dict, space: Space, rows: list[dict]) -> dict:
    "Each case by the rules, and in the intervals, that the other folds chose."
    chosen = {fold: choose_rules([r['table'] for r in rows if r['fold'] != fold]) for fold in settings['networks']}
    final, before = choose_rules([r['table'] for r in rows]), rules_of(load_model(out / 'init.safetensors'))
    by_name, validations = {r['case']: r for r in rows}, {rules: {} for rules in (final, *chosen.values())}
    for fold, case in each_case(out, shared, settings, space):
        row, p = by_name[case.id], stored(out, f'fold{fold}', case.id)
        keep = lambda name, q, rules: remembered(out / 'ruled' / name / f'{digest(rules)}-{case.id}.json',
                                                 lambda: measures(label_by_rules(q, case.seen, rules), case))
        row['rules'], row['fold_rules'] = keep(f'fold{fold}', p, chosen[fold]), asdict(chosen[fold])
        row['before']['rules'] = keep('before', stored(out, 'before', case.id), before)
        for rules in validations:
            validations[rules][case.id] = validation(p, case, rules)
        print(case.id, flush=True)
    intervals = []
    for fold in settings['networks']:
        of = validations[chosen[fold]]
        fit = calibrate([of[r['case']] for r in rows if r['fold'] != fold], settings['alpha'])
        intervals += [intervals_of(fit, of[r['case']], r['case']) for r in rows if r['fold'] == fold]
    whole = [validations[final][r['case']] for r in rows]
    calibration = replace(score_doubt(calibrate(whole, settings['alpha']), whole), note=HELD_OUT)
    (out / 'calibration.json').write_text(json.dumps({'rules': asdict(final), 'calibration': calibration.to_dict()}), encoding='utf-8')
    return {'rules': {'chosen_on_all': asdict(final), 'before': asdict(before)}, 'intervals': {'alpha': settings['alpha'], **coverage(intervals)},
            'interval_cases': intervals, 'calibration': {k: v for k, v in calibration.to_dict().items() if k != 'curves'}}


#: How the cases of the calibration were held out, for the model's card in reports.
HELD_OUT = 'each predicted by the network that had not seen it; the shipped weights are the mean of these networks'


def digest(rules: Postprocess) -> str:
    "A short name of rules."
    return sha256(json.dumps(asdict(rules)).encode()).hexdigest()[:10]


def false_volumes(out: Path, shared: Path, settings: dict, space: Space, rules: Postprocess) -> dict:
    "What is found where there is no tumour: volumes in mL by each network, plain and with the final rules."
    tags = ['before', *(f'fold{f}' for f in settings['networks']), 'shipped']
    found = {tag: {} for tag in tags if (out / 'probabilities' / tag).is_dir()}
    before = rules_of(load_model(out / 'init.safetensors'))
    for case in without_tumour(out, shared, space):
        for tag in found:
            if not kept(out / 'probabilities' / tag, case.id).is_file():
                continue
            p, own = stored(out, tag, case.id), before if tag == 'before' else rules
            ml = {name: [round(float(m.sum() * case.geometry.voxel_ml), 2) for m in labels_to_regions(label_by_rules(p, case.seen, r))]
                  for name, r in (('plain', PLAIN), ('rules', own))}
            found[tag][case.id] = {name: dict(zip(REGIONS, values)) for name, values in ml.items()}
    return found


def false_summary(found: dict) -> dict:
    "Median and largest volumes in the fresh phantoms, and those of the two patients."
    out = {}
    for tag, cases in found.items():
        fresh = [v for name, v in cases.items() if name.startswith('fresh')]
        out[tag] = {'patients': {name: v for name, v in cases.items() if not name.startswith('fresh')}}
        if fresh:
            out[tag] |= {'phantoms': {how: {r: {'n': len(fresh), 'median_ml': round(float(np.median([v[how][r] for v in fresh])), 2),
                                           'largest_ml': max(v[how][r] for v in fresh)} for r in REGIONS} for how in ('plain', 'rules')}}
    return out


def of_the_mean(out: Path, shared: Path, settings: dict, space: Space) -> dict:
    "Dice of the shipped mean and of one network each on cases that both were trained on: a mean that fell below would be no good."
    rows, names = [], folds(shared, settings)
    for fold, case in each_case(out, shared, settings, space):
        tag = seen_by(fold, names[fold].index(case.id), settings)
        dice = lambda of: {r: v['dice'] for r, v in measures(label_by_rules(stored(out, of, case.id), case.seen, PLAIN), case, False).items()}
        rows.append({'ml': reference_ml(case), **remembered(out / 'trained_on' / f'{case.id}.json', lambda: {'network': dice(tag), 'mean': dice('shipped')})})
    return {r: {'n': sum(scored(v, r) for v in rows),
                **{which: round(float(np.mean([v[which][r] for v in rows if scored(v, r)])), 4) for which in ('network', 'mean')}} for r in REGIONS}


def collect(out: Path, shared: Path, settings: dict) -> Path:
    "benchmarks/results/starter49.json."
    space = load_model(out / 'init.safetensors').space
    rows = rows_of(out, shared, settings, space)
    if len(rows) < sum(len(folds(shared, settings)[f]) for f in settings['networks']):
        print('not all folds are there:', json.dumps(summary(rows, lambda r: r['plain'])), flush=True)
        print('before, on the same:', json.dumps(summary(rows, lambda r: r['before']['plain'])), flush=True)
        return out / 'scores'
    ruled = with_rules(out, shared, settings, space, rows)
    final = Postprocess(**{k: tuple(v) if isinstance(v, list) else v for k, v in ruled['rules']['chosen_on_all'].items()})
    empty = false_volumes(out, shared, settings, space, final)
    for row in rows:
        row.pop('table')
    plain, old = (lambda r: r['plain']), (lambda r: r['before']['plain'])
    facts = {
        'settings': settings, 'generator': GENERATOR, 'versions': {'torch': torch.__version__},
        'plain': summaries(rows, 'plain'), 'with_rules': summaries(rows, 'rules'),
        'missing': {m: summary(rows, lambda r: r['missing'][m]) for m in MODALITIES},
        'before': {'plain': summary(rows, old), 'with_rules': summary(rows, lambda r: r['before']['rules'])},
        'gain': {'plain': difference(rows, plain, old), 'with_rules': difference(rows, lambda r: r['rules'], lambda r: r['before']['rules'])},
        **ruled, 'without_tumour': false_summary(empty), 'mean': of_the_mean(out, shared, settings, space), 'cases': rows}
    RESULTS.write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')
    return RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=('predict', 'collect'))
    parser.add_argument('--out', type=Path, required=True, help='folder of benchmarks/starter49.py')
    parser.add_argument('--shared', type=Path, required=True, help='folder with cohorts/ and data/')
    parser.add_argument('--settings', type=Path, default=HERE / 'starter49.yaml')
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = settings_of(args.settings)
    print({'predict': predict_all, 'collect': collect}[args.command](args.out, args.shared, settings))


if __name__ == '__main__':
    main()
