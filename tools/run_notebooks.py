"""Run every notebook as a test (nbdev_test), two at a time, and say how many ran.

    python tools/run_notebooks.py            # all
    python tools/run_notebooks.py 07_unet    # some

Cells with a flag of `tst_flags` (slow, gpu) are left out, as nbdev does. nbdev_test succeeds when it finds nothing to test;
this does not.
"""
from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from refresh import NBS, ROOT

WORKERS = 2


def run(path: Path) -> tuple[Path, subprocess.CompletedProcess, float]:
    "One notebook in a process of its own."
    threads = str(max(1, (os.cpu_count() or 2) // WORKERS))
    env = os.environ | {'OMP_NUM_THREADS': threads, 'MKL_NUM_THREADS': threads, 'MPLBACKEND': 'agg', 'WANDB_MODE': 'offline',
                        'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))}
    start = time.perf_counter()
    command = [Path(sys.executable).parent / 'nbdev_test', '--path', path, '--n_workers', '0']
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return path, done, time.perf_counter() - start


def main(names: list[str]) -> int:
    paths = [NBS / f'{Path(n).stem}.ipynb' for n in names] or sorted(NBS.glob('*.ipynb'), reverse=True)  # the tutorials, which take longest, first
    missing = [p.name for p in paths if not p.exists()]
    if missing or not paths:
        print(f'no such notebook: {", ".join(missing) or NBS}', file=sys.stderr)
        return 1
    failed = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for path, done, seconds in pool.map(run, paths):
            ok = done.returncode == 0 and 'Success.' in done.stdout
            print(f'{"ok    " if ok else "FAILED"} {path.name} ({seconds:.0f} s)', flush=True)
            if not ok:
                failed.append(path.name)
                print('\n'.join(f'    {x}' for x in (done.stdout + done.stderr).strip().splitlines()[-60:]), flush=True)
    print(f'{len(paths) - len(failed)} of {len(paths)} notebooks passed' + (f'; failed: {", ".join(failed)}' if failed else ''))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
