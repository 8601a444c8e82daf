"""Layers with a ``forward`` of their own are tried: do they use each weight as their parent class does?

A convolution that pads its input first (timm's ``Conv2dSame``) does; one that standardizes its weight does
not, and a zero in the latter is no zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.graph.adapters import LayerAdapter, nearest_adapter
from clicktrain.graph.copying import working_copy
from clicktrain.graph.random_state import own_random_numbers

_CLOSE = 1e-4
_TRIED = 4
"""Weights that are tried one by one."""


def uses_weight_as_it_is(module: nn.Module) -> bool:
    """Whether every weight takes one input channel to one output channel, by itself, as a factor.

    The output is then linear in the weights, and a zero has no part in it. Whatever cannot be tried does not.
    """
    adapter = nearest_adapter(module)
    if adapter is None or "weight" not in module._parameters:
        return False
    twin = working_copy(module)
    for training in (True, False):
        for part in twin.modules():
            part.training = training
        try:
            x = layer_inputs(twin)
            if x is None:
                return False
            with own_random_numbers((x,)), torch.no_grad():
                if not (_adds_up(twin, x) and _one_by_one(twin, adapter, x)):
                    return False
        except Exception:  # whatever code of a user's does with such weights
            return False
    return True


def layer_inputs(module: Any) -> Tensor | None:
    """Something that a layer can read: convolutions, linear layers and batch norms of any dimensions."""
    generator = torch.Generator().manual_seed(0)
    weight = module._parameters.get("weight")
    dtype, device = (torch.float32, "cpu") if weight is None else (weight.dtype, weight.device)
    if isinstance(module, nn.Linear):
        shape = [4, module.in_features]
    elif isinstance(module, nn.modules.conv._ConvNd):
        reach = [1 + (k - 1) * d for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        shape = [2, module.in_channels, *(size + 7 + n for n, size in enumerate(reach))]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        dims = next((n for n in (1, 2, 3) if f"{n}d" in "".join(k.__name__ for k in type(module).__mro__)), 2)
        shape = [4, module.num_features, *[5] * dims]
    else:
        return None
    return torch.randn(shape, generator=generator).to(device, dtype)


def _output(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    own = module._parameters["weight"]
    assert own is not None
    own.copy_(weight)
    y: Tensor = module(x.clone())
    return y.double()


def _adds_up(module: nn.Module, x: Tensor) -> bool:
    """Whether the output is linear in the weight, for two weights drawn at random."""
    own = module._parameters["weight"]
    assert own is not None
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(own.shape, generator=generator).to(own) for _ in range(2))
    nothing = _output(module, torch.zeros_like(own), x)
    parts = _output(module, first, x) - nothing + _output(module, second, x) - nothing
    whole = _output(module, first + second, x) - nothing
    scale = float(whole.abs().max())
    return scale > 0 and float((whole - parts).abs().max()) <= _CLOSE * scale


def _one_by_one(module: nn.Module, adapter: LayerAdapter, x: Tensor) -> bool:
    """Whether a single weight of 1 copies values of its input channel to its output channel."""
    own = module._parameters["weight"]
    assert own is not None
    shape = adapter.view_shape(module)
    filters, channels = shape[0], shape[1]
    nothing = _output(module, torch.zeros_like(own), x)
    size, dim = math.prod(shape), 1 if x.dim() > 2 or nothing.dim() == 2 else -1
    for index in {size * step // _TRIED for step in range(_TRIED)} | {size - 1}:
        single = torch.zeros(shape, dtype=own.dtype, device=own.device)
        single.view(-1)[index] = 1
        f, c = index // (size // filters), index // (size // filters // channels) % channels
        read = f // (filters // adapter.groups(module)) * channels + c
        y = _output(module, adapter.unview(module, single), x) - nothing
        written = y.select(dim, f).reshape(-1, 1)
        others = y.clone()
        others.select(dim, f).zero_()
        values = torch.cat([x.double().select(dim, read).reshape(-1), x.new_zeros(1).double()]).sort().values
        place = torch.searchsorted(values, written.contiguous()).clamp(1, len(values) - 1)
        nearest = torch.minimum((values[place] - written).abs(), (values[place - 1] - written).abs())
        if float(others.abs().max()) > _CLOSE or not bool(written.any()) or float(nearest.max()) > _CLOSE:
            return False
    return True
