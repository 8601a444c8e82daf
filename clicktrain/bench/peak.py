"""Peak rates of this processor: multiply-adds from registers, and reads from L1 and L2.

A kernel's time is judged by these: a layer that runs at 90 % of the multiply-add rate cannot be made faster,
one that waits for its caches can. `multiply_adds` and `one_pass` do nothing but the arithmetic, or the reads
and writes, that a layer needs: to be timed beside it, since load on the machine slows all of them down alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clicktrain.kernels.native import load, needed_toolchain, static_source, toolchain
from clicktrain.kernels.native.library import Library, call
from clicktrain.kernels.native.memory import STREAM_BYTES

_REPETITIONS = 7
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_BYTES = {1: 32 << 10, 2: 512 << 10}


@dataclass(frozen=True, slots=True)
class Peak:
    """Best of several measurements, all threads together, in 1e9 per second.

    Float32 operations, a multiply-add being two, and bytes read from buffers half as large as the cache.
    """

    gflops: float
    l1_read_gbs: float
    l2_read_gbs: float


def measure_peak(seconds: float = 0.01) -> Peak | None:
    """Measure with as many threads as PyTorch uses, for ``seconds`` at a time; None without a C compiler."""
    if toolchain() is None:
        return None
    library, lanes, sums = measuring_loops()
    threads = torch.get_num_threads()
    out = torch.zeros(lanes)

    def fma(steps: int) -> float:
        used = call(library.multiply_add, out, steps, threads)
        return float(2 * sums * lanes * steps * used)

    return Peak(
        _rate(fma, seconds) / 1e9,
        _rate(_reader(library, _cache_bytes(1) // 2, threads), seconds) / 1e9,
        _rate(_reader(library, _cache_bytes(2) // 2, threads), seconds) / 1e9,
    )


def multiply_adds(count: int) -> Callable[[], Tensor]:
    """A call that does at least ``count`` float32 multiply-adds from registers, with all threads."""
    library, lanes, sums = measuring_loops()
    threads = torch.get_num_threads()
    out = torch.zeros(lanes)
    steps = -(-count // (sums * lanes * threads))

    def run() -> Tensor:
        call(library.multiply_add, out, steps, threads)
        return out

    return run


def one_pass(read: Sequence[Tensor], written: Tensor) -> Callable[[], Tensor]:
    """A call that reads tensors once, and writes as much as another one, with all threads.

    It writes zeros to memory of its own, around the caches where the kernels do. Tensors may have any number
    of bytes and begin anywhere; each is contiguous.
    """
    library, _, _ = measuring_loops()
    threads = torch.get_num_threads()
    size = written.numel() * written.itemsize
    stream = int(size >= STREAM_BYTES)

    def run() -> Tensor:
        new = torch.empty_like(written)
        for i, one in enumerate(read):
            out = 0 if i else size
            call(library.pass_over, one, one.numel() * one.itemsize, new, out, stream, threads)
        return new

    return run


def measuring_loops() -> tuple[Library, int, int]:
    """The measuring loops, lanes of their vectors, and sums in registers."""
    tools = needed_toolchain()
    lanes = tools.lanes(torch.float32)
    # Enough sums to hide the latency of a multiply-add, and few enough that all stay in registers.
    sums = 20 if tools.simd.registers >= 32 else 12
    about = "Peak multiply-adds and reads of this processor."
    return load(static_source("bench/peak.c", about, torch.float32, lanes, SUMS=sums)), lanes, sums


def _reader(library: Library, size: int, threads: int) -> Callable[[int], float]:
    buffer = torch.ones(-(-threads * size // 4))

    def read(passes: int) -> float:
        return float(size * passes * call(library.read_all, buffer, size, passes, threads))

    return read


def _rate(work: Callable[[int], float], seconds: float) -> float:
    """Most work per second; ``work(steps)`` returns how much it did."""
    steps = 64
    while _seconds(work, steps)[0] < seconds:
        steps *= 2
    return max(done / taken for taken, done in (_seconds(work, steps) for _ in range(_REPETITIONS)))


def _seconds(work: Callable[[int], float], steps: int) -> tuple[float, float]:
    start = time.perf_counter()
    done = work(steps)
    return time.perf_counter() - start, done


def _cache_bytes(level: int) -> int:
    """Size of a data cache as the system reports it, else a usual one."""
    try:
        for folder in sorted(_CACHES.glob("index*")):
            kind = (folder / "type").read_text().strip()
            if int((folder / "level").read_text()) == level and kind in ("Data", "Unified"):
                return int((folder / "size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        pass
    return _USUAL_BYTES[level]
