"""How large inputs of convolutions become, found on images: what int8 numbers are steps of.

A layer's inputs become ``round(255 x / most)``, at most 255; weights ``round(127 w / max|w|)`` by filter. Of
several candidates `most` is the one whose rounding and clipping has the least squared error on the images.
Inputs must not be negative: 0 is 0 exactly then, and so are an image's edges.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.inference.interpreter import run
from clicktrain.inference.program import Binary, Bins, Conv, Copy, Op, Pool, Program, Softmax, Value

_STEPS = 255
_SAMPLES = 2**18
"""Numbers of a value that are looked at, at most."""
_OF_AN_IMAGE = 2**10
_SHARES = tuple(k / 20 for k in range(20, 5, -1))
"""Candidates, as shares of the largest number seen."""


def calibrate(program: Program, images: Iterable[Tensor]) -> dict[Value, float]:
    """The largest number that int8 should show, of each value that convolutions can read as int8.

    Args:
        images: batches [N, C, H, W] like those that the network will see.

    Raises:
        UserError: there are no images, or what they become is not finite.
    """
    wanted = int8_inputs(program)
    if not wanted:
        return {}
    largest = dict.fromkeys(wanted, 0.0)
    samples: dict[Value, list[Tensor]] = {value: [] for value in wanted}
    generator = torch.Generator().manual_seed(0)
    seen = 0
    for batch in images:
        if len(batch) == 0:
            continue
        seen += len(batch)
        for value, x in run(program, batch.float()):
            if value not in samples:
                continue
            if not bool(x.isfinite().all()):
                raise UserError("the network's activations are not finite on the calibration images")
            largest[value] = max(largest[value], float(x.max()))
            flat = x.flatten()
            wanted_few = min(len(flat), _OF_AN_IMAGE * len(batch))
            few = torch.randint(len(flat), (wanted_few,), generator=generator)
            samples[value].append(flat[few])
    if seen == 0:
        raise UserError("there are no images to calibrate int8 numbers on")
    return {
        value: _best(_few(torch.cat(samples[value]), generator), largest[value])
        for value in wanted
        if largest[value] > 0
    }


def int8_inputs(program: Program) -> list[Value]:
    """Values that are never negative, which sparse 1x1 and 3x3 convolutions read."""
    never_negative = _never_negative(program)
    return list(
        dict.fromkeys(op.input for op in program.ops if has_int8_form(op) and op.input in never_negative)
    )


def has_int8_form(op: Op) -> bool:
    """Whether there is code for a convolution with int8 numbers, if its weights are stored sparse."""
    if not isinstance(op, Conv) or op.linear or op.groups != 1:
        return False
    if op.weight.shape[2:] == (1, 1):
        return op.padding == (0, 0)
    usual = op.weight.shape[2:] == (3, 3) and op.dilation == (1, 1)
    return usual and op.stride in ((1, 1), (2, 2))


def _never_negative(program: Program) -> set[Value]:
    found: set[Value] = set()
    doubted: set[Value] = set()
    for op in program.ops:
        (found if _is_never_negative(op, found - doubted) else doubted).add(op.output)
    return found - doubted


def _is_never_negative(op: Op, found: set[Value]) -> bool:
    act = op.act
    if act.name in ("relu", "sigmoid", "hardsigmoid") or (act.name == "clamp" and act.low >= 0):
        return True
    if act.name != "none":
        return False
    if isinstance(op, (Pool, Bins, Copy)):
        return op.input in found
    if isinstance(op, Binary):
        return op.mode != "subtract" and op.input in found and op.other in found
    return isinstance(op, Softmax)


def _few(numbers: Tensor, generator: torch.Generator) -> Tensor:
    return numbers[torch.randperm(len(numbers), generator=generator)[:_SAMPLES]]


def _best(samples: Tensor, largest: float) -> float:
    def error(most: float) -> float:
        rounded = (samples * (_STEPS / most)).round().clamp(0, _STEPS) * (most / _STEPS)
        return float((rounded - samples).square().sum())

    return min((largest * share for share in _SHARES), key=error)
