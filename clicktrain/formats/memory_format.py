"""Guards against an error of oneDNN: convolutions that must not run in channels_last on a CPU.

The weight gradient of a strided 1x1 convolution with fewer input channels than a vector register has numbers
is written past the end of its memory if the input is in channels_last (oneDNN 3.12, as in PyTorch 2.13;
github.com/uxlfoundation/oneDNN/issues/6035): a crash, or wrong numbers elsewhere. Networks as they are
designed have no such layer; the shortcuts of pruned residual networks are such layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def unsafe_in_channels_last(conv: nn.Conv2d | nn.Module) -> bool:
    """Whether training a convolution in channels_last would hit the error on this processor."""
    if not isinstance(conv, nn.Conv2d) or set(conv.kernel_size) != {1} or max(conv.stride) == 1:
        return False
    vector = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    return conv.in_channels // conv.groups < vector


def keep_out_of_channels_last_(model: nn.Module) -> list[str]:
    """Let what `unsafe_in_channels_last` names compute in NCHW on a CPU, in whatever format its input comes.

    By a hook on the module; to be called again when channels have been removed. A module has it once.

    Returns:
        Names of the guarded convolutions.
    """
    guarded = []
    for name, module in model.named_modules():
        if unsafe_in_channels_last(module):
            guarded.append(name)
            if plain_input not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(plain_input)
    return guarded


def plain(tensor: Tensor) -> Tensor:
    """The tensor with the strides of NCHW, in a copy if need be.

    Not ``contiguous()``: with one channel or pixel a tensor is contiguous in both formats, and only its
    strides show which one is meant.
    """
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    if tensor.stride() == tuple(reversed(strides)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def plain_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The hook of `keep_out_of_channels_last_`: it changes formats and no numbers."""
    if not args or args[0].device.type != "cpu":
        return None
    weight = module._parameters.get("weight")  # a packed convolution makes its own, plain
    if weight is not None and plain(weight) is not weight:
        weight.data = plain(weight.data)
    return (plain(args[0]), *args[1:])
