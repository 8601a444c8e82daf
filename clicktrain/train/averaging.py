"""Moving average of the weights over the run."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of the model that follows it: exponential moving average of parameters and buffers.

    The decay of the n-th update is ``min(decay, (1 + n) / (10 + n))``, so that a short run is not held
    back by its first weights. Whole-number buffers are copied, not averaged. ``pruner.follow(average)`` keeps
    it pruned as the model is.

    Args:
        model: the model as trained.
        decay: share of the old average that an update keeps, in [0, 1).
    """

    def follow(averages: _Tensors, current: _Tensors, updates: Tensor | int) -> None:
        count = int(average.n_averaged)  # on the CPU: reading ``updates`` would wait for a GPU
        keep = min(decay, (1 + count) / (10 + count))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, 1 - keep)
        else:
            torch._foreach_copy_(averages, current)

    average = AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
    return average
