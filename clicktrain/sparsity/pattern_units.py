"""Patterns as units of dynamic sparse training: kernels that live on one pattern of a pool each.

A kernel that lives keeps the positions of one pattern (ClickTrain section 2.1); kernels are dropped and grown
whole. A kernel that grows takes the pattern in which its gradient is largest, and a share of those that stay
exchange their smallest position for the one with the largest gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clicktrain.sparsity.finalize import best_patterns, pattern_mask
from clicktrain.sparsity.patterns import PatternPool, fixed_pool
from clicktrain.sparsity.regrowth import keep_largest


class Rearranged(NamedTuple):
    """Masks after units have been dropped and grown."""

    mask: Tensor
    """bool [F, C, R, S]."""
    changed: int
    """Kernels that stayed and changed their pattern."""


@dataclass(frozen=True, slots=True)
class PatternUnit:
    """A kernel and its pattern, of a pool; with the methods of `clicktrain.sparsity.units.Unit`."""

    pool: PatternPool

    def shape(self, view: Sequence[int]) -> tuple[int, ...]:
        """Shape of the units of a layer: [F, C, 1, 1]."""
        return (view[0], view[1], 1, 1)

    def size(self, view: Sequence[int]) -> int:
        """Weights that live in a kernel."""
        del view
        return self.pool.entries

    def scores(self, scores: Tensor) -> Tensor:
        """Mean score inside each kernel's best pattern."""
        table = _tables(self.pool, str(scores.device)).masks.flatten(1).to(scores)
        best = (table @ scores.flatten(2).flatten(0, 1).T).amax(dim=0)
        return best.view(*scores.shape[:2], 1, 1) / self.pool.entries

    def own_scores(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Mean score inside each kernel's own pattern, of a mask of weights; 0 if the kernel is pruned."""
        return (scores * mask).sum(dim=(2, 3), keepdim=True) / self.pool.entries

    def units(self, mask: Tensor) -> Tensor:
        """Kernels that live, from a mask of weights."""
        return mask.flatten(2).any(dim=2)[..., None, None]

    def weights(self, units: Tensor, view: Sequence[int]) -> Tensor:
        """Mask of weights from a mask of kernels, each with the first pattern of the pool."""
        return (units & self.pool.masks()[0].to(units.device)).expand(*view).contiguous()

    def first(self, units: Tensor, scores: Tensor) -> Tensor:
        """Mask of weights, each kept kernel with its best pattern.

        [F, C, 1, 1], [F, C, R, S] -> bool [F, C, R, S].
        """
        tables = _tables(self.pool, str(scores.device))
        return pattern_mask(best_patterns(scores, tables.masks), units[..., 0, 0], tables.masks.bool())

    def rearranged(
        self,
        before: Tensor | None,
        kept: Tensor,
        alive: Tensor,
        scores: Tensor,
        gradients: Tensor,
        rows: int = 1,
    ) -> Rearranged:
        """The mask of weights after kernels were dropped and grown.

        A kernel that has grown takes the pattern with the largest sum of gradients. As large a share of the
        kernels that stayed as has grown may change theirs, those whose change costs least: to a pattern that
        shares as many positions as any other of the pool does (all but one, where the pool has such), first
        without the smallest score, then with the largest gradient. Where the positions given up have the
        larger gradient a kernel keeps its pattern.

        Args:
            before: bool [F, C, R, S]; None: kernels were whole, and those that stay take their best patterns.
            kept: kernels that were not dropped, bool [F, C, 1, 1].
            alive: these and those that have grown.
            scores: of the weights, larger = keep, [F, C, R, S].
            gradients: magnitudes, or random numbers, [F, C, R, S].
            rows: parts of the layer of which equally many change, or 1.
        """
        table = _tables(self.pool, str(scores.device))
        stay, grown = kept[..., 0, 0], (alive & ~kept)[..., 0, 0]
        # Most kernels are pruned: only the others are looked at.
        stayed, has_grown = (which.nonzero(as_tuple=True) for which in (stay, grown))
        weights, pattern = scores[stayed], torch.zeros_like(stay, dtype=torch.int64)
        old = best_patterns(weights[None], table.masks)[0] if before is None else self.ids(before[stayed])
        slopes = gradients[has_grown].to(scores)
        pattern[has_grown] = best_patterns(slopes[None], table.masks)[0]
        count, new = len(old) * len(slopes) // max(len(old) + len(slopes), 1), old
        if before is not None and count and len(self.pool) > 1:
            overlap, cost = _cheapest((weights * table.masks[old]).flatten(1), old, table)
            costs = cost.new_zeros(stay.shape).index_put(stayed, cost)
            gives = ~keep_largest(costs, stay, len(old) - count, rows)[stayed]
            slopes = gradients[stayed][gives].to(scores).flatten(1)
            new = old.masked_scatter(gives, _steepest(slopes, old[gives], overlap[gives], table))
        pattern[stayed] = new
        mask = pattern_mask(pattern, alive[..., 0, 0], table.masks.bool())
        return Rearranged(mask, int((new != old).sum()))

    def ids(self, mask: Tensor) -> Tensor:
        """Pattern of each kernel, an index of the pool: bool [..., R, S] -> int64 [...]; 0 if pruned."""
        table = _tables(self.pool, str(mask.device)).masks.flatten(1)
        return (mask.flatten(-2).to(table.dtype) @ table.T).argmax(dim=-1)


class _Tables(NamedTuple):
    """What a pool's exchanges need; P patterns, U sets of positions that two neighbors share."""

    masks: Tensor
    """float32 [P, R, S]."""
    shared: Tensor
    """float32 [U, RS]."""
    allowed: Tensor
    """bool [P, U]: what a pattern may keep at an exchange."""
    meets: Tensor
    """int64 [P, P]: which of U a pattern and another share, -1 if they are not neighbors."""


@functools.lru_cache(maxsize=32)
def _tables(pool: PatternPool, device: str) -> _Tables:
    masks = pool.masks().float()
    bits = [pattern.bits for pattern in pool.patterns]
    overlap = [[(a & b).bit_count() if a != b else -1 for b in bits] for a in bits]
    sets: dict[int, int] = {}
    meets = torch.full((len(bits), len(bits)), -1)
    for a, row in enumerate(overlap):
        for b, size in enumerate(row):
            if size >= 0 and size == max(row):
                meets[a, b] = sets.setdefault(bits[a] & bits[b], len(sets))
    positions = masks[0].numel()
    shared = torch.tensor([[one >> i & 1 for i in range(positions)] for one in sets], dtype=torch.float32)
    allowed = torch.zeros(len(bits), max(len(sets), 1), dtype=torch.bool)
    for a in range(len(bits)):
        allowed[a, meets[a][meets[a] >= 0]] = True
    return _Tables(*(part.to(device) for part in (masks, shared, allowed, meets)))


def _cheapest(own: Tensor, pattern: Tensor, table: _Tables) -> tuple[Tensor, Tensor]:
    """What each kernel would keep at an exchange, an index of U, and the score that it would give up: [K].

    ``own`` [K, RS] are the scores inside the present pattern. Ties go to the first set.
    """
    given_up = (own @ (1 - table.shared).to(own).T).masked_fill(~table.allowed[pattern], torch.inf)
    cost, overlap = given_up.min(dim=-1)
    return overlap, cost


def _steepest(gradients: Tensor, old: Tensor, overlap: Tensor, table: _Tables) -> Tensor:
    """The pattern with the largest gradient among those that keep a set of positions, the old one included.

    ``gradients`` [K, RS], ``old`` and ``overlap`` [K]. Ties go to the old pattern, then to the first.
    """
    sums = gradients @ table.masks.flatten(1).to(gradients).T
    before = sums.gather(1, old[:, None])
    sums = sums.masked_fill(table.meets[old] != overlap[:, None], -torch.inf)
    best, new = sums.max(dim=1)
    return torch.where(best > before[:, 0], new, old)


USUAL = PatternUnit(fixed_pool(12))
"""The unit of ``granularity pattern`` where a method says nothing else."""
