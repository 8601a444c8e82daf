"""What masks look like, in a few numbers per layer, and masks that look the same.

The time of a pruned network depends on how many kernels each filter keeps, on their patterns and on which
filters share them, but not on which kernels these are. So a few numbers per layer stand for the masks of a
run, and its network can be timed on another machine, without its weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_PATTERNS = 24
"""A layer with more patterns, of different numbers of weights, is described by the weights of each filter."""
_GROUPS = (16, 8, 4, 2)

LayerStructure = dict[str, Any]
"""JSON-able: ``layer``, ``shape`` [F, C, ...], ``kept`` weights, ``group`` (neighboring filters that keep the
same positions), ``counts`` [[units kept, groups of filters], ...], and ``patterns`` [[bits, kernels], ...] if
units are kernels with patterns; else they are weights."""


def describe_masks(masks: Mapping[str, Tensor]) -> list[LayerStructure]:
    """Describe masks: layer name -> bool [F, C, R, S] or [O, I], True = kept."""
    return [_describe(name, mask) for name, mask in masks.items()]


def similar_masks(layers: Sequence[LayerStructure], seed: int = 0) -> dict[str, Tensor]:
    """Masks with random positions that `describe_masks` describes alike."""
    generator = torch.Generator().manual_seed(seed)
    return {layer["layer"]: _build(layer, generator) for layer in layers}


def density_of(layers: Sequence[LayerStructure]) -> float:
    """Kept weights over all weights of the layers described."""
    kept = sum(layer["kept"] for layer in layers)
    return float(kept / max(sum(torch.Size(layer["shape"]).numel() for layer in layers), 1))


def _describe(name: str, mask: Tensor) -> LayerStructure:
    filters = mask.shape[0]
    flat = mask.reshape(filters, -1)
    group = next((g for g in _GROUPS if filters % g == 0 and _shared(flat, g)), 1)
    leaders = mask[::group]
    layer = {"layer": name, "shape": list(mask.shape), "kept": int(mask.sum()), "group": group}
    kernels = leaders.reshape(leaders.shape[0], mask.shape[1], -1)
    positions = kernels.shape[2]
    if positions <= 62:
        bits = (kernels.long() << torch.arange(positions)).sum(2)
        patterns = _histogram(bits[bits != 0])
        if len(patterns) <= MOST_PATTERNS or len({pattern.bit_count() for pattern, _ in patterns}) == 1:
            counts = _histogram((bits != 0).sum(1))
            return {**layer, "counts": counts, "patterns": patterns}
    return {**layer, "counts": _histogram(leaders.flatten(1).sum(1))}


def _shared(flat: Tensor, group: int) -> bool:
    grouped = flat.view(-1, group, flat.shape[1])
    return bool((grouped == grouped[:, :1]).all())


def _histogram(counts: Tensor) -> list[list[int]]:
    return [[value, number] for value, number in sorted(Counter(counts.tolist()).items())]


def _build(layer: LayerStructure, generator: torch.Generator) -> Tensor:
    shape, group = torch.Size(layer["shape"]), layer["group"]
    leaders, channels = shape[0] // group, shape[1]
    counts = torch.cat([torch.full((number,), value) for value, number in layer["counts"]])
    counts = counts[torch.randperm(leaders, generator=generator)]
    positions = shape[2:].numel()
    units = channels if "patterns" in layer else channels * positions
    order = torch.rand(leaders, units, generator=generator).argsort(1).argsort(1)
    kept = order < counts[:, None]
    if "patterns" in layer:
        bits = torch.cat(
            [torch.full((number,), value) for value, number in layer["patterns"]] or [counts[:0]]
        )
        chosen = torch.zeros(leaders, channels, dtype=torch.long)
        chosen[kept] = bits[torch.randperm(len(bits), generator=generator)]
        kept = (chosen[:, :, None] >> torch.arange(positions) & 1).bool()
    return kept.reshape(leaders, *shape[1:]).repeat_interleave(group, 0).contiguous()
