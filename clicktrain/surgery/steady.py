"""Networks of other widths can be compared: random draws do not depend on how many there are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from clicktrain.graph.random_state import own_random_numbers


@contextlib.contextmanager
def steadily(tensors: tuple[Tensor, ...]) -> Iterator[None]:
    """Dropout and noise draw constants, all else the same numbers each time; generators stay as they are."""
    with own_random_numbers(tensors, seed=0), _Steady():  # type: ignore[no-untyped-call]
        yield


class _Steady(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Random draws give constants, so that they do not depend on how many there are."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        value = _DRAWN.get(name.rstrip("_"))
        if name == "native_dropout":
            return args[0], torch.ones_like(args[0], dtype=torch.bool)
        if name.startswith("rrelu_with_noise") and len(args) > 4:
            args = (*args[:4], False, *args[5:])
        result = func(*args, **(kwargs or {}))
        if value is not None and isinstance(result, Tensor):
            with torch.no_grad():
                result.fill_(value)
        return result


_DRAWN = {
    "bernoulli": 1.0, "rand": 0.5, "rand_like": 0.5, "uniform": 0.5, "randn": 0.5, "randn_like": 0.5,
    "normal": 0.5, "normal_functional": 0.5, "exponential": 1.0, "log_normal": 1.0, "cauchy": 0.5,
    "geometric": 1.0,
}  # fmt: skip


class NormAlone(_BatchNorm):
    """Batch norms that take inputs of any dimension, as the synchronized one does."""

    def _check_input_dim(self, input: Tensor) -> None:
        del input


def norm_alone_(model: nn.Module) -> None:
    """Turn synchronized batch norms into ones that do not wait for other processes."""
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = NormAlone  # type: ignore[assignment]
