"One case of a cohort fails, whatever raises it: the others are done, the exit code is 1, and the error says what happened."
from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from balls import ball_cohort, ball_model

from neuroseg3d.cli import main


def write_cohort(folder, cases=('A', 'B', 'C')):
    "Labelled Decathlon cases of a few voxels: a brain with a lesion that enhances."
    (folder / 'dataset.json').parent.mkdir(parents=True, exist_ok=True)
    (folder / 'dataset.json').write_text(json.dumps({'modality': {'0': 'FLAIR', '1': 'T1w', '2': 't1gd', '3': 'T2w'},
                                                     'labels': {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'}}))
    for n, case in enumerate(cases):
        draw = np.random.default_rng(n)
        image = np.zeros((32, 30, 28, 4), np.float32)
        image[6:26, 6:24, 6:22] = draw.normal(100, 10, (20, 18, 16, 4))
        label = np.zeros(image.shape[:3], np.uint8)
        label[10:18, 10:18, 10:18], label[12:16, 12:16, 12:16], label[13:15, 13:15, 13:15] = 1, 2, 3
        image[..., 0][label > 0] += 80
        image[..., 2][label == 3] += 120
        for sub, data in (('imagesTr', image), ('labelsTr', label)):
            (folder / sub).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), folder / sub / f'{case}.nii.gz')
    return folder


def set_header(path, **fields):
    "Change fields in the header of a compressed NIfTI file, whatever they then mean."
    import gzip
    content = bytearray(gzip.decompress(path.read_bytes()))
    for name, value in fields.items():
        kind, offset = nib.Nifti1Header.template_dtype.fields[name][:2]
        new = np.array(value, kind.base).tobytes()
        content[offset:offset + len(new)] = new
    path.write_bytes(gzip.compress(bytes(content), 1))


#: What has ended whole cohorts: an affine of 1e30 (IndexError), an infinite offset (OverflowError), a file cut short.
DAMAGE = {
    'affine': lambda path: set_header(path, srow_x=[1e30, 0, 0, 0], srow_y=[0, 1e30, 0, 0], srow_z=[0, 0, 1e30, 0], sform_code=1),
    'offset': lambda path: set_header(path, vox_offset=float('inf')),
    'short': lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_infer_goes_on_past_a_case_that_fails(tmp_path, capsys, damage):
    cohort = write_cohort(tmp_path / 'cohort')
    DAMAGE[damage](cohort / 'imagesTr' / 'B.nii.gz')
    assert main(['infer', '--input_image', str(cohort), '--output_dir', str(tmp_path / 'out'), '--device', 'cpu']) == 1
    assert sorted(p.name for p in (tmp_path / 'out').glob('*.nii.gz')) == ['A.nii.gz', 'C.nii.gz']
    said = capsys.readouterr().err
    assert 'neuroseg3d: failed: B: ' in said and 'internal error' not in said
    assert sorted(json.loads((tmp_path / 'out' / 'manifest.json').read_text())['cases']) == ['A', 'C']


def test_any_exception_of_a_case_is_its_failure(tmp_path, capsys, monkeypatch):
    from neuroseg3d.inference import cohort as infer
    cohort, real = write_cohort(tmp_path / 'cohort'), infer.predict_case

    def predict(model, case, *args, **options):
        if case.id in ('A', 'B'):
            raise {'A': RecursionError('too deep'), 'B': MemoryError()}[case.id]
        return real(model, case, *args, **options)

    monkeypatch.setattr(infer, 'predict_case', predict)
    words = ['infer', '--input_image', str(cohort), '--output_dir', str(tmp_path / 'out'), '--device', 'cpu']
    assert main(words) == 1
    said = capsys.readouterr().err
    assert 'failed: A: RecursionError: too deep' in said and 'failed: B: out of memory' in said and 'Traceback' not in said
    assert main([*words, '--debug']) == 1
    assert 'Traceback' in capsys.readouterr().err

    def interrupt(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(infer, 'predict_case', interrupt)
    assert main(words) == 130


def test_scores_report_and_description_go_on_past_a_case_that_fails(tmp_path, capsys):
    cohort = write_cohort(tmp_path / 'cohort')
    pred = tmp_path / 'pred'
    pred.mkdir()
    for case in 'ABC':
        (pred / f'{case}.nii.gz').write_bytes((cohort / 'labelsTr' / f'{case}.nii.gz').read_bytes())
    DAMAGE['short'](pred / 'B.nii.gz')
    words = ['--output_dir', str(tmp_path / 'scores'), '--pred_schema', 'msd']
    assert main(['evaluate', '--pred', str(pred), '--ref', str(cohort), *words]) == 1
    summary = json.loads((tmp_path / 'scores' / 'summary.json').read_text())
    assert list(summary['failed']) == ['B'] and 'B.nii.gz' in summary['failed']['B'] and 'failed: B: ' in capsys.readouterr().err
    table = (tmp_path / 'scores' / 'metrics.csv').read_text()
    assert 'A,' in table and 'C,' in table and '\nB,' not in table
    assert main(['report', '--pred', str(pred), '--data', str(cohort), '--output_dir', str(tmp_path / 'report'), '--pred_schema', 'msd']) == 1
    page = (tmp_path / 'report' / 'index.html').read_text()
    assert 'B could not be reported' in page and (tmp_path / 'report' / 'cases' / 'C.html').is_file() and not (tmp_path / 'report' / 'cases' / 'B.html').exists()

    DAMAGE['affine'](cohort / 'imagesTr' / 'C.nii.gz')
    assert main(['eda', '--data', str(cohort), '--output_dir', str(tmp_path / 'eda')]) == 1
    assert 'failed: C: ' in capsys.readouterr().err


def test_where_all_fail_it_is_an_error(tmp_path, capsys):
    cohort = write_cohort(tmp_path / 'cohort', ['A', 'B'])
    pred = tmp_path / 'pred'
    pred.mkdir()
    for case in 'AB':
        (pred / f'{case}.nii.gz').write_bytes(b'')
    assert main(['evaluate', '--pred', str(pred), '--ref', str(cohort), '--output_dir', str(tmp_path / 'scores')]) == 2
    assert 'all 2 cases have failed' in capsys.readouterr().err and not (tmp_path / 'scores' / 'summary.json').exists()


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_a_network_that_says_nan_is_an_error_and_no_mask(tmp_path, capsys, value):
    from neuroseg3d.core import InputError
    from neuroseg3d.inference.predict import predict_case
    from neuroseg3d.networks.checkpoint import load_model
    from neuroseg3d.studies.cases import read_case
    cohort, model = write_cohort(tmp_path / 'cohort', ['A']), load_model()
    list(model.networks[0].parameters())[-1].data.view(-1)[0] = value
    with pytest.raises(InputError, match='case A, model .*starter.safetensors: found .* logits that are NaN or infinite'):
        predict_case(model, read_case(cohort / 'imagesTr' / 'A.nii.gz'), 'cpu')


@pytest.mark.parametrize('words, message', [
    (['--infer.sigma_scale', 'nan'], 'infer.sigma_scale: found nan, expected a finite number'),
    (['--infer.sigma_scale', '.inf'], 'infer.sigma_scale: found inf, expected a finite number'),
    (['--infer.sigma_scale', '-1'], 'infer.sigma_scale: found -1.0, expected a number from 0.001 to 100'),
    (['--infer.overlap', '1'], 'infer.overlap: found 1.0, expected a number at least 0 and below 1'),
    (['--infer.roi_size', '0'], 'infer.roi_size: found [0, 0, 0], expected numbers from 1 to 4096'),
])
def test_settings_that_would_cost_masks_or_days_are_refused(tmp_path, capsys, words, message):
    cohort = write_cohort(tmp_path / 'cohort', ['A'])
    code = main(['infer', '--input_image', str(cohort / 'imagesTr' / 'A.nii.gz'), '--output_dir', str(tmp_path / 'out'), '--device', 'cpu', *words])
    assert code == 2 and message in capsys.readouterr().err and not list(tmp_path.glob('out/*.nii.gz'))


def test_windows_that_would_take_days_are_refused_at_once():
    from neuroseg3d.core import InputError
    from neuroseg3d.networks.windows import Windows, sliding_windows
    image = torch.zeros(4, 160, 150, 140)
    image[:, 10:150, 10:140, 10:130] = 1
    with pytest.raises(InputError, match='infer: size 96x96x96 and overlap 0.999999 make [0-9,]+ windows of 160x150x140 voxels, expected 50,000 at most'):
        sliding_windows(image, Windows(overlap=0.999999))
    assert len(sliding_windows(image, Windows(overlap=0.5))) == 3 * 3 * 2  # steps of 48 at most over 160, 150 and 140 voxels


def test_voxels_too_small_for_memory_are_refused_with_numbers(tmp_path):
    from dataclasses import replace

    from neuroseg3d.core import InputError
    from neuroseg3d.studies.cases import read_case
    from neuroseg3d.studies.preprocess import Space, to_model_space
    cohort = write_cohort(tmp_path / 'cohort', ['A'])
    case = read_case(cohort / 'imagesTr' / 'A.nii.gz')
    case.geometry = replace(case.geometry, affine=np.diag([9.0, 9.0, 9.0, 1.0]))
    with pytest.raises(InputError, match=r'case A: in voxels of 0.05x0.05x0.05 mm the brain has \d+x\d+x\d+ of them, which take [\d,.]+ GiB; [\d,.]+ GiB are free'):
        to_model_space(case, Space((0.05, 0.05, 0.05)))
    assert torch.is_tensor(to_model_space(case, Space((9.0, 9.0, 9.0))).image)


@pytest.mark.contract('refused', 'cohorts', 'a case of a cohort that lacks a sequence', 'that case fails and is named; the others are done, exit code 1')
def test_infer_goes_on_past_a_case_that_lacks_a_sequence(tmp_path, capsys):
    draw = np.random.default_rng(0)
    for case in 'ABC':
        (tmp_path / 'cohort' / case).mkdir(parents=True)
        for name in ('flair', 't1', 't1ce', 't2'):
            image = np.zeros((32, 30, 28), np.float32)
            image[6:26, 6:24, 6:22] = draw.normal(100, 10, (20, 18, 16))
            nib.save(nib.Nifti1Image(image, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / 'cohort' / case / f'{case}_{name}.nii.gz')
    (tmp_path / 'cohort' / 'B' / 'B_t1ce.nii.gz').unlink()
    words = ['infer', '--input_image', str(tmp_path / 'cohort'), '--output_dir', str(tmp_path / 'out'), '--device', 'cpu']
    assert main(words) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if 'failed: ' in line]
    assert len(said) == 1 and 'failed: B: ' in said[0] and 'missing modality T1gd' in said[0]
    assert sorted(p.name for p in (tmp_path / 'out').glob('*.nii.gz')) == ['A.nii.gz', 'C.nii.gz']
    assert sorted(json.loads((tmp_path / 'out' / 'manifest.json').read_text())['cases']) == ['A', 'C']


@pytest.fixture
def balls(tmp_path):
    "Three cases and a model that has seen another patient."
    cohort = ball_cohort(tmp_path / 'cohort', 3)
    others = {'OTHER': {'files': {'FLAIR': 'f' * 64}, 'identity': None}}
    return cohort, ball_model(tmp_path / 'model.ckpt', split_sha256=None, fold=0, training_exams=others)


@pytest.mark.contract('refused', 'cohorts', 'a case that cannot be read, where a model is calibrated', 'that case fails and is named; the others are used, exit code 1')
def test_calibrate_goes_on_past_a_case_that_fails(balls, capsys):
    from neuroseg3d.inference.calibration import stored_calibration
    from neuroseg3d.networks.checkpoint import load_model
    cohort, model = balls
    DAMAGE['short'](cohort / 'imagesTr' / 'BALL_Tr01.nii.gz')
    assert main(['calibrate', '--ckpt_path', str(model), '--data', str(cohort), '--device', 'cpu']) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if 'failed: ' in line]
    assert len(said) == 1 and 'failed: BALL_Tr01: ' in said[0] and 'truncated' in said[0]
    assert stored_calibration(load_model(model)).n_cases == 2


@pytest.mark.contract('refused', 'cohorts', 'a case that cannot be read, where rules of post-processing are searched', 'that case fails and is named; the others are used, exit code 1')
@pytest.mark.parametrize('broken', ['cohort/labelsTr', 'pred/probabilities'])
def test_postprocess_goes_on_past_a_case_that_fails(balls, tmp_path, capsys, broken):
    cohort, model = balls
    pred = tmp_path / 'pred'
    words = ['--output_dir', str(pred), '--ckpt_path', str(model), '--device', 'cpu', '--save_probabilities']
    assert main(['infer', '--input_image', str(cohort / 'imagesTr'), *words]) == 0
    DAMAGE['short'](tmp_path / broken / 'BALL_Tr01.nii.gz')
    capsys.readouterr()
    assert main(['postprocess', '--pred', str(pred), '--data', str(cohort), '--ckpt_path', str(model)]) == 1
    told = capsys.readouterr()
    said = [line for line in told.err.splitlines() if 'failed: ' in line]
    assert len(said) == 1 and 'failed: BALL_Tr01: ' in said[0] and 'BALL_Tr01.nii.gz' in said[0]
    assert 'stored in' in told.out and 'mean Dice' in told.out


@pytest.mark.contract('refused', 'models', 'a checkpoint with weights that are no numbers', 'the error names the weights')
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_refused(balls, tmp_path, capsys, value):
    cohort, model = balls
    content = torch.load(model, weights_only=True)
    name = next(k for k, v in content['state_dict'].items() if v.ndim > 1)
    content['state_dict'][name].view(-1)[3] = value
    torch.save(content, model)
    assert main(['infer', '--input_image', str(cohort), '--output_dir', str(tmp_path / 'out'), '--ckpt_path', str(model), '--device', 'cpu']) == 2
    assert f'{model}: 1 of {content["state_dict"][name].numel():,} weights of ' in capsys.readouterr().err and not list(tmp_path.glob('out/*'))


@pytest.mark.contract('refused', 'images', 'voxels that are not finite in a batch of the training', 'it ends and names the cases; no checkpoint is written')
def test_a_batch_that_is_not_finite_ends_the_training(balls, tmp_path, capsys, monkeypatch):
    from neuroseg3d.training import task as train
    real = train.SegmentationTask.training_step

    def step(self, batch, *args):
        batch['image'][0, 0, 0, 0, 0] = float('nan')
        return real(self, batch, *args)
    monkeypatch.setattr(train.SegmentationTask, 'training_step', step)
    words = ['--data.root', str(balls[0]), '--data.n_folds', '2', '--data.patch_size', '16', '--data.loader', 'none', '--space.spacing_mm', '6', '--model.preset', 'tiny',
             '--model.filters', '[4, 8]', '--model.strides', '[1, 2]', '--trainer.max_steps', '2', '--trainer.val_every_steps', '1', '--trainer.accelerator', 'cpu',
             '--trainer.output_dir', str(tmp_path / 'run'), '--logger', 'none']
    assert main(['train', *words]) == 2
    said = capsys.readouterr().err
    assert 'the loss is nan; its batch has voxels that are not finite (cases BALL_Tr' in said and 'look at these images' in said
    assert not list((tmp_path / 'run').rglob('*.ckpt'))
