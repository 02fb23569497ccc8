"Native to model space and back on grids that nobody chose: random orientation, angle, spacing and shape."
from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from neuroseg3d.core import Case, Geometry, labels_to_regions
from neuroseg3d.phantom import draw_head, draw_tumour, grow, render_lesion, sample_anatomy
from neuroseg3d.studies.preprocess import Record, Space, _carry, regions_to_native, to_model_space, to_native

ORDERS = list(permutations(range(3)))
SIGNS = list(product((-1, 1), repeat=3))
few = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def make_case(spacing, shape, order, signs, angles, offset, seed, radius_mm=18.0) -> Case:
    "A brain-like ellipsoid with an irregular nested blob, anywhere in the world."
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    turn = Rotation.from_euler('xyz', angles).as_matrix()
    affine[:3, :3] = turn @ np.eye(3)[:, order] @ np.diag(np.array(signs) * spacing)
    affine[:3, 3] = np.array(offset) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    index = np.indices(shape).astype(float)
    mm = (index - np.reshape((np.array(shape) - 1) / 2, (3, 1, 1, 1))) * np.reshape(spacing, (3, 1, 1, 1))
    half = np.array(shape) * spacing / 2
    brain = ((mm / np.reshape(0.9 * half, (3, 1, 1, 1))) ** 2).sum(0) < 1
    bumps = sum(a * np.sin((mm * np.reshape(k, (3, 1, 1, 1))).sum(0) + p)
                for a, k, p in zip(rng.uniform(0, 0.12, 3), rng.uniform(-0.15, 0.15, (3, 3)), rng.uniform(0, 6, 3)))
    center = rng.uniform(-0.15, 0.15, 3) * half
    away = np.sqrt(((mm - center.reshape(3, 1, 1, 1)) ** 2).sum(0)) / radius_mm + bumps
    label = np.select([away < 0.4, away < 0.65, away < 1], [2, 3, 1], 0).astype(np.uint8) * brain
    image = (rng.normal(100, 10, (4, *shape)) * brain).astype(np.float32)
    return Case('c', image, Geometry(tuple(shape), affine), label, 'msd')


def dice(a, b):
    return 2 * np.sum(a & b) / max(1, a.sum() + b.sum())


angles = st.tuples(*[st.floats(-0.6, 0.6)] * 3)
offsets = st.tuples(*[st.floats(-100, 100)] * 3)
grids = dict(order=st.sampled_from(ORDERS), signs=st.sampled_from(SIGNS), angles=angles, offset=offsets,
             seed=st.integers(0, 10_000))


@few
@given(shape=st.tuples(*[st.integers(5, 41)] * 3), margin=st.sampled_from([0.0, 1.0, 7.5]), **grids)
def test_labels_come_back_exactly_at_the_spacing_of_the_scan(shape, margin, order, signs, angles, offset, seed):
    case = make_case((1, 1, 1), shape, order, signs, angles, offset, seed, radius_mm=8)
    model = to_model_space(case, Space(margin_mm=margin))
    assert not model.record.resampled
    for record in (model.record, Record.from_dict(model.record.to_dict())):
        assert np.array_equal(to_native(model.label.numpy(), record, 'nearest')[0], case.label)
        masks = regions_to_native(labels_to_regions(model.label[0].numpy()), record)
        assert np.array_equal(masks, labels_to_regions(case.label))
        assert np.array_equal(to_native(model.image, record).numpy() != 0, case.image != 0)


@few
@given(spacing=st.tuples(*[st.sampled_from([0.43, 0.8, 0.97, 1.3, 2.0, 5.0])] * 3), **grids)
def test_a_tumour_overlaps_with_itself_after_resampling(spacing, order, signs, angles, offset, seed):
    shape = tuple(int(70 / s) + k for s, k in zip(spacing, (0, 1, 2)))
    case = make_case(spacing, shape, order, signs, angles, offset, seed)
    model = to_model_space(case)
    assert model.record.model.orientation == 'RAS'
    assert np.allclose(model.record.model.spacing_mm, 1, atol=1e-3)
    back = regions_to_native(labels_to_regions(model.label[0].numpy()), model.record)[0]
    assert back.shape == case.label.shape
    assert dice(back, case.label > 0) >= 0.965


def tumour_on_thick_slices(seed: int) -> Case:
    "The tumour of a phantom at 0.43 x 0.43 x 5 mm, on a grid of 120 mm around it."
    head = draw_head(seed)
    plan = draw_tumour(head)
    spacing, shape = np.array([0.43, 0.43, 5.0]), (280, 280, 24)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = plan.foci_mm[0] - (np.array(shape) - 1) / 2 * spacing
    axes = [affine[i, 3] + np.arange(n) * spacing[i] for i, n in enumerate(shape)]
    tissue = sample_anatomy(head, plan, axes)
    label = render_lesion(head, plan, grow(head, plan), tissue, axes).label * tissue.brain
    return Case(f'P{seed}', np.repeat(tissue.brain[None].astype(np.float32), 4, 0), Geometry(shape, affine), label.astype(np.uint8))


@pytest.mark.parametrize('seed', [3, 9])
def test_a_real_tumours_shape_on_thick_slices_comes_back(seed):
    "Regions as probabilities to 1 mm and back, as inference carries them: Dice of WT, TC and ET at least 0.97."
    case = tumour_on_thick_slices(seed)
    model = to_model_space(case)
    regions = labels_to_regions(case.label)
    assert regions.sum((1, 2, 3)).min() * case.geometry.voxel_ml > 5  # mL: there is something to lose
    soft = _carry(torch.from_numpy(regions.astype(np.float32)), model.record.operations)
    back = regions_to_native(soft, model.record)
    assert back.shape == regions.shape
    for name, a, b in zip(('WT', 'TC', 'ET'), back, regions):
        assert dice(a, b) >= 0.97, name


@few
@given(thick=st.integers(0, 2), **grids)
def test_five_millimetre_slices_reach_097(thick, order, signs, angles, offset, seed):
    spacing = [0.43] * 3
    spacing[thick] = 5.0
    shape = tuple(int(64 / s) + k for s, k in zip(spacing, (0, 1, 2)))
    case = make_case(spacing, shape, order, signs, angles, offset, seed)
    model = to_model_space(case)
    back = regions_to_native(labels_to_regions(model.label[0].numpy()), model.record)[0]
    assert dice(back, case.label > 0) >= 0.97


@few
@given(spacing=st.tuples(*[st.sampled_from([0.6, 1.0, 1.7, 3.0])] * 3), **grids)
def test_places_in_the_world_are_kept(spacing, order, signs, angles, offset, seed):
    "The centre of mass of the tumour, in mm, is the same in both spaces (no shift by half a voxel)."
    shape = tuple(int(60 / s) + 1 for s in spacing)
    case = make_case(spacing, shape, order, signs, angles, offset, seed)
    model = to_model_space(case)

    def center(label, affine):
        return affine[:3, :3] @ np.argwhere(label > 0).mean(0) + affine[:3, 3]

    gap = center(case.label, case.geometry.affine) - center(model.label[0].numpy(), model.record.model.affine)
    assert np.linalg.norm(gap) < 0.25


@pytest.mark.parametrize('order,signs', list(product(ORDERS, SIGNS)))
def test_every_orientation_gives_the_same_model_volume(order, signs):
    "One head stored in 48 ways is one volume in model space."
    straight = make_case((1, 1, 1), (21, 26, 17), (0, 1, 2), (1, 1, 1), (0, 0, 0), (0, 0, 0), 3, radius_mm=6)
    expected = to_model_space(straight)
    image = np.transpose(straight.image, (0, *(1 + np.array(order))))
    label = np.transpose(straight.label, order)
    affine = straight.geometry.affine @ np.eye(4)[:, [*order, 3]]
    for axis, sign in enumerate(signs):
        if sign < 0:
            image, label = np.flip(image, 1 + axis), np.flip(label, axis)
            turn = np.eye(4)
            turn[axis, axis], turn[axis, 3] = -1, label.shape[axis] - 1
            affine = affine @ turn
    stored = Case('c', np.ascontiguousarray(image), Geometry(label.shape, affine), np.ascontiguousarray(label))
    model = to_model_space(stored)
    assert np.allclose(model.image, expected.image, atol=1e-5) and np.array_equal(model.label, expected.label)
    assert np.allclose(model.record.model.affine, expected.record.model.affine)
    assert np.array_equal(to_native(model.label.numpy(), model.record, 'nearest')[0], stored.label)
