"""Where activations lie: one piece of memory, in which values that are never needed together overlap."""

from __future__ import annotations

from collections.abc import Callable

from clicktrain.inference.program import Program, Value

ALIGNED = 16
"""Floats: places are multiples of a cache line."""


def plane(value: Value) -> int:
    """Floats from channel to channel of one image in the layout for one image."""
    _, h, w = value.shape
    return 1 if h * w == 1 else -(-h * w // ALIGNED) * ALIGNED


def single_size(value: Value) -> int:
    """Floats of a value in the layout for one image."""
    return value.shape[0] * plane(value)


def places(program: Program, size: Callable[[Value], int]) -> tuple[dict[Value, int], int]:
    """The first float of each value, and how many floats there are in all. Large values choose first."""
    born = {program.input: -1}
    last = {program.input: -1}
    for time, op in enumerate(program.ops):
        born.setdefault(op.output, time)
        for value in (*op.inputs(), op.output):
            last[value] = time
    last[program.output] = len(program.ops)
    placed: dict[Value, int] = {}
    total = 0
    for value in sorted(born, key=lambda one: -size(one)):
        taken = sorted(
            (placed[other], placed[other] + _whole(size(other)))
            for other in placed
            if born[other] <= last[value] and born[value] <= last[other]
        )
        at = 0
        for begin, end in taken:
            if at + _whole(size(value)) <= begin:
                break
            at = max(at, end)
        placed[value] = at
        total = max(total, at + _whole(size(value)))
    return placed, total


def _whole(floats: int) -> int:
    return -(-floats // ALIGNED) * ALIGNED
