"""Checks of a run's settings beyond their types: ranges, and what does not go together."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, Literal, get_origin

from clicktrain.accounting.memory import bytes_of
from clicktrain.data import RandAugment
from clicktrain.errors import UserError, shown
from clicktrain.settings import convert, field_names, type_hints

RANGES = {
    "epochs": (1, 1_000_000),
    "budget_epochs": (1, 1_000_000),
    "batch_size": (1, 10_000_000),
    "accumulate": (1, 1_000_000),
    "parts": (1, 65_536),
    "evaluate_every": (1, 1_000_000),
    "checkpoint_every": (1, 1_000_000),
    "keep_checkpoints": (1, math.inf),
    "batch_granularity": (1, 10_000_000),
    "batch_limit": (1, 2**62),
    "learning_rate_batch": (1, 2**62),
    "image_size": (1, 8192),
    "threads": (1, 4096),
    "workers": (0, 1024),
    "shuffle_buffer": (1, 2**62),
    "cutout": (0, 65_536),
    "seed": (0, 2**63 - 1),
    "holdout": (1, 2**62),
    "warmup_epochs": (0, 1_000_000),
    "weight_decay": (0, math.inf),
    "mixup": (0, math.inf),
    "cutmix": (0, math.inf),
    "mix_probability": (0, 1),
    "erasing": (0, 1),
    "augment_repeats": (1, 1000),
    "randaugment_operations": (1, 100),
    "randaugment_magnitude": (0, 10),
    "randaugment_deviation": (0, 10),
    "randaugment_probability": (0, 1),
    "layer_decay": (0, 1),
    "clip_grad_norm": (0, math.inf),
    "recalibrate_norms": (0, 1_000_000),
}
"""Smallest and largest value; the system would refuse larger numbers, for lack of memory or threads."""
_ABOVE_ZERO = (
    "width", "learning_rate", "bias_rate_factor", "gamma", "val_fraction", "distill_temperature",
    "layer_decay",
)  # fmt: skip
_BELOW_ONE = ("momentum", "label_smoothing", "ema_decay", "val_fraction", "cycle_floor")


def check_settings(config: Any) -> None:
    """Raise a UserError for a value of a RunConfig out of range, or two that contradict each other."""
    for name, (low, most) in RANGES.items():
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise UserError(f"{name} is {shown(value)}: must be at least {low}")
        if value is not None and value > most:
            raise UserError(f"{name} is {shown(value)}: must be at most {most}")
    for name in _ABOVE_ZERO:
        if not 0 < (value := getattr(config, name)) < math.inf:
            raise UserError(f"{name} is {shown(value)}: must be above 0")
    for name in _BELOW_ONE:
        if not 0 <= (value := getattr(config, name)) < 1:
            raise UserError(f"{name} is {shown(value)}: must be at least 0 and below 1")
    for name, hint in type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            convert(name, getattr(config, name), hint)
    if config.warmup_epochs >= config.epochs:
        raise UserError(
            f"warmup_epochs is {config.warmup_epochs}: must be less than epochs ({config.epochs})"
        )
    _check_dynamic_batch(config)
    _check_second_cycle(config)
    _check_recipe(config)
    if config.time_budget is not None:
        budget_of(config.time_budget)
    elif config.budget_epochs is not None:
        raise UserError("budget_epochs is set but time_budget is not: set that too")
    if not 0 <= config.distill <= 1:
        raise UserError(f"distill is {shown(config.distill)}: must be between 0 and 1")
    if config.teacher is not None and not config.distill:
        raise UserError("teacher is set but distill is 0: set its weight in the loss too")
    if config.lookahead and config.ema_decay:
        raise UserError("lookahead and ema_decay are both set: only one average of the weights is kept")
    if config.optimizer == "sgd" and config.nesterov and config.momentum == 0:
        raise UserError("nesterov is true but momentum is 0: set nesterov to false or momentum above 0")
    convert("log", config.log, type_hints(type(config))["log"])
    if not all(low < high for low, high in itertools.pairwise((0.0, *config.milestones, 1.0))):
        raise UserError(
            f"milestones is {shown(list(config.milestones))}: rising shares of the run are needed, each "
            "between 0 and 1"
        )


def _check_recipe(config: Any) -> None:
    """Loss, mixing of images, augmentation and learning rates by layer."""
    if config.bce_threshold is not None and config.loss != "bce":
        raise UserError("bce_threshold is set but loss is cross_entropy: set loss to bce, or leave it out")
    if config.bce_threshold is not None and not 0 <= config.bce_threshold < 1:
        raise UserError(f"bce_threshold is {shown(config.bce_threshold)}: must be at least 0 and below 1")
    if config.mix_probability != 1 and not (config.mixup or config.cutmix):
        raise UserError("mix_probability is set but mixup and cutmix are 0: set one of them too")
    if config.erasing_fill != "random" and not config.erasing:
        raise UserError("erasing_fill is set but erasing is 0: set its probability too")
    for name, value in randaugment_settings(config).items():
        if config.auto_augment != "randaugment" and value != getattr(RandAugment, name):
            raise UserError(
                f"randaugment_{name} is set but auto_augment is {config.auto_augment}: set that to "
                "randaugment"
            )
    RandAugment(**randaugment_settings(config))
    if config.augment_repeats > config.batch_size:
        raise UserError(
            f"augment_repeats is {config.augment_repeats}: must be at most batch_size ({config.batch_size})"
        )
    for pattern, factor in config.layer_rates.items():
        if not 0 < factor < math.inf:
            raise UserError(f"layer_rates has {shown(factor)} for {shown(pattern)}: must be above 0")


def randaugment_settings(config: Any) -> dict[str, Any]:
    """The settings of `RandAugment`, by its names for them."""
    return {name: getattr(config, f"randaugment_{name}") for name in field_names(RandAugment)}


def _check_dynamic_batch(config: Any) -> None:
    if config.memory_budget is not None:
        try:
            bytes_of(config.memory_budget)
        except UserError as error:
            raise UserError(f"memory_budget: {error}") from None
    if config.batch_limit is not None and config.batch_limit < config.batch_size:
        raise UserError(
            f"batch_limit is {config.batch_limit}: must be at least batch_size ({config.batch_size})"
        )
    for name in ("memory_budget", "batch_limit"):
        if getattr(config, name) is not None and not config.dynamic_batch:
            raise UserError(f"{name} is set but dynamic_batch is false: set that to true too")


def _check_second_cycle(config: Any) -> None:
    height = config.second_cycle
    if height is None:
        return
    convert("second_cycle", height, type_hints(type(config))["second_cycle"])
    if not isinstance(height, str) and not 0 < height < math.inf:
        raise UserError(f"second_cycle is {shown(height)}: must be above 0")
    if config.schedule in ("step", "constant"):
        raise UserError(
            f"second_cycle is set but schedule {config.schedule} does not fall to a floor: use cosine, "
            "linear, triangular or onecycle"
        )


_SECONDS = {"s": 1, "sec": 1, "min": 60, "h": 3600}
_MOST_SHARE = 10
"""The largest share of the dense run; a larger number is meant as a time."""


def budget_of(value: float | str) -> tuple[float | None, float | None]:
    """A time budget as a share of the dense run, or in seconds; the other is None. UserError otherwise."""
    if isinstance(value, str):
        amount = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]+)\s*", value)
        if amount is None or amount[2] not in _SECONDS or not float(amount[1]) > 0:
            raise UserError(
                f"time_budget is {shown(value)}: write a share of the dense run's time, as 1.0, or a time, "
                "as 90s, 20min or 2h"
            )
        return None, float(amount[1]) * _SECONDS[amount[2]]
    if not 0 < value <= _MOST_SHARE:
        raise UserError(
            f"time_budget is {shown(value)}: a share of the dense run's time is above 0 and at most "
            f"{_MOST_SHARE}; a time has a unit, as 90s, 20min or 2h"
        )
    return value, None
