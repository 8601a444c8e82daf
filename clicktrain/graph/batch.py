"""Inputs of a model as a batch: its size, parts of it, and other batches of the same form.

The batch is the first dimension of the first tensor, and of every tensor that is as long.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.inputs import Inputs


def first_tensor(inputs: Inputs) -> Tensor:
    """The images of a network for images: the first tensor with more than one dimension.

    Raises:
        UserError: there is no tensor among the arguments.
    """
    tensors = inputs.tensors()
    if not tensors:
        raise UserError(
            "the example holds no tensor: give a batch of inputs, a tuple of positional arguments or a dict "
            "of keyword arguments"
        )
    return next((tensor for tensor in tensors if tensor.dim() > 1), tensors[0])


def batch_size(inputs: Inputs) -> int:
    """Images in the batch; 0 where the first tensor is a number."""
    first = first_tensor(inputs)
    return first.shape[0] if first.dim() else 0


def first_of_batch(inputs: Inputs, images: int) -> Inputs:
    """The first images, as views."""
    return _batched(inputs, lambda tensor: tensor[:images])


def resized(inputs: Inputs, images: int) -> Inputs:
    """A batch of another size: the same images over and over."""
    size = batch_size(inputs)
    if size in (0, images):
        return inputs
    number = torch.arange(images) % size
    return _batched(inputs, lambda tensor: tensor.index_select(0, number.to(tensor.device)))


def blank(inputs: Inputs, images: int | None = None) -> Inputs:
    """Zeros instead of floating-point numbers; whole numbers (indices, masks) stay as they are."""
    whole = inputs if images is None else resized(inputs, images)
    return whole.map(lambda t: torch.zeros_like(t) if t.is_floating_point() or t.is_complex() else t)


def owned(inputs: Inputs) -> Inputs:
    """Tensors with memory of their own, outside of autograd."""
    return inputs.map(lambda tensor: tensor.detach().clone())


def _batched(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    size = batch_size(inputs)
    return inputs.map(lambda t: change(t) if size and t.dim() and t.shape[0] == size else t)
