"""Programs run in PyTorch, operation by operation: to look at what images become on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.inference.program import (
    Activation,
    Affine,
    Array,
    Binary,
    Bins,
    Conv,
    Copy,
    Op,
    Pool,
    Program,
    Value,
)

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
}


@torch.no_grad()
def run(program: Program, images: Tensor) -> Iterator[tuple[Value, Tensor]]:
    """Every value of a program, [N, C, H, W] in the precision of ``images``, in the order of the operations.

    A value that several operations fill is there after the last of them. The input comes first.
    """
    n = len(images)
    known: dict[Value, Tensor] = {program.input: images.reshape(n, *program.input.shape)}
    last = {op.output: place for place, op in enumerate(program.ops)}
    readers = {value: place for place, op in enumerate(program.ops) for value in op.inputs()}
    yield program.input, known[program.input]
    for place, op in enumerate(program.ops):
        known[op.output] = _activated(_result(op, known), op.act)
        if last[op.output] == place:
            yield op.output, known[op.output]
        for value in op.inputs():
            if readers[value] == place and value is not program.output:
                known.pop(value, None)


def _activated(x: Tensor, act: Activation) -> Tensor:
    if act.name == "clamp":
        return x.clamp(act.low, act.high)
    if act.name == "leaky":
        return F.leaky_relu(x, act.low)
    if act.name == "elu":
        return F.elu(x, act.low)
    return _ACTIVATIONS[act.name](x)


def _tensor(array: Array, like: Tensor) -> Tensor:
    return torch.tensor(array).to(like)


def _result(op: Op, known: Mapping[Value, Tensor]) -> Tensor:
    x = known[op.input]
    match op:
        case Conv():
            y = F.conv2d(
                x, _tensor(op.weight, x), _tensor(op.bias, x), op.stride, op.padding, op.dilation, op.groups
            )
            return y if op.residual is None else y + known[op.residual]
        case Pool():
            return _pooled(op, x)
        case Bins():
            size = op.output.shape[1:]
            return F.adaptive_avg_pool2d(x, size) if op.mode == "average" else _largest(x, size)
        case Binary():
            other = known[op.other]
            return x + other if op.mode == "add" else x * other if op.mode == "multiply" else x - other
        case Affine():
            shape = (1, -1, 1, 1)
            return x * _tensor(op.scale, x).view(shape) + _tensor(op.shift, x).view(shape)
        case Copy():
            return _copied(op, x, known.get(op.output))
    return x.softmax(1)


def _largest(x: Tensor, size: tuple[int, int]) -> Tensor:
    result: Tensor = F.adaptive_max_pool2d(x, size)
    return result


def _pooled(op: Pool, x: Tensor) -> Tensor:
    down, right = (min(one, 0) for one in op.padding)
    x = x[:, :, -down:, -right:]  # rows and columns that are left out
    padding = tuple(max(one, 0) for one in op.padding)
    _, rows, columns = op.output.shape
    # As many positions as the output has: with `ceil_mode` a window may begin inside and end outside.
    needed = [
        (size - 1) * stride + (kernel - 1) * dilation + 1
        for size, stride, kernel, dilation in zip(
            (rows, columns), op.stride, op.kernel, op.dilation, strict=True
        )
    ]
    more = [max(n - (size + 2 * p), 0) for n, size, p in zip(needed, x.shape[2:], padding, strict=True)]
    edges = (padding[1], padding[1] + more[1], padding[0], padding[0] + more[0])
    if op.mode == "max":
        y = F.max_pool2d(F.pad(x, edges, value=-torch.inf), op.kernel, op.stride, 0, op.dilation)
        return y[:, :, :rows, :columns]
    sums = F.avg_pool2d(F.pad(x, edges), op.kernel, op.stride, divisor_override=1)[:, :, :rows, :columns]
    inside = torch.ones_like(x[:1, :1])
    counted = F.pad(inside, (padding[1], padding[1], padding[0], padding[0]), value=float(op.counts_padding))
    counted = F.pad(counted, (0, more[1], 0, more[0]))
    counts = F.avg_pool2d(counted, op.kernel, op.stride, divisor_override=1)[:, :, :rows, :columns]
    return sums / (op.divisor or counts)


def _copied(op: Copy, x: Tensor, so_far: Tensor | None) -> Tensor:
    shape = (len(x), *op.output.shape)
    if op.channels is None:
        return x.reshape(shape)
    y = x.new_zeros(shape) if so_far is None or op.clears else so_far.clone()
    down, right = op.shift
    rows, columns = x.shape[2:]
    part = x[:, op.start : op.start + op.channels]
    y[:, op.to : op.to + op.channels, down : down + rows, right : right + columns] = part
    return y
