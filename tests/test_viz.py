"Figures on real cases of every orientation and spacing, and meshes within their limits."
from pathlib import Path

import numpy as np
import pytest

from neuroseg3d.cases import read_case
from neuroseg3d.core import Case, Geometry
from neuroseg3d.layouts import find_cases
from neuroseg3d.viz import make_view, mesh_figure, show_errors, show_modalities, show_planes

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
