"""Which tiles are worth measuring for a layer, the likeliest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import ConvProblem, Phase
from clicktrain.kernels.sparse_conv2d.batch_innermost.plan import Indexes
from clicktrain.kernels.sparse_conv2d.batch_innermost.roofline import GPUS, H200, Gpu, Prediction, predict
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import Tile

MOST = 5
"""Tiles that are measured for each phase: each takes seconds to compile, once for all layers."""

LINE = 64
"""Images of one position in a tile that goes through L1: a cache line of 16-bit numbers."""
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
_ROWS = tuple(
    Tile("rows", m, bq, 1, warps, 2, images=32)  # a cache line of float32: neighboring taps meet in L1
    for m, bq, warps in ((16, 256, 4), (8, 256, 2), (4, 256, 1), (16, 128, 4))
)
_ROW_WGRADS = tuple(
    Tile("rows", 1, bq, bk, warps, 2, images=32) for bk, bq, warps in ((32, 128, 4), (16, 128, 2))
)
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
    """Those that may: tf32 only where PyTorch's own convolutions may use it.

    Products come in a second form, for L1: tiles of several positions, where neighboring taps read the same.
    """
    found = candidate_tiles(phase, problem.activation_dtype)
    found = [tile for tile in found if tile.precision == "ieee" or torch.backends.cudnn.allow_tf32]
    found = [replace(tile, images=0) if tile.images > problem.batch else tile for tile in found]
    if phase == "wgrad" or problem.kernel == (1, 1) or problem.batch < LINE:
        return found
    wide = [tile for tile in found if tile.code == "blocks" and tile.bq > LINE]
    return [*found, *(replace(tile, cached=True, images=LINE) for tile in wide)]


def choose(
    phase: Phase,
    structure: Structure,
    problem: ConvProblem,
    gpu: Gpu = H200,
    most: int = MOST,
    code: str = "",
) -> list[Chosen]:
    """The tiles of a phase, all or of one code, that should be fastest by the model, the best first."""
    indexes = Indexes.of(structure, problem)
    rows = problem.channels if phase == "dgrad" else problem.filters
    found = []
    for tile in tiles_for(phase, problem):
        if code not in ("", tile.code):
            continue
        if tile.code == "blocks" and tile.m > 16 and tile.m >= 2 * rows:
            continue
        found.append(Chosen(tile, predict(phase, problem, indexes.get(phase, tile), tile, gpu)))
    found.sort(key=lambda one: one.prediction.seconds)
    return found[:most]


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
    return {
        phase: given[phase] if phase in given else _by_rule(phase, structure, problem) for phase in phases
    }


_RULED: dict[tuple[Phase, ConvProblem], Tile] = {}
"""What was chosen for a problem stays, whatever a mask that moves becomes."""


def _by_rule(phase: Phase, structure: Structure, problem: ConvProblem) -> Tile:
    key = phase, replace(problem, density=0.0, patterns=1, equal_filters=True)
    if key not in _RULED:
        _RULED[key] = choose(phase, structure, problem, gpu_here(structure.device), 1)[0].tile
    return _RULED[key]
