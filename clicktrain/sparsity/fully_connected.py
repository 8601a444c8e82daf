"""Masks of fully connected layers (Campfire section 2.1.2).

Scores are those of any criterion, [O, I] as ``nn.Linear`` keeps its weight (O outputs, I inputs), not
negative, larger = keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clicktrain.sparsity.granularity import above_cutoff, num_pruned

MAX_BLOCK = 4
"""Blocks are n x n with n < 5."""


def fine_fc(scores: Tensor, threshold: float) -> Tensor:
    """Prune the smallest weights of the whole layer ("Fine FC Pruning"). [O, I] -> bool [O, I]."""
    return above_cutoff(scores.flatten(), num_pruned(scores.numel(), threshold)).view(scores.shape)


def block_fc(scores: Tensor, threshold: float, size: int) -> Tensor:
    """Prune the n x n blocks with the smallest sums ("Block FC Pruning"). [O, I] -> bool [O, I].

    Blocks at the lower and right edge may be smaller. They compete by their mean, which for whole blocks is
    the paper's sum of magnitudes: by their sum the last outputs would always go first.
    """
    outputs, inputs = scores.shape
    pad = (0, -inputs % size, 0, -outputs % size)
    tiles = _tiles(torch.nn.functional.pad(scores, pad), size).sum(dim=(1, 3))
    weights = _tiles(torch.nn.functional.pad(torch.ones_like(scores), pad), size).sum(dim=(1, 3))
    kept = above_cutoff((tiles / weights).flatten(), num_pruned(tiles.numel(), threshold)).view(tiles.shape)
    whole = kept.repeat_interleave(size, dim=0).repeat_interleave(size, dim=1)
    return whole[:outputs, :inputs].contiguous()


def silent_inputs(conv_mask: Tensor, inputs: int) -> Tensor:
    """Inputs of a linear layer that come from filters that are all zero (Figure 3): bool [inputs].

    What a zero filter gives is zero, or with a bias or batch norm behind it a constant, which the linear
    layer's own bias can take over. From the mask [F, C, R, S] of the convolution before; ``inputs`` is a
    multiple of F, filter after filter as ``flatten`` lays them out.
    """
    dead = ~conv_mask.flatten(1).any(dim=1)
    return dead.repeat_interleave(inputs // conv_mask.shape[0])


def linear_mask(
    scores: Tensor, threshold: float, block: int | None = None, silent: Tensor | None = None
) -> Tensor:
    """Mask of a fully connected layer, [O, I]: eliminated inputs, blocks or weights, then the guarantee.

    Eliminated inputs, ``silent`` [I], count as pruned: "this enables us to get sparsity without having to
    evaluate the weights". Every output keeps at least one input, its best among those that are not silent.
    At a threshold of 0 nothing goes; without ``block`` single weights go.
    """
    if threshold <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if silent is not None:
        scores = scores.masked_fill(silent, 0.0)
    mask = fine_fc(scores, threshold) if block is None else block_fc(scores, threshold, block)
    if silent is not None:
        mask &= ~silent
    return keep_an_input(scores, mask)


def keep_an_input(scores: Tensor, mask: Tensor) -> Tensor:
    """Give outputs that have lost all inputs the best of them back; ties go to the first. Bool [O, I]."""
    best = scores.argmax(dim=1, keepdim=True)
    lost = ~mask.any(dim=1, keepdim=True)
    return mask | torch.zeros_like(mask).scatter_(1, best, True) & lost


def num_blocks(shape: tuple[int, int], size: int) -> int:
    """Blocks of a layer [O, I], the smaller ones at its edges included."""
    return -(-shape[0] // size) * -(-shape[1] // size)


def _tiles(matrix: Tensor, size: int) -> Tensor:
    """[O, I] -> [O / size, size, I / size, size]."""
    outputs, inputs = matrix.shape
    return matrix.reshape(outputs // size, size, inputs // size, size)
