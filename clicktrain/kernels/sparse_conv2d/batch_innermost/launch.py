"""Calls of the kernels: checks, grids, and what they need beside tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.impls import ConvProblem
from clicktrain.kernels.sparse_conv2d.batch_innermost import block_kernels, row_kernels
from clicktrain.kernels.sparse_conv2d.batch_innermost.index import Blocks, Rows
from clicktrain.kernels.sparse_conv2d.batch_innermost.passes import Pass
from clicktrain.kernels.sparse_conv2d.batch_innermost.plan import ConvPlan
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import Tile, images_of_tile
from clicktrain.kernels.triton_run import interpreted, run_kernel

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Dtypes of activations."""
_BIG = 1 << 31
MOST_PARTIAL_BYTES = 64 << 20
"""Bytes of wgrad's partial sums."""
_PROGRAMS_EACH = 4
"""Programs of wgrad on each multiprocessor: fewer leave it waiting, more only sum up longer."""


def _run(
    function: Callable[..., None],
    grid: tuple[int, ...],
    tile: Tile,
    like: Tensor,
    *arguments: Any,
    **fixed: Any,
) -> None:
    run_kernel(function, grid, like.device, arguments, fixed, warps=tile.warps, stages=tile.stages, cut=tile)


def check(x: Tensor, rows: int, image: tuple[int, int], what: str) -> None:
    """Refuse what kernels would misread: they take pointers to [C, H, W, N]."""
    if x.dtype not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise UserError(
            f"Triton's kernels are for activations of one of {names}, not of {x.dtype}: convert them"
        )
    if x.dim() != 4 or tuple(x.shape[:3]) != (rows, *image):
        raise UserError(
            f"{what} has to be [{rows}, {image[0]}, {image[1]}, N], not {list(x.shape)}: here images are "
            "innermost"
        )
    if x.device.type == "cpu" and not interpreted():
        raise UserError(
            "Triton's kernels run on GPUs; on the CPU its interpreter runs them where "
            "TRITON_INTERPRET=1 is set"
        )
    if x.device.type not in ("cpu", "cuda"):
        raise UserError(f"Triton's kernels run on NVIDIA GPUs, not on {x.device}")


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What a result goes through before it is written, in this order.

    Attributes:
        scale, shift: [F] or None; in the dtype that is summed up in.
        residual: like the result, or None.
        relu: whether negative results become zero.
        sums: whether means and squared deviations by tile are wanted.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    relu: bool = False
    sums: bool = False


_PLAIN = Epilogue()


def _multiplying(x: Tensor, tile: Tile) -> dict[str, Any]:
    lifted = x.device.type == "cpu" and x.dtype is torch.bfloat16
    return {"PRECISION": tile.precision, "LIFTED": lifted}


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _geometry(given: Pass) -> tuple[int, ...]:
    return (given.grid[1], *given.source, *given.step, *given.base)


@dataclass(frozen=True, slots=True)
class Columns:
    """How a tile's columns lie: ``bn`` images of ``each`` positions; ``even`` where none is left over.

    Attributes:
        tiles: of all columns, ``chunks`` of them for the same positions.
    """

    bn: int
    tiles: int
    chunks: int
    each: int
    even: bool

    def counts(self, n: int, positions: int) -> list[int]:
        """Columns of each tile that are inside."""
        images = [min(self.bn, n - at * self.bn) for at in range(self.chunks)]
        rest = [min(self.each, positions - at) for at in range(0, positions, self.each)]
        return [one * many for many in rest for one in images]


def columns_of(n: int, positions: int, tile: Tile) -> Columns:
    """How tiles cut the columns of ``n`` images of ``positions`` positions."""
    bn = images_of_tile(n, tile.bq, tile.images)
    each, chunks = tile.bq // bn, -(-n // bn)
    even = n % bn == 0 and positions % each == 0
    return Columns(bn, chunks * -(-positions // each), chunks, each, even)


def _product(
    x: Tensor, y: Tensor, values: Tensor, index: Blocks | Rows, given: Pass, tile: Tile, epilogue: Epilogue
) -> Tensor | None:
    """Run a pass of forward or dgrad into ``y``; returns the sums by tile, [2, tiles, rows], if wanted."""
    n, row_count = x.shape[3], y.shape[0]
    positions = given.grid[0] * given.grid[1]
    columns = columns_of(n, positions, tile)
    blocks = index.rows.numel() // tile.m
    accumulated = _sum_dtype(x.dtype)
    sums = (
        torch.empty(2, columns.tiles, row_count, dtype=accumulated, device=x.device)
        if epilogue.sums
        else None
    )
    flat = values.reshape(-1)
    if isinstance(index, Blocks):
        v = torch.cat([flat, flat.new_zeros(1)])[index.places].to(x.dtype)
        tables: tuple[Tensor, ...] = (index.offsets, index.taps, index.starts, index.rows)
        fixed: dict[str, Any] = {"BK": tile.bk, "CACHED": tile.cached, **_multiplying(x, tile)}
    else:
        v = flat[index.order]
        tables = index.offsets, index.taps, index.starts, index.rows, index.longest
        fixed = {}
    _run(
        block_kernels.convolve_blocks if isinstance(index, Blocks) else row_kernels.convolve_rows,
        (blocks * columns.tiles,),
        tile,
        x,
        x,
        v,
        *tables,
        y,
        *(x if one is None else one for one in (epilogue.scale, epilogue.shift, epilogue.residual, sums)),
        n,
        positions,
        blocks,
        row_count,
        *_geometry(given),
        given.target[0] * given.target[1],
        given.target[1],
        *given.out_step,
        *given.out_start,
        M=tile.m,
        BQ=tile.bq,
        BN=columns.bn,
        WIDE=accumulated is torch.float64,
        BIG=max(x.numel(), y.numel()) >= _BIG,
        EVEN=columns.even,
        SCALE=epilogue.scale is not None,
        SHIFT=epilogue.shift is not None,
        RESIDUAL=epilogue.residual is not None,
        RELU=epilogue.relu,
        SUMS=epilogue.sums,
        **fixed,
    )
    return sums


def output_shape(x: Tensor, problem: ConvProblem) -> tuple[int, ...]:
    """Shape of the result, [F, H', W', N]."""
    return problem.filters, *problem.output, x.shape[3]


def _forward(
    x: Tensor, values: Tensor, tables: Sequence[Tensor], plan: ConvPlan, epilogue: Epilogue
) -> tuple[Tensor, Tensor | None]:
    check(x, plan.problem.channels, plan.problem.image, "x")
    y = x.new_empty(output_shape(x, plan.problem))
    if y.numel() == 0:
        return y, None
    (index,) = plan.indexes("forward", tables)
    sums = _product(x.contiguous(), y, values, index, plan.forward_pass, plan.tiles["forward"], epilogue)
    return y, sums


def forward(x: Tensor, values: Tensor, bias: Tensor | None, tables: Sequence[Tensor], plan: str) -> Tensor:
    """Convolve; arguments as `ops.sparse_conv2d_batch_innermost_op`."""
    return _forward(x, values, tables, ConvPlan.from_json(plan), Epilogue(shift=bias))[0]


def forward_statistics(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: Sequence[Tensor], plan: str, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Convolve, and take mean and biased variance [F] of the results of ``n`` images, which are all."""
    read = ConvPlan.from_json(plan)
    if n != x.shape[3]:
        raise UserError(f"statistics are taken of all {x.shape[3]} images of a batch, not of {n}")
    y, sums = _forward(x, values, tables, read, Epilogue(shift=bias, sums=True))
    if sums is None:
        raise UserError("batch norm in training mode needs more than one number per channel")
    tile, given = read.tiles["forward"], read.forward_pass
    mean, variance = combine(sums, n, given.grid[0] * given.grid[1], tile)
    if bias is not None:
        mean = mean + bias
    return y, mean.to(values.dtype), variance.to(values.dtype)


def combine(sums: Tensor, n: int, positions: int, tile: Tile) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [rows] of tiles' means and squared deviations [2, tiles, rows], float64.

    Chan, Golub and LeVeque, Algorithms for computing the sample variance, 1983.
    """
    counts = _counts(n, positions, tile, sums.device)
    means, squares = sums.double()
    total = n * positions
    mean = (means * counts).sum(0) / total
    variance = (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / total
    return mean, variance


@functools.lru_cache(maxsize=256)
def _counts(n: int, positions: int, tile: Tile, device: torch.device) -> Tensor:
    """Columns of each tile, [tiles, 1]; made once, because a copy to a GPU waits for it."""
    counts = columns_of(n, positions, tile).counts(n, positions)
    return torch.tensor(counts, dtype=torch.float64, device=device)[:, None]


def affine(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    tables: Sequence[Tensor],
    plan: str,
) -> Tensor:
    """``act(conv(x) * scale + shift + residual)`` in one pass: a batch norm of known statistics, and ReLU."""
    if residual is not None:
        residual = residual.contiguous()
    epilogue = Epilogue(scale, shift, residual, relu)
    return _forward(x, values, tables, ConvPlan.from_json(plan), epilogue)[0]


def dgrad(gy: Tensor, values: Tensor, tables: Sequence[Tensor], plan: str) -> Tensor:
    """Gradient w.r.t. the input: [F, H', W', N] -> [C, H, W, N]."""
    read = ConvPlan.from_json(plan)
    problem = read.problem
    check(gy, problem.filters, problem.output, "the gradient")
    gx = gy.new_empty(problem.channels, *problem.image, gy.shape[3])
    if gx.numel() == 0:
        return gx
    gy = gy.contiguous()
    for given, index in zip(read.dgrad_passes, read.indexes("dgrad", tables), strict=True):
        _product(gy, gx, values, index, given, read.tiles["dgrad"], _PLAIN)
    return gx


def wgrad(x: Tensor, gy: Tensor, values_shape: Sequence[int], tables: Sequence[Tensor], plan: str) -> Tensor:
    """Gradient w.r.t. the packed values, at the kept positions alone; in the dtype that is summed up in."""
    read = ConvPlan.from_json(plan)
    problem, given, tile = read.problem, read.forward_pass, read.tiles["wgrad"]
    check(x, problem.channels, problem.image, "x")
    check(gy, problem.filters, problem.output, "the gradient")
    accumulated = _sum_dtype(x.dtype)
    n, positions = x.shape[3], given.grid[0] * given.grid[1]
    (index,) = read.indexes("wgrad", tables)
    total = index.places.numel() if isinstance(index, Blocks) else index.order.numel()
    if total == 0 or n * positions == 0:
        return torch.zeros(list(values_shape), dtype=accumulated, device=x.device)
    x, gy = x.contiguous(), gy.to(x.dtype).contiguous()
    columns = columns_of(n, positions, tile)
    programs = index.block_of.numel() if isinstance(index, Blocks) else -(-index.order.numel() // tile.bk)
    splits = _splits(tile, programs, columns.tiles, total * accumulated.itemsize, x.device)
    share = -(-columns.tiles // splits)
    splits = -(-columns.tiles // share)
    partial = torch.empty(splits, total, dtype=accumulated, device=x.device)
    fixed: dict[str, Any] = {
        "BQ": tile.bq,
        "BN": columns.bn,
        "BK": tile.bk,
        "WIDE": accumulated is torch.float64,
        "BIG": max(x.numel(), gy.numel()) >= _BIG,
        "EVEN": columns.even,
    }
    grid, numbers = (programs, splits), (n, positions, share, total, *_geometry(given))
    if isinstance(index, Blocks):
        tables = [index.offsets, index.taps, index.rows, index.block_of]
        more = {"M": tile.m, **_multiplying(x, tile)}
        _run(
            block_kernels.weight_gradient_blocks,
            grid,
            tile,
            x,
            x,
            gy,
            *tables,
            partial,
            *numbers,
            **fixed,
            **more,
        )
        gradient = partial.sum(0)[index.tiles]
    else:
        tables = [index.offsets, index.taps, index.row_of]
        _run(row_kernels.weight_gradient_rows, grid, tile, x, x, gy, *tables, partial, *numbers, **fixed)
        gradient = torch.empty(total, dtype=accumulated, device=x.device)
        gradient[index.order] = partial.sum(0)
    return gradient.view(list(values_shape))


def _splits(tile: Tile, programs: int, tiles: int, row_bytes: int, device: torch.device) -> int:
    if tile.splits:
        return min(tile.splits, tiles)
    return wanted_splits(programs, tiles, row_bytes, _multiprocessors(device))


def wanted_splits(programs: int, tiles: int, row_bytes: int, multiprocessors: int) -> int:
    """Into how many parts wgrad cuts its columns, so that every multiprocessor has programs enough."""
    wanted = -(-_PROGRAMS_EACH * multiprocessors // programs)
    return max(1, min(wanted, tiles, MOST_PARTIAL_BYTES // row_bytes))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
