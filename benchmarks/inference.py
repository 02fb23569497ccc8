"""This library against the stock MONAI recipe, with the same weights, on one real case: seconds, peak memory and the Dice between the outputs.

    python benchmarks/inference.py --input_image CASE --output_dir runs/bench                          # the starter model
    python benchmarks/inference.py --ckpt_path best.ckpt --input_image CASE --output_dir runs/bench    # another

Five pairs of processes, one after the other, alternating, on one machine. Each process measures itself: what it needed from
its start to the end (whole process), from reading to the written file (in process), and its peak memory. The medians go into
benchmarks/results/inference.json and inference.md. `--steps` also measures what each of this library's measures brings.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'benchmarks' / 'results'
VARIANTS = ('ours', 'recipe', 'fast')


def recipe(ckpt: str, files: list[str], output: Path) -> dict:
    "What a user of MONAI writes after its tutorials."
    import torch
    from monai.inferers import sliding_window_inference
    from monai.transforms import (Activationsd, AsDiscreted, Compose, EnsureChannelFirstd, Invertd, LoadImaged,
                                  NormalizeIntensityd, Orientationd, SaveImaged, Spacingd)

    from neuroseg3d.checkpoint import load_model
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


def ours(ckpt: str, source: list[str], output: Path, change: dict, fast: bool) -> dict:
    "The same by this library."
    from dataclasses import replace

    from neuroseg3d.checkpoint import load_model
    from neuroseg3d.infer import fast_model, infer_file
    model = load_model(ckpt)
    if fast:
        model = fast_model(model, 'cpu')
    model = replace(model, windows=replace(model.windows, **{'precision': 'auto', **change}))
    began = time.perf_counter()
    infer_file(model, source, output / 'ours.nii.gz', schema='msd', device='cpu')
    return {'in_process_s': time.perf_counter() - began}


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
        found = ours(args.ckpt_path, args.input_image, output, json.loads(args.change), args.child == 'fast')
    print(json.dumps(found | {'peak_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def measure(args, variant: str, change: dict | None = None) -> dict:
    "One process."
    output = Path(args.output_dir) / variant
    output.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, '--child', variant, '--ckpt_path', args.ckpt_path, '--input_image', *args.input_image,
             '--output_dir', str(output), '--threads', str(args.threads), '--change', json.dumps(change or {})]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, 'OMP_NUM_THREADS': str(args.threads), 'PYTHONPATH': str(ROOT)})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found | {'whole_process_s': time.perf_counter() - began}


def regions_of(folder: Path, variant: str):
    "Masks WT, TC, ET that a variant wrote."
    import nibabel as nib
    import numpy as np

    from neuroseg3d.core import labels_to_regions
    values = np.asarray(nib.load(next((folder / variant).glob('*.nii.gz'))).dataobj)
    if values.ndim == 4:  # the recipe writes three masks; what lies outside its parent region is dropped, as in a label map
        return np.logical_and.accumulate(np.moveaxis(values, -1, 0) > 0)
    return labels_to_regions(values)


def dice_between(folder: Path, a: str, b: str) -> dict[str, float]:
    "Dice between two outputs, by region."
    pairs = zip(('WT', 'TC', 'ET'), regions_of(folder, a), regions_of(folder, b))
    return {name: float(2 * (x & y).sum() / max(1, x.sum() + y.sum())) for name, x, y in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--ckpt_path', default='starter', help='checkpoint or exported model (default: the starter model)')
    parser.add_argument('--input_image', nargs='+', required=True, help='4-D file, or four files in the order of MODALITIES')
    parser.add_argument('--output_dir', required=True)
    parser.add_argument('--pairs', type=int, default=5)
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--steps', action='store_true', help='measure also what each measure brings, once each')
    parser.add_argument('--child', choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument('--change', default='{}', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ckpt_path == 'starter':
        from neuroseg3d.checkpoint import STARTER
        args.ckpt_path = str(STARTER)
    if args.child:
        return child(args)
    runs = {v: [] for v in VARIANTS}
    for pair in range(args.pairs):
        for variant in VARIANTS[:: 1 if pair % 2 == 0 else -1]:
            runs[variant].append(measure(args, variant))
            print(pair + 1, variant, {k: round(v, 1) for k, v in runs[variant][-1].items()}, flush=True)
        write(args, runs, {})
    if args.steps:
        write(args, runs, _steps(args))


def _steps(args) -> dict:
    "In-process seconds without one of the measures."
    changes = {'32 bits': {'precision': '32'}, 'overlap 0.25': {'overlap': 0.25}, 'batch 2': {'batch': 2}}
    return {name: measure(args, 'ours', change)['in_process_s'] for name, change in changes.items()}


def model_of(path: str) -> str:
    "What a model is, in words."
    from neuroseg3d.checkpoint import load_model
    model = load_model(path)
    size = sum(p.numel() for p in model.networks[0].parameters()) / 1e6
    return f'{Path(path).stem} ({size:.1f} million weights, {" x ".join(f"{s:g}" for s in model.space.spacing_mm)} mm)'


def write(args, runs: dict, steps: dict) -> None:
    "Medians, ratios and Dice as JSON and as a page."
    folder = Path(args.output_dir)
    medians = {v: {k: median(r[k] for r in rows) for k in rows[0]} for v, rows in runs.items()}
    ratios = {v: {k: medians[v][k] / medians['recipe'][k] for k in medians[v]} for v in ('ours', 'fast')}
    agreement = {v: dice_between(folder, v, 'recipe') for v in ('ours', 'fast')} | {'fast_to_ours': dice_between(folder, 'fast', 'ours')}
    voxels = {r: int(m.sum()) for r, m in zip(('WT', 'TC', 'ET'), regions_of(folder, 'ours'))}
    content = {'case': Path(args.input_image[0]).name, 'model': model_of(args.ckpt_path), 'threads': args.threads, 'pairs': len(runs['recipe']), 'medians': medians,
               'ratios': ratios, 'dice_to_recipe': agreement, 'voxels': voxels, 'in_process_s_with': steps,
               'load_average': os.getloadavg(), 'processor': platform.processor() or platform.machine(), 'runs': runs}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / 'inference.json').write_text(json.dumps(content, indent=1) + '\n')
    pairs = len(runs['recipe'])
    lines = ['# Inference beside the stock MONAI recipe', '',
             f'One real case, {content["model"]}, the same weights, {args.threads} threads on CPU; medians of '
             f'{pairs} processes each, alternating. Written by `benchmarks/inference.py`.', '',
             '| | whole process, s | in process, s | peak memory, MB | Dice to the recipe WT / TC / ET |', '|---|---|---|---|---|']
    for v in VARIANTS:
        m, d = medians[v], agreement.get(v)
        share = (lambda k: f' ({ratios[v][k]:.2f})') if v in ratios else (lambda k: '')
        lines.append(f"| {v} | {m['whole_process_s']:.1f}{share('whole_process_s')} | {m['in_process_s']:.1f}"
                     f"{share('in_process_s')} | {m['peak_mb']:.0f}{share('peak_mb')} | "
                     + (' / '.join(f'{x:.4f}' for x in d.values()) if d else '–') + ' |')
    lines += ['', f'In brackets: relative to the recipe. Voxels found: {voxels}. Dice of `fast` to the default: '
              + ' / '.join(f'{x:.4f}' for x in agreement['fast_to_ours'].values()) + '.']
    lines += ['', 'In process, s, once each: ' + ', '.join(f'{n} {t:.1f}' for n, t in steps.items()) + '.'] if steps else []
    (RESULTS / 'inference.md').write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
