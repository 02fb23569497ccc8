"The inputs: a folder of sound files, one of which is damaged, and the entry of the library that reads it."
from __future__ import annotations

import base64
import json
import random
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from . import mutations as m
from .commands import COMMANDS, run


@dataclass(frozen=True)
class Input:
    "One file to be put in place of a sound one."
    kind: str  # a key of `KINDS`
    name: str  # of the file in the folder of sound ones
    content: bytes

    def to_json(self) -> str:
        "As a file of the corpus."
        return json.dumps({'kind': self.kind, 'name': self.name, 'content': base64.b64encode(zlib.compress(self.content, 9)).decode()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Input:
        "What `to_json` wrote."
        values = json.loads(text)
        return cls(values['kind'], values['name'], zlib.decompress(base64.b64decode(values['content'])))


SETTINGS = {'data': {'patch_size': [16, 16, 16], 'fold': 0}, 'space': {'spacing_mm': [2.0, 2.0, 2.0]}, 'model': {'preset': 'tiny', 'filters': [4, 8], 'strides': [1, 2]},
            'optim': {'learning_rate': 0.001}, 'infer': {'size': [16, 16, 16], 'overlap': 0.5, 'flips': ['none'], 'sigma': 0.125}, 'augment': {'gamma': [0.7, 1.5]}}


def make_sound(folder: Path) -> None:
    "A cohort of two cases, a model in every form, a split, predictions, settings: all as they should be."
    import torch
    import yaml

    from neuroseg3d.inference.calibration import Calibration
    from neuroseg3d.studies.cases import read_case
    from neuroseg3d.networks.checkpoint import KEY, describe, export_model, save_checkpoint, write_ensemble
    from neuroseg3d.config import build, to_dict
    from neuroseg3d.training.data import Prepare, store_case
    from neuroseg3d.inference.guard import training_exams
    from neuroseg3d.studies.layouts import find_cases
    from neuroseg3d.studies.nifti import write_label
    from neuroseg3d.studies.split import make_split, save_split
    from neuroseg3d.training.task import Config
    from neuroseg3d.networks.unet import UNet
    cohort = folder / 'cohort'
    for sub in ('imagesTr', 'labelsTr'):
        (cohort / sub).mkdir(parents=True)
    (cohort / 'dataset.json').write_text(json.dumps({'name': 'x', 'modality': {'0': 'FLAIR', '1': 'T1w', '2': 't1gd', '3': 'T2w'}, 'numTraining': 2,
                                                     'labels': {'0': 'background', '1': 'edema', '2': 'non-enhancing tumor', '3': 'enhancing tumour'},
                                                     'training': [{'image': './imagesTr/A.nii.gz', 'label': './labelsTr/A.nii.gz'}]}))
    for n, name in enumerate(('A.nii.gz', 'B.nii', None)):  # the last one goes into files of its own, below
        image = np.zeros((14, 13, 12, 4), np.int16)
        image[2:12, 2:11, 2:10] = np.random.default_rng(n).integers(80, 120, (10, 9, 8, 4))
        label = np.zeros(image.shape[:3], np.uint8)
        label[4 + n:8 + n, 4:8, 4:8], label[5 + n:7 + n, 5:7, 5:7] = 1, 3  # each patient has a label map of another shape
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        if name:
            nib.save(nib.Nifti1Image(image, affine), cohort / 'imagesTr' / name)
            nib.save(nib.Nifti1Image(label, affine), cohort / 'labelsTr' / name)
    case = folder / 'case'
    case.mkdir()
    for n, word in enumerate(('flair', 't1', 't1ce', 't2')):
        nib.save(nib.Nifti1Image(np.ascontiguousarray(image[..., n]), affine), case / f'P1_{word}.nii')
    nib.save(nib.Nifti1Image(np.where(label == 3, 4, label * 2).astype(np.uint8), affine), case / 'P1_seg.nii')
    pred = folder / 'pred'
    pred.mkdir()
    studies = {s.id: s for s in find_cases(cohort)}
    for name in ('A.nii.gz', 'B.nii'):
        one = read_case(studies[name[0]])
        write_label(pred / name, one.label, one)
    config = build(Config, SETTINGS)
    torch.manual_seed(0)
    learnt = Calibration(temperature=(1.5, 1.2, 1.1), quantile=(1.0, 2.0, 3.0), n_cases=9, curves={r: [[[0.1, 0.9], [0.2, 0.8], [3, 4]]] * 2 for r in ('WT', 'TC', 'ET')}).to_dict()
    split = make_split(list(studies.values()), 1)  # boxes of noise look like one patient
    save_split(split, folder / 'split.json')
    store_case(Prepare(config.space)(studies['A']), folder / 'stored.safetensors')
    facts = {'training_exams': training_exams(split, None), 'schema': 'msd', 'fold': 0, 'split_sha256': 'a' * 64, 'thresholds': {'WT': 0.5, 'TC': 0.5, 'ET': 0.5}, 'postprocess': {'min_et_ml': 0.1}, 'calibration': learnt}
    weights = {f'ema.module.{k}': v for k, v in UNet(config.model).state_dict().items()}
    save_checkpoint({'state_dict': weights, 'global_step': 3, KEY: describe(to_dict(config), facts)}, folder / 'model.ckpt')
    export_model(folder / 'model.ckpt', folder / 'model.safetensors')
    write_ensemble(folder / 'ensemble.json', [folder / 'model.ckpt', folder / 'model.safetensors'])
    entry = {'output': 'A.nii.gz', 'inputs': {'FLAIR': ['x', 1, 2]}, 'sha256': {'A.nii.gz': 'b' * 64}, 'seconds': 1.5, 'versions': {'torch': '2'}, 'missing': [],
             'volumes_ml': {'WT': 1.5}, 'intervals_ml': {'WT': [1.0, None]},
             'model': {'checkpoints': ['model.ckpt'], 'weights_sha256': 'c' * 64, 'windows': 'Windows()', 'postprocess': 'Postprocess()',
                       'trained_on': [{'split_sha256': 'd' * 64, 'fold': 0}], 'calibration': learnt}}
    (pred / 'manifest.json').write_text(json.dumps({'cases': {'A': entry, 'B': {**entry, 'output': 'B.nii', 'sha256': {'B.nii': 'e' * 64}}}}))
    (folder / 'settings').mkdir()
    (folder / 'settings' / 'model_config.yaml').write_text(yaml.safe_dump(SETTINGS))
    (folder / 'words.json').write_text('[]')
    (folder / 'page.json').write_text(json.dumps(['A', 'msd', 'a note']))
    (folder / 'metrics.csv').write_text('step,train/loss,val/dice_WT\n1,0.5,\n2,0.25,0.75\n')
    with tarfile.open(folder / 'data.tar', 'w') as tar:
        tar.add(cohort, 'Task')


def _json(name: str) -> Callable[[random.Random, Path], tuple[str, bytes]]:
    "Damage a JSON file."
    return lambda draw, sound: (name, m.mutated_json(draw, json.loads((sound / name).read_text())))


def _nifti(*names: str) -> Callable[[random.Random, Path], tuple[str, bytes]]:
    "Damage one of several NIfTI files."
    def draw_one(draw: random.Random, sound: Path) -> tuple[str, bytes]:
        import gzip
        name = draw.choice(names)
        content = (sound / name).read_bytes()
        return name, m.mutated_nifti(draw, gzip.decompress(content) if name.endswith('.gz') else content, name.endswith('.gz'))
    return draw_one


def _described(draw: random.Random, sound: Path) -> tuple[str, bytes]:
    "A checkpoint that says odd things about itself, or holds odd tensors."
    import io

    import torch
    content = torch.load(sound / 'model.ckpt', weights_only=True)
    if draw.random() < 0.8:
        content['neuroseg3d'] = m.mutated_values(draw, content['neuroseg3d'])
    else:
        key = draw.choice(sorted(content['state_dict']))
        odd = (torch.tensor(float('nan')), torch.zeros(3), torch.zeros(1).expand(10**9), 'x', None, torch.zeros(2, dtype=torch.int8), torch.zeros(2, 2).to_sparse())
        content['state_dict'] = {**content['state_dict'], draw.choice((key, 'other')): draw.choice(odd)}
        content = draw.choice((content, {k: v for k, v in content.items() if k != 'state_dict'}, [content], {**content, 'state_dict': []}))
    out = io.BytesIO()
    torch.save(content, out)
    return 'model.ckpt', out.getvalue()


def _yaml(draw: random.Random, sound: Path) -> tuple[str, bytes]:
    import yaml
    return 'settings/model_config.yaml', m.mutated_yaml(draw, SETTINGS, yaml.safe_dump)


def _words(draw: random.Random, sound: Path) -> tuple[str, bytes]:
    "Settings as they are typed: names and values as text."
    names = ('infer.sigma', 'infer.size', 'infer.overlap', 'infer.flips', 'optim.learning_rate', 'model.filters', 'space.spacing_mm', 'trainer.devices', 'data.schema', 'logger.name',
             'augment.gamma', 'trainer.max_steps', 'model', '', '.', 'infer.', 'a.b', 'infer.size.x', 'model.kernels', 'model.strides', 'loss.targets')
    values = [str(v)[:2000] for v in m.NASTY] + m.TOKENS + m.YAML_TOKENS
    return 'words.json', json.dumps([[draw.choice(names), draw.choice(values)] for _ in range(draw.choice((1, 1, 2)))]).encode()


def _hostile(draw: random.Random, sound: Path) -> tuple[str, bytes]:
    "What a page is told: names of cases, schemas, notes."
    texts = [v for v in m.NASTY if isinstance(v, str) and len(v) < 1000] + ['$\\frac{', '$\\foo$ and $x^', '</script><script>alert(1)</script>', '<!--<script>', '{{7*7}}', 'a' * 250, '\\', "'", '\x1b[31m', '\u2028']
    return 'page.json', json.dumps([draw.choice(texts) for _ in range(3)]).encode()


def _archive(draw: random.Random, sound: Path) -> tuple[str, bytes]:
    return 'data.tar', m.mutated_tar(draw, {'Task/dataset.json': b'{}', 'Task/imagesTr/a.nii': bytes(700)})


def _any_of(names: tuple[str, ...]) -> Callable[[random.Random, Path], tuple[str, bytes]]:
    "Damage one of the files that a command reads, as is usual for its kind."
    def draw_one(draw: random.Random, sound: Path) -> tuple[str, bytes]:
        name = draw.choice(names)
        how = {'.json': _json, '.gz': _nifti, '.nii': _nifti}.get(Path(name).suffix)
        if how:
            return how(name)(draw, sound)
        if name.endswith('.yaml'):
            return _yaml(draw, sound)
        if name.endswith('.safetensors'):
            return _change(m.mutated_safetensors, name)(draw, sound)
        return (_described if draw.random() < 0.7 else _change(m.mutated_zip, name))(draw, sound)
    return draw_one


def _change(change: Callable[[random.Random, bytes], bytes], name: str) -> Callable[[random.Random, Path], tuple[str, bytes]]:
    return lambda draw, sound: (name, change(draw, (sound / name).read_bytes()))


def read_cohort(folder: Path) -> None:
    "Find, check and read every case."
    from neuroseg3d.studies.cases import check_case, read_case
    from neuroseg3d.core import InputError
    from neuroseg3d.studies.layouts import find_cases
    failed = None
    for study in find_cases(folder / 'cohort', split='all'):
        for step in (check_case, read_case):
            try:
                step(study)
            except InputError as error:
                failed = error
    if failed:
        raise failed


def read_folder(folder: Path) -> None:
    from neuroseg3d.studies.cases import read_case
    read_case(folder / 'case')


def score(folder: Path) -> None:
    from neuroseg3d.evaluation.evaluate import evaluate
    evaluate(folder / 'pred', folder / 'cohort', folder / 'scores')


def describe(folder: Path) -> None:
    from neuroseg3d.evaluation.eda import write_eda
    write_eda(folder / 'cohort', folder / 'eda')


def read_split(folder: Path) -> None:
    from neuroseg3d.studies.layouts import find_cases
    from neuroseg3d.studies.split import load_split
    split = load_split(folder / 'split.json')
    load_split(folder / 'split.json', find_cases(folder / 'cohort'))
    recognise([{'split_sha256': split.digest, 'fold': None}], folder)


def recognise(descriptions: list[dict], folder: Path) -> None:
    "Whether a model was trained on a case, by its description."
    from neuroseg3d.inference.guard import identity_of, training_of
    from neuroseg3d.studies.layouts import find_cases
    if trained := training_of(descriptions, [folder / 'split.json']):
        trained.recognise(['x'], lambda: identity_of(find_cases(folder / 'cohort')[0]))


def read_manifest(folder: Path) -> None:
    "The manifest, as scores and pages use it."
    from neuroseg3d.review.casepage import ModelCard
    from neuroseg3d.evaluation.evaluate import find_labels, studies_of
    from neuroseg3d.evaluation.evaluate import read_manifest as read
    from neuroseg3d.inference.guard import find_training_cases
    entries = read(folder / 'pred')
    find_training_cases(studies_of(find_labels(folder / 'cohort')), entries, [folder / 'split.json'])
    for model in {json.dumps(entry['model']): entry['model'] for entry in entries.values()}.values():
        ModelCard.of_manifest(model).html  # noqa: B018 - it is made when it is asked for


def use_model(name: str) -> Callable[[Path], None]:
    "Load a model and segment a case with it."
    def use(folder: Path) -> None:
        from neuroseg3d.studies.cases import read_case
        from neuroseg3d.networks.checkpoint import load_model
        from neuroseg3d.inference.predict import predict_case
        model = load_model(folder / name)
        repr(model)
        recognise(model.descriptions, folder)
        if np.prod(model.windows.size) <= 64**3 and sum(p.numel() for p in model.networks[0].parameters()) < 10**6 and min(model.space.spacing_mm) >= 1:
            predict_case(model, read_case(folder / 'cohort' / 'imagesTr' / 'A.nii.gz'), 'cpu')
    return use


def read_settings(folder: Path) -> None:
    from neuroseg3d.config import load_config
    from neuroseg3d.training.task import Config
    load_config(Config, folder / 'settings')


def read_words(folder: Path) -> None:
    from neuroseg3d.config import load_config
    from neuroseg3d.training.task import Config
    load_config(Config, None, dict(json.loads((folder / 'words.json').read_text())))


def read_stored(folder: Path) -> None:
    "A case of the cache: opened, and a box of it read."
    from neuroseg3d.training.data import StoredCase
    case = StoredCase(folder / 'stored.safetensors')
    case.cut((0, 0, 0), [min(n, 4) for n in case.shape])


def read_metrics(folder: Path) -> None:
    "The log of a run that goes on."
    from neuroseg3d.training.tracking import MetricsFile
    (folder / 'logs').mkdir()
    (folder / 'metrics.csv').rename(folder / 'logs' / 'metrics.csv')
    log = MetricsFile(folder / 'logs', 10)
    log.log_metrics({'a': 1.0}, 11)
    log.save()


def unpack(folder: Path) -> None:
    from neuroseg3d.studies.download import extract
    extract(folder / 'data.tar', folder / 'unpacked')


def read_report(folder: Path) -> None:
    "What a report is made from: predictions with their cases, and the card of the model."
    from neuroseg3d.core import InputError
    from neuroseg3d.review.report import check_results, read_results
    failed = check_results(folder / 'pred', folder / 'cohort')
    for result in read_results(folder / 'pred', folder / 'cohort', failures=failed):
        repr(result)
    if failed:
        raise InputError(str(failed))


def write_pages(folder: Path) -> None:
    "A report of a case with hostile names; what is written holds no markup of theirs."
    from dataclasses import replace

    from neuroseg3d.review.casepage import CaseResult, ReportOptions
    from neuroseg3d.studies.cases import read_case
    from neuroseg3d.review.report import write_report
    from neuroseg3d.studies.schemas import get_schema
    name, title, note = json.loads((folder / 'page.json').read_text())
    case = read_case(folder / 'cohort' / 'imagesTr' / 'A.nii.gz')
    result = CaseResult(replace(case, id=name), case.label, [], notes=[note])
    page = write_report([result], folder / 'report' / 'index.html', title, {'command': note}, ReportOptions(width_in=3, dpi=30, mesh_faces=100))
    for path in (page, *page.parent.rglob('*.html')):
        text = path.read_text(encoding='utf-8', errors='surrogateescape')
        assert '<script>alert' not in text and 'onerror=alert(1)>' not in text.replace('&gt;', ''), f'{path.name} holds markup of the input'
    get_schema(title)


@dataclass(frozen=True)
class Kind:
    "A way to damage, the entry that reads it, and how often it is drawn."
    draw: Callable[[random.Random, Path], tuple[str, bytes]]
    entry: Callable[[Path], Any]
    weight: float = 10


KINDS: dict[str, Kind] = {
    'image': Kind(_nifti('cohort/imagesTr/A.nii.gz', 'cohort/imagesTr/B.nii'), read_cohort, 30),
    'label': Kind(_nifti('cohort/labelsTr/A.nii.gz', 'cohort/labelsTr/B.nii'), read_cohort, 10),
    'case': Kind(_nifti('case/P1_flair.nii', 'case/P1_t1ce.nii', 'case/P1_seg.nii'), read_folder, 15),
    'score': Kind(_nifti('pred/A.nii.gz', 'pred/B.nii', 'cohort/labelsTr/A.nii.gz'), score, 10),
    'eda': Kind(_nifti('cohort/imagesTr/B.nii'), describe, 0.7),
    'dataset': Kind(_json('cohort/dataset.json'), read_cohort, 15),
    'split': Kind(_json('split.json'), read_split, 15),
    'manifest': Kind(_json('pred/manifest.json'), read_manifest, 15),
    'ensemble': Kind(_json('ensemble.json'), use_model('ensemble.json'), 8),
    'described': Kind(_described, use_model('model.ckpt'), 15),
    'checkpoint': Kind(_change(m.mutated_zip, 'model.ckpt'), use_model('model.ckpt'), 15),
    'export': Kind(_change(m.mutated_safetensors, 'model.safetensors'), use_model('model.safetensors'), 15),
    'settings': Kind(_yaml, read_settings, 15),
    'words': Kind(_words, read_words, 15),
    'archive': Kind(_archive, unpack, 15),
    'page': Kind(_hostile, write_pages, 1),
    'report': Kind(_any_of(('pred/manifest.json', 'pred/A.nii.gz', 'cohort/imagesTr/A.nii.gz', 'cohort/labelsTr/B.nii', 'cohort/dataset.json')), read_report),
    'stored': Kind(_change(m.mutated_safetensors, 'stored.safetensors'), read_stored),
    'metrics': Kind(_change(m.mutated_bytes, 'metrics.csv'), read_metrics, 5),
}
_READ: dict[str, tuple[str, ...]] = {
    'infer': ('model.safetensors', 'cohort/dataset.json', 'cohort/imagesTr/A.nii.gz', 'cohort/imagesTr/B.nii'),
    'ensemble': ('ensemble.json', 'model.ckpt', 'model.safetensors', 'settings/model_config.yaml', 'case/P1_flair.nii'),
    'evaluate': ('pred/manifest.json', 'pred/A.nii.gz', 'pred/B.nii', 'cohort/labelsTr/A.nii.gz', 'cohort/labelsTr/B.nii', 'cohort/dataset.json'),
    'convert': ('cohort/dataset.json', 'cohort/imagesTr/A.nii.gz', 'cohort/imagesTr/B.nii', 'cohort/labelsTr/A.nii.gz', 'cohort/labelsTr/B.nii'),
    'explain': ('model.ckpt', 'case/P1_t2.nii', 'settings/model_config.yaml'),
    'calibrate': ('model.ckpt', 'case/P1_t1ce.nii', 'case/P1_seg.nii', 'split.json'),
    'export': ('model.ckpt',),
    'eda': ('cohort/imagesTr/A.nii.gz', 'cohort/labelsTr/B.nii', 'cohort/dataset.json'),
}
KINDS |= {f'command-{name}': Kind(_any_of(_READ[name]), run(name), {'eda': 0.5, 'explain': 1}.get(name, 4)) for name in COMMANDS}


def draw_input(seed: int, number: int, sound: Path) -> Input:
    "The input of that number; the same for the same seed."
    draw = random.Random(f'{seed}/{number}')
    kind = draw.choices(list(KINDS), [k.weight for k in KINDS.values()])[0]
    return Input(kind, *KINDS[kind].draw(draw, sound))
