"A real cohort of mixed layouts is described; nothing in it stops the rest."
import json
from pathlib import Path

import pytest

from neuroseg3d.eda import write_eda

REAL = Path(__file__).parents[2] / 'shared' / 'data'


def test_mixed_real_cohort(tmp_path):
    if not REAL.is_dir():
        pytest.skip('no real cases beside the repository')
    page = write_eda(REAL, tmp_path)
    found = json.loads((tmp_path / 'fingerprint.json').read_text())
    assert found['n'] == 9 and not found['failed'] and found['duplicates'] == []
    assert 'TCGA-06-1802' in {o['case'] for o in found['outliers']}  # 5 mm slices
    case = next(c for c in found['cases'] if c['case'] == 'BraTS2021_00006')
    assert abs(case['regions_ml']['WT'] - 137.9) < 0.1 and abs(case['brain_ml'] - 1520) < 1
    assert 'TCGA-DU-7294' in page.read_text() and 'ambiguous label schema' in page.read_text()
