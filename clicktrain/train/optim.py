"""Optimizers, and the moving average of the weights."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from clicktrain.errors import UserError
from clicktrain.train.config import RunConfig


def make_optimizer(model: nn.Module, config: RunConfig) -> Optimizer:
    """Make SGD, AdamW or Adam over the trainable parameters.

    With ``decay_norm_and_bias`` off, parameters of at most one dimension (batch norm, biases) form a
    second group without weight decay.

    Raises:
        UserError: the model has no trainable parameter.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError(f"model {config.model} has no parameter to train: all have requires_grad off")
    groups: list[dict[str, Any]] = [{"params": trained}]
    if not config.decay_norm_and_bias:
        groups = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"lr": config.peak_learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return AdamW(groups, betas=(config.momentum, 0.999), **common)
    if config.optimizer == "adam":
        return Adam(groups, betas=(config.momentum, 0.999), **common)
    return SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)


def trained_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters in the optimizer now (packing replaces some of them)."""
    return [p for group in optimizer.param_groups for p in group["params"]]


_Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Make an exponential moving average of the model's parameters and buffers.

    The decay of the n-th update is ``min(decay, (1 + n) / (10 + n))``, so that a short run does not keep
    its first weights for long. Integer buffers are copied, not averaged. ``pruner.follow(average)`` prunes it
    with the model.

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
