"""How often sequences that were exchanged are noticed, and how often those that were not are called exchanged.

    python benchmarks/checks.py --data ../shared/cohorts/glioma42 ../shared/data ../shared/cohorts/no_tumour

Each exam with four sequences below the folders is judged as it is, then with T1w and T1gd exchanged, then with FLAIR and T2w exchanged, at several
widths of the rim of the brain that is left out; `rim 0` is the rule without it. Writes benchmarks/results/checks.json.
"""
from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

from neuroseg3d.studies.cases import exchanged, read_case
from neuroseg3d.core import MODALITIES, InputError
from neuroseg3d.studies.layouts import find_cases

RESULT = Path(__file__).resolve().parent / 'results' / 'checks.json'
RIMS_MM = (0, 4, 8, 12, 16)
PAIRS = (('T1w', 'T1gd'), ('FLAIR', 'T2w'))


def judged(thin, spacing_mm, rim_mm: float) -> dict[str, dict[str, bool]]:
    "For each pair: whether it is called exchanged as it is, and exchanged on purpose."
    found = {}
    for pair in PAIRS:
        order = [MODALITIES.index({pair[0]: pair[1], pair[1]: pair[0]}.get(m, m)) for m in MODALITIES]
        found[' and '.join(pair)] = {'as it is': pair in exchanged(thin, spacing_mm, rim_mm), 'exchanged': pair in exchanged(thin[order], spacing_mm, rim_mm)}
    return found


def main() -> None:
    "Judge every case and count."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', nargs='+', required=True)
    warnings.simplefilter('ignore')
    cases = {}
    for folder in parser.parse_args().data:
        for study in find_cases(folder, split='all'):
            try:
                case = read_case(study, with_label=False)
            except InputError as error:
                print(f'{study.id}: {error}')
                continue
            step = [max(1, round(4 / s)) for s in case.geometry.spacing_mm]
            thin = case.image[:, ::step[0], ::step[1], ::step[2]]
            cases[study.id] = {rim: judged(thin, [s * n for s, n in zip(case.geometry.spacing_mm, step)], rim) for rim in RIMS_MM}
            print(study.id, cases[study.id][8], flush=True)
    summary = {' and '.join(pair): {f'rim {rim} mm': {'noticed': sum(c[rim][' and '.join(pair)]['exchanged'] for c in cases.values()),
                                                     'false alarms': sum(c[rim][' and '.join(pair)]['as it is'] for c in cases.values())}
                                    for rim in RIMS_MM} for pair in PAIRS}
    wrong = {i: c[8] for i, c in cases.items() if any(p['as it is'] or not p['exchanged'] for p in c[8].values())}
    RESULT.write_text(json.dumps({'exams': len(cases), 'summary': summary, 'wrong at 8 mm': wrong}, indent=2) + '\n')
    print(json.dumps(summary, indent=2))


if __name__ == '__main__':
    main()
