"""Tables of Triton's kernels against slow, literal ones, tiles, and the model that orders them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import PHASES, ConvProblem
from clicktrain.kernels.sparse_conv2d import IMPLS
from clicktrain.kernels.sparse_conv2d.batch_innermost.choice import choose
from clicktrain.kernels.sparse_conv2d.batch_innermost.index import FILLING, Blocks, blocks_of, entries_of
from clicktrain.kernels.sparse_conv2d.batch_innermost.passes import dgrad_passes, forward_pass
from clicktrain.kernels.sparse_conv2d.batch_innermost.roofline import A100, H200
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import Tile, programs_at_once, read_tile

SIZES = [
    {"padding": (1, 1)},
    {"stride": (2, 3), "padding": (2, 0), "dilation": (1, 2)},
    {"padding": "same", "dilation": (2, 1)},
]


def problem_of(mask: Tensor, image: tuple[int, int] = (5, 7), batch: int = 2, **more: Any) -> ConvProblem:
    return ConvProblem.of_structure(Structure.from_mask(mask), image, batch, **more)


def dense(blocks: Blocks, m: int, bk: int, values: Tensor) -> Tensor:
    """[blocks, M, keys of the longest] as the kernel multiplies it, from the order of its tiles."""
    tiles = torch.cat([values, values.new_zeros(1)])[blocks.places].view(-1, m, bk)
    starts = (blocks.starts // bk).tolist()
    longest = max(b - a for a, b in itertools.pairwise(starts))
    result = values.new_zeros(len(starts) - 1, m, max(longest, 1) * bk)
    for block, (first, last) in enumerate(itertools.pairwise(starts)):
        for at in range(first, last):
            result[block, :, (at - first) * bk : (at - first + 1) * bk] = tiles[at]
    return result


@pytest.mark.parametrize("regroup", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_blocks_say_which_weight_meets_which_position(sizes: dict[str, Any], regroup: bool) -> None:
    torch.manual_seed(0)
    mask = torch.rand(21, 4, 3, 3) < 0.2
    structure, problem = Structure.from_mask(mask), problem_of(mask, **sizes)
    values = torch.arange(1.0, structure.nnz + 1)
    index = {
        tuple(where): value for where, value in zip(mask.nonzero().tolist(), values.tolist(), strict=True)
    }
    given, m, bk = forward_pass(problem), 16, 16
    forward, _ = entries_of(structure, 1)
    blocks = blocks_of(forward, given, structure.nnz, m, bk, regroup)
    weights = dense(blocks, m, bk, values)
    found = {}
    for block in range(len(blocks.starts) - 1):
        first, last = blocks.starts[block : block + 2].tolist()
        for at, row in itertools.product(range(first, last), range(m)):
            value, pair = float(weights[block, row, at - first]), int(blocks.taps[at])
            if pair == FILLING:
                assert value == 0
            elif value:
                down, across = (pair & 0xFFFF) - (pair & 0x8000) * 2, pair >> 16
                source = (int(blocks.offsets[at]) - down * 7 - across) // 35
                tap = next(t for t, offset in given.offsets.items() if offset == (down, across))
                found[int(blocks.rows[block * m + row]), source, tap // 3, tap % 3] = value
    assert found == index
    assert sorted(row for row in blocks.rows.tolist() if row >= 0) == list(range(21))
    gathered = torch.cat([values, values.new_zeros(1)])[blocks.places]
    assert torch.equal(gathered[blocks.tiles], values)


def test_filters_that_share_positions_have_no_zeros_wherever_they_are() -> None:
    torch.manual_seed(0)
    mask = (torch.rand(3, 8, 3, 3) < 0.3).repeat_interleave(32, 0)
    mixed = mask[torch.randperm(96)]
    structure = Structure.from_mask(mixed)
    forward, backward = entries_of(structure, 1)
    given = forward_pass(problem_of(mixed, padding=(1, 1)))
    together = blocks_of(forward, given, structure.nnz, 32, 16, True)
    apart = blocks_of(forward, given, structure.nnz, 32, 16, False)
    zeros = together.keys * 32 - structure.nnz
    assert 0 <= zeros < 3 * 16 * 32, "more than what fills up the last keys of three blocks"
    assert apart.kept < together.kept / 1.5
    shared = (torch.rand(4, 3, 3, 3) < 0.3).repeat_interleave(16, 0).repeat_interleave(16, 1)
    structure = Structure.from_mask(shared)
    _, backward = entries_of(structure, 1)
    (one,) = dgrad_passes(problem_of(shared, padding=(1, 1)))
    assert blocks_of(backward, one, structure.nnz, 16, 16, True).kept == pytest.approx(1.0)


def test_the_passes_of_dgrad_write_each_position_once() -> None:
    for sizes in SIZES:
        problem = problem_of(torch.ones(2, 2, 3, 3, dtype=torch.bool), **sizes)
        written = torch.zeros(problem.image, dtype=torch.int64)
        for one in dgrad_passes(problem):
            rows, columns = (
                first + step * torch.arange(size)
                for first, step, size in zip(one.out_start, one.out_step, one.grid, strict=True)
            )
            written[rows[:, None], columns] += 1
        assert bool((written == 1).all())


def test_tiles_are_checked_and_read_back() -> None:
    tile = Tile("blocks", 64, 256, 32, 8, 3, "tf32", True, 0, 64)
    assert Tile.from_dict(tile.to_dict()) == tile
    assert read_tile("forward", tile.to_dict()) == tile
    assert str(tile) == "blocks 64x256x32 w8 s3 tf32 L1 64 images"
    for changes, message in (
        ({"m": 24}, "m of a tile is a power of two from 16 to 512, not 24"),
        ({"code": "dense"}, "code is blocks or rows"),
        ({"precision": "bf16"}, "precision is ieee or tf32"),
        ({"warps": 3}, "1, 2, 4, 8 or 16 warps"),
        ({"images": 512}, "images of a tile are 0 or a power of two from 8 to 256"),
        ({"splits": -1}, "splits of a tile is a whole number"),
        ({"cached": 1}, "cached is true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(tile, **changes)
    with pytest.raises(ValueError, match="has no speed"):
        Tile.from_dict({"speed": 2})
    with pytest.raises(ValueError, match="a tiling is an object"):
        read_tile("forward", [1])
    with pytest.raises(UserError, match="cannot split the sums of dgrad"):
        read_tile("dgrad", Tile(splits=2))
    with pytest.raises(UserError, match="has no choice of L1 in wgrad"):
        read_tile("wgrad", Tile(cached=True))


def test_programs_side_by_side() -> None:
    assert programs_at_once(128, 0, 4) == 4
    assert programs_at_once(32, 100 << 10, 4) == 2
    assert programs_at_once(256, 0, 4) == 0
    assert programs_at_once(32, 228 << 10, 4) == 0
    assert programs_at_once(16, 0, 2) == 32


def test_the_model_knows_what_helps() -> None:
    """Fewer weights, wider groups and a faster GPU take less; a limit and finite times are always there."""
    torch.manual_seed(0)

    def seconds(group: int, density: float, gpu: Any = H200, phase: Any = "forward") -> float:
        mask = (torch.rand(128 // group, 64, 3, 3) < density).repeat_interleave(group, 0)
        problem = problem_of(mask, (14, 14), 256, padding=(1, 1), activations="bfloat16", device="cuda")
        best = choose(phase, Structure.from_mask(mask), problem, gpu, 1)[0].prediction
        assert math.isfinite(best.seconds)
        assert best.seconds >= max(best.roofs.values())
        assert best.roofs[best.limit] == max(best.roofs.values())
        return best.seconds

    assert seconds(64, 0.1) < seconds(64, 0.25) < seconds(64, 1.0)
    assert seconds(64, 0.2) < seconds(4, 0.2)
    assert seconds(64, 0.2) < seconds(64, 0.2, A100)
    assert all(seconds(64, 0.2, phase=phase) > 0 for phase in PHASES)


def test_candidates_are_of_every_phase_and_take_plain_tensors() -> None:
    mask = (torch.rand(2, 16, 3, 3) < 0.3).repeat_interleave(16, 0)
    structure = Structure.from_mask(mask)
    problem = problem_of(mask, (8, 8), 64, padding=(1, 1), activations="bfloat16", device="cuda")
    impl = IMPLS["triton"]
    assert impl.candidates is not None
    every = impl.candidates(structure, problem)
    assert {one.phase for one in every} == set(PHASES)
    assert all(one.source == "" for one in every)
    assert impl.read_tiling is not None
    assert all(impl.read_tiling(one.phase, one.tiling.to_dict()) == one.tiling for one in every)
