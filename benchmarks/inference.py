"""This library against the stock MONAI recipe, with the same weights, on one real case: seconds, peak memory, agreement.

    python benchmarks/inference.py --train DATA --output_dir runs/bench                          # base, at 1 mm, on real cases: an hour
    python benchmarks/inference.py --input_image CASE --label LABEL --output_dir runs/bench      # seconds, memory, masks
    python benchmarks/inference.py --input_image CASE --output_dir runs/bench --steps            # what each measure brings
    python benchmarks/inference.py --input_image CASE --label LABEL --output_dir runs/bench --agreement

Two models: *starter*, that of the package, at 2 mm; and *base*, the default network at the spacing of the scan, trained here on the
cases below DATA (not on the one that is measured), which ignores air and looks through the recipe's own windows. Pairs of processes,
one after the other, alternating, on one machine. Each process measures itself: what it needed from its start to the end (whole
process), from reading to the written file (in process), and its peak memory. Each call replaces its own part of
benchmarks/results/inference.json and writes inference.md again; `--models` names those to be measured.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
VARIANTS = ('ours', 'recipe', 'box', 'fast')  # box: windows over the brain's box, where the model looks on the whole scan
TRAINING = {'data.n_folds': 1, 'data.batch_size': 1, 'data.overhang': 0.5, 'data.cache': 'ram', 'data.workers': 1, 'model.norm_over': 'brain',
            'infer.grid': 'scan', 'optim.ema_decay': 0.995, 'trainer.max_steps': 2000, 'trainer.val_every_steps': 1000,
            'trainer.checkpoint_every_steps': 100}  # of `base`, beside the defaults
REGIONS = ('WT', 'TC', 'ET')

#: What is left out, one at a time: what it is, and for which models it is measured.
STEPS = {
    'all measures': ('starter', 'base'), 'without the brain box': ('starter',), 'with the air in its windows': ('base',),
    'with air, and empty windows too': ('base',), 'without 16 bits': ('starter', 'base'), 'without channels last': ('base',),
    'with two windows at a time': ('base',), 'with an overlap of 0.75': ('base',), 'the scan kept in memory': ('base',),
    'large blocks of memory kept': ('base',),
    'reading by nibabel': ('starter',), 'four files': ('starter',), 'four files, one after the other': ('starter',),
    'places of voxels by matrix product, for each sequence': ('starter',), 'looking up every voxel on the way back': ('starter',),
    'small parts by SciPy': ('starter',), 'writing by nibabel': ('starter',), 'importing plots and SciPy too': ('starter',),
    'importing MONAI and Lightning too': ('starter',),
}


# ---- the two ways

def train_base(data: str, output: Path) -> None:
    "Train `base` where it is not there yet, or go on, and export it."
    from neuroseg3d.cli import main as neuroseg3d
    words = [word for name, value in TRAINING.items() for word in (f'--{name}', str(value))]
    train = ['train', '--config_dir', str(ROOT / 'configs'), '--resume', 'auto', '--data.root', data,
             '--data.cache_dir', str(output / 'cache'), '--trainer.output_dir', str(output / 'base'), *words]
    export = ['export', '--ckpt_path', str(output / 'base' / 'checkpoints' / 'last.ckpt'), '--output_path', str(output / 'base.safetensors')]
    for command in (train, export):
        if status := neuroseg3d(command):
            raise SystemExit(status)


def path_of(name: str, output: Path) -> str:
    "The file of a model."
    from neuroseg3d.networks.checkpoint import STARTER
    return str(STARTER if name == 'starter' else output / f'{name}.safetensors')


def recipe(ckpt: str, files: list[str], output: Path) -> dict:
    "What a user of MONAI writes after its tutorials."
    import torch
    from monai.inferers import sliding_window_inference
    from monai.transforms import (Activationsd, AsDiscreted, Compose, EnsureChannelFirstd, Invertd, LoadImaged,
                                  NormalizeIntensityd, Orientationd, SaveImaged, Spacingd)
    from neuroseg3d.networks.checkpoint import load_model
    model = load_model(ckpt)
    network = model.networks[0].to(memory_format=torch.contiguous_format).eval()
    began = time.perf_counter()
    before = Compose([LoadImaged('image'), EnsureChannelFirstd('image'), Orientationd('image', axcodes='RAS'),
                      Spacingd('image', pixdim=model.space.spacing_mm, mode='bilinear'),
                      NormalizeIntensityd('image', nonzero=True, channel_wise=True)])
    after = Compose([Activationsd('pred', sigmoid=True),
                     Invertd('pred', before, orig_keys='image', nearest_interp=False, to_tensor=True),
                     AsDiscreted('pred', threshold=0.5),
                     SaveImaged('pred', output_dir=output, output_postfix='', separate_folder=False, print_log=False,
                                output_dtype='uint8')])
    data = before({'image': files if len(files) > 1 else files[0]})
    with torch.no_grad():
        data['pred'] = sliding_window_inference(data['image'][None], (96, 96, 96), 1, network, overlap=0.5, mode='gaussian')[0]
        after(data)
    return {'in_process_s': time.perf_counter() - began}


def ours(ckpt: str, source: list[str], output: Path, step: str, variant: str) -> dict:
    "The same by this library."
    from dataclasses import replace
    leave_out(step)
    from neuroseg3d.networks.checkpoint import load_model
    from neuroseg3d.inference.predict import fast_model, infer_file
    model = load_model(ckpt)
    change = {'without 16 bits': {'precision': '32'}, 'with two windows at a time': {'batch': 2},
              'with an overlap of 0.75': {'overlap': 0.75}}.get(step, {})
    model = replace(model, windows=replace(model.windows, **{'precision': 'auto', **change}))
    if variant == 'box':
        model = replace(model, windows=replace(model.windows, grid='brain'))
    if variant == 'fast':
        model = fast_model(model, 'cpu')
    began = time.perf_counter()
    infer_file(model, source, output / 'ours.nii.gz', schema='msd', device='cpu')
    return {'in_process_s': time.perf_counter() - began}


def leave_out(step: str) -> None:
    "This library without one of its measures, for this process."
    import nibabel as nib
    import numpy as np
    import torch

    from neuroseg3d import core
    from neuroseg3d.inference import postprocess
    from neuroseg3d.networks import windows
    from neuroseg3d.studies import cases, nifti, preprocess as transforms
    if step == 'without the brain box':
        within = transforms.brain_box  # masks on the way back keep their box
        transforms.brain_box = lambda image, margin=(0, 0, 0): (within(image, margin) if image.dtype == bool and len(image) == 3 else
                                                                ((0, 0, 0), image.shape[1:]))
    if step == 'with the air in its windows':
        windows._air_free_steps = lambda networks: None
    if step == 'with air, and empty windows too':
        windows._cut_to_brain = lambda look, brain, steps: look
    if step == 'large blocks of memory kept':
        windows._large_blocks_returned = nullcontext
    if step == 'the scan kept in memory':
        core.Case.forget_image = lambda case: None
    if step == 'without channels last':
        torch.channels_last_3d = torch.contiguous_format
    if step == 'reading by nibabel':
        cases.read_volumes = lambda path, dtype=None, places=(): iter(np.moveaxis(nib.load(path).get_fdata(dtype=np.float32), -1, 0))
    if step == 'four files, one after the other':
        cases.ThreadPoolExecutor = lambda max_workers: ThreadPoolExecutor(1)
    if 'matrix product' in step:
        transforms._places = lambda source, target: (source, target)
        transforms._look_up = lambda volume, grids, mode: by_matrix_product(volume, *grids, mode)
    if step == 'small parts by SciPy':
        postprocess._large_parts = parts_by_scipy
    if step == 'looking up every voxel on the way back':
        transforms._unresample_cut = lambda region, op, cut: transforms._unresample(region, op, 'bilinear') >= cut
    if step == 'writing by nibabel':
        nifti.save_atomically = lambda image, path: (path.parent.mkdir(parents=True, exist_ok=True), nib.save(image, path), path)[2]
    if step == 'importing plots and SciPy too':
        import matplotlib.pyplot  # noqa: F401
        import scipy.ndimage  # noqa: F401
        import scipy.optimize  # noqa: F401
    if step == 'importing MONAI and Lightning too':
        import monai.transforms  # noqa: F401
        import pytorch_lightning  # noqa: F401


def by_matrix_product(volume, source, target, mode: str):
    "A volume on another grid, by PyTorch's `affine_grid`."
    import numpy as np
    import torch
    from torch.nn import functional as F

    from neuroseg3d.studies.preprocess import _normalising
    lookup = torch.from_numpy(np.linalg.solve(source.affine, target.affine)).float()
    theta = _normalising(source.shape) @ lookup @ torch.from_numpy(np.linalg.inv(_normalising(target.shape).numpy()))
    places = F.affine_grid(theta[[2, 1, 0]][:, [2, 1, 0, 3]][None], [1, 1, *target.shape], align_corners=False)
    return F.grid_sample(volume[None].contiguous(), places, mode, 'border', align_corners=False)[0]


def parts_by_scipy(mask, min_voxels: float):
    "Connected parts of a mask that are large enough."
    import numpy as np
    from scipy import ndimage
    parts, n = ndimage.label(mask, np.ones((3, 3, 3), bool))
    large = np.bincount(parts.ravel(), minlength=n + 1) >= min_voxels
    large[0] = False
    return large[parts]


def four_files(path: str, folder: Path) -> list[str]:
    "The sequences of a 4-D file as files of their own."
    import nibabel as nib
    import numpy as np

    from neuroseg3d.core import MODALITIES
    image, paths = nib.load(path), [folder / f'case_{m}.nii.gz' for m in MODALITIES]
    if not all(p.is_file() for p in paths):
        folder.mkdir(parents=True, exist_ok=True)
        for channel, p in zip(np.moveaxis(np.asarray(image.dataobj), -1, 0), paths):
            nib.save(nib.Nifti1Image(channel, image.affine), p)
    return [str(p) for p in paths]


# ---- measuring

def child(args) -> None:
    "One measurement, told on the last line of the output."
    import warnings
    warnings.filterwarnings('ignore')
    import torch
    torch.set_num_threads(args.threads)
    output = Path(args.output_dir)
    if args.child == 'recipe':
        found = recipe(args.ckpt_path, args.input_image, output)
    else:
        found = ours(args.ckpt_path, args.input_image, output, args.step, args.child)
    print(json.dumps(found | {'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def folder_of(args, name: str, variant: str) -> Path:
    return Path(args.output_dir) / name / variant


def measure(args, name: str, variant: str, step: str = '') -> dict:
    "One process."
    output = folder_of(args, name, 'step' if step else variant)
    output.mkdir(parents=True, exist_ok=True)
    files = args.input_image
    if step.startswith('four files') and len(files) == 1:
        files = four_files(files[0], Path(args.output_dir) / 'four')
    words = [sys.executable, __file__, '--child', variant, '--ckpt_path', path_of(name, Path(args.output_dir)), '--input_image', *files,
             '--output_dir', str(output), '--threads', str(args.threads), '--step', step]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, 'OMP_NUM_THREADS': str(args.threads), 'PYTHONPATH': str(ROOT)})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().splitlines()[-1]) | {'whole_process_s': time.perf_counter() - began}
    print(name, step or variant, {k: round(v, 1) for k, v in found.items()}, flush=True)
    return found


def measure_step(args, name: str, step: str) -> dict:
    "Medians of three processes of the starter; of base, whose seconds are many, one is enough."
    runs = [measure(args, name, 'ours', step) for _ in range(3 if name == 'starter' else 1)]
    return {k: median(r[k] for r in runs) for k in runs[0]} | {'processes': len(runs)}


def measure_pairs(args, name: str) -> dict:
    "Medians, ratios and agreement of one model."
    from neuroseg3d.networks.checkpoint import load_model
    on_scan = load_model(path_of(name, Path(args.output_dir))).windows.grid == 'scan'
    variants = [v for v in VARIANTS if on_scan or v != 'box']
    runs = {v: [] for v in variants}
    for pair in range(args.pairs):
        for variant in variants[:: 1 if pair % 2 == 0 else -1]:
            runs[variant].append(measure(args, name, variant))
    medians = {v: {k: median(r[k] for r in rows) for k in rows[0]} for v, rows in runs.items()}
    masks = {v: masks_in(folder_of(args, name, v)) for v in variants}
    others = [v for v in variants if v != 'recipe']
    return {'model': model_of(path_of(name, Path(args.output_dir))), 'pairs': args.pairs, 'medians': medians,
            'ratios': {v: {k: medians[v][k] / medians['recipe'][k] for k in medians[v]} for v in others},
            'dice_to_recipe': {v: dice(masks[v], masks['recipe']) for v in others},
            'voxels': dict(zip(REGIONS, (int(m.sum()) for m in masks['ours']))), 'load': os.getloadavg()[1], 'runs': runs}


# ---- agreement

def masks_in(folder: Path):
    "Masks WT, TC, ET that a variant wrote."
    import nibabel as nib
    import numpy as np

    from neuroseg3d.core import labels_to_regions
    values = np.asarray(nib.load(next(folder.glob('*.nii.gz'))).dataobj)
    if values.ndim == 4:  # the recipe writes three masks; what lies outside its parent region is dropped, as in a label map
        return np.logical_and.accumulate(np.moveaxis(values, -1, 0) > 0)
    return labels_to_regions(values)


def dice(a, b) -> dict[str, float]:
    "Dice by region."
    return {name: float(2 * (x & y).sum() / max(1, x.sum() + y.sum())) for name, x, y in zip(REGIONS, a, b)}


def agreement(args, name: str) -> dict:
    "What moves the answer: from the recipe to this library one difference at a time, and how near each comes to the expert."
    from neuroseg3d.studies.cases import read_case
    from neuroseg3d.networks.checkpoint import load_model
    from neuroseg3d.core import labels_to_regions
    from neuroseg3d.studies.layouts import find_study
    ckpt, folder = path_of(name, Path(args.output_dir)), folder_of(args, name, 'recipe')
    folder.mkdir(parents=True, exist_ok=True)
    recipe(ckpt, args.input_image, folder)
    model, case = load_model(ckpt), read_case(find_study(args.input_image, label=args.label))
    further = steps_on_scan if model.windows.grid == 'scan' else steps_over_box
    masks = {'the recipe': masks_in(folder)} | further(model, case, args.input_image)
    expert = labels_to_regions(case.label)
    return {step: {'to_recipe': dice(m, masks['the recipe']), 'to_expert': dice(m, expert)} for step, m in masks.items()}


def steps_on_scan(model, case, files: list[str]) -> dict:
    "From the recipe's windows in 32 bits to those over the brain's box: masks by what they are."
    from dataclasses import replace

    from neuroseg3d.core import labels_to_regions
    from neuroseg3d.inference.predict import predict_case
    masks = lambda **change: labels_to_regions(predict_case(replace(model, windows=replace(model.windows, **change)), case, 'cpu').label)
    return {'its windows without their air, 32 bits': masks(precision='32'), 'and 16 bits where the processor has them: this library': masks(),
            "windows over the brain's box in their place": masks(grid='brain'), IN_A_HURRY: in_a_hurry(model, case)}


IN_A_HURRY = 'in a hurry: `--fast`'


def in_a_hurry(model, case):
    "Masks of `--fast`."
    from neuroseg3d.core import labels_to_regions
    from neuroseg3d.inference.predict import fast_model, predict_case
    return labels_to_regions(predict_case(fast_model(model, 'cpu'), case, 'cpu').label)


def steps_over_box(model, case, files: list[str]) -> dict:
    "From the recipe's volume to the brain's box, one difference at a time: masks by what they are."
    from dataclasses import replace

    import numpy as np
    import torch

    from neuroseg3d.core import labels_to_regions
    from neuroseg3d.inference.predict import predict_case
    from neuroseg3d.inference.postprocess import Postprocess
    from neuroseg3d.studies.preprocess import HALF, regions_to_native, to_model_space
    plain, whole = replace(model, descriptions=[{}]), replace(model.space, margin_mm=9999.0)
    all_of_it, box = to_model_space(case, whole), to_model_space(case, model.space)
    images = before_network(model.space.spacing_mm, files)
    inside = images['image'] * (images['brain'] >= HALF)
    before, behind = box.record.around
    around = torch.nn.functional.pad(box.image, [n for axis in (2, 1, 0) for n in (before[axis], behind[axis])])
    middle = (slice(None), *(slice(b, b + n) for b, n in zip(before, box.image.shape[1:])))
    back = lambda p, record: np.logical_and.accumulate(regions_to_native(p, record))
    return {'our network pass (16 bits, channels last) and way back': back(stock_windows(model, z_scores(images['image'])), all_of_it.record),
            'and the edge of the brain cut at one half': back(stock_windows(model, z_scores(inside)), all_of_it.record),
            'and voxels counted from the brain box': back(stock_windows(model, around)[middle], box.record),
            'and windows over the brain box': labels_to_regions(predict_case(plain, case, 'cpu', Postprocess()).label),
            "and the model's own rules: this library": labels_to_regions(predict_case(model, case, 'cpu').label),
            IN_A_HURRY: in_a_hurry(model, case)}


def before_network(spacing_mm, files: list[str]) -> dict:
    "What the recipe makes of an image before it normalises it, and of its mask of non-zero voxels."
    from monai.transforms import CopyItemsd, Compose, EnsureChannelFirstd, Lambdad, LoadImaged, Orientationd, Spacingd
    keys = ['image', 'brain']
    found = Compose([LoadImaged('image'), EnsureChannelFirstd('image'), CopyItemsd('image', names='brain'),
                     Lambdad('brain', lambda x: (x != 0).any(0, keepdim=True).float()), Orientationd(keys, axcodes='RAS'),
                     Spacingd(keys, pixdim=spacing_mm, mode='bilinear')])({'image': files if len(files) > 1 else files[0]})
    return {key: found[key].as_tensor().float() for key in keys}


def z_scores(image):
    "As the recipe normalises."
    from monai.transforms import NormalizeIntensity
    return NormalizeIntensity(nonzero=True, channel_wise=True)(image.clone())


def stock_windows(model, image):
    "Our network pass through the recipe's windows."
    from neuroseg3d.networks.windows import Windows, predict_probabilities
    return predict_probabilities(model.networks, image, Windows(grid='scan'))


# ---- the page

def model_of(path: str) -> str:
    "What a model is, in words."
    from neuroseg3d.networks.checkpoint import load_model
    model = load_model(path)
    size = sum(p.numel() for p in model.networks[0].parameters()) / 1e6
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    spacing, over = ' x '.join(f'{s:g}' for s in model.space.spacing_mm), model.networks[0].config.norm_over
    looks = f'norm over the {over}, windows over the {model.windows.grid}' if model.windows.grid == 'scan' else 'windows over the brain box'
    return f'{Path(path).stem} ({size:.1f} million weights, {spacing} mm, {looks}, SHA-256 {digest}…)'


def slashed(values: dict[str, float]) -> str:
    return ' / '.join(f'{x:.4f}' for x in values.values())


WORDS = {'box': "ours, windows over the brain's box"}


def pair_lines(content: dict) -> list[str]:
    lines = ['| model | | whole process, s | in process, s | peak memory, MB | Dice to the recipe WT / TC / ET |', '|---|---|---|---|---|---|']
    for name, part in content['models'].items():
        for v in part['medians']:
            m, ratios = part['medians'][v], part['ratios'].get(v)
            cells = [f"{m[k]:{f}}" + (f' ({ratios[k]:.2f})' if ratios else '') for k, f in
                     (('whole_process_s', '.1f'), ('in_process_s', '.1f'), ('peak_mb', '.0f'))]
            lines.append(f"| {name} | {WORDS.get(v, v)} | {' | '.join(cells)} | {slashed(part['dice_to_recipe'][v]) if ratios else '–'} |")
    parts = content['models'].items()
    return [*lines, '', 'In brackets: relative to the recipe. Voxels found: ' + '; '.join(f'{n} {p["voxels"]}' for n, p in parts)
            + '. Load average of the machine over the last five minutes (1 to 2 is this benchmark; above that, other work slowed all of them): '
            + '; '.join(f'{n} {p["load"]:.1f}' for n, p in parts) + '.']


def step_lines(steps: dict) -> list[str]:
    lines = ['', '## What each measure brings', '', 'One measure left out or changed at a time, medians of 3 processes of starter, one process of base.', '',
             '| | model | in process, s | whole process, s | peak memory, MB |', '|---|---|---|---|---|']
    return lines + [f"| {step} | {name} | {m['in_process_s']:.2f} | {m['whole_process_s']:.1f} | {m['peak_mb']:.0f} |"
                    for step, by_model in steps.items() for name, m in by_model.items()]


def agreement_lines(found: dict) -> list[str]:
    lines = ['', '## What moves the answer', '', 'From the recipe to this library, one difference after the other, on the grid of the scan: '
             'Dice to the recipe, and to the expert.', '', '| model | | to the recipe WT / TC / ET | to the expert WT / TC / ET |', '|---|---|---|---|']
    return lines + [f"| {name} | {step} | {slashed(d['to_recipe'])} | {slashed(d['to_expert'])} |"
                    for name, rows in found.items() for step, d in rows.items()]


def write(content: dict) -> None:
    "JSON and a page."
    (RESULTS / 'inference.json').write_text(json.dumps(content, indent=1) + '\n')
    about = content['about']
    lines = ['# Inference beside the stock MONAI recipe', '',
             f'One real case ({about["case"]}), the same weights in both, {about["threads"]} threads on CPU; medians of {about["pairs"]} '
             'processes each, alternating. ' + ' '.join(f'*{name}*: {part["model"]}.' for name, part in content.get('models', {}).items())
             + ' Written by `benchmarks/inference.py`.', '']
    lines += pair_lines(content) if 'models' in content else []
    lines += step_lines(content['steps']) if 'steps' in content else []
    lines += agreement_lines(content['agreement']) if 'agreement' in content else []
    (RESULTS / 'inference.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', metavar='DATA', help='folder of labelled cases: train base on them, in place of the pairs')
    parser.add_argument('--input_image', nargs='+', help='4-D file, or four files in the order of MODALITIES')
    parser.add_argument('--label', help="the expert's label map, for --agreement")
    parser.add_argument('--output_dir', required=True)
    parser.add_argument('--models', nargs='+', default=['starter', 'base'], choices=['starter', 'base'])
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--steps', action='store_true', help='measure what each measure brings, in place of the pairs')
    parser.add_argument('--agreement', action='store_true', help='find what moves the answer, in place of the pairs')
    parser.add_argument('--child', choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument('--step', default='', help=argparse.SUPPRESS)
    parser.add_argument('--ckpt_path', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args)
    if args.train:
        return train_base(args.train, Path(args.output_dir))
    if not args.input_image:
        parser.error('--input_image is missing')
    path = RESULTS / 'inference.json'
    content = {k: v for k, v in (json.loads(path.read_text()) if path.is_file() else {}).items()
               if k in ('about', 'models', 'steps', 'agreement')}
    if args.steps:
        found = {step: {name: measure_step(args, name, step) for name in names if name in args.models} for step, names in STEPS.items()}
        content['steps'] = {step: content.get('steps', {}).get(step, {}) | new for step, new in found.items()}
    elif args.agreement:
        content['agreement'] = content.get('agreement', {}) | {name: agreement(args, name) for name in args.models}
    else:
        content['about'] = {'case': Path(args.input_image[0]).name, 'threads': args.threads, 'pairs': args.pairs}
        content['models'] = content.get('models', {}) | {name: measure_pairs(args, name) for name in args.models}
    write(content)


if __name__ == '__main__':
    main()
