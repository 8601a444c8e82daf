"""What ClickTrain is going to do, or has decided, layer by layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.base import LayerPlan, PruningPlan, RunLength, plan_rows
from clicktrain.methods.outcome import planned_far_off
from clicktrain.methods.patterns.latency import LatencyAim
from clicktrain.methods.patterns.selection import Selection, Target
from clicktrain.sparsity.allocation import allocate
from clicktrain.sparsity.registry import choice_name

if TYPE_CHECKING:
    from clicktrain.methods.clicktrain import ClickTrain


def clicktrain_plan(
    method: ClickTrain, prunable: PrunableLayers, length: RunLength, selection: Selection | None
) -> PruningPlan:
    """Per layer: what is pruned, to what density, by what; what was decided once it is."""
    decided = selection is not None and bool(selection.kernels)
    targets = method.targets(prunable)
    if method.aim is not None and not decided:
        return _undecided(method, prunable, length, method.aim)
    budgets = [t.budget for t in targets]
    even = (
        allocate(budgets, prunable.other_conv_weights, method.compression) if targets and not decided else {}
    )
    rows = []
    for target in targets:
        name, kernels = target.layer.name, even.get(target.layer.name, 0)
        reason = "fixed by 'layers'" if target.fixed_kernels else ""
        if decided and selection is not None:
            kernels = selection.kernels[name]
        elif method.allocation != "uniform" and not target.fixed_kernels:
            reason = f"shown for equal densities; allocated by {method.allocation} after stage 3"
        density = kernels * target.budget.price / target.budget.weights
        rows.append(
            LayerPlan(name, target.layer.shape, _what(target), density, kernels * target.entries, reason)
        )
    kept = sum(round((r.density or 0) * math.prod(r.shape)) for r in rows) + prunable.other_conv_weights
    reached = prunable.conv_weights / max(kept, 1)
    asked = "" if method.compression_asked is None else f"asked {method.compression:g}, "
    summary = f"compression {asked}{'reached' if decided else 'planned'} {reached:.2f}"
    if method.compression_asked is not None:
        summary += planned_far_off(method.compression, reached)
    return PruningPlan(plan_rows(prunable, rows), summary, _stage_lines(method, length))


def _undecided(
    method: ClickTrain, prunable: PrunableLayers, length: RunLength, aim: LatencyAim
) -> PruningPlan:
    """The plan with a latency as the target: densities come out of measurements after stage 3."""
    rows = [
        LayerPlan(t.layer.name, t.layer.shape, _what(t), None, None,
                  "fixed by 'layers'" if t.fixed_kernels else "by its time, after stage 3")
        for t in method.targets(prunable)
    ]  # fmt: skip
    asked = f"{aim.ms:g} ms" if aim.ms is not None else f"{aim.ratio:.0%} of the dense network's time"
    summary = f"as many kernels are kept as {asked} allow ({aim.timed}, batch {aim.batch})"
    return PruningPlan(plan_rows(prunable, rows), summary, _stage_lines(method, length))


def _stage_lines(method: ClickTrain, length: RunLength) -> tuple[tuple[str, str], ...]:
    lengths, per_epoch = method.schedule(length), length.steps_per_epoch

    def epochs(batches: int) -> str:
        return f"{batches / per_epoch:.2f} epochs"

    pool = (
        f"{epochs(lengths['pool'])}, {method.patterns} patterns"
        if lengths["pool"]
        else f"{method.patterns} given patterns"
    )
    begin = f"until the loss falls by less than {method.loss_slope:g} per epoch, "
    if method.trigger == "epi":
        window = method.epi_epochs(length)
        begin = f"until EPI over {window} epochs is at least {method.epi_fires_from:g}, "
    elif method.watches_structure:
        begin = f"until {choice_name(method.trigger)} says so, "
    begin += f"{epochs(lengths['earliest'])} at the least, {epochs(lengths['latest'])} at the most"
    return (
        ("stage 1 dense", begin),
        ("stage 2 pool", pool),
        ("stage 3 finalize", f"{epochs(lengths['finalize'])}, by {choice_name(method.criterion)} importance"),
        (
            "stage 4 regularize",
            f"{epochs(lengths['regularize'])}, penalty {method.penalty}, then hard prune",
        ),
        ("stage 5 accelerated", "to the end, positions fixed"),
    )


def _what(target: Target) -> str:
    return f"{target.entries} of {target.budget.positions} + kernels" if target.has_patterns else "kernels"
