"A skull-stripped scan is mostly air: what networks, windows, patches and memory make of it."
from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from balls import ball_case, ball_cohort, state_order
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from neuroseg3d.evaluation import attribution as xai
from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import KEY, Model, load_model, save_checkpoint
from neuroseg3d.cli import main
from neuroseg3d.core import InputError, labels_to_regions
from neuroseg3d.inference.predict import infer_file, predict_case
from neuroseg3d.studies.preprocess import Space
from neuroseg3d.networks.unet import UNet, UNetConfig
from neuroseg3d.networks.windows import Windows

with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    from monai.inferers import sliding_window_inference
    from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, NormalizeIntensityd, Orientationd, Spacingd


def scan_file(folder: Path, code: str) -> Path:
    "A ball of a brain in a scan with a lot of air around it, more on one side than on the other, along any axes."
    image = np.zeros((70, 61, 29, 4), np.float32)
    image[22:48, 25:56, 3:26] = ball_case(5)[0]
    ornt = ornt_transform(axcodes2ornt('RAS'), axcodes2ornt(code))
    affine = np.eye(4) @ inv_ornt_aff(ornt, image.shape[:3])
    path = state_order(folder) / f'{code}.nii.gz'
    nib.save(nib.Nifti1Image(np.ascontiguousarray(apply_orientation(image, ornt)), affine), path)
    return path


def model(over: str, **looking) -> Model:
    "A network of random weights whose heads are set so that all regions are found here and there."
    torch.manual_seed(1)
    network = UNet(UNetConfig(filters=(6, 8, 10), strides=(1, 2, 2), deep_supervision=0, norm_over=over)).eval()
    with torch.no_grad():
        network.heads[0].weight.mul_(3)
        network.heads[0].bias.copy_(torch.tensor([1.7, 0.5, 0.0]))
    return Model([network], Space(), Windows(size=(32, 32, 32), precision='32', **looking), 'regions', [{'schema': 'msd'}], [Path('stand-in')])


def by_monai(model: Model, path: Path) -> np.ndarray:
    "Masks of the stock recipe over the whole scan, on its grid, logits blended; nested, and cut by the brain, as ours are."
    before = Compose([LoadImaged('image'), EnsureChannelFirstd('image'), Orientationd('image', axcodes='RAS', labels=None),
                      Spacingd('image', pixdim=(1, 1, 1), mode='bilinear'), NormalizeIntensityd('image', nonzero=True, channel_wise=True)])
    data = before({'image': path})
    with torch.no_grad():
        data['pred'] = sliding_window_inference(data['image'][None], (32, 32, 32), 1, model.networks[0],
                                                overlap=0.5, mode='gaussian')[0].sigmoid()
    p = Invertd('pred', before, orig_keys='image', nearest_interp=False)(data)['pred']
    return np.logical_and.accumulate(np.asarray(p) >= 0.5) & read_case(path).brain


@pytest.mark.parametrize('over', ['brain', 'window'])
def test_windows_on_the_scan_write_the_masks_of_the_stock_recipe(tmp_path, over):
    for code in ('RAS', 'LPS', 'ASL'):
        path, on_scan = scan_file(tmp_path, code), model(over, grid='scan')
        infer_file(on_scan, path, tmp_path / 'out.nii.gz')
        ours, theirs = labels_to_regions(np.asarray(nib.load(tmp_path / 'out.nii.gz').dataobj)), by_monai(on_scan, path)
        assert all(500 < m.sum() < 5500 for m in theirs)  # of 5868 voxels of brain
        assert (ours != theirs).sum() <= 3  # voxels at one half, to the last bit
    elsewhere = labels_to_regions(predict_case(model(over), read_case(path), 'cpu').label)
    assert (elsewhere != theirs).sum() > 100  # windows over the brain's box give other masks: the agreement is no accident


def test_a_case_forgets_its_voxels_only_where_it_may(tmp_path):
    case = read_case(scan_file(tmp_path, 'LPS'))
    kept = predict_case(model('brain'), case, 'cpu')
    assert case.image.shape == (4, *case.geometry.shape) and case.brain.any()
    brain = case.brain
    forgotten = predict_case(model('brain'), case, 'cpu', keep_image=False)
    assert case.image.size == 0 and np.array_equal(forgotten.label, kept.label) and np.array_equal(forgotten.model_case.brain, brain)
    with pytest.raises(InputError, match='read it again'):
        predict_case(model('brain'), case, 'cpu')  # not a silent empty mask


def test_explanations_refuse_windows_that_they_do_not_look_through(tmp_path):
    case = read_case(scan_file(tmp_path, 'RAS'))
    with pytest.raises(InputError, match='infer.grid: found scan, expected brain'):
        xai.shapley_values(model('brain', grid='scan'), case)
    assert xai.shapley_values(replace(model('brain', grid='scan'), windows=Windows()), case).values


def test_a_model_that_ignores_air_is_trained_and_used_from_the_command_line(tmp_path):
    data, run = ball_cohort(tmp_path / 'balls', 3, 1), tmp_path / 'run'
    words = ['train', '--data.root', data, '--trainer.output_dir', run, '--data.n_folds', 3, '--data.patch_size', 16, '--data.overhang', 0.5,
             '--space.spacing_mm', 6, '--model.preset', 'tiny', '--model.filters', '[4, 8]', '--model.strides', '[1, 2]', '--model.norm_over', 'brain',
             '--infer.grid', 'scan', '--infer.size', 16, '--trainer.max_steps', 4, '--trainer.val_every_steps', 4, '--logger', 'csv']
    assert main([str(w) for w in words]) in (0, None)
    trained = load_model(run / 'checkpoints' / 'last.ckpt')
    assert trained.networks[0].config.norm_over == 'brain' and trained.windows.grid == 'scan'
    rows = (run / 'logs' / 'metrics.csv').read_text().splitlines()
    assert any(line.split(',')[rows[0].split(',').index('val/dice')] for line in rows[1:])
    source = data / 'imagesTs' / 'BALL_Ts00.nii.gz'
    for grid in ('scan', 'brain'):
        out = tmp_path / grid
        words = ['infer', '--ckpt_path', run / 'checkpoints' / 'last.ckpt', '--input_image', source, '--output_dir', out, '--infer.grid', grid]
        assert main([str(w) for w in words]) in (0, None)
        assert nib.load(out / 'BALL_Ts00.nii.gz').shape == nib.load(source).shape[:3]
    assert json.loads((tmp_path / 'scan' / 'manifest.json').read_text())['cases']['BALL_Ts00']['model'] != json.loads(
        (tmp_path / 'brain' / 'manifest.json').read_text())['cases']['BALL_Ts00']['model']


def test_a_run_from_before_is_not_resumed_with_other_norms(tmp_path, capsys):
    "Its checkpoint knows no such setting, and had what is the default now."
    data, run = ball_cohort(tmp_path / 'balls', 3), tmp_path / 'run'
    words = ['train', '--data.root', data, '--trainer.output_dir', run, '--data.n_folds', 3, '--data.patch_size', 16, '--space.spacing_mm', 6,
             '--model.preset', 'tiny', '--model.filters', '[4, 8]', '--model.strides', '[1, 2]', '--infer.size', 16, '--trainer.val_every_steps', 4,
             '--logger', 'none', '--trainer.max_steps', 4]
    assert main([str(w) for w in words]) in (0, None)
    path = run / 'checkpoints' / 'last.ckpt'
    content = torch.load(path, weights_only=True)
    for section, setting in (('model', 'norm_over'), ('data', 'overhang'), ('infer', 'grid')):
        del content[KEY]['config'][section][setting]
    save_checkpoint(content, path)
    words = [*words, '--ckpt_path', path, '--extend_to', 8]
    assert main([str(w) for w in (*words, '--model.norm_over', 'brain')]) == 2
    assert "model.norm_over: 'window' in the checkpoint, 'brain' now" in capsys.readouterr().err
    assert main([str(w) for w in words]) in (0, None)
