"""Where activations lie: one piece of memory, in which values that are never needed together overlap."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from clicktrain.inference.program import Conv, Program, Value

ALIGNED = 16
"""Floats: places are multiples of a cache line."""


_MOST_OFFSETS = 65535
"""Elements of a region that the runtime can number."""


def plane(value: Value) -> int:
    """Floats from channel to channel of one image in the layout for one image."""
    _, h, w = value.shape
    return 1 if h * w == 1 else -(-h * w // ALIGNED) * ALIGNED


def single_size(value: Value) -> int:
    """Floats of a value in the layout for one image."""
    return value.shape[0] * plane(value)


def places(
    program: Program, size: Callable[[Value], int], in_place: bool = False
) -> tuple[dict[Value, int], int]:
    """The first float of each value, and how many floats there are in all. Large values choose first.

    ``in_place``: where values are large, the result of a convolution takes the place of what is added to it
    and not needed later. (It is then computed in one pass, which is slower where there are many channels.)
    """
    born = {program.input: -1}
    last = {program.input: -1}
    for time, op in enumerate(program.ops):
        born.setdefault(op.output, time)
        for value in (*op.inputs(), op.output):
            last[value] = time
    last[program.output] = len(program.ops)
    first = {value: value for value in born}  # whose place a value takes, its own or that of another
    large = max(map(size, born)) / 2
    for time, op in enumerate(program.ops) if in_place else ():
        if not isinstance(op, Conv) or op.residual is None or size(op.output) < large:
            continue
        if _can_be_in_place(op, op.residual, time, born, last):
            first[op.output] = first[op.residual]
            last[first[op.residual]] = last[op.output]
    placed: dict[Value, int] = {}
    total = 0
    for value in sorted((one for one in born if first[one] is one), key=lambda one: -size(one)):
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
    return {value: placed[first[value]] for value in born}, total


def _can_be_in_place(
    op: Conv, added: Value, time: int, born: Mapping[Value, int], last: Mapping[Value, int]
) -> bool:
    """Whether nobody reads what is added later, and the runtime can compute all channels in one pass."""
    if added is op.input or added.shape != op.output.shape:
        return False
    channels, rows, columns = op.weight.shape[1] * op.groups, *op.weight.shape[2:]
    region = ((rows - 1) * op.dilation[0] + 1) * columns * ((columns - 1) * op.dilation[1] + 1)
    return last[added] == time and born[op.output] == time and channels * region <= _MOST_OFFSETS


def _whole(floats: int) -> int:
    return -(-floats // ALIGNED) * ALIGNED
