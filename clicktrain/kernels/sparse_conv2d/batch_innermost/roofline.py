"""How long a kernel takes on a GPU, estimated from what it has to do: a roofline model with several roofs.

A kernel waits for whichever of these takes longest: its products, shared memory, instructions, L2, or memory.
Latencies come on top where few programs hide them. The model orders the tiles that are measured, and says
what to expect where no GPU is at hand. Its constants are data sheets and assumptions, each with its source;
no number here was measured by us.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from clicktrain.kernels.impls import ConvProblem, Phase
from clicktrain.kernels.sparse_conv2d.batch_innermost.index import Blocks, Rows
from clicktrain.kernels.sparse_conv2d.batch_innermost.launch import columns_of, wanted_splits
from clicktrain.kernels.sparse_conv2d.batch_innermost.passes import Pass
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import (
    MULTIPROCESSORS,
    Tile,
    programs_at_once,
    registers_of,
    shared_bytes,
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU can do at most.

    Attributes:
        multiprocessors, clock: how many, and Hz.
        capability: two or three digits, a key of `MULTIPROCESSORS`.
        products: by dtype, multiply-adds a cycle and multiprocessor on tensor cores; ``tf32`` by name.
        fma: float32 multiply-adds a cycle and multiprocessor outside of them.
        memory, l2: bytes a second.
        l2_bytes: what stays in L2 between two kernels.
    """

    name: str
    capability: int
    multiprocessors: int
    clock: float
    products: Mapping[str, int]
    fma: int
    memory: float
    l2: float
    l2_bytes: float

    def dense_seconds(self, operations: float, size: float, precision: str) -> float:
        """What a dense convolution of PyTorch is expected to take: see `DENSE_SHARE`."""
        rate = self.fma if precision == "fp32" else self.products[precision]
        peak = 2.0 * rate * self.multiprocessors * self.clock
        moved = max(size - self.l2_bytes, 0.0) / self.memory + size / self.l2
        return max(operations / (DENSE_SHARE * peak), moved) + LAUNCH


H200 = Gpu(
    # NVIDIA H200 data sheet: 989 TFLOP/s bf16, 495 tf32, 67 fp32, 4.8 TB/s; H100 white paper: 132
    # multiprocessors, 50 MB of L2. L2's bandwidth is in no data sheet: published micro-benchmarks of the H100
    # give 5.5 to 7 TB/s for reads. Two partitions keep copies of what both read: half of it counts.
    "H200", 90, 132, 1.83e9,
    {"bfloat16": 2048, "float16": 2048, "tf32": 1024, "float64": 128}, 128, 4.8e12, 5.5e12, 25e6,
)  # fmt: skip
A100 = Gpu(
    "A100", 80, 108, 1.41e9,
    {"bfloat16": 1024, "float16": 1024, "tf32": 512, "float64": 64}, 64, 2.0e12, 4.0e12, 20e6,
)  # fmt: skip
B200 = Gpu(
    "B200", 100, 148, 1.85e9,
    {"bfloat16": 4096, "float16": 4096, "tf32": 2048, "float64": 64}, 128, 8.0e12, 10e12, 60e6,
)  # fmt: skip
GPUS: Mapping[int, Gpu] = {gpu.capability: gpu for gpu in (A100, H200, B200)}

DENSE_SHARE = 0.65
"""Share of the peak that cuDNN's convolutions reach. An assumption: good ones reach 60 to 75%."""
LAUNCH = 3e-6
"""Seconds from one kernel's end to the next one's beginning."""
_SHARED_RATE = 128.0
"""Bytes of shared memory, and of L1, a cycle and multiprocessor (H100 white paper)."""
_ISSUED = 128.0
"""Instructions of threads a cycle and multiprocessor: four warps of 32."""
_GATHER = 20.0
"""Instructions for 16 bytes that are gathered: offset and tap, comparisons, address, the copy. See SASS."""
_COPY = 6.0
"""Instructions for 16 bytes of weights, whose addresses go up evenly."""
_SYNCHRONOUS = 0.62
"""What ``mma.sync`` reaches of Hopper's peak, which only ``wgmma`` does: published micro-benchmarks."""
_LATENCY = 2200.0
"""Cycles before a program's first product (offsets, then what they point to), and after its last."""
_L1_HITS = 0.5
"""Share of a kernel's gathered rows that taps of the same source find in L1, where it is asked for."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds by what a kernel waits for, each by itself, and what it takes in all.

    Attributes:
        roofs: ``products``, ``shared``, ``instructions``, ``l2``, ``memory``.
        seconds: the largest of them, with latencies and programs that do not fill the last round.
        operations: of kept weights alone, two a multiply-add.
    """

    roofs: Mapping[str, float]
    seconds: float
    operations: float = 0.0

    @property
    def limit(self) -> str:
        """The roof that it is under."""
        return max(self.roofs, key=lambda name: self.roofs[name])


def predict(
    phase: Phase,
    problem: ConvProblem,
    passes: list[tuple[Pass, Blocks | Rows]],
    tile: Tile,
    gpu: Gpu = H200,
) -> Prediction:
    """Estimate a phase of a layer: all its passes, one after the other."""
    parts = [_one(phase, problem, given, index, tile, gpu) for given, index in passes]
    roofs = {name: sum(part.roofs[name] for part in parts) for name in parts[0].roofs}
    return Prediction(roofs, sum(part.seconds for part in parts), sum(part.operations for part in parts))


def _one(
    phase: Phase, problem: ConvProblem, given: Pass, index: Blocks | Rows, tile: Tile, gpu: Gpu
) -> Prediction:
    size = getattr(torch, problem.activations).itemsize
    n, positions = problem.batch, given.grid[0] * given.grid[1]
    columns = columns_of(n, positions, tile.bq)
    sources = problem.filters if phase == "dgrad" else problem.channels
    source = sources * given.source[0] * given.source[1] * n * size
    rows = problem.channels if phase == "dgrad" else problem.filters
    target = rows * positions * n * size
    programs: int
    steps: float
    if isinstance(index, Blocks):
        keys, values = index.keys, index.kept * index.keys * tile.m
        step = _dot_step(phase, problem, tile, size, gpu)
        if phase == "wgrad":
            programs, steps = _split(len(index.block_of), columns.tiles, index.places.numel(), tile, gpu)
        else:
            blocks = index.starts.numel() - 1
            programs, steps = blocks * columns.tiles, keys / tile.bk / blocks
    else:
        values = float(index.order.numel())
        step = _fma_step(phase, problem, index, tile, size, gpu)
        if phase == "wgrad":
            programs, steps = _split(len(index.tiles), columns.tiles, index.order.numel(), tile, gpu)
        else:
            programs = index.longest.numel() * columns.tiles
            steps = float(index.longest.sum()) / index.longest.numel()
    operations = 2.0 * values * positions * n
    if not programs or not steps:
        moved = target / gpu.memory
        return Prediction(
            {"products": 0.0, "shared": 0.0, "instructions": 0.0, "l2": 0.0, "memory": moved},
            moved + LAUNCH,
        )
    on_chip = gpu.multiprocessors * gpu.clock
    roofs = {name: programs * steps * cycles / on_chip for name, cycles in step.items() if name != "l2"}
    moved = source + target
    roofs["l2"] = (programs * steps * step["l2"] + target) / gpu.l2
    roofs["memory"] = max(moved - gpu.l2_bytes, 0.0) / gpu.memory
    at_once = programs_at_once(
        registers_of(tile, phase),
        shared_bytes(tile, phase, size),
        tile.warps,
        MULTIPROCESSORS[gpu.capability],
    )
    if not at_once:
        return Prediction(roofs, math.inf, operations)
    rounds = programs / (gpu.multiprocessors * at_once)
    uneven = math.ceil(rounds) / rounds if rounds < 4 else 1.0
    latency = math.ceil(rounds) * _LATENCY / gpu.clock / max(at_once, 1)
    return Prediction(roofs, max(roofs.values()) * uneven + latency + LAUNCH, operations)


def _split(programs: int, tiles: int, sums: int, tile: Tile, gpu: Gpu) -> tuple[int, float]:
    """Programs of wgrad, and steps of each."""
    if not programs:
        return 0, 0.0
    splits = tile.splits or wanted_splits(programs, tiles, sums * 4, gpu.multiprocessors)
    return programs * splits, tiles / splits


def _dot_step(phase: Phase, problem: ConvProblem, tile: Tile, size: int, gpu: Gpu) -> dict[str, float]:
    """Cycles of one multiprocessor for one step of a program, and bytes that it reads from L2."""
    wide, deep = (tile.bk, tile.bq) if phase == "wgrad" else (tile.bq, tile.bk)
    name = "tf32" if problem.activations == "float32" and tile.precision == "tf32" else problem.activations
    rate = float(gpu.products.get(name, gpu.fma))
    groups = max(tile.m // 64, 1) if gpu.capability >= 90 else tile.warps
    if gpu.capability >= 90 and tile.m < 64 and name != "float32":
        rate *= _SYNCHRONOUS
        groups = tile.warps
    given, gathered = tile.m * deep * size, wide * deep * size
    # Copied in once; read by every group of warps that has rows of its own.
    shared = 2.0 * given + (1 + groups) * gathered
    if name == "float32":  # multiply-adds read both operands as if they were small tiles of 8x8
        shared = given + gathered + tile.m * wide * deep * size / 4
    instructions = gathered / 16 * _GATHER + given / 16 * (_GATHER if phase == "wgrad" else _COPY)
    if name == "float32":
        instructions += tile.m * wide * deep
    hits = _L1_HITS if tile.cached else 0.0
    return {
        "products": tile.m * wide * deep / rate,
        "shared": shared / _SHARED_RATE,
        "instructions": instructions / _ISSUED,
        "l2": gathered * (1 - hits) + given,
    }


def _fma_step(
    phase: Phase, problem: ConvProblem, index: Rows, tile: Tile, size: int, gpu: Gpu
) -> dict[str, float]:
    """As `_dot_step`, of rows by themselves: what is gathered goes through L1 into registers."""
    rows = tile.bk if phase == "wgrad" else tile.m
    gathered = rows * tile.bq * size
    # What a program's rows read again is in L1: all rows read from the sources' distinct positions only.
    distinct = problem.channels * problem.kernel[0] * problem.kernel[1] / max(problem.groups, 1)
    reads = float(index.longest.sum()) / max(index.longest.numel(), 1) * tile.m
    share = 1.0 if phase == "wgrad" else min(1.0, distinct / max(reads, 1.0) / 3)
    return {
        "products": rows * tile.bq / gpu.fma,
        "shared": (gathered + (tile.bq * size if phase == "wgrad" else 0)) / _SHARED_RATE,
        "instructions": (rows * tile.bq + gathered / 16 * _GATHER) / _ISSUED,
        "l2": gathered * share,
    }
