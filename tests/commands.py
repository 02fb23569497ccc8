"""Every command of `neuroseg3d` with a small call that works; run as a script, several of them in one process and its surroundings.

`python commands.py KIT OUT NAME ...` runs the commands of these names; after each it writes a line with its exit code and seconds
to both streams. `SPOILT` in the environment names what is taken from the file system before (see SPOIL).
"""
from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ['--data.patch_size', '16', '--data.loader', 'thread', '--data.workers', '1', '--data.n_folds', '2', '--space.spacing_mm', '6',
         '--model.preset', 'tiny', '--model.filters', '[4, 8]', '--model.strides', '[1, 2]', '--trainer.max_steps', '1', '--trainer.val_every_steps', '1',
         '--trainer.accelerator', 'cpu', '--logger', 'none']


def _train(kit: Path, out: Path) -> list:
    return ['train', '--data.root', kit / 'cohort', '--data.cache_dir', out / 'cache', '--trainer.output_dir', out / 'run', *SMALL, '--logger', 'csv']


#: Name of a command -> its words, given the folder of what `make_kit` has made and a folder for results.
COMMANDS: dict[str, Callable[[Path, Path], list]] = {
    'phantom': lambda kit, out: ['phantom', '--output_dir', out / 'phantom', '--n', 1, '--spacing_mm', 6, '--workers', 1],
    'download': lambda kit, out: ['download', '--output_dir', out / 'data'],
    'eda': lambda kit, out: ['eda', '--data', kit / 'cohort', '--output_dir', out / 'eda'],
    'convert': lambda kit, out: ['convert', '--input', kit / 'cohort', '--output_dir', out / 'nnunet', '--to', 'nnunet'],
    'train': _train,
    'infer': lambda kit, out: ['infer', '--ckpt_path', kit / 'model.ckpt', '--input_image', kit / 'new', '--output_dir', out / 'pred',
                               '--save_probabilities', '--save_uncertainty', '--device', 'cpu'],
    'export': lambda kit, out: ['export', '--ckpt_path', kit / 'model.ckpt', '--output_path', out / 'export' / 'model.safetensors'],
    'model': lambda kit, out: ['model', 'starter'],
    'postprocess': lambda kit, out: ['postprocess', '--pred', kit / 'pred', '--data', kit / 'cohort', '--ckpt_path', own(kit / 'model.ckpt', out / 'tuned')],
    'calibrate': lambda kit, out: ['calibrate', '--ckpt_path', own(kit / 'cv' / 'fold_0', out / 'calibrated') / 'checkpoints' / 'best.ckpt',
                                   '--data', kit / 'cohort', '--device', 'cpu'],
    'ensemble': lambda kit, out: ['ensemble', '--run_dir', own(kit / 'cv', out / 'folds'), '--data', kit / 'cohort', '--test', kit / 'new', '--device', 'cpu'],
    'evaluate': lambda kit, out: ['evaluate', '--pred', kit / 'pred', '--ref', kit / 'cohort', '--output_dir', out / 'scores', '--over_brain'],
    'report': lambda kit, out: ['report', '--pred', kit / 'one', '--data', kit / 'new', '--output_dir', out / 'report', '--ckpt_path', kit / 'model.ckpt',
                                '--no_attribution'],
    'explain': lambda kit, out: ['explain', '--ckpt_path', kit / 'model.ckpt', '--input_image', kit / 'new' / 'imagesTs' / 'BALL_Ts00.nii.gz',
                                 '--output_dir', out / 'maps', '--method', 'grad_cam', '--device', 'cpu'],
    'demo': lambda kit, out: ['demo', '--output_dir', out / 'demo'],
}
#: Those whose libraries take longest; `demo` is all others in one.
HEAVY = ('train', 'report', 'demo')


def own(source: Path, folder: Path) -> Path:
    "A copy that a command may change; the source where nothing can be written."
    target = folder / source.name
    try:
        folder.mkdir(parents=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    except OSError:
        return target if target.exists() else source
    return target


def make_kit(folder: Path) -> Path:
    "What the commands work on: a cohort, a model of random weights, its predictions, two folds."
    from balls import ball_cohort, ball_model

    from neuroseg3d.cli import main
    ball_cohort(folder / 'cohort', n=2)
    ball_cohort(folder / 'new', n=0, n_test=1)
    ball_model(folder / 'model.ckpt')
    infer = [['infer', '--ckpt_path', folder / 'model.ckpt', '--input_image', folder / data, '--output_dir', folder / out, '--save_probabilities', '--device', 'cpu']
             for data, out in (('cohort', 'pred'), ('new', 'one'))]
    folds = ['train', '--data.root', folder / 'cohort', '--trainer.output_dir', folder / 'cv', *SMALL, '--folds', 'all']
    for call in (*infer, folds):
        assert main([str(w) for w in call]) == 0, call
    return folder


def _serve_an_archive() -> None:
    "The Decathlon's archive, as a small one on a port of this machine."
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from neuroseg3d.studies import download
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode='w') as tar:
        info = tarfile.TarInfo('Task01_BrainTumour/dataset.json')
        info.size = 2
        tar.addfile(info, io.BytesIO(b'{}'))

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(packed.getvalue())))
            self.end_headers()
            self.wfile.write(packed.getvalue())

        def log_message(self, *words): ...
    server = HTTPServer(('127.0.0.1', 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for function in (download.download, download.fetch):
        names = [n for n in function.__code__.co_varnames]
        function.__defaults__ = tuple({'url': f'http://127.0.0.1:{server.server_port}/a.tar', 'md5': hashlib.md5(packed.getvalue()).hexdigest()}.get(n, d)
                                      for n, d in zip(names[function.__code__.co_argcount - len(function.__defaults__ or ()):], function.__defaults__ or ()))


def _shorten_the_demo() -> None:
    from dataclasses import replace

    from neuroseg3d import demo
    usual = demo.demo_config

    def short(folder):
        config = usual(folder)
        return replace(config, data=replace(config.data, n_folds=2, patch_size=(16, 16, 16)), space=replace(config.space, spacing_mm=(6.0,) * 3),
                       trainer=replace(config.trainer, max_steps=1, val_every_steps=1, precision='32-true'))
    demo.DEMO_COHORT.update(n=2, n_test=1, spacing_mm=6.0, workers=1)
    demo.demo_config = short


def _refuse(*names: str) -> None:
    def refused(*args, **options):
        raise PermissionError(1, 'Operation not permitted')
    for name in names:
        if hasattr(os, name):
            setattr(os, name, refused)


#: What can be taken from the file system within the process that runs the commands.
SPOIL: dict[str, Callable[[], None]] = {
    'chmod': lambda: _refuse('chmod', 'fchmod', 'lchmod', 'chown', 'utime'),
    'links': lambda: _refuse('link', 'symlink'),
    'fsync': lambda: _refuse('fsync'),
}


@dataclass(frozen=True)
class Run:
    "One command in some surroundings."
    code: int
    seconds: float
    out: str
    err: str


def run_commands(
    names: Iterable[str],  # of COMMANDS
    kit: Path,  # of `make_kit`
    out: Path,  # for results
    prefix: Sequence[str] = (),  # a command that starts the process
    changes: Mapping[str, str | None] = {},  # of the environment; None takes a variable away
    **options,  # of subprocess.run
) -> dict[str, Run]:  # name -> what became of it
    "Run commands one after the other, in one process of these surroundings."
    env = {k: v for k, v in (os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **changes}).items() if v is not None}
    done = subprocess.run([*prefix, sys.executable, Path(__file__), kit, out, *names], env=env, capture_output=True, timeout=300, **options)
    out, err = (_parts(s.decode('utf-8', 'replace')) for s in (done.stdout, done.stderr))
    assert set(err) == set(names), f'ended with {done.returncode}: {done.stderr[-3000:].decode("utf-8", "replace")}'
    return {n: Run(int(err[n][1]), float(err[n][2]), out.get(n, ('',))[0], err[n][0]) for n in names}


def _parts(text: str) -> dict[str, tuple[str, str, str]]:
    return {name: (said, code, seconds) for said, name, code, seconds in re.findall(r'(.*?)@@ (\w+) (-?\d+) ([\d.]+)\n', text, re.DOTALL)}


def _main(kit: Path, out: Path, names: Sequence[str]) -> None:
    from neuroseg3d import cli
    if 'download' in names:
        _serve_an_archive()
    if 'demo' in names:
        _shorten_the_demo()
    calls = {name: [str(w) for w in COMMANDS[name](kit, out)] for name in names}
    for what in os.environ.get('SPOILT', '').split():
        SPOIL[what]()
    for name, words in calls.items():
        began = time.monotonic()
        code = cli.main(words)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                print(f'@@ {name} {code} {time.monotonic() - began:.1f}', file=stream, flush=True)


if __name__ == '__main__':
    _main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
