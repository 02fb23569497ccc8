"""How large a case's page and its mesh are, and what they take: a real case and an in-silico one, both of 240x240x155 voxels.

    python benchmarks/report.py --case ../shared/data/brats2021/BraTS2021_00006
    python benchmarks/report.py --large /tmp/large

The first segments each with the starter model, with everything that a page can show (uncertainty in two parts, attribution, errors), and
writes sizes and seconds to benchmarks/results/report.json. Without --case the in-silico patient alone. Limits: 8 MB a page, 5 MB a mesh.

The second makes, once, an in-silico patient of 512x512x300 voxels (a scanner's field of view: an eighth of it is brain, the rest is air) in
that folder, segments it with the starter model, and runs `neuroseg3d report` on it as a process. Seconds, CPU seconds and peak memory go
to the same file, beside what is there. Limits on an idle machine of two cores: 60 s and 2 GB.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from neuroseg3d.casepage import CaseResult, ModelCard, ReportOptions, _mesh, write_case
from neuroseg3d.cases import read_case
from neuroseg3d.checkpoint import Model, load_model
from neuroseg3d.core import Case
from neuroseg3d.metrics import score_case
from neuroseg3d.nifti import write_label
from neuroseg3d.phantom import make_phantom
from neuroseg3d.report import _with_model
from neuroseg3d.uncertainty import assess_case

RESULT = Path(__file__).resolve().parent / 'results' / 'report.json'
LARGE_SHAPE, LARGE_MM = (512, 512, 300), (0.5, 0.5, 0.6)
NAMES = {'FLAIR': 'flair', 'T1w': 't1', 'T1gd': 't1ce', 'T2w': 't2'}


def measure(model: Model, case: Case) -> dict:
    "Sizes in MB and seconds of a page with everything on it."
    label = assess_case(model, case).label
    rows = score_case(label, case.label, case.geometry.spacing_mm, case=case.id)
    result, began = CaseResult(case, label, rows), time.perf_counter()
    result = _with_model(result, model, attribute=True)
    assessed = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        page = write_case(result, Path(folder) / 'case.html', ModelCard.of(model), {'command': 'benchmarks/report.py'})
        size = page.stat().st_size
    return {'case': case.id, 'grid': list(case.geometry.shape), 'page_mb': round(size / 1e6, 2),
            'mesh_mb': round(len(_mesh(result, ReportOptions())) / 1e6, 2), 'page_s': round(time.perf_counter() - assessed, 1),
            'uncertainty_and_attribution_s': round(assessed - began, 1)}


def make_large(folder: Path) -> None:
    "A case of four files and a reference as BraTS has them, and the starter model's prediction of it with its manifest."
    cohort, case = folder / 'cohort', make_phantom(3, LARGE_MM, LARGE_SHAPE)
    (cohort / case.id).mkdir(parents=True)
    for name, volume in zip(case.modalities, case.image):
        nib.save(nib.Nifti1Image(volume.astype(np.int16), case.geometry.affine), cohort / case.id / f'{case.id}_{NAMES[name]}.nii.gz')
    write_label(cohort / case.id / f'{case.id}_seg.nii.gz', case.label, case, 'brats2017')
    command('infer', '--input_image', cohort, '--output_dir', folder / 'predictions', '--fast')


def command(*words: str | Path) -> dict[str, float]:
    "Run a command of the library as a process: seconds, CPU seconds and peak memory."
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, '-m', 'neuroseg3d', *map(str, words)])
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f'neuroseg3d {words[0]} ended with {process.returncode}')
    return {'seconds': round(time.perf_counter() - began, 1), 'cpu_seconds': round(used.ru_utime + used.ru_stime, 1),
            'peak_gb': round(used.ru_maxrss * 1024 / 1e9, 2)}


def measure_large(folder: Path) -> dict:
    "What the report of a case of 512x512x300 voxels takes."
    if not (folder / 'predictions' / 'manifest.json').is_file():
        make_large(folder)
    with tempfile.TemporaryDirectory() as place:
        found = command('report', '--pred', folder / 'predictions', '--data', folder / 'cohort', '--output_dir', place)
        page, = Path(place, 'cases').glob('*.html')
        return {'case': page.stem, 'grid': list(LARGE_SHAPE), 'page_mb': round(page.stat().st_size / 1e6, 2)} | found


def store(name: str, found: object) -> None:
    "Write a result beside those that are there."
    known = json.loads(RESULT.read_text(encoding='utf-8')) if RESULT.is_file() else {}
    text = json.dumps(known | {name: found}, indent=1)
    print(text)
    RESULT.write_text(text + '\n', encoding='utf-8')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', help='a real case')
    parser.add_argument('--large', type=Path, metavar='FOLDER', help='measure the report of a case of 512x512x300 voxels, made there')
    args = parser.parse_args()
    if args.large:
        store('large', {'cores': os.cpu_count(), **measure_large(args.large)})
        return
    torch.set_num_threads(1)
    model = load_model()
    model = replace(model, windows=replace(model.windows, flips=('none', 'x')))  # two members, so that uncertainty has two parts
    cases = [read_case(args.case)] if args.case else []
    found = [measure(model, case) for case in (*cases, make_phantom(3, 1.0))]
    store('cores', os.cpu_count())
    store('threads', 1)
    store('pages', found)


if __name__ == '__main__':
    main()
