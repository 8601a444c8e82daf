"""C source of the blocked sparse convolution kernels: ClickTrain section 5.2, for a CPU's vector units.

Activations are batch-blocked, ``[N/V, C, H, W, V]``: one weight is one broadcast, one tap of a kernel another
aligned vector. All three directions are the same set of triples *(result position, window position, tap)*:

- forward and dgrad keep the sums of a tile of positions, in registers or L1, over all kernels of a filter (or
  channel); each position of the window is loaded once and used by all taps of a kernel;
- wgrad keeps the sums of the taps, over tiles of the output's gradient.

A *region* (some tiles) of the source is first copied into a buffer that fits L2, with the zero halo where it
reaches over the edge, and used for all filters while the next one is fetched or copied. Where an axis has at
most two tiles, the halo is left out of the code instead: on small images that is up to a third of the work.
Cache-blocked code leaves it out everywhere, and reads the source itself, unless activations are bfloat16 or
the code would become too long (`regions.IN_PLACE_CODE`).
"""

from __future__ import annotations

import textwrap
from dataclasses import asdict, astuple

import torch

from clicktrain.kernels.sparse_conv2d.blocked.indexed.generator import IndexedGenerator
from clicktrain.kernels.sparse_conv2d.blocked.patterns import unrolled, wgrad
from clicktrain.kernels.sparse_conv2d.blocked.patterns.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling


def source(
    phase: Phase,
    problem: ConvProblem,
    tap_patterns: tuple[Taps, ...],
    tiling: Tiling,
    dtype: torch.dtype,
    lanes: int,
    sums: bool = False,
) -> str:
    """C source of one phase; its exported function is ``run`` of ``run.h`` or ``wgrad_run.h``.

    Activations are of the dtype, ``real`` is what it is computed in, ``weight`` that or two bfloat16; every
    array is contiguous, ``blocks`` is N/V rounded up, ``stream`` writes results around the caches. ``order``
    has the ``places`` in the packed values of each of ``count`` weights, or of each part's first one, if they
    are fewer; the weights are brought into that order in the first ``room`` vectors of ``scratch``. Without
    ``order`` they are in the kernel's order. With ``sums``, forward only, ``run`` also computes mean and
    biased variance of each filter's results, over n images.
    """
    if sums and phase != "forward":
        raise ValueError(f"statistics are taken of the forward pass, not of {phase}")
    if tiling.pairs and dtype is not torch.bfloat16:
        raise ValueError(f"only bfloat16 is multiplied in pairs, not {dtype}")
    if tiling.pairs and tiling.code == "cache_blocked" and phase != "wgrad":
        raise ValueError(f"cache_blocked code does not multiply pairs in {phase}")
    if tiling.code == "cache_blocked" and phase == "wgrad":
        raise ValueError("wgrad has code 'unrolled' or 'indexed', not 'cache_blocked'")
    about = _describe(phase, problem, tap_patterns, tiling, dtype, lanes, sums)
    if tiling.code == "indexed":
        return IndexedGenerator(phase, problem, tiling, dtype).source(about, lanes, sums)
    generator = Generator(phase, problem, tap_patterns, tiling, dtype)
    code = generator.begin(about, lanes, sums)
    if phase == "wgrad":
        wgrad.write(code, generator)
    else:
        unrolled.write(code, generator, sums)
    return code.text()


def _describe(
    phase: Phase,
    problem: ConvProblem,
    tap_patterns: tuple[Taps, ...],
    tiling: Tiling,
    dtype: torch.dtype,
    lanes: int,
    sums: bool,
) -> str:
    rows, columns = problem.rows, problem.columns
    pairs = [(f"{a}x{b}") for a, b in zip(astuple(rows), astuple(columns), strict=True)]
    size, kernel, stride, padding, dilation, out = pairs
    cut = [f"{name} {value}" for name, value in asdict(tiling).items() if name != "code"]
    patterns = ("(" + ", ".join(map(str, taps)) + ")" for taps in tap_patterns if tiling.code != "indexed")
    lines = [
        f"Sparse convolution, {phase}{' with batch norm statistics' if sums else ''}: "
        f"{problem.channels} to {problem.filters} channels, image {size} to {out}, kernel {kernel}, "
        f"stride {stride}, padding {padding}, dilation {dilation}.",
        f"Variant {tiling.code}: {', '.join(cut)}.",
        f"Activations {str(dtype).removeprefix('torch.')}, {lanes} lanes. Tap patterns: "
        f"{' '.join(patterns) or 'read from a table'}.",
    ]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, 116))


def scratch_vectors(
    phase: Phase, problem: ConvProblem, tap_patterns: tuple[Taps, ...], tiling: Tiling, dtype: torch.dtype
) -> int:
    """Vectors of scratch memory for each thread; wgrad needs its own values besides."""
    if tiling.code == "indexed":
        return IndexedGenerator(phase, problem, tiling, dtype).scratch
    return Generator(phase, problem, tap_patterns, tiling, dtype).scratch
