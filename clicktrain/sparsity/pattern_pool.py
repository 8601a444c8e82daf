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


@functools.lru_cache(maxsize=64)
def _reach(shape: tuple[int, int], entries: int, device: str) -> Tensor:
    """Bits of all positions that candidate patterns may keep, by first and second position: int64 [RS * RS].

    Step 3 of section 4.2: both positions and their 4-neighbors, and on from there while that is too few.
    """
    near8, near4 = neighbor_table(shape, True).tolist(), neighbor_table(shape, False).tolist()
    size, table = len(near8), []
    for first in range(size):
        for second in range(size):
            reach = {first, second} if entries > 1 and near8[first][second] else {first}
            while len(reach) < entries:
                grown = reach | {other for place in reach for other in range(size) if near4[place][other]}
                if grown == reach:
                    break
                reach = grown
            table.append(sum(1 << place for place in reach))
    return torch.tensor(table, device=device)


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
    parts = [_best_candidates(part, entries, (r, s)) for part in _kernels(importance)]
    return torch.cat(parts).view(f, c)


def outside_candidates(importance: Tensor, entries: int) -> Tensor:
    """Positions of every kernel that none of its candidate patterns keeps: the crosses of Figure 6.

    They are neither the first two positions of section 4.2 nor candidate positions, so that they "can be
    determined earlier" than the pattern: 2 to 4 positions of a 3x3 kernel.

    Args:
        importance: [F, C, R, S], as in `candidate_patterns`.
        entries: positions to keep, 1 <= entries <= R*S.

    Returns:
        bool [F, C, R, S], True = outside.
    """
    f, c, r, s = importance.shape
    size = r * s
    if not 1 <= entries <= size:
        raise ValueError(f"entries must be in 1..{size} for kernels of {r}x{s}, got {entries}")
    if entries == size:
        return torch.zeros_like(importance, dtype=torch.bool)
    reach = _reach((r, s), entries, str(importance.device))
    parts = []
    for scores in _kernels(importance):
        _, first, second = _first_two(scores, (r, s))
        parts.append(reach[first * size + second])
    positions = torch.arange(size, device=importance.device)
    return (((torch.cat(parts)[:, None] >> positions) & 1) == 0).view(f, c, r, s)


def _kernels(importance: Tensor) -> tuple[Tensor, ...]:
    """Scores of the kernels, float32 [K, RS] in chunks."""
    f, c, r, s = importance.shape
    # Overflow and -0.0 order like other numbers here, and what is not a number does not matter.
    flat = importance.reshape(f * c, r * s).float().abs().nan_to_num_(nan=0.0)
    return torch.split(flat, _CHUNK if importance.device.type == "cpu" else f * c)


def _first_two(scores: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 and 2: int64 keys [RS, K] and the first two positions [K], for float32 scores [K, RS].

    A non-negative float32 leaves the low 29 bits of its float64 form zero, and such forms order like
    integers; the position is written there, so that one maximum gives value, position and tie-breaking (an
    arg-maximum over few rows is 200 times slower than a maximum).
    """
    size = scores.shape[1]
    second_table = _tables(shape, str(scores.device))[0]
    positions = torch.arange(size, device=scores.device)[:, None]
    keys = scores.T.double().contiguous().view(torch.int64) | (_LOW - positions)
    first = _LOW - (keys.amax(dim=0) & _LOW)
    second = _LOW - ((keys & second_table.index_select(1, first)).amax(dim=0) & _LOW)
    return keys, first, second


def _best_candidates(scores: Tensor, entries: int, shape: tuple[int, int]) -> Tensor:
    """`candidate_patterns` for float32 scores [K, RS]."""
    size = scores.shape[1]
    _, candidate_table, smallest = _tables(shape, str(scores.device))
    keys, first, second = _first_two(scores, shape)
    if entries == 1:
        return _bit(first)
    bits = _bit(first) | _bit(second)
    among = keys & candidate_table.index_select(1, first * size + second)
    for _ in range(entries - 2):
        if smallest < entries - 2:
            among = _grow_where_empty(among, bits, keys, shape)
        top = among.amax(dim=0)
        among.masked_fill_(among == top, 0)
        bits |= _bit(_LOW - (top & _LOW))
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
