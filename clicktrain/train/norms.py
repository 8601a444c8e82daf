"""Batch norm statistics that are measured again, after weights changed without them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep statistics."""
    found = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [norm for norm in found if norm.running_mean is not None]


@contextlib.contextmanager
def single_value_norms(model: nn.Module) -> Iterator[list[str]]:
    """Collect, inside the block, the batch norms that see one value per channel, and cannot train on it."""
    names: list[str] = []

    def look(name: str, x: object = None) -> None:
        if isinstance(x, Tensor) and x.dim() > 1 and x.numel() == x.shape[1]:
            names.append(name)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, *inputs[:1]))
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_norms_(
    model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], Any] | None = None
) -> int:
    """Set the statistics of all batch norms to their means over some batches; the number of images.

    Every batch counts the same. The model runs in training mode and is put back into the mode it was in;
    norms that it keeps in evaluation mode then stay as they are.

    Args:
        model: the network.
        batches: images [B, C, H, W] on its device, at least one.
        forward: what runs the model, if not itself.
    """
    was_training, images = model.training, 0
    model.train()
    norms = [norm for norm in norms_of(model) if norm.training]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # PyTorch's: the mean of all batches since the reset
        for x in batches:
            (forward or model)(x)
            images += len(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(was_training)
    return images


@contextlib.contextmanager
def norms_kept(model: nn.Module) -> Iterator[None]:
    """Put the statistics of all batch norms back at the end of the block."""
    buffers = [buffer for norm in norms_of(model) for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
