"""A slow and literal model of a CUDA graph on the CPU; it notes operators and runs them again."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

R = TypeVar("R")


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, _fresh(func, result)))
        return result


def _fresh(func: Any, result: Any) -> list[Tensor]:
    """Results in new memory: views and operators in place give memory that is there already."""
    outputs = result if isinstance(result, tuple) else (result,)
    new = [o for o, r in zip(outputs, func._schema.returns, strict=True) if r.alias_info is None]
    return [one for one in tree_leaves(new) if isinstance(one, Tensor)]


class OperatorTape:
    """A `clicktrain.compiler.recorded_step.Recorder` for the CPU."""

    def refusal(self, device: torch.device) -> str | None:
        return None if device.type == "cpu" else "it is for the CPU"

    def apart(self) -> Any:
        return random.getstate()

    def warm_up(self, run: Callable[[], object], device: torch.device) -> None:
        run()

    def record(self, run: Callable[[], R], device: torch.device) -> tuple[R, Callable[[], None]]:
        with _Noting() as noting:
            result = run()
        for one in tree_leaves(result):  # a capture computes nothing
            if isinstance(one, Tensor) and one.is_floating_point():
                one.detach().fill_(float("nan"))

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, fresh in noting.calls:
                for old, one in zip(fresh, _fresh(func, func(*args, **kwargs)), strict=True):
                    if old.numel():
                        old.detach().copy_(one)

        return result, replay
