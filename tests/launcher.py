"""Runs trainings in processes that are killed: one Python that has imported everything, a fork for each run.

Reads one order a line (JSON) from stdin, and answers each with the exit status of its process.
"""
from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time

import torch

torch.set_num_threads(1)

import neuroseg3d.networks.checkpoint as checkpoint
import neuroseg3d.training.tracking as tracking
import neuroseg3d.training.task as train
from neuroseg3d.cli import main


def counted(function, n: int, before):
    "The function, which calls `before` with its arguments at its n-th call."
    calls = [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == n:
            before(*args)
        return function(*args, **kwargs)
    return wrapper


def arm(place: str, n: int, signum: int) -> None:
    "Send this process a signal at the n-th time it gets to a place."
    def die(*args):
        os.kill(os.getpid(), signum)

    def half_a_file(content, file):
        import io
        whole = io.BytesIO()
        torch_save(content, whole)
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signum)
    torch_save = torch.save
    if place == 'step':
        train.SegmentationTask.training_step = counted(train.SegmentationTask.training_step, n, die)
    elif place == 'validation':
        train.SegmentationTask.validation_step = counted(train.SegmentationTask.validation_step, n, die)
    elif place == 'save':
        checkpoint.torch.save = counted(torch.save, n, half_a_file)
    elif place == 'saved':  # and not logged yet
        tracking.RunTracker.on_train_batch_end = counted(tracking.RunTracker.on_train_batch_end, n, die)
    elif place == 'rename':
        os.replace = counted(os.replace, n, die)
    elif place == 'worker':
        train.SegmentationTask.training_step = counted(train.SegmentationTask.training_step, n, lambda task, *a: [
            os.kill(w.pid, signum) for w in __import__('multiprocessing').active_children()])
    elif place == 'compile':
        def fails(*args):
            raise RuntimeError('no compiler here')
        torch.compile = lambda network: fails
    elif place == 'memory':
        def full(forward, parameters, config, batch_size, *rest):
            if batch_size > 1 or not config.model.checkpointing:
                raise torch.OutOfMemoryError('simulated')
            return 0.0
        train.time_step = full


def scale_gradients() -> None:
    "Train in 16 bits with a gradient scaler, which Lightning itself offers on a GPU alone."
    from pytorch_lightning.plugins import MixedPrecision
    trainer = train.pl.Trainer

    def scaled(precision, plugins, **settings):
        scaler = torch.amp.GradScaler('cpu', init_scale=256.0, growth_interval=2)
        return trainer(plugins=[*plugins, MixedPrecision('16-mixed', 'cpu', scaler)], **settings)
    train.pl.Trainer = scaled


def run(order: dict) -> int:
    "A training by the command line, in this process."
    if order.get('scaler'):
        scale_gradients()
    if 'at' in order:
        arm(order['at'], order.get('n', 1), order.get('signal', signal.SIGKILL))
    if 'largest_file' in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order['largest_file'],) * 2)
    try:
        return main(order['words'])
    except SystemExit as end:
        return end.code
    finally:
        sys.stdout.flush()


def start(order: dict) -> int:
    "Fork a process for an order."
    log = os.open(order['log'], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    process = os.fork()
    if not process:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os._exit(run(order) or 0)
    os.close(log)
    return process


def wait(process: int, order: dict) -> int:
    "The exit status of a process; negative for a signal. With `after_s` it is killed so long after its first step."
    began, deadline = None, time.monotonic() + 120
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if began is None and any(word in open(order['log']).read() for word in ('training for', 'resuming from')):
            began = time.monotonic()
        late = began and time.monotonic() - began > order.get('after_s', 1e9)
        if late or time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.005)


if __name__ == '__main__':  # a data-loader worker imports this file again
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(wait(start(order), order)), flush=True)
