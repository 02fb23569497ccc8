"""Run every notebook as a test, as nbdev_test does, two at a time, and say how many ran.

    python tools/run_notebooks.py            # all
    python tools/run_notebooks.py 40_networks.unet    # some

Cells with a flag of `tst_flags` (slow, gpu, msd) are left out, as nbdev does. Two things differ from nbdev_test: finding nothing to test
is a failure, and each notebook's process begins as a copy of one that has the large libraries in memory, since importing
them anew takes longer than most notebooks do.
"""
from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from refresh import NBS, ROOT

WORKERS = 2
LARGE = ['nbdev.test', 'torch', 'monai.data', 'monai.transforms', 'pytorch_lightning', 'matplotlib.pyplot', 'pandas', 'nibabel',
         'plotly.graph_objects', 'scipy.ndimage', 'skimage.measure', 'hypothesis', 'pytest']


def execute(path: Path, log: str) -> None:
    "One notebook, in a process of its own that ends with 1 where a cell failed; what it prints goes to a file."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    out = os.open(log, os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    good, _ = test_nb(path, skip_flags=get_config(cfg_name='settings.ini', path=ROOT).tst_flags.split(), basepath=ROOT)
    sys.exit(0 if good else 1)


def run(path: Path) -> tuple[Path, bool, str, float]:
    "Whether a notebook passed, what it printed, and seconds."
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile('r', suffix='.log') as log:
        process = multiprocessing.get_context('forkserver').Process(target=execute, args=(path, log.name))
        process.start()
        process.join()
        return path, process.exitcode == 0, log.read(), time.perf_counter() - start


def main(names: list[str]) -> int:
    # the tutorials, which take longest, first
    paths = [NBS / f'{Path(n).stem}.ipynb' for n in names] or sorted(NBS.glob('*.ipynb'), reverse=True)
    missing = [p.name for p in paths if not p.exists()]
    if missing or not paths:
        print(f'no such notebook: {", ".join(missing) or NBS}', file=sys.stderr)
        return 1
    threads = str(max(1, (os.cpu_count() or 2) // WORKERS))
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, MPLBACKEND='agg', WANDB_MODE='offline',
                      PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))
    multiprocessing.get_context('forkserver').set_forkserver_preload(LARGE)
    failed = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for path, ok, output, seconds in pool.map(run, paths):
            print(f'{"ok    " if ok else "FAILED"} {path.name} ({seconds:.0f} s)', flush=True)
            if not ok:
                failed.append(path.name)
                print('\n'.join(f'    {x}' for x in output.strip().splitlines()[-60:]), flush=True)
    print(f'{len(paths) - len(failed)} of {len(paths)} notebooks passed' + (f'; failed: {", ".join(failed)}' if failed else ''))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
