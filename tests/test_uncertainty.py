"A calibration from the command line: on held-out cases only, stored with the model, followed by inference and report."
import json

import pytest
import torch
from balls import ball_cohort

from neuroseg3d.inference.calibration import stored_calibration
from neuroseg3d.networks.checkpoint import KEY, describe, load_model, save_checkpoint
from neuroseg3d.cli import main
from neuroseg3d.config import to_dict
from neuroseg3d.core import REGIONS
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.split import make_split, save_split
from neuroseg3d.studies.preprocess import Space
from neuroseg3d.networks.unet import UNet, UNetConfig
from neuroseg3d.networks.windows import Windows


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "Six cases, of which a network with random weights held three out."
    folder = tmp_path_factory.mktemp('calibration')
    split = make_split(find_cases(ball_cohort(folder / 'cohort', 6)), 2)
    save_split(split, folder / 'split.json')
    settings = UNetConfig(preset='tiny', filters=(4, 8), strides=(1, 2))
    config = {'model': to_dict(settings), 'space': to_dict(Space((6, 6, 6))), 'infer': to_dict(Windows((32, 32, 32))),
              'loss': {'targets': 'regions'}, 'optim': {'ema_decay': 0.0}}
    torch.manual_seed(0)
    weights = {f'network.{k}': v for k, v in UNet(settings).state_dict().items()}
    weights['network.heads.0.bias'] = torch.tensor([-1.0, -2.0, -1e3])  # ET is never found
    about = describe(config, {'schema': 'msd', 'split_sha256': split.digest, 'fold': 0})
    save_checkpoint({'state_dict': weights, KEY: about}, folder / 'model.ckpt')
    return folder, split


def test_calibrate_on_what_was_held_out(work, capsys):
    folder, split = work
    command = ['calibrate', '--ckpt_path', str(folder / 'model.ckpt'), '--data', str(folder / 'cohort'), '--alpha', '0.25', '--device', 'cpu']
    assert main(command) == 0
    said = capsys.readouterr().out
    held_out = sorted(set(split.cases) - set(split.train(0)))
    assert [line.split()[1] for line in said.splitlines() if line.startswith('[')] == held_out
    found = stored_calibration(load_model(folder / 'model.ckpt'))
    assert found.n_cases == 3 and found.dice[2] == 0 and found.presence == (1, 1, 1) and found.expected_dice[2] > 0.98
    assert f'WT: temperature {found.temperature[0]:.2f}' in said and f'QU-BraTS {found.qu_brats[0]:.3f}' in said
    assert main(['infer', '--ckpt_path', str(folder / 'model.ckpt'), '--input_image', str(folder / 'cohort'), '--output_dir', str(folder / 'pred'),
                 '--device', 'cpu']) == 0
    entry = json.loads((folder / 'pred' / 'manifest.json').read_text())['cases'][held_out[0]]
    assert set(entry['intervals_ml']) == set(REGIONS) and entry['model']['calibration']['qu_brats'] == list(found.qu_brats)


def test_references_are_read_by_the_schema_that_is_named(work, capsys):
    "With edema and enhancing tumour exchanged, what the layout calls edema is enhancing: the mean Dice of WT stays, that of TC moves."
    folder, _ = work
    command = ['calibrate', '--ckpt_path', str(folder / 'model.ckpt'), '--data', str(folder / 'cohort'), '--alpha', '0.25', '--device', 'cpu']
    dices = []
    for schema in ('msd', 'edema=3,non_enhancing=2,enhancing=1'):
        assert main([*command, '--ref_schema', schema]) == 0
        dices.append(stored_calibration(load_model(folder / 'model.ckpt')).dice)
    assert dices[0][0] == dices[1][0] and dices[0][1] != dices[1][1]
    assert main([*command, '--ref_schema', 'edema=7']) == 2


@pytest.mark.parametrize('name, message', [('starter', 'expected a checkpoint of `train`'), ('nowhere.ckpt', 'nowhere.ckpt: no such checkpoint')])
def test_what_cannot_be_calibrated_is_told_in_a_line(name, message, work, capsys):
    assert main(['calibrate', '--ckpt_path', name, '--data', str(work[0] / 'cohort')]) == 2
    assert message in capsys.readouterr().err


def test_training_cases_do_not_calibrate(work, capsys):
    folder, split = work
    only = folder / 'only'
    (only / 'imagesTr').mkdir(parents=True), (only / 'labelsTr').mkdir()
    about = json.loads((folder / 'cohort' / 'dataset.json').read_text())
    about['training'] = [pair for pair in about['training'] if any(case in pair['image'] for case in split.train(0))]
    (only / 'dataset.json').write_text(json.dumps(about | {'numTraining': len(about['training'])}))
    for pair in about['training']:
        for path in pair.values():
            (only / path).symlink_to(folder / 'cohort' / path)
    assert main(['calibrate', '--ckpt_path', str(folder / 'model.ckpt'), '--data', str(only)]) == 2
    assert 'all of them training cases of the model' in capsys.readouterr().err
