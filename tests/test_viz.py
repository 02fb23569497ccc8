"Figures on real cases of every orientation and spacing, and meshes within their limits."
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from neuroseg3d.cases import read_case
from neuroseg3d.core import Case, Geometry
from neuroseg3d.layouts import find_cases
from neuroseg3d.viz import (_without_holes, error_paint, make_view, mesh_figure, mesh_volume_ml, show_distances, show_errors,
                            show_modalities, show_planes, surface_mesh)

REAL = Path(__file__).parents[2] / 'shared' / 'data'


@pytest.mark.parametrize('name', ['MSD 4-D', 'BraTS', 'thick slices'])
def test_real_cases_are_drawn(name):
    folder = {'MSD 4-D': 'msd', 'BraTS': 'brats2021', 'thick slices': 'tcga'}[name]
    if not (REAL / folder).is_dir():
        pytest.skip('no real cases beside the repository')
    case = read_case(find_cases(REAL / folder)[0], with_label=name != 'thick slices')
    width, height = make_view(case).extent_mm('axial')
    assert 120 < width < 180 and 140 < height < 220  # a brain with 6 mm around it, in mm
    assert len(show_planes(case).png()) > 20_000
    assert len(show_modalities(case).png()) > 20_000
    figure = mesh_figure(case, max_faces=40_000)
    assert all(len(t.i) <= 30_000 for t in figure.data if t.type == 'mesh3d')
    assert len(figure.to_json()) < 5_000_000


def test_nothing_to_see_is_still_a_figure():
    empty = Case('empty', np.zeros((4, 7, 8, 9), np.float32), Geometry((7, 8, 9), np.diag([1.0, 2, 3, 1])),
                 np.zeros((7, 8, 9), np.uint8))
    assert show_planes(empty).png() and show_errors(empty, empty.label).png() and show_modalities(empty).png()
    assert len(mesh_figure(empty).data) == 0


def test_tumour_at_the_edge_of_the_volume():
    label = np.zeros((9, 10, 11), np.uint8)
    label[:3, :3, :3] = 3
    case = Case('edge', np.ones((4, 9, 10, 11), np.float32), Geometry((9, 10, 11), np.eye(4)), label)
    assert show_planes(case).png() and show_errors(case, np.roll(label, 1)).png()
    for trace in mesh_figure(case).data[:3]:
        edges = np.sort(np.concatenate([np.stack(e, 1) for e in ((trace.i, trace.j), (trace.j, trace.k), (trace.k, trace.i))]), 1)
        assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all()


def test_a_place_can_be_asked_for_in_voxels_or_mm():
    label = np.zeros((20, 22, 24), np.uint8)
    affine = np.diag([-1.0, -2, 3, 1])
    affine[:3, 3] = 5, 6, 7
    case = Case('at', np.ones((4, *label.shape), np.float32), Geometry(label.shape, affine), label)
    voxel = (3, 4, 5)
    assert show_planes(case, at=voxel).png() == show_planes(case, at_mm=(affine @ [*voxel, 1])[:3]).png()
    assert 'z = 22.0 mm' in {t.get_text() for t in show_planes(case, at=voxel).texts}


def ball(radius_mm, spacing_mm, shift_mm=0.3):
    "A ball off the grid's middle."
    shape = [int(2 * np.ceil(radius_mm / s) + 8) for s in spacing_mm]
    far = [np.arange(n) * s - (n - 1) / 2 * s - shift_mm for n, s in zip(shape, spacing_mm)]
    x, y, z = np.meshgrid(*far, indexing='ij')
    return x ** 2 + y ** 2 + z ** 2 <= radius_mm ** 2


@pytest.mark.parametrize('grid_mm', [0.0, 2.0])
@pytest.mark.parametrize('spacing_mm', [(1, 1, 1), (2, 2, 2), (1, 1, 3), (0.9, 0.9, 5.5)])
@pytest.mark.parametrize('radius_mm', [1.5, 3, 5, 15, 30])
def test_a_lesion_is_drawn_with_the_volume_of_its_voxels(radius_mm, spacing_mm, grid_mm):
    "A ball of 3 mm was drawn at 15 to 64 % of it."
    mask = ball(max(radius_mm, 0.6 * max(spacing_mm)), spacing_mm)
    grid = Geometry(mask.shape, np.diag([*spacing_mm, 1.0]))
    points, faces = surface_mesh(mask, grid, 6000, grid_mm=grid_mm)
    assert len(faces) <= 6000
    assert mesh_volume_ml(points, faces) == pytest.approx(mask.sum() * grid.voxel_ml, rel=0.03)


def test_small_lesions_beside_a_large_one_keep_their_volume_when_faces_are_few():
    mask = np.zeros((90, 60, 60), bool)
    for place, radius in (((4, 4, 4), 3), ((70, 5, 5), 3), ((5, 40, 40), 4), ((30, 10, 8), 20), ((80, 50, 50), 1.5)):
        small = ball(radius, (1, 1, 1))
        small = small[:90 - place[0], :60 - place[1], :60 - place[2]]
        mask[tuple(slice(a, a + n) for a, n in zip(place, small.shape))] |= small
    numbered, n = ndimage.label(mask)
    assert n == 5
    points, faces = surface_mesh(mask, Geometry(mask.shape, np.eye(4)), 2000, grid_mm=2.0)
    assert len(faces) <= 2000
    inside = np.rint(points[faces].mean(axis=1)).astype(int)
    nearest = ndimage.distance_transform_edt(numbered == 0, return_distances=False, return_indices=True)
    owner = numbered[tuple(nearest)][tuple(np.clip(inside, 0, np.array(mask.shape) - 1).T)]
    for part in range(1, n + 1):
        assert mesh_volume_ml(points, faces[owner == part]) * 1000 == pytest.approx((numbered == part).sum(), rel=0.06), part


def test_a_rim_keeps_its_volume_and_many_specks_are_drawn_in_time():
    shell = ball(16, (1, 1, 1)) & ~np.pad(ball(14, (1, 1, 1)), 2)
    points, faces = surface_mesh(shell, Geometry(shell.shape, np.eye(4)))
    assert mesh_volume_ml(points, faces) * 1000 == pytest.approx(shell.sum(), rel=0.03)
    specks = np.zeros((60, 60, 60), bool)
    specks[::5, ::5, ::5] = True  # 1,728 of one voxel
    points, faces = surface_mesh(specks, Geometry(specks.shape, np.eye(4)), 20_000)
    assert mesh_volume_ml(points, faces) * 1000 == pytest.approx(1728, rel=0.1) and len(faces) <= 20_000


def test_a_lesion_anywhere_in_a_large_scan_is_where_its_voxels_are():
    mask = np.zeros((200, 210, 190), bool)
    mask[150:156, 20:26, 170:176] = mask[10:30, 100:120, 5:25] = True
    affine = np.diag([0.5, 0.8, 1.2, 1.0])
    affine[:3, 3] = (-40, 30, 7)
    points, faces = surface_mesh(mask, Geometry(mask.shape, affine), grid_mm=2.0)
    centre = affine[:3, :3] @ (152.5, 22.5, 172.5) + affine[:3, 3]
    near = np.linalg.norm(points - centre, axis=1) < 12
    assert near.any() and abs((points[near].min(0) + points[near].max(0)) / 2 - centre).max() < 0.1
    assert mesh_volume_ml(points, faces) == pytest.approx(mask.sum() * 0.48 / 1000, rel=0.02)


def test_holes_of_a_brain_are_closed_as_by_scipy():
    rng = np.random.default_rng(0)
    for level in (-0.05, 0.0, 0.1, 0.2):
        mask = np.asfortranarray(ndimage.gaussian_filter(rng.normal(size=(30, 28, 26)), 1.2) > level)
        mask[:3] = 0
        assert mask.any() and np.array_equal(_without_holes(mask), ndimage.binary_fill_holes(mask))


def test_distances_that_are_known_draw_the_same_picture():
    label = np.zeros((40, 42, 44), np.uint8)
    label[10:25, 12:28, 14:30], label[14:22, 16:24, 18:26] = 1, 2  # without enhancing tumour
    case = Case('known', np.ones((4, *label.shape), np.float32), Geometry(label.shape, np.diag([1.0, 2, 3, 1])), label)
    wrong = np.roll(label, 3, 0)
    known = error_paint(wrong, label, case.geometry)[1]
    assert show_distances(case, wrong, distances=known).png() == show_distances(case, wrong).png() and not known
