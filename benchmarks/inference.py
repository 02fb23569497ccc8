"""This library against the stock MONAI recipe, with the same weights, on one real case: seconds, peak memory, agreement.

    python benchmarks/inference.py --input_image CASE --label LABEL --output_dir runs/bench     # the starter model
    python benchmarks/inference.py --input_image CASE --output_dir runs/bench --steps           # what each measure brings
    python benchmarks/inference.py --input_image CASE --label LABEL --output_dir runs/bench --agreement

Pairs of processes, one after the other, alternating, on one machine. Each process measures itself: what it needed from its
start to the end (whole process), from reading to the written file (in process), and its peak memory. The same weights are run
twice, in the model space they were trained for and at 1 mm, where nothing is resampled and a brain takes many windows: seconds
and memory there are those of any network of this size, the masks are those of a network outside of its scale. Each call
replaces its own part of benchmarks/results/inference.json and writes inference.md again.
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
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
VARIANTS = ('ours', 'recipe', 'fast')
REGIONS = ('WT', 'TC', 'ET')

#: What is left out, one at a time: what it is, and at which spacing it is measured (None: the model's own).
STEPS = {
    'all measures': (None, 1.0), 'without the brain box': (None, 1.0), 'without brain box and skipped windows': (1.0,),
    'without 16 bits': (None, 1.0), 'without channels last': (1.0,), 'with two windows at a time': (1.0,),
    'with an overlap of 0.75': (1.0,), 'reading by nibabel': (None,), 'four files': (None,),
    'four files, one after the other': (None,), 'places of voxels by matrix product, for each sequence': (None,),
    'looking up every voxel on the way back': (None,), 'small parts by SciPy': (None,), 'writing by nibabel': (None,),
    'importing plots and SciPy too': (None,), 'importing MONAI and Lightning too': (None,),
}


# ---- the two ways

def the_model(ckpt: str, spacing_mm: float | None):
    "The model, in its own space or another."
    from dataclasses import replace

    from neuroseg3d.checkpoint import load_model
    from neuroseg3d.transforms import Space
    model = load_model(ckpt)
    return model if spacing_mm is None else replace(model, space=Space((spacing_mm,) * 3))


def recipe(ckpt: str, spacing_mm: float | None, files: list[str], output: Path) -> dict:
    "What a user of MONAI writes after its tutorials."
    import torch
    from monai.inferers import sliding_window_inference
    from monai.transforms import (Activationsd, AsDiscreted, Compose, EnsureChannelFirstd, Invertd, LoadImaged,
                                  NormalizeIntensityd, Orientationd, SaveImaged, Spacingd)
    model = the_model(ckpt, spacing_mm)
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


def ours(ckpt: str, spacing_mm: float | None, source: list[str], output: Path, step: str, fast: bool) -> dict:
    "The same by this library."
    from dataclasses import replace
    leave_out(step)
    from neuroseg3d.infer import fast_model, infer_file
    model = the_model(ckpt, spacing_mm)
    change = {'without 16 bits': {'precision': '32'}, 'with two windows at a time': {'batch': 2},
              'with an overlap of 0.75': {'overlap': 0.75}}.get(step, {})
    model = replace(model, windows=replace(model.windows, **{'precision': 'auto', **change}))
    if fast:
        model = fast_model(model, 'cpu')
    began = time.perf_counter()
    infer_file(model, source, output / 'ours.nii.gz', schema='msd', device='cpu')
    return {'in_process_s': time.perf_counter() - began}


def leave_out(step: str) -> None:
    "This library without one of its measures, for this process."
    import nibabel as nib
    import numpy as np
    import torch

    from neuroseg3d import nifti, postprocess, transforms, windows
    if step.startswith('without') and 'brain box' in step:
        within = transforms.brain_box  # masks on the way back keep their box
        transforms.brain_box = lambda image, margin=(0, 0, 0): (within(image, margin) if image.dtype == bool else
                                                                ((0, 0, 0), image.shape[1:]))
    if 'skipped windows' in step:
        windows._with_brain = lambda image, config: windows.window_grid(image.shape[1:], config)
    if step == 'without channels last':
        torch.channels_last_3d = torch.contiguous_format
    if step == 'reading by nibabel':
        nifti._volumes = lambda path, dtype=None, places=(): iter(np.moveaxis(nib.load(path).get_fdata(dtype=np.float32), -1, 0))
    if step == 'four files, one after the other':
        nifti.ThreadPoolExecutor = lambda max_workers: ThreadPoolExecutor(1)
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

    from neuroseg3d.transforms import _normalising
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
    output, spacing = Path(args.output_dir), args.spacing_mm
    if args.child == 'recipe':
        found = recipe(args.ckpt_path, spacing, args.input_image, output)
    else:
        found = ours(args.ckpt_path, spacing, args.input_image, output, args.step, args.child == 'fast')
    print(json.dumps(found | {'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def name_of(spacing_mm: float | None) -> str:
    return 'own' if spacing_mm is None else f'{spacing_mm:g} mm'


def folder_of(args, spacing_mm: float | None, variant: str) -> Path:
    return Path(args.output_dir) / name_of(spacing_mm).replace(' ', '_') / variant


def measure(args, spacing_mm: float | None, variant: str, step: str = '') -> dict:
    "One process."
    output = folder_of(args, spacing_mm, 'step' if step else variant)
    output.mkdir(parents=True, exist_ok=True)
    files = args.input_image
    if step.startswith('four files') and len(files) == 1:
        files = four_files(files[0], Path(args.output_dir) / 'four')
    words = [sys.executable, __file__, '--child', variant, '--ckpt_path', args.ckpt_path, '--input_image', *files,
             '--output_dir', str(output), '--threads', str(args.threads), '--step', step]
    words += [] if spacing_mm is None else ['--spacing_mm', str(spacing_mm)]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, 'OMP_NUM_THREADS': str(args.threads), 'PYTHONPATH': str(ROOT)})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().splitlines()[-1]) | {'whole_process_s': time.perf_counter() - began}
    print(name_of(spacing_mm), step or variant, {k: round(v, 1) for k, v in found.items()}, flush=True)
    return found


def measure_step(args, spacing_mm: float | None, step: str) -> dict:
    "Medians of three processes in the model's own space; at 1 mm one is enough."
    runs = [measure(args, spacing_mm, 'ours', step) for _ in range(3 if spacing_mm is None else 1)]
    return {k: median(r[k] for r in runs) for k in runs[0]} | {'processes': len(runs)}


def measure_pairs(args, spacing_mm: float | None) -> dict:
    "Medians, ratios and agreement in one model space."
    runs = {v: [] for v in VARIANTS}
    for pair in range(args.pairs):
        for variant in VARIANTS[:: 1 if pair % 2 == 0 else -1]:
            runs[variant].append(measure(args, spacing_mm, variant))
    medians = {v: {k: median(r[k] for r in rows) for k in rows[0]} for v, rows in runs.items()}
    masks = {v: masks_in(folder_of(args, spacing_mm, v)) for v in VARIANTS}
    return {'pairs': args.pairs, 'medians': medians,
            'ratios': {v: {k: medians[v][k] / medians['recipe'][k] for k in medians[v]} for v in ('ours', 'fast')},
            'dice_to_recipe': {v: dice(masks[v], masks['recipe']) for v in ('ours', 'fast')},
            'dice_fast_to_ours': dice(masks['fast'], masks['ours']),
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


def agreement(args, spacing_mm: float | None) -> dict:
    "What moves the answer: from the recipe to this library one difference at a time, and how near each comes to the expert."
    from dataclasses import replace

    import numpy as np
    import torch

    from neuroseg3d.core import labels_to_regions
    from neuroseg3d.infer import predict_case
    from neuroseg3d.nifti import find_study, read_case
    from neuroseg3d.postprocess import Postprocess
    from neuroseg3d.transforms import HALF, regions_to_native, to_model_space
    folder = folder_of(args, spacing_mm, 'recipe')
    folder.mkdir(parents=True, exist_ok=True)
    recipe(args.ckpt_path, spacing_mm, args.input_image, folder)
    model = the_model(args.ckpt_path, spacing_mm)
    case = read_case(find_study(args.input_image, label=args.label))
    plain, whole = replace(model, descriptions=[{}]), replace(model.space, margin_mm=9999.0)
    all_of_it, box = to_model_space(case, whole), to_model_space(case, model.space)
    images = before_network(model.space.spacing_mm, args.input_image)
    brain = images['brain'] >= HALF
    inside = images['image'] * brain
    low, high = corners_in(box.record.model, case.geometry)
    around = torch.nn.functional.pad(box.image, [int(n) for a in (2, 1, 0) for n in (low[a], high[a] - low[a] - box.image.shape[1 + a])])
    back = lambda p, record: np.logical_and.accumulate(regions_to_native(p, record))
    middle = (slice(None), *(slice(int(a), int(a) + n) for a, n in zip(low, box.image.shape[1:])))
    masks = {'the recipe': masks_in(folder),
             'our network pass (16 bits, channels last) and way back': back(stock_windows(model, z_scores(images['image'])), all_of_it.record),
             'and the edge of the brain cut at one half': back(stock_windows(model, z_scores(inside)), all_of_it.record),
             'and voxels counted from the brain box': back(stock_windows(model, around)[middle], box.record),
             'and windows over the brain box': labels_to_regions(predict_case(plain, case, 'cpu', Postprocess()).label),
             "and the model's own rules: this library": labels_to_regions(predict_case(model, case, 'cpu').label)}
    expert = labels_to_regions(case.label)
    return {name: {'to_recipe': dice(m, masks['the recipe']), 'to_expert': dice(m, expert)} for name, m in masks.items()}


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
    "Our network pass through the recipe's windows: 96 voxels on all axes, zeros around a volume that is smaller."
    import torch

    from neuroseg3d.windows import Windows, predict_probabilities
    missing = [max(0, 96 - n) for n in image.shape[1:]]
    padded = torch.nn.functional.pad(image, [n for m in missing[::-1] for n in (m // 2, m - m // 2)])
    found = predict_probabilities(model.networks, padded, Windows())
    return found[(slice(None), *(slice(m // 2, m // 2 + n) for m, n in zip(missing, image.shape[1:])))]


def corners_in(grid, native):
    "Whole voxels of a grid in model space from its first one to both ends of the scan: before it, and in all."
    import numpy as np
    shift = np.linalg.solve(grid.affine, native.affine)
    ends = np.array([shift[:3, :3] @ corner + shift[:3, 3] for corner in np.ndindex(2, 2, 2) for corner in [np.array(corner) * (np.array(native.shape) - 1)]])
    low = np.floor(-ends.min(0) + 1e-3).astype(int)
    return low, low + np.floor(ends.max(0) + 1e-3).astype(int) + 1


# ---- the page

def model_of(path: str) -> str:
    "What a model is, in words."
    from neuroseg3d.checkpoint import load_model
    model = load_model(path)
    size = sum(p.numel() for p in model.networks[0].parameters()) / 1e6
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    return f'{Path(path).stem} ({size:.1f} million weights, {" x ".join(f"{s:g}" for s in model.space.spacing_mm)} mm, SHA-256 {digest}…)'


def slashed(values: dict[str, float]) -> str:
    return ' / '.join(f'{x:.4f}' for x in values.values())


def pair_lines(content: dict) -> list[str]:
    lines = ['| model space | | whole process, s | in process, s | peak memory, MB | Dice to the recipe WT / TC / ET |', '|---|---|---|---|---|---|']
    for name, part in content['spaces'].items():
        for v in VARIANTS:
            m, ratios = part['medians'][v], part['ratios'].get(v)
            cells = [f"{m[k]:{f}}" + (f' ({ratios[k]:.2f})' if ratios else '') for k, f in
                     (('whole_process_s', '.1f'), ('in_process_s', '.1f'), ('peak_mb', '.0f'))]
            lines.append(f"| {name} | {v} | {' | '.join(cells)} | {slashed(part['dice_to_recipe'][v]) if ratios else '–'} |")
    parts = content['spaces'].items()
    return [*lines, '', 'In brackets: relative to the recipe. Voxels found: ' + '; '.join(f'{n} {p["voxels"]}' for n, p in parts)
            + '. Dice of `fast` to the default: ' + '; '.join(f'{n} {slashed(p["dice_fast_to_ours"])}' for n, p in parts) + '. Load average '
            'of the machine over the last five minutes (1 to 2 is this benchmark; above that, other work slowed all of them): '
            + '; '.join(f'{n} {p["load"]:.1f}' if 'load' in p else f'{n} not noted' for n, p in parts) + '.']


def step_lines(steps: dict) -> list[str]:
    n = max(m.get('processes', 1) for by_space in steps.values() for m in by_space.values())
    lines = ['', '## What each measure brings', '', 'One measure left out or changed at a time, ' +
             ('one process each.' if n == 1 else f"medians of {n} processes in the model's own space and of one at 1 mm."), '',
             '| | model space | in process, s | whole process, s | peak memory, MB |', '|---|---|---|---|---|']
    return lines + [f"| {step} | {space} | {m['in_process_s']:.2f} | {m['whole_process_s']:.1f} | {m['peak_mb']:.0f} |"
                    for step, by_space in steps.items() for space, m in by_space.items()]


def agreement_lines(found: dict) -> list[str]:
    lines = ['', '## What moves the answer', '', 'From the recipe to this library, one difference after the other, on the grid of the scan: '
             'Dice to the recipe, and to the expert.', '', '| model space | | to the recipe WT / TC / ET | to the expert WT / TC / ET |', '|---|---|---|---|']
    return lines + [f"| {space} | {name} | {slashed(d['to_recipe'])} | {slashed(d['to_expert'])} |"
                    for space, rows in found.items() for name, d in rows.items()]


def write(content: dict) -> None:
    "JSON and a page."
    (RESULTS / 'inference.json').write_text(json.dumps(content, indent=1) + '\n')
    about = content['about']
    lines = ['# Inference beside the stock MONAI recipe', '',
             f'One real case ({about["case"]}), {about["model"]}, the same weights, {about["threads"]} threads on CPU; medians of '
             f'{about["pairs"]} processes each, alternating. *own*: the model space of the model; *1 mm*: the same weights at the '
             'spacing of the scan, outside of the scale that they were trained for, for seconds and memory. Written by '
             '`benchmarks/inference.py`.', '']
    lines += pair_lines(content) if 'spaces' in content else []
    lines += step_lines(content['steps']) if 'steps' in content else []
    lines += agreement_lines(content['agreement']) if 'agreement' in content else []
    (RESULTS / 'inference.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ckpt_path', default='starter', help='checkpoint or exported model (default: the starter model)')
    parser.add_argument('--input_image', nargs='+', required=True, help='4-D file, or four files in the order of MODALITIES')
    parser.add_argument('--label', help="the expert's label map, for --agreement")
    parser.add_argument('--output_dir', required=True)
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--spaces', nargs='+', default=['own', '1 mm'], choices=['own', '1 mm'], help='model spaces to measure the pairs in')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--steps', action='store_true', help='measure what each measure brings, once each, in place of the pairs')
    parser.add_argument('--agreement', action='store_true', help='find what moves the answer, in place of the pairs')
    parser.add_argument('--child', choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument('--step', default='', help=argparse.SUPPRESS)
    parser.add_argument('--spacing_mm', type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ckpt_path == 'starter':
        from neuroseg3d.checkpoint import STARTER
        args.ckpt_path = str(STARTER)
    if args.child:
        return child(args)
    path = RESULTS / 'inference.json'
    content = {k: v for k, v in (json.loads(path.read_text()) if path.is_file() else {}).items()
               if k in ('about', 'spaces', 'steps', 'agreement')}
    if args.steps:
        content['steps'] = {step: {name_of(s): measure_step(args, s, step) for s in spaces} for step, spaces in STEPS.items()}
    elif args.agreement:
        content['agreement'] = {name_of(s): agreement(args, s) for s in (None, 1.0)}
    else:
        content['about'] = {'case': Path(args.input_image[0]).name, 'model': model_of(args.ckpt_path), 'threads': args.threads,
                            'pairs': args.pairs}
        content['spaces'] = content.get('spaces', {}) | {name_of(s): measure_pairs(args, s) for s in (None, 1.0) if name_of(s) in args.spaces}
    write(content)


if __name__ == '__main__':
    main()
