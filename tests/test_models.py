"The starter model, as it comes with the package: found, used, described, and true to the stored results."
from __future__ import annotations

import importlib
import json
import time
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from neuroseg3d.networks.checkpoint import STARTER, load_model
from neuroseg3d.cli import main
from neuroseg3d.core import MODALITIES, REGIONS, labels_to_regions
from neuroseg3d.inference.predict import rules_of
from neuroseg3d.evaluation.metrics import overlap
from neuroseg3d.phantom import Population, make_phantom, write_cohort
from neuroseg3d.studies.preprocess import Space

ROOT = Path(__file__).resolve().parent.parent
RESULTS = json.loads((ROOT / 'benchmarks' / 'results' / 'starter.json').read_text(encoding='utf-8'))  # of the starter of before
FOUND = json.loads((ROOT / 'benchmarks' / 'results' / 'starter49.json').read_text(encoding='utf-8'))  # out of fold, of the one that is shipped
SETTINGS = yaml.safe_load((ROOT / 'benchmarks' / 'starter49.yaml').read_text(encoding='utf-8'))


def script_module(name: str):
    "A script of benchmarks/ as a module; such scripts import one another by name."
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'benchmarks'))
        return importlib.import_module(name)


@pytest.fixture(scope='module')
def script():
    "benchmarks/starter.py as a module."
    return script_module('starter')


@pytest.fixture(scope='module')
def recipe():
    "benchmarks/starter49.py as a module."
    return script_module('starter49')


@pytest.fixture(scope='module')
def scorer():
    "benchmarks/outoffold.py as a module."
    return script_module('outoffold')


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
    assert 'not a medical device' in card and 'No number here is of exactly the shipped weights' in card and '{' not in card
    for series in (FOUND['plain']['all'], FOUND['with_rules']['all'], FOUND['before']['plain'], *FOUND['missing'].values()):
        assert all(f'{series[region]["dice"]:.3f}' in card for region in REGIONS)  # what the card says is what was measured
    assert main(['model', 'stater']) == 2


def test_the_card_is_made_from_the_results(recipe, scorer):
    assert script_module('starter_card').card(SETTINGS) == STARTER.with_suffix('.md').read_text(encoding='utf-8')


def test_facts_travel_with_the_weights():
    facts = json.loads(STARTER.with_suffix('.json').read_text(encoding='utf-8'))
    about = load_model().descriptions[0]
    assert about['origin'] == facts['origin'] and about['config']['augment']['modality_dropout_p'] > 0
    assert facts['normalisation']['spacing_mm'] == [2.0, 2.0, 2.0] and 'nhancing' in facts['labels']['3']
    assert len(facts['data_sha256']) == len(facts['split_sha256']) == 64
    assert 'CC BY-SA 4.0' in facts['origin']['licence'] and any('BraTS-Africa' in a for a in facts['origin']['attribution'])
    assert facts['origin']['settings'] == SETTINGS == FOUND['settings']
    assert facts['origin']['started_from']['settings']['run'] == yaml.safe_load((ROOT / 'benchmarks' / 'starter.yaml').read_text())['run']


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


def by_hand(rows, region: str, way: str) -> tuple[int, float]:
    "How many exams count for a region, and their mean Dice: ET where the reference has more than half a millilitre."
    dice = [r[way][region]['dice'] for r in rows if r['ml'][region] > (0.5 if region == 'ET' else 0)]
    return len(dice), round(float(np.mean(dice)), 4)


@pytest.mark.parametrize('series, way', [('plain', 'plain'), ('with_rules', 'rules')])
def test_out_of_fold_means_are_those_of_the_exams(series, way):
    rows = FOUND['cases']
    assert len(rows) == len({r['case'] for r in rows}) and sorted({r['fold'] for r in rows}) == SETTINGS['networks']
    assert len(rows) >= 34 and not {r['case'] for r in rows} & set(SETTINGS['seven'])
    for region in REGIONS:
        found = FOUND[series]['all'][region]
        assert (found['n'], found['dice']) == by_hand(rows, region, way)
        assert found['ci95'][0] < found['dice'] < found['ci95'][1] and found['patients'] < found['n']
        small = [r for r in rows if r['ml']['WT'] < 50]
        n, dice = by_hand(small, region, way)
        stratum = FOUND[series]['strata']['whole below 50 mL'][region]
        assert (stratum['n'], stratum['dice']) == (n, dice)


def test_it_is_better_than_the_one_before():
    gain = FOUND['gain']['plain']
    assert all(g['gain'] > 0 for g in gain.values()) and gain['TC']['ci95'][0] > 0 and gain['ET']['ci95'][0] > 0


def test_an_interval_draws_patients_with_all_their_exams(scorer):
    alike = scorer.interval([0.0, 1.0], ['a', 'a'])
    assert alike == [0.5, 0.5]  # one patient: nothing to draw
    low, high = scorer.interval([0.0, 0.0, 1.0, 1.0], ['a', 'a', 'b', 'b'])
    assert (low, high) == (0.0, 1.0)
    assert scorer.patient({'case': 'BraTS-SSA-00076-000'}) == scorer.patient({'case': 'BraTS-SSA-00081-000'})


def test_rules_are_chosen_by_dice_then_by_false_parts(scorer):
    flat = lambda dice, false: {'dice': [[d] * len(scorer.PART_ML) for d in dice], 'false': [false] * len(scorer.THRESHOLDS)}
    dice = [0.8] * len(scorer.THRESHOLDS)
    table = {'WT': flat(dice, [9, 5, 5, 5, 5]), 'TC': flat([0.8, 0.9, *dice[2:]], [0] * 5), 'ET': flat([0.8, 0.801, *dice[2:]], [3, 2, 1, 0, 0])}
    table['ET']['dice'] = [[d, d, d, d - 0.5, d - 0.5] for d, *_ in table['ET']['dice']]
    rules = scorer.choose_rules([table, table])
    assert rules.thresholds == (0.5, 0.45, 0.5)  # one region gains, one gains next to nothing
    assert rules.min_ml == (0.05, 0.0, 0.1)  # the smallest that leaves fewest false parts, as far as it costs no Dice


def test_false_parts_touch_nothing_true(scorer):
    mask, true = np.zeros((2, 9, 3, 3), bool)
    mask[0], mask[4], mask[8], true[0, 0, 0] = True, True, True, True
    assert scorer.false_parts(mask, true) == 2


def test_front_page_states_what_was_measured():
    mean, text = FOUND['plain']['all'], (ROOT / 'README.md').read_text(encoding='utf-8')
    assert 'mean Dice ' + ', '.join(f'{r} {mean[r]["dice"]:.2f}' for r in REGIONS) in ' '.join(text.split())
    assert f'{mean["WT"]["n"]} exams of {mean["WT"]["patients"]} patients' in ' '.join(text.split())


def test_rules_and_calibration_are_stored_with_the_model():
    about, plain = load_model().descriptions[0], lambda value: json.loads(json.dumps(value))
    assert plain(asdict(rules_of(load_model()))) == FOUND['rules']['chosen_on_all']
    assert about['calibration']['temperature'] == FOUND['calibration']['temperature'] and about['calibration']['n_cases'] == len(FOUND['cases'])
    facts = json.loads(STARTER.with_suffix('.json').read_text(encoding='utf-8'))
    assert all(about[k] == facts[k] for k in ('calibration', 'postprocess', 'split_sha256', 'origin'))  # the JSON says what the weights carry


def test_a_phantom_without_a_tumour_is_that(recipe):
    case = recipe.healthy_phantom(5, 4.0, Population(), 1.0)
    same = make_phantom(5, 4.0)
    assert not case.label.any() and case.geometry.shape == same.geometry.shape
    assert abs(case.brain.sum() / same.brain.sum() - 1) < 0.02  # the same head
    assert not np.array_equal(recipe.healthy_phantom(5, 4.0, Population(), 0.0).image, case.image)  # one of the two is diseased


def test_mirrored_halves_hold_no_tumour(recipe):
    case = make_phantom(11, 4.0)
    space = Space((4.0, 4.0, 4.0))
    seen = recipe.to_model_space(case, space)
    whole = recipe.MemoryCase(case.id, seen.image, seen.label, {}, seen.record)
    x = np.flatnonzero(seen.label[0].numpy().any((1, 2)))
    middle = recipe.midline(seen.image.numpy(), (seen.image != 0).any(0).numpy()) / 2
    assert abs(middle - (seen.image.shape[1] - 1) / 2) <= 2
    made = recipe.halves(whole)
    assert len(made) == (x.min() > middle) + (x.max() < middle)
    for half in made:
        twice = round(2 * middle)
        assert not half.label.any() and all(abs(float(c[c != 0].mean())) < 1e-3 for c in half.image)
        low, high = max(0, twice - half.image.shape[1] + 1), min(half.image.shape[1] - 1, twice)
        assert torch.equal(half.image[:, low:high + 1], half.image[:, low:high + 1].flip(1))


def test_what_a_step_sees_follows_the_shares(recipe):
    config = recipe.config_of(SETTINGS, Path('nowhere'), 'none')
    steps = recipe.Steps({kind: [] for kind in ('real', 'halves', 'healthy', 'tumour')}, SETTINGS, config)
    kinds = [steps.kind(i) for i in range(4000)]
    for kind, share in (('healthy', 0.09), ('halves', 0.05), ('tumour', 0.07), ('real', 0.79)):
        assert abs(kinds.count(kind) / 4000 - share) < 0.02
    assert kinds == [steps.kind(i) for i in range(4000)]
    assert steps.first_whole == round(0.65 * SETTINGS['run']['trainer']['max_steps'])


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
    from neuroseg3d.networks.checkpoint import STARTER
    from neuroseg3d.inference.guard import training_of
    from neuroseg3d.studies.split import load_split
    facts = json.loads(STARTER.with_suffix('.json').read_text())
    split = load_split(STARTER.with_name('starter_split.json'))
    assert len(split.cases) == 49 and {*SETTINGS['seven'], *(r['case'] for r in FOUND['cases'])} <= set(split.cases)
    found = training_of([{'split_sha256': facts['split_sha256'], 'fold': facts['fold']}])
    assert found.files == {f['sha256'] for c in split.cases.values() for f in c['files'].values()}
    assert found.knows_exams and sorted(found.exams) == sorted(split.cases)  # a copy under other bytes is recognised too


def test_pages_show_the_stored_results():
    "What 54_inference.predict and 19_studies.preprocess say was measured is what lies in benchmarks/results."
    page, other = (''.join(''.join(c['source']) for c in json.loads((ROOT / 'nbs' / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
                           if c['cell_type'] == 'markdown') for name in ('54_inference.predict', '19_studies.preprocess'))
    for name in ('inference', 'subsets'):
        lines = (ROOT / 'benchmarks' / 'results' / f'{name}.md').read_text(encoding='utf-8').splitlines()
        rows = [line for line in lines if line.startswith('|')]
        assert len(rows) > 20 and [r for r in rows if r not in page] == []
    doubt = ''.join(json.loads((ROOT / 'nbs' / '64_evaluation.uncertainty.ipynb').read_text(encoding='utf-8'))['cells'][-2]['source'])
    rows = (ROOT / 'benchmarks' / 'results' / 'uncertainty.md').read_text(encoding='utf-8').splitlines()
    found = json.loads((ROOT / 'benchmarks' / 'results' / 'uncertainty.json').read_text(encoding='utf-8'))
    assert len(rows) == 5 and [r for r in rows if r not in doubt] == [] and found['n_test'] >= 40
    assert all(0.85 <= found[region]['coverage'] <= 0.95 for region in REGIONS) and found['model_sha256'] == SETTINGS['init']['sha256']
    steps = json.loads((ROOT / 'benchmarks' / 'results' / 'inference.json').read_text(encoding='utf-8'))['steps']
    for measured in (steps[k]['starter'] for k in ('all measures', 'importing MONAI and Lightning too')):
        assert f'{measured["whole_process_s"]:.1f} s and {measured["peak_mb"]:.0f} MB' in other
    network = json.loads((ROOT / 'benchmarks' / 'results' / 'network_cpu.json').read_text(encoding='utf-8'))['presets']
    (base, large), unet = ((network[p]['ours']['step_s'], network[p]['dynunet']['step_s']) for p in ('base', 'large')), (
        ROOT / 'nbs' / '40_networks.unet.ipynb').read_text(encoding='utf-8')
    assert f'`base` takes {base[0]:.2f} s where DynUNet takes {base[1]:.2f}, `large` {large[0]:.1f} where it takes {large[1]:.1f}' in unet
    models = json.loads((ROOT / 'benchmarks' / 'results' / 'inference.json').read_text(encoding='utf-8'))['models']
    assert SETTINGS['init']['sha256'][:12] in models['starter']['model']  # of the starter of before: the same network, other weights
    facts = json.loads(STARTER.with_suffix('.json').read_text(encoding='utf-8'))
    assert facts['architecture']['preset'] == 'tiny' and facts['normalisation']['spacing_mm'] == [2.0, 2.0, 2.0]
    base = models['base']
    assert base['ratios']['ours']['in_process_s'] <= 0.2 and base['ratios']['ours']['whole_process_s'] <= 0.4
    assert base['ratios']['ours']['peak_mb'] <= 0.5 and min(base['dice_to_recipe']['ours'].values()) >= 0.995 and base['pairs'] >= 5
