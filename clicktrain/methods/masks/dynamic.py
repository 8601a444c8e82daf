"""Dynamic sparse training over a run: the composition that DSR and RigL (and SET) are settings of.

Drop rule x growth rule x distribution over layers x interval x units. The network is sparse from the first
forward pass on. Every ``interval`` batches, after the optimizer's step, some units are dropped and as many
grow, at zero; after the last time the positions are fixed for good.

In between, masks hold at every step: the gradient of a dead weight is read when units are to grow by it and
then zeroed, and so is what the optimizer keeps for it, so that no momentum moves it, or starts it off when it
grows. The papers skip the optimizer's step at an update; here it has happened before.

Until positions are fixed a run is charged the dense cost in `clicktrain.train.flops`, although most weights
are zero: no operator makes use of positions that still change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from clicktrain.comm.agreement import agreed_text
from clicktrain.errors import UserError
from clicktrain.formats.packed import bits_from_mask, mask_from_bits
from clicktrain.graph.prunable import PrunableLayers, check_convolutions
from clicktrain.methods.base import (
    Action,
    ApplyMasks,
    FreezeMasks,
    LayerPlan,
    PruningPlan,
    Record,
    StepInfo,
    plan_rows,
)
from clicktrain.methods.masks.update_times import Timing
from clicktrain.methods.outcome import planned_far_off
from clicktrain.sparsity.masks import KeptWeights, conv_masks, kept_weights, sparsity_of
from clicktrain.sparsity.regrowth import (
    UnitKind,
    adapted_threshold,
    cosine_share,
    erdos_renyi_densities,
    grow_random,
    grow_steepest,
    growth_shares,
    keep_above,
    keep_largest,
    random_numbers,
    random_units,
    uniform_densities,
    unit_scores,
    unit_size,
    units_of,
    weights_of,
)

Growth = Literal["gradient", "random"]
Densities = Literal["erk", "uniform"]
Units: TypeAlias = dict[str, Tensor]


@dataclass(slots=True)
class DynamicState:
    """What dynamic sparse training remembers between steps."""

    seed: int = 0
    stage: str = "dynamic"
    updated: int = 0
    """Batches seen at the last update."""
    threshold: float = 0.0
    """H, for the drop rule that has one."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    gradients: Units = field(default_factory=dict)
    """Of this step, if units are to grow by them; empty between steps."""
    kept: dict[str, KeptWeights] = field(default_factory=dict)
    """What the frozen masks keep per layer; the masks themselves are the network's then."""

    def release(self, masks: Mapping[str, Tensor]) -> None:
        """The masks are frozen: the network holds them from here on."""
        self.kept = {name: kept_weights(mask) for name, mask in masks.items()}
        self.masks = {}


@dataclass(frozen=True, slots=True)
class DropShare:
    """RigL: in each layer a share of the living units, that falls from ``first`` to 0; it grows them back."""

    first: float

    def keep(self, magnitudes: Units, alive: Units, done: float, state: DynamicState) -> Units:
        """The survivors, ``done`` being the time of all updates that is past."""
        del state
        share = cosine_share(done, self.first)
        counts = {name: int(units.sum()) for name, units in alive.items()}
        kept = {name: max(count - math.floor(share * count), 1) for name, count in counts.items()}
        return {name: keep_largest(magnitudes[name], alive[name], kept[name]) for name in alive}


@dataclass(frozen=True, slots=True)
class DropBelow:
    """DSR: in all layers what is below one threshold, which adapts until ``share`` of the weights goes."""

    share: float
    tolerance: float

    def keep(self, magnitudes: Units, alive: Units, done: float, state: DynamicState) -> Units:
        """The survivors, by the threshold as it is."""
        del done
        return {name: keep_above(magnitudes[name], alive[name], state.threshold) for name in alive}


@dataclass(frozen=True, slots=True)
class DynamicMasks:
    """One composition. ``redistribute``: what grows goes to layers by their survivors, not where it was lost.

    Settings as in `clicktrain.methods.rigl.RigL` and `clicktrain.methods.dsr.DSR`.
    """

    sparsity: float
    kind: UnitKind
    densities: Densities
    drop: DropShare | DropBelow
    growth: Growth
    redistribute: bool

    # ---- beginning ------------------------------------------------------------------------------

    def layer_densities(self, prunable: PrunableLayers) -> dict[str, float]:
        """Share of each layer's weights that lives at the beginning."""
        rule = erdos_renyi_densities if self.densities == "erk" else uniform_densities
        return rule({layer.name: layer.shape for layer in prunable.layers}, 1 - self.sparsity)

    def init(self, prunable: PrunableLayers, seed: int | None, name: str) -> DynamicState:
        """Random positions, from the seed or else from PyTorch's (which is only read)."""
        check_convolutions(prunable, name)
        self._check_sparsity(prunable)
        device = prunable.layers[0].weight.device
        seed = int(agreed_text(str(torch.initial_seed() if seed is None else seed), device))
        state = DynamicState(seed=seed)
        densities = self.layer_densities(prunable)
        for number, layer in enumerate(prunable.layers):
            shape = layer.shape[:2] if self.kind == "kernel" else layer.shape
            units = random_units(shape, densities[layer.name], seed, number).to(layer.weight.device)
            state.masks[layer.name] = weights_of(units, layer.shape)
        return state

    def _check_sparsity(self, prunable: PrunableLayers) -> None:
        """UserError where fewer units would live than there are filters."""
        shapes = [layer.shape for layer in prunable.layers]
        units = sum(math.prod(shape[:2] if self.kind == "kernel" else shape) for shape in shapes)
        filters = sum(shape[0] for shape in shapes)
        if (1 - self.sparsity) * units < filters:
            most = math.floor(1000 * (1 - filters / units)) / 1000
            raise UserError(
                f"a sparsity of {self.sparsity:g} leaves {(1 - self.sparsity) * units:.0f} {self.kind}s to "
                f"{filters} filters: at most {most:g} can be asked of this network"
            )

    def at_start(self, state: DynamicState) -> list[Action]:
        """The network is sparse before its first forward pass."""
        event = {"event": "stage", "stage": "dynamic", "number": 1, "reason": "sparse from the start"}
        return [Record(event), ApplyMasks(state.masks, forget=True)]

    # ---- steps ----------------------------------------------------------------------------------

    def before_step(
        self, state: DynamicState, prunable: PrunableLayers, step: StepInfo, timing: Timing
    ) -> None:
        """Read the gradients of dead weights if units are to grow by them; then dead weights have none."""
        if state.stage != "dynamic":
            return
        due = self.growth == "gradient" and timing.due(step.seen, state.updated)
        for layer in prunable.layers:
            grad = step.gradient(layer.weight)
            if grad is None or layer.weight.grad is None:
                continue
            if due:
                state.gradients[layer.name] = unit_scores(grad, self.kind)
            layer.weight.grad.masked_fill_(~state.masks[layer.name], 0.0)

    def after_step(
        self, state: DynamicState, prunable: PrunableLayers, step: StepInfo, timing: Timing
    ) -> list[Action]:
        """Hold the masks; move units when it is time; fix them after the last time."""
        gradients, state.gradients = state.gradients, {}
        if step.seen >= timing.end:
            return self.fix(state, prunable, f"batch {timing.end} of {timing.total}")
        if not timing.due(step.seen, state.updated):
            return [ApplyMasks(state.masks)]
        if self.growth == "gradient" and len(gradients) < len(prunable.layers):
            return [ApplyMasks(state.masks)]  # a step without gradients, skipped for overflow: at the next
        event = self._update(state, prunable, gradients, step.seen, step.seen / timing.end)
        state.updated = step.seen
        return [Record(event), ApplyMasks(state.masks, forget=True)]

    def _update(
        self, state: DynamicState, prunable: PrunableLayers, gradients: Units, seen: int, done: float
    ) -> dict[str, Any]:
        """Drop and grow; the decision in words. Grown weights are zero already: dead ones were."""
        magnitudes = {layer.name: unit_scores(layer.weight, self.kind) for layer in prunable.layers}
        alive = {name: units_of(mask, self.kind) for name, mask in state.masks.items()}
        sizes = {layer.name: unit_size(layer.shape, self.kind) for layer in prunable.layers}
        before = sum(int(alive[name].sum()) * sizes[name] for name in alive)
        kept = self.drop.keep(magnitudes, alive, done, state)
        after = sum(int(kept[name].sum()) * sizes[name] for name in kept)
        counts = self._counts(prunable, alive, kept, sizes)
        for number, layer in enumerate(prunable.layers):
            name, count = layer.name, counts[layer.name]
            if self.growth == "gradient":
                grown = grow_steepest(kept[name], count, gradients[name])
            else:
                numbers = random_numbers(kept[name].shape, state.seed, seen, number)
                grown = grow_random(kept[name], alive[name], count, numbers)
            state.masks[name] = weights_of(grown, layer.shape)
        moved = sum(counts[name] * sizes[name] for name in counts)
        event: dict[str, Any] = {"event": "regrown", "dropped": before - after, "grown": moved}
        if isinstance(self.drop, DropBelow):
            event["threshold"] = state.threshold
            target = self.drop.share * before
            state.threshold = adapted_threshold(state.threshold, before - after, target, self.drop.tolerance)
        return event

    def _counts(
        self, prunable: PrunableLayers, alive: Units, kept: Units, sizes: Mapping[str, int]
    ) -> dict[str, int]:
        """Units that grow per layer."""
        if not self.redistribute:
            return {name: int(alive[name].sum()) - int(kept[name].sum()) for name in alive}
        names = [layer.name for layer in prunable.layers]
        survivors = [int(kept[name].sum()) * sizes[name] for name in names]
        shares = growth_shares(
            self.budget(prunable) - sum(survivors),
            survivors,
            [kept[name].numel() - int(kept[name].sum()) for name in names],
            [sizes[name] for name in names],
        )
        return dict(zip(names, shares, strict=True))

    def budget(self, prunable: PrunableLayers) -> int:
        """Weights that live, in all layers: the same at every time but for parts of units."""
        densities = self.layer_densities(prunable)
        total = 0
        for layer in prunable.layers:
            size = unit_size(layer.shape, self.kind)
            units = layer.weight.numel() // size
            total += size * min(max(round(densities[layer.name] * units), 1), units)
        return total

    def fix(self, state: DynamicState, prunable: PrunableLayers, reason: str) -> list[Action]:
        """The positions that live now are the only ones from now on."""
        if state.stage == "fixed":
            return []
        state.stage = "fixed"
        pruned = sum(mask.numel() - int(mask.sum()) for mask in conv_masks(state.masks).values())
        event = {
            "event": "hard_prune",
            "sparsity_asked": self.sparsity,
            "sparsity_reached": sparsity_of(state.masks),
            "compression_reached": prunable.conv_weights / max(prunable.conv_weights - pruned, 1),
            "energy_outside": 0.0,  # dead weights are zero
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "true_sparsity": sparsity_of({layer.name: state.masks[layer.name]}),
                }
                for layer in prunable.layers
            ],
        }
        stage = {"event": "stage", "stage": "fixed", "number": 2, "reason": reason}
        return [Record(event), FreezeMasks(dict(state.masks)), Record(stage)]

    # ---- what is shown and saved ----------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, state: DynamicState | None, timing: Timing, how: str
    ) -> PruningPlan:
        """Per layer: the units, the density at the beginning, or the one reached."""
        fixed = state is not None and bool(state.kept)
        densities = self.layer_densities(prunable)
        rows, live, weights = [], 0.0, 0
        for layer in prunable.layers:
            kernels = self.kind == "kernel" and len(layer.shape) == 4
            density, per_filter = densities[layer.name], None
            if state is not None and layer.name in state.kept:
                nonzero, per_filter = state.kept[layer.name]
                density = nonzero / math.prod(layer.shape)
            weights += math.prod(layer.shape)
            live += density * math.prod(layer.shape)
            why = "dense by Erdos-Renyi" if density == 1 and not fixed else ""
            moves = self.redistribute and not fixed
            if moves:
                why = f"{density:.3f} at the start, then by what survives in each layer"
            what = "kernels" if kernels else "weights"
            rows.append(LayerPlan(layer.name, layer.shape, what, None if moves else density, per_filter, why))
        summary = (
            f"sparsity asked {self.sparsity:g}, {'reached' if fixed else 'planned'} "
            f"{1 - live / max(weights, 1):.3f} of the weights of {len(rows)} layers"
            f"{planned_far_off(self.sparsity, 1 - live / max(weights, 1))}"
        )
        grow = {"gradient": "the largest gradients", "random": "random positions"}[self.growth]
        where = "layers by their survivors" if self.redistribute else "the same layer"
        every = "every batch" if timing.interval == 1 else f"every {timing.interval} batches"
        every += ", twice as many by quarters" if timing.doubling else ""
        until = f"until batch {timing.end} of {timing.total}"
        stages = (
            ("stage 1 dynamic", f"{until}, {every}: {how} dropped, {grow} grow in {where}"),
            ("stage 2 fixed", "to the end, positions fixed"),
        )
        return PruningPlan(plan_rows(prunable, rows), summary, stages)


def dynamic_state_dict(state: DynamicState) -> dict[str, Any]:
    """Nested dicts of tensors and numbers; masks with one bit a weight."""
    return {
        "seed": state.seed,
        "stage": state.stage,
        "updated": state.updated,
        "threshold": state.threshold,
        "masks": {name: bits_from_mask(mask) for name, mask in state.masks.items()},
        "kept": {name: list(counts) for name, counts in state.kept.items()},
    }


def load_dynamic_state(prunable: PrunableLayers, saved: Mapping[str, Any]) -> DynamicState:
    """Inverse of `dynamic_state_dict`."""
    masks = {
        layer.name: mask_from_bits(saved["masks"][layer.name].to(layer.weight.device), layer.shape)
        for layer in prunable.layers
        if layer.name in saved["masks"]
    }
    state = DynamicState(saved["seed"], saved["stage"], saved["updated"], saved["threshold"], masks)
    state.kept = {name: (nonzero, each) for name, (nonzero, each) in saved.get("kept", {}).items()}
    if state.stage == "fixed" and masks:  # states of older versions keep the masks
        state.release(masks)
    return state
