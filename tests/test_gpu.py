"What only a GPU shows, and what can be shown of it without one: the same tests run on the CPU where they mean something there."
from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from balls import SHAPE, SPACING_MM, ball_case, ball_cohort
from conftest import ROOT
from elsewhere import ELSEWHERE, Elsewhere, There

from neuroseg3d.cli import main
from neuroseg3d.config import build
from neuroseg3d.core import MODALITIES, Case, Geometry, labels_to_regions
from neuroseg3d.evaluation import attribution as xai
from neuroseg3d.evaluation.uncertainty import assess_case
from neuroseg3d.inference.predict import choose_device, predict_case, write_extra
from neuroseg3d.networks import windows
from neuroseg3d.networks.checkpoint import KEY, Model, export_model, load_checkpoint, load_model
from neuroseg3d.networks.losses import _Summed, get_targets, out_channels
from neuroseg3d.networks.unet import UNet, UNetConfig
from neuroseg3d.networks.windows import Windows, predict_cost, predict_probabilities
from neuroseg3d.studies.cases import read_case
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.preprocess import Space
from neuroseg3d.system.processes import gather
from neuroseg3d.training import task as train
from neuroseg3d.training.task import Config, SegmentationTask

NO_GPU = 'no CUDA device here (torch.cuda.is_available() is false): on a machine that has one, `pytest tests/test_gpu.py` runs this'
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
each_device = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])
STEPS, AT = 6, 4  # of a run, and where it is interrupted


# ---------------------------------------------------------------------- training


class Runs:
    "Trainings of a tiny network on coarse phantoms by the command line, in this process."

    def __init__(self, folder: Path):
        self.folder, self.cohort = folder, ball_cohort(folder / 'cohort', 3)

    def words(self, name: str, device: str, precision: str = 'auto', **trainer) -> list[str]:
        "The command line of a run."
        trainer = {'output_dir': self.folder / name, 'max_steps': STEPS, 'val_every_steps': STEPS // 2, 'checkpoint_every_steps': 100,
                   'accelerator': {'cuda': 'gpu'}.get(device, device), 'precision': precision, **trainer}
        settings = {'data': {'root': self.cohort, 'patch_size': 16, 'n_folds': 3, 'batch_size': 2, 'loader': 'thread', 'workers': 1},
                    'model': {'preset': 'base', 'filters': [4, 8, 12], 'strides': [1, 2, 2], 'kernels': 3, 'deep_supervision': 1,
                              'dropout': 0.2}, 'space': {'spacing_mm': SPACING_MM}, 'infer': {'roi_size': 32},
                    'logger': {'kind': 'none'}, 'trainer': trainer}
        return ['train', '--resume', 'auto', *(w for s, values in settings.items() for k, v in values.items() for w in (f'--{s}.{k}', str(v)))]

    def __call__(self, name: str, device: str, precision: str = 'auto', stop_at: int = 0, **trainer) -> int:
        "Train, or go on; the exit code. At a step the process gets SIGTERM, as a queue would send it."
        with pytest.MonkeyPatch.context() as patch:
            if stop_at:
                patch.setattr(SegmentationTask, 'training_step', _stopped(SegmentationTask.training_step, stop_at))
            try:
                return main(self.words(name, device, precision, **trainer))
            except SystemExit as end:
                return end.code

    def last(self, name: str) -> dict:
        return load_checkpoint(self.folder / name / 'checkpoints' / 'last.ckpt')

    def best(self, name: str) -> Path:
        return self.folder / name / 'checkpoints' / 'best.ckpt'


def _stopped(step, at: int):
    "A training step that sends this process SIGTERM before the step of that number ends."
    def wrapper(task, batch, batch_idx):
        if batch_idx == at - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(task, batch, batch_idx)
    return wrapper


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    yield Runs(tmp_path_factory.mktemp('runs'))
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.benchmark = before[1]


def distance(a: dict, b: dict) -> float:
    "How far apart the weights of two state dicts are (Euclidean)."
    assert a.keys() == b.keys()
    return sum(float((a[k].double() - b[k].double()).square().sum()) for k in a if a[k].is_floating_point()) ** 0.5


#: Precision, and whether deterministic algorithms are asked for.
KINDS = [('cpu', '32-true', True), *[pytest.param('cuda', *kind, marks=needs_gpu) for kind in (
    ('auto', True), ('32-true', True), ('16-mixed', True), ('bf16-mixed', True), ('16-mixed', False))]]


@pytest.mark.parametrize('device, precision, deterministic', KINDS)
def test_an_interrupted_run_ends_within_the_noise_of_two_whole_ones(runs, device, precision, deterministic):
    if precision == 'bf16-mixed' and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip('this GPU has no bf16 arithmetic')
    tag = f'{device}-{precision}-{deterministic}'
    whole, again, parts = (f'{name}-{tag}' for name in ('whole', 'again', 'parts'))
    for name in (whole, again):
        assert not runs(name, device, precision, deterministic=deterministic)
    assert runs(parts, device, precision, stop_at=AT, deterministic=deterministic) == 128 + signal.SIGTERM
    half = runs.last(parts)
    assert half['global_step'] == AT
    assert not runs(parts, device, precision, deterministic=deterministic)
    first, second, resumed = (runs.last(name) for name in (whole, again, parts))
    assert first['global_step'] == resumed['global_step'] == STEPS
    noise = distance(first['state_dict'], second['state_dict'])
    assert distance(resumed['state_dict'], first['state_dict']) <= 4 * noise  # where two whole runs are equal, so is the resumed one
    if noise == 0:
        assert all(torch.equal(v, resumed['state_dict'][k]) for k, v in first['state_dict'].items())
        assert distance(half['state_dict'], first['state_dict']) > 1e-3  # and the last steps did learn something
    assert noise == 0 or device == 'cuda'
    check_scaler(half, first, resumed, chosen_precision(first))


def chosen_precision(content: dict) -> str:
    return content[KEY]['config']['trainer']['precision']


def check_scaler(half: dict, whole: dict, resumed: dict, precision: str) -> None:
    "In 16 bits the gradient scaler is kept, in plain values, and goes on where it was."
    if precision != '16-mixed':
        assert not whole.get('MixedPrecision')
        return
    assert {type(v) for v in whole['MixedPrecision'].values()} <= {int, float}
    assert resumed['MixedPrecision'] == whole['MixedPrecision'] != half['MixedPrecision']


@needs_gpu
def test_a_gpu_chooses_sixteen_bits_by_itself(runs):
    assert not runs('auto', 'auto')
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert chosen_precision(runs.last('auto')) == ('bf16-mixed' if has_bf16 else '16-mixed')
    assert windows.choose_precision('auto', torch.device('cuda')) == ('bf16' if has_bf16 else 'fp16')


def test_a_gpu_that_only_emulates_bf16_gets_fp16(monkeypatch):
    "A T4: PyTorch calls bf16 supported there, and computes it several times slower than fp16."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert windows.choose_precision('auto', torch.device('cuda')) == 'fp16'
    assert train.choose_precision('auto', 'gpu') == '16-mixed'


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='fewer than two CUDA devices here')
def test_two_gpus_train_as_one(runs):
    "The command line with two processes, against one with the same batch; without dropout, which each process draws for itself."
    for n in (1, 2):
        words = [*runs.words(f'gpus{n}', 'cuda', '32-true', devices=n), '--model.dropout', '0']
        done = subprocess.run([sys.executable, '-m', 'neuroseg3d.cli', *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (runs.last(f'gpus{n}') for n in (1, 2))
    assert one['global_step'] == two['global_step'] == STEPS
    size = sum(float(v.double().square().sum()) for v in one['state_dict'].values() if v.is_floating_point()) ** 0.5
    assert distance(one['state_dict'], two['state_dict']) < 0.02 * size


@pytest.mark.parametrize('asked', ['auto', 'cuda'])
def test_each_of_several_processes_takes_a_gpu_of_its_own(asked, monkeypatch):
    "`infer --devices 4`: the third process finds what torchrun would have told it; two more than there are GPUs share."
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)
    assert choose_device(asked) == torch.device('cuda')
    monkeypatch.setenv('WORLD_SIZE', '6')
    for rank, device in ((2, 'cuda:2'), (5, 'cuda:1')):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        assert choose_device(asked) == torch.device(device)


# ---------------------------------------------------------------------- checkpoints


def tensors(content) -> list[torch.Tensor]:
    "All tensors of a tree."
    if isinstance(content, torch.Tensor):
        return [content]
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, (list, tuple)) else ()
    return [t for part in parts for t in tensors(part)]


@each_device
def test_a_checkpoint_serves_on_a_machine_without_a_gpu(runs, device, tmp_path):
    assert not runs(f'made-{device}', device)
    best = runs.best(f'made-{device}')
    assert {t.device.type for t in tensors(load_checkpoint(best))} == {'cpu'}
    exported = export_model(best, tmp_path / 'model.safetensors')
    study = find_cases(runs.cohort)[0]
    words = ['infer', '--checkpoint', best, '--image', *study.images.values(), '--output', tmp_path / 'label.nii.gz', '--device', 'cpu']
    expected, found = (predict_case(load_model(path), read_case(study), 'cpu') for path in (best, exported))
    assert torch.equal(expected.probabilities, found.probabilities)
    on_it = predict_case(load_model(exported), read_case(study), device)
    apart = (on_it.probabilities - expected.probabilities).abs()
    assert apart.max() < 0.2 and apart.mean() < 0.01
    if device == 'cuda':
        done = subprocess.run([sys.executable, '-m', 'neuroseg3d.cli', *map(str, words)], env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- inference


class Confident(torch.nn.Module):
    "A network whose answer is clear nearly everywhere, whatever the rounding: brightness decides, and convolutions have a say."

    def __init__(self, targets: str):
        super().__init__()
        torch.manual_seed(0)
        self.targets = targets
        self.unet = UNet(UNetConfig(filters=(4, 8, 12), strides=(1, 2, 2), deep_supervision=0, out_channels=out_channels(targets)))

    def forward(self, x):
        flair, t1gd = x[:, 0], x[:, 2]
        wt = 8 * flair
        tc = torch.minimum(wt, 8 * (t1gd - 0.2))
        et = torch.minimum(tc, 8 * (t1gd - 1.2))
        clear = torch.stack([wt, tc, et] if self.targets == 'regions' else [torch.zeros_like(wt), wt, wt + tc, wt + tc + et], 1)
        return clear + self.unet(x)


def ball() -> Case:
    image, label = ball_case(5)
    return Case('BALL', np.moveaxis(image, -1, 0).copy(), Geometry(SHAPE, np.diag([SPACING_MM] * 3 + [1.0])), label=label)


def model(targets: str = 'regions', n: int = 1, **options) -> Model:
    look = {'roi_size': (20, 20, 20), 'precision': '32', 'batch': 4, **options}
    return Model([Confident(targets).eval().requires_grad_(False) for _ in range(n)], Space((SPACING_MM,) * 3), Windows(**look), targets,
                 [{'schema': 'msd'}], [])


def dices(a: np.ndarray, b: np.ndarray) -> list[float]:
    return [2 * (x & y).sum() / (x.sum() + y.sum()) for x, y in zip(labels_to_regions(a), labels_to_regions(b))]


LOOKS = [('cpu', 'bf16'), *[pytest.param('cuda', p, marks=needs_gpu) for p in ('auto', '32', 'fp16', 'bf16')]]


@pytest.mark.parametrize('device, precision', LOOKS)
@pytest.mark.parametrize('targets', ['regions', 'labels'])
@pytest.mark.parametrize('flips', [('none',), windows.FLIPS], ids=['plain', 'tta'])
def test_the_mask_is_that_of_the_cpu_in_32_bits(device, precision, targets, flips, tmp_path):
    expected = predict_case(model(targets, tta_flips=flips), ball(), 'cpu')
    found = predict_case(model(targets, tta_flips=flips, precision=precision), ball(), device)
    assert all(np.unique(expected.label) == range(4)) and min(dices(found.label, expected.label)) >= 0.99
    apart = (found.probabilities - expected.probabilities).abs()
    assert apart.max() < 0.1 and apart.mean() < 0.003
    for kind in ('probabilities', 'entropy'):
        assert write_extra(tmp_path / f'{kind}.nii.gz', found, ball(), kind).is_file()


@needs_gpu
def test_memory_of_a_gpu_that_runs_out():
    "The allocator is allowed next to nothing: prediction ends on the CPU, says so, and is as exact as there."
    network, image = Confident('regions').eval(), torch.rand(4, 96, 96, 96)
    config, lines = Windows(precision='32'), []
    torch.cuda.empty_cache()
    share = (torch.cuda.memory_reserved() + 8e6) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share)
    try:
        found = predict_probabilities(network, image, config, device='cuda', say=lines.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert lines and 'out of memory' in lines[0]
    assert (found.cpu() - predict_probabilities(network, image, config)).abs().max() < 1e-3


@each_device
def test_processes_speak_about_what_lies_on_their_device(device):
    "What several GPUs say to each other, said by one to itself: NCCL takes no tensors of the CPU."
    if device == 'cuda' and not dist.is_nccl_available():
        pytest.skip('this PyTorch has no NCCL')
    dist.init_process_group({'cpu': 'gloo', 'cuda': 'nccl'}[device], store=dist.HashStore(), rank=0, world_size=1)
    try:
        rows = [{'case': 'a', 'dice': 0.5, 'hd95_mm': float('inf')}]
        assert gather(rows) == rows
        x = torch.ones(2, 3, device=device, requires_grad=True)
        total = _Summed.apply(x)
        total.sum().backward()
        assert torch.equal(total, x) and torch.equal(x.grad, torch.ones_like(x))
    finally:
        dist.destroy_process_group()


@each_device
def test_the_benchmark_of_the_network_measures_two_that_are_the_same(device, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'benchmarks')
    import network
    shape = UNetConfig(filters=(4, 8, 12), strides=(1, 2, 2), deep_supervision=1)
    monkeypatch.setattr(network, 'config_of', lambda preset, args: shape)
    if device == 'cpu':  # there it is a process of its own that is measured
        monkeypatch.setattr(network, 'peak_mb', lambda *args: 2.0)
    for words in ([], ['--precision', '16-mixed', '--layout', 'contiguous'])[:1 + (device == 'cuda')]:
        args = network.parsed(['--device', device, '--patch_size', '16', '--batch_size', '2', '--pairs', '2', '--steps', '1', *words])
        found = network.measure('base', args)
        assert found['largest_difference'] < 1e-4 and set(found['dynunet']['step_s_by_layout']) == {'channels_last', 'contiguous'}
        for one in (found['ours'], found['dynunet']):
            assert len(one['each_s']) == 2 and one['peak_mb'] > 0
            assert one['voxels_per_s'] == pytest.approx(2 * 16 ** 3 / np.mean(one['each_s']), rel=0.05)
        assert min(found['time_ratio'], found['memory_ratio']) > 0
        assert 'ours' in network.told('base', found)


# ---------------------------------------------------------------------- without a GPU: a device whose tensors refuse to meet those of the CPU


def test_the_device_that_stands_in_for_a_gpu_is_strict():
    "It refuses what CUDA refuses; otherwise the tests below would show nothing."
    with Elsewhere():
        a, b = torch.arange(6.0, device=ELSEWHERE).reshape(2, 3), torch.arange(6.0).reshape(2, 3)
        assert isinstance(a + 1, There) and torch.equal((2 * a).cpu(), 2 * b) and float(a.sum()) == 15
        for mistake in (lambda: a + b, lambda: torch.where(a > 2, a, b), lambda: torch.cat([a, b]), lambda: a.addcmul_(b, a),
                        lambda: torch.nn.Conv1d(3, 1, 1).to(ELSEWHERE)(b), lambda: b[a > 2]):
            with pytest.raises(RuntimeError, match='same device|cpu'):
                mistake()
        for mistake in (lambda: a.numpy(), lambda: np.asarray(a)):
            with pytest.raises(TypeError, match='cpu'):
                mistake()


@pytest.mark.parametrize('targets', ['regions', 'labels'])
def test_a_case_is_segmented_and_assessed_on_another_device(targets, tmp_path):
    asked = model(targets, n=2, tta_flips=('none', 'x'), roi_size=(32, 32, 32))
    here = predict_case(asked, ball(), 'cpu'), assess_case(asked, ball(), 'cpu')
    with Elsewhere():
        said = []
        there = predict_case(asked, ball(), str(ELSEWHERE), say=said.append), assess_case(asked, ball(), str(ELSEWHERE))
        write_extra(tmp_path / 'entropy.nii.gz', there[0], ball(), 'entropy')
    assert isinstance(next(asked.networks[0].parameters()), There) and 'on meta' in said[0]
    assert np.array_equal(here[0].label, there[0].label) and here[0].label.any()
    assert torch.equal(here[0].probabilities, there[0].probabilities)
    assert np.array_equal(here[1].label, there[1].label) and torch.equal(here[1].doubt.total, there[1].doubt.total)


@pytest.mark.filterwarnings('ignore:integrated gradients')
def test_a_case_is_explained_on_another_device():
    asked = model(roi_size=(32, 32, 32))
    explain = {'grad_cam': {'layer': 'unet.encoder.2'}, 'integrated_gradients': {'steps': 2}, 'occlusion': {'cube_mm': 60.0}, 'shapley': {}}
    methods = {'grad_cam': xai.grad_cam, 'integrated_gradients': xai.integrated_gradients, 'occlusion': xai.occlusion,
               'shapley': xai.shapley_map}

    def maps(device):
        question = xai.ask(asked, ball(), 'TC', device=device)
        return {name: methods[name](question, **options) for name, options in explain.items()}, xai.randomised(question.model)

    here, random = maps('cpu')
    with Elsewhere():
        there, random_there = maps(str(ELSEWHERE))
        assert xai.sanity_check(there['grad_cam'], lambda question: xai.grad_cam(question, 'unet.encoder.2'))
        weights = [p.cpu() for p in random_there.networks[0].parameters()]
    for name in explain:
        a, b = here[name].values, there[name].values
        assert a.any() and (a - b).abs().max() <= 1e-4 * a.abs().max(), (name, (a - b).abs().max(), a.abs().max())
    assert all(torch.equal(a, b) for a, b in zip(random.networks[0].parameters(), weights))


@pytest.mark.parametrize('targets, over', [('regions', 'window'), ('labels', 'window'), ('regions', 'brain')])
def test_a_step_and_a_validation_stay_on_their_device(targets, over):
    config = build(Config, {'data': {'patch_size': 16}, 'loss': {'targets': targets}, 'space': {'spacing_mm': SPACING_MM},
                            'model': {'preset': 'base', 'filters': [4, 8, 12], 'strides': [1, 2, 2], 'kernels': 3, 'deep_supervision': 1,
                                      'checkpointing': True, 'norm_over': over, 'out_channels': get_targets(targets).out_channels},
                            'infer': {'roi_size': 32, 'precision': '32'}})
    image, label = (torch.from_numpy(x) for x in ball_case(3))
    patches = {'image': image.movedim(-1, 0)[None, :, 4:20, 4:20, 4:20].repeat(2, 1, 1, 1, 1) / 100, 'label': label[None, None, 4:20, 4:20, 4:20].repeat(2, 1, 1, 1, 1)}
    volume = {'image': image.movedim(-1, 0)[None] / 100, 'label': label[None, None], 'case_id': ['a']}

    def learn(device):
        torch.manual_seed(0)
        task = SegmentationTask(config)
        train.try_step(task, 2, device, '32-true')
        task.to(device)
        task.log = lambda *args, **how: None
        optimizer = task.configure_optimizers()['optimizer']
        there = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in (patches, volume)]
        for _ in range(2):
            task.training_step(there[0], 0).backward()
            torch.nn.utils.clip_grad_norm_(task.network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            task.ema.update_parameters(task.network)
        prediction = task.validation_step(there[1], 0)['prediction']
        return {k: v.cpu() for k, v in task.state_dict().items()}, prediction, task._rows

    here = learn(torch.device('cpu'))
    with Elsewhere():
        there = learn(ELSEWHERE)
    assert all(torch.equal(a, there[0][k]) for k, a in here[0].items())
    assert torch.equal(here[1], there[1]) and here[2] == there[2]


def test_memory_that_runs_out_on_another_device():
    "Prediction and its forecast end on the CPU, with all that was on the way."
    class Full(Confident):
        def forward(self, x):
            if x.device == ELSEWHERE:
                raise RuntimeError('cuDNN error: CUDNN_STATUS_ALLOC_FAILED')
            return super().forward(x)

    network, image, lines = Full('regions').eval(), torch.rand(len(MODALITIES), 20, 21, 22), []
    config = Windows((16, 16, 16), precision='32')
    with Elsewhere():
        found = predict_probabilities(network, image.to(ELSEWHERE), config, device=ELSEWHERE, say=lines.append)
        assert predict_cost(network, image, config, ELSEWHERE).windows == 8
    assert len(lines) == 2 and torch.equal(found, predict_probabilities(network, image, config))
    with pytest.raises(RuntimeError, match='another mistake'):
        predict_probabilities(Broken(), image, config, device='cpu')


class Broken(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError('another mistake')
