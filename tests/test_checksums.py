"Files of tensors that have lost a bit, or hold what is no number, are refused; a damaged cache is made again."
from __future__ import annotations

import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_schemas import write_study

from neuroseg3d.networks.checkpoint import KEY, STARTER, export_model, load_checkpoint, load_model, read_export, save_checkpoint
from neuroseg3d.cli import main
from neuroseg3d.core import InputError
from neuroseg3d.training.data import DiskCases, Prepare, StoredCase
from neuroseg3d.studies.layouts import find_cases
from neuroseg3d.studies.preprocess import Space


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def metadata(path):
    with safe_open(path, 'pt') as file:
        return file.metadata()


@pytest.mark.contract('refused', 'models', 'an exported model in which one bit has changed', 'the error says that it is damaged')
def test_a_flipped_bit_anywhere_in_a_model_is_refused(tmp_path):
    model = shutil.copy(STARTER, tmp_path / 'm.safetensors')
    header = 8 + int.from_bytes(model.read_bytes()[:8], 'little')
    rng, size = np.random.default_rng(0), model.stat().st_size
    for bit in [*range(0, 64, 5), *rng.integers(64, 8 * header, 30), *rng.integers(8 * header, 8 * size, 15), 8 * size - 1]:
        flip(model, int(bit))
        with pytest.raises(InputError, match='m.safetensors: (damaged|not a checkpoint)'):
            load_model(model)
        flip(model, int(bit))
    assert load_model(model).paths == [model]


def test_every_weight_is_under_the_checksum(tmp_path):
    weights, texts = load_file(STARTER), metadata(STARTER)
    for name in list(weights)[::7]:
        changed = {**weights, name: weights[name] + 2 ** -10}
        save_file(changed, tmp_path / 'm.safetensors', texts)
        with pytest.raises(InputError, match='damaged: the SHA-256'):
            read_export(tmp_path / 'm.safetensors')
    save_file(dict(reversed(weights.items())), tmp_path / 'm.safetensors', texts)  # the same content by another program
    assert read_export(tmp_path / 'm.safetensors')[0].keys() == weights.keys()


@pytest.mark.contract('warned', 'models', 'a model that was exported before there were checksums', 'used; the line says how to export it again')
def test_a_model_from_before_checksums_is_read_with_a_warning_and_exported_again_without(tmp_path, capsys):
    old, new = tmp_path / 'old.safetensors', tmp_path / 'new.safetensors'
    save_file(load_file(STARTER), old, {KEY: metadata(STARTER)[KEY]})
    with pytest.warns(UserWarning, match='old.safetensors: exported before models had a checksum'):
        a = load_model(old)
    assert main(['export', '--ckpt_path', str(old), '--output_path', str(new)]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        b = load_model(new)
    assert metadata(new) == metadata(STARTER)  # facts as they were, and the same checksum
    assert all(torch.equal(x, y) for x, y in zip(a.networks[0].parameters(), b.networks[0].parameters(), strict=True))


@pytest.mark.contract('refused', 'models', 'weights that are NaN or infinite', 'the error names the tensor')
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, value):
    weights, path = load_file(STARTER), tmp_path / 'm.safetensors'
    name = list(weights)[3]
    weights[name].view(-1)[5] = value
    save_file(weights, path, {KEY: metadata(STARTER)[KEY]})
    with pytest.warns(UserWarning), pytest.raises(InputError, match=f'm.safetensors: 1 of .* weights of {name} are NaN or infinite'):
        load_model(path)
    with pytest.warns(UserWarning), pytest.raises(InputError, match='NaN or infinite'):
        export_model(path, tmp_path / 'n.safetensors')
    assert not (tmp_path / 'n.safetensors').exists()
    save_checkpoint({'state_dict': {'network.stem': torch.tensor([1.0, value])}}, tmp_path / 'c.ckpt')
    with pytest.raises(InputError, match='c.ckpt: 1 of 2 weights of network.stem are NaN or infinite'):
        load_checkpoint(tmp_path / 'c.ckpt')


@pytest.mark.contract('warned', 'models', 'a cached case in which one bit has changed', 'made again')
def test_a_cached_case_that_lost_a_bit_is_made_again_and_said(tmp_path):
    write_study(tmp_path / 'data', 'BraTS-GLI-00001-000', {1: 30, 2: 20, 3: 10})
    cases = lambda: DiskCases(find_cases(tmp_path / 'data'), Prepare(Space()), tmp_path / 'cache')  # noqa: E731
    first = cases()[0].cut((0, 0, 0), (5, 5, 5))
    path, = (tmp_path / 'cache').glob('*.safetensors')
    whole = path.read_bytes()
    for bit in (3, 8 * 40, 8 * (len(whole) // 2), 8 * len(whole) - 1):
        path.write_bytes(whole)
        flip(path, bit)
        with pytest.raises(InputError, match='damaged'):
            StoredCase(path)
        with pytest.warns(UserWarning, match='BraTS-GLI-00001-000-.*damaged.*the cached case is made again'):
            again = cases()[0].cut((0, 0, 0), (5, 5, 5))
        assert path.read_bytes() == whole and all(torch.equal(again[k], first[k]) for k in first)
