"""Layers and functions that no rule knows are tried: do they work inside each channel, so that one can go?

Batch norms with an activation inside, scales, stochastic depth, activations of a user's own: what they make
of some channels is compared with the same channels of what they make of all. Whatever differs mixes channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from clicktrain.graph import working_copy
from clicktrain.graph.layer_trial import layer_inputs, uses_weight_as_it_is
from clicktrain.surgery.apply import follow_shape
from clicktrain.surgery.compare import distance
from clicktrain.surgery.operations import parent_kind, word_of
from clicktrain.surgery.steady import steadily

_CLOSE = 1e-4


def may_keep_channels(module: nn.Module) -> bool:
    """Whether all that a module holds is one number per channel, or one for all of them."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    tensors = list(_tensors(module))
    own = any(t is not None for table in (module._parameters, module._buffers) for t in table.values())
    sizes = {t.numel() for t in tensors if t.numel() > 1}
    return own and len(sizes) <= 1 and all(t.numel() == max(t.shape, default=1) for t in tensors)


def channel_tensors(module: nn.Module, channels: int) -> list[tuple[Tensor, int]]:
    """Parameters and buffers with one number per channel, and along which dimension."""
    alike = (t for t in _tensors(module) if t.numel() == channels and channels in t.shape)
    return [(tensor, tuple(tensor.shape).index(channels)) for tensor in alike]


def layer_keeps_channels(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a module works inside each channel of an input, along one of its dimensions."""
    sizes = {t.numel() for t in _tensors(module) if t.numel() > 1}
    dims = [d for d in range(1, len(shape)) if shape[d] in sizes or not sizes]
    return any(module_keeps_channels(module, [(shape, dim)], dtype) for dim in dims)


def module_keeps_channels(
    module: nn.Module, inputs: Sequence[tuple[tuple[int, ...], int]], dtype: torch.dtype
) -> bool:
    """Whether a module works inside each channel; ``inputs`` and ``dtype`` as in `keeps_channels`."""
    channels = max(shape[dim] for shape, dim in inputs)

    def made(keep: Tensor | None, training: bool) -> Callable[[list[Tensor]], object]:
        twin = working_copy(module)
        for part in twin.modules():
            part.training = training
        if keep is not None:
            cut_channels_(twin, channels, keep)
        return lambda tensors: twin(*tensors)

    device = next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))
    return keeps_channels(made, inputs, dtype, device)


def kind_by_trial(module: nn.Module) -> str | None:
    """The word for a layer whose ``forward`` is its own but computes what its known parent's does.

    A convolution that pads otherwise is one all the same: its weights connect the same channels.
    """
    kind = parent_kind(module)
    inputs = None if kind is None else layer_inputs(module)
    if kind is None or inputs is None:
        return None
    for training in (True, False):
        results = []
        for function in (type(module).forward, kind.forward):
            twin = working_copy(module)
            twin.training = training
            try:
                with steadily((inputs,)), torch.no_grad():
                    results.append(function(twin, inputs.clone()))
            except Exception:  # whatever code of a user's does
                return None
        whole, right = results
        alike = isinstance(whole, Tensor) and whole.shape == right.shape
        if not alike or not distance(whole, right) <= _CLOSE:
            conv = isinstance(module, nn.modules.conv._ConvNd)
            return word_of(kind) if conv and uses_weight_as_it_is(module) else None
    return word_of(kind)


def keeps_channels(
    made: Callable[[Tensor | None, bool], Callable[[list[Tensor]], object]],
    inputs: Sequence[tuple[tuple[int, ...], int]],
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether an operation gives for some channels what it gives for all.

    Args:
        made: (channels that stay, or None for all; training mode) -> the operation on tensors.
        inputs: shape of each tensor, and the dimension of the channels; a tensor with one channel is spread.
    """
    channels = max((shape[dim] for shape, dim in inputs), default=0)
    if channels < 2 or not dtype.is_floating_point:
        return False
    # Where the channels are in a result of the inputs' largest rank.
    rank = max(len(shape) for shape, _ in inputs)
    out_dim = max(dim + rank - len(shape) for shape, dim in inputs if shape[dim] == channels)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape, _ in inputs]
    for keep in (torch.arange(0, channels, 2, device=device), torch.arange(channels - 1, device=device)):
        some = [
            tensor.index_select(dim, keep) if shape[dim] == channels else tensor
            for tensor, (shape, dim) in zip(tensors, inputs, strict=True)
        ]
        for training in (True, False):
            try:
                with steadily(tuple(tensors)), torch.no_grad():
                    whole = made(None, training)([tensor.clone() for tensor in tensors])
                with steadily(tuple(tensors)), torch.no_grad():
                    part = made(keep, training)([tensor.clone() for tensor in some])
            except Exception:  # whatever code of a user's does with other numbers of channels
                return False
            if not isinstance(whole, Tensor) or not isinstance(part, Tensor):
                return False
            if out_dim >= whole.dim() or whole.shape[out_dim] != channels or part.dim() != whole.dim():
                return False
            expected = whole.index_select(out_dim, keep)
            if part.shape != expected.shape or not distance(part, expected) <= _CLOSE:
                return False
    return True


def cut_channels_(module: nn.Module, channels: int, keep: Tensor) -> None:
    """Take channels out of a copy of a module that `may_keep_channels`."""
    for part in module.modules():
        changed = False
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.numel() == channels and channels in tensor.shape:
                    small = tensor.detach().index_select(tuple(tensor.shape).index(channels), keep)
                    table[name] = nn.Parameter(small) if isinstance(tensor, nn.Parameter) else small  # type: ignore[assignment]
                    changed = True
        if changed:
            follow_shape(part)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
