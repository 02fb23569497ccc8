"""What the data path costs: batches alone, steps alone, and both at once, as in training.

    python benchmarks/data_path.py                        # the base net, 2 patches of 96 x 96 x 96, all cores
    python benchmarks/data_path.py --preset tiny --steps 8

Phantoms at 1 mm, kept in memory; patches cut and augmented with the defaults, by the loader that the machine plan chooses; steps with
optimiser, clipping and averaged weights, in the precision that training would choose. The steps alone use one batch again and
again, before and after those with the loader, so that a machine that becomes slower meanwhile shows. Writes
benchmarks/results/data_path.json.
"""
import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from neuroseg3d.config import build
from neuroseg3d.phantom import write_cohort
from neuroseg3d.training.task import Config, SegmentationTask, faster_precision, open_data, try_step

RESULT = Path(__file__).resolve().parent / 'results' / 'data_path.json'


def timed(steps: int, batches, learn) -> list[float]:
    "Seconds of each step: a batch, and what is learnt from it."
    seconds, began = [], time.perf_counter()
    for batch in islice(batches, steps):
        learn(batch)
        now = time.perf_counter()
        seconds.append(now - began)
        began = now
    return seconds


def learner(task: SegmentationTask, precision: str):
    "A training step, as Lightning would take it."
    optimizer = task.configure_optimizers()['optimizer']

    def learn(batch: dict) -> None:
        image = batch['image'].contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast('cpu', torch.bfloat16) if precision == 'bf16-mixed' else contextlib.nullcontext():
            loss = task.loss(task.forward_network(image), batch['label'])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.network.parameters(), task.config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        task.ema.update_parameters(task.network)
    return learn


def endless(batch: dict):
    while True:
        yield batch


def measure(config: Config, steps: int) -> dict:
    "Seconds a step of the three kinds."
    data = open_data(config, progress=False)
    task = SegmentationTask(config)
    seconds = try_step(task, data.plan.batch_size, torch.device('cpu'), '32-true')
    precision, _ = faster_precision(task, data.plan.batch_size, seconds)
    loader, learn = data.train_dataloader(), learner(task, precision)
    alone = timed(4 * steps, iter(loader), lambda batch: None)[steps:]
    first = next(iter(loader))
    learn(first)
    before = timed(steps, endless(first), learn)
    both = timed(steps + 2, iter(loader), learn)[2:]  # the first wait for the first batch, the last has none to make
    after = timed(steps, endless(first), learn)
    step_s, both_s = statistics.median(before + after), statistics.median(both)
    return {'loader': data.plan.loader, 'workers': data.plan.workers, 'precision': precision,
            'data_alone_s': round(statistics.mean(alone), 3), 'step_alone_s': round(step_s, 3), 'both_s': round(both_s, 3),
            'step_alone_each_s': [round(s, 3) for s in before + after], 'both_each_s': [round(s, 3) for s in both],
            'data_path_cost': round(both_s / step_s - 1, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--preset', default='base')
    parser.add_argument('--patch_size', type=int, default=96)
    parser.add_argument('--steps', type=int, default=4, help='of each kind')
    parser.add_argument('--cohort', help='folder with a cohort at 1 mm; default: three phantoms, made first')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = args.cohort or write_cohort(Path(folder) / 'cohort', n=3, seed=3, spacing_mm=1.0, progress=False)
        config = build(Config, {'data': {'root': str(root), 'n_folds': 1, 'patch_size': args.patch_size},
                                'model': {'preset': args.preset}, 'trainer': {'accelerator': 'cpu'}})
        config = replace(config, trainer=replace(config.trainer, max_steps=100_000, val_every_steps=1000))
        out = {'preset': args.preset, 'patch_size': args.patch_size, 'batch_size': config.data.batch_size,
               'cores': os.cpu_count(), 'threads': torch.get_num_threads(), 'torch': torch.__version__,
               'load': round(os.getloadavg()[0], 1), **measure(config, args.steps)}
    text = json.dumps(out, indent=1)
    print(text)
    RESULT.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
