"A real cohort of mixed layouts is described; nothing in it stops the rest."
import json
from pathlib import Path

import pytest
from balls import ball_cohort

from neuroseg3d.cli import main
from neuroseg3d.evaluation.eda import write_eda

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


def test_a_case_that_failed_is_told_by_the_exit_code(tmp_path, capsys):
    "As `infer` does: the others are described, the one is named on stderr."
    cohort = ball_cohort(tmp_path / 'cohort', 2)
    words = ['eda', '--data', str(cohort), '--output_dir', str(tmp_path / 'out')]
    assert main(words) == 0 and capsys.readouterr().err == ''
    damaged = cohort / 'imagesTr' / 'BALL_Tr01.nii.gz'
    damaged.write_bytes(damaged.read_bytes()[:5000])
    assert main(words) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f'neuroseg3d: failed: BALL_Tr01: {damaged}: truncated') and told.err.count('\n') == 1
    first, second, *_ = told.out.splitlines()
    assert first == f'found 2 case(s) in {cohort}, 2 with a label' and second == '[1] BALL_Tr00' and told.out.endswith(f'{tmp_path / "out" / "index.html"}\n')
    assert list(json.loads((tmp_path / 'out' / 'fingerprint.json').read_text())['failed']) == ['BALL_Tr01']
    for command in ('eda', 'infer'):
        with pytest.raises(SystemExit):
            main([command, '--help'])
        assert 'by exit code 1' in ' '.join(capsys.readouterr().out.split())
