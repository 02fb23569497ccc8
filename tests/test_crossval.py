"Cross-validation: folds that go on where they were, cases predicted by the network that has not seen them, and their ensemble."
from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from balls import ball_cohort

from neuroseg3d.inference.calibration import stored_calibration
from neuroseg3d.studies.cases import read_case
from neuroseg3d.networks.checkpoint import load_model
from neuroseg3d.cli import main
from neuroseg3d.core import labels_to_regions
from neuroseg3d.inference.predict import predict_case
from neuroseg3d.studies.layouts import find_cases

TRAIN = ['train', '--data.root', 'cohort', '--data.n_folds', '2', '--data.patch_size', '16', '--data.loader', 'none',
         '--space.spacing_mm', '6', '--model.preset', 'tiny', '--model.filters', '[4, 8, 8, 8]', '--trainer.max_steps', '30',
         '--trainer.val_every_steps', '30', '--trainer.accelerator', 'cpu', '--trainer.output_dir', 'cv', '--optim.ema_decay', '0.9',
         '--optim.learning_rate', '0.01', '--optim.warmup_steps', '2', '--logger', 'none']


@pytest.fixture(scope='module', autouse=True)
def work(tmp_path_factory) -> Path:
    "The working folder: a cohort of three cases and a new one, and a cross-validation whose first fold is finished."
    folder = tmp_path_factory.mktemp('work')
    ball_cohort(folder / 'cohort', n=3, n_test=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*TRAIN, '--folds', '0']) == 0
        yield folder


def test_an_unfinished_cross_validation_is_no_ensemble(work, capsys):
    assert main(['ensemble', '--run_dir', 'cv']) == 2
    error = capsys.readouterr().err
    assert 'cv/fold_1: found no finished fold; expected 2, train it with --folds 1' in error and error.count('\n') == 1


def test_finished_folds_are_left_alone(work, capsys):
    state = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (work / 'cv' / 'fold_0').rglob('*') if p.is_file()}
    assert main([*TRAIN, '--folds', 'all']) == 0
    said = capsys.readouterr().out
    assert 'fold 0 of 2: finished before' in said and 'fold 1 of 2: cv/fold_1' in said and said.count('machine plan') == 1
    assert state == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in (work / 'cv' / 'fold_0').rglob('*') if p.is_file()}
    about = [torch.load(work / f'cv/fold_{k}/checkpoints/best.ckpt', weights_only=True)['neuroseg3d'] for k in (0, 1)]
    assert [a['fold'] for a in about] == [0, 1] and about[0]['split_sha256'] == about[1]['split_sha256']


def test_a_fold_that_was_stopped_goes_on_exactly(work, monkeypatch):
    import neuroseg3d.training.task as train
    step, begun = train.SegmentationTask.training_step, []

    def failing(task, *args):
        begun.append(args)
        if len(begun) == 8:
            raise RuntimeError('the machine stops')
        return step(task, *args)
    words = [*TRAIN, '--trainer.output_dir', 'again', '--trainer.checkpoint_every_steps', '5', '--folds', '1']
    with monkeypatch.context() as patch:
        patch.setattr(train.SegmentationTask, 'training_step', failing)
        assert main(words) == 1
    last = work / 'again' / 'fold_1' / 'checkpoints' / 'last.ckpt'
    assert torch.load(last, weights_only=True)['global_step'] == 5
    assert main(words) == 0
    ours, whole = (torch.load(p, weights_only=True)['state_dict'] for p in (last, work / 'cv' / 'fold_1' / 'checkpoints' / 'last.ckpt'))
    assert ours.keys() == whole.keys() and all(torch.equal(ours[k], whole[k]) for k in whole)


def test_mistakes(work, capsys):
    for words, message in {('--folds', 'some'): 'found some, expected all, or numbers of folds',
                           ('--folds', '2'): 'found [2]; data.n_folds is 2, expected some of 0 to 1',
                           ('--folds', 'all', '--fold', '1'): 'found --ckpt_path or --fold beside it',
                           ('--folds', 'all', '--model.dropout', '0.5'): 'model.dropout: 0.0 in the checkpoint, 0.5 now'}.items():
        assert main([*TRAIN, *words]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope='module')
def ensemble(work) -> str:
    "What the command that makes and scores the ensemble says."
    import contextlib
    import io
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(['ensemble', '--run_dir', 'cv', '--test', 'cohort']) == 0
    return said.getvalue()


def label_of(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def table(path: Path) -> dict[tuple[str, str], float]:
    return {(r['case'], r['name']): float(r['dice']) for r in csv.DictReader(open(path / 'metrics.csv')) if r['kind'] == 'region'}


def test_each_case_is_predicted_by_the_network_that_has_not_seen_it(work, ensemble):
    split = json.loads((work / 'cv/fold_0/split.json').read_text())['cases']
    models = [load_model(work / f'cv/fold_{k}') for k in (0, 1)]
    scores, differ = table(work / 'cv' / 'out_of_fold_scores'), 0
    for study in find_cases(work / 'cohort'):
        case = read_case(study)
        ours, others = (predict_case(models[k], case, 'cpu').label for k in (split[study.id]['fold'], 1 - split[study.id]['fold']))
        found = label_of(work / 'cv' / 'out_of_fold' / f'{study.id}.nii.gz')
        assert np.array_equal(found, ours)
        differ += not np.array_equal(ours, others)
        for pred, ref, name in zip(labels_to_regions(ours), labels_to_regions(case.label), ('WT', 'TC', 'ET')):
            dice = 2 * (pred & ref).sum() / (pred.sum() + ref.sum()) if (pred | ref).any() else 1.0
            assert scores[study.id, name] == pytest.approx(dice, abs=1e-6)
    assert differ  # the networks are not the same one
    summary = json.loads((work / 'cv' / 'out_of_fold_scores' / 'summary.json').read_text())
    values = np.array([v for (_, name), v in sorted(scores.items()) if name == 'WT'])
    assert summary['WT']['dice']['mean'] == pytest.approx(values.mean()) and summary['WT']['n'] == 3
    low, high = summary['WT']['dice']['ci95']
    ends = [values.min() - 1e-9, low, values.mean(), high, values.max() + 1e-9]  # a mean of three equal numbers is off in its last digit
    assert ends == sorted(ends) and low < high
    assert summary['training_cases'] == summary['not_known_whether_trained_on'] == []


def test_ensemble_averages_probabilities(work, ensemble):
    assert json.loads((work / 'cv' / 'ensemble.json').read_text())['members'] == [f'fold_{k}/checkpoints/best.ckpt' for k in (0, 1)]
    study = next(s for s in find_cases(work / 'cohort', split='test'))
    case = read_case(study)
    singles = [predict_case(load_model(work / f'cv/fold_{k}'), case, 'cpu').probabilities for k in (0, 1)]
    together = predict_case(load_model(work / 'cv'), case, 'cpu')
    assert torch.allclose(together.probabilities, (singles[0] + singles[1]) / 2, atol=1e-5) and not torch.equal(*singles)
    assert np.array_equal(label_of(work / 'cv' / 'test' / f'{study.id}.nii.gz'), together.label)
    assert {case for case, _ in table(work / 'cv' / 'test_scores')} == {study.id}
    assert 'the ensemble on cohort' in ensemble and ensemble.count('95 % interval') == 2
    moved = work / 'elsewhere'  # the members go with the file
    shutil.copytree(work / 'cv', moved)
    for model in ('elsewhere/ensemble.json', 'elsewhere'):
        assert main(['infer', '--ckpt_path', model, '--input_image', str(next(iter(study.images.values()))), '--output_dir', 'out']) == 0
        assert np.array_equal(label_of(work / 'out' / f'{study.id}.nii.gz'), together.label)


def test_an_ensemble_is_calibrated_by_its_file(work, ensemble, capsys):
    "On cases that no member has seen: those of training are, and those of test have to be named."
    shutil.copytree(work / 'cv', work / 'own')
    words = ['calibrate', '--ckpt_path', 'own', '--device', 'cpu', '--alpha', '0.5', '--data']
    assert main([*words, 'cohort']) == 2
    assert ('cohort: found 3 labelled case(s), all of them training cases of the model; its 1 labelled test case(s) are used where their '
            'folder is named: cohort/imagesTs') in capsys.readouterr().err
    assert main([*words, 'cohort/imagesTs']) == 0
    said, kept = capsys.readouterr().out, 'own/fold_0/checkpoints/best.ckpt'
    assert '[1/1] BALL_Ts00' in said and f'stored in {kept}, the first of 2 checkpoints' in said
    found = stored_calibration(load_model('own'))  # without a warning: it holds for the ensemble
    assert found == stored_calibration(load_model(['own/fold_0', 'own/fold_1'])) and (found.members, found.n_cases) == (2, 1)
    assert main([*words[:2], 'own', 'own/fold_1', *words[3:], 'cohort/imagesTs']) == 2
    assert 'found an ensemble beside other models' in capsys.readouterr().err
    content = json.loads((work / 'own' / 'ensemble.json').read_text())
    (work / 'own' / 'ensemble.json').write_text(json.dumps(content | {'postprocess': {'min_et_ml': 0.1}}))
    assert main([*words, 'cohort/imagesTs']) == 2
    assert 'own/ensemble.json: found an ensemble with post-processing rules of its own' in capsys.readouterr().err


def test_called_again_it_predicts_nothing_twice_and_keeps_rules(work, ensemble, capsys):
    made = sorted((work / 'cv' / 'out_of_fold').rglob('*.nii.gz'))
    before = [p.stat().st_mtime_ns for p in made]
    assert main(['ensemble', '--run_dir', 'cv', '--postprocess']) == 0
    said = capsys.readouterr().out
    assert said.count('done before') == 3 and 'mean Dice out of fold' in said
    assert before == [p.stat().st_mtime_ns for p in made]
    rules = json.loads((work / 'cv' / 'ensemble.json').read_text())['postprocess']
    assert load_model(work / 'cv').descriptions[0]['postprocess'] == rules
    assert 'postprocess' not in load_model(work / 'cv' / 'fold_0').descriptions[0]


def test_what_is_no_test_set_is_refused(work, capsys):
    shutil.copytree(work / 'cohort' / 'imagesTr', work / 'seen' / 'imagesTr')
    shutil.copytree(work / 'cohort' / 'labelsTr', work / 'seen' / 'labelsTr')
    about = json.loads((work / 'cohort' / 'dataset.json').read_text())
    (work / 'seen' / 'dataset.json').write_text(json.dumps(about | {'test': [], 'numTest': 0}))
    assert main(['ensemble', '--run_dir', 'cv', '--test', 'seen']) == 2
    assert 'seen: found 3 case(s) with a reference, none that the ensemble was not trained on' in capsys.readouterr().err
    (work / 'broken.json').write_text('{"members": []}')
    assert main(['infer', '--ckpt_path', 'broken.json', '--input_image', 'cohort', '--output_dir', 'out']) == 2
    assert 'broken.json: members: found a list of 0' in capsys.readouterr().err


def test_the_order_of_channels_that_was_stated_for_training_is_that_of_the_ensemble(work, capsys):
    cohort, order = ball_cohort(work / 'stated', n=2), 'T2w,T1gd,T1w,FLAIR'
    for path in (cohort / 'imagesTr').iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., ::-1], image.affine), path)
    about = json.loads((cohort / 'dataset.json').read_text())
    (cohort / 'dataset.json').write_text(json.dumps({k: v for k, v in about.items() if k != 'modality'}))
    words = ['--data.root', 'stated', '--trainer.output_dir', 'cv_stated', '--trainer.max_steps', '2', '--trainer.val_every_steps', '2', '--channels', order]
    assert main([*TRAIN, *words, '--folds', 'all']) == 0
    assert main(['ensemble', '--run_dir', 'cv_stated', '--device', 'cpu', '--postprocess']) == 0
    split = json.loads((work / 'cv_stated/fold_0/split.json').read_text())['cases']
    for study in find_cases(cohort, channels=order):
        label = predict_case(load_model(work / f'cv_stated/fold_{split[study.id]["fold"]}'), read_case(study), 'cpu').label
        assert np.array_equal(label_of(work / 'cv_stated' / 'out_of_fold' / f'{study.id}.nii.gz'), label)
