"""The C text of a program: ``model.c`` with its tables, and the constants of ``model.h``."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from clicktrain.inference.calibration import has_int8_form
from clicktrain.inference.memory_plan import places, single_size
from clicktrain.inference.program import (
    Affine,
    Binary,
    Bins,
    Conv,
    Copy,
    NotPortableError,
    Op,
    Pool,
    Program,
    Softmax,
    Value,
)
from clicktrain.inference.weight_file import Stored, WeightFile

_MOST = 2**31 - 1


def model_source(
    program: Program,
    weights: WeightFile,
    facts: Mapping[str, Any],
    ranges: Mapping[Value, float] = MappingProxyType({}),
) -> tuple[str, int]:
    """``model.c`` of a program, whose weights are appended to ``weights``; and its fingerprint.

    ``facts`` of a run, as far as they are there: classes, mean, std. ``ranges``: what `calibrate` found.
    """
    stored = weights.add(program)
    numbers = {value: number for number, value in enumerate(program.values)}
    single, floats = places(program, single_size)
    block, block_floats = places(program, lambda value: value.size, in_place=True)
    if max(floats, block_floats) > _MOST:
        raise NotPortableError("its activations are beyond what the runtime can number")
    rows = []
    for value, number in numbers.items():
        entries = ", ".join(map(str, (*value.shape, single[value], block[value])))
        rows.append(f"    {{{entries}}},  // {number}: {_comment(value)}")
    ops = [_row(op, one, numbers, ranges) for op, one in zip(program.ops, stored, strict=True)]
    tables = "\n".join(["static const model_value values[] = {", *rows, "};", "",
                        "static const model_op ops[] = {", *ops, "};"])  # fmt: skip
    fingerprint = int.from_bytes(hashlib.sha256(tables.encode()).digest()[:8], "little")
    ends = f"{numbers[program.input]}, {numbers[program.output]}"
    text = f"""// Written by clicktrain: the operations of the network, see runtime.h.
#include "runtime.h"

{tables}

const model_description model_network_description = {{
    0x{fingerprint:016x}u, {weights.size}, {floats}, {block_floats}, {ends},
    {len(ops)}, {len(rows)}, ops, values}};

{_names(program, facts)}
"""
    return text, fingerprint


_MOST_SETS = 32
"""Sets of taps that there is code for; others are put together from these and single taps."""


_LOOPS = (
    "INT8",
    *(f"COLUMNS_{wide}{strided}" for strided in ("", "_STRIDE_2") for wide in (1, 2, 4)),
    *(f"WINDOWS_{stride}{whole}" for stride in (1, 2) for whole in ("", "_WHOLE")),
)
"""What ``sets.h`` says of each whether it is needed."""
_WINDOW_SIDE = 4
"""Rows and columns of results of a window: ``MODEL_WINDOW_SIDE`` of ``runtime.h``."""


def frequent_sets(program: Program, int8: bool = False) -> str:
    """What ``sets.h`` has: sets of taps of 3x3 kernels, those that occur most, 9 bits each; and each tap.

    Before them, which loops over these sets are compiled: for a row of 1, 2 or 4 vectors of a single
    image and for windows, of each stride, inside of an image and as large as one; and whether there are
    those for ``int8`` numbers.
    """
    counts = np.zeros(512, np.int64)
    used = {"INT8"} if int8 else set[str]()
    bits = 1 << np.arange(9)
    for op in program.ops:
        if isinstance(op, Conv) and op.weight.shape[2:] == (3, 3) and op.groups == 1:
            sets = (op.weight.reshape(-1, 9) != 0) @ bits
            counts += np.bincount(sets, minlength=512)
            used |= _loops(op)
    counts[0] = 0
    often = [int(one) for one in np.argsort(-counts, kind="stable")[:_MOST_SETS] if counts[one]]
    names = sorted({*often, *map(int, bits)})
    lines = [f"#define MODEL_HAS_{name} {int(name in used)}" for name in _LOOPS]
    lines += [" ".join(f"SET({one})" for one in names[at : at + 12]) for at in range(0, len(names), 12)]
    return "\n".join(["// Sets of taps that are frequent in this network, a bit each.", *lines, ""])


def _loops(op: Conv) -> set[str]:
    """Loops over sets of taps that a 3x3 convolution may run by, in the words of the C files."""
    _, rows, columns = op.output.shape
    if op.dilation != (1, 1) or op.stride not in ((1, 1), (2, 2)):
        return set()
    loops = set()
    if op.padding == (1, 1):
        strided = "_STRIDE_2" * (op.stride[0] == 2)
        loops = {f"COLUMNS_{wide}{strided}" for wide in (1, 2, 4) if -(-columns // 16) == wide}
    if rows >= _WINDOW_SIDE and columns >= _WINDOW_SIDE:
        side = _WINDOW_SIDE * op.stride[0]
        whole = (
            op.padding == (1, 1)
            and (rows, columns) == (_WINDOW_SIDE,) * 2
            and op.input.shape[1:] == (side,) * 2
        )
        loops.add(f"WINDOWS_{op.stride[0]}" + "_WHOLE" * whole)
    return loops


def constants(program: Program) -> str:
    """What ``model.h`` defines."""
    c, h, w = program.input.shape
    shape = {"CHANNELS": c, "HEIGHT": h, "WIDTH": w, "RESULTS": program.output.size}
    lines = [f"#define MODEL_{name} {number}" for name, number in shape.items()]
    names = ("CHANNELS", "HEIGHT", "WIDTH")
    lines += [f"#define MODEL_RESULT_{n} {v}" for n, v in zip(names, program.output.shape, strict=True)]
    return "\n".join(lines)


def _names(program: Program, facts: Mapping[str, Any]) -> str:
    channels, results = program.input.shape[0], program.output.size
    classes = [str(one) for one in facts.get("classes") or ()]
    classes = classes if len(classes) == results else []
    names = ", ".join([json.dumps(name) for name in classes] + ["NULL"])
    mean, deviation = (
        _numbers(facts.get(key), channels, default) for key, default in (("mean", 0), ("std", 1))
    )
    return (
        f"const char *const model_classes[MODEL_RESULTS + 1] = {{{names}}};\n"
        f"const float model_mean[MODEL_CHANNELS] = {{{mean}}};\n"
        f"const float model_deviation[MODEL_CHANNELS] = {{{deviation}}};"
    )


def _numbers(values: Sequence[float] | None, channels: int, default: float) -> str:
    values = values if values is not None and len(values) == channels else [default] * channels
    return ", ".join(_float(value) for value in values)


def _float(value: float) -> str:
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    if math.isnan(value):
        raise NotPortableError("a setting of an activation is no number")
    return f"{float(value).hex()}f"


def _comment(value: Value) -> str:
    return "".join(c if c.isalnum() or c in "_. " else "_" for c in value.name)


def _row(op: Op, stored: Stored, numbers: Mapping[Value, int], ranges: Mapping[Value, float]) -> str:
    fields: dict[str, Any] = {
        "kind": _kind(op),
        "in": numbers[op.input],
        "other": -1,
        "out": numbers[op.output],
    }
    fields |= {"act": f"ACT_{op.act.name.upper()}", "low": _float(op.act.low), "high": _float(op.act.high)}
    match op:
        case Conv():
            if op.residual is not None:
                fields["other"] = numbers[op.residual]
            fields |= {"kernel": op.weight.shape[2:], "stride": op.stride, "padding": op.padding}
            fields |= {
                "dilation": op.dilation,
                "groups": op.groups,
                "dense": int(stored.dense),
                "count": stored.count,
            }
            if op.input in ranges and not stored.dense and has_int8_form(op):
                fields["most"] = _float(ranges[op.input])
        case Pool():
            fields |= {
                "kernel": op.kernel,
                "stride": op.stride,
                "padding": op.padding,
                "dilation": op.dilation,
            }
            fields |= {"mode": f"POOL_{op.mode.upper()}", "counts_padding": int(op.counts_padding)}
            fields["divisor"] = _float(op.divisor)
        case Bins():
            fields["mode"] = f"POOL_{op.mode.upper()}"
        case Binary():
            fields |= {"other": numbers[op.other], "mode": f"BINARY_{op.mode.upper()}"}
        case Copy():
            channels = -1 if op.channels is None else op.channels
            fields |= {
                "from": op.start,
                "to": op.to,
                "channels": channels,
                "shift": op.shift,
                "clears": int(op.clears),
            }
    if isinstance(op, (Conv, Affine)):
        fields |= {"bias": stored.bias, "values": stored.values, "bits": stored.bits}
    return "    {" + ", ".join(f".{name} = {_initializer(value)}" for name, value in fields.items()) + "},"


def _initializer(value: Any) -> str:
    return f"{{{', '.join(map(str, value))}}}" if isinstance(value, tuple) else str(value)


def _kind(op: Op) -> str:
    if isinstance(op, Conv):
        return "OP_LINEAR" if op.linear else "OP_CONV"
    kinds = {Pool: "OP_POOL", Bins: "OP_BINS", Binary: "OP_BINARY", Affine: "OP_AFFINE", Copy: "OP_COPY",
             Softmax: "OP_SOFTMAX"}  # fmt: skip
    return kinds[type(op)]
