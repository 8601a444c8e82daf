"""Which neurons go, until enough have: by a ratio, or until a latency is met (When to Prune? 3.1, 4.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.latency.channels import LatencyModel, fewest_pruned
from clicktrain.latency.network_times import SECONDS, compare_ms, measure_ms
from clicktrain.latency.search import LatencySearch
from clicktrain.sparsity.channel_importance import (
    masks_after,
    prunable_channels,
    pruning_order,
    rank_channels,
    round_widths,
)
from clicktrain.sparsity.schedules import exponential_steps
from clicktrain.surgery import SurgeryPlan, dependencies, plan_keeping
from clicktrain.surgery.neurons import NeuronGroup, neuron_groups, widths

TOLERANCE = 0.05
"""A latency target is met within this share, measured."""
AIM_WITHIN = 0.025
"""Corrections stop here: two measurements differ a little."""
ATTEMPTS = 10
FINAL_SECONDS = 2.0
"""For each measurement of the last step."""
RESERVE = 1.2
"""Steps before the last go no further than this times the target: what they prune is gone, and predictions
err."""
MEASURE_EVERY = 3
"""Pruning steps between two measurements of the network."""

Masks = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Amount:
    """How much is to go; settings as in `clicktrain.methods.pat.PaT`. ``latency_*`` None: by the ratio."""

    prune_ratio: float
    latency_ratio: float | None
    latency_ms: float | None
    latency_batch: int
    latency_penalty: float
    min_channels: int
    round_to: int

    @property
    def by_latency(self) -> bool:
        """Whether a latency is the target."""
        return self.latency_ratio is not None or self.latency_ms is not None


@dataclass(slots=True)
class LatencyCourse:
    """What was measured of the whole network at the beginning, and how far predictions were off since."""

    dense_ms: float = 0.0
    correction: float = 1.0


@dataclass(eq=False)
class ChannelSelection:
    """The neurons of a network and how many of them go.

    Attributes:
        prunable: the network.
        groups: neurons that may go, in the network's order.
        reasons: groups of channels that stay, and why.
        latency: predictions, if they are needed.
    """

    prunable: PrunableLayers
    amount: Amount
    groups: tuple[NeuronGroup, ...]
    reasons: dict[str, str]
    course: LatencyCourse
    latency: LatencyModel | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        prunable: PrunableLayers,
        amount: Amount,
        exclude: Sequence[str],
        course: LatencyCourse | None = None,
    ) -> ChannelSelection:
        """Look at a network.

        Args:
            prunable: with the model and an example.
            amount: how much is to go.
            exclude: module paths (shell-style) whose outputs stay.
            course: 0 milliseconds mean that the network is measured now; None, only to be looked at.

        Raises:
            UserError: nothing can be pruned, or not as much as is asked for.
        """
        assert prunable.model is not None
        assert prunable.example is not None
        graph = dependencies(prunable.model, prunable.example)
        untrained = {
            name
            for name, (_, why) in prunable.left_alone.items()
            if "not trained" in why or "not in the" in why
        }
        kept_weights = {id(graph.graph.model.get_submodule(name).weight) for name in untrained}
        groups, reasons = neuron_groups(graph, exclude, lambda weight: id(weight) not in kept_weights)
        if not groups:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
            raise UserError(f"no neuron of this network can be removed ({why or 'it has no layers'})")
        result = cls(prunable, amount, groups, reasons, course or LatencyCourse())
        result.parameters = dict(prunable.model.named_parameters())
        if course is None:
            return result
        if amount.by_latency or amount.latency_penalty > 0:
            if course.dense_ms == 0:
                course.dense_ms = measure_ms(prunable.model, prunable.example, amount.latency_batch)
            result.latency = LatencyModel(
                graph, result.sizes, prunable.example, amount.latency_batch, course.dense_ms
            )
        result._check()
        return result

    def _check(self) -> None:
        least, sizes = self.amount.min_channels, self.sizes
        if not self.amount.by_latency:
            most, asked = prunable_channels(sizes.values(), least), self.num_pruned
            if asked > most:
                raise UserError(
                    f"prune_ratio {self.amount.prune_ratio:g} asks for {asked} of {self.total} neurons, but "
                    f"at most {most} can go: ask for {most / self.total:.3f} or less"
                )
            return
        assert self.latency is not None
        dense, floor = (
            self.course.dense_ms,
            self.latency.predict({n: min(s, least) for n, s in sizes.items()}),
        )
        if self.target_ms >= dense:
            raise UserError(
                f"the latency target is {self.target_ms:.3g} ms, but the whole network takes {dense:.3g} ms "
                f"for {self.amount.latency_batch} images here: ask for less"
            )
        if self.target_ms < floor:
            raise UserError(
                f"the latency target is {self.target_ms:.3g} ms for {self.amount.latency_batch} images, but "
                f"even with {least} channel(s) per layer about {floor:.3g} ms are left: ask for more"
            )

    # ---- numbers ----------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        """Neurons of each group."""
        return {group.name: group.size for group in self.groups}

    @property
    def total(self) -> int:
        """All neurons that may go; those that can only go together are one."""
        return sum(self.sizes.values())

    @property
    def num_pruned(self) -> int:
        """Neurons that go by the ratio."""
        return round(self.amount.prune_ratio * self.total)

    @property
    def target_ms(self) -> float:
        """The latency target in milliseconds."""
        if self.amount.latency_ms is not None:
            return self.amount.latency_ms
        assert self.amount.latency_ratio is not None
        return self.amount.latency_ratio * self.course.dense_ms

    def describe(self) -> dict[str, str]:
        """Layer -> how many neurons it has, and with which layers they can only go together."""
        notes = {}
        for group in self.groups:
            for layer in group.layers:
                others = [name for name in group.layers if name != layer]
                more = f" and {len(others) - 2} more" if len(others) > 2 else ""
                together = f", one with those of {', '.join(others[:2])}{more}" if others else ""
                notes[layer] = f"{group.size} neurons{together}"
        return notes

    # ---- decisions --------------------------------------------------------------------------

    def choose(self, scores: Masks, kept: Masks | None, step: int, steps: int) -> Masks:
        """The kept neurons after one of the steps of Algorithm 1; all at once with ``steps`` = 1.

        Args:
            scores: group -> [n], larger = keep.
            kept: what is left after the step before.
            step: number of the step, from 1.
            steps: S.
        """
        if self.amount.by_latency:
            dense, last = self.course.dense_ms, step == steps
            aim = self.target_ms
            if not last:
                aim = exponential_steps(dense, min(RESERVE * aim, dense), steps - 1)[step - 1]
            return self.within(aim, scores, kept, may_go_too_far=last)
        left = exponential_steps(self.total, self.total - self.num_pruned, steps)[step - 1]
        ranked = self._ranked(scores, kept)
        gone = sum(int((~mask).sum()) for mask in (kept or {}).values())  # rounded widths may be ahead
        num_pruned = max(self.total - round(left), gone)
        masks = rank_channels(ranked, num_pruned, self.amount.min_channels, kept)
        return self._rounded(masks, ranked, kept)

    def within(
        self,
        aim_ms: float,
        scores: Masks,
        kept: Masks | None,
        may_go_too_far: bool = True,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> Masks:
        """The fewest pruned neurons whose predicted, corrected latency is within milliseconds.

        Args:
            aim_ms: the milliseconds.
            scores: group -> [n], larger = keep.
            kept: what is left before.
            may_go_too_far: before the last step what is pruned is gone for good, and a measurement that
                something disturbed must not prune more; so corrections count there only if they keep more.
            fixed: masks of groups that are decided.
        """
        assert self.latency is not None
        latency, ranked = self.latency, self._ranked(scores, kept)
        order = pruning_order(ranked, self.amount.min_channels, kept)
        gone = sum(int((~mask).sum()) for mask in (kept or {}).values())
        correction = self.course.correction if may_go_too_far else min(self.course.correction, 1.0)

        def masks(first: Sequence[tuple[str, int]]) -> Masks:
            rounded = self._rounded(masks_after([*order[:gone], *first], self.sizes), ranked, kept)
            return {**rounded, **(fixed or {})}

        def predict(counts: Mapping[str, int]) -> float:
            return latency.predict(counts) * correction

        free = [neuron for neuron in order[gone:] if neuron[0] not in (fixed or {})]
        return fewest_pruned(free, masks, predict, aim_ms)

    def measured(self, plan: SurgeryPlan, kept: Masks, seconds: float = SECONDS) -> dict[str, Any]:
        """Measure what is left, correct the predictions by it, and tell both."""
        assert self.latency is not None
        assert self.prunable.model is not None
        assert self.prunable.example is not None
        times = compare_ms(
            self.prunable.model, plan, self.prunable.example, self.amount.latency_batch, seconds
        )
        predicted = self.latency.predict(widths(kept))
        told = predicted * self.course.correction
        by_ratio = self.amount.latency_ms is None
        now = times.ratio * self.course.dense_ms if by_ratio else times.pruned_ms
        self.course.correction = now / predicted
        return {
            "latency_batch": self.amount.latency_batch,
            "latency_target_ms": self.target_ms if self.amount.by_latency else None,
            "predicted_ms": told,
            "measured_ms": times.pruned_ms,
            "dense_ms": times.dense_ms,
            "latency_ratio": times.ratio,
        }

    def measures_after(self, step: int) -> bool:
        """Whether the network is measured after a pruning step, to correct the predictions of the next."""
        return self.amount.by_latency and step % MEASURE_EVERY == 0

    def final(
        self, scores: Masks, kept: Masks | None, steps: int
    ) -> tuple[Masks, SurgeryPlan, dict[str, Any]]:
        """The last step; a latency is measured, and the choice corrected until it is met.

        Returns:
            The kept neurons, the plan that removes the others, and what is to be written down.
        """
        masks = self.choose(scores, kept, steps, steps)
        plan = self.plan(masks)
        if not self.amount.by_latency:
            return masks, plan, self.measured(plan, masks) if self.latency is not None else {}
        best: tuple[Masks, SurgeryPlan, dict[str, Any]] | None = None
        assert self.latency is not None
        search = LatencySearch(
            self.latency.predict, lambda aim, fixed: self.within(aim, scores, kept, fixed=fixed)
        )
        for attempt in range(1, ATTEMPTS + 1):
            event = {**self.measured(plan, masks, FINAL_SECONDS), "attempts": attempt}
            reached = event["measured_ms"] / self.target_ms
            if self.amount.latency_ratio is not None:
                reached = event["latency_ratio"] / self.amount.latency_ratio
            event["latency_error"] = reached - 1
            if best is None or abs(event["latency_error"]) < abs(best[2]["latency_error"]):
                best = masks, plan, event
            if abs(event["latency_error"]) <= AIM_WITHIN:
                break
            self.course.correction = 1.0  # what was tried says where to go on
            following = search.after(masks, reached)
            if following is None:
                break
            masks, plan = following, self.plan(following)
        assert best is not None
        best[2]["latency_met"] = abs(best[2]["latency_error"]) <= TOLERANCE
        return best

    def plan(self, kept: Masks) -> SurgeryPlan:
        """What removes all others."""
        assert self.prunable.model is not None
        assert self.prunable.example is not None
        return plan_keeping(self.prunable.model, self.prunable.example, kept)

    def _ranked(self, scores: Masks, kept: Masks | None) -> Masks:
        """Scores on one device, less what a removal saves; what is pruned ranks last."""
        result = {name: score.detach().double().cpu() for name, score in scores.items()}
        if self.latency is not None:
            counts = self.sizes if kept is None else widths(kept)
            result = self.latency.penalised(result, counts, self.amount.latency_penalty)
        if kept is not None:
            result = {name: score.masked_fill(~kept[name], -1.0) for name, score in result.items()}
        return result

    def _rounded(self, masks: Masks, ranked: Masks, kept: Masks | None) -> Masks:
        if self.amount.round_to == 1:
            return masks
        rounded = round_widths(masks, ranked, self.amount.round_to)
        return rounded if kept is None else {name: mask & kept[name] for name, mask in rounded.items()}
