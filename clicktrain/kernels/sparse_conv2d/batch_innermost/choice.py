"""Which tiles are worth measuring for a layer, the likeliest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import ConvProblem, Phase
from clicktrain.kernels.sparse_conv2d.batch_innermost.index import entries_of
from clicktrain.kernels.sparse_conv2d.batch_innermost.passes import Pass, dgrad_passes, forward_pass
from clicktrain.kernels.sparse_conv2d.batch_innermost.plan import Index, index_of
from clicktrain.kernels.sparse_conv2d.batch_innermost.roofline import GPUS, H200, Gpu, Prediction, predict
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import Tile

MOST = 5
"""Tiles that are measured for each phase: each takes seconds to compile, once for all layers."""

_PRODUCTS = tuple(
    Tile("blocks", m, bq, bk, warps, stages)
    for m, bq, bk, warps, stages in (
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (64, 256, 64, 8, 3),
        (64, 256, 32, 4, 3),
        (64, 128, 64, 4, 3),
        (64, 128, 32, 4, 5),
        (32, 256, 32, 4, 3),
        (32, 128, 32, 4, 5),
        (16, 256, 32, 4, 3),
        (16, 128, 32, 4, 5),
    )
)
_WGRADS = tuple(
    Tile("blocks", m, bq, bk, warps, stages)
    for m, bq, bk, warps, stages in (
        (128, 64, 128, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 64, 128, 4, 3),
        (64, 64, 64, 4, 4),
        (64, 128, 64, 4, 3),
        (32, 64, 64, 4, 4),
        (16, 64, 64, 4, 4),
    )
)
_ROWS = tuple(Tile("rows", m, bq, 1, 4, 2) for m, bq in ((8, 256), (16, 128), (8, 128), (4, 256)))
_ROW_WGRADS = tuple(Tile("rows", 1, bq, bk, 4, 2) for bk, bq in ((16, 128), (8, 256), (32, 128)))
_CHECKS = (Tile("blocks", 16, 128, 16, 4, 2), Tile("rows", 8, 128, 8, 4, 2))
"""For float64, which is for checks."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A tile, and what it is expected to take."""

    tile: Tile
    prediction: Prediction


def candidate_tiles(phase: Phase, dtype: torch.dtype) -> list[Tile]:
    """All tiles that could run a phase on activations of a dtype."""
    wgrad = phase == "wgrad"
    if dtype is torch.float64:
        return [*_CHECKS]
    found = _WGRADS if wgrad else _PRODUCTS
    if dtype is not torch.float32:
        return [*found]
    # Four bytes a number: half as many of them, to fit. Float32 products outside the tensor cores need
    # registers for their operands too.
    half = [replace(tile, bk=max(tile.bk // 2, 16), bq=max(tile.bq // 2, 32)) for tile in found]
    plain = [replace(tile, bk=16) for tile in half if tile.m <= 64]
    tf32 = [replace(tile, precision="tf32") for tile in half]
    return list(dict.fromkeys([*plain, *tf32, *(_ROW_WGRADS if wgrad else _ROWS)]))


def tiles_for(phase: Phase, problem: ConvProblem) -> list[Tile]:
    """Those that may: tf32 only where PyTorch's own convolutions may use it."""
    found = candidate_tiles(phase, problem.activation_dtype)
    return [tile for tile in found if tile.precision == "ieee" or torch.backends.cudnn.allow_tf32]


def choose(
    phase: Phase, structure: Structure, problem: ConvProblem, gpu: Gpu = H200, most: int = MOST
) -> list[Chosen]:
    """The tiles of a phase that should be fastest, by the roofline model, the best first."""
    forward, backward = entries_of(structure, problem.groups)
    entries = backward if phase == "dgrad" else forward
    passes = dgrad_passes(problem) if phase == "dgrad" else [forward_pass(problem)]
    indexes: dict[tuple[str, int, int], list[tuple[Pass, Index]]] = {}
    found = []
    for tile in tiles_for(phase, problem):
        if tile.code == "blocks" and tile.m > 16 and tile.m >= 2 * entries.row_count:
            continue
        key = tile.code, tile.m, tile.bk
        if key not in indexes:
            indexes[key] = [
                (one, index_of(entries, one, tile, structure.nnz, structure.patterns is None))
                for one in passes
            ]
        found.append(Chosen(tile, predict(phase, problem, indexes[key], tile, gpu)))
    found.sort(key=lambda one: one.prediction.seconds)
    return _with_cache(phase, found[:most])


def _with_cache(phase: Phase, found: Sequence[Chosen]) -> list[Chosen]:
    """The best product also through L1: whether neighboring taps meet there only a measurement can say."""
    if phase == "wgrad" or not found or found[0].tile.code == "rows":
        return list(found)
    twin = replace(found[0], tile=replace(found[0].tile, cached=True))
    return [found[0], twin, *found[1:]]


def gpu_here(device: torch.device) -> Gpu:
    """The GPU of a device as the model knows it; the H200 for others, and where there is none."""
    if device.type != "cuda":
        return H200
    major, minor = torch.cuda.get_device_capability(device)
    return GPUS.get(10 * major + minor, GPUS.get(10 * major, H200))


def tiles_by_rule(
    structure: Structure, problem: ConvProblem, given: Mapping[Phase, Tile], phases: Sequence[Phase]
) -> dict[Phase, Tile]:
    """The given tiles, and for other phases the model's first choice."""
    gpu = gpu_here(structure.device)
    return {
        phase: given[phase] if phase in given else choose(phase, structure, problem, gpu, 1)[0].tile
        for phase in phases
    }
