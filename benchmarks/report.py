"""How large a case's page and its mesh are, and what they take: a real case and an in-silico one, both of 240x240x155 voxels.

    python benchmarks/report.py --case ../shared/data/brats2021/BraTS2021_00006

Segments each with the starter model, with everything that a page can show (uncertainty in two parts, attribution, errors), and writes
sizes and seconds to benchmarks/results/report.json. Without --case the in-silico patient alone. Limits: 8 MB a page, 5 MB a mesh.
"""
import argparse
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from neuroseg3d.review.casepage import CaseResult, ModelCard, ReportOptions, _mesh, write_case
from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import Model, load_model
from neuroseg3d.core import Case
from neuroseg3d.evaluation.metrics import score_case
from neuroseg3d.phantom import make_phantom
from neuroseg3d.review.report import _with_model
from neuroseg3d.evaluation.uncertainty import assess_case

RESULT = Path(__file__).resolve().parent / 'results' / 'report.json'


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--case', help='a real case')
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model()
    model = replace(model, windows=replace(model.windows, flips=('none', 'x')))  # two members, so that uncertainty has two parts
    cases = [read_case(args.case)] if args.case else []
    found = [measure(model, case) for case in (*cases, make_phantom(3, 1.0))]
    text = json.dumps({'cores': os.cpu_count(), 'threads': 1, 'pages': found}, indent=1)
    print(text)
    RESULT.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
