"""Fine-tune the starter model on 49 real exams, and measure it out of fold.

    python benchmarks/starter49.py pool  --out runs/starter49                     # phantoms made ahead; can run beside training
    python benchmarks/starter49.py train --out runs/starter49 --shared ../shared  # a network without each fold; resumable
    python benchmarks/starter49.py mean  --out runs/starter49                     # the mean of their weights, to be measured too
    (now benchmarks/outoffold.py: predict, collect)
    python benchmarks/starter49.py ship  --out runs/starter49 --shared ../shared  # the mean exported, with split, card and figure
    python benchmarks/starter49.py card                                           # card and figure again, from the stored results

Settings: benchmarks/starter49.yaml. What a step sees is a function of the step and the settings, so a run that was stopped
goes on where it was.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

from neuroseg3d.networks.checkpoint import KEY, STARTER, description, export_model, load_checkpoint, load_model, save_checkpoint
from neuroseg3d.config import build
from neuroseg3d.core import MODALITIES, REGIONS, Case
from neuroseg3d.training.data import MemoryCase, PatchDataset, Prepare, StoredCase, plan_machine, store_case, tumour_voxels
from neuroseg3d.studies.layouts import Study, find_cases
from neuroseg3d.phantom import (GENERATOR, Population, acquire, box_axes, brain_box, case_seed, draw_head, left_by_stripping,
                                make_phantom, paint, phantom_geometry, sample_anatomy, smooth_field, soft, stream,
                                to_scanner_units)
from neuroseg3d.studies.split import file_digest, make_split, save_split
from neuroseg3d.training.task import Config
from neuroseg3d.studies.preprocess import Space, to_model_space
from starter import StarterData, config_of, mean_of, mirrored, settings_of, train
from starter_card import write_card

HERE = Path(__file__).resolve().parent
SEED = 49  # of the stream


# ---- brains without a tumour

def disease(seed: int, tissue, axes: Sequence[np.ndarray]) -> np.ndarray:
    "Much white-matter disease: broad caps around the ventricles and many spots, some of them large."
    rng = stream(seed, 'disease')
    reach = np.float32(rng.uniform(3, 9)) * np.exp(np.float32(0.5) * smooth_field(rng, axes, 12.0))
    caps = soft(reach - tissue.ventricle_mm, 0.8)
    small = soft(smooth_field(rng, axes, 4.0) - np.float32(rng.uniform(1.8, 2.6)), 0.17)
    large = soft(smooth_field(rng, axes, 8.0) - np.float32(rng.uniform(1.7, 2.6)), 0.17)
    return np.maximum.reduce([caps, small, large]) * tissue.wm


def healthy_phantom(seed: int, spacing_mm: float, population: Population, diseased: float) -> Case:
    "A phantom whose tumour never grew: `make_exams` without its lesion."
    geometry, head = phantom_geometry(seed, spacing_mm, None), draw_head(seed)
    box = brain_box(head, geometry)
    axes = box_axes(geometry, box, [1, 1, 1])
    tissue = sample_anatomy(head, None, axes)
    ill = stream(seed, 'is diseased').random() < diseased
    cover = {'spot': disease(seed, tissue, axes)} if ill else {}
    signal = to_scanner_units(seed, paint(seed, tissue, cover, axes, population), axes, population)
    brain = tissue.brain & left_by_stripping(seed, axes, population)
    image = np.zeros((len(MODALITIES), *geometry.shape), np.float32)
    image[(slice(None), *box)] = np.clip(np.rint(acquire(seed, signal, geometry.spacing_mm)), 1, 32000) * brain
    return Case(f'HEALTHY_{seed}', image, geometry, np.zeros(geometry.shape, np.uint8), schema='msd')


def midline(image: np.ndarray, brain: np.ndarray) -> int:
    "Twice the x (in voxels) about which a brain is most like its mirror image."
    middle = image.shape[1] - 1
    best = {}
    for twice in range(middle - 8, middle + 9):
        low, high = max(0, twice - middle), min(middle, twice)
        part, mask = image[:, low:high + 1], brain[low:high + 1]
        both = mask & mask[::-1]
        best[twice] = np.mean([np.corrcoef(c[both], c[::-1][both])[0, 1] for c in part]) if both.sum() > 1000 else -1
    return max(best, key=best.get)


def halves(case: MemoryCase) -> list[MemoryCase]:
    "Brains made of a half that no tumour reaches and its mirror image; none, one or two."
    image, label = case.image.numpy(), case.label[0].numpy()
    brain = (image != 0).any(0)
    tumour = ndimage.binary_dilation(label > 0, iterations=1)
    twice = midline(image, brain)
    made = []
    for left in (True, False):
        own = np.arange(image.shape[1]) * 2 <= twice if left else np.arange(image.shape[1]) * 2 >= twice
        if tumour[own].any():
            continue
        where = np.arange(image.shape[1])
        other = np.clip(twice - where, 0, image.shape[1] - 1)
        inside = (twice - where >= 0) & (twice - where < image.shape[1])
        source = np.where(own, where, other)
        whole = image[:, source] * (own | inside)[None, :, None, None]
        for channel in whole:
            seen = channel != 0
            if seen.any():
                channel[seen] = (channel[seen] - channel[seen].mean()) / channel[seen].std()
        made.append(MemoryCase(f'{case.id} half', torch.from_numpy(np.ascontiguousarray(whole)), torch.zeros_like(case.label), {}, case.record))
    return made


class Pool(Sequence):
    "Phantoms in model space, made when they are first asked for, and kept."

    def __init__(self, folder: Path, kind: str, space: Space, settings: dict):
        self.folder, self.kind, self.space, self.settings, self._open = folder, kind, space, settings, {}
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return self.settings['pool']

    def make(self, number: int) -> MemoryCase:
        "The phantom of a number, in model space."
        seed, population = case_seed(SEED, f'{self.kind}{number}'), build(Population, self.settings['population'])
        spacing = self.space.spacing_mm[0]
        case = make_phantom(seed, spacing, population=population) if self.kind == 'tumour' else \
            healthy_phantom(seed, spacing, population, self.settings['diseased'])
        seen = to_model_space(case, self.space)
        return MemoryCase(case.id, seen.image, seen.label, tumour_voxels(seen.label), seen.record)

    def __getitem__(self, number: int) -> StoredCase:
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number not in self._open:
            path = self.folder / f'generator{GENERATOR}-{self.kind}{number:03d}.safetensors'
            if not path.is_file():
                store_case(self.make(number), path)
            self._open[number] = StoredCase(path)
        return self._open[number]


# ---- what a step sees

class Steps(torch.utils.data.Dataset):
    "One brain a step: real, of mirrored halves, a phantom without or with a tumour; the size grows at the end."

    def __init__(self, parts: dict[str, Sequence], settings: dict, config: Config):
        self.shares = {'healthy': settings['stream']['healthy_phantoms'], 'halves': settings['stream']['mirrored'],
                       'tumour': settings['stream']['phantoms']}
        self.steps = config.trainer.max_steps
        self.first_whole = round(self.steps * (1 - settings['patches']['last_share']))
        fraction, seed = config.data.foreground_fraction, config.trainer.seed
        self.made = {(kind, size): PatchDataset(cases, settings['patches'][size], seed, fraction, config.augment)
                     for kind, cases in parts.items() for size in ('first', 'last')}

    def __len__(self) -> int:
        return self.steps

    def kind(self, index: int) -> str:
        "What kind of brain a step sees."
        drawn = self.made['real', 'first']._rng(4, index).random_sample()
        for kind, share in self.shares.items():
            if drawn < share:
                return kind
            drawn -= share
        return 'real'

    def __getitem__(self, index: int) -> dict:
        patches = self.made[self.kind(index), 'last' if index >= self.first_whole else 'first']
        return mirrored(patches[index], patches._rng(2, index))


_READY: dict[str, MemoryCase] = {}
_HALVES: dict[str, list[MemoryCase]] = {}


def prepared(study: Study, space: Space) -> MemoryCase:
    "A real exam in model space, read once a process."
    if study.id not in _READY:
        _READY[study.id] = Prepare(space)(study)
    return _READY[study.id]


def halves_of(case: MemoryCase) -> list[MemoryCase]:
    "The mirrored halves of an exam, made once a process."
    if case.id not in _HALVES:
        _HALVES[case.id] = halves(case)
    return _HALVES[case.id]


class Data49(StarterData):
    "The data of one network: the exams that are not held out, and the streams without tumour."

    def setup(self, stage: str | None = None) -> None:
        if self.plan is not None:
            return
        self.plan = plan_machine(self.data)
        real = [prepared(study, self.space) for study in self.real]
        pools = {kind: Pool(self.out / 'pool', kind, self.space, self.settings['stream']) for kind in ('healthy', 'tumour')}
        parts = {'real': real, 'halves': [h for case in real for h in halves_of(case)], **pools}
        print({kind: len(cases) for kind, cases in parts.items()}, flush=True)
        self.val_cases = [pools['tumour'][0]]
        self.patches = Steps(parts, self.settings, self.config)


# ---- cases and folds

def all_studies(shared: Path) -> dict[str, Study]:
    "The 49 exams by name."
    schemas = {'cohorts/glioma42': 'brats2017', 'data/msd': 'msd', 'data/brats2021': 'brats2017'}  # BraTS-Africa's 3 is written as 4 there
    return {s.id: s for folder, schema in schemas.items() for s in find_cases(shared / folder, schema=schema)}


def folds(shared: Path, settings: dict) -> list[list[str]]:
    "The held-out cases that are scored, by fold: without the seven."
    dealt = json.loads((shared / 'cohorts' / settings['folds']).read_text(encoding='utf-8'))['folds']
    return [[name for name in fold if name not in settings['seven']] for fold in dealt]


def network_folder(out: Path, fold: int | str) -> Path:
    "Where a network is trained."
    return out / f'fold{fold}'


def train_fold(out: Path, shared: Path, settings: dict, fold: int) -> Path:
    "The network that has not seen a fold."
    held = folds(shared, settings)[fold]
    studies = [s for name, s in sorted(all_studies(shared).items()) if name not in held]
    init = out / 'init.safetensors'
    if file_digest(init) != settings['init']['sha256']:
        raise SystemExit(f'{init}: not the weights that the settings name')
    config = config_of(settings, network_folder(out, fold), 'none', seed=fold)
    data = Data49(config, settings, out, studies)
    provenance = {'schema': 'msd', 'init_sha256': settings['init']['sha256'], 'held_out': held,
                  'real_cases': [s.id for s in studies]}
    return train(config, data, provenance, load_model(init).networks[0].state_dict())


# ---- the model that is shipped

LICENCE = ('weights: CC BY-SA 4.0 (trained on data under CC BY-SA 4.0 and CC BY 4.0, and on exams of BraTS 2018 to 2020 and BraTS-Africa, whose '
           'collections ask to be cited and have terms of their own: see to them before any use but research)')
ATTRIBUTION = [
    'Medical Segmentation Decathlon, Task01_BrainTumour, CC BY-SA 4.0: Antonelli et al. 2022, doi:10.1038/s41467-022-30695-9',
    'BraTS 2018 to 2021 (BraTS 2021: RSNA-ASNR-MICCAI, CC BY 4.0): Menze et al. 2015, doi:10.1109/TMI.2014.2377694; Bakas et al. 2017, '
    'doi:10.1038/sdata.2017.117; Baid et al. 2021, arXiv:2107.02314; The Cancer Imaging Archive, doi:10.7937/jc8x-9874',
    'BraTS-Africa: Adewole et al. 2023, arXiv:2305.19369',
    'Phantoms: MNI152 atlas, ICBM (Fonov et al. 2011), as shipped with nilearn']


def mean(out: Path, settings: dict) -> Path:
    "The mean of the networks' weights (Wortsman et al. 2022, arXiv:2203.05482), as a checkpoint and as an exported model."
    checkpoint = mean_of([network_folder(out, fold) / 'checkpoints' / 'last.ckpt' for fold in settings['networks']], out / 'mean.ckpt')
    return export_model(checkpoint, out / 'shipped.safetensors')


def ship(out: Path, shared: Path, settings: dict) -> Path:
    "Export the mean with rules and calibration from the out-of-fold predictions, its training cases, and its card."
    studies = [s for _, s in sorted(all_studies(shared).items())]
    split = make_split(studies, n_folds=1)
    held = json.loads((out / 'calibration.json').read_text(encoding='utf-8'))
    content = load_checkpoint(out / 'mean.ckpt')
    before = json.loads((out / 'init.json').read_text(encoding='utf-8'))['origin']
    origin = {'made_by': 'benchmarks/starter49.py', 'settings': settings, 'generator': GENERATOR, 'licence': LICENCE,
              'attribution': ATTRIBUTION, 'started_from': {k: before[k] for k in ('made_by', 'settings', 'generator')}}
    about = {**description(content, out / 'mean.ckpt'), 'real_cases': [s.id for s in studies], 'held_out': [], 'postprocess': held['rules'],
             'thresholds': dict(zip(REGIONS, held['rules']['thresholds'])), 'calibration': held['calibration'],
             'split_sha256': split.digest, 'data_sha256': split.data_digest, 'origin': origin}
    path = export_model(save_checkpoint({**content, KEY: about}, out / 'starter.ckpt'), STARTER)
    save_split(split, STARTER.with_name('starter_split.json'))  # so that `evaluate` knows the cases that it was trained on
    write_card(settings)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=('pool', 'train', 'mean', 'ship', 'card'))
    parser.add_argument('--out', type=Path, help='folder for runs and phantoms')
    parser.add_argument('--shared', type=Path, help='folder with cohorts/ and data/')
    parser.add_argument('--settings', type=Path, default=HERE / 'starter49.yaml')
    parser.add_argument('--folds', type=int, nargs='*', default=range(5))
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = settings_of(args.settings)
    if args.command == 'pool':
        for kind in ('healthy', 'tumour'):
            pool = Pool(args.out / 'pool', kind, build(Space, settings['run']['space']), settings['stream'])
            print(kind, sum(1 for _ in pool), flush=True)
    elif args.command == 'mean':
        print(mean(args.out, settings))
    elif args.command == 'ship':
        print(ship(args.out, args.shared, settings))
    elif args.command == 'card':
        print(write_card(settings))
    for fold in args.folds if args.command == 'train' else ():
        print(train_fold(args.out, args.shared, settings, fold), flush=True)


if __name__ == '__main__':
    main()
