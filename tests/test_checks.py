"What is wrong with the last case of a cohort is said before any work on the first."
from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from balls import ball_case

from neuroseg3d.evaluation import attribution as xai, evaluate
from neuroseg3d.review import report
from neuroseg3d.studies import cases
from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import Model
from neuroseg3d.cli import main
from neuroseg3d.core import InputError
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.nifti import write_label
from neuroseg3d.inference.guard import studies_not_trained_on
from neuroseg3d.studies.split import make_split, save_split
from neuroseg3d.studies.preprocess import Space
from neuroseg3d.networks.unet import UNet, UNetConfig
from neuroseg3d.networks.windows import Windows

AFFINE = np.diag([6.0, 6, 6, 1])
AMBIGUOUS = r'C_seg.nii.gz: ambiguous label schema: ids 0, 1, 2, 3 fit msd, brats2023, brats-peds and brats2013; name the schema'


@pytest.fixture
def cohort(tmp_path) -> Path:
    "Three cases as four files each, and predictions of them; ids of the first two tell their schema, those of the last do not."
    for seed, name in enumerate('ABC'):
        image, label = ball_case(seed)
        folder = tmp_path / 'cohort' / name
        folder.mkdir(parents=True)
        for channel, modality in enumerate(('flair', 't1', 't1gd', 't2')):
            nib.save(nib.Nifti1Image(image[..., channel], AFFINE), folder / f'{name}_{modality}.nii.gz')
        nib.save(nib.Nifti1Image(label, AFFINE), folder / f'{name}_seg.nii.gz')
    for study in find_cases(tmp_path / 'cohort'):
        case = read_case(study, with_label=False)
        write_label(tmp_path / 'pred' / f'{study.id}.nii.gz', read_case(study, schema='msd').label, case, 'msd')
    for name in 'AB':  # a file that this library wrote carries its schema
        case = read_case(tmp_path / 'cohort' / name, with_label=False)
        write_label(tmp_path / 'cohort' / name / f'{name}_seg.nii.gz', np.zeros_like(case.brain, np.uint8), case, 'msd')
    return tmp_path / 'cohort'


def forbid(monkeypatch, module, *names: str) -> None:
    "Work that must not begin."
    for name in names:
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f'{name} was called before all was checked'))


def said(capsys, *words: object) -> str:
    "The one line in which a command refuses."
    assert main([str(w) for w in words]) == 2
    line = capsys.readouterr().err
    assert line.count('\n') == 1, line
    return line


def shorten(path: Path) -> None:
    "A file with one slice less."
    nib.save(nib.load(path).slicer[:-1], path)


def failed(capsys, *words: object) -> str:
    "What a command says on stderr that does all cases but one."
    assert main([str(w) for w in words]) == 1
    line = capsys.readouterr().err
    assert line.startswith('neuroseg3d: failed: C: ') and line.count('\n') == 1, line
    return line


@pytest.mark.parametrize('fault', ['schema', 'compared'])
def test_report_refuses_what_concerns_all(cohort, monkeypatch, capsys, fault):
    pred, options = cohort.parent / 'pred', []
    if fault == 'compared':
        (cohort.parent / 'other').mkdir()
        (pred / 'C.nii.gz').rename(cohort.parent / 'other' / 'C.nii.gz')
        shorten(cohort.parent / 'other' / 'C.nii.gz')
        options = ['--compare', cohort.parent / 'other', '--ref_schema', 'msd']
    forbid(monkeypatch, cases, '_read_images')
    forbid(monkeypatch, report, 'read_case', 'score_case', 'write_case', 'assess_case')
    line = said(capsys, 'report', '--pred', pred, '--data', cohort, '--output_dir', cohort.parent / 'out', *options)
    where = {'schema': AMBIGUOUS, 'compared': 'C.nii.gz: found shape (25, 31, 23), expected (26, 31, 23) as in the scan of C'}
    assert where[fault] in line and not (cohort.parent / 'out').exists()


@pytest.mark.parametrize('fault', ['label', 'sequence', 'prediction'])
def test_report_leaves_out_what_is_broken(cohort, capsys, fault):
    pred = cohort.parent / 'pred'
    shorten({'label': cohort / 'C' / 'C_seg.nii.gz', 'sequence': cohort / 'C' / 'C_t2.nii.gz', 'prediction': pred / 'C.nii.gz'}[fault])
    line = failed(capsys, 'report', '--pred', pred, '--data', cohort, '--output_dir', cohort.parent / 'out', '--ref_schema', 'msd')
    where = {'label': 'C_seg.nii.gz: found shape (25, 31, 23), expected (26, 31, 23)', 'sequence': 'C_t2.nii.gz: found shape (25, 31, 23), expected (26, 31, 23)',
             'prediction': 'C.nii.gz: found shape (25, 31, 23), expected (26, 31, 23) as in the scan of C'}
    assert where[fault] in line
    assert sorted(p.name for p in (cohort.parent / 'out' / 'cases').glob('[!.]*')) == ['A.html', 'B.html']
    assert 'C could not be reported: ' in (cohort.parent / 'out' / 'index.html').read_text()


def evaluate_with(cohort, fault) -> list:
    "The words of a command, after damage."
    pred, options = cohort.parent / 'pred', [] if fault == 'schema' else ['--ref_schema', 'msd']
    if fault == 'compared':
        nib.save(nib.load(pred / 'C.nii.gz').slicer[:-1], cohort.parent / 'C.nii.gz')
        options += ['--compare', cohort.parent / 'C.nii.gz']
    if fault == 'grid':
        shorten(pred / 'C.nii.gz')
    if fault == 'images':
        shorten(cohort / 'C' / 'C_t1.nii.gz')
        options += ['--over_brain']
    return ['evaluate', '--pred', pred, '--ref', cohort, '--output_dir', cohort.parent / 'out', *options]


@pytest.mark.parametrize('fault', ['schema', 'compared'])
def test_evaluate_refuses_what_concerns_all(cohort, monkeypatch, capsys, fault):
    forbid(monkeypatch, evaluate, 'score_case', 'read_label')
    line = said(capsys, *evaluate_with(cohort, fault))
    assert {'schema': AMBIGUOUS, 'compared': 'C.nii.gz: found shape (25, 31, 23), expected (26, 31, 23) as in'}[fault] in line
    assert not (cohort.parent / 'out').exists()


@pytest.mark.parametrize('fault', ['grid', 'images'])
@pytest.mark.contract('refused', 'labels', 'a prediction or a reference of a cohort that cannot be scored', 'that case fails and is named in summary.json; the others are scored, exit code 1')
def test_evaluate_leaves_out_what_is_broken(cohort, capsys, fault):
    line = failed(capsys, *evaluate_with(cohort, fault))
    where = {'images': 'C_t1.nii.gz: found shape (25, 31, 23), expected (26, 31, 23)', 'grid': 'C.nii.gz: found shape (25, 31, 23), expected (26, 31, 23) as in'}
    summary = json.loads((cohort.parent / 'out' / 'summary.json').read_text())
    assert where[fault] in line and list(summary['failed']) == ['C'] and summary['WT']['n'] == 2
    assert summary['references_without_prediction'] == []


def test_explain_goes_on_after_a_case_that_fails(cohort, monkeypatch, capsys):
    shorten(cohort / 'C' / 'C_t2.nii.gz')

    def explain(model, study, *_):
        read_case(study, with_label=False)
        if study.id == 'A':
            raise InputError('A: the model finds no ET, expected some to explain')
        path = cohort.parent / 'B_ET.json'
        path.write_text('{"methods": {}}')
        return path
    monkeypatch.setattr(xai, 'explain_file', explain)
    assert main(['explain', '--input_image', str(cohort), '--output_dir', str(cohort.parent / 'out'), '--region', 'ET', '--device', 'cpu']) == 1
    told = capsys.readouterr()
    assert 'failed: C: ' in told.err and 'C_t2.nii.gz: found shape (25, 31, 23), expected (26, 31, 23)' in told.err
    assert 'failed: A: A: the model finds no ET' in told.err and str(cohort.parent / 'B_ET.json') in told.out


def test_calibrate(cohort):
    split = make_split(find_cases(cohort, schema='msd'), 2)
    save_split(split, cohort.parent / 'split.json')
    network = UNet(UNetConfig(preset='tiny', filters=(4, 8), strides=(1, 2))).eval()
    fold = next(f for f in range(2) if 'C' in split.val(f))
    model = Model([network], Space((6.0, 6.0, 6.0)), Windows(), 'regions', [{'split_sha256': split.digest, 'fold': fold}],
                  [cohort.parent / 'split.json'])
    with pytest.raises(InputError, match=AMBIGUOUS):  # of the cases that it was not trained on, before any is segmented
        studies_not_trained_on(model, cohort)


def test_what_has_no_partner_is_left_out_aloud(cohort, capsys):
    words = ['evaluate', '--pred', cohort.parent / 'pred', '--ref', cohort, '--output_dir', cohort.parent / 'out', '--ref_schema', 'msd']
    (cohort / 'C' / 'C_seg.nii.gz').unlink()
    (cohort.parent / 'pred' / 'A.nii.gz').unlink()
    assert '1 prediction(s) without a reference: C; ' in said(capsys, *words)
    assert not (cohort.parent / 'out').exists()
    assert main([str(w) for w in words] + ['--allow_unpaired']) == 0
    told, summary = capsys.readouterr().out, json.loads((cohort.parent / 'out' / 'summary.json').read_text())
    assert summary['predictions_without_reference'] == ['C'] and 'Left out: 1 prediction(s) without a reference: C\n' in told
    assert summary['references_without_prediction'] == ['A'] and 'Left out: 1 reference(s) without a prediction: A\n' in told
    assert summary['WT']['n'] == 1
    (cohort.parent / 'pred' / 'B.nii.gz').unlink()
    assert '1 prediction(s) without a reference: C; ' in said(capsys, *words, '--allow_unpaired')  # nothing would be left
