"""Tap patterns that code is generated for, and the splitting of a layer's kernels into them.

A kernel keeps some of its R*S positions. With patterns (ClickTrain section 4.2) a layer has few different
sets of them, and each gets code of its own with all offsets known. A mask without patterns has many: then the
frequent ones get code, and single taps make up the rest, so that one mechanism serves every mask. While
positions move, the code has to serve every mask that may come: it is for the patterns that the structure
names, or for single taps.
"""

from __future__ import annotations

import numpy as np
import torch

from clicktrain.formats.packed import Patterns, Structure

MAX_PATTERNS = 16
"""Tap patterns with code of their own; more would not fit the instruction cache."""
MAX_TAPS = 9
"""Taps of one pattern: their weights stay in registers."""

Taps = tuple[int, ...]


def choose(structure: Structure) -> tuple[Taps, ...]:
    """Choose the tap patterns to generate code for, ascending; none for a layer without weights.

    All of the layer's if they are few and small, else the most frequent ones and single taps. Where positions
    move, all that the layer's kernels may ever have, if these are few and small, else single taps.
    """
    if structure.patterns is not None:
        return _choose_for_all(structure.patterns, structure.shape[2] * structure.shape[3])
    kernels = structure.mask().cpu().flatten(2).flatten(0, 1)
    alive = kernels[kernels.any(1)]
    if not len(alive):
        return ()
    rows, counts = torch.unique(alive, dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True).tolist()
    patterns = [tuple(rows[i].nonzero().flatten().tolist()) for i in order]
    small = [one for one in patterns if len(one) <= MAX_TAPS]
    if len(small) == len(patterns) <= MAX_PATTERNS:
        return tuple(sorted(small))
    singles = [(tap,) for tap in range(kernels.shape[1]) if bool(alive[:, tap].any())]
    room = max(MAX_PATTERNS - len(singles), 0)
    frequent = [one for one in small if len(one) > 1][:room]
    return tuple(sorted({*singles, *frequent}))


def is_complete(structure: Structure, tap_patterns: tuple[Taps, ...]) -> bool:
    """Whether every kernel of a layer has one of the patterns, so that none has to be split."""
    if structure.patterns is not None:
        singles = structure.shape[2] * structure.shape[3] == 1
        return singles or (bool(structure.patterns) and set(structure.patterns) <= set(tap_patterns))
    return all(taps in tap_patterns for taps in distinct(structure))


def _choose_for_all(patterns: Patterns, positions: int) -> tuple[Taps, ...]:
    small = all(len(one) <= MAX_TAPS for one in patterns)
    if patterns and small and len(patterns) <= MAX_PATTERNS:
        return tuple(sorted(set(patterns)))
    return tuple((tap,) for tap in range(positions))


def distinct(structure: Structure) -> set[Taps]:
    """The different tap patterns of a layer's kernels; none for kernels without weights.

    Where positions move, those that they may have: see `Structure.patterns`.
    """
    r, s = structure.shape[2:]
    if structure.patterns is not None:
        return set(structure.patterns or ((tap,) for tap in range(r * s)))
    kernels = structure.mask().cpu().numpy().reshape(-1, r * s)
    packed = np.packbits(kernels, axis=1)
    _, first = np.unique(packed.view(f"V{packed.shape[1]}"), return_index=True)
    return {taps for i in first if (taps := tuple(np.nonzero(kernels[i])[0].tolist()))}


def split_kernel(kernel: Taps, tap_patterns: tuple[Taps, ...]) -> list[int]:
    """Indices of a few disjoint tap patterns that make up a kernel; ValueError if none has some tap."""
    left = set(kernel)
    parts = []
    for number in sorted(range(len(tap_patterns)), key=lambda i: (-len(tap_patterns[i]), i)):
        if left and left.issuperset(tap_patterns[number]):
            parts.append(number)
            left.difference_update(tap_patterns[number])
    if left:
        raise ValueError(f"no code for the taps {sorted(left)}")
    return parts
