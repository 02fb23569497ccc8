"Figures on real cases of every orientation and spacing, and meshes within their limits."
import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from scipy import ndimage
from skimage.color import rgb2lab

from neuroseg3d.core import Case, Geometry, InputError
from neuroseg3d.plots.charts import chart
from neuroseg3d.plots.meshes import _without_holes, error_paint, mesh_figure, mesh_volume_ml, surface_mesh
from neuroseg3d.plots.palette import PALETTE
from neuroseg3d.plots.planes import show_distances, show_errors, show_modalities, show_planes, signed_distance_mm
from neuroseg3d.plots.views import PLANES, as_case, cut, largest_slices, make_view, to_ras
from neuroseg3d.studies.cases import read_case
from neuroseg3d.studies.layouts import find_cases

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


# ---- what the figures promise

DICHROMACY = {
    'none': np.eye(3),
    'protan': [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    'deutan': [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    'tritan': [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}


def seen(colour, vision):
    "A colour in CIELAB, as a person with this vision sees it."
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(DICHROMACY[vision] @ linear, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return rgb2lab(srgb)


@pytest.mark.parametrize('vision', DICHROMACY)
@pytest.mark.parametrize('group', [('WT', 'TC', 'ET'), ('correct', 'over', 'missed')])
def test_colours_of_one_figure_are_told_apart_and_off_any_grey(group, vision):
    for a, b in itertools.combinations(group, 2):
        assert np.linalg.norm(seen(PALETTE[a], vision) - seen(PALETTE[b], vision)) > 25
    assert min(np.hypot(*seen(PALETTE[name], vision)[1:]) for name in group) > 15


def test_powers_along_an_axis_are_set_and_a_dollar_stays_a_dollar():
    figure, (ax, other) = chart(('cost $5$', ''), (6, 2))
    ax.semilogy([1, 10, 100])
    other.set_xticks([0, 1], ['case $a$', 'b'])
    figure.png()
    powers = [t for t in ax.get_yticklabels() if t.get_text()]
    assert powers and all(t.get_parse_math() for t in powers)
    assert not any(t.get_parse_math() for t in [ax._left_title, *other.get_xticklabels()])


def test_all_48_axis_orders_give_the_same_picture():
    volume = np.zeros((7, 8, 9), np.float32)
    volume[6, 7, 8] = 1  # the most right, most anterior, most superior voxel
    straight = Geometry(volume.shape, np.diag([1.0, 2.0, 5.0, 1.0]))
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            way = np.column_stack([order, signs])
            turned = nib.apply_orientation(volume, way)
            affine = straight.affine @ nib.orientations.inv_ornt_aff(way, volume.shape)
            back, ras = to_ras(turned, Geometry(turned.shape, affine))
            assert np.array_equal(back, volume) and ras.orientation == 'RAS'
            assert np.allclose(ras.affine, straight.affine)
    assert np.argwhere(cut(volume, 'axial', 8)).tolist() == [[7, 0]]  # R and A
    assert np.argwhere(cut(volume, 'coronal', 7)).tolist() == [[8, 0]]  # R and S
    assert np.argwhere(cut(volume, 'sagittal', 6)).tolist() == [[8, 0]]  # A and S


def head(affine=np.diag([2.0, 2.0, 2.0, 1.0]), shape=(80, 96, 76), centre_mm=(28, 12, 10)):
    "A brain with a tumour of three nested spheres (24, 15, 9 mm), on any grid."
    affine = affine.copy()
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2  # origin in the middle
    world = np.tensordot(affine[:3, :3], np.indices(shape), 1) + affine[:3, 3, None, None, None]
    brain = sum((world[a] / edge) ** 2 for a, edge in enumerate((66, 82, 62))) < 1
    r = np.sqrt(sum((world[a] - centre_mm[a]) ** 2 for a in range(3)))
    label = ((r < 24).astype(np.uint8) + (r < 15) + (r < 9)) * brain
    contrast = np.array([[300, 520, 450, 480], [400, 300, 320, 340], [380, 260, 240, 620],
                         [250, 480, 420, 450]])
    image = contrast[:, label] * brain + 10.0 * np.sin(world[0] / 9) * brain
    return Case('head', image.astype(np.float32), Geometry(shape, affine), label.astype(np.uint8))


def oblique():
    "The same head at 1 x 1 x 6 mm, axes in another order, slightly tilted."
    tilt = np.eye(4)
    tilt[:2, :2] = [[0.995, 0.0998], [-0.0998, 0.995]]
    order = np.array([[0, -1.0, 0, 0], [0, 0, 6.0, 0], [-1.0, 0, 0, 0], [0, 0, 0, 1]])
    return head(tilt @ order, (130, 140, 30))


def test_slices_go_through_the_tumour():
    case, place = head(), np.array([28, 12, 10])
    view = make_view(case)
    index = largest_slices(view.turn(case.label) > 0)
    found = [view.position_mm(p, index[PLANES[p].normal]) for p in ('sagittal', 'coronal', 'axial')]
    assert np.allclose(found, place, atol=3)
    assert np.abs(np.array(view.index(place)) - index).max() <= 2


def test_what_is_drawn_has_the_proportions_of_the_patient():
    case = oblique()
    figure = show_planes(case)
    for ax, plane in zip(figure.axes, PLANES):
        (w, h), box = make_view(case).extent_mm(plane), ax.get_window_extent()
        assert box.height / box.width == pytest.approx(h / w)


def test_what_cannot_be_drawn_is_refused():
    case = oblique()
    with pytest.raises(InputError, match=r'array of shape \(4, 5\), expected a case'):
        as_case(np.zeros((4, 5)), case.geometry)
    with pytest.raises(InputError, match="expected 'contour' or 'fill'"):
        show_planes(case, style='dots')
    with pytest.raises(InputError, match='unknown modality .T3.; case head has FLAIR, T1w, T1gd, T2w'):
        show_planes(case, modality='T3')
    with pytest.raises(InputError, match=r'label has shape \(2, 2, 2\), expected \(130, 140, 30\)'):
        show_planes(case, np.zeros((2, 2, 2)))
    for show in (show_errors, show_distances):
        with pytest.raises(InputError, match='case nobody has no reference'):
            show(Case('nobody', case.image, case.geometry), case.label)


def test_a_bare_volume_gives_the_same_bytes_each_time():
    case = oblique()
    first, second = (show_planes(case.image[0], geometry=case.geometry).png() for _ in range(2))
    assert first == second


def test_distances_where_the_reference_has_no_tumour_are_still_a_figure():
    case = head()
    assert show_distances(case, case.label, case.label * 0, planes=list(PLANES), dpi=40).png()


def test_signed_distances_are_those_of_brute_force():
    "Over every voxel and every face of a mask on a 1 x 2 x 3 mm grid."
    blob = np.zeros((9, 8, 7), bool)
    blob[3:6, 2:5, 2:6], blob[4:7, 4:6, 3:5] = True, True
    spacing = np.array([1.0, 2.0, 3.0])
    found = signed_distance_mm(blob, spacing)
    for inside in (True, False):
        here, there = np.argwhere(blob == inside), np.argwhere(np.pad(blob, 1) != inside) - 1
        gaps = np.maximum(np.abs(here[:, None] - there[None]) * spacing - spacing / 2, 0)
        exact = np.sqrt((gaps ** 2).sum(-1)).min(1) * (-1 if inside else 1)
        excess = np.abs(found[blob == inside]) - np.abs(exact)
        assert excess.min() > -1e-5 and excess.max() < 3 / 4 and np.mean(excess < 1e-5) > 0.8


def test_signed_distances_from_a_ball_are_within_a_voxel():
    radius = np.linalg.norm(np.indices((41, 41, 41)) - 20, axis=0)
    off = signed_distance_mm(radius < 12, (1, 1, 1)) - (radius - 12)
    assert np.abs(off).max() < 1


@pytest.mark.parametrize('spacing', [(1, 1, 1), (0.6, 0.8, 3.0)])
@pytest.mark.parametrize('turn', [0, 1, -1])
def test_a_ball_on_any_grid_has_its_volume_place_and_radius(spacing, turn):
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    affine, shape = np.eye(4), tuple(int(50 / s) + 3 for s in spacing)
    affine[:3, :3] = (turn * rotation if turn else np.eye(3)) * spacing
    centre = np.array([3.0, -40.0, 25.0])
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) - 1) / 2
    world = np.tensordot(affine[:3, :3], np.indices(shape), 1) + affine[:3, 3, None, None, None]
    mask = ((world - centre[:, None, None, None]) ** 2).sum(0) < 20 ** 2
    points, faces = surface_mesh(mask, Geometry(shape, affine), max_faces=3000)
    assert len(faces) <= 3000
    assert abs((points.min(0) + points.max(0)) / 2 - centre).max() < 0.1
    assert mesh_volume_ml(points, faces) == pytest.approx(33.51, rel=0.02)
    assert abs(np.linalg.norm(points - centre, axis=1) - 20).max() < (0.5 if spacing[0] == 1 else 0.9)


def test_one_voxel_is_a_body_and_none_is_an_empty_mesh():
    speck = np.zeros((9, 9, 9), bool)
    speck[4, 4, 4] = True
    grid = Geometry(speck.shape, np.eye(4))
    assert len(surface_mesh(speck, grid)[1]) >= 8
    assert surface_mesh(speck & False, grid)[1].shape == (0, 3)


def test_meshes_are_where_and_as_large_as_their_voxels():
    case = head()
    figure = mesh_figure(case, max_faces=2000)
    named = {trace.name.split()[0]: trace for trace in figure.data if trace.type == 'mesh3d'}
    assert list(named) == ['ET', 'TC', 'WT', 'brain'] and len(figure.to_json()) < 400_000
    for region in ('WT', 'TC'):
        t = named[region]
        points, faces = np.column_stack([t.x, t.y, t.z]), np.column_stack([t.i, t.j, t.k])
        assert len(faces) <= 2000
        assert mesh_volume_ml(points, faces) == pytest.approx(case.volume_ml(region), rel=0.02)
        assert np.abs((points.min(0) + points.max(0)) / 2 - (28, 12, 10)).max() < 1
    assert [t.name for t in mesh_figure(case, case.label * 0).data] == ['brain', None]


def test_surfaces_are_painted_with_the_distance_at_each_vertex():
    case = head()
    moved = np.roll(case.label, 2, axis=0)  # by 4 mm to the right
    paint = {'signed error': error_paint(moved, case.label, case.geometry)}
    figure = mesh_figure(case, moved, paint=paint)
    style, which = figure.layout.updatemenus[0].buttons[1].args
    for position, values in zip(which, style['intensity']):
        trace, values = figure.data[position], np.array(values)
        assert len(values) == len(trace.x) and np.abs(values).max() < 8
        if trace.name.startswith('WT'):
            assert 2.5 < np.median(values[trace.x > np.percentile(trace.x, 97)]) < 4.5
    assert len(figure.to_json()) < 5_000_000


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
