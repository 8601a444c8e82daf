"""Random masks like ClickTrain's final ones, for measurements that need no training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.kernels.pack_model import pack_refusals
from clicktrain.sparsity.patterns import default_entries, fixed_pool

PATTERNS = 8
"""Patterns of a layer; ClickTrain's default."""


def check_sparsity(compressions: tuple[float, ...], groups: tuple[int, ...]) -> None:
    """Raise UserError for a compression or group that no mask can have."""
    if not compressions or not groups:
        raise UserError("at least one compression and one group are needed")
    for compression in compressions:
        if not 2.25 <= compression <= 1000:
            raise UserError(
                f"compression is {compression:g}: 4 of 9 weights in each kernel are 2.25x alone, "
                "so give a number from 2.25 to 1000"
            )
    for group in groups:
        if group < 1:
            raise UserError(f"group is {group}: at least 1 filter is in a group")


def pattern_mask(
    shape: tuple[int, int, int, int], compression: float, group: int, generator: torch.Generator
) -> Tensor:
    """A mask with patterns and connectivity: every filter keeps equally many kernels, each with a pattern.

    Bool of ``shape`` [F, C, R, S], True = kept. ``compression`` (all weights over kept ones) is met as
    closely as whole kernels allow; each ``group`` of filters keeps the same channels with the same patterns.
    """
    filters, channels, rows, columns = shape
    patterns = _patterns((rows, columns), generator)
    entries = int(patterns[0].sum())
    kept = min(max(1, round(channels * rows * columns / compression / entries)), channels)
    groups = -(-filters // group)
    mask = torch.zeros(groups, channels, rows, columns, dtype=torch.bool)
    chosen = torch.rand(groups, channels, generator=generator).argsort(1)[:, :kept]
    which = torch.randint(len(patterns), (groups, kept), generator=generator)
    mask[torch.arange(groups)[:, None], chosen] = patterns[which]
    return mask.repeat_interleave(group, 0)[:filters].contiguous()


def model_masks(model: nn.Module, compression: float, group: int, seed: int = 0) -> dict[str, Tensor]:
    """Masks for every convolution but the first one, grouped ones, and those that cannot be packed."""
    generator = torch.Generator().manual_seed(seed)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    names = [name for name in list(convolutions)[1:] if convolutions[name].groups == 1]
    refused = pack_refusals(model, names)
    masks = {}
    for name in names:
        f, c, r, s = convolutions[name].weight.shape
        if name not in refused:
            masks[name] = pattern_mask((f, c, r, s), compression, group, generator)
    return masks


def _patterns(kernel: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Bool [P, R, S]: the given ones for 3x3, the whole kernel for 1x1, else random ones."""
    if kernel == (3, 3):
        return fixed_pool(PATTERNS).masks()
    rows, columns = kernel
    if rows * columns == 1:
        return torch.ones(1, 1, 1, dtype=torch.bool)
    entries = default_entries(kernel, 4)
    places = torch.rand(PATTERNS, rows * columns, generator=generator).argsort(1)[:, :entries]
    flat = torch.zeros(PATTERNS, rows * columns, dtype=torch.bool)
    return flat.scatter_(1, places, True).view(PATTERNS, rows, columns)
