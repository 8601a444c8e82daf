"""Random draws that do not depend on how many there are: networks of other widths can be compared."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clicktrain.graph.random_state import own_random_numbers


@contextlib.contextmanager
def steadily(tensors: tuple[Tensor, ...]) -> Iterator[None]:
    """Dropout and noise draw constants, all else the same numbers each time; generators stay as they are.

    Args:
        tensors: on whose devices something is drawn.
    """
    with own_random_numbers(tensors), _Steady():  # type: ignore[no-untyped-call]
        torch.manual_seed(0)
        random.seed(0)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(0)
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
