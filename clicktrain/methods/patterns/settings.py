"""ClickTrain's presets, and the checks of its settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from clicktrain.errors import UserError
from clicktrain.sparsity.patterns import fixed_pool

if TYPE_CHECKING:
    from clicktrain.methods.clicktrain import ClickTrain

PRESETS: dict[str, dict[str, Any]] = {
    # What does best in short runs (docs/results/cifar10.md): magnitudes, decided late, pruned at half time.
    "default": {
        "criterion": "magnitude", "selection": "accumulated", "kernel_score": "pattern",
        "allocation": "uniform", "penalty": "shrink", "pool": "dynamic", "patterns": 12,
        "earliest_start": 0.44, "latest_start": 0.44,
        "pool_length": 0.02, "finalize_length": 0.02, "regularize_length": 0.02,
    },
    # Sections 4 and 6.1: Taylor votes, the modified group lasso, one ratio for every layer; the hard prune
    # at about epoch 95 of 190, stage 2 at epoch 50 at the latest (Figure 5, Table 1).
    "paper": {
        "criterion": "taylor", "selection": "votes", "kernel_score": "kernel",
        "allocation": "uniform", "penalty": "lasso", "pool": "dynamic", "patterns": 12,
        "earliest_start": 0.1, "latest_start": 0.26,
        "pool_length": 0.08, "finalize_length": 0.08, "regularize_length": 0.08,
    },
    # Magnitudes once, fixed patterns, no penalty: the baseline of section 3.2.
    "one-shot": {
        "criterion": "magnitude", "selection": "accumulated", "kernel_score": "kernel",
        "allocation": "uniform", "penalty": "none", "pool": "fixed", "patterns": 8,
        "earliest_start": 0.5, "latest_start": 0.5,
        "pool_length": 0.0, "finalize_length": 0.0, "regularize_length": 0.0,
    },
}  # fmt: skip


def fill_in(method: ClickTrain) -> None:
    """Give settings that were not given the values of the preset."""
    if method.preset not in PRESETS:
        raise UserError(f"preset must be one of {', '.join(PRESETS)}, not {method.preset!r}")
    if method.watches_structure and method.earliest_start is None:
        object.__setattr__(method, "earliest_start", 0.0)
    if method.aim is not None and method.allocation is None:
        object.__setattr__(method, "allocation", "share")
    for key, value in PRESETS[method.preset].items():
        if getattr(method, key) is None:
            object.__setattr__(method, key, value)


def check(method: ClickTrain) -> None:
    """Raise UserError for a value out of range, or settings that exclude each other."""
    if not method.compression > 1:
        raise UserError(
            f"compression must be more than 1 (8 keeps an eighth of the weights), not {method.compression}"
        )
    _check_latency(method)
    if method.group < 1 or method.entries < 1 or (method.patterns or 0) < 1:
        raise UserError("group, entries and patterns must be at least 1")
    if method.entries > 9:
        raise UserError(
            f"entries is the number of kept positions of a 3x3 kernel, 1 to 9, not {method.entries}"
        )
    if method.pool == "fixed":
        fixed_pool(method.patterns or 0)
        if method.entries != 4:
            raise UserError(
                f"a fixed pool keeps 4 positions per kernel; entries={method.entries} needs pool=dynamic"
            )
    if method.epi_threshold is not None and not 0 <= method.epi_threshold <= 1:
        raise UserError(f"epi_threshold must be between 0 and 1, not {method.epi_threshold}")
    if method.epi_window is not None and method.epi_window < 1:
        raise UserError(f"epi_window must be at least 1, not {method.epi_window}")
    shares = ("earliest_start", "latest_start", "pool_length", "finalize_length", "regularize_length")
    for key in (*shares, "allocation_floor"):
        if not 0 <= getattr(method, key) <= 1:
            raise UserError(f"{key} is a share and must be between 0 and 1, not {getattr(method, key)}")
    if sum(getattr(method, key) for key in shares[1:]) > 1:
        raise UserError("latest_start and the lengths of stages 2 to 4 must not add up to more than 1")
    if (method.earliest_start or 0) > (method.latest_start or 0):
        raise UserError("earliest_start must not be later than latest_start")
    for key in ("lasso", "loss_margin"):
        if getattr(method, key) < 0:
            raise UserError(f"{key} must not be negative, got {getattr(method, key)}")
    for glob, ratio in method.layers.items():
        if not ratio >= 1:
            raise UserError(f"the compression of layer {glob!r} must be at least 1, not {ratio}")


def _check_latency(method: ClickTrain) -> None:
    if method.latency_target is not None and method.latency_target_ms is not None:
        raise UserError("latency_target and latency_target_ms are both set: give one")
    if method.latency_target is not None and not 0 < method.latency_target < 1:
        raise UserError(
            f"latency_target is a share of the dense network's time, between 0 and 1, not "
            f"{method.latency_target}; milliseconds are latency_target_ms"
        )
    if method.latency_target_ms is not None and not 0 < method.latency_target_ms < math.inf:
        raise UserError(f"latency_target_ms must be above 0, not {method.latency_target_ms}")
    if method.latency_batch < 1:
        raise UserError(f"latency_batch must be at least 1, not {method.latency_batch}")
