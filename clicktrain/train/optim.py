"""Optimizers, batch sizes and learning rates over a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from clicktrain.errors import UserError
from clicktrain.train.config import RunConfig
from clicktrain.train.lamb import Lamb
from clicktrain.train.layer_rates import rate_factors


def make_optimizer(model: nn.Module, config: RunConfig) -> Optimizer:
    """Make SGD, AdamW, Adam or LAMB over the trainable parameters.

    With ``decay_norm_and_bias`` off, parameters of at most one dimension (batch norm, biases) form a
    second group without weight decay. With a ``bias_rate_factor`` biases form groups of their own, and so do
    the parameters of each learning rate of ``layer_decay`` and ``layer_rates``; these have their factor as
    ``rate_factor``, the largest first.

    Raises:
        UserError: the model has no trainable parameter, or none that a pattern of ``layer_rates`` fits.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError(f"model {config.model} has no parameter to train: all have requires_grad off")
    factors = rate_factors(model, config.layer_decay, config.layer_rates)
    common: dict[str, Any] = {"lr": config.peak_learning_rate, "weight_decay": config.weight_decay}
    undecayed: dict[str, Any] = {"weight_decay": 0.0}
    if config.optimizer == "lamb":
        undecayed["adapt"] = False
    groups: list[dict[str, Any]] = []
    for factor in sorted({factors[name] for name in trained}, reverse=True):
        for of_biases in (False, True):
            own = [
                p
                for name, p in trained.items()
                if factors[name] == factor and _has_bias_rate(name, config) is of_biases
            ]
            decayed = [p for p in own if p.ndim > 1 or config.decay_norm_and_bias]
            others = [p for p in own if p.ndim <= 1 and not config.decay_norm_and_bias]
            rates: dict[str, Any] = (
                {"lr": common["lr"] * factor, "rate_factor": factor} if factor != 1 else {}
            )
            if of_biases:
                rates["lr"] = rates.get("lr", common["lr"]) * config.bias_rate_factor
                rates["weight_decay"] = common["weight_decay"] / config.bias_rate_factor
            groups += [{**rates, "params": decayed}, {**rates, "params": others, **undecayed}]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "adamw":
        return AdamW(groups, betas=(config.momentum, 0.999), **common)
    if config.optimizer == "adam":
        return Adam(groups, betas=(config.momentum, 0.999), **common)
    if config.optimizer == "lamb":
        return Lamb(groups, betas=(config.momentum, 0.999), **common)
    return SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **common)


def _has_bias_rate(name: str, config: RunConfig) -> bool:
    return config.bias_rate_factor != 1 and name.rpartition(".")[2] == "bias"


def shown_learning_rate(optimizer: Optimizer) -> float:
    """The learning rate of the settings' schedule now: that of a layer whose rate has no factor."""
    group = optimizer.param_groups[0]
    rate = float(group["lr"])
    return rate / group["rate_factor"] if "rate_factor" in group else rate


def trained_parameters(optimizer: Optimizer) -> list[Tensor]:
    """The parameters in the optimizer now (packing replaces some of them)."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Epochs with ``batches`` of ``images`` and ``steps`` of the optimizer, from ``epoch`` (from 0) on."""

    images: int
    batches: int
    steps: int
    learning_rate_factor: float = 1.0
    epoch: int = 0
    batches_before: int = 0
    steps_before: int = 0


class BatchSizes:
    """All batch sizes of a run so far; one entry unless the batch was resized."""

    def __init__(self, images: int, batches: int, accumulate: int) -> None:
        """Start a run with ``batches`` batches of ``images`` images an epoch."""
        self._accumulate = accumulate
        self._entries = [BatchSize(images, batches, math.ceil(batches / accumulate))]

    @property
    def first(self) -> BatchSize:
        """The size at the start of the run."""
        return self._entries[0]

    @property
    def now(self) -> BatchSize:
        """The size in the running epoch."""
        return self._entries[-1]

    def resize(self, epoch: int, images: int, batches: int, learning_rate_factor: float) -> None:
        """Set another size from epoch ``epoch`` (from 0) on, which has not begun."""
        last, passed = self.now, epoch - self.now.epoch
        if passed < 1:
            raise ValueError(f"epoch {epoch} has its batch size already")
        steps = math.ceil(batches / self._accumulate)
        before = last.batches_before + passed * last.batches, last.steps_before + passed * last.steps
        self._entries.append(BatchSize(images, batches, steps, learning_rate_factor, epoch, *before))

    def batch_number(self, epoch: int, batch: int) -> int:
        """Number in the run of a batch of the running epoch, both counted from 0."""
        return self.now.batches_before + (epoch - self.now.epoch) * self.now.batches + batch

    def schedule_step(self, step: int) -> float:
        """The step at which a run of the first batch size would be in the same place.

        In such a run it is ``step`` itself, exactly.
        """
        entry = self._at(step)
        return entry.epoch * self.first.steps + (step - entry.steps_before) * (self.first.steps / entry.steps)

    def learning_rate_factor(self, step: int) -> float:
        """The factor on the scheduled learning rate at an optimizer step."""
        return self._at(step).learning_rate_factor

    def _at(self, step: int) -> BatchSize:
        return next(entry for entry in reversed(self._entries) if step >= entry.steps_before)

    def state_dict(self) -> list[dict[str, Any]]:
        """As plain numbers."""
        return [dataclasses.asdict(entry) for entry in self._entries]

    def load_state(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Inverse of `state_dict`."""
        self._entries = [BatchSize(**entry) for entry in saved]


_TRIANGLE_RISE, _TRIANGLE_START = 0.23, 0.2  # Jordan 2024 (arXiv:2404.00498), its released settings
_ONECYCLE_RISE = 0.3
_ONECYCLE_START = 1 / 25
_ONECYCLE_END = 1 / 25e4


def learning_rate_factor(
    config: RunConfig, total_steps: int, run_steps: int | None = None
) -> Callable[[float], float]:
    """The factor on the peak learning rate at each optimizer step.

    ``onecycle`` is the curve of ``torch.optim.lr_scheduler.OneCycleLR`` (cosine up from 1/25, cosine down to
    1/250000) without its change of momentum. ``triangular`` rises in a straight line from 0.2 (for 0.23 of
    the run unless ``warmup_epochs`` says otherwise) and falls in one. The others start with a linear warm-up
    when ``warmup_epochs`` is set. ``cosine``, ``linear`` and ``triangular`` reach zero at the step after the
    last.

    Args:
        config: its schedule, warm-up, milestones.
        total_steps: in which the schedule is done.
        run_steps: in the epochs of ``config``, if those are others: what the warm-up is a part of.

    Returns:
        A function of the step, counted from 0; steps after the last give the last value. With batches that
        grow, the steps are those of a run without (`BatchSizes.schedule_step`), and fall between them.
    """
    warmup = warmup_steps(config, run_steps or total_steps)
    top = peak_step(config, total_steps, warmup)

    def onecycle(step: float) -> float:
        if step <= top:
            return _cosine(_ONECYCLE_START, 1.0, step / top if top > 0 else 1.0)
        return _cosine(1.0, _ONECYCLE_END, (step - top) / max(total_steps - 1.0 - top, 1.0))

    def factor(step: float) -> float:
        step = min(step, total_steps)
        if config.schedule == "onecycle":
            return onecycle(min(step, total_steps - 1))
        if config.schedule == "triangular":
            if step < top:
                return _TRIANGLE_START + (1 - _TRIANGLE_START) * step / top
            return (total_steps - step) / max(total_steps - top, 1)
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "linear":
            return (total_steps - step) / max(total_steps - warmup, 1)
        if config.schedule == "cosine":
            return _cosine(1.0, 0.0, (step - warmup) / max(total_steps - warmup, 1))
        if config.schedule == "step":
            return config.gamma ** sum(step / total_steps >= milestone for milestone in config.milestones)
        return 1.0

    return factor


def warmup_steps(config: RunConfig, run_steps: int) -> int:
    """Optimizer steps of the warm-up in a run of `run_steps`."""
    return round(config.warmup_epochs / config.epochs * run_steps)


def peak_step(config: RunConfig, total_steps: int, warmup: int) -> float:
    """The step from which the schedule falls."""
    if config.schedule == "onecycle":
        return warmup - 1.0 if warmup else _ONECYCLE_RISE * total_steps - 1.0
    if config.schedule == "triangular":
        return warmup or _TRIANGLE_RISE * total_steps
    return warmup


def make_scheduler(
    optimizer: Optimizer,
    config: RunConfig,
    total_steps: int,
    sizes: BatchSizes | None = None,
    factor: Callable[[float], float] | None = None,
) -> LambdaLR:
    """Make the scheduler, to be stepped once after each of the ``total_steps`` optimizer steps.

    ``sizes`` of the batches are followed as they grow (`refresh_` after that); ``factor`` takes the place of
    the settings' own schedule (`clicktrain.train.second_cycle`).
    """
    curve = learning_rate_factor(config, total_steps) if factor is None else factor

    def followed(step: int) -> float:
        return curve(sizes.schedule_step(step)) * sizes.learning_rate_factor(step) if sizes else curve(step)

    return LambdaLR(optimizer, followed)


def refresh_(scheduler: LambdaLR) -> None:
    """Set the learning rates of the coming step again, after the batch size has changed."""
    step = scheduler.last_epoch
    rates = [
        base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
