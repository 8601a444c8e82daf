"""Running a network only to watch it: as it is in plain Python, and without leaving a trace."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clicktrain.graph.inputs import Inputs


def plain(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, where hooks work."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


@contextlib.contextmanager
def no_trace(model: nn.Module, example: Inputs, *, training: bool) -> Iterator[None]:
    """Another mode; afterwards every module's mode, all buffers and the random state are as before.

    So are the attributes of modules (a counter in ``forward``), as far as they are not changed in place. The
    flags are set directly: ``model.eval()`` may be overridden and do more.

    Args:
        training: False: evaluation mode. True: training mode, unless the model is in it already: then every
            module stays in the mode that it has (frozen batch norms).
    """
    modules = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({t.device for t in example.tensors() if t.is_cuda}, key=str)
    try:
        with torch.random.fork_rng(devices):
            if not (training and model.training):
                for module, _, _ in modules:
                    module.training = training
            yield
    finally:
        for module, attributes, own in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, before in buffers:
                if not buffer.is_meta and not torch.equal(buffer, before):  # meta: shapes without values
                    buffer.copy_(before)


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
                self.bytes[kind] += x.nbytes + getattr(output, "nbytes", 0)
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
