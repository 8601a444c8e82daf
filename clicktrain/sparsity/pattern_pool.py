"""Pattern pools from scores: ClickTrain's dynamic generation (section 4.2, Figure 6), natural patterns."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from clicktrain.sparsity.patterns import PatternPool, neighbor_table

_BINCOUNT_POSITIONS = 16  # up to 2**16 bins counting beats sorting
_CHUNK = 8192  # kernels at a time: the working set stays in a CPU's cache
_LOW = 63  # mask of the bits that hold a position


@functools.lru_cache(maxsize=64)
def _tables(shape: tuple[int, int], device: str) -> tuple[Tensor, Tensor, int]:
    """Allowed second positions [RS, RS] and candidate positions [RS, RS*RS], as all-ones or zero int64.

    Also the smallest number of candidates that any pair of first and second position has.
    """
    near8, near4 = neighbor_table(shape, True), neighbor_table(shape, False)
    size = near8.shape[0]
    eye = torch.eye(size, dtype=torch.bool)
    pairs = (
        (near4[:, None, :] | near4[None, :, :]) & ~eye[:, None, :] & ~eye[None, :, :]
    )  # [first, second, RS]
    smallest = int(pairs.sum(dim=-1)[near8].min()) if size > 1 else 0
    second = -near8.T.to(torch.int64)
    candidates = -pairs.reshape(size * size, size).T.to(torch.int64)
    return second.contiguous().to(device), candidates.contiguous().to(device), smallest


def candidate_patterns(importance: Tensor, entries: int) -> Tensor:
    """Best candidate pattern of every kernel: steps 1 to 4 of ClickTrain section 4.2.

    1 the most important position; 2 the best of its 8 neighbors; 3 the 4-neighbors of both are the
    candidate positions; 4 the best combination of ``entries - 2`` candidates. As a pattern's score is a sum
    over its positions, the best combination is that of the best candidates. Where a kernel has fewer
    candidates than are needed, all are taken and the neighborhood grows from the positions chosen so far
    (the paper has 4 entries in 3 x 3 kernels only, where this cannot happen).

    Args:
        importance: [F, C, R, S], not negative, compared in float32. Ties go to the lowest position.
        entries: positions to keep, 1 <= entries <= R*S.

    Returns:
        int64 [F, C], pattern bits: bit ``r * S + s`` = position (r, s) kept.
    """
    f, c, r, s = importance.shape
    size = r * s
    if not 1 <= entries <= size:
        raise ValueError(f"entries must be in 1..{size} for kernels of {r}x{s}, got {entries}")
    if entries == size:
        return torch.full((f, c), (1 << size) - 1, dtype=torch.int64, device=importance.device)
    # Overflow and -0.0 order like other numbers here, and what is not a number does not matter.
    flat = importance.reshape(f * c, size).float().abs().nan_to_num_(nan=0.0)
    chunk = _CHUNK if importance.device.type == "cpu" else f * c
    parts = [_best_candidates(part, entries, (r, s)) for part in torch.split(flat, chunk)]
    return torch.cat(parts).view(f, c)


def _best_candidates(scores: Tensor, entries: int, shape: tuple[int, int]) -> Tensor:
    """`candidate_patterns` for float32 scores [K, RS].

    A non-negative float32 leaves the low 29 bits of its float64 form zero, and such forms order like
    integers; the position is written there, so that one maximum gives value, position and tie-breaking (an
    arg-maximum over few rows is 200 times slower than a maximum).
    """
    size = scores.shape[1]
    second_table, candidate_table, smallest = _tables(shape, str(scores.device))
    positions = torch.arange(size, device=scores.device)[:, None]
    keys = scores.T.double().contiguous().view(torch.int64) | (_LOW - positions)  # [RS, K]

    def best(among: Tensor) -> tuple[Tensor, Tensor]:
        top = among.amax(dim=0)
        return top, _LOW - (top & _LOW)

    _, first = best(keys)
    bits = _bit(first)
    if entries == 1:
        return bits
    _, second = best(keys & second_table.index_select(1, first))
    bits |= _bit(second)
    among = keys & candidate_table.index_select(1, first * size + second)
    for _ in range(entries - 2):
        if smallest < entries - 2:
            among = _grow_where_empty(among, bits, keys, shape)
        top, position = best(among)
        among.masked_fill_(among == top, 0)
        bits |= _bit(position)
    return bits


def _bit(position: Tensor) -> Tensor:
    return torch.bitwise_left_shift(torch.ones_like(position), position)


def _grow_where_empty(among: Tensor, bits: Tensor, keys: Tensor, shape: tuple[int, int]) -> Tensor:
    """Open the 4-neighbors of the chosen positions for those kernels that have no candidate left."""
    positions = torch.arange(keys.shape[0], device=bits.device)[:, None]
    chosen = (bits[None, :] >> positions) & 1  # [RS, K]
    near = neighbor_table(shape, False).to(device=bits.device, dtype=torch.float32)
    grown = torch.where((near @ chosen.float() > 0) & (chosen == 0), keys, 0)
    return torch.where((among == 0).all(dim=0), grown, among)


def natural_patterns(importance: Tensor, entries: int) -> Tensor:
    """Natural pattern of every kernel: its center and the best of its other positions.

    How PatDNN (Niu et al. 2020, "Pattern set design") finds the patterns of a trained network, by magnitude;
    with 4 of 9 positions there are 56. Kernels with an even side have no center, and keep their best.

    Args:
        importance: [F, C, R, S], not negative. Ties go to the lowest position.
        entries: positions to keep, 1 <= entries <= R*S.

    Returns:
        int64 [F, C], pattern bits: bit ``r * S + s`` = position (r, s) kept.
    """
    f, c, r, s = importance.shape
    if not 1 <= entries <= r * s:
        raise ValueError(f"entries must be in 1..{r * s} for kernels of {r}x{s}, got {entries}")
    scores = importance.reshape(f, c, r * s).float().nan_to_num(nan=0.0)
    if r % 2 and s % 2:
        scores[..., r * s // 2] = torch.inf
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :entries]
    return _bit(best).sum(dim=-1)


class PatternVotes(NamedTuple):
    """Competitive scores of the candidate patterns of one kernel shape, sorted by bits."""

    bits: Tensor  # int64 [M]
    counts: Tensor  # int64 [M]

    @classmethod
    def empty(cls, device: torch.device | None = None) -> PatternVotes:
        """No candidates yet."""
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(none, none)


def add_votes(votes: PatternVotes, bits: Tensor, shape: tuple[int, int]) -> PatternVotes:
    """Add one batch's candidates to the competitive scores: steps 4 and 5 of ClickTrain section 4.2.

    ``bits`` is int64 of any shape, one candidate pattern per R x S kernel.
    """
    if shape[0] * shape[1] <= _BINCOUNT_POSITIONS:
        counts = torch.bincount(bits.flatten(), minlength=1 << shape[0] * shape[1])
        if votes.bits.numel():
            counts.index_add_(0, votes.bits, votes.counts)
        seen = counts.nonzero().squeeze(1)
        return PatternVotes(seen, counts[seen])
    new, new_counts = torch.unique(bits.flatten(), return_counts=True)
    merged, where = torch.unique(torch.cat((votes.bits, new)), return_inverse=True)
    total = torch.zeros_like(merged).index_add_(0, where, torch.cat((votes.counts, new_counts)))
    return PatternVotes(merged, total)


def select_pool(votes: PatternVotes, size: int, shape: tuple[int, int]) -> PatternPool:
    """The ``size`` patterns with the highest competitive scores: step 6 of ClickTrain section 4.2.

    Ties go to the lowest bits; a smaller pool results when fewer patterns were ever proposed.
    """
    order = torch.sort(votes.counts, descending=True, stable=True).indices[:size]
    return PatternPool.from_bits(votes.bits[order].tolist(), shape)
