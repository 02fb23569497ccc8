"What is written: whole or not at all, under the user's umask, on odd file systems, and never over a file of the user's."
from __future__ import annotations

import csv
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from balls import state_order
from test_inference import model

from neuroseg3d import cli
from neuroseg3d.core import Case, Geometry, InputError
from neuroseg3d.evaluation.attribution import check_explanations
from neuroseg3d.evaluation.eda import write_eda
from neuroseg3d.evaluation.evaluate import evaluate, write_metrics
from neuroseg3d.inference.cohort import _Manifest, infer_cohort
from neuroseg3d.inference.predict import infer_file, predictions
from neuroseg3d.networks.checkpoint import export_model, load_checkpoint, save_checkpoint, write_ensemble
from neuroseg3d.review.casepage import write_page
from neuroseg3d.review.report import check_pages
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.nifti import write_label
from neuroseg3d.system.files import as_path, filled, second_name, sweep, write_bytes, write_json, write_table
from neuroseg3d.system.folders import LOCK, FolderLock, Results, check_folder
from neuroseg3d.training.data import Data
from neuroseg3d.training.resume import Interrupted, StopSignals
from neuroseg3d.training.task import Config, TrainerConfig, _check_free, run_results


def names(folder: Path) -> list[str]:
    "All that lies below a folder, hidden files included."
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*'))


def refusal(call, *words, **options) -> str:
    with pytest.raises(InputError) as error:
        call(*words, **options)
    return str(error.value)


def image_file(path: Path, seed: int = 0, volumes: int = 4) -> Path:
    "A small scan (or, of one volume, a label map) as MSD stores it."
    values = np.zeros((12, 12, 12, volumes), np.int16)
    values[2:10, 2:10, 2:10] = np.random.default_rng(seed).integers(50, 400, (8, 8, 8, volumes))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values if volumes > 1 else (values[..., 0] > 300).astype(np.uint8), np.diag([4.0, 4, 4, 1])), path)
    return path


@pytest.fixture
def cohort(tmp_path) -> Path:
    "Two patients in the layout of the Decathlon, both with a reference."
    root = tmp_path / 'coh'
    for n, name in enumerate('AB'):
        image_file(root / 'imagesTr' / f'{name}.nii.gz', n)
        image_file(root / 'labelsTr' / f'{name}.nii.gz', n, volumes=1)
    (root / 'dataset.json').write_text(json.dumps({
        'modality': {'0': 'FLAIR', '1': 'T1w', '2': 't1gd', '3': 'T2w'}, 'tensorImageSize': '4D',
        'labels': {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'},
        'training': [{'image': f'./imagesTr/{n}.nii.gz', 'label': f'./labelsTr/{n}.nii.gz'} for n in 'AB'], 'test': []}))
    return root


def content(folder: Path) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in names(folder) if (folder / n).is_file()}


def segment(studies, folder: Path, network=None, **options) -> dict[str, str]:
    return infer_cohort(model(network=network), studies, folder, device='cpu', report=lambda line: None, **options)


# ---- text becomes a path

@pytest.mark.contract('works', 'names', '`~` in a setting or an argument',
                      'the home folder')
def test_a_tilde_is_the_home_folder_in_settings_and_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert as_path('~') == tmp_path and as_path('~/runs/a') == tmp_path / 'runs' / 'a' and as_path('a~/b') == Path('a~/b')
    assert TrainerConfig(output_dir='~/runs/a').output_dir == str(tmp_path / 'runs' / 'a')
    assert Data(root='~/data', cache_dir='~/c').root == str(tmp_path / 'data') and Data(cache_dir='~/c').cache_dir == str(tmp_path / 'c')
    args = cli.make_parser().parse_args(['infer', '--input_image', 'T1w=~/a.nii', '~/b.nii', '--output_dir=~/x', '--config_dir', '~/c'])
    cli._settle_paths(args)
    assert args.input_image == [f'T1w={tmp_path}/a.nii', f'{tmp_path}/b.nii'] and args.output_dir == f'{tmp_path}/x' and args.config_dir == f'{tmp_path}/c'


@pytest.mark.parametrize('value', ['', '  ', 'a\0b', 7, None])
def test_what_is_no_path_is_refused(value):
    assert '--output_dir: found ' in refusal(as_path, value, '--output_dir')


@pytest.mark.contract('refused', 'outputs', "`--output_dir ''`",
                      'nothing is written; "." is the current folder')
@pytest.mark.parametrize('words', [['infer', '--input_image', 'x'], ['eda', '--data', 'x'], ['evaluate', '--pred', 'x', '--ref', 'x'], ['demo'],
                                   ['report', '--pred', 'x', '--data', 'x'], ['explain', '--input_image', 'x'], ['phantom'], ['download']])
def test_no_command_writes_into_the_current_folder_for_an_empty_name(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words, '--output_dir', '']) == 2
    assert "--output_dir: found '', expected a path" in capsys.readouterr().err and not names(tmp_path)


def test_a_home_that_nobody_knows(monkeypatch):
    assert 'no such home folder is known here' in refusal(as_path, '~nobody-of-this-name/x')


# ---- modes, file systems, disks

def write_all(folder: Path) -> list[Path]:
    "One file by each of the ways there are."
    case = Case('A', np.ones((4, 3, 3, 3), np.float32), Geometry((3, 3, 3), np.eye(4)))
    write_metrics([{'case': 'A', 'dice': 1.0}], {'n': 1}, folder / 'scores')
    save_checkpoint({'x': torch.zeros(3)}, folder / 'a.ckpt')
    second_name(folder / 'a.ckpt', folder / 'b.ckpt')
    write_ensemble(folder / 'ensemble.json', [folder / 'a.ckpt'])
    write_page('<html></html>', folder / 'pages' / 'index.html')
    write_label(folder / 'label.nii.gz', np.zeros((3, 3, 3), np.uint8), case)
    run_results(folder / 'run').write('config.yaml', 'a: 1\n')
    return [p for p in folder.rglob('*') if p.is_file()]


@pytest.mark.parametrize('umask, files, folders', [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775), (0o022, 0o644, 0o755), (0o027, 0o640, 0o750)])
def test_files_have_the_mode_that_the_umask_leaves(umask, files, folders, tmp_path):
    before = os.umask(umask)
    try:
        made = write_all(tmp_path / 'out')
        state_order(tmp_path)
        image = image_file(tmp_path / 'scan.nii.gz')
        infer_file(model(), image, tmp_path / 'pred' / 'A.nii.gz', device='cpu', extras=('probabilities', 'entropy'))
    finally:
        os.umask(before)
    made += [p for p in (tmp_path / 'pred').rglob('*') if p.is_file()]
    assert len(made) == 15 and {oct(stat.S_IMODE(p.stat().st_mode)) for p in made} == {oct(files)}
    assert {oct(stat.S_IMODE(p.stat().st_mode)) for p in (tmp_path / 'out').rglob('*') if p.is_dir()} == {oct(folders)}


@pytest.mark.contract('works', 'surroundings', 'a file system that refuses chmod, links, times or fsync',
                      'all is written')
def test_a_file_system_that_refuses_everything_but_to_write(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(1, 'Operation not permitted')
    for name in ('chmod', 'fchmod', 'lchmod', 'chown', 'link', 'symlink', 'utime', 'fsync'):
        if hasattr(os, name):
            monkeypatch.setattr(os, name, refuse)
    made = write_all(tmp_path / 'out')
    assert len(made) == 11 and (tmp_path / 'out' / 'b.ckpt').read_bytes() == (tmp_path / 'out' / 'a.ckpt').read_bytes()
    state_order(tmp_path)
    image = image_file(tmp_path / 'scan.nii.gz')
    infer_file(model(), image, tmp_path / 'pred' / 'A.nii.gz', device='cpu')
    assert names(tmp_path / 'pred') == ['A.nii.gz', 'manifest.json']


FULL = {
    'scores': lambda d: write_metrics([{'case': 'A' * 9000, 'dice': 1.0}], {'n': 1}, d / 'scores'),
    'page': lambda d: write_page('x' * 9000, d / 'index.html'),
    'checkpoint': lambda d: save_checkpoint({'x': torch.randn(9000)}, d / 'a.ckpt'),
    'label': lambda d: write_label(d / 'a.nii', np.zeros((30, 30, 30), np.uint8), Case('A', np.ones((4, 30, 30, 30), np.float32), Geometry((30, 30, 30), np.eye(4)))),
    'settings': lambda d: run_results(d).write('config.yaml', 'x' * 9000),
}


@pytest.mark.parametrize('what', FULL)
def test_a_disk_that_is_full_is_told_with_the_path_and_leaves_all_as_it_was(what, tmp_path):
    def limited() -> str:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        try:
            return refusal(FULL[what], tmp_path / 'out')
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (tmp_path / 'out').mkdir()
    said = limited()
    assert str(tmp_path / 'out') in said and 'could not be written: File too large; what was there before is as it was' in said
    assert '.neuroseg3d-' not in said and not names(tmp_path / 'out')
    FULL[what](tmp_path / 'out')
    before = content(tmp_path / 'out')
    limited()
    assert content(tmp_path / 'out') == before


def test_no_space_left_is_told_by_name(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, 'No space left on device')  # as a share says it, when the file is closed
    monkeypatch.setattr(os, 'fsync', full)
    assert 'x.json: could not be written: No space left on device' in refusal(write_json, tmp_path / 'x.json', {})
    assert not names(tmp_path)


def test_an_error_of_another_file_is_not_laid_at_the_targets_door(tmp_path):
    with pytest.raises(FileNotFoundError), filled(tmp_path / 'a.txt'):
        open(tmp_path / 'absent.nii').close()
    with pytest.raises(ZeroDivisionError), filled(tmp_path / 'a.txt'):
        1 / 0  # noqa: B018
    assert not names(tmp_path)


def test_a_folder_that_cannot_be_one_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / 'file').touch()
    (tmp_path / 'link').symlink_to(tmp_path / 'absent')
    for inside in ('file', 'file/deeper', 'link'):
        said = refusal(check_folder, tmp_path / inside, '--output_dir')
        assert 'expected a folder' in said and str(tmp_path / inside) in said
    assert cli.main(['export', '--ckpt_path', 'absent', '--output_path', str(tmp_path / 'file' / 'm.safetensors')]) == 2
    assert '--output_path' in capsys.readouterr().err
    assert 'too long' in refusal(Results(tmp_path, 'x').check, ['n' * 300])


# ---- tables

def test_no_cell_is_a_formula(tmp_path):
    evil = ['=1+1', '+x', '-x', '@SUM(1)', '\tx', '\rx', '=cmd|\' /C calc\'!A0']
    write_table(tmp_path / 'a.csv', [{'case': e, 'dice': -0.5, 'text': '-0.25', '=head': 1e-3} for e in evil])
    rows = list(csv.reader(open(tmp_path / 'a.csv', newline='')))
    assert rows[0] == ['case', 'dice', 'text', "'=head"]
    assert [r[0] for r in rows[1:]] == [f"'{e}" for e in evil] and {tuple(r[1:]) for r in rows[1:]} == {('-0.5', '-0.25', '0.001')}


@pytest.mark.contract('converted', 'outputs', 'a case whose name a spreadsheet takes for a formula',
                      'an apostrophe before it makes it text')
def test_scores_of_a_case_that_is_named_like_a_formula(tmp_path):
    for side in ('pred', 'ref'):
        image_file(tmp_path / side / '=1+1.nii.gz', volumes=1)
    evaluate(tmp_path / 'pred', tmp_path / 'ref', tmp_path / 'out', pred_schema='msd', ref_schema='msd')
    for name in ('metrics.csv', 'confusion.csv'):
        cells = {r['case'] for r in csv.DictReader(open(tmp_path / 'out' / name, newline=''))} - {''}
        assert cells == {"'=1+1"}


# ---- never over a file of the user's

@pytest.mark.parametrize('where', ['imagesTr', 'labelsTr', 'linked', 'link', 'hard'])
def test_inference_replaces_no_scan_and_no_reference(where, cohort, tmp_path):
    before, out = content(cohort), cohort / where
    if where == 'linked':
        out = tmp_path / 'elsewhere'
        out.symlink_to(cohort / 'imagesTr')
    elif where in ('link', 'hard'):
        out = tmp_path / 'out'
        out.mkdir()
        (out / 'B.nii.gz').symlink_to(cohort / 'labelsTr' / 'B.nii.gz') if where == 'link' else os.link(cohort / 'imagesTr' / 'B.nii.gz', out / 'B.nii.gz')
    said = refusal(segment, find_cases(cohort), out)
    assert 'is a file of the input' in said and 'Choose another output folder' in said
    alone = cohort / 'imagesTr' / 'B.nii.gz'
    assert 'would be replaced' in refusal(infer_file, model(), alone, out / 'B.nii.gz', device='cpu')  # its reference is not known here
    assert content(cohort) == before


@pytest.mark.contract('refused', 'outputs', 'an output that would replace a file which the manifest does not list, or a mask that was corrected by hand',
                      'the error names it; our own files are replaced')
def test_inference_replaces_what_its_manifest_lists_and_nothing_else(cohort, tmp_path):
    out, studies = tmp_path / 'out', find_cases(cohort)
    assert segment(studies, out, extras=('probabilities',)) == {}
    assert names(out) == ['A.nii.gz', 'B.nii.gz', 'manifest.json', 'probabilities', 'probabilities/A.nii.gz', 'probabilities/B.nii.gz']
    lines = []
    infer_cohort(model(), studies, out, device='cpu', report=lines.append, extras=('probabilities',))
    assert lines == ['A: done before', 'B: done before']
    other = model(network=type(model().networks[0])())
    other.descriptions[0]['postprocess'] = {'thresholds': [0.4, 0.4, 0.4]}
    assert infer_cohort(other, studies, out, device='cpu', report=lambda line: None, extras=('probabilities',)) == {}  # ours: replaced
    (out / 'B.nii.gz').write_bytes((cohort / 'labelsTr' / 'B.nii.gz').read_bytes())  # an expert's corrections
    before = content(out)
    assert 'B.nii.gz: was changed after it was written' in refusal(segment, studies, out, extras=('probabilities',))
    assert content(out) == before


def test_a_file_that_is_in_the_way_is_named_before_the_first_case(cohort, tmp_path):
    out = tmp_path / 'out'
    (out / 'entropy').mkdir(parents=True)
    (out / 'entropy' / 'B.nii.gz').write_bytes(b'mine')
    assert 'entropy/B.nii.gz: is there already and was not written by neuroseg3d' in refusal(segment, find_cases(cohort), out, extras=('entropy',))
    assert names(out) == ['entropy', 'entropy/B.nii.gz'] and (out / 'entropy' / 'B.nii.gz').read_bytes() == b'mine'


def test_a_manifest_of_something_else_is_not_replaced(cohort, tmp_path):
    write_bytes(tmp_path / 'out' / 'manifest.json', b'{"name": "my web page"}')
    assert 'manifest.json' in refusal(segment, find_cases(cohort), tmp_path / 'out')
    assert names(tmp_path / 'out') == ['manifest.json'] and (tmp_path / 'out' / 'manifest.json').read_bytes() == b'{"name": "my web page"}'


@pytest.mark.parametrize('name', ['index.html', 'fingerprint.json', 'cases.csv', 'intensities.png', 'volumes.png', 'contrast.png'])
def test_a_fingerprint_replaces_no_file_of_the_users(name, cohort, tmp_path):
    write_bytes(tmp_path / 'out' / name, b'mine')
    assert f'{name}: is there already and was not written by neuroseg3d' in refusal(write_eda, cohort, tmp_path / 'out')
    assert content(tmp_path / 'out') == {name: b'mine'}


@pytest.mark.parametrize('name', ['metrics.csv', 'confusion.csv', 'summary.json'])
def test_scores_replace_no_file_of_the_users(name, cohort, tmp_path):
    labels = cohort / 'labelsTr'
    evaluate(labels, labels, tmp_path / 'ours', pred_schema='msd', ref_schema='msd')
    evaluate(labels, labels, tmp_path / 'ours', pred_schema='msd', ref_schema='msd')  # again: ours
    write_bytes(tmp_path / 'out' / name, b'mine')
    assert name in refusal(evaluate, labels, labels, tmp_path / 'out', pred_schema='msd', ref_schema='msd')
    assert content(tmp_path / 'out') == {name: b'mine'}


def test_reports_and_explanations_replace_no_file_of_the_users(cohort, tmp_path):
    for name in ('index.html', 'cases/A.html', 'A_WT.json', 'A_WT_shapley.nii.gz', 'A_WT_sequences.png'):
        out = tmp_path / name.replace('/', '_')
        write_bytes(out / name, b'mine')
        check = (lambda: check_pages(out / 'index.html', ['A', 'B'])) if name.endswith('html') else lambda: check_explanations(
            out, find_cases(cohort)[0], 'WT', ['shapley'])
        assert f'{name}: is there already' in refusal(check) and content(out) == {name: b'mine'}
    write_page('first', tmp_path / 'pages' / 'index.html')
    write_page('second', tmp_path / 'pages' / 'index.html')
    assert (tmp_path / 'pages' / 'index.html').read_text() == 'second'


@pytest.mark.parametrize('name', ['config.yaml', 'split.json', 'logs/metrics.csv', 'checkpoints/best.ckpt'])
def test_a_training_replaces_no_file_of_the_users(name, tmp_path):
    write_bytes(tmp_path / 'run' / name, b'mine')
    assert f'{name}: is there already' in refusal(_check_free, run_results(tmp_path / 'run'))
    ours = run_results(tmp_path / 'ours')
    ours.write('config.yaml', 'a: 1\n')  # of a run that was ended before its first checkpoint
    write_bytes(tmp_path / 'ours' / 'logs' / 'metrics.csv', b'step\r\n')
    _check_free(ours)


# ---- one at a time

HOLD = """
import sys, time
from pathlib import Path
from neuroseg3d.system.folders import FolderLock
with FolderLock(Path(sys.argv[1]), 'train').held():
    print('held', flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    "Another process that works in a folder."
    folder = tmp_path / 'run'
    folder.mkdir()
    process = subprocess.Popen([sys.executable, '-c', HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'held\n'
    yield folder, process
    process.kill()
    process.wait()


@pytest.mark.contract('refused', 'processes', 'a second training in the folder of one that runs',
                      'the error says which process, where and since when; what a killed one has left is taken over')
def test_a_second_training_is_refused_and_told_who_is_there(holder):
    from neuroseg3d.training.task import fit
    folder, process = holder
    said = refusal(fit, Config(trainer=TrainerConfig(output_dir=str(folder))), verbose=False)
    assert f'{folder}: another process is at work in it (train, process {process.pid} on {os.uname().nodename}, since ' in said
    process.kill()
    process.wait()
    with run_results(folder).alone():  # a killed process holds nothing
        assert (folder / LOCK).is_file()
    assert not names(folder)


def test_the_lock_of_another_machine_is_free_after_three_minutes_without_a_sign_of_life(tmp_path):
    lock = tmp_path / LOCK
    lock.write_text(json.dumps({'mark': '00000000-1-5f5e100', 'process': 1, 'host': 'elsewhere', 'since': 'noon', 'work': 'train'}))
    said = refusal(lambda: FolderLock(tmp_path, 'train').held().__enter__())
    assert '(train, process 1 on elsewhere, since noon)' in said and f'delete {lock}' in said and 'after 180 s' in said
    os.utime(lock, (time.time() - 400,) * 2)
    with FolderLock(tmp_path, 'train').held():
        pass
    assert not names(tmp_path)


def note_entries(job: tuple[str, str]) -> None:
    "Write some files into a folder of predictions, and an entry for each into its manifest."
    folder, who = job
    for n in range(12):
        manifest = _Manifest(predictions(folder), {})
        manifest.results.write(f'{who}{n}.nii', 'x')
        manifest._put({f'{who}{n}': {'output': f'{who}{n}.nii', 'model': {}}})


@pytest.mark.contract('works', 'processes', 'two inferences into one folder',
                      'one manifest of both')
def test_two_processes_in_one_folder_lose_nothing_of_its_manifest(tmp_path):
    import multiprocessing
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context('fork')) as pool:
        list(pool.map(note_entries, [(str(tmp_path), 'a'), (str(tmp_path), 'b')]))
    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    wanted = {f'{who}{n}' for who in 'ab' for n in range(12)}
    assert set(manifest['cases']) == wanted and set(manifest['files']) == {f'{w}.nii' for w in wanted}
    assert set(names(tmp_path)) == {'manifest.json', *manifest['files']}


@pytest.mark.contract('works', 'processes', 'half-written files of killed processes',
                      'removed by the next run in that folder')
def test_what_killed_processes_leave_is_swept_and_nothing_else(cohort, tmp_path):
    code = ("import os, signal, sys; from pathlib import Path; from neuroseg3d.system.files import filled\n"
            "with filled(Path(sys.argv[1])) as path:\n    path.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)")
    out = tmp_path / 'out'
    assert subprocess.run([sys.executable, '-c', code, out / 'A.nii.gz']).returncode == -signal.SIGKILL
    assert len(names(out)) == 1 and names(out)[0].endswith('.nii.gz')
    for name in ('.A-x1y2z3w4.nii.gz', '.mine.nii.gz', '.git'):  # of an earlier version; of the user
        (out / name).touch()
    with filled(out / 'C.txt') as busy:
        busy.write_text('at work')
        assert segment(find_cases(cohort), out) == {}
        assert names(out) == sorted([busy.name, '.git', '.mine.nii.gz', 'A.nii.gz', 'B.nii.gz', 'manifest.json'])
        assert sweep(out) == []


# ---- signals

RUN = """
import sys, time
import neuroseg3d.cli as cli
def demo(args, overrides):
    try:
        print('at work', flush=True)
        time.sleep(600)
    finally:
        time.sleep(float(sys.argv[1]))
cli._demo = demo
sys.exit(cli.main(['demo']))
"""


@pytest.mark.parametrize('signals, code, said', [
    ([signal.SIGINT], 130, 'neuroseg3d: interrupted\n'), ([signal.SIGTERM], 143, 'neuroseg3d: ended by SIGTERM\n'),
    ([signal.SIGINT, signal.SIGINT], 130, 'neuroseg3d: interrupted again: ended at once\n'),
    ([signal.SIGTERM, signal.SIGTERM], 143, 'neuroseg3d: interrupted again: ended at once\n')])
def test_signals_end_a_command_with_their_code_and_a_line(signals, code, said, tmp_path):
    job = subprocess.Popen([sys.executable, '-c', RUN, str(60 * (len(signals) - 1))], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored where the tests run in the background
    assert job.stdout.readline() == 'at work\n'
    for signum in signals:
        job.send_signal(signum)
        time.sleep(1)
    assert job.wait(60) == code and job.stderr.read() == said


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_interrupted_twice_says_so(signum, capfd):
    with pytest.raises(Interrupted) as end, StopSignals() as signals:
        os.kill(os.getpid(), signum)
        assert signals.received == signum  # the first lets it write its checkpoint
        os.kill(os.getpid(), signum)
    assert end.value.code == 128 + signum and 'ended by a second' in capfd.readouterr().err


# ---- exports

def test_an_export_replaces_exports_only(tmp_path, request):
    from neuroseg3d.networks.checkpoint import STARTER
    if not STARTER.is_file():
        pytest.skip('the package comes without a model here')
    for name in ('m.json', 'm.safetensors'):
        folder = tmp_path / name
        write_bytes(folder / name, b'{"mine": 1}')
        assert f'{name}: is there already and is no exported model' in refusal(export_model, tmp_path / 'absent.ckpt', folder / 'm.safetensors')
        assert content(folder) == {name: b'{"mine": 1}'}
    for suffix in ('.json', '.safetensors'):
        write_bytes(tmp_path / f'own{suffix}', STARTER.with_suffix(suffix).read_bytes())
    assert 'absent.ckpt: no such checkpoint' in refusal(export_model, tmp_path / 'absent.ckpt', tmp_path / 'own.safetensors')


def test_an_ensemble_replaces_ensembles_only(tmp_path):
    save_checkpoint({'x': 1}, tmp_path / 'a.ckpt')
    write_ensemble(tmp_path / 'ensemble.json', [tmp_path / 'a.ckpt'])
    write_ensemble(tmp_path / 'ensemble.json', [tmp_path / 'a.ckpt', tmp_path / 'a.ckpt'])
    write_bytes(tmp_path / 'mine.json', b'{"a": 1}')
    assert 'mine.json: is there already' in refusal(write_ensemble, tmp_path / 'mine.json', [tmp_path / 'a.ckpt'])
    assert load_checkpoint(tmp_path / 'a.ckpt') == {'x': 1} and (tmp_path / 'mine.json').read_bytes() == b'{"a": 1}'
