"""Averages of the weights over training: a moving average, and the slow weights of Lookahead."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from clicktrain.methods.driver.averages import mask_copy_

_Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Make an exponential moving average of the model's parameters and buffers.

    The n-th update keeps ``min(decay, (1 + n) / (10 + n))`` of the old average, so that a short run does not
    keep its first weights for long. Integer buffers are copied, not averaged. ``pruner.follow(average)``
    prunes it with the model.
    """

    def follow(averages: _Tensors, current: _Tensors, updates: Tensor | int) -> None:
        count = int(average.n_averaged)  # on the CPU: reading ``updates`` would wait for a GPU
        _blend_(averages, current, min(decay, (1 + count) / (10 + count)))

    average = AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
    return average


def begin_again_(average: AveragedModel, model: nn.Module) -> None:
    """Set an average to the model as it is, as if it had only now begun."""
    average.n_averaged.zero_()
    average.update_parameters(model)


LOOKAHEAD_STEPS = 5
_LOOKAHEAD_KEEP, _LOOKAHEAD_POWER = 0.95**5, 3
"""Jordan 2024 (arXiv:2404.00498), section 3.4 and its released settings."""


class SlowWeights(AveragedModel):
    """The slow weights of Lookahead (Zhang et al. 2019, Algorithm 1), buffers included.

    Every `LOOKAHEAD_STEPS` optimizer steps they move towards the network's weights, which then go back to
    them; the optimizer keeps its momentum. ``pruner.follow`` prunes them with the model.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start from the model as it is."""
        self._keep = 0.0
        super().__init__(model, multi_avg_fn=self._follow, use_buffers=True)
        self.n_averaged.fill_(1)

    def _follow(self, slow: _Tensors, fast: _Tensors, updates: Tensor | int) -> None:
        _blend_(slow, fast, self._keep)

    @torch.no_grad()
    def exchange_(self, model: nn.Module, share: float, masks: Mapping[str, Tensor]) -> None:
        """Move the slow weights, and put the model's back to them.

        They keep ``0.95^5 * share^3`` of what they were (Jordan 2024): next to nothing early in a run.

        Args:
            model: the network.
            share: of the run, or of the cycle of its learning rate, that is done.
            masks: of weights that are zero now, by layer, bool of the weight's shape: they are dropped here
                too, so that none comes back with its old value.
        """
        mask_copy_(self.module, masks)
        self._keep = _LOOKAHEAD_KEEP * share**_LOOKAHEAD_POWER
        self.update_parameters(model)
        pairs = zip(_tensors(model), _tensors(self.module), strict=True)
        moved = [(fast, slow) for fast, slow in pairs if fast.is_floating_point()]
        torch._foreach_copy_([fast.detach() for fast, _ in moved], [slow.detach() for _, slow in moved])


def _blend_(averages: _Tensors, current: _Tensors, keep: float) -> None:
    """Keep a share of each average, the rest is what is current; integers are copied."""
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, current, 1 - keep)
    else:
        torch._foreach_copy_(averages, current)


def _tensors(model: nn.Module) -> list[Tensor]:
    return list(itertools.chain(model.parameters(), model.buffers()))
