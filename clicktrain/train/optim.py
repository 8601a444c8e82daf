"""Optimizers, and the parameters that they train."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from clicktrain.errors import UserError
from clicktrain.train.config import RunConfig


def make_optimizer(model: nn.Module, config: RunConfig) -> Optimizer:
    """SGD, AdamW or Adam over the parameters that are trained.

    With ``decay_norm_and_bias`` off, parameters of at most one dimension (batch norm, biases) form a
    second group without weight decay.

    Raises:
        UserError: nothing in the model can be trained.
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
