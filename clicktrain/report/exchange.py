"""A run's exchange of gradients on many GPUs: PruneTrain's figure 11, ClickTrain's figures 13 and 14."""

from __future__ import annotations

from collections.abc import Callable

from clicktrain import wording
from clicktrain.cluster import LINKS, Cluster, Projection, project
from clicktrain.errors import UserError
from clicktrain.report.charts import Figure, Series, line_figure
from clicktrain.report.run_data import Run

LARGE = Cluster.of(128, per_machine=8, inside=LINKS["nvlink"], between=LINKS["ib-edr"])
"""As many GPUs as in PruneTrain's figure 11."""
SMALL = tuple(
    Cluster.of(gpus, per_machine=4, inside=LINKS["pcie3"], between=LINKS["ib-fdr"]) for gpus in (4, 8, 16)
)
"""ClickTrain's machines (section 6.1): four GPUs each, FDR InfiniBand."""
_DENSE, _RUN = "curve-train", "curve-val"
_Line = tuple[str, str, bool, Callable[[Projection], float]]
"""Label, class of its color, dashed or not, and its height."""


def exchange_figures(run: Run) -> list[Figure]:
    """Bytes over epochs, and times by number of GPUs; none for dense runs and runs without their sizes."""
    if run.is_dense:
        return []
    try:
        large = project(run.metrics, run.summary, LARGE, accumulate=run.accumulate)
        small = [project(run.metrics, run.summary, cluster, accumulate=run.accumulate) for cluster in SMALL]
    except UserError:  # an old folder, or no finished epoch
        return []
    figures = [_bytes(run, large), _exchange(run, small), _training(run, small)]
    return [figure for figure in figures if figure is not None]


def _bytes(run: Run, projection: Projection) -> Figure | None:
    step = [(cost.epoch, 100 * cost.bytes_step / cost.dense_bytes_step) for cost in projection.epochs]
    epoch = [
        (cost.epoch, 100 * cost.bytes_epoch / (cost.dense_bytes_step * cost.dense_steps))
        for cost in projection.epochs
    ]
    series = [Series("a step", step, _RUN)]
    caption = (
        f"Gradients that each of 128 GPUs sends; {wording.percent(projection.bytes_saved)} saved in a "
        "step, on average"
    )
    if any(abs(whole - part) > 0.5 for (_, whole), (_, part) in zip(epoch, step, strict=True)):
        series.append(Series("an epoch", epoch, _RUN, dashed=True, bold=False))
        caption += f", {wording.percent(projection.bytes_saved_run)} in the run with its larger batches"
    return line_figure(
        "Exchange on 128 GPUs, % of dense", series, caption + ". Projected.",
        label=f"Bytes of gradients of {run.label} over epochs, in percent of dense training",
        epochs=(0.0, float(run.epochs_done)), y_range=(0, 100),
    )  # fmt: skip


def _by_gpus(
    run: Run,
    title: str,
    caption: str,
    projections: list[Projection],
    lines: list[_Line],
) -> Figure | None:
    series = [
        Series(label, [(float(p.cluster.gpus), value(p)) for p in projections], css, dashed=dashed)
        for label, css, dashed, value in lines
    ]
    return line_figure(
        title, series, caption, label=f"{title} of {run.label} by number of GPUs", x_name="GPUs",
        epochs=(0.0, float(projections[-1].cluster.gpus)), zero=True,
    )  # fmt: skip


def _exchange(run: Run, projections: list[Projection]) -> Figure | None:
    saved = wording.sentence_list(
        [f"{wording.percent(p.exchange_saved)} on {p.cluster.gpus}" for p in projections]
    )
    return _by_gpus(
        run, "Exchange of a step, ms",
        f"All gradients of a step in machines of 4 GPUs (PCIe 3, FDR InfiniBand), last epoch; saved: {saved} "
        "GPUs. Projected.",
        projections,
        [
            ("dense", _DENSE, True, lambda p: 1e3 * p.epochs[-1].dense.exchange),
            ("this run", _RUN, False, lambda p: 1e3 * p.epochs[-1].run.exchange),
        ],
    )  # fmt: skip


def _training(run: Run, projections: list[Projection]) -> Figure | None:
    hours = max(p.dense_seconds for p in projections) >= 7200
    unit, name = (3600.0, "h") if hours else (60.0, "min")
    dense: list[_Line] = []
    if projections[0].dense_known:
        dense = [("dense", _DENSE, True, lambda p: p.dense_seconds / unit)]
    return _by_gpus(
        run, f"Training on several GPUs, {name}",
        f"All epochs of the run, steps as measured on {run.device or 'its device'}, and what of the exchange "
        "the backward pass does not hide. Projected.",
        projections,
        [*dense, ("this run", _RUN, False, lambda p: p.seconds / unit)],
    )  # fmt: skip
