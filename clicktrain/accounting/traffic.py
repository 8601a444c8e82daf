"""Bytes moved by the cheap operations: batch norm, activations, pooling; modules and functions alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_ACTIVATIONS = frozenset({
    "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
    "mish", "prelu", "relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh",
    "threshold",
})  # fmt: skip
_POOLINGS = ("pool1d", "pool2d", "pool3d")


class Traffic(TorchFunctionMode):
    """While active, adds up bytes read and written: ``bytes["batch_norm" | "activation" | "pooling"]``."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # Functions that one of torch's functions calls itself do not come here: nothing counts twice.
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            kind = _kind(getattr(func, "__name__", ""), x)
            if kind is not None:
                output = result[0] if isinstance(result, tuple) else result
                self.bytes[kind] += _bytes(x) + _bytes(output)
        return result


def _kind(name: str, x: Tensor) -> str | None:
    name = name.strip("_").removesuffix("_with_indices")
    if name == "batch_norm":
        return "batch_norm"
    if name in _ACTIVATIONS:
        return "activation"
    # The mean over the positions of a feature map is how many networks write global average pooling.
    if name.endswith(_POOLINGS) or (name == "mean" and x.dim() == 4):
        return "pooling"
    return None


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
