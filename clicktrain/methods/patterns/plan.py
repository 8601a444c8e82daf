"""The plan of ClickTrain: what it will prune of each layer, or has decided to."""

from __future__ import annotations

import math

from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.base import LayerPlan, PruningPlan, RunLength, plan_rows
from clicktrain.methods.outcome import planned_far_off
from clicktrain.methods.patterns.selection import PatternLayer, Selection
from clicktrain.methods.patterns.settings import PatternSettings
from clicktrain.sparsity.allocation import allocate
from clicktrain.sparsity.registry import choice_name


def clicktrain_plan(
    method: PatternSettings, prunable: PrunableLayers, length: RunLength, selection: Selection | None
) -> PruningPlan:
    """Per layer: what is pruned, to what density and why; decisions, once they are made."""
    layers = method.targets(prunable)
    kernels: dict[str, int] | None = None
    if selection is not None and selection.kernels:
        kernels = selection.kernels
    elif method.aim is None and layers:
        budgets = [layer.budget for layer in layers]
        kernels = allocate(budgets, prunable.other_conv_weights, method.compression)
    decided = kernels is not None and selection is not None and kernels is selection.kernels
    rows = [
        _row(layer, None if kernels is None else kernels[layer.name], method, decided) for layer in layers
    ]
    if kernels is None and method.aim is not None:
        summary = f"as many kernels are kept as {method.aim} allows"
    else:
        kept = sum(round((r.density or 0) * math.prod(r.shape)) for r in rows) + prunable.other_conv_weights
        reached = prunable.conv_weights / max(kept, 1)
        asked = "" if method.compression_asked is None else f"asked {method.compression:g}, "
        summary = f"compression {asked}{'reached' if decided else 'planned'} {reached:.2f}"
        if method.compression_asked is not None:
            summary += planned_far_off(method.compression, reached)
    return PruningPlan(plan_rows(prunable, rows), summary, _stage_lines(method, length))


def _row(layer: PatternLayer, kernels: int | None, method: PatternSettings, decided: bool) -> LayerPlan:
    """``kernels``: kept ones per filter; None before the search for a latency."""
    what = f"{layer.entries} of {layer.budget.positions} + kernels" if layer.has_patterns else "kernels"
    reason = "fixed by 'layers'" if layer.fixed_kernels else ""
    if kernels is None:
        return LayerPlan(layer.name, layer.layer.shape, what, reason=reason or "by its time, after stage 3")
    if not decided and method.allocation != "uniform" and not reason:
        reason = f"shown for equal densities; allocated by {choice_name(method.allocation)} after stage 3"
    density = kernels * layer.budget.price / layer.budget.weights
    return LayerPlan(layer.name, layer.layer.shape, what, density, kernels * layer.entries, reason)


def _stage_lines(method: PatternSettings, length: RunLength) -> tuple[tuple[str, str], ...]:
    lengths, per_epoch = method.schedule(length), length.steps_per_epoch

    def epochs(batches: int) -> str:
        return f"{batches / per_epoch:.2f} epochs"

    pool = (
        f"{epochs(lengths['pool'])}, {method.patterns} patterns"
        if lengths["pool"]
        else f"{method.patterns} fixed patterns"
    )
    begin = f"until {method.settled.describe()}, "
    if method.trigger == "epi":
        window = method.epi_epochs(length)
        begin = f"until EPI over {window} epochs is at least {method.stable_from:g}, "
    elif method.watches_structure:
        begin = f"until {choice_name(method.trigger)} says so, "
    begin += f"{epochs(lengths['earliest'])} at the least, {epochs(lengths['latest'])} at the most"
    if method.early_penalty != "none":
        by = {"batch": "each batch", "summed": "summed importance"}[method.early_penalty or "batch"]
        pool += f"; from here on penalty {choice_name(method.penalty)} outside the candidates of {by}"
    regularize = epochs(lengths["regularize"])
    if "hard_prune" in lengths:
        regularize = f"until epoch {lengths['hard_prune'] / per_epoch:.2f}"
    return (
        ("stage 1 dense", begin),
        ("stage 2 pool", pool),
        ("stage 3 finalize", f"{epochs(lengths['finalize'])}, by {choice_name(method.criterion)} importance"),
        (
            "stage 4 regularize",
            f"{regularize}, penalty {choice_name(method.penalty)}, then hard prune",
        ),
        ("stage 5 accelerated", "to the end, masks frozen"),
    )
