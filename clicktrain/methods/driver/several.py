"""What a loop of several processes has to do, and how it is noticed that it does not."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clicktrain.comm.agreement import gathered, several_processes
from clicktrain.errors import UserError
from clicktrain.methods.driver.publisher import ParametersReplaced, Publisher

_FSDP = ("FullyShardedDataParallel", "FSDPModule")
_PARALLEL: tuple[type[nn.Module], ...] = (DistributedDataParallel, nn.DataParallel)
_ROUNDING = 1e-9
"""Relative; sums in float64 may be added up in another order on another processor."""


class SameGradients:
    """Looks whether all processes step by the same gradients: at the first step, and whenever it may change.

    A DistributedDataParallel that was made before weights were replaced does not average those of the new
    ones, without a word, and each process then trains a network of its own.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._due = True
        publisher.subscribe(self._look_again, ParametersReplaced)

    def _look_again(self, _: ParametersReplaced) -> None:
        self._due = True

    @torch.no_grad()
    def check(self, optimizer: Optimizer) -> None:
        """Raise a UserError, in all processes, if the gradients of an optimizer's step are not the same."""
        if not self._due or not several_processes():
            return
        self._due = False
        sums = [0.0, 0.0]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    gradient = gradient.to_dense() if gradient.is_sparse else gradient
                    sums[0] += float(gradient.sum(dtype=torch.float64))
                    sums[1] += float(gradient.abs().sum(dtype=torch.float64))
        first, *others = gathered(sums)
        for rank, other in enumerate(others, start=1):
            if not all(_same(a, b, first[1]) for a, b in zip(first, other, strict=True)):
                raise UserError(
                    f"process {rank} has other gradients than the first one: wrap the network by "
                    "pruner.wrapped(DistributedDataParallel), which averages them, and wraps it again when "
                    "weights are replaced"
                )


def _same(a: float, b: float, size: float) -> bool:
    if not math.isfinite(a) or not math.isfinite(b):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= _ROUNDING * max(size, 1e-300)


def check_not_sharded(model: object) -> None:
    """Raise a UserError for a network whose weights are spread over processes, in pieces."""
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        sharding = _sharding(module)
        if sharding is not None:
            raise UserError(
                f"{name or 'the network'} is sharded ({sharding}): each process has pieces of its weights, "
                "which can be neither pruned nor packed; use DistributedDataParallel, by "
                "pruner.wrapped(DistributedDataParallel), and packed=True, with which weights, gradients and "
                "optimizer state take less memory as they are pruned"
            )


def _sharding(module: nn.Module) -> str | None:
    """What has sharded a module, by the names of classes: importing them takes a second."""
    for kind in type(module).__mro__:
        if kind.__name__ in _FSDP and kind.__module__.startswith("torch.distributed."):
            return kind.__name__
    for tensor in (*module._parameters.values(), vars(module).get("weight")):
        if any(c.__name__ == "DTensor" for c in type(tensor).__mro__):
            return "DTensor"
        flat = getattr(getattr(tensor, "_base", None), "_is_flat_param", False)
        if flat or getattr(tensor, "_fsdp_flattened", False):
            return _FSDP[0]
    return None


def is_data_parallel(model: nn.Module) -> bool:
    """Whether it is, or is a wrapper around, a wrapper that averages gradients of the weights it has now."""
    return any(isinstance(module, _PARALLEL) for module in model.modules())
