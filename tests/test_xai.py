"Explanations against captum, over kinds of targets and ensembles, and the command."
from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import captum.attr
import nibabel as nib
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from neuroseg3d.evaluation import attribution as xai
from neuroseg3d.networks.checkpoint import KEY, Model, describe, save_checkpoint
from neuroseg3d.cli import main, make_parser
from neuroseg3d.config import to_dict
from neuroseg3d.core import Case, Geometry
from neuroseg3d.networks.losses import out_channels
from neuroseg3d.studies.preprocess import Space
from neuroseg3d.networks.unet import UNet, UNetConfig
from neuroseg3d.networks.windows import Windows

warnings.filterwarnings('ignore', category=FutureWarning)
SPACE, SHAPE = Space((3.0, 3.0, 3.0), 0.0), (20, 18, 17)


def make_case() -> Case:
    "A box of noise that is smooth, in a field of zeros."
    noise = torch.randn(1, 4, 7, 6, 6, generator=torch.Generator().manual_seed(1))
    image = np.zeros((4, 24, 24, 24), np.float32)
    image[:, 2:22, 3:21, 4:21] = F.interpolate(noise, SHAPE, mode='trilinear')[0] + 5
    return Case('C1', image, Geometry((24, 24, 24), np.diag([3.0, 3, 3, 1])))


def make_model(targets: str = 'regions', n: int = 1, size: int = 99, flips: tuple[str, ...] = ('none',)) -> Model:
    "Small networks with random weights."
    torch.manual_seed(0)
    config = UNetConfig(preset='tiny', filters=(4, 8), strides=(1, 2), out_channels=out_channels(targets))
    networks = [UNet(config).eval().requires_grad_(False) for _ in range(n)]
    return Model(networks, SPACE, Windows((size, size, size), flips=flips, precision='32'), targets, [{}], [])


@pytest.fixture(scope='module')
def question() -> xai.Question:
    "Fifty voxels in the middle, through one window, as captum sees it."
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[8:13, 7:12, 8:10] = True
    return xai.ask(make_model(), make_case(), 'TC', mask)


def forward(question: xai.Question):
    "The explained number as a function of a batch, as captum wants it."
    return lambda x: torch.stack([question.answer(sample[None], question.parts[0]) for sample in x])


def test_integrated_gradients_are_captums(question):
    x, start = question.seen.image[None], torch.zeros_like(question.seen.image) + 0.5
    theirs = captum.attr.IntegratedGradients(forward(question)).attribute(x, start[None], n_steps=9, method='gausslegendre')
    ours = xai.integrated_gradients(question, steps=9, baseline=start)
    assert len(question.parts) == 1 and theirs.abs().max() > 0
    assert torch.allclose(ours.values, theirs[0].float(), rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


def test_occlusion_is_captums(question):
    theirs = captum.attr.Occlusion(forward(question)).attribute(question.seen.image[None], (4, 5, 5, 5), (4, 5, 5, 5))[0, 0]
    ours = xai.occlusion(question, cube_mm=15, reach_mm=500)
    assert torch.allclose(ours.values[0], theirs.float() * ours.looked, atol=1e-4 * float(theirs.abs().max()))
    assert ours.looked.all()


@pytest.mark.parametrize('layer', ['encoder.1', 'decoder.0'])
def test_grad_cam_is_captums(question, layer):
    network = question.model.networks[0]
    cam = captum.attr.LayerGradCam(forward(question), network.get_submodule(layer))
    theirs = cam.attribute(question.seen.image[None].requires_grad_(), relu_attributions=True)
    theirs = F.interpolate(theirs, network.padded_size(SHAPE), mode='trilinear')[0, 0, :20, :18, :17].detach()
    ours = xai.grad_cam(question, layer).values[0]
    assert ours.max() > 0 and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6 * float(theirs.max()))


def test_shapley_values_are_captums(question):
    mask, seen = question.mask, question.seen

    def support(x):
        return question.model.networks[0](x).sigmoid()[:, 1, mask].mean(1)
    channels = torch.arange(4).reshape(1, 4, 1, 1, 1).expand(1, 4, *SHAPE).contiguous()
    theirs = captum.attr.ShapleyValues(support).attribute(seen.image[None], feature_mask=channels)[0, :, 0, 0, 0]
    ours = xai.shapley_values(question.model, seen, 'TC', {'TC': mask})
    assert np.allclose(list(ours.values['TC'].values()), theirs, atol=1e-5)
    assert np.allclose([m[mask].mean() for m in ours.map], theirs, atol=1e-5)


@pytest.mark.parametrize('targets, region, n, flips', [('labels', 'ET', 1, ('none',)), ('whole', 'WT', 2, ('none', 'xz'))])
def test_kinds_of_targets_ensembles_and_flips(targets, region, n, flips):
    model, mask = make_model(targets, n, 12, flips), torch.zeros(SHAPE, dtype=torch.bool)
    mask[5:16, 5:12, 5:12] = True
    question = xai.ask(model, make_case(), region, mask)
    assert len(question.parts) > 1
    shapley = xai.shapley_values(model, question.seen, region, {region: mask})
    for game in (shapley.support[region], *shapley.volume_ml.values()):
        assert np.isclose(sum(game.values.values()), game.full - game.baseline, atol=1e-4)
    assert set(shapley.volume_ml) == ({'WT'} if targets == 'whole' else {'WT', 'TC', 'ET'})
    ig = xai.integrated_gradients(question, steps=16, baseline=xai.blurred(question.seen.image, SPACE.spacing_mm, 4))
    assert abs(ig.facts['sum'] - ig.facts['score'] + ig.facts['score_of_baseline']) < 5e-3
    cam = xai.grad_cam(question)
    assert cam.values.shape == (1, *SHAPE) and torch.isfinite(cam.values).all()


def test_flat_grad_cam_is_not_believed(question):
    "A layer whose features all lower the number gives an empty map."
    empty = xai.Attribution('grad_cam', question, torch.zeros(1, *SHAPE), ('all',), question.looked, 'logit')
    with pytest.warns(UserWarning, match='the map is empty'):
        check = xai.sanity_check(empty, lambda q: xai.grad_cam(q))
    assert not check.passed
    json.loads(json.dumps(xai.describe_attribution(replace(empty, sanity=check)), allow_nan=False))


def test_random_weights_leave_the_model_alone(question):
    before = {k: v.clone() for k, v in question.model.networks[0].state_dict().items()}
    other = xai.randomised(question.model).networks[0]
    assert all(torch.equal(v, question.model.networks[0].state_dict()[k]) for k, v in before.items())
    assert not any(torch.equal(v, other.state_dict()[k]) for k, v in before.items() if k.endswith('conv1.weight'))
    head = xai.randomised(question.model, n_blocks=1).networks[0].state_dict()
    assert [k.split('.')[0] for k, v in before.items() if not torch.equal(v, head[k])] == ['heads', 'heads']


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    "A case on disk, turned and oblique, and a checkpoint."
    case, network = make_case(), make_model().networks[0]
    affine = np.array([[-2.9, 0.5, 0, 40], [0.5, 2.9, 0, -30], [0, 0, 3, 7], [0, 0, 0, 1.0]])
    (tmp_path / 'C1').mkdir()
    for name, channel in zip(('flair', 't1', 't1ce', 't2'), case.image):
        nib.save(nib.Nifti1Image(channel, affine), tmp_path / 'C1' / f'C1_{name}.nii.gz')
    config = {'model': to_dict(network.config), 'space': to_dict(SPACE), 'infer': to_dict(Windows((99, 99, 99))),
              'loss': {'targets': 'regions'}, 'optim': {'ema_decay': 0.0}}
    weights = {f'network.{k}': v for k, v in network.state_dict().items()}
    weights['network.heads.0.bias'] = torch.tensor([3.0, 0.5, -1e3])  # WT and TC are found, ET never
    save_checkpoint({'state_dict': weights, KEY: describe(config, {'schema': 'msd'})}, tmp_path / 'model.ckpt')
    return {'case': tmp_path / 'C1', 'model': tmp_path / 'model.ckpt', 'out': tmp_path / 'out'}


def arguments(files: dict[str, Path], *more: str) -> list[str]:
    return ['explain', '--ckpt_path', str(files['model']), '--input_image', str(files['case']), '--output_dir', str(files['out']), *more]


def test_command_writes_on_the_patients_grid(files, capsys):
    assert main(arguments(files, '--region', 'TC', '--method', 'shapley', 'integrated_gradients', 'grad_cam')) == 0
    said = capsys.readouterr().out
    about = json.loads((files['out'] / 'C1_TC.json').read_text())
    original = nib.load(files['case'] / 'C1_flair.nii.gz')
    for method, channels in (('shapley', (4,)), ('integrated_gradients', (4,)), ('grad_cam', ())):
        image = nib.load(files['out'] / f'C1_TC_{method}.nii.gz')
        assert image.shape == (*original.shape, *channels) and np.array_equal(image.affine, original.affine)
        assert (files['out'] / f'C1_TC_{method}.png').stat().st_size > 10_000 and method in said
        assert about['methods'][method]['does_not_show'] and 'similarity' in about['methods'][method]['sanity_check']
        assert about['methods'][method]['verdict'] in said and about['methods'][method]['does_not_show'] in said
    values = nib.load(files['out'] / 'C1_TC_integrated_gradients.nii.gz').get_fdata()
    brain = np.stack([nib.load(f).get_fdata() for f in files['case'].iterdir()]).any(0)
    assert np.abs(values[brain]).max() > 0
    facts = about['methods']['integrated_gradients']['facts']
    difference = facts['score'] - facts['score_of_baseline']
    assert np.isclose(abs(facts['sum'] / difference - 1), facts['gap'], atol=1e-4) and facts['gap'] < 0.1


def test_command_refuses_and_leaves_nothing_behind(files, capsys, monkeypatch):
    assert main(arguments(files, '--region', 'ET')) == 2 and 'finds no enhancing tumour' in capsys.readouterr().err
    assert not files['out'].exists()
    monkeypatch.setattr(xai, 'show_attribution', lambda *a: (_ for _ in ()).throw(OSError('no space left')))
    assert main(arguments(files, '--region', 'TC', '--method', 'grad_cam')) == 2
    assert not files['out'].exists()


def test_command_offers_the_methods_that_there_are():
    options = next(a for a in make_parser()._subparsers._group_actions[0].choices['explain']._actions if a.dest == 'method')
    assert tuple(options.choices) == tuple(xai.METHODS)


@pytest.mark.parametrize('unit, scale, said', [('logit', 4e-3, 'raises WT, up to 4.0 thousandths of a logit'), ('probability', 0.5, 'raises WT, up to 0.50 probability'),
                                               ('arbitrary units', 3.8e-5, 'raises WT, in arbitrary units')])
def test_the_legend_can_be_read(unit, scale, said):
    "No e-notation, and no number where a unit has no meaning."
    model, case, mask = make_model(), make_case(), torch.zeros(SHAPE, dtype=torch.bool)
    mask[5:16, 5:12, 5:12] = True
    asked = xai.ask(model, case, 'WT', mask)
    figure = xai.show_attribution(case, xai.Attribution('occlusion', asked, torch.full((1, *SHAPE), scale), ('all',), asked.looked, unit), smooth_mm=0)
    shown = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert said in shown and not any(re.search(r'\de[-+]\d', text) for text in shown), shown
