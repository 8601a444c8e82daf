"""A latency as the target of kernel pruning: kernels are allocated over layers by their measured cost.

When to Prune? (section 4.3) weighs importance against the time that pruning saves, for channels. Here the
unit is kernels per filter: importance is bought with milliseconds, by tables of the sparse operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph import as_inputs, layer_input_shapes
from clicktrain.graph.inputs import first_of_batch
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.kernels.native import keep_memory, missing_toolchain, toolchain
from clicktrain.kernels.sparse_conv2d import refusal
from clicktrain.latency.network_times import Measured, MeasureMasks, Timed, bare_copy, measure_ms
from clicktrain.latency.search import aim_after, allocate_within, least_compression_within
from clicktrain.latency.sparse_times import SparseGeometry, sparse_times
from clicktrain.sparsity.allocation import LayerBudget, allocate

TOLERANCE = 0.05
"""A measured latency this close to the target meets it."""
ATTEMPTS = 6
"""Most networks that are measured; times jump where operators change from one network to the next."""
_CPU = torch.device("cpu")
_Geometries = Mapping[str, Sequence[SparseGeometry]]
"""Layer name -> geometry of each of its calls; none of a layer that stays dense."""


@dataclass(frozen=True, slots=True)
class LatencyAim:
    """The target: a share of the dense network's time or milliseconds per batch; one of them is None."""

    ratio: float | None
    ms: float | None
    batch: int
    timed: Timed

    def reached(self, measured: Measured) -> float:
        """Measured time over target."""
        return measured.pruned_ms / self.ms if self.ms is not None else measured.ratio / (self.ratio or 1.0)

    def target_ms(self, dense_ms: float) -> float:
        """The target in milliseconds, given the dense network's time."""
        return self.ms if self.ms is not None else (self.ratio or 1.0) * dense_ms

    def __str__(self) -> str:
        asked = f"{self.ms:g} ms" if self.ms is not None else f"{self.ratio:.0%} of the dense network's time"
        return f"{asked} ({self.timed}, batch {self.batch})"


class SparseLatency:
    """Predicts the time of a network from the kept kernels per filter of each layer.

    The time of a layer is that of its faster operator, dense or sparse. The rest is what a network takes
    beyond its layers: of the accelerated network with one kernel per filter where that can be measured, else
    of the dense one.
    """

    def __init__(
        self,
        prunable: PrunableLayers,
        budgets: Sequence[LayerBudget],
        aim: LatencyAim,
        *,
        patterns: int,
        group: int = 1,
        measure: MeasureMasks | None = None,
    ) -> None:
        """Measure what is not on disk yet.

        Args:
            prunable: with its network, an example and the other convolution weights.
            patterns, group: different patterns in a layer, neighboring filters that share decisions.
            measure: times the network with masks; None: predictions are believed.

        Raises:
            UserError: the target is below what one kernel per filter takes.
        """
        model, example = _check(prunable)
        floor: Measured | None = None
        self.aim, self._measure = aim, measure
        self._budgets, self._other = budgets, prunable.other_conv_weights
        keep_memory()  # as accelerated networks do; else page faults would be timed
        with torch.random.fork_rng(devices=[]):
            geometries = _geometries(model, example, budgets, patterns, group, aim)
            tables = sparse_times(geometry for calls in geometries.values() for geometry in calls)
            if measure is not None:
                # The fewest kernels per filter, at random; layers that cannot be packed have no mask.
                counts = {one.name: one.fixed or 1 for one in budgets if geometries[one.name]}
                masks = {name: geometries[name][0].masks((n,))[n] for name, n in counts.items()}
                floor = measure(masks, aim.batch, aim.timed).agreed(_CPU)
                self.dense_ms = floor.dense_ms  # they took turns: what else the machine does affects both
            else:
                self.dense_ms = measure_ms(model, example, aim.batch, aim.timed)
        self._times = {
            one.name: [sum(tables[g].at(k) for g in geometries[one.name]) for k in range(1, one.kernels + 1)]
            for one in budgets
        }
        dense = sum(tables[geometry].dense_ms for calls in geometries.values() for geometry in calls)
        self._rest_ms = max(self.dense_ms - dense, 0.0)
        self.target_ms = aim.target_ms(self.dense_ms)
        least = self.predict({one.name: one.fixed or 1 for one in budgets})
        too_slow = self.target_ms < (1 - 2 * TOLERANCE) * least
        if floor is not None:
            self._rest_ms = max(floor.pruned_ms - (least - self._rest_ms), 0.0)
            least, too_slow = floor.pruned_ms, aim.reached(floor) > 1 + TOLERANCE
        if too_slow:
            raise UserError(
                f"a latency of {self.target_ms:.3g} ms cannot be met by this network: with one kernel per "
                f"filter it takes about {least:.3g} ms, dense {self.dense_ms:.3g} ms a batch of {aim.batch} "
                "(ask for a larger one, larger batches, fewer entries, or a smaller network)"
            )

    def predict(self, kernels: Mapping[str, int]) -> float:
        """Milliseconds with these kernels per filter."""
        return self._rest_ms + sum(self._times[name][count - 1] for name, count in kernels.items())

    def even(self, ms: float | None = None) -> dict[str, int]:
        """Kernels per filter with equal densities that take ``ms``, by default the target."""
        ms = self.target_ms if ms is None else ms
        return least_compression_within(self._budgets, self._other, self.predict, ms)[1]

    def allocate(
        self, ms: float, gains: Mapping[str, Tensor] | None, by_time: bool, floor: float
    ) -> dict[str, int]:
        """Kernels per filter that are predicted to take ``ms``.

        Args:
            gains: per layer [C], worth of the 1st, 2nd, ... kernel of every filter; None: equal densities.
            by_time: buy gains with milliseconds; else with weights, as many as the time allows.
            floor: every layer keeps at least this share of what equal densities give it in that time.
        """
        if gains is None:
            return self.even(ms)
        if by_time:
            least = {name: max(1, math.floor(floor * count)) for name, count in self.even(ms).items()}
            worth = {name: gain.tolist() for name, gain in gains.items()}
            return allocate_within(self._budgets, self._times, worth, ms - self._rest_ms, least)

        def by_weights(ratio: float) -> dict[str, int]:
            return allocate(self._budgets, self._other, ratio, gains, floor=floor)

        return least_compression_within(self._budgets, self._other, self.predict, ms, by_weights)[1]

    def search(
        self,
        allocated: Callable[[float], dict[str, int]],
        masks: Callable[[Mapping[str, int]], dict[str, Tensor]],
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """The allocation that meets the target, if possible as measured, and what to record about it."""
        now = allocated(self.target_ms)
        if self._measure is None:
            return now, self._about(now, None, 0)
        tried: list[tuple[dict[str, int], Measured]] = []
        while len(tried) < ATTEMPTS and all(now != other for other, _ in tried):
            with torch.random.fork_rng(devices=[]):
                measured = self._measure(masks(now), self.aim.batch, self.aim.timed).agreed(_CPU)
            tried.append((now, measured))
            if abs(self.aim.reached(measured) - 1) <= TOLERANCE:
                break
            now = allocated(aim_after([(self.predict(k), self.aim.reached(m)) for k, m in tried]))
        best, measured = min(tried, key=lambda one: abs(math.log(self.aim.reached(one[1]))))
        return best, self._about(best, measured, len(tried))

    def _about(self, chosen: Mapping[str, int], measured: Measured | None, attempts: int) -> dict[str, Any]:
        error = None if measured is None else self.aim.reached(measured) - 1
        dense_ms = self.dense_ms if measured is None else measured.dense_ms
        return {
            "latency_batch": self.aim.batch,
            "latency_of": self.aim.timed,
            "latency_target_ms": self.aim.target_ms(dense_ms),
            "predicted_ms": self.predict(chosen),
            "measured_ms": None if measured is None else measured.pruned_ms,
            "dense_ms": dense_ms,
            "latency_ratio": None if measured is None else measured.ratio,
            "latency_error": error,
            "latency_met": None if error is None else abs(error) <= TOLERANCE,
            "attempts": attempts,
        }


def _check(prunable: PrunableLayers) -> tuple[nn.Module, Any]:
    """The network and an input; a UserError unless the sparse kernels run here and both are known."""
    model, example = prunable.model, prunable.example
    assert model is not None
    devices = {str(p.device) for p in model.parameters() if p.device.type != "cpu"}
    why = f"the network is on {min(devices)}" if devices else ""
    if not why and toolchain() is None:
        why = missing_toolchain().rpartition(":")[0]
    if why:
        raise UserError(
            f"a latency as ClickTrain's target needs the sparse kernels, which run on CPUs and are built by "
            f"a C compiler, but {why}: give a compression instead"
        )
    if example is None:
        raise UserError(
            "a latency as the target needs the size of the images: give attach an example, e.g. "
            "example=torch.zeros(1, 3, 32, 32)"
        )
    return model, example


def _geometries(
    model: nn.Module, example: Any, budgets: Sequence[LayerBudget], patterns: int, group: int, aim: LatencyAim
) -> _Geometries:
    inputs = first_of_batch(as_inputs(example, model), 1)
    shapes = layer_input_shapes(bare_copy(model).eval(), [one.name for one in budgets], inputs)
    geometries: dict[str, list[SparseGeometry]] = {}
    for one in budgets:
        conv, calls, shared = model.get_submodule(one.name), [], math.gcd(one.filters, group)
        if isinstance(conv, nn.Conv2d) and not refusal(conv):
            calls = [
                SparseGeometry.of(conv, (height, width), one.entries, patterns, shared, aim.batch, aim.timed)
                for *_, height, width in shapes.get(one.name, ())
            ]
        geometries[one.name] = calls
    return geometries
