"""Which neurons are removed to meet a ratio or a latency (When to Prune? 3.1, 4.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.latency.channels import LatencyModel, fewest_pruned
from clicktrain.latency.network_times import SECONDS, compare_ms, measure_ms
from clicktrain.latency.search import LatencySearch
from clicktrain.methods.channels.budget import ChannelBudget
from clicktrain.sparsity.channel_importance import (
    count_gone,
    masks_after,
    prunable_channels,
    pruning_order,
    rank_channels,
    round_widths,
)
from clicktrain.sparsity.schedules import exponential_steps
from clicktrain.surgery import SurgeryPlan, dependencies, plan_keeping
from clicktrain.surgery.neurons import NeuronGroup, count_pruned, neuron_groups, widths

TOLERANCE = 0.05
"""A latency target is met within this share, measured."""
AIM_WITHIN = 0.025
"""Corrections stop here: two measurements differ a little."""
ATTEMPTS = 10
FINAL_SECONDS = 2.0
"""For each measurement of the last step."""
RESERVE = 1.2
"""Steps before the last aim at no less than this times the target: their removals are final, and predictions
err."""
MEASURE_EVERY = 3
"""Pruning steps between two measurements of the network."""

Masks = dict[str, Tensor]
"""Group of channels -> bool [n], True = kept."""


@dataclass(slots=True)
class LatencyCalibration:
    """Milliseconds of the whole network before pruning, and measured over predicted time since."""

    dense_ms: float = 0.0
    correction: float = 1.0


@dataclass(eq=False)
class ChannelSelection:
    """The neurons of a network and which of them are removed.

    Attributes:
        prunable: the network.
        groups: neurons that may be removed, in the network's order.
        latency: predictions, if they are needed.
    """

    prunable: PrunableLayers
    budget: ChannelBudget
    groups: tuple[NeuronGroup, ...]
    calibration: LatencyCalibration
    latency: LatencyModel | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prunable: PrunableLayers,
        budget: ChannelBudget,
        exclude: Sequence[str],
        calibration: LatencyCalibration | None = None,
    ) -> ChannelSelection:
        """Find the neurons of a network but those of ``exclude``, module paths (shell-style).

        Without a calibration nothing is measured or checked; with one of 0 ms the network is measured now.

        Raises:
            UserError: nothing can be pruned, or not as much as is asked for.
        """
        assert prunable.model is not None
        assert prunable.example is not None
        budget = budget.on(prunable.layers)
        graph = dependencies(prunable.model, prunable.example)
        untrained = {
            id(graph.graph.model.get_submodule(name).weight)
            for name, (_, why) in prunable.left_alone.items()
            if "not trained" in why or "not in the" in why
        }
        groups, reasons = neuron_groups(graph, exclude, lambda weight: id(weight) not in untrained)
        if not groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
            raise UserError(f"no neuron of this network can be removed ({why or 'it has no layers'})")
        result = cls(prunable, budget, groups, calibration or LatencyCalibration())
        result.parameters = dict(prunable.model.named_parameters())
        if calibration is None:
            return result
        if budget.by_latency or budget.penalty > 0:
            batch = budget.latency_batch
            if calibration.dense_ms == 0:
                calibration.dense_ms = measure_ms(prunable.model, prunable.example, batch)
            result.latency = LatencyModel(graph, result.sizes, prunable.example, batch, calibration.dense_ms)
        result._check()
        return result

    def _check(self) -> None:
        least, sizes, images = self.budget.min_channels, self.sizes, self.budget.latency_batch
        if not self.budget.by_latency:
            most, asked = prunable_channels(sizes, least, self.weights), self.num_pruned
            if asked == 0 and self.counted:
                raise UserError(
                    f"prune_ratio {self.budget.prune_ratio:g} of {self.counted} {self.budget.prune_ratio_of} "
                    f"is none: ask for {math.ceil(1000 / self.counted) / 1000:g} or more"
                )
            if asked > most:
                total = self.counted
                raise UserError(
                    f"prune_ratio {self.budget.prune_ratio:g} asks for {asked} of {total} "
                    f"{self.budget.prune_ratio_of}, but at most {most} can go: ask for "
                    f"{math.floor(1000 * most / total) / 1000:.3f} or less"
                )
            return
        assert self.latency is not None
        dense = self.calibration.dense_ms
        floor = self.latency.predict({name: min(size, least) for name, size in sizes.items()})
        if self.target_ms >= dense:
            raise UserError(
                f"the latency target is {self.target_ms:.3g} ms, but the whole network takes {dense:.3g} ms "
                f"for {images} images here: ask for less"
            )
        if self.target_ms < floor:
            raise UserError(
                f"the latency target is {self.target_ms:.3g} ms for {images} images, but "
                f"even with {least} channel(s) per layer about {floor:.3g} ms are left: ask for more"
            )

    # ---- numbers ----------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        """Neurons of each group."""
        return {group.name: group.size for group in self.groups}

    @property
    def total(self) -> int:
        """All neurons that may be removed; those that can only be removed together count as one."""
        return sum(self.sizes.values())

    @property
    def filters(self) -> dict[str, int]:
        """Filters of one neuron of each group."""
        return {group.name: group.filters_each for group in self.groups}

    @property
    def weights(self) -> dict[str, int]:
        """How much a neuron of each group counts in the ratio: its filters, or 1."""
        filters = self.filters
        return filters if self.budget.prune_ratio_of == "filters" else dict.fromkeys(filters, 1)

    @property
    def counted(self) -> int:
        """All filters or neurons: what the ratio is of."""
        return prunable_channels(self.sizes, 0, self.weights)

    @property
    def num_pruned(self) -> int:
        """Filters or neurons that the ratio asks for."""
        return round(self.budget.prune_ratio * self.counted)

    @property
    def target_ms(self) -> float:
        """The latency target in milliseconds."""
        if self.budget.latency_target_ms is not None:
            return self.budget.latency_target_ms
        assert self.budget.latency_target is not None
        return self.budget.latency_target * self.calibration.dense_ms

    def describe(self) -> dict[str, str]:
        """Layer -> how many neurons it has, and the layers that share them."""
        notes = {}
        for group in self.groups:
            for layer in group.layers:
                others = [name for name in group.layers if name != layer]
                more = f" and {len(others) - 2} more" if len(others) > 2 else ""
                shared = f", one with those of {', '.join(others[:2])}{more}" if others else ""
                notes[layer] = f"{group.size} neurons{shared}"
        return notes

    # ---- decisions --------------------------------------------------------------------------

    def choose(self, scores: Masks, kept: Masks | None, step: int, steps: int) -> Masks:
        """The neurons kept after one of S steps of Algorithm 1, counted from 1; with S = 1, after all of it.

        Scores are [n] per group, larger = keep; ``kept`` are the neurons that the step before kept.
        """
        if self.budget.by_latency:
            dense, last = self.calibration.dense_ms, step == steps
            aim = self.target_ms
            if not last:
                aim = exponential_steps(dense, min(RESERVE * aim, dense), steps - 1)[step - 1]
            return self.within(aim, scores, kept, may_go_too_far=last)
        total, weights = self.counted, self.weights
        left = exponential_steps(total, total - self.num_pruned, steps)[step - 1]
        ranked = self._ranked(scores, kept)
        # Rounded widths, and neurons of several filters, may be ahead.
        wanted = max(total - round(left), count_gone(kept or {}, weights))
        masks = rank_channels(ranked, wanted, self.budget.min_channels, kept, weights)
        return self._rounded(masks, ranked, kept)

    def within(
        self,
        aim_ms: float,
        scores: Masks,
        kept: Masks | None,
        may_go_too_far: bool = True,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> Masks:
        """The masks with the fewest pruned neurons whose predicted, corrected latency meets an aim.

        Removals before the last step are final: a disturbed measurement must not prune more, so unless a
        choice ``may_go_too_far``, a correction counts only if it keeps more. ``fixed`` groups are decided.
        """
        assert self.latency is not None
        latency, ranked = self.latency, self._ranked(scores, kept)
        order = pruning_order(ranked, self.budget.min_channels, kept)
        gone = count_pruned(kept or {})
        correction = self.calibration.correction if may_go_too_far else min(self.calibration.correction, 1.0)

        def masks(first: Sequence[tuple[str, int]]) -> Masks:
            rounded = self._rounded(masks_after([*order[:gone], *first], self.sizes), ranked, kept)
            return {**rounded, **(fixed or {})}

        def predict(counts: Mapping[str, int]) -> float:
            return latency.predict(counts) * correction

        free = [neuron for neuron in order[gone:] if neuron[0] not in (fixed or {})]
        return fewest_pruned(free, masks, predict, aim_ms)

    def measured(self, plan: SurgeryPlan, kept: Masks, seconds: float = SECONDS) -> dict[str, Any]:
        """Measure the network that is left and correct the predictions by it; keys of an event."""
        assert self.latency is not None
        assert self.prunable.model is not None
        assert self.prunable.example is not None
        batch = self.budget.latency_batch
        times = compare_ms(self.prunable.model, plan, self.prunable.example, batch, seconds)
        predicted = self.latency.predict(widths(kept))
        corrected = predicted * self.calibration.correction
        by_ratio = self.budget.latency_target_ms is None
        now = times.ratio * self.calibration.dense_ms if by_ratio else times.pruned_ms
        self.calibration.correction = now / predicted
        return {
            "latency_batch": batch,
            "latency_target_ms": self.target_ms if self.budget.by_latency else None,
            "predicted_ms": corrected,
            "measured_ms": times.pruned_ms,
            "dense_ms": times.dense_ms,
            "latency_ratio": times.ratio,
        }

    def measures_after(self, step: int) -> bool:
        """Whether the network is measured after a pruning step, to correct the next predictions."""
        return self.budget.by_latency and step % MEASURE_EVERY == 0

    def final(
        self, scores: Masks, kept: Masks | None, steps: int
    ) -> tuple[Masks, SurgeryPlan, dict[str, Any]]:
        """The last step; a latency is measured, and the choice corrected until it is met.

        Returns:
            The kept neurons, the plan that removes the others, and keys of the event.
        """
        masks = self.choose(scores, kept, steps, steps)
        plan = self.plan(masks)
        if not self.budget.by_latency:
            return masks, plan, self.measured(plan, masks) if self.latency is not None else {}
        best: tuple[Masks, SurgeryPlan, dict[str, Any]] | None = None
        assert self.latency is not None
        search = LatencySearch(
            self.latency.predict, lambda aim, fixed: self.within(aim, scores, kept, fixed=fixed)
        )
        for attempt in range(1, ATTEMPTS + 1):
            event = {**self.measured(plan, masks, FINAL_SECONDS), "attempts": attempt}
            reached = event["measured_ms"] / self.target_ms
            if self.budget.latency_target is not None:
                reached = event["latency_ratio"] / self.budget.latency_target
            event["latency_error"] = reached - 1
            if best is None or abs(event["latency_error"]) < abs(best[2]["latency_error"]):
                best = masks, plan, event
            if abs(event["latency_error"]) <= AIM_WITHIN:
                break
            self.calibration.correction = 1.0  # the search knows the networks that were measured
            following = search.after(masks, reached)
            if following is None:
                break
            masks, plan = following, self.plan(following)
        assert best is not None
        best[2]["latency_met"] = abs(best[2]["latency_error"]) <= TOLERANCE
        return best

    def plan(self, kept: Masks) -> SurgeryPlan:
        """The removal of all other neurons."""
        assert self.prunable.model is not None
        assert self.prunable.example is not None
        return plan_keeping(self.prunable.model, self.prunable.example, kept)

    def _ranked(self, scores: Masks, kept: Masks | None) -> Masks:
        """Scores on the CPU, over the time that a removal saves; pruned neurons rank last."""
        result = {name: score.detach().double().cpu() for name, score in scores.items()}
        if self.latency is not None:
            counts = self.sizes if kept is None else widths(kept)
            result = self.latency.penalized(result, counts, self.budget.penalty)
        if kept is not None:
            result = {name: score.masked_fill(~kept[name], -1.0) for name, score in result.items()}
        return result

    def _rounded(self, masks: Masks, ranked: Masks, kept: Masks | None) -> Masks:
        if self.budget.round_to == 1:
            return masks
        assert isinstance(self.budget.round_to, int)
        rounded = round_widths(masks, ranked, self.budget.round_to)
        return rounded if kept is None else {name: mask & kept[name] for name, mask in rounded.items()}
