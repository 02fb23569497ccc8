"What a notebook shows of an object is a line that says what it is, never its voxels or weights."
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from neuroseg3d.evaluation import attribution as xai
from neuroseg3d.inference.calibration import Calibration
from neuroseg3d.review.casepage import CaseResult
from neuroseg3d.networks.checkpoint import Model
from neuroseg3d.core import Case, Geometry
from neuroseg3d.inference.predict import predict_case
from neuroseg3d.evaluation.metrics import score_case
from neuroseg3d.studies.preprocess import Space
from neuroseg3d.evaluation.uncertainty import assess_case
from neuroseg3d.networks.unet import UNet, UNetConfig
from neuroseg3d.networks.windows import Windows


def objects() -> dict[str, object]:
    "A model of two networks, and what it says of a cube of 12 voxels whose right half it takes for enhancing tumour."
    torch.manual_seed(0)
    networks = [UNet(UNetConfig(preset='tiny', filters=(4, 8), strides=(1, 2))).eval().requires_grad_(False) for _ in range(2)]
    for network in networks:
        network.heads[0].bias.data += 9
    model = Model(networks, Space((5.0, 5.0, 5.0), 0.0), Windows((16, 16, 16), flips=('none', 'x')), 'regions',
                  [{}, {}], [Path('fold0/best.ckpt'), Path('fold1/best.ckpt')])
    image = np.random.default_rng(0).uniform(1, 9, (4, 12, 12, 12)).astype(np.float32)
    label = np.zeros((12, 12, 12), np.uint8)
    label[6:] = 3
    case = Case('P7', image, Geometry((12, 12, 12), np.diag([5.0, 5, 5, 1])), label)
    made = replace(predict_case(model, case, 'cpu'), label=label)
    question = xai.ask(model, case, 'WT', torch.ones(12, 12, 12, dtype=torch.bool))
    shares = xai.shapley_values(model, question.seen, 'WT', {'WT': question.mask})
    rows = score_case(label, label, case.geometry.spacing_mm)
    sure = assess_case(model, case, 'cpu')
    return {'model': model, 'prediction': made, 'seen': question.seen, 'assessment': sure, 'doubt': sure.doubt, 'result': CaseResult(case, label, rows), 'question': question, 'shares': shares,
            'map': xai.grad_cam(question), 'calibration': Calibration((1.5, 2, 1), n_cases=4, curves={'WT': [[[0.1] * 15] * 4] * 2})}


def test_a_line_that_says_what_it_is():
    found = objects()
    said = {name: repr(thing) for name, thing in found.items()}
    assert all('\n' not in text and len(text) < 400 and 'tensor' not in text and 'array' not in text for text in said.values()), said
    number = sum(p.numel() for p in found['model'].networks[0].parameters()) / 1e6
    assert said['model'] == (f'Model(best.ckpt: 2 networks of {number:.2f} M parameters on cpu, targets regions, 5x5x5 mm, '
                             'windows 16x16x16, flips none x)')
    ml = 6 * 12 * 12 * 0.125  # voxels of half the cube, mL a voxel
    assert said['prediction'] == (f'Prediction(P7: WT {ml:.1f} mL, TC {ml:.1f} mL, ET {ml:.1f} mL; label 12x12x12, probabilities 12x12x12, '
                                  'not calibrated)')
    assert said['result'] == f'CaseResult(P7: {", ".join(f"{r} {ml:.1f} mL (Dice 1.00)" for r in ("WT", "TC", "ET"))})'
    assert said['question'].startswith(f'Question(P7: WT, {2 * ml:.1f} mL in 1728 voxels, asked of best.ckpt')
    assert said['shares'].startswith('Shapley(P7: ') and 'WT: FLAIR ' in said['shares']
    assert said['seen'] == 'ModelCase(P7: 12x12x12 voxels of 5x5x5 mm, with label)'
    assert said['doubt'].startswith('Doubt(12x12x12 voxels: WT up to 0.') and said['doubt'].endswith(' bit)')
    whole = f'{2 * ml:.1f} mL, expected Dice 1.00'  # of a head that says yes everywhere
    assert said['assessment'] == f'Assessment(P7: WT {whole}; TC {whole}; ET {whole}; not calibrated)'
    assert said['map'].startswith('Attribution(P7: WT by grad_cam, all on 12x12x12 voxels, ')
    assert 'temperature 1.50/2.00/1.00' in said['calibration'] and '90% intervals' in said['calibration']
