"""C text of the blocked sparse convolution kernels: ClickTrain section 5.2, for a CPU's vector units.

Activations lie batch-blocked innermost, ``[N/V, C, H, W, V]``: one weight is one broadcast, one tap of a
kernel another aligned vector. Three functions come from one generator, because all three are the same set of
triples *(result position, window position, tap)*:

- forward and gradient of the input: the sums of a tile of positions stay in registers over all kernels of a
  filter (or channel); each position of the window is loaded once and used by all taps;
- gradient of the weight: the sums are those of the taps, over tiles of the output's gradient.

A *region* (some tiles) of the source is copied into a buffer that fits the second-level cache first, with the
zero halo where it reaches over the edge, and used for all filters, while the next one is fetched. Where an
axis has at most two tiles, what lies in the halo is left out of the code instead: on small images that is up
to a third of the work.
"""

from __future__ import annotations

import torch

from clicktrain.kernels.sparse_conv2d.blocked import (
    accumulate,
    grad_weight,
    statistics,
    tap_accumulate,
    tap_grad_weight,
)
from clicktrain.kernels.sparse_conv2d.blocked.generator import Generator
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.tap_generator import TapGenerator
from clicktrain.kernels.sparse_conv2d.blocked.vocabulary import Taps


def source(
    phase: Phase,
    problem: ConvProblem,
    vocabulary: tuple[Taps, ...],
    tiling: Tiling,
    dtype: torch.dtype,
    lanes: int,
    sums: bool = False,
) -> str:
    """The C text of one phase; its one exported function is called ``run``.

    Signatures (``real`` is the dtype; every array is contiguous, ``blocks`` = N/V rounded up, ``stream`` =
    write results around the caches):

    - forward: ``run(x, y, values, bias or NULL, rows, entries, scratch, blocks, stream, threads)``
    - grad_input: ``run(gy, gx, values, NULL, rows, entries, scratch, blocks, stream, threads)``
    - grad_weight: ``run(x, gy, grad, rows, entries, chunks, scratch, blocks, threads)``, where ``chunks`` =
      [parts, nnz, (first entry, last entry, first value) of each part].
    - forward with ``sums``: ``run(x, y, values, bias or NULL, rows, entries, mean, var, scratch, n, blocks,
      stream, threads)``: also mean and biased variance of each filter's results, over n images.
    """
    if sums and phase != "forward":
        raise ValueError(f"statistics are taken of the forward pass, not of {phase}")
    if tiling.code == "taps":
        taps = TapGenerator(phase, problem, tiling)
        code = taps.begin(dtype, lanes)
        if phase == "grad_weight":
            tap_grad_weight.write(code, taps)
        else:
            code(statistics.support(dtype) if sums else "")
            tap_accumulate.write(code, taps, sums)
        return code.text()
    generator = Generator(phase, problem, vocabulary, tiling)
    code = generator.begin(dtype, lanes)
    if phase == "grad_weight":
        grad_weight.write(code, generator)
    else:
        code(statistics.support(dtype) if sums else "")
        accumulate.write(code, generator, sums)
    return code.text()


def scratch_vectors(phase: Phase, problem: ConvProblem, tiling: Tiling) -> int:
    """Vectors of scratch memory for each thread; the gradient of the weight needs its own values besides."""
    if tiling.code == "taps":
        return TapGenerator(phase, problem, tiling).scratch
    return Generator(phase, problem, (), tiling).scratch
