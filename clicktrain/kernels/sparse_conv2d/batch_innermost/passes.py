"""Which positions of an image a result reads: forward is one pass, dgrad one for each residue of the stride.

A *pass* gathers rows of N numbers from one tensor (the source) and writes rows of another (the target). Its
grid of target positions ``(i, j)`` reads, for a tap, the source position ``(i * step + base + offset)``, axis
by axis. The gradient w.r.t. the input of a strided convolution falls apart into passes of step 1: input rows
``h`` with the same remainder of ``h / stride`` see the same taps.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from clicktrain.kernels.impls import ConvProblem

LARGEST_IMAGE = 8000
"""Rows, columns, reach and padding: offsets are 16 bits, and `NOWHERE` lies outside of every image."""
NOWHERE = 16383
"""The offset of what fills up a list of taps: no position of an image is read there."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One gather from a source image to a target image; pairs are (rows, columns).

    Attributes:
        source, target: sizes of both images.
        grid: target positions that the pass writes, ``out_start + i * out_step`` on each axis.
        step, base: source position of grid position (i, j) without a tap's offset.
        offsets: tap (r * S + s) -> (rows, columns); taps that the pass does not read are left out.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    grid: tuple[int, int]
    step: tuple[int, int]
    base: tuple[int, int]
    out_step: tuple[int, int]
    out_start: tuple[int, int]
    offsets: Mapping[int, tuple[int, int]]


def padding_of(problem: ConvProblem) -> tuple[tuple[int, int], tuple[int, int]]:
    """Zeros before and behind the image, by axis: ((before, behind) of the rows, the same of the columns)."""
    if isinstance(problem.padding, str):
        reach = [(k - 1) * d for k, d in zip(problem.kernel, problem.dilation, strict=True)]
        both = reach if problem.padding == "same" else [0, 0]
        rows, columns = ((one // 2, one - one // 2) for one in both)
        return rows, columns
    rows, columns = ((one, one) for one in problem.padding)
    return rows, columns


def _taps(problem: ConvProblem) -> list[tuple[int, int]]:
    return [*itertools.product(range(problem.kernel[0]), range(problem.kernel[1]))]


def forward_pass(problem: ConvProblem) -> Pass:
    """The pass of the forward convolution, and of wgrad, which reads the same positions."""
    (top, _), (left, _) = padding_of(problem)
    offsets = {
        number: (r * problem.dilation[0], s * problem.dilation[1])
        for number, (r, s) in enumerate(_taps(problem))
    }
    out = problem.output
    return Pass(problem.image, out, out, problem.stride, (-top, -left), (1, 1), (0, 0), offsets)


def dgrad_passes(problem: ConvProblem) -> list[Pass]:
    """The passes of the gradient w.r.t. the input, which together write each input position once."""
    before = [one for one, _ in padding_of(problem)]
    passes = []
    for start in itertools.product(range(problem.stride[0]), range(problem.stride[1])):
        grid = [
            max(-(-(size - first) // step), 0)
            for size, first, step in zip(problem.image, start, problem.stride, strict=True)
        ]
        if 0 in grid:
            continue
        offsets = {}
        for number, tap in enumerate(_taps(problem)):
            shifts = [
                first + pad - place * dilation
                for first, pad, place, dilation in zip(start, before, tap, problem.dilation, strict=True)
            ]
            if all(shift % step == 0 for shift, step in zip(shifts, problem.stride, strict=True)):
                rows, columns = (s // step for s, step in zip(shifts, problem.stride, strict=True))
                offsets[number] = (rows, columns)
        passes.append(
            Pass(
                problem.output,
                problem.image,
                (grid[0], grid[1]),
                (1, 1),
                (0, 0),
                problem.stride,
                (start[0], start[1]),
                offsets,
            )
        )
    return passes
