"""The curves of one run, with its stages as bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clicktrain import wording
from clicktrain.report.charts import Figure, Key, Series, bar_chart, line_figure
from clicktrain.report.comparison import robustness_figures, sparsity_steps
from clicktrain.report.exchange import exchange_figures
from clicktrain.report.run_data import Run, number
from clicktrain.report.stages import StageBand, stage_bands

_TRAIN, _VAL = "curve-train", "curve-val"


def run_figures(run: Run) -> list[Figure]:
    """Loss, accuracy, sparsity, FLOPs, time, learning rate over epochs; what is missing is left out."""
    if not run.metrics:
        return []
    bands = stage_bands(run)
    bands = bands if len(bands) > 1 else ()
    figures = [
        _two_curves(run, bands, "Loss", "loss", _loss_caption(run), zero=True),
        _two_curves(run, bands, "Accuracy, %", "accuracy", _accuracy_caption(run), top=100.0),
        _sparsity(run, bands),
        _flops(run, bands),
        _time(run, bands),
        _learning_rate(run, bands),
        *robustness_figures([(run, _VAL)]),
        _exchanged(run, bands),
        *exchange_figures(run),
    ]
    return [figure for figure in figures if figure is not None]


def _frame(run: Run, title: str, bands: Sequence[StageBand]) -> dict[str, Any]:
    """What all line charts of a run have."""
    label = f"{title} of {run.label} over epochs"
    return {"label": label, "epochs": (0.0, float(run.epochs_done)), "bands": bands}


def _two_curves(
    run: Run, bands: Sequence[StageBand], title: str, what: str, caption: str, **options: Any
) -> Figure | None:
    series = [
        Series("training", run.column(f"train_{what}"), _TRAIN, dashed=True, bold=False),
        Series("validation", run.column(f"val_{what}"), _VAL),
    ]
    return line_figure(title, series, caption, **_frame(run, title, bands), **options)


def _ends(run: Run) -> str:
    return "ends" if run.finished else "is now"


def _loss_caption(run: Run) -> str:
    ends = [
        f"{name} loss {_ends(run)} at {values[-1][1]:.3g}"
        for name, key in (("training", "train_loss"), ("validation", "val_loss"))
        if (values := run.column(key))
    ]
    return (wording.sentence_list(ends) + ".").capitalize() if ends else ""


def _accuracy_caption(run: Run) -> str:
    text = ""
    if run.accuracy is not None:
        text = f"Validation accuracy {_ends(run)} at {wording.fixed(run.accuracy)}%"
        best = run.best_accuracy
        if best is not None and best > run.accuracy:
            text += f", its best epoch had {wording.fixed(best)}%"
        text += "."
    values, at = run.column("val_accuracy"), run.hard_prune_epoch
    if at is not None:
        before = [value for epoch, value in values if epoch <= at]
        after = [value for epoch, value in values if epoch > at]
        if before and after:
            change = f"from {wording.fixed(before[-1])}% to {wording.fixed(after[0])}%"
            text += f" Around the hard prune (epoch {wording.epoch(at)}) it went {change}."
    return text.strip()


def _sparsity(run: Run, bands: Sequence[StageBand]) -> Figure | None:
    points = sparsity_steps(run)
    if not any(value > 0 for _, value in points):
        return None
    when = "at the end" if run.finished else "now"
    caption = f"{wording.fixed(points[-1][1])}% of the convolution weights are zero {when}"
    if run.hard_prune_epoch is not None:
        caption += f"; masks were frozen in epoch {wording.epoch(run.hard_prune_epoch)}"
    lost = number(run.event("hard_prune"), "energy_outside")
    if lost is not None:
        caption += f", when what was cut held {wording.percent(lost, 1)} of the weights’ energy"  # noqa: RUF001
    series = [Series("sparsity", points, _VAL)]
    return line_figure(
        "Sparsity, %", series, caption + ".", **_frame(run, "Sparsity", bands), y_range=(0, 100)
    )


def _differences(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    values = [0.0, *(value for _, value in points)]
    return [(epoch, values[i + 1] - values[i]) for i, (epoch, _) in enumerate(points)]


def _flops(run: Run, bands: Sequence[StageBand]) -> Figure | None:
    spent = _differences(run.column("train_flops"))
    dense = _differences(run.column("train_flops_dense"))
    if not spent or len(spent) != len(dense):
        return None
    shares = [
        (epoch, 100 * value / whole) for (epoch, value), (_, whole) in zip(spent, dense, strict=True) if whole
    ]
    if not shares:
        return None
    drawn = bar_chart(
        [Series("% of a dense epoch", shares, _VAL)],
        label=f"FLOPs per epoch of {run.label}, in percent of a dense epoch",
        last_epoch=float(run.epochs_done),
        bands=bands,
        reference=100.0,
    )
    total = run.column("train_flops")[-1][1]
    caption = f"Forward and backward passes of each epoch; {wording.quantity(total, 'FLOPs')} in all"
    if shares[-1][1] < 99.5:
        caption += f". The last epoch costs {wording.percent(shares[-1][1] / 100)} of a dense one (dashed)"
    return Figure("FLOPs per epoch, % of dense", drawn, caption + ".")


def _time(run: Run, bands: Sequence[StageBand]) -> Figure | None:
    whole = run.column("seconds")
    if not whole:
        return None
    waited = dict(run.column("data_seconds"))
    data = [(epoch, min(waited.get(epoch, 0.0), value)) for epoch, value in whole]
    rest = [(epoch, value - wait) for (epoch, value), (_, wait) in zip(whole, data, strict=True)]
    parts = [Series("waiting for data, s", data, "curve-wait"), Series("computing, s", rest, _VAL)]
    drawn = bar_chart(
        parts, label=f"Seconds per epoch of {run.label}", last_epoch=float(run.epochs_done), bands=bands
    )
    caption = "Training time of each epoch, evaluation and checkpoints left out."
    if run.data_share is not None:
        caption += f" Waiting for data took {wording.percent(run.data_share, 1)} of it."
    keys = tuple(Key(part.label.removesuffix(", s"), part.css, area=True) for part in parts)
    return Figure("Time per epoch, s", drawn, caption, keys)


def _learning_rate(run: Run, bands: Sequence[StageBand]) -> Figure | None:
    series = [Series("learning rate", run.column("learning_rate"), _VAL)]
    schedule = run.config.get("schedule")
    caption = "Of the last step of each epoch" + (f"; schedule {schedule}." if schedule else ".")
    return line_figure("Learning rate", series, caption, **_frame(run, "Learning rate", bands), zero=True)


def _exchanged(run: Run, bands: Sequence[StageBand]) -> Figure | None:
    """What each of several processes has handed to collectives in a step, as it was counted."""
    steps = dict(run.column("exchange_steps"))
    sizes = [(e, size / steps[e] / 1e6) for e, size in run.column("exchange_bytes") if steps.get(e)]
    if not sizes:
        return None
    title = "Exchanged in a step, MB"
    caption = (
        "Bytes that each process handed to collectives, gradients and all else, counted there: "
        f"{sizes[0][1]:.3g} MB at first, {sizes[-1][1]:.3g} MB {'at the end' if run.finished else 'now'}"
    )
    if (share := number(run.summary, "exchange_ratio")) is not None:
        caption += f". All gradients of the run are {wording.percent(share)} of those of dense training"
    return line_figure(
        title, [Series("MB", sizes, _VAL)], caption + ".", **_frame(run, title, bands), zero=True
    )
