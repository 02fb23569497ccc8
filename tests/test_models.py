"The starter model, as it comes with the package: found, used, described, and true to the stored results."
from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from neuroseg3d.checkpoint import STARTER, load_model
from neuroseg3d.cli import main
from neuroseg3d.core import MODALITIES, REGIONS, labels_to_regions
from neuroseg3d.infer import rules_of
from neuroseg3d.metrics import overlap
from neuroseg3d.phantom import Population, make_phantom, write_cohort
from neuroseg3d.postprocess import Postprocess
from neuroseg3d.split import file_digest
from neuroseg3d.transforms import Space

ROOT = Path(__file__).resolve().parent.parent
RESULTS = json.loads((ROOT / 'benchmarks' / 'results' / 'starter.json').read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def script():
    "benchmarks/starter.py as a module."
    spec = importlib.util.spec_from_file_location('starter_script', ROOT / 'benchmarks' / 'starter.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['starter_script'] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp('patients') / 'cohort', 1, seed=77, spacing_mm=3, workers=1, progress=False)


def test_infer_needs_no_checkpoint(cohort, tmp_path, capsys):
    (image,), (label,) = cohort.glob('imagesTr/*.nii.gz'), cohort.glob('labelsTr/*.nii.gz')
    assert main(['infer', '--input_image', str(image), '--output_dir', str(tmp_path)]) == 0
    found = np.asarray(nib.load(tmp_path / 'PHANTOM_001.nii.gz').dataobj)
    truth = np.asarray(nib.load(label).dataobj)
    dice = [overlap(p, t)['dice'] for p, t in zip(labels_to_regions(found), labels_to_regions(truth))]
    assert dice[0] > 0.7 and dice[1] > 0.5, dice
    assert 'WT' in capsys.readouterr().out


@pytest.mark.parametrize('missing', MODALITIES)
@pytest.mark.contract('warned', 'images', 'a sequence that is missing, with `--allow_missing`', 'segmented; says whether the model has seen such cases in training')
def test_a_sequence_may_be_missing(missing, cohort, tmp_path, recwarn):
    (image,) = cohort.glob('imagesTr/*.nii.gz')
    volume = nib.load(image)
    given = []
    for channel, name in enumerate(MODALITIES):
        if name != missing:
            path = tmp_path / f'{name}.nii.gz'
            nib.save(nib.Nifti1Image(np.asarray(volume.dataobj[..., channel]), volume.affine), path)
            given.append(f'{name}={path}')
    assert main(['infer', '--input_image', *given, '--output_dir', str(tmp_path / 'out'), '--allow_missing']) == 0
    (written,) = (tmp_path / 'out').glob('*.nii.gz')
    assert set(np.unique(np.asarray(nib.load(written).dataobj))) <= {0, 1, 2, 3}
    assert any('has seen such cases in training' in str(w.message) for w in recwarn)


def test_model_command_lists_and_prints_the_card(capsys):
    assert main(['model']) == 0
    listed = capsys.readouterr().out
    assert 'starter: FLAIR, T1w, T1gd, T2w at 2 x 2 x 2 mm' in listed and 'CC BY-SA 4.0' in listed
    assert main(['model', 'starter']) == 0
    card = capsys.readouterr().out
    assert 'not a medical device' in card and 'so of all seven' in card and '{' not in card
    for series in ('simulation', 'pretrained', 'random'):  # what the card says is what was measured
        for region in REGIONS:
            assert f'{RESULTS[series]["mean_with_missing"]["all"][region]["dice"]:.3f}' in card
    assert main(['model', 'stater']) == 2


def test_facts_travel_with_the_weights():
    facts = json.loads(STARTER.with_suffix('.json').read_text(encoding='utf-8'))
    about = load_model().descriptions[0]
    assert about['origin'] == facts['origin'] and about['config']['augment']['modality_dropout_p'] > 0
    assert facts['normalisation']['spacing_mm'] == [2.0, 2.0, 2.0] and 'nhancing' in facts['labels']['3']
    assert len(facts['data_sha256']) == len(facts['split_sha256']) == 64
    assert 'CC BY-SA 4.0' in facts['origin']['licence'] and any('BraTS 2021' in a for a in facts['origin']['attribution'])
    assert facts['origin']['settings']['run'] == yaml.safe_load((ROOT / 'benchmarks' / 'starter.yaml').read_text())['run']


def test_it_is_small_and_loads_at_once():
    assert sum(p.stat().st_size for p in STARTER.parent.iterdir()) < 10e6
    taken = []
    for _ in range(3):
        began = time.process_time()  # of this process alone, whatever else the machine does
        load_model()
        taken.append(time.process_time() - began)
    assert min(taken) < 0.5, taken


@pytest.mark.parametrize('series', ['narrow', 'wide', 'fossa', 'mean', 'simulation', 'longer', 'pretrained', 'random', 'strong'])
def test_means_are_those_of_the_cases(series, script):
    rows = [r for r in RESULTS[series]['cases'] if not r['missing']]
    assert len(rows) == 7 and sum(r['ET']['dice'] is not None for r in rows) == 4
    assert script.summary(rows) == RESULTS[series]['mean_with_missing']['all']


def test_front_page_states_what_was_measured():
    mean = RESULTS['pretrained']['mean_with_missing']['all']
    assert 'mean Dice ' + ', '.join(f'{r} {mean[r]["dice"]:.2f}' for r in REGIONS) in (ROOT / 'README.md').read_text(encoding='utf-8')


def test_rules_and_calibration_are_stored_with_the_model():
    held, about = RESULTS['rules'], load_model().descriptions[0]
    helps = held['mean_dice']['chosen_on_the_others'] > held['mean_dice']['without']
    expected = held['rules'] if helps else asdict(Postprocess())
    assert json.loads(json.dumps([asdict(rules_of(load_model()))])) == json.loads(json.dumps([expected]))
    assert about['calibration']['temperature'] == held['calibration']['temperature'] and about['calibration']['n_cases'] == 7
    facts = json.loads(STARTER.with_suffix('.json').read_text(encoding='utf-8'))
    assert all(about[k] == facts[k] for k in ('calibration', 'postprocess', 'split_sha256', 'origin'))  # the JSON says what the weights carry


def test_stream_is_a_function_of_the_step(script, tmp_path):
    settings = {'stream': {'first': 2, 'patches': 4, 'held': 1}, 'run': {
        'data': {'patch_size': 16}, 'space': {'spacing_mm': 8.0}, 'model': {'preset': 'tiny'}, 'trainer': {}}}
    patches = []
    for folder in ('a', 'b'):
        config = script.config_of(settings, tmp_path / 'run', 'pretrain')
        stream = script.Stream(tmp_path / folder, Space((8.0, 8.0, 8.0)), 'Tr', 100)
        dataset = script.StreamPatches(stream, settings['stream'], config, seed=0)
        assert [dataset.case_number(i) for i in (0, 4, 8)] == [1, 2, 3]  # the newest, whenever there is a new one
        assert max(dataset.case_number(i) for i in range(9)) == 3
        patches.append([dataset[i] for i in ((0, 5) if folder == 'a' else (5, 0))])
    for one, other in zip(patches[0], patches[1][::-1]):
        assert torch.equal(one['image'], other['image']) and torch.equal(one['label'], other['label'])


def test_populations_change_what_they_say():
    usual, other = make_phantom(3, 8), make_phantom(3, 8, population=Population(cut=1.0))
    assert other.brain.sum() < 0.98 * usual.brain.sum() and not (other.brain & ~usual.brain).any()
    small = make_phantom(3, 8, population=Population(small=1.0))
    assert 3 < small.volume_ml('WT') < 50 < usual.volume_ml('WT')


def test_a_stream_holds_every_exam_of_its_patients(script, tmp_path):
    stream = script.Stream(tmp_path, Space((8.0, 8.0, 8.0)), 'Tr', 100, Population(hidden=1.0), exams=2)
    one, other = stream[4], stream[5]  # two exams of the third patient
    assert sorted(p.name[-17:-12] for p in tmp_path.glob('*.safetensors')) == ['00004', '00005']
    whole = [case.cut((0, 0, 0), case.shape) for case in (one, other)]
    assert torch.equal(whole[0]['label'], whole[1]['label']) and not torch.equal(whole[0]['image'], whole[1]['image'])


def test_pretraining_that_was_stopped_goes_on_exactly(script, tmp_path):
    stream = {'first': 2, 'patches': 2, 'held': 1, 'exams': 2}
    settings = {'stream': stream, 'run': {
        'data': {'patch_size': 16, 'batch_size': 2, 'loader': 'none'}, 'space': {'spacing_mm': 8.0}, 'model': {'preset': 'tiny'},
        'trainer': {'max_steps': 4, 'val_every_steps': 4, 'checkpoint_every_steps': 2, 'accelerator': 'cpu'}, 'logger': {'kind': 'csv'}}}
    finals = []
    for name in ('whole', 'stopped'):
        config = script.config_of(settings, tmp_path / name, 'pretrain')
        data = script.StarterData(config, settings, tmp_path)
        if name == 'stopped':
            data.setup()
            data.patches = DiesAt(data.patches, 5)
            with pytest.raises(RuntimeError, match='the machine stops'):
                script.train(config, data, {'schema': 'msd'})
            assert script.load_checkpoint(tmp_path / name / 'checkpoints' / 'last.ckpt')['global_step'] == 2
            data = script.StarterData(config, settings, tmp_path)
        finals.append(script.load_checkpoint(script.train(config, data, {'schema': 'msd'})))
    one, other = finals
    assert one['global_step'] == other['global_step'] == 4
    assert one['state_dict'].keys() == other['state_dict'].keys()
    assert all(torch.equal(one['state_dict'][k], other['state_dict'][k]) for k in one['state_dict'])


class DiesAt(torch.utils.data.Dataset):
    "Patches, until one that stops the process."

    def __init__(self, patches, index):
        self.patches, self.index = patches, index

    def __len__(self):
        return len(self.patches)

    def __getitem__(self, index):
        if index == self.index:
            raise RuntimeError('the machine stops')
        return self.patches[index]


def test_training_cases_of_the_starter_model_are_known():
    "Its split comes with it, so that `evaluate` refuses to score what it was trained on."
    from neuroseg3d.checkpoint import STARTER
    from neuroseg3d.evaluate import training_hashes
    from neuroseg3d.split import load_split
    facts = json.loads(STARTER.with_suffix('.json').read_text())
    split = load_split(STARTER.with_name('starter_split.json'))
    assert sorted(split.cases) == sorted(facts['origin']['settings']['real']['cases'])
    found = training_hashes([{'split_sha256': facts['split_sha256'], 'fold': facts['fold']}], [])
    assert found == {f['sha256'] for c in split.cases.values() for f in c['files'].values()}


def test_pages_show_the_stored_results():
    "What 11_infer and 05_transforms say was measured is what lies in benchmarks/results."
    page, other = (''.join(''.join(c['source']) for c in json.loads((ROOT / 'nbs' / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
                           if c['cell_type'] == 'markdown') for name in ('11_infer', '05_transforms'))
    for name in ('inference', 'subsets'):
        lines = (ROOT / 'benchmarks' / 'results' / f'{name}.md').read_text(encoding='utf-8').splitlines()
        rows = [line for line in lines if line.startswith('|')]
        assert len(rows) > 20 and [r for r in rows if r not in page] == []
    doubt = ''.join(json.loads((ROOT / 'nbs' / '12_uncertainty.ipynb').read_text(encoding='utf-8'))['cells'][-2]['source'])
    rows = (ROOT / 'benchmarks' / 'results' / 'uncertainty.md').read_text(encoding='utf-8').splitlines()
    found = json.loads((ROOT / 'benchmarks' / 'results' / 'uncertainty.json').read_text(encoding='utf-8'))
    assert len(rows) == 5 and [r for r in rows if r not in doubt] == [] and found['n_test'] >= 40
    assert all(0.85 <= found[region]['coverage'] <= 0.95 for region in REGIONS) and found['model_sha256'] == file_digest(STARTER)
    steps = json.loads((ROOT / 'benchmarks' / 'results' / 'inference.json').read_text(encoding='utf-8'))['steps']
    for measured in (steps[k]['starter'] for k in ('all measures', 'importing MONAI and Lightning too')):
        assert f'{measured["whole_process_s"]:.1f} s and {measured["peak_mb"]:.0f} MB' in other
    network = json.loads((ROOT / 'benchmarks' / 'results' / 'network_cpu.json').read_text(encoding='utf-8'))['presets']
    (base, large), unet = ((network[p]['ours']['step_s'], network[p]['dynunet']['step_s']) for p in ('base', 'large')), (
        ROOT / 'nbs' / '07_unet.ipynb').read_text(encoding='utf-8')
    assert f'`base` takes {base[0]:.2f} s where DynUNet takes {base[1]:.2f}, `large` {large[0]:.1f} where it takes {large[1]:.1f}' in unet
    models = json.loads((ROOT / 'benchmarks' / 'results' / 'inference.json').read_text(encoding='utf-8'))['models']
    assert file_digest(STARTER)[:12] in models['starter']['model'], 'measured with another starter model than that of the package'
    base = models['base']
    assert base['ratios']['ours']['in_process_s'] <= 0.2 and base['ratios']['ours']['whole_process_s'] <= 0.4
    assert base['ratios']['ours']['peak_mb'] <= 0.5 and min(base['dice_to_recipe']['ours'].values()) >= 0.995 and base['pairs'] >= 5
