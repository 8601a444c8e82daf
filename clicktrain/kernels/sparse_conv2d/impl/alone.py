"""Run one layer of a plain network in the batch-innermost layout, between two conversions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import ConvProblem


def run_alone(
    name: str,
    refusals: Callable[[ConvProblem], Sequence[str]],
    convolve: Callable[[ConvProblem, Tensor], Tensor],
    x: Tensor,
    structure: Structure,
    dtype: torch.dtype,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """``x`` [N, C, H, W] or [C, H, W] through ``convolve(problem, x)``: [C, H, W, N] to [F, H, W, N].

    Args:
        name: of the implementation, for messages.
        refusals: why it cannot run a problem.
        dtype: of the values; activations have that of autocast where it is on.

    Raises:
        ValueError: there are refusals.
    """
    images = x if x.dim() == 4 else x[None]
    if torch.is_autocast_enabled(x.device.type):
        images = images.to(torch.get_autocast_dtype(x.device.type))
    values, activations = (str(one).removeprefix("torch.") for one in (dtype, images.dtype))
    problem = ConvProblem.of_structure(
        structure, (images.shape[2], images.shape[3]), images.shape[0], groups=groups, stride=stride,
        padding=padding, dilation=dilation, dtype=values, activations=activations, device=x.device.type,
    )  # fmt: skip
    if reasons := refusals(problem):
        raise ValueError(f"impl={name!r} cannot run this layer: {'; '.join(reasons)}")
    y = convolve(problem, images.permute(1, 2, 3, 0).contiguous()).permute(3, 0, 1, 2).contiguous()
    return y if x.dim() == 4 else y[0]
