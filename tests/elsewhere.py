"A device that is not the CPU, on a machine that has none: tensors compute as they would on the CPU, but they refuse to meet its tensors, and NumPy."
from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

#: The name under which it goes: PyTorch knows this device everywhere, and nothing of ours asks for it.
ELSEWHERE = torch.device('meta')
_TRANSFERS = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class There(torch.Tensor):
    "A tensor of that device; what it holds lies on the CPU."

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
                                                   dtype=held.dtype, device=ELSEWHERE, requires_grad=False)

    def __init__(self, held: torch.Tensor):
        self.held = held

    def __repr__(self) -> str:
        return f'There({self.held!r})'

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of another device to numpy; use Tensor.cpu() first")

    def __array__(self, *args, **kwargs):
        self.numpy()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args: tuple, kwargs: dict):
    "An operation where its tensors are."
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    asked = torch.device(kwargs['device']) if kwargs.get('device') is not None else None
    here = [x for x in tensors if not isinstance(x, There) and x.ndim]  # a number may come along, as on a GPU
    away = [x for x in tensors if isinstance(x, There)]
    if here and away and function not in _TRANSFERS:
        indices = function is torch.ops.aten.index.Tensor or function is torch.ops.aten.index_put_.default
        if not (indices and isinstance(args[0], There)):  # PyTorch takes an index along
            raise RuntimeError(f'expected all tensors on the same device, found two: {function} of '
                               f'{[(type(x).__name__, tuple(x.shape)) for x in tensors]}')
    if asked == ELSEWHERE:
        kwargs = {**kwargs, 'device': torch.device('cpu')}
    plain_args, plain_kwargs = tree_map_only(There, lambda x: x.held, (args, kwargs))
    out = function(*plain_args, **plain_kwargs)
    if function is torch.ops.aten.copy_.default or function._schema.name.endswith('_') and args and isinstance(args[0], torch.Tensor):
        return args[0]
    stays = asked == ELSEWHERE or asked is None and bool(away)
    return tree_map_only(torch.Tensor, There, out) if stays else out


class Elsewhere(TorchDispatchMode):
    "While this is entered, the device exists."

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})
