"""Make the first starter model, and measure it on real patients; benchmarks/starter49.py goes on from it.

    python benchmarks/starter.py pretrain   --out runs/starter                       # on phantoms alone, resumable
    python benchmarks/starter.py stream     --out runs/starter                       # beside it: phantoms made ahead
    python benchmarks/starter.py phantoms   --out runs/starter                       # scores on phantoms never trained on
    python benchmarks/starter.py narrow     --out runs/starter --data ../shared/data  # scores of the first part, on real cases
    python benchmarks/starter.py wide       --out runs/starter --data ../shared/data  # scores after the second
    python benchmarks/starter.py fossa      --out runs/starter --data ../shared/data  # scores after the third
    python benchmarks/starter.py mean       --out runs/starter --data ../shared/data  # scores of the mean of these two
    python benchmarks/starter.py simulation --out runs/starter --data ../shared/data  # scores of the fourth, the last
    python benchmarks/starter.py longer     --out runs/starter --data ../shared/data  # trains the fourth with more steps, scores it
    python benchmarks/starter.py pretrained --out runs/starter --data ../shared/data  # fine-tuned, each case held out once
    python benchmarks/starter.py random     --out runs/starter --data ../shared/data  # the same from random weights
    python benchmarks/starter.py strong     --out runs/starter --data ../shared/data  # the same at a higher learning rate
    python benchmarks/starter.py rules      --out runs/starter --data ../shared/data  # post-processing and calibration, from held-out cases
    python benchmarks/starter.py change     --out runs/starter --data ../shared/data --name NAME    # of the generator
    python benchmarks/starter.py collect    --out runs/starter                       # benchmarks/results/starter.json
    python benchmarks/starter.py pictures   --out runs/starter --data ../shared/data  # of the worst cases, beside phantoms

Settings: benchmarks/starter.yaml. Phantoms are made while training goes on: a further one for every few patches, each from
its own seed, so that the patches of a step are a function of step and settings alone, and a run that was stopped goes on
where it was. Fine-tuning mixes real and simulated patches in each batch.
"""
from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from matplotlib.colors import to_rgba
from scipy.ndimage import find_objects

from neuroseg3d.inference.calibration import Validation, calibrate, reliability
from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import Model, averaged_weights, description, load_checkpoint, load_model, save_checkpoint
from neuroseg3d.config import build, to_dict
from neuroseg3d.core import MODALITIES, REGIONS, Case, labels_to_regions
from neuroseg3d.training.data import MemoryCase, PatchDataset, Prepare, StepSampler, StoredCase, make_loader, plan_machine, store_case, tumour_voxels
from neuroseg3d.inference.predict import predict_case
from neuroseg3d.studies.layouts import Study, find_cases
from neuroseg3d.evaluation.metrics import overlap
from neuroseg3d.phantom import GENERATOR, Population, case_seed, make_exams, make_phantom
from neuroseg3d.inference.postprocess import Held, Postprocess, mean_dice, search_rules
from neuroseg3d.training.resume import CheckpointFolder, check_same_run, resume_point
from neuroseg3d.training.task import Config, RunData, SegmentationTask, make_trainer
from neuroseg3d.studies.preprocess import Space, to_model_space
from neuroseg3d.evaluation.uncertainty import score_doubt, validation_case
from neuroseg3d.viz import LABEL_PALETTE

matplotlib.use('Agg')

HERE = Path(__file__).resolve().parent
RESULTS = HERE / 'results'
PARTS = {'narrow': 'pretrain/checkpoints/last.ckpt', 'wide': 'widen/checkpoints/last.ckpt', 'fossa': 'fossa/checkpoints/last.ckpt',
         'mean': 'before_many.ckpt', 'longer': 'longer/checkpoints/last.ckpt'}  # series that score a part of pre-training -> its weights
SERIES = {'narrow': 'phantoms alone, first part', 'wide': 'phantoms alone, two parts', 'fossa': 'phantoms alone, three parts',
          'mean': 'phantoms alone, mean of the weights of the second and third part', 'simulation': 'phantoms alone, all four parts',
          'longer': 'phantoms alone, the fourth part with 3000 steps',
          'pretrained': 'phantoms, then real and simulated cases', 'random': 'the latter alone, from random weights',
          'strong': 'phantoms, then real and simulated cases at four times the learning rate'}
HELD = ('pretrained', 'random', 'strong')  # series for which each case was held out of fine-tuning
MISSING = ('simulation', 'pretrained', 'random')  # series that are scored with each sequence missing too
SEED = 6  # of the stream
FURTHER = ('widen', 'fossa', 'many')  # parts of pre-training after the first
ET_VOXELS = 500  # enhancing tumour is scored where the reference has more


# ---- data

class Stream(Sequence):
    "Phantoms without end, in model space; each is made when it is first asked for, and kept. A patient may be examined several times."

    def __init__(self, folder: Path, space: Space, part: str, length: int, population: Population = Population(), exams: int = 1):
        self.folder, self.space, self.part, self.length, self._open = folder, space, part, length, {}
        self.population, self.exams = population, exams
        usual = asdict(Population())
        other = {k: v for k, v in {**asdict(population), 'exams': exams}.items() if v != {**usual, 'exams': 1}[k]}
        drawn = '-' + sha256(json.dumps(other, sort_keys=True).encode()).hexdigest()[:8] if other else ''
        self.name = f'generator{GENERATOR}{drawn}-{part}'
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self.length

    def path(self, number: int) -> Path:
        "The file of an exam."
        return self.folder / f'{self.name}{number:05d}.safetensors'

    def __getitem__(self, number: int | slice) -> StoredCase | list[StoredCase]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if number not in self._open:
            if not self.path(number).is_file():
                self.make(number // self.exams)
            self._open[number] = StoredCase(self.path(number))
        return self._open[number]

    def make(self, patient: int) -> None:
        "Every exam of a patient."
        seed = case_seed(SEED, f'{self.part}{patient}')
        for exam, case in enumerate(make_exams(seed, self.exams, self.space.spacing_mm, population=self.population)):
            seen = to_model_space(case, self.space)
            stored = MemoryCase(case.id, seen.image, seen.label, tumour_voxels(seen.label), seen.record)
            store_case(stored, self.path(patient * self.exams + exam))


class StreamPatches(PatchDataset):
    "Patches of a stream that grows: every few patches the newest phantom, else any that is there. Mirrored left-right at random."

    def __init__(self, cases: Stream, settings: dict, config: Config, seed: int):
        super().__init__(cases, config.data.patch_size, seed, config.data.foreground_fraction, config.augment)
        self.first, self.patches = settings['first'], settings['patches']

    def case_number(self, index: int) -> int:
        there = self.first + index // self.patches
        return there - 1 if index % self.patches == 0 else int(self._rng(1, index).randint(there))

    def __getitem__(self, index: int) -> dict:
        return mirrored(super().__getitem__(index), self._rng(2, index))


class MixedPatches(torch.utils.data.Dataset):
    "Real and simulated patches, the real ones a fixed share of every batch."

    def __init__(self, real: PatchDataset, simulated: StreamPatches, real_a_batch: int, batch: int):
        self.real, self.simulated, self.real_a_batch, self.batch = real, simulated, real_a_batch, batch

    def __len__(self) -> int:
        return len(self.real)

    def __getitem__(self, index: int) -> dict:
        step, place = divmod(index, self.batch)
        if place >= self.real_a_batch:
            return self.simulated[step * (self.batch - self.real_a_batch) + place - self.real_a_batch]
        number = step * self.real_a_batch + place
        return mirrored(self.real[number], self.real._rng(2, number))


def mirrored(patch: dict, rng: np.random.RandomState) -> dict:
    "A patch, or its mirror image, left and right exchanged."
    if rng.random_sample() < 0.5:
        return patch
    return {**patch, 'image': patch['image'].flip(1), 'label': patch['label'].flip(1)}


class StarterData(RunData):
    "What the starter model is trained on: the stream, and the real cases named."

    def __init__(self, config: Config, settings: dict, out: Path, real: Sequence[Study] = ()):
        super().__init__(config.data, config.space, config.augment, progress=False)
        self.config, self.settings, self.out, self.real = config, settings, out, real

    def prepare_data(self) -> None:
        pass

    def setup(self, stage: str | None = None) -> None:
        if self.plan is not None:
            return
        self.plan = plan_machine(self.data)
        stream, held = self.settings['stream'], self.settings['stream']['held']
        self.train_cases = training_stream(self.out, self.space, stream)
        self.val_cases = Stream(self.out / 'stream', self.space, 'Ts', held)
        simulated = StreamPatches(self.train_cases, stream, self.config, self.data.seed)
        self.patches = simulated
        if self.real:
            cases = [Prepare(self.space)(study) for study in self.real]
            real = PatchDataset(cases, self.data.patch_size, self.data.seed, self.data.foreground_fraction, self.augment)
            here = round(self.settings['real']['share'] * self.data.batch_size)
            self.patches = MixedPatches(real, simulated, here, self.data.batch_size)

    def train_dataloader(self):
        sampler = StepSampler(self.plan.batch_size, self.start_step, self.end_step)
        return _Whole(make_loader(self.patches, sampler, self.plan), self.end_step)


def training_stream(out: Path, space: Space, stream: dict) -> Stream:
    "The phantoms that the settings of a stage ask for."
    return Stream(out / 'stream', space, 'Tr', 10**6, build(Population, stream.get('population', {})), stream.get('exams', 1))


class _Whole:
    "The rest of a run's batches, which knows the length of the whole."

    def __init__(self, loader, steps: int):
        self.loader, self.steps = loader, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator:
        return iter(self.loader)


# ---- training

def settings_of(path: Path) -> dict:
    "The file of settings."
    return yaml.safe_load(path.read_text(encoding='utf-8'))


def config_of(settings: dict, output_dir: Path, stage: str, seed: int = 0) -> Config:
    "The configuration of a stage: pretrain, widen, finetune or changes."
    stage_settings = settings.get(stage, {})
    run = {section: {**values, **stage_settings.get(section, {})} for section, values in settings['run'].items()}
    run['trainer'] = {**run['trainer'], 'output_dir': str(output_dir), 'seed': seed}
    return build(Config, run)


def real_studies(data: Path, names: Sequence[str]) -> list[Study]:
    "The real cases, in the order of their names in the settings."
    found = {s.id: s for folder in ('msd', 'brats2021') for s in find_cases(data / folder)}
    return [found[name] for name in names]


def train(config: Config, data: StarterData, provenance: dict, weights: dict | None = None) -> Path:
    "Train, or go on where it stopped; the last checkpoint, whose averaged weights count."
    folder = Path(config.trainer.output_dir)
    start = resume_point(folder, None, 'auto')
    last = folder / 'checkpoints' / 'last.ckpt'
    if start and start.step >= config.trainer.max_steps:
        return last
    if start:
        check_same_run(start, to_dict(config), provenance)
        start.begin(CheckpointFolder(last.parent))
    data.start_step, data.end_step = start.step if start else 0, config.trainer.max_steps
    data.setup()
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(config.trainer.seed, verbose=False)
    task = SegmentationTask(config, provenance)
    if weights:
        task.network.load_state_dict(weights)
        task.ema.module.load_state_dict(weights)
    make_trainer(config, folder, start.content if start else None).fit(task, datamodule=data, ckpt_path=last if start else None)
    return last


def stream_of(settings: dict, stage: str) -> dict:
    "The settings with the stream of a stage."
    return {**settings, 'stream': {**settings['stream'], **settings.get(stage, {}).get('stream', {})}}


def pretrain(out: Path, settings: dict) -> Path:
    "On phantoms alone: those of the cohorts, then those of wider populations, from the mean of the weights that these have given so far."
    config = config_of(settings, out / 'pretrain', 'pretrain')
    last = train(config, StarterData(config, settings, out), {'schema': 'msd'})
    parts = []
    for part in FURTHER:
        config = config_of(settings, out / part, part)
        data = StarterData(config, stream_of(settings, part), out)
        start = mean_of(parts, out / f'before_{part}.ckpt') if parts else last
        parts.append(train(config, data, {'schema': 'msd', 'stage': part}, weights_of(start)))
    return parts[-1]


def longer(out: Path, settings: dict) -> Path:
    "The fourth part with more steps: tried, not taken."
    config = config_of(settings, out / 'longer', 'longer')
    data = StarterData(config, stream_of(settings, 'longer'), out)
    return train(config, data, {'schema': 'msd', 'stage': 'longer'}, weights_of(out / 'before_many.ckpt'))


def mean_of(checkpoints: Sequence[Path], path: Path) -> Path:
    "A checkpoint whose averaged weights are the mean of those of several (Wortsman et al. 2022, arXiv:2203.05482)."
    content = load_checkpoint(checkpoints[-1])
    weights = [weights_of(c) for c in checkpoints]
    mean = {f'ema.module.{k}': sum(w[k] for w in weights) / len(weights) for k in weights[0]}
    return save_checkpoint({**content, 'state_dict': {**content['state_dict'], **mean}}, path)


# ---- measuring

def weights_of(checkpoint: Path) -> dict:
    "The averaged weights of a checkpoint."
    content = load_checkpoint(checkpoint)
    return averaged_weights(content, description(content, checkpoint))


def score(model: Model, case: Case, missing: str = '', rules: Postprocess | None = None) -> dict:
    "Dice, volumes and calibration of one case, of whose sequences one may be taken away."
    image = case.image.copy()
    if missing:
        image[MODALITIES.index(missing)] = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that a sequence is missing is known
        prediction = predict_case(model, replace(case, image=image), 'cpu', rules)
    found, true = labels_to_regions(prediction.label), labels_to_regions(case.label)
    seen = to_model_space(case, model.space)
    inside, reference = (seen.image != 0).any(0).numpy(), labels_to_regions(seen.label[0].numpy())
    row = {'case': case.id, 'missing': missing}
    for number, region in enumerate(REGIONS):
        p, t = found[number], true[number]
        scored = t.sum() > (ET_VOXELS if region == 'ET' else 0)
        certain = prediction.probabilities[number].numpy()[inside]
        row[region] = {'dice': round(overlap(p, t)['dice'], 4) if scored else None, 'missed': bool(scored and not (p & t).any()),
                       'reference_ml': round(t.sum() * case.geometry.voxel_ml, 2),
                       'predicted_ml': round(p.sum() * case.geometry.voxel_ml, 2),
                       'ece': round(reliability(certain, reference[number][inside]).error, 5)}
    return row


def summary(rows: Sequence[dict]) -> dict:
    "Mean Dice by region over the cases that are scored, how many these are, misses, mean calibration error."
    out = {}
    for region in REGIONS:
        scored = [r[region] for r in rows if r[region]['dice'] is not None]
        out[region] = {'dice': round(float(np.mean([s['dice'] for s in scored])), 4), 'cases': len(scored),
                       'missed': sum(s['missed'] for s in scored),
                       'ece': round(float(np.mean([r[region]['ece'] for r in rows])), 5)}
    return out


def pretrained(out: Path) -> Path:
    "The checkpoint that pre-training ends with."
    return out / FURTHER[-1] / 'checkpoints' / 'last.ckpt'


def finetune(out: Path, settings: dict, studies: Sequence[Study], name: str, start: str) -> Path:
    "On real and simulated patches, from the pre-trained weights or from random ones."
    config = config_of(settings, out / name, 'strong' if start == 'strong' else 'finetune')
    wide = stream_of(settings, FURTHER[-1])
    whole = {**wide, 'stream': {**wide['stream'], 'first': settings['finetune_pool'], 'patches': 10**9, 'held': 1}}
    weights = None if start == 'random' else weights_of(pretrained(out))
    provenance = {'schema': 'msd', 'start': start, 'real_cases': [s.id for s in studies]}
    return train(config, StarterData(config, whole, out, studies), provenance, weights)


def series(out: Path, data: Path, settings: dict, start: str) -> Path:
    "Scores of one series: of a part of pre-training (nothing real), or fine-tuned with each case held out, from either start."
    studies, rows = real_studies(data, settings['real']['cases']), []
    path = out / f'{start}.json'
    if start == 'longer':
        longer(out, settings)
    for held in studies:
        checkpoint = out / PARTS[start] if start in PARTS else pretrained(out)
        if start in HELD:
            checkpoint = finetune(out, settings, [s for s in studies if s.id != held.id], f'{start}/{held.id}', start)
        model, case = load_model(checkpoint), read_case(held)
        rows += [score(model, case, missing) for missing in ('', *(MODALITIES if start in MISSING else ()))]
        print(json.dumps([r for r in rows if r['case'] == held.id and not r['missing']]), flush=True)
    means = {m or 'all': summary([r for r in rows if r['missing'] == m]) for m in dict.fromkeys(r['missing'] for r in rows)}
    facts = {'series': start, 'settings': settings, 'generator': GENERATOR, 'versions': {'torch': torch.__version__},
             'mean_with_missing': means, 'cases': rows}
    path.write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')
    print(json.dumps(means['all']), flush=True)
    return path


def on_phantoms(out: Path, settings: dict, n: int = 8) -> Path:
    "Scores of pre-training's first part and of its end on phantoms of the usual and the widest population that none has seen."
    wide = build(Population, settings[FURTHER[-1]]['stream']['population'])
    found = {}
    for kind, population in (('as in the cohorts', Population()), ('wider', wide)):
        cases = [make_phantom(case_seed(SEED, f'unseen{number}'), 2.0, population=population) for number in range(n)]
        for part, checkpoint in (('first part', out / 'pretrain' / 'checkpoints' / 'last.ckpt'), ('all parts', pretrained(out))):
            model = load_model(checkpoint)
            found[f'{kind}, {part}'] = summary([score(model, case) for case in cases])
    path = out / 'phantoms.json'
    path.write_text(json.dumps({'phantoms': n, 'mean': found}, indent=1), encoding='utf-8')
    print(json.dumps(found), flush=True)
    return path


def held_out(out: Path, studies: Sequence[Study]) -> list[Validation]:
    "What the models that had not seen them in fine-tuning say about the real cases, in model space."
    return [validation_case(load_model(out / 'pretrained' / s.id / 'checkpoints' / 'last.ckpt'), read_case(s), 'cpu') for s in studies]


def cropped(seen: Validation) -> Held:
    "What the search for rules needs: the part of the grid that holds tumour, found or true."
    values = (seen.regions.numpy() * 255).round().astype(np.uint8) * seen.brain
    box = (slice(None), *find_objects(((values >= 64).any(0) | seen.truth[0]).astype(np.uint8))[0])
    return Held(values[box], seen.truth[box], seen.voxel_ml)


#: How the cases of the calibration were held out, for the model's card in reports.
HELD_OUT = 'each predicted by the network that had not seen it; the shipped weights are the mean of these networks'


def rules(out: Path, data: Path, settings: dict) -> Path:
    "Post-processing rules and calibration from held-out cases; what the rules bring to a case that did not choose them."
    studies = real_studies(data, settings['real']['cases'])
    seen = held_out(out, studies)
    cases = [cropped(v) for v in seen]
    found, before, after = search_rules(cases, settings['rules']['min_gain'])
    nested, rows = [], []
    for number, study in enumerate(studies):
        chosen = search_rules(cases[:number] + cases[number + 1:], settings['rules']['min_gain'])[0]
        nested.append(mean_dice(cases[number:number + 1], chosen))
        model = load_model(out / 'pretrained' / study.id / 'checkpoints' / 'last.ckpt')
        rows.append({**score(model, read_case(study), rules=chosen), 'rules': asdict(chosen)})
    calibration = replace(score_doubt(calibrate(seen, settings['rules']['alpha']), seen), note=HELD_OUT)
    facts = {'rules': asdict(found), 'mean_dice': {'without': before, 'chosen_on_all': after, 'chosen_on_the_others': float(np.mean(nested))},
             'mean': summary(rows), 'cases': rows, 'calibration': calibration.to_dict()}
    path = out / 'rules.json'
    path.write_text(json.dumps(facts, indent=1), encoding='utf-8')
    print(json.dumps({k: facts[k] for k in ('rules', 'mean_dice', 'mean')}), flush=True)
    return path


def change(out: Path, data: Path, settings: dict, name: str) -> Path:
    "What a change of the generator brings: training goes on from the same weights on other phantoms, scored on the real cases."
    arms = settings['changes']
    config = config_of(settings, out / 'changes' / name, 'changes')
    stream = {**settings['stream'], 'patches': arms['patches'], 'population': arms['populations'][name]}
    whole = {**settings, 'stream': stream}
    weights = weights_of(out / 'pretrain' / 'checkpoints' / 'last.ckpt')
    model = load_model(train(config, StarterData(config, whole, out), {'schema': 'msd', 'change': name}, weights))
    rows = [score(model, read_case(study)) for study in real_studies(data, settings['real']['cases'])]
    path = out / 'changes' / f'{name}.json'
    path.write_text(json.dumps({'population': arms['populations'][name], 'mean': summary(rows), 'cases': rows}, indent=1), encoding='utf-8')
    print(json.dumps(summary(rows)), flush=True)
    return path


def pictures(out: Path, data: Path, settings: dict) -> Path:
    "The two worst real cases, each above a phantom of the population made to resemble it: sequences, reference, prediction."
    results = json.loads((RESULTS / 'starter.json').read_text(encoding='utf-8'))['pretrained']['cases']
    whole = sorted((r for r in results if not r['missing']), key=lambda r: r['WT']['dice'] + r['TC']['dice'])
    studies = {s.id: s for s in real_studies(data, settings['real']['cases'])}
    populations = [build(Population, p) for p in settings['changes']['populations'].values() if p]
    rows = []
    for row, (population, seed) in zip(sorted(whole[:2], key=lambda r: r['case']), zip(populations, settings['changes']['shown'])):
        rows.append((read_case(studies[row['case']]), out / 'pretrained' / row['case'] / 'checkpoints' / 'last.ckpt'))
        rows.append((make_phantom(seed, population=population), pretrained(out)))
    figure, axes = plt.subplots(len(rows), 6, figsize=(12, 2.25 * len(rows)), facecolor='white')
    for line, (case, checkpoint) in zip(axes, rows):
        label = predict_case(load_model(checkpoint), case, 'cpu').label
        draw_row(line, case, label)
    figure.tight_layout(pad=0.3)
    path = HERE.parent / 'nbs' / 'images' / 'starter_failures.png'
    figure.savefig(path, dpi=60)
    return path


def draw_row(axes: Sequence, case: Case, label: np.ndarray) -> None:
    "Four sequences, the reference and a prediction over FLAIR, in the axial slice with most tumour."
    case, label = to_ras(case, label)
    at = int((case.label > 0).sum((0, 1)).argmax())
    x, y = (slice(a.min(), a.max() + 1) for a in np.nonzero(case.brain.any(2)))
    colours = np.array([(0, 0, 0, 0), *(to_rgba(LABEL_PALETTE[k], 0.6) for k in (1, 2, 3))])
    shown = [*zip(MODALITIES, case.image, [None] * 4), ('reference', case.image[0], case.label), ('found', case.image[0], label)]
    for axis, (name, image, over) in zip(axes, shown):
        cut = image[x, y, at].T
        axis.imshow(cut, cmap='gray', origin='lower', vmin=0, vmax=np.percentile(image[image > 0], 99.7))
        if over is not None:
            axis.imshow(colours[over[x, y, at].T], origin='lower', interpolation='nearest')
        axis.set_title(name if name != 'FLAIR' else f'{case.id}: FLAIR', fontsize=8)
        axis.axis('off')


def to_ras(case: Case, label: np.ndarray) -> tuple[Case, np.ndarray]:
    "Case and prediction with axes to the right, front and top."
    turn = nib.io_orientation(case.geometry.affine)
    move = lambda volume: nib.orientations.apply_orientation(volume, turn)
    return replace(case, image=np.stack([move(v) for v in case.image]), label=move(case.label)), move(label)


# ---- results

def collect(out: Path, settings: dict) -> Path:
    "The series in one file of results."
    found = {name: json.loads((out / f'{name}.json').read_text(encoding='utf-8')) for name in SERIES}
    for series in found.values():
        series.pop('settings')
    path = RESULTS / 'starter.json'
    changes = {name: json.loads((out / 'changes' / f'{name}.json').read_text(encoding='utf-8'))
               for name in settings['changes']['populations'] if (out / 'changes' / f'{name}.json').is_file()}
    extra = {name: json.loads((out / f'{name}.json').read_text(encoding='utf-8')) for name in ('phantoms', 'rules')}
    extra['rules']['calibration'].pop('curves')
    path.write_text(json.dumps({'settings': settings, **found, **extra, 'changes': changes}, indent=1) + '\n', encoding='utf-8')
    return path


def make_ahead(out: Path, settings: dict, n: int) -> None:
    "Make phantoms of the stream before training asks for them; for a second process."
    space = build(Space, settings['run']['space'])
    held = Stream(out / 'stream', space, 'Ts', settings['stream']['held'])
    for cases, count in ((held, len(held)), *((training_stream(out, space, stream_of(settings, stage)['stream']), n) for stage in ('pretrain', *FURTHER))):
        for number in range(count):
            cases[number]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=('stream', 'pretrain', 'phantoms', *SERIES, 'rules', 'change', 'collect', 'pictures'))
    parser.add_argument('--out', type=Path, required=True, help='folder for runs and phantoms')
    parser.add_argument('--data', type=Path, help='folder with msd/ and brats2021/')
    parser.add_argument('--settings', type=Path, default=HERE / 'starter.yaml')
    parser.add_argument('--n', type=int, default=400, help='phantoms to make ahead')
    parser.add_argument('--name', default='as before', help='change: which of the populations in the settings')
    parser.add_argument('--threads', type=int, default=1, help='of the training process')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = settings_of(args.settings)
    if args.command == 'stream':
        make_ahead(args.out, settings, args.n)
    elif args.command == 'pretrain':
        print(pretrain(args.out, settings))
    elif args.command == 'phantoms':
        print(on_phantoms(args.out, settings))
    elif args.command == 'rules':
        print(rules(args.out, args.data, settings))
    elif args.command == 'change':
        print(change(args.out, args.data, settings, args.name))
    elif args.command == 'collect':
        print(collect(args.out, settings))
    elif args.command == 'pictures':
        print(pictures(args.out, args.data, settings))
    else:
        print(series(args.out, args.data, settings, args.command))


if __name__ == '__main__':
    main()
