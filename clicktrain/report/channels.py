"""Networks that become smaller while they train: what an iteration takes, and every reconfiguration.

The figures are those of PruneTrain (2, 4, 6, 9, 11, 12); PaT's indicator of when to prune is here too.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clicktrain import wording
from clicktrain.report.channel_weights import channel_weight_figures
from clicktrain.report.charts import Figure, Series, bar_chart, line_figure
from clicktrain.report.run_data import Run, number

_A, _B = "curve-val", "curve-train"
_MEGABYTE = 1e6
_PHASES = 3
_BEGINS = ("trigger", "stage", "reconfigured", "hard_prune")
"""Events of which the first says when the indicator was heeded."""

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class ChannelView:
    """What a run's section shows of it; ``rows`` are the cells of the table of reconfigurations."""

    figures: tuple[Figure, ...]
    rows: tuple[tuple[str, ...], ...]
    overhead: str


def channel_view(run: Run) -> ChannelView | None:
    """Figures and table of a run that removes channels; None for one that does not."""
    events = [event for event in run.events if event.get("event") == "reconfigured"]
    indicator = _indicator(run)
    weights = channel_weight_figures(run)
    if not events:
        early = (indicator, *weights) if indicator else weights
        return ChannelView(early, (), "") if early else None
    figures = [
        indicator,
        _flops(run),
        _phases(run),
        _memory(run),
        _batch(run),
        _exchange(run),
        _batch_norm(run),
        _densities(run, events),
        *weights,
    ]
    rows = tuple(_row(run, event) for event in events)
    return ChannelView(tuple(figure for figure in figures if figure), rows, _overhead(run, events))


def flops_of_dense(run: Run, key: str = "train_flops_per_image") -> Points:
    """(epoch, percent): FLOPs of an image in the network that an epoch trained, over the first epoch's."""
    return _of_first(run.column(key))


def _of_first(points: Sequence[tuple[float, float]]) -> Points:
    if not points or not points[0][1]:
        return []
    return [(epoch, 100 * value / points[0][1]) for epoch, value in points]


def _lines(run: Run, title: str, lines: Sequence[Series], caption: str, **options: Any) -> Figure | None:
    label, epochs = f"{title}, of {run.label}, over epochs", (0.0, float(run.epochs_done))
    return line_figure(title, lines, caption, label=label, epochs=epochs, zero=True, **options)


def _flops(run: Run) -> Figure | None:
    training = flops_of_dense(run)
    inference = flops_of_dense(run, "inference_flops_per_image")
    lines = [Series("training step", training, _A), Series("prediction", inference, _B, dashed=True)]
    if not training:
        return None
    caption = f"For one image; the last epoch trained with {wording.fixed(training[-1][1])}% of dense"
    if run.finished and run.inference_flops_ratio is not None:
        caption += f", the final network predicts with {wording.percent(run.inference_flops_ratio, 1)}"
    return _lines(run, "FLOPs per image, % of dense", lines, caption + ".")


def _phases(run: Run) -> Figure | None:
    """Figure 2b: which third of the run removed how much of all FLOPs that went."""
    points = flops_of_dense(run)
    total = points[0][1] - points[-1][1] if points else 0.0
    if total <= 0:
        return None
    shares = [0.0] * _PHASES
    for (epoch, before), (_, after) in itertools.pairwise(points):
        # What went at the end of an epoch shows in the line of the next.
        phase = min(int((epoch - 0.5) * _PHASES / max(run.epochs_asked, 1)), _PHASES - 1)
        shares[phase] += 100 * (before - after) / total
    bars = [(float(i + 1), max(share, 0.0)) for i, share in enumerate(shares)]
    drawn = bar_chart(
        [Series("% of what went", bars, _A)],
        label=f"Removed FLOPs of {run.label} by thirds of the run",
        last_epoch=float(_PHASES),
        x_name="third of the run",
    )
    parts = wording.sentence_list([f"{wording.fixed(share, 0)}%" for share in shares])
    caption = f"Of the FLOPs that went, {parts} went in the first, second and last third."
    return Figure("When FLOPs were removed, %", drawn, caption)


def _memory(run: Run) -> Figure | None:
    values = [(epoch, value / _MEGABYTE) for epoch, value in run.column("memory_bytes")]
    if not values:
        return None
    budget = number(run.event("batch_resized"), "memory_budget")
    caption = f"Activations, weights, gradients and optimizer: {_megabytes(values[0][1])} at first, "
    caption += f"{_megabytes(values[-1][1])} {'at the end' if run.finished else 'now'}"
    if budget is not None:
        caption += f"; dashed: the budget that batches grow in ({_megabytes(budget / _MEGABYTE)})"
    line = [Series("MB", values, _A)]
    reference = None if budget is None else budget / _MEGABYTE
    return _lines(run, "Memory per iteration, MB", line, caption + ".", reference=reference)


def _megabytes(value: float) -> str:
    return f"{value:.3g} MB"


def _batch(run: Run) -> Figure | None:
    values = run.column("batch_size")
    if len({value for _, value in values}) < 2:
        return None
    factor = number(run.event("batch_resized"), "learning_rate_factor")
    caption = f"From {wording.integer(values[0][1])} to {wording.integer(values[-1][1])} images"
    if factor is not None:
        caption += f"; the learning rate grew to {factor:.3g}× its schedule"  # noqa: RUF001
    return _lines(run, "Images per batch", [Series("images", values, _A)], caption + ".")


def _exchange(run: Run) -> Figure | None:
    sizes = run.column("gradient_bytes")
    if not sizes:
        return None
    lines = [
        Series("per iteration", _of_first(sizes), _A),
        Series("per epoch", _of_first(run.column("gradient_bytes_epoch")), _B, dashed=True),
    ]
    caption = (
        "Bytes of weight gradients, which data-parallel training exchanges: "
        f"{_megabytes(sizes[0][1] / _MEGABYTE)} per iteration at first, "
        f"{_megabytes(sizes[-1][1] / _MEGABYTE)} {'at the end' if run.finished else 'now'}."
    )
    return _lines(run, "Weight gradients, % of dense", lines, caption)


def _batch_norm(run: Run) -> Figure | None:
    batches = dict(run.column("batch_size"))
    values = [(e, v / batches[e]) for e, v in run.column("batch_norm_bytes") if batches.get(e)]
    points = _of_first(values)
    if not points:
        return None
    last = wording.fixed(points[-1][1])
    caption = f"Bytes that batch norm reads and writes; {last}% of dense in the last epoch."
    return _lines(run, "Batch-norm traffic per image, % of dense", [Series("%", points, _A)], caption)


def _indicator(run: Run) -> Figure | None:
    """PaT's early pruning indicator, and when it said that it is time."""
    reports = [event for event in run.events if event.get("event") == "epi"]
    pairs = ((number(event, "epoch"), number(event, "epi")) for event in reports)
    points = [(epoch, value) for epoch, value in pairs if epoch is not None and value is not None]
    if not points:
        return None
    threshold = number(reports[-1], "threshold")
    begins = [number(e, "epoch") for e in run.events if e.get("event") in _BEGINS]
    chosen = next((epoch for epoch in begins if epoch), None)
    values = [value for _, value in points] + ([] if threshold is None else [threshold])
    caption = "How alike the structures of neighboring epochs are"
    caption += f"; dashed: the threshold {threshold:.3g}" if threshold is not None else ""
    began = "" if chosen is None else f"after epoch {wording.epoch(chosen)}"
    return line_figure(
        "Early pruning indicator",
        [Series("indicator", points, _A)],
        f"{caption}. Pruning began {began} (upright line)." if began else f"{caption}.",
        label=f"Early pruning indicator of {run.label} over epochs",
        epochs=(0.0, float(max(run.epochs_done, *(e for e, _ in points)))),
        y_range=(min(0.0, *values), max(1.0, *values)),
        reference=threshold,
        marks=[] if chosen is None else [(chosen, f"pruning began {began}")],
    )


def layer_densities(run: Run, events: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float | None]]:
    """(convolution, channel density, weight density) now, as in figure 12; a layer that is gone has 0.

    Channel density is input x output channels left; of those, weight density leaves out weights that are not
    over the method's threshold. None where there are no weights to read (yet).
    """
    first = {str(row["name"]): row for row in _layers(events[0])}
    last: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for row in _layers(events[-1]):
        name = str(row["name"])
        last[_first_name(name, first)] = (name, row)
    gone = {_first_name(str(name), first) for event in events for name in event.get("layers_removed") or ()}
    threshold = number(run.config, "threshold") or 1e-4
    densities: list[tuple[str, float, float | None]] = []
    for name, row in first.items():
        if name in gone or name not in last:
            densities.append((name, 0.0, 0.0))
            continue
        now_called, now = last[name]
        called = next((n for n in (f"{now_called}.layer", now_called) if n in run.weight_shapes), None)
        if run.weight_shapes and called is None:
            continue  # no convolution
        ins, outs = _share(row, now, "inputs"), _share(row, now, "outputs")
        # A depthwise layer loses a channel once, on both sides.
        weight = None if called is None else run.weight(called)
        depthwise = weight is not None and weight.shape[1] == 1 and _pair(row, "inputs")[0] > 1
        channels = outs if depthwise else ins * outs
        nonzero = None if weight is None else float((np.abs(weight) > threshold).mean())
        weights = None if nonzero is None else channels * nonzero
        densities.append((name, channels, weights))
    return densities


def _layers(event: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rows = event.get("layers")
    return [row for row in rows or () if isinstance(row, Mapping) and "name" in row]


def _first_name(name: str, known: Mapping[str, Any]) -> str:
    """Channel gating puts a layer called X at ``X.layer``."""
    while name not in known and name.endswith(".layer"):
        name = name.removesuffix(".layer")
    return name


def _pair(row: Mapping[str, Any], side: str) -> tuple[float, float]:
    values = row.get(side)
    if isinstance(values, Sequence) and len(values) == 2:
        return float(values[0]), float(values[1])
    return 1.0, 1.0


def _share(first: Mapping[str, Any], last: Mapping[str, Any], side: str) -> float:
    return _pair(last, side)[1] / max(_pair(first, side)[0], 1.0)


def _densities(run: Run, events: Sequence[Mapping[str, Any]]) -> Figure | None:
    densities = layer_densities(run, events)
    if not densities:
        return None
    channels = [(float(i), 100 * share) for i, (_, share, _) in enumerate(densities, 1)]
    weights = [(float(i), 100 * share) for i, (_, _, share) in enumerate(densities, 1) if share is not None]
    gone, count = sum(share == 0 for _, share, _ in densities), len(densities)
    caption = "Input times output channels that are left, and weights among them that are not near zero; "
    caption += f"{gone} of {count} layers are removed." if gone else f"all {count} layers are left."
    return line_figure(
        "Density of each layer, %",
        [Series("channels", channels, _A), Series("weights", weights, _B, dashed=True)],
        caption,
        label=f"Channel and weight density of every layer of {run.label}",
        epochs=(1.0, float(max(count, 2))),
        y_range=(0.0, 100.0),
        x_name="layer",
    )


def _row(run: Run, event: Mapping[str, Any]) -> tuple[str, ...]:
    epoch = number(event, "epoch")
    after = _next_line(run, epoch)
    first = run.metrics[0] if run.metrics else None
    flops, dense = number(after, "train_flops_per_image"), number(first, "train_flops_per_image")
    names = [str(name) for name in event.get("layers_removed") or ()]
    before, left = number(event, "channels_before"), number(event, "channels_after")
    change, seconds = number(event, "max_output_change"), number(event, "seconds")
    return (
        wording.epoch(epoch),
        f"{wording.integer(before)} → {wording.integer(left)}",
        ", ".join(names) or wording.MISSING,
        wording.quantity(number(after, "parameters")),
        wording.percent(flops / dense, 1) if flops is not None and dense else wording.MISSING,
        wording.integer(number(after, "batch_size")),
        wording.MISSING if seconds is None else f"{seconds:.3g}",
        wording.MISSING if change is None else f"{change:.2g}",
    )


def _next_line(run: Run, epoch: float | None) -> Mapping[str, Any] | None:
    """The line of the epoch that trained what a reconfiguration left."""
    if epoch is None:
        return None
    return next((line for line in run.metrics if (number(line, "epoch") or 0) > epoch), None)


def _overhead(run: Run, events: Sequence[Mapping[str, Any]]) -> str:
    took = ("seconds", "planning_seconds")  # the latter not in older runs
    seconds = sum(number(event, key) or 0.0 for event in events for key in took)
    text = f"{len(events)} reconfiguration{'' if len(events) == 1 else 's'} took {seconds:.2g} s"
    if run.seconds:
        text += f", {wording.percent(seconds / run.seconds, 2)} of the run"
    return text + "."
