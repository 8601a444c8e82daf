"""What the benchmarks share: medians of interleaved calls, and how they are told."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from clicktrain.latency.timer import check_rounds as check_rounds
from clicktrain.latency.timer import median_ms as median_ms

Progress = Callable[[str], None]
"""Told what is being measured, for whoever waits."""


class WrongResultError(RuntimeError):
    """What was to be timed does not compute what it should, so its time would mean nothing."""


def fastest(times: Mapping[str, float]) -> tuple[str, float]:
    """The name with the smallest time, and that time."""
    name = min(times, key=lambda one: times[one])
    return name, times[name]


def geometric_mean(values: Iterable[float]) -> float:
    """The mean that ratios have."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))
