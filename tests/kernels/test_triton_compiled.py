"""Triton's kernels compiled for GPUs that need not be there: what the compiler made of them."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from clicktrain.errors import UserError
from clicktrain.kernels.impls import Phase
from clicktrain.kernels.sparse_conv2d.batch_innermost.choice import candidate_tiles
from clicktrain.kernels.sparse_conv2d.batch_innermost.compiled import CompiledKernel, compile_for
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import (
    MULTIPROCESSORS,
    Tile,
    programs_at_once,
    registers_of,
    shared_bytes,
)

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LARGE = Tile("blocks", 128, 128, 64, 8, 3)
SMALL = Tile("blocks", 16, 128, 32, 4, 5)


def compiled(phase: Phase, tile: Tile, dtype: torch.dtype, capability: int, **flags: Any) -> CompiledKernel:
    """Compiled, and within what `tiles` computes: no spills, and as many programs at once as it says."""
    kernel = compile_for(phase, tile, dtype, capability, **flags)
    assert kernel.spilled == 0, kernel
    multiprocessor = MULTIPROCESSORS[capability]
    shared = shared_bytes(tile, phase, dtype.itemsize)
    assert kernel.shared <= max(shared, 4 << 10), kernel
    computed = programs_at_once(registers_of(tile, phase), shared, tile.warps, multiprocessor)
    assert 1 <= computed <= kernel.programs + 1, (computed, kernel)
    assert kernel.programs * tile.warps * 32 * kernel.registers <= multiprocessor.registers
    if tile.code == "blocks":
        assert kernel.instructions["cp.async"] > 0, "what is gathered goes through registers"
    return kernel


@pytest.mark.parametrize(
    ("phase", "tile", "dtype", "flags"),
    [
        ("forward", LARGE, BF16, {"RELU": True, "SHIFT": True, "SCALE": True, "RESIDUAL": True}),
        ("wgrad", Tile("blocks", 64, 64, 64, 4, 4), BF16, {}),
    ],
    ids=["forward", "wgrad"],
)
def test_products_run_on_hoppers_tensor_cores(
    phase: Phase, tile: Tile, dtype: torch.dtype, flags: dict[str, bool]
) -> None:
    kernel = compiled(phase, tile, dtype, 90, **flags)
    assert kernel.tensor_cores
    assert kernel.instructions["wgmma"] > 0


def test_rows_by_themselves_take_no_shared_memory() -> None:
    kernel = compiled("forward", Tile("rows", 8, 128, 1, 4, 2), FP32, 90)
    assert not kernel.tensor_cores
    assert kernel.shared == 0
    assert kernel.instructions["vector loads"] > 0


def test_an_unknown_capability_is_refused() -> None:
    with pytest.raises(UserError, match="a compute capability is one of 80, 86, 89, 90, 100, 120, not 70"):
        compile_for("forward", LARGE, BF16, 70)


MORE: list[tuple[Phase, Tile, torch.dtype, dict[str, Any]]] = [
    ("forward", LARGE, FP16, {"SUMS": True}),
    ("forward", replace(LARGE, cached=True), BF16, {"EVEN": False, "images": 32}),
    ("forward", Tile("blocks", 64, 128, 32, 4, 3, "tf32"), FP32, {}),
    ("forward", Tile("blocks", 32, 64, 16, 4, 3), FP32, {}),
    ("forward", SMALL, BF16, {"BIG": True}),
    ("wgrad", Tile("blocks", 64, 64, 64, 4, 3, "tf32"), FP32, {"EVEN": False, "images": 16}),
    ("wgrad", Tile("rows", 1, 128, 16, 4, 2), FP32, {}),
]


@pytest.mark.long
@pytest.mark.parametrize(("phase", "tile", "dtype", "flags"), MORE, ids=lambda one: str(one)[:40])
def test_other_kinds_of_tiles_on_hopper(
    phase: Phase, tile: Tile, dtype: torch.dtype, flags: dict[str, Any]
) -> None:
    kernel = compiled(phase, tile, dtype, 90, **flags)
    wanted = tile.code == "blocks" and (dtype is not FP32 or tile.precision == "tf32")
    assert kernel.tensor_cores == wanted
    assert (kernel.instructions["wgmma"] > 0) == (wanted and tile.m >= 64)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("phase", ["forward", "wgrad"])
def test_every_tile_that_is_measured(phase: Phase, dtype: torch.dtype, capability: int) -> None:
    for tile in candidate_tiles(phase, dtype):
        fits = programs_at_once(
            registers_of(tile, phase),
            shared_bytes(tile, phase, dtype.itemsize),
            tile.warps,
            MULTIPROCESSORS[capability],
        )
        if fits:
            kernel = compiled(phase, tile, dtype, capability)
            assert kernel.tensor_cores == (
                tile.code == "blocks" and (dtype is BF16 or tile.precision == "tf32")
            )
