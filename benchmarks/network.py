"""What the network costs: a training step of `base` and `large` beside MONAI's DynUNet of the same shape and weights, in one run.

    python benchmarks/network.py                       # on the GPU where there is one: 2 patches of 128 x 128 x 128
    python benchmarks/network.py --device cpu          # 1 patch of 64 x 64 x 64, all cores
    python benchmarks/network.py --presets base --precision 16-mixed --pairs 20

A step is the forward pass, Dice and cross-entropy of every head, the backward pass, clipping and AdamW, on the same noise, with
training's deterministic algorithms (`--free_algorithms` lifts that) and 16 bits where the device computes in them. Ours is laid out
channels-last, as in training (`--layout` tries another). On a GPU PyTorch's instance norm takes its input out of that layout;
`--keep_layout` tries there what we do on a CPU, one sample at a time, where it stays. DynUNet gets the layout in which it turns out
to be faster. Its coarser heads come enlarged to full size and are compared with the label map there, as MONAI's own recipes do;
ours are compared at their own size (`--no_deep_supervision` leaves these heads out). Weights are the same: the largest difference
of the two networks' logits is in the result.

After the warm-up the two take turns, and who begins alternates; seconds are medians, the ratio is the median over the pairs. Peak
memory is that of the network alone with its optimiser: on a GPU what PyTorch's allocator held at most, on a CPU what a process of
its own took in addition to what it had before the network was made. Writes benchmarks/results/network_<cpu|cuda>.json.
"""
import argparse
import contextlib
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import monai
    from monai.networks.nets import DynUNet

from neuroseg3d.networks.losses import SegmentationLoss
from neuroseg3d.training.task import Optim, choose_precision, cpu_has_bf16, parameter_groups
from neuroseg3d.networks.unet import InstanceNorm, UNet, UNetConfig, from_dynunet
from neuroseg3d.networks.windows import is_out_of_memory

RESULTS = Path(__file__).resolve().parent / 'results'
LAYOUTS = {'channels_last': torch.channels_last_3d, 'contiguous': torch.contiguous_format}
DTYPES = {'32-true': None, 'bf16-mixed': torch.bfloat16, '16-mixed': torch.float16}
WARM_UP = 2  # steps


def dynunet(config: UNetConfig) -> DynUNet:
    "MONAI's network of the same shape."
    return DynUNet(3, config.in_channels, config.out_channels, config.kernels, config.strides, config.strides[1:],
                   filters=config.filters, res_block=config.residual, norm_name=('INSTANCE', {'affine': True}),
                   deep_supervision=config.deep_supervision > 0, deep_supr_num=max(1, config.deep_supervision))


def make(name: str, config: UNetConfig) -> torch.nn.Module:
    "One of the two, on the CPU; both have the same weights."
    torch.manual_seed(0)
    theirs = dynunet(config)
    if name == 'dynunet':
        return theirs
    ours = UNet(config)
    ours.load_state_dict(from_dynunet(theirs.state_dict(), len(config.filters)))
    return ours


def keep_layout() -> None:
    "Let our instance norm take one sample at a time on a GPU too."
    def forward(self, x):
        samples = [F.batch_norm(s, None, None, self.weight, self.bias, True, 0.0, self.eps) for s in x.split(1)]
        return samples[0] if len(samples) == 1 else torch.cat(samples)
    InstanceNorm.forward = forward


class Learner:
    "A network that is trained, one step after the other on the same batch."

    def __init__(self, name: str, config: UNetConfig, layout: str, args: argparse.Namespace):
        self.layout, self.device, self.dtype = layout, torch.device(args.device), DTYPES[args.precision]
        self.network = make(name, config).to(self.device, memory_format=LAYOUTS[layout]).train()
        self.loss, optim = SegmentationLoss().to(self.device), Optim()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.network, optim.weight_decay), lr=optim.learning_rate)
        self.clip_norm = optim.clip_norm
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.precision == '16-mixed')
        generator, size = torch.Generator().manual_seed(1), [args.patch_size] * 3
        image = torch.randn(args.batch_size, config.in_channels, *size, generator=generator)
        self.image = image.to(self.device, memory_format=LAYOUTS[layout])
        self.label = torch.randint(0, 4, (args.batch_size, 1, *size), generator=generator, dtype=torch.uint8).to(self.device)

    def step(self) -> float:
        "Seconds of one step."
        began = time.perf_counter()
        with torch.autocast(self.device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            logits = self.network(self.image)
            heads = logits.unbind(1) if isinstance(logits, torch.Tensor) and logits.ndim == 6 else logits
            loss = self.loss(heads, self.label)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def steps(self, n: int) -> float:
        "Mean seconds of some steps."
        return statistics.mean(self.step() for _ in range(n))


def release() -> None:
    "Give memory back that nothing holds any more."
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_here(name: str, preset: str, layout: str, args: argparse.Namespace) -> float:
    "MB that a network takes with its optimiser and a step; in a process of its own on a CPU."
    config = config_of(preset, args)
    if args.device == 'cuda':
        release()
        torch.cuda.reset_peak_memory_stats()
        Learner(name, config, layout, args).steps(WARM_UP)
        return torch.cuda.max_memory_allocated() / 1e6
    release()
    before = peak_of_process()
    Learner(name, config, layout, args).steps(WARM_UP)
    return peak_of_process() - before


def peak_of_process() -> float:
    "MB that this process has held at most; Linux's own count, as the one of getrusage begins with the parent's."
    status = Path('/proc/self/status')
    if status.is_file():
        return int(status.read_text().split('VmHWM:')[1].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)


def peak_mb(name: str, preset: str, layout: str, args: argparse.Namespace) -> float:
    "The same, measured where nothing else counts."
    if args.device == 'cuda':
        return peak_here(name, preset, layout, args)
    words = [sys.executable, __file__, '--peak_of', name, layout, '--presets', preset, *settings(args)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f'{name} ended with {done.returncode}')
    return float(done.stdout.split()[-1])


def settings(args: argparse.Namespace) -> list[str]:
    "The flags that a process of its own needs."
    names = ('device', 'patch_size', 'batch_size', 'precision')
    flags = ['--no_deep_supervision'] * (not args.deep_supervision) + ['--free_algorithms'] * (not args.deterministic)
    return [word for n in names for word in (f'--{n}', str(getattr(args, n)))] + flags


def config_of(preset: str, args: argparse.Namespace) -> UNetConfig:
    config = UNetConfig(preset=preset)
    return config if args.deep_supervision else replace(config, deep_supervision=0)


def largest_difference(config: UNetConfig) -> float:
    "How far apart the logits of the two networks are with the same weights, in 32 bits on the CPU."
    size = 2 * config.multiple[0]
    image = torch.randn(1, config.in_channels, size, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours, theirs = (make(name, config).eval()(image) for name in ('ours', 'dynunet'))
    return float((ours - theirs).abs().max())


def if_it_fits(run):
    "What a function returns; None where memory does not suffice for it."
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    release()
    return None


def seconds_in(layout: str, config: UNetConfig, args: argparse.Namespace) -> float:
    "Seconds of one of DynUNet's steps."
    learner = Learner('dynunet', config, layout, args)
    learner.steps(1)
    return round(learner.steps(args.steps), 4)


def take_turns(learners: dict[str, Learner], args: argparse.Namespace) -> dict[str, list[float]]:
    "Seconds a step of each network in every pair, after a warm-up."
    each: dict[str, list[float]] = {name: [] for name in learners}
    for learner in learners.values():
        learner.steps(WARM_UP)
    for pair in range(args.pairs):
        for name in list(learners)[::-1 if pair % 2 else 1]:
            each[name].append(learners[name].steps(args.steps))
    return each


def measure(preset: str, args: argparse.Namespace) -> dict:
    "The two networks of a preset; one that does not fit in memory is left out and named."
    config = config_of(preset, args)
    tried = {layout: if_it_fits(lambda: seconds_in(layout, config, args)) for layout in LAYOUTS}
    layouts = {'ours': args.layout, 'dynunet': min(tried, key=lambda layout: tried[layout] or float('inf'))}
    peaks = {name: if_it_fits(lambda: peak_mb(name, preset, layouts[name], args)) for name in layouts}
    release()
    each = take_turns({name: Learner(name, config, layouts[name], args) for name in layouts if peaks[name] is not None}, args)
    release()
    found = {'filters': config.filters, 'deep_supervision': config.deep_supervision,
             'parameters': sum(p.numel() for p in make('ours', config).parameters()),
             'largest_difference': largest_difference(config)}
    found |= {name: {'layout': layouts[name], **numbers(each.get(name), peaks[name], args)} for name in layouts}
    found['dynunet']['step_s_by_layout'] = tried
    if len(each) == 2:
        found['time_ratio'] = round(statistics.median(a / b for a, b in zip(each['ours'], each['dynunet'])), 3)
        found['memory_ratio'] = round(peaks['ours'] / peaks['dynunet'], 3)
    return found


def numbers(seconds: list[float] | None, peak: float | None, args: argparse.Namespace) -> dict:
    "What there is to say about a network."
    if seconds is None:
        return {'out_of_memory': True}
    step_s = statistics.median(seconds)
    return {'step_s': round(step_s, 4), 'voxels_per_s': round(args.batch_size * args.patch_size ** 3 / step_s), 'peak_mb': round(peak),
            'each_s': [round(s, 4) for s in seconds]}


def told(preset: str, found: dict) -> str:
    "A line for people."
    rows = [f'{name} is out of memory' if 'out_of_memory' in (v := found[name]) else
            f'{name} {v["step_s"]:.3f} s a step, {v["voxels_per_s"] / 1e6:.3g} million voxels a second, {v["peak_mb"]} MB'
            for name in ('ours', 'dynunet')]
    ratios = [f'ratios {found["time_ratio"]} in time, {found["memory_ratio"]} in memory'] if 'time_ratio' in found else []
    return f'{preset}: ' + '; '.join(rows + ratios)


def machine(args: argparse.Namespace) -> dict:
    "Where and with what it was measured."
    name = torch.cuda.get_device_name() if args.device == 'cuda' else cpu_name()
    return {'device': args.device, 'name': name, 'threads': torch.get_num_threads(), 'cores': os.cpu_count(),
            'torch': torch.__version__, 'monai': monai.__version__, 'cuda': torch.version.cuda,
            'cudnn': torch.backends.cudnn.version() if args.device == 'cuda' else None, 'load': round(os.getloadavg()[0], 1)}


def cpu_name() -> str:
    "The processor, as Linux calls it."
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')), platform.processor())


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    "The flags, with what they leave open decided by the device."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', default='auto', choices=['auto', 'cpu', 'cuda'])
    parser.add_argument('--patch_size', type=int, help='voxels along an edge; default 128 on a GPU, 64 on a CPU')
    parser.add_argument('--batch_size', type=int, help='patches a step; default 2 on a GPU, 1 on a CPU')
    parser.add_argument('--presets', nargs='+', default=['base', 'large'], choices=['base', 'large'])
    parser.add_argument('--pairs', type=int, help='default 10 on a GPU, 5 on a CPU')
    parser.add_argument('--steps', type=int, help='of each network in a pair; default 5 on a GPU, 1 on a CPU')
    parser.add_argument('--precision', default='auto', choices=['auto', *DTYPES], help='default: what training would choose')
    parser.add_argument('--layout', default='channels_last', choices=list(LAYOUTS), help='of our network')
    parser.add_argument('--keep_layout', action='store_true', help='our instance norm one sample at a time, on a GPU too')
    parser.add_argument('--no_deep_supervision', dest='deep_supervision', action='store_false', help='the finest head alone')
    parser.add_argument('--free_algorithms', dest='deterministic', action='store_false',
                        help='those that cuDNN finds fastest, as with --trainer.deterministic false')
    parser.add_argument('--peak_of', nargs=2, metavar=('NAME', 'LAYOUT'), help=argparse.SUPPRESS)
    parser.add_argument('--output_dir', type=Path, default=RESULTS)
    args = parser.parse_args(words)
    if args.device == 'auto':
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    elif args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch finds no GPU here')
    if args.device == 'cpu' and args.precision == '16-mixed':
        parser.error('--precision 16-mixed: a CPU is far slower in fp16 than in 32 bits; expected bf16-mixed or 32-true')
    for name, on_gpu, on_cpu in (('patch_size', 128, 64), ('batch_size', 2, 1), ('pairs', 10, 5), ('steps', 5, 1)):
        if getattr(args, name) is None:
            setattr(args, name, on_gpu if args.device == 'cuda' else on_cpu)
    if args.precision == 'auto':
        args.precision = choose_precision('auto', 'gpu') if args.device == 'cuda' else 'bf16-mixed' if cpu_has_bf16() else '32-true'
    return args


def main(words: list[str] | None = None) -> None:
    args = parsed(words)
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not args.deterministic
    warnings.filterwarnings('ignore', message='.*does not have a deterministic implementation.*')  # DynUNet's enlarged heads
    if args.keep_layout:
        keep_layout()
    if args.peak_of:
        print(peak_here(args.peak_of[0], args.presets[0], args.peak_of[1], args))
        return
    out = {**machine(args), **{k: getattr(args, k) for k in ('patch_size', 'batch_size', 'precision', 'pairs', 'steps', 'deterministic', 'keep_layout')}}
    out['presets'] = {}
    for preset in args.presets:
        out['presets'][preset] = measure(preset, args)
        print(told(preset, out['presets'][preset]), flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / f'network_{args.device}.json').write_text(json.dumps(out, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
