"A skull-stripped scan is mostly air: what networks, windows, patches and memory make of it."
from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from balls import ball_case, ball_cohort, state_order
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from neuroseg3d.cli import main
from neuroseg3d.core import InputError
from neuroseg3d.inference.predict import predict_case
from neuroseg3d.networks.checkpoint import KEY, Model, load_model, save_checkpoint
from neuroseg3d.networks.unet import UNet, UNetConfig
from neuroseg3d.networks.windows import Windows
from neuroseg3d.studies.cases import read_case
from neuroseg3d.studies.preprocess import Space


def scan_file(folder: Path, code: str) -> Path:
    "A ball of a brain in a scan with a lot of air around it, more on one side than on the other, along any axes."
    image = np.zeros((70, 61, 29, 4), np.float32)
    image[22:48, 25:56, 3:26] = ball_case(5)[0]
    ornt = ornt_transform(axcodes2ornt('RAS'), axcodes2ornt(code))
    affine = np.eye(4) @ inv_ornt_aff(ornt, image.shape[:3])
    path = state_order(folder) / f'{code}.nii.gz'
    nib.save(nib.Nifti1Image(np.ascontiguousarray(apply_orientation(image, ornt)), affine), path)
    return path


def model(over: str) -> Model:
    "A network of random weights whose heads are set so that all regions are found here and there."
    torch.manual_seed(1)
    network = UNet(UNetConfig(filters=(6, 8, 10), strides=(1, 2, 2), deep_supervision=0, norm_over=over)).eval()
    with torch.no_grad():
        network.heads[0].weight.mul_(3)
        network.heads[0].bias.copy_(torch.tensor([1.7, 0.5, 0.0]))
    return Model([network], Space(), Windows(roi_size=(32, 32, 32), precision='32'), 'regions', [{'schema': 'msd'}], [Path('stand-in')])


def test_a_case_forgets_its_voxels_only_where_it_may(tmp_path):
    case = read_case(scan_file(tmp_path, 'LPS'))
    kept = predict_case(model('brain'), case, 'cpu')
    assert case.image.shape == (4, *case.geometry.shape) and case.brain.any()
    brain = case.brain
    forgotten = predict_case(model('brain'), case, 'cpu', keep_image=False)
    assert case.image.size == 0 and np.array_equal(forgotten.label, kept.label) and np.array_equal(forgotten.model_case.brain, brain)
    with pytest.raises(InputError, match='read it again'):
        predict_case(model('brain'), case, 'cpu')  # not a silent empty mask


def test_a_model_that_ignores_air_is_trained_and_used_from_the_command_line(tmp_path):
    data, run = ball_cohort(tmp_path / 'balls', 3, 1), tmp_path / 'run'
    words = ['train', '--data.root', data, '--trainer.output_dir', run, '--data.n_folds', 3, '--data.patch_size', 16,
             '--space.spacing_mm', 6, '--model.preset', 'tiny', '--model.filters', '[4, 8]', '--model.strides', '[1, 2]', '--model.norm_over', 'brain',
             '--infer.roi_size', 16, '--trainer.max_steps', 4, '--trainer.val_every_steps', 4, '--logger', 'csv']
    assert main([str(w) for w in words]) in (0, None)
    trained = load_model(run / 'checkpoints' / 'last.ckpt')
    assert trained.networks[0].config.norm_over == 'brain'
    rows = (run / 'logs' / 'metrics.csv').read_text().splitlines()
    assert any(line.split(',')[rows[0].split(',').index('val/dice')] for line in rows[1:])
    source = data / 'imagesTs' / 'BALL_Ts00.nii.gz'
    words = ['infer', '--ckpt_path', run / 'checkpoints' / 'last.ckpt', '--input_image', source, '--output_dir', tmp_path / 'out']
    assert main([str(w) for w in words]) in (0, None)
    assert nib.load(tmp_path / 'out' / 'BALL_Ts00.nii.gz').shape == nib.load(source).shape[:3]


def test_a_run_from_before_is_not_resumed_with_other_norms(tmp_path, capsys):
    "Its checkpoint knows no such setting, and had what is the default now."
    data, run = ball_cohort(tmp_path / 'balls', 3), tmp_path / 'run'
    words = ['train', '--data.root', data, '--trainer.output_dir', run, '--data.n_folds', 3, '--data.patch_size', 16, '--space.spacing_mm', 6,
             '--model.preset', 'tiny', '--model.filters', '[4, 8]', '--model.strides', '[1, 2]', '--infer.roi_size', 16, '--trainer.val_every_steps', 4,
             '--logger', 'none', '--trainer.max_steps', 4]
    assert main([str(w) for w in words]) in (0, None)
    path = run / 'checkpoints' / 'last.ckpt'
    content = torch.load(path, weights_only=True)
    config = content[KEY]['config']
    del config['model']['norm_over']
    config['infer'] = {'size': config['infer'].pop('roi_size'), 'flips': config['infer'].pop('tta_flips'), 'sigma': config['infer'].pop('sigma_scale'),
                       'grid': 'brain', **config['infer']}  # names and settings of before
    config['data']['overhang'] = 0.0
    save_checkpoint(content, path)
    words = [*words, '--ckpt_path', path, '--extend_to', 8]
    assert main([str(w) for w in (*words, '--model.norm_over', 'brain')]) == 2
    assert "model.norm_over: 'window' in the checkpoint, 'brain' now" in capsys.readouterr().err
    assert main([str(w) for w in words]) in (0, None)
