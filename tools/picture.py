"""Draw the picture of the front page from what `make demo` made: the test case of median Dice.

    python tools/picture.py [runs/demo]
"""
from __future__ import annotations

import csv
import sys
from pathlib import Path

from neuroseg3d.studies.cases import read_case
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.nifti import read_label
from neuroseg3d.viz import show_planes

ROOT = Path(__file__).resolve().parent.parent


def main(demo: Path) -> None:
    "Write nbs/images/result.png."
    rows = [r for r in csv.DictReader(open(demo / 'scores' / 'metrics.csv', encoding='utf-8')) if r['name'] == 'WT']
    median = sorted(rows, key=lambda r: float(r['dice']))[len(rows) // 2]['case']
    case = read_case(next(s for s in find_cases(demo / 'cohort', split='test') if s.id == median))
    prediction, _, _ = read_label(demo / 'predictions' / f'{median}.nii.gz')
    picture = show_planes(case, prediction, reference=case.label, style='fill', dpi=110)
    (ROOT / 'nbs' / 'images' / 'result.png').write_bytes(picture.png())


if __name__ == '__main__':
    main(Path(sys.argv[1] if len(sys.argv) > 1 else 'runs/demo'))
