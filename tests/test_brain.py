"What is brain: backgrounds that are not zero, whole heads, sequences that disagree; and that ordinary scans are left alone."
from __future__ import annotations

import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from neuroseg3d.studies.brain import alignment_flags
from neuroseg3d.studies.cases import read_case
from neuroseg3d.cli import main
from neuroseg3d.core import Case, Geometry, InputError
from neuroseg3d.studies.preprocess import Space, to_model_space

SHAPE, AFFINE = (32, 38, 30), np.diag([-5.0, -5.0, 5.0, 1.0])
NAMES = ('flair', 't1', 't1ce', 't2')
SHARED = Path(__file__).resolve().parents[2] / 'shared'


def ellipsoid(half: tuple[float, float, float], shape=SHAPE) -> np.ndarray:
    grid = np.moveaxis(np.indices(shape), 0, -1) - (np.array(shape) - 1) / 2
    return ((grid / half) ** 2).sum(-1) < 1


BRAIN = ellipsoid((13, 16, 12))  # 1,300 mL


def sequences(inside: np.ndarray = BRAIN) -> dict[str, np.ndarray]:
    "Four sequences of smooth tissue; each differs."
    rng, found = np.random.default_rng(7), {}
    for level, name in enumerate(NAMES, 2):
        tissue = 100 * level + 60 * level * np.sin(np.indices(inside.shape).sum(0) / (3 + level)) + rng.normal(0, 5 * level, inside.shape)
        found[name] = np.where(inside, tissue, 0).astype(np.float32)
    return found


def write(folder: Path, images: dict[str, np.ndarray], affine=AFFINE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, voxels in images.items():
        nib.save(nib.Nifti1Image(np.ascontiguousarray(voxels), affine), folder / f'P_{name}.nii.gz')
    return folder


def zscore(v):
    return (v - v.mean()) / v.std()


rng = np.random.default_rng(1)
SPOILT = {
    'minus one': lambda v: np.where(v == 0, -1, v), 'minus thousand': lambda v: np.where(v == 0, -1000, v), 'a millionth': lambda v: np.where(v == 0, 1e-6, v),
    'shifted down': lambda v: v - 1000, 'shifted up': lambda v: v + 1024, 'five': lambda v: np.where(v == 0, 5, v), 'z-scores': zscore,
    '-1 to 1': lambda v: 2 * v / v.max() - 1, '0.2 to 1': lambda v: 0.2 + 0.8 * v / v.max(), 'z-scores of the brain, filled': lambda v: np.where(v == 0, -9, (v - v[v != 0].mean()) / v[v != 0].std()),
    'tiny noise': lambda v: v + rng.normal(0, 0.2, v.shape), 'tiny noise around minus one': lambda v: np.where(v == 0, -1, v) + rng.normal(0, 1e-4, v.shape),
    'residue': lambda v: np.where(v == 0, rng.uniform(-1e-6, 1e-6, v.shape), v), 'integers': lambda v: np.where(v == 0, -1024, np.round(v)).astype(np.int16),
}


@pytest.mark.contract('converted', 'images', 'a background of -1, -1000, a millionth, z-scores, or with a little noise', 'it becomes zero; the line names the value')
@pytest.mark.parametrize('how', SPOILT)
def test_a_background_that_is_not_zero_becomes_zero(tmp_path, how):
    plain = read_case(write(tmp_path / 'plain', sequences()))
    assert np.array_equal(plain.brain, BRAIN)
    spoilt = {n: np.asarray(SPOILT[how](v)).astype(np.int16 if how == 'integers' else np.float32) for n, v in sequences().items()}
    with pytest.warns(UserWarning, match=r'P_flair.nii.gz: FLAIR: the background is \S+.*, not 0: ') as said:
        case = read_case(write(tmp_path / 'spoilt', spoilt))
    assert len(said) == 4 and np.mean(case.brain != BRAIN) < 1e-4  # 151 mL stay 151 mL
    ours, theirs = (to_model_space(c, Space((4.0, 4.0, 4.0))).image for c in (case, plain))
    assert ours.shape == theirs.shape
    inside = (ours != 0) & (theirs != 0)
    assert inside.sum() > 0.999 * (theirs != 0).sum() and float((ours - theirs)[inside].abs().mean()) < (0.3 if how == 'z-scores of the brain, filled' else 0.02)  # there the edge meets the mean


def test_each_sequence_has_a_background_of_its_own(tmp_path):
    images = sequences()
    spoilt = {n: SPOILT[how](v).astype(np.float32) for (n, v), how in zip(images.items(), ('minus one', 'z-scores', 'shifted up', 'a millionth'))}
    spoilt['t2'] = images['t2']
    with pytest.warns(UserWarning) as said:
        case = read_case(write(tmp_path / 'P', spoilt))
    assert sorted(str(w.message).split('background is ')[1].split(',')[0].split('.')[0] for w in said) == ['-0', '-1', '1024']
    assert np.array_equal(case.brain, BRAIN) and np.array_equal(case.image[3], images['t2'])
    assert np.array_equal(case.image[0], images['flair'])  # what was filled keeps its intensities to the last bit


def test_zero_background_is_left_alone(tmp_path):
    images = sequences()
    images['t1'][BRAIN] -= images['t1'][BRAIN].mean()  # z-scores over the brain: half of it is negative
    images['t1ce'] = np.digitize(images['t1ce'], np.linspace(1, 700, 47)).astype(np.uint8)  # 48 grey levels
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        whole = read_case(write(tmp_path / 'whole', images))
        tight = read_case(write(tmp_path / 'tight', {n: v[3:29, 3:35, 3:27] for n, v in images.items()}))
        slab = read_case(write(tmp_path / 'slab', {n: v[:, :, 10:20] for n, v in images.items()}))
        filled = read_case(write(tmp_path / 'filled', {n: v[7:25, 8:30, 6:24] for n, v in images.items()}))
        corner = read_case(write(tmp_path / 'corner', {n: v[4:20, 4:22, 4:18] for n, v in images.items()}))
    assert 0.01 < np.mean(filled.image[0] == 0) < 0.2
    for case, box in ((whole, np.s_[:, :, :]), (tight, np.s_[3:29, 3:35, 3:27]), (slab, np.s_[:, :, 10:20]), (corner, np.s_[4:20, 4:22, 4:18]), (filled, np.s_[7:25, 8:30, 6:24])):
        assert all(np.array_equal(c, v[box]) for c, v in zip(case.image, images.values()))


@pytest.mark.contract('converted', 'images', 'z-scores that were padded with zeros', 'both backgrounds become zero')
def test_a_padded_box_of_z_scores(tmp_path):
    padded = {n: np.pad(zscore(v), ((9, 5), (3, 4), (6, 2))).astype(np.float32) for n, v in sequences().items()}
    with pytest.warns(UserWarning, match='not 0: the sequence was shifted'):
        case = read_case(write(tmp_path / 'P', padded))
    assert np.array_equal(case.brain[9:-5, 3:-4, 6:-2], BRAIN)


HEAD = ellipsoid((15.5, 18.5, 14.8))  # 2,200 mL


def head(noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    skin = np.where(HEAD, 250 + rng.normal(0, 30, SHAPE), 0)
    skin[ellipsoid((14, 17, 13)) & ~BRAIN] = 20  # the skull is dark
    skin[BRAIN] = 400
    return np.hypot(skin + rng.normal(0, noise, SHAPE), rng.normal(0, noise, SHAPE)).astype(np.float32) if noise else skin.astype(np.float32)


@pytest.mark.contract('refused', 'images', 'a whole head, its air zero or noisy', 'the error says how to strip it')
@pytest.mark.parametrize(('noise', 'scale', 'dtype', 'message'), [
    (12, 1, np.float32, 'has no constant background'), (12, 1, np.uint16, r'has no constant background|mL that are not background'),
    (0, 1.1, np.float32, r'holds [\d,]+ mL that are not background, more than any brain'), (0.5, 1.1, np.float32, 'more than any brain'),
])
def test_whole_heads_are_refused(tmp_path, noise, scale, dtype, message):
    images = {n: head(noise, i).astype(dtype) for i, n in enumerate(NAMES)}
    with pytest.raises(InputError, match=f'P_.*.nii.gz: .*({message}).*[Ss]kull-stripped.*HD-BET'):
        read_case(write(tmp_path / 'P', images, AFFINE @ np.diag([scale, scale, scale, 1])))


@pytest.mark.contract('refused', 'images', 'a box cut out inside the brain, without background', 'the error says so')
def test_a_box_from_inside_the_brain_is_refused(tmp_path):
    images = {n: v[10:22, 11:27, 9:21] for n, v in sequences().items()}
    with pytest.raises(InputError, match='has no constant background: 0% of it is zero.*a box cut out inside the brain'):
        read_case(write(tmp_path / 'P', images))


@pytest.mark.contract('refused', 'images', 'one stripped sequence beside others that are not, or the other way round', 'the error gives the volume of each')
@pytest.mark.parametrize('stripped', [1, 3])
def test_stripped_beside_unstripped_is_refused(tmp_path, stripped):
    images = sequences()
    for n in NAMES[stripped:]:
        images[n] = head(0)
    with pytest.raises(InputError, match='case P: the sequences disagree about what is brain: FLAIR 1,3.. mL, .*not skull-stripped, beside FLAIR|mL that are not background'):
        read_case(write(tmp_path / 'P', images))


@pytest.mark.contract('works', 'images', 'a sequence that covers a part of the head', 'read; infer, eda and report say what is missing')
def test_a_sequence_that_covers_a_part_is_read(tmp_path):
    images = sequences()
    images['t2'][:, :, :13] = 0
    case = read_case(write(tmp_path / 'P', images))
    assert not case.image[3][:, :, :13].any() and case.image[3].any()
    missing = 1 - np.count_nonzero(case.image[3]) / BRAIN.sum()
    assert alignment_flags(case.image, case.geometry, case.modalities) == {'T2w': f'is zero in {missing:.0%} of the brain: incomplete coverage?'}


@pytest.mark.contract('warned', 'images', 'a sequence that was not registered and lies beside the others', 'infer, eda and report say how far and in which direction, in the same words')
def test_a_shifted_sequence_is_told_by_every_command_in_the_same_words(tmp_path, capsys, recwarn):
    images = sequences()
    images['t1'] = np.roll(images['t1'], 3, 0)  # by 15 mm, to the patient's left: the first axis runs there
    write(tmp_path / 'cohort' / 'P', images)
    said = 'T1w lies 15 mm to the left of where the other sequences are (their brains overlap with a Dice of '
    words = ['--output_dir', str(tmp_path / 'pred'), '--device', 'cpu']
    assert main(['infer', '--input_image', str(tmp_path / 'cohort' / 'P'), *words]) == 0
    warned, = [str(w.message) for w in recwarn if 'lies' in str(w.message)]
    assert warned.startswith(f'P: {said}') and warned.endswith('moved back 1.00): register it to them')
    assert main(['eda', '--data', str(tmp_path / 'cohort'), '--output_dir', str(tmp_path / 'eda')]) == 0
    remarks = json.loads((tmp_path / 'eda' / 'fingerprint.json').read_text())['cases'][0]['remarks']
    assert [r for r in remarks if 'lies' in r] == [warned.split('P: ')[1]] and f'[1] P: {said}' in capsys.readouterr().out
    assert main(['report', '--pred', str(tmp_path / 'pred'), '--data', str(tmp_path / 'cohort'), '--output_dir', str(tmp_path / 'report')]) == 0
    for page in ('eda/index.html', 'report/cases/P.html'):
        text = (tmp_path / page).read_text()
        assert said in text and 'incomplete coverage' not in text


@pytest.mark.skipif(not SHARED.is_dir(), reason='the real cases are not here')
def test_real_scans_are_read_without_a_word_and_unchanged():
    files = {m: SHARED / f'data/brats2021/BraTS2021_01480/BraTS2021_01480_{n}.nii.gz' for m, n in zip(('FLAIR', 'T1w', 'T1gd', 'T2w'), NAMES)}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        case = read_case(files)
        assert all(np.array_equal(c, nib.load(p).get_fdata(dtype=np.float32)) for c, p in zip(case.image, files.values()))
        read_case(SHARED / 'cohorts/no_tumour/MS-07', with_label=False)  # beside it lies a map of other lesions


@pytest.mark.skipif(not (SHARED / 'cohorts/raw').is_dir(), reason='the raw study is not here')
def test_a_real_whole_head_is_refused(tmp_path):
    found = sorted((SHARED / 'cohorts/raw/TCGA-FG-6692').rglob('*.nii.gz'))
    image = nib.load(next(p for p in found if 'flair' in p.name.lower()))
    for n in NAMES:
        nib.save(image, tmp_path / f'P_{n}.nii.gz')
    with pytest.raises(InputError, match='[Ss]kull-stripped'):
        read_case(tmp_path)


def test_a_case_made_by_hand_is_what_it_says():
    image = np.stack(list(sequences().values()))
    assert np.array_equal(Case('P', image, Geometry(SHAPE, AFFINE)).brain, BRAIN)
