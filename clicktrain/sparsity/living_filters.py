"""Filters that live: first positions that respect the initial weights, and no filter without a weight.

A filter whose weights are all zero computes a constant. A batch norm behind it divides by the root of its
epsilon, so that its gradients are 300 times (epsilon 1e-5) to a million times (1e-12) too large: growth by
gradient gives it all there is, and the first step destroys the network. Random positions make such filters
of initial weights that are mostly zero, as the identity has them (``nn.init.dirac_``), and so does dropping
at high sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clicktrain.sparsity.regrowth import largest, random_numbers

OUTSTANDING = 0.5
"""A unit with more than this share of its filter's squared weights is no draw of a random initialization."""
FEW = 16
"""In a filter of so few units only one that holds everything is outstanding."""


def random_units(
    shape: Sequence[int], count: int, seed: int, layer: int, rows: int = 1, first: Tensor | None = None
) -> Tensor:
    """Units that live at the beginning, at random: bool on the CPU.

    Args:
        shape: of the units.
        count: how many live.
        seed, layer: what the draw depends on.
        rows: parts of the layer with equally many units, or 1.
        first: bool, units that live before any other.
    """
    numbers = random_numbers(shape, seed, 0, layer)
    if first is not None:
        numbers = numbers + first.cpu().double()
    return largest(numbers, count, rows)


def outstanding_units(energies: Tensor) -> Tensor:
    """Units that dominate their filter's initial weights: sums of squares [F, ...] -> bool.

    One of a filter at the most: the 1 of the identity. Weights that are drawn alike have none.
    """
    table = energies.flatten(1)
    share = table / table.sum(dim=1, keepdim=True).clamp_min(torch.finfo(table.dtype).tiny)
    least = min(max(OUTSTANDING, FEW / max(table.shape[1], 1)), 0.999)
    return (share > least).view(energies.shape)


def constant_filters(alive: Tensor, scores: Tensor) -> Tensor:
    """Filters that have nonzero units, none of which lives: [F, ...] twice -> bool [F]."""
    living = scores.masked_fill(~alive, 0.0).flatten(1)
    return ~(living > 0).any(dim=1) & (scores > 0).flatten(1).any(dim=1)


def with_living_filters(alive: Tensor, scores: Tensor, order: Tensor, rows: int = 1) -> Tensor:
    """As many units, and no filter without a nonzero one, as far as the units go.

    A filter of which no nonzero unit lives gets its best one, in place of the last of ``order`` among the
    units of the whole layer that are not the best of their filter; with rows in place of one of its own.

    Args:
        alive: bool [F, ...].
        scores: of the same shape, 0 or more; 0 is a unit of zeros.
        order: of the same shape; the smallest goes first, of equal ones the last.
        rows: 1, or F: every filter has a number of units of its own.
    """
    bare = constant_filters(alive, scores)
    if not bool(bare.any()):
        return alive
    table, worth = alive.flatten(1).clone(), scores.flatten(1)
    if rows > 1:
        spare = table & bare[:, None]
    else:
        living = worth.masked_fill(~table, -1.0)
        best = torch.zeros_like(table).scatter_(1, living.argmax(dim=1, keepdim=True), True)
        spare = table & ~(best & (living > 0))
    last = order.flatten(1).to(worth.device).masked_fill(~spare, -torch.inf)
    wanted = bare.nonzero().flatten()
    if rows > 1:
        went = last.masked_fill(~spare, torch.inf).flip(1).argmin(dim=1)
        table[wanted, table.shape[1] - 1 - went[wanted]] = False
    else:
        wanted = wanted[: int(spare.sum())]
        table &= ~spare | largest(last, int(spare.sum()) - len(wanted))
    table[wanted, worth[wanted].argmax(dim=1)] = True
    return table.view(alive.shape)
