"""What each recorded operation is in a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clicktrain.inference.folding import activation
from clicktrain.inference.program import (
    Activation,
    Affine,
    Array,
    Binary,
    Bins,
    Conv,
    Copy,
    NotPortableError,
    Op,
    Pair,
    Pool,
    Shape,
    Softmax,
    Value,
)

PASSED = (
    "dropout",
    "clone",
    "contiguous",
    "detach",
    "alias",
    "lift_fresh_copy",
    "feature_dropout",
    "alpha_dropout",
)
"""Operations that do nothing in evaluation mode."""


@dataclass(slots=True)
class Arguments:
    """One recorded operation: its arguments by name, and where to write what it becomes."""

    what: str
    name: str
    given: dict[str, Any]
    ops: list[Op]
    shapes: list[Shape]

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name)

    @property
    def first(self) -> Any:
        """The first argument."""
        return next(iter(self.given.values()))

    def image(self, name: str) -> Value:
        """An argument that depends on the images."""
        value = self.given[name]
        if not isinstance(value, Value):
            raise self.refusal(f"its {name} is no image")
        return value

    def constant(self, name: str) -> Array | None:
        """An argument that does not, or None."""
        value = self.given.get(name)
        if isinstance(value, Value):
            raise self.refusal(f"its {name} depends on the images")
        return None if value is None else _array(value)

    def output(self, number: int = 0) -> Value:
        """A new value of the operation's result."""
        return Value(self.shapes[number], self.name)

    def add(self, op: Op) -> Value:
        """Append an operation; its output."""
        self.ops.append(op)
        return op.output

    def refusal(self, why: str) -> NotPortableError:
        """An error about this operation."""
        return NotPortableError(f"{self.name} ({self.what}) has no form in C: {why}")


def _array(value: Any) -> Array:
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return np.asarray(tensor.detach().double().cpu().numpy(), np.float64)


def _pair(value: Sequence[int] | int | None, default: Pair) -> Pair:
    if value is None or (not isinstance(value, int) and len(value) == 0):
        return default
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[-1]))


def _conv(a: Arguments) -> Value:
    weight, bias, x = a.constant("weight"), a.constant("bias"), a.image("input")
    if weight is None or a["transposed"]:
        raise a.refusal("transposed convolutions are not there")
    one = weight.ndim == 3
    if one:
        weight = weight[:, :, None]
    stride, dilation = _pair(a["stride"], (1, 1)), _pair(a["dilation"], (1, 1))
    padding = a["padding"]
    if isinstance(padding, str):
        whole = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)
        ]
        if any(total % 2 for total in whole):
            x = _padded(a, x, [total // 2 for total in whole], [total - total // 2 for total in whole])
            whole = [0, 0]
        padding = [total // 2 for total in whole]
    padding = _pair(padding, (0, 0))
    if one:
        stride, dilation, padding = (1, stride[1]), (1, dilation[1]), (0, padding[1])
    return a.add(
        Conv(
            input=x,
            output=a.output(),
            weight=weight,
            bias=np.zeros(len(weight)) if bias is None else bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=int(a["groups"] or 1),
        )
    )


def _matrix(a: Arguments, x: Value, weight: Array | None, bias: Array | None) -> Value:
    if weight is None or weight.ndim != 2 or x.shape[1:] != (1, 1):
        raise a.refusal("linear layers are for vectors, with weights that are constant")
    bias = np.zeros(len(weight)) if bias is None else np.broadcast_to(bias, (len(weight),))
    return a.add(Conv(input=x, output=a.output(), weight=weight[:, :, None, None], bias=bias))


def _linear(a: Arguments) -> Value:
    return _matrix(a, a.image("input"), a.constant("weight"), a.constant("bias"))


def _addmm(a: Arguments) -> Value:
    weight, bias = a.constant("mat2"), a.constant("self")
    if weight is None or a["beta"] != 1 or a["alpha"] != 1:
        raise a.refusal("it has factors")
    return _matrix(a, a.image("mat1"), weight.T, bias)


def _mm(a: Arguments) -> Value:
    weight = a.constant("mat2" if "mat2" in a.given else "other")
    return _matrix(a, a.image("self"), None if weight is None else weight.T, None)


def _batch_norm(a: Arguments) -> Any:
    x = a.image("input")
    mean, var = a.constant("running_mean"), a.constant("running_var")
    if mean is None or var is None or a["training"]:
        raise a.refusal("its batch norm takes statistics of the batch")
    weight, bias = a.constant("weight"), a.constant("bias")
    scale = (1 if weight is None else weight) / np.sqrt(var + float(a["eps"]))
    shift = (0 if bias is None else bias) - mean * scale
    y = a.add(Affine(input=x, output=a.output(), scale=scale, shift=shift))
    return y if a.what == "batch_norm" else (y, None, None)


def _activation(a: Arguments) -> Value:
    x = a.image("self")
    match a.what:
        case "hardtanh":
            act = Activation("clamp", float(a["min_val"]), float(a["max_val"]))
        case "relu6":
            act = Activation("clamp", 0.0, 6.0)
        case "clamp" | "clamp_min" | "clamp_max":
            low, high = (a[side] for side in ("min", "max"))
            if isinstance(low, (Value, Tensor)) or isinstance(high, (Value, Tensor)):
                raise a.refusal("its limits are tensors")
            act = Activation(
                "clamp", -math.inf if low is None else float(low), math.inf if high is None else float(high)
            )
        case "leaky_relu":
            act = Activation("leaky", float(a["negative_slope"]))
        case "elu":
            if a["scale"] != 1 or a["input_scale"] != 1:
                raise a.refusal("it has scales")
            act = Activation("elu", float(a["alpha"]))
        case "gelu":
            act = Activation("gelu_tanh" if a["approximate"] == "tanh" else "gelu")
        case name:
            act = Activation(name)
    return a.add(activation(x, a.output(), act))


def _prelu(a: Arguments) -> Value:
    slope = a.constant("weight")
    if slope is None or slope.size != 1:
        raise a.refusal("it has a slope for each channel")
    return a.add(activation(a.image("self"), a.output(), Activation("leaky", float(slope.reshape(())))))


def _arithmetic(a: Arguments) -> Value:
    left, right = a["self"], a["other"]
    mode = a.what
    factor = float(a["alpha"] if a["alpha"] is not None else 1)
    if mode == "rsub":
        mode, left, right = "sub", right, left
    if a["rounding_mode"] is not None:
        raise a.refusal("it rounds")
    if isinstance(left, Value) and isinstance(right, Value):
        if factor != 1:
            raise a.refusal("it has a factor")
        return _both(a, mode, left, right)
    if isinstance(left, Value):
        constant, x = _by_channel(a, right), left
        scale, shift = {
            "add": (np.ones(1), factor * constant),
            "sub": (np.ones(1), -factor * constant),
            "mul": (constant, np.zeros(1)),
            "div": (1 / constant if np.all(constant) else np.full(1, np.nan), np.zeros(1)),
        }[mode]
    else:
        constant, x = _by_channel(a, left), a.image("other") if a.what != "rsub" else a.image("self")
        if mode == "div":
            raise a.refusal("it divides by what depends on the images")
        scale, shift = {
            "add": (np.full(1, factor), constant),
            "sub": (np.full(1, -factor), constant),
            "mul": (constant, np.zeros(1)),
        }[mode]
    if x.shape != a.shapes[0]:
        raise a.refusal("a constant is larger than the image")
    full = (x.shape[0],)
    return a.add(
        Affine(input=x, output=a.output(), scale=np.broadcast_to(scale, full).copy(),
               shift=np.broadcast_to(shift, full).copy())
    )  # fmt: skip


def _both(a: Arguments, mode: str, left: Value, right: Value) -> Value:
    modes: dict[str, Literal["add", "multiply", "subtract"]] = {
        "add": "add", "mul": "multiply", "sub": "subtract",
    }  # fmt: skip
    if mode not in modes:
        raise a.refusal("it divides by what depends on the images")
    if left.shape != a.shapes[0]:
        if mode == "sub":
            raise a.refusal("it takes an image from a vector")
        left, right = right, left
    if left.shape != a.shapes[0] or right.shape not in (left.shape, (left.shape[0], 1, 1)):
        raise a.refusal(f"images of shape {list(left.shape)} and {list(right.shape)} are combined")
    return a.add(Binary(input=left, output=a.output(), other=right, mode=modes[mode]))


def _by_channel(a: Arguments, value: Any) -> Array:
    """A constant as one number, or one a channel."""
    array = _array(value)
    if array.size == 1:
        return array.reshape(1)
    channels, height, width = a.shapes[0]
    rank = 2 if (height, width) == (1, 1) and array.ndim <= 2 else 4
    shape = (1,) * (rank - array.ndim) + array.shape
    if shape != (1, channels, 1, 1)[:rank]:
        raise a.refusal(f"a constant of shape {list(array.shape)} is neither one number nor one a channel")
    return array.reshape(-1)


def _neg(a: Arguments) -> Value:
    x = a.image("self")
    return a.add(
        Affine(input=x, output=a.output(), scale=np.full(x.shape[0], -1.0), shift=np.zeros(x.shape[0]))
    )


def _pool(a: Arguments) -> Any:
    kernel = _pair(a["kernel_size"], (1, 1))
    op = Pool(
        input=a.image("self"),
        output=a.output(),
        mode="average" if a.what == "avg_pool2d" else "max",
        kernel=kernel,
        stride=_pair(a["stride"], kernel),
        padding=_pair(a["padding"], (0, 0)),
        dilation=_pair(a["dilation"], (1, 1)),
        counts_padding=bool(a["count_include_pad"]),
        divisor=float(a["divisor_override"] or 0),
    )
    y = a.add(op)
    return (y, None) if a.what == "max_pool2d_with_indices" else y


def _bins(a: Arguments) -> Any:
    mode: Literal["max", "average"] = "max" if "max" in a.what else "average"
    y = a.add(Bins(input=a.image("self"), output=a.output(), mode=mode))
    return (y, None) if mode == "max" else y


def _reduction(a: Arguments) -> Value:
    """A mean or a maximum over all positions."""
    x = a.image("self")
    # Of what is not taken together there is one position only.
    spread = bool(a["dim"]) and all(d in (2, 3, -1, -2) for d in a["dim"])
    if not spread or a.shapes[0] != (x.shape[0], 1, 1):
        raise a.refusal("it is not over all positions of an image")
    if a["dtype"] is not None:
        raise a.refusal("it changes the dtype")
    mode: Literal["max", "average"] = "average" if a.what == "mean" else "max"
    return a.add(Bins(input=x, output=a.output(), mode=mode))


def _reshape(a: Arguments) -> Value:
    x, shape = a.image(next(iter(a.given))), a.shapes[0]
    if x.shape == shape:
        return x
    if math.prod(shape) != x.size:
        raise a.refusal("it repeats numbers")
    return a.add(Copy(input=x, output=a.output()))


def _cat(a: Arguments) -> Value:
    parts, output = a["tensors"], a.output()
    if any(not isinstance(part, Value) for part in parts) or any(
        p.shape[1:] != output.shape[1:] for p in parts
    ):
        raise a.refusal("only images of one size are put together, channel after channel")
    if int(a["dim"] or 0) in (0,) or sum(part.shape[0] for part in parts) != output.shape[0]:
        raise a.refusal("only channels are put together")
    at = 0
    for part in parts:
        a.add(Copy(input=part, output=output, to=at, channels=part.shape[0]))
        at += part.shape[0]
    return output


def _split(a: Arguments) -> list[Value]:
    x, results = a.image("self"), []
    at = 0
    if sum(shape[0] for shape in a.shapes) != x.shape[0]:
        raise a.refusal("only channels are split")
    for number, shape in enumerate(a.shapes):
        part = Value(shape, f"{a.name}_{number}")
        results.append(a.add(Copy(input=x, output=part, start=at, channels=shape[0])))
        at += shape[0]
    return results


def _slice(a: Arguments) -> Value:
    x, shape = a.image("self"), a.shapes[0]
    dim, start, step = int(a["dim"]), int(a["start"] or 0), int(a["step"] or 1)
    if shape == x.shape:
        return x
    place = [c for c, (before, after) in enumerate(zip(x.shape, shape, strict=True)) if before != after]
    if len(place) != 1 or dim == 0:
        raise a.refusal("it cuts something else than channels, rows or columns")
    if start < 0:
        start += x.shape[place[0]]
    if place[0] == 0:
        if step != 1:
            raise a.refusal("it takes every other channel")
        return a.add(Copy(input=x, output=a.output(), start=start, channels=shape[0]))
    rows = place[0] == 1
    return a.add(
        Pool(input=x, output=a.output(), mode="max", kernel=(1, 1), stride=(step, 1) if rows else (1, step),
             padding=(-start, 0) if rows else (0, -start))
    )  # fmt: skip


def _padded(
    a: Arguments, x: Value, before: Sequence[int], after: Sequence[int], channels: Pair = (0, 0)
) -> Value:
    c, h, w = x.shape
    shape = (c + sum(channels), h + before[0] + after[0], w + before[1] + after[1])
    output = Value(shape, f"{a.name}_padded")
    shift = (before[0], before[1])
    return a.add(Copy(input=x, output=output, to=channels[0], channels=c, shift=shift, clears=True))


def _pad(a: Arguments) -> Value:
    pads = [*a["pad"], *[0] * (6 - len(a["pad"]))]
    if (a["mode"] or "constant") != "constant" or float(a["value"] or 0) != 0:
        raise a.refusal("padding is with zeros")
    if min(pads) < 0 or len(pads) > 6:
        raise a.refusal("padding is of channels, rows and columns, and not negative")
    if a.shapes[0] == a.image("self").shape:
        return a.image("self")
    if a.shapes[0][1:] == (1, 1):
        pads = [0, 0, 0, 0, *pads[:2]] if not any(pads[2:]) else pads
    y = _padded(a, a.image("self"), (pads[2], pads[0]), (pads[3], pads[1]), (pads[4], pads[5]))
    if y.shape != a.shapes[0]:
        raise a.refusal("it pads something else than rows and columns")
    return y


def _softmax(a: Arguments) -> Value:
    x = a.image("self")
    if x.shape[1:] != (1, 1) or a["dim"] not in (1, -1):
        raise a.refusal("it is not over the classes")
    return a.add(Softmax(input=x, output=a.output()))


def _cast(a: Arguments) -> Value:
    """A conversion that changes nothing: what is no floating point number was refused before."""
    return a.image("self")


TRANSLATIONS: dict[str, Callable[[Arguments], Any]] = {
    **dict.fromkeys(("conv2d", "convolution", "conv1d"), _conv),
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("mm", "matmul"), _mm),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(
        ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "leaky_relu", "elu", "silu", "gelu",
         "sigmoid", "tanh", "hardsigmoid", "hardswish"),
        _activation,
    ),
    **dict.fromkeys(("prelu", "_prelu_kernel"), _prelu),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), _arithmetic),
    "neg": _neg,
    **dict.fromkeys(("max_pool2d", "max_pool2d_with_indices", "avg_pool2d"), _pool),
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"), _bins),
    **dict.fromkeys(("mean", "amax"), _reduction),
    **dict.fromkeys(
        ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "_unsafe_view"),
        _reshape,
    ),
    "cat": _cat,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "slice": _slice,
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    **dict.fromkeys(("softmax", "_softmax"), _softmax),
    **dict.fromkeys(("to", "_to_copy"), _cast),
}  # fmt: skip
"""By the name of PyTorch's operation."""
