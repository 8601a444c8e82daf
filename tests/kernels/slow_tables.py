"""Tables of a layer in plain Python loops, kernel by kernel: what the fast ones have to equal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps, split_kernel

Part = tuple[int, int, int, tuple[int, ...]]
"""Filter, channel of all groups, pattern, places of its weights among the packed values."""


def parts(mask: Tensor, tap_patterns: tuple[Taps, ...], groups: int) -> list[Part]:
    filters, channels = mask.shape[:2]
    found, place = [], 0
    for f in range(filters):
        for c in range(channels):
            taps = tuple(mask[f, c].flatten().nonzero().flatten().tolist())
            where = {tap: place + i for i, tap in enumerate(taps)}
            place += len(taps)
            channel = c + f // max(filters // groups, 1) * channels
            for number in split_kernel(taps, tap_patterns):
                found.append((f, channel, number, tuple(where[tap] for tap in tap_patterns[number])))
    return found


def by_result(
    every: list[Part], backward: bool, count: int
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Rows, entries and order of the forward pass, or of dgrad."""
    rows, entries, order = [], [], []
    for result in range(count):
        rows.append([len(entries), len(order)])
        own = [one for one in every if one[1 if backward else 0] == result]
        for part in sorted(own, key=lambda one: (one[2], one[0 if backward else 1])):
            entries.append([part[0 if backward else 1], part[2]])
            order.extend(part[3])
    return [*rows, [len(entries), len(order)]], entries, order


def by_kernel(
    every: list[Part], filters: int, channels: int, block: int
) -> tuple[list[int], list[list[int]], list[int]]:
    """Rows, entries and order of wgrad."""
    rows, entries, order = [], [], []
    for number in range(-(-filters // block)):
        for channel in range(channels):
            rows.append(len(entries))
            own = [one for one in every if one[0] // block == number and one[1] == channel]
            for part in sorted(own, key=lambda one: (one[2], one[0])):
                entries.append([channel, part[0], part[2]])
                order.extend(part[3])
    return [*rows, len(entries)], entries, order


def weights(mask: Tensor, groups: int) -> Iterator[tuple[int, int, int, int]]:
    """Filter, channel of all groups, tap and place of every kept weight."""
    filters, channels = mask.shape[:2]
    for place, (f, c, tap) in enumerate(mask.flatten(2).nonzero().tolist()):
        yield f, c + f // max(filters // groups, 1) * channels, tap, place


def random_mask(kind: str, shape: tuple[int, int, int, int], density: float, seed: int) -> Tensor:
    """Single weights, whole kernels, or kernels of two patterns."""
    generator = torch.Generator().manual_seed(seed)
    f, c, r, s = shape
    if kind == "weight":
        return torch.rand(shape, generator=generator) < density
    kernels = torch.rand(f, c, 1, 1, generator=generator) < density
    if kind == "kernel":
        return kernels.expand(shape).contiguous()
    one = torch.rand(f, c, 1, 1, generator=generator) < 0.5
    first, second = torch.zeros(r * s, dtype=torch.bool), torch.zeros(r * s, dtype=torch.bool)
    first[: max(r * s // 2, 1)], second[r * s // 2 :] = True, True
    return kernels & torch.where(one, first.view(r, s), second.view(r, s))


def patterns_of(kind: str, r: int, s: int) -> tuple[Taps, ...]:
    """What such kernels may keep; none of them for any."""
    if kind == "weight":
        return ()
    if kind == "kernel":
        return (tuple(range(r * s)),)
    return tuple(range(max(r * s // 2, 1))), tuple(range(r * s // 2, r * s))
