"""Shared by the benchmarks: medians of interleaved calls, means, rows as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from clicktrain.latency.timer import check_rounds as check_rounds
from clicktrain.latency.timer import median_ms as median_ms

Progress = Callable[[str], None]
"""Called with what is being measured."""


class WrongResultError(RuntimeError):
    """The code to be timed computes something wrong, so its time would mean nothing."""


def fastest(times: Mapping[str, float]) -> tuple[str, float]:
    """The name with the smallest time, and that time."""
    name = min(times, key=lambda one: times[one])
    return name, times[name]


def geometric_mean(values: Iterable[float]) -> float:
    """Compute the geometric mean."""
    logarithms = [math.log(value) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def to_json(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Dataclass rows as JSON-able dicts."""
    return [asdict(row) for row in rows]
