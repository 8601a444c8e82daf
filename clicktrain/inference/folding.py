"""Programs made shorter: batch norms go into convolutions, sums and activations end what is before them."""

from __future__ import annotations

from collections import Counter

import numpy as np

from clicktrain.inference.program import (
    NONE,
    Activation,
    Affine,
    Binary,
    Conv,
    Copy,
    Op,
    Program,
    Softmax,
    Value,
)


def fold(program: Program) -> Program:
    """Fold batch norms and scalings, then activations and residual sums; what nobody reads is left out."""
    _drop_unread(program)
    while _fold_once(program):
        _drop_unread(program)
    return program


def _readers(program: Program) -> Counter[Value]:
    readers = Counter(value for op in program.ops for value in op.inputs())
    readers[program.output] += 1
    return readers


def _drop_unread(program: Program) -> None:
    wanted = {program.output}
    kept: list[Op] = []
    for op in reversed(program.ops):
        if op.output in wanted:
            wanted.update(op.inputs())
            kept.append(op)
    program.ops = kept[::-1]


def _fold_once(program: Program) -> bool:
    """One change of the program; whether there was one."""
    readers = _readers(program)
    made: dict[Value, list[int]] = {}
    for place, op in enumerate(program.ops):
        made.setdefault(op.output, []).append(place)
    for place, op in enumerate(program.ops):
        for value in op.inputs():
            places = made.get(value, [])
            if len(places) == 1 and readers[value] == 1 and op.inputs().count(value) == 1:
                before = program.ops[places[0]]
                if len(made[op.output]) == 1 and _merge(program, before, op, places[0], place):
                    return True
    return False


def _merge(program: Program, before: Op, op: Op, first: int, second: int) -> bool:
    if isinstance(op, Affine):
        plain = not np.any(op.shift) and bool(np.all(op.scale == 1))
        linear = before.act == NONE
        if plain and linear and not isinstance(before, (Affine, Copy, Softmax)):
            before.act = op.act
        elif linear and isinstance(before, Conv) and before.residual is None:
            before.weight = before.weight * op.scale[:, None, None, None]
            before.bias = before.bias * op.scale + op.shift
            before.act = op.act
        elif linear and isinstance(before, Affine):
            before.scale, before.shift = before.scale * op.scale, before.shift * op.scale + op.shift
            before.act = op.act
        else:
            return False
    elif isinstance(op, Binary) and op.mode == "add" and isinstance(before, Conv):
        if before.act != NONE or before.residual is not None or before.linear:
            return False
        if op.input.shape != op.other.shape:
            return False
        before.residual = op.other if before.output is op.input else op.input
        before.act = op.act
    else:
        return False
    before.output = op.output
    # Where the later one stood: what is added is there by then.
    del program.ops[second]
    program.ops.insert(second, before)
    del program.ops[first]
    return True


def activation(before: Value, output: Value, act: Activation) -> Affine:
    """An activation alone."""
    channels = before.shape[0]
    return Affine(input=before, output=output, act=act, scale=np.ones(channels), shift=np.zeros(channels))
