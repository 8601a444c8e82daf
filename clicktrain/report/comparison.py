"""Runs side by side: baseline, headline, table and the curves over each other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clicktrain import wording
from clicktrain.report import charts
from clicktrain.report.channels import flops_of_dense
from clicktrain.report.charts import Figure, Key, Point, Series, line_figure
from clicktrain.report.run_data import Run
from clicktrain.report.stages import stage_bands

RUN_COLORS = 8
"""Colors of the page's style for runs that are no baseline."""

CLOSE_TO_DENSE = 1.0
"""Points of accuracy that the run in the headline may lie under the dense run."""


@dataclass(frozen=True)
class Entry:
    """A run with its place in the report and the dense run it is measured against, if there is one."""

    run: Run
    number: int
    css: str
    baseline: Run | None

    @property
    def anchor(self) -> str:
        """Id of its section."""
        return f"run-{self.number}"

    @property
    def difference(self) -> float | None:
        """Points of final accuracy over the dense run; None while the run is not finished."""
        if self.baseline is None or not self.run.finished:
            return None
        reached, dense = self.run.accuracy, self.baseline.accuracy
        return None if reached is None or dense is None else reached - dense


def entries(runs: Sequence[Run]) -> tuple[Entry, ...]:
    """Dense runs first; pruned runs with their baselines: same task, same seed and length if possible."""
    ordered = sorted(runs, key=lambda run: not run.is_dense)
    colors = (f"run-c{number}" for number in itertools.cycle(range(1, RUN_COLORS + 1)))
    return tuple(
        Entry(run, i, "run-dense" if run.is_dense else next(colors), _baseline(run, runs))
        for i, run in enumerate(ordered, 1)
    )


def _baseline(run: Run, runs: Sequence[Run]) -> Run | None:
    if run.is_dense:
        return None
    dense = [other for other in runs if other.is_dense and other.task == run.task and other.finished]
    same = ("seed", "epochs")
    return max(dense, key=lambda d: [d.config.get(key) == run.config.get(key) for key in same], default=None)


def headliner(compared: Sequence[Entry]) -> Entry:
    """The run that the headline is about.

    Of the finished pruned runs the one with the highest compression that is at most `CLOSE_TO_DENSE` points
    under dense; if there is none, the most accurate one; if nothing was pruned, the first run.
    """
    pruned = [e for e in compared if not e.run.is_dense and e.run.finished]
    close = [e for e in pruned if e.difference is not None and e.difference >= -CLOSE_TO_DENSE]
    if close:
        return max(close, key=lambda e: (e.run.compression or 0, e.run.accuracy or 0))
    if pruned:
        return max(pruned, key=lambda e: (e.run.accuracy or 0, e.run.compression or 0))
    unfinished = [e for e in compared if not e.run.is_dense]
    return (unfinished or list(compared))[0]


def headline(entry: Entry) -> str:
    """What the run reached, in one line of plain words."""
    run = entry.run
    if not run.finished:
        so_far = f", {wording.fixed(run.accuracy)}% accuracy so far" if run.accuracy is not None else ""
        return f"Unfinished: epoch {run.epochs_done} of {run.epochs_asked}{so_far}"
    accuracy = f"{wording.fixed(run.accuracy)}% accuracy"
    if run.is_dense:
        return f"{accuracy}, nothing pruned"
    parts = []
    if run.compression is not None:
        parts.append(f"{wording.times(run.compression)} smaller convolutions")
    if entry.baseline is not None and entry.baseline.accuracy is not None:
        accuracy += f" (dense {wording.fixed(entry.baseline.accuracy)}%)"
    parts.append(accuracy)
    if run.train_flops_ratio is not None:
        parts.append(wording.saved(run.train_flops_ratio, "training FLOPs"))
    return ", ".join(parts)


def comparison_figures(compared: Sequence[Entry]) -> list[Figure]:
    """Curves and trade-off of several runs over each other."""
    runs = [entry.run for entry in compared]
    last = float(max(run.epochs_done for run in runs))
    keys = tuple(Key(e.run.label, e.css, dashed=e.run.is_dense) for e in compared)
    figures: list[Figure | None] = [*_trade_offs(compared)]

    def add(title: str, name: str, caption: str, lines: Sequence[Series], **options: Any) -> None:
        options = {"label": f"{name}, all runs", "epochs": (0.0, last), **options}
        figures.append(line_figure(title, lines, caption, keys, **options))

    def curve(title: str, caption: str, key: str, *, since: float = 0.0, zero: bool = False) -> None:
        lines = _lines(compared, lambda run: [p for p in run.column(key) if p[0] >= since])
        options = {"epochs": (since, last), "zero": zero, "top": None if zero else 100}
        add(title, f"{title} over epochs", caption, lines, **options)

    curve("Validation accuracy, %", _accuracy_caption(compared), "val_accuracy")
    if last >= 9:
        title, late = "Validation accuracy, last third, %", float(round(last * 2 / 3))
        curve(title, "The same, where the ends are decided.", "val_accuracy", since=late)
    curve("Training loss", "Mean loss of each epoch’s training batches.", "train_loss", zero=True)  # noqa: RUF001
    curve("Validation loss", "Mean cross-entropy on the validation split.", "val_loss", zero=True)
    sparse = _lines(compared, sparsity_steps)
    if any(y > 0 for line in sparse for _, y in line.points):
        caption = "Share of convolution weights that are zero; it jumps where weights are removed for good."
        add("Sparsity, %", "Sparsity over epochs", caption, sparse, y_range=(0, 100))
    title = "Training FLOPs spent"
    caption = "Forward and backward passes so far; "
    caption += "100% is what dense training of the same length costs in all."
    add(f"{title}, % of dense", title, caption, _lines(compared, _flops_spent), zero=True)
    shrinking = _lines(compared, flops_of_dense)
    if any(y < 99.5 for line in shrinking for _, y in line.points):
        caption = "Of a training step on one image, in the network that each epoch trained."
        title = "FLOPs per image in training, % of dense"
        add(title, "FLOPs per image", caption, shrinking, zero=True)
    figures += robustness_figures([(e.run, e.css) for e in compared])
    curve("Time per epoch, s", "Training time, evaluation and checkpoints left out.", "seconds", zero=True)
    lanes = [(e.run.label, e.css, stage_bands(e.run)) for e in compared]
    if any(len(bands) > 1 for _, _, bands in lanes):
        drawn = charts.lane_chart(lanes, label="Stages of each run over epochs", last_epoch=last)
        caption = "When each run was in which stage."
        figures.append(Figure("Stages", drawn, caption, stage_keys(compared), keys_below=True))
    return [figure for figure in figures if figure is not None]


def stage_keys(compared: Sequence[Entry]) -> tuple[Key, ...]:
    """The stages that the runs went through, with their colors."""
    bands = {band.stage: band for entry in compared for band in stage_bands(entry.run)}
    ordered = sorted(bands.values(), key=lambda band: int(band.mark))
    return tuple(Key(f"{band.mark} {band.title}", band.css, area=True) for band in ordered)


def _lines(compared: Sequence[Entry], points: Callable[[Run], list[tuple[float, float]]]) -> list[Series]:
    lines = [Series(e.run.label, points(e.run), e.css, dashed=e.run.is_dense) for e in compared]
    return [line for line in lines if line.points]


def sparsity_steps(run: Run) -> list[tuple[float, float]]:
    """(epoch, percent) with the hard prune as a step at its own moment."""
    at = run.hard_prune_epoch
    points: list[tuple[float, float]] = []
    before = 0.0
    for epoch, value in run.column("sparsity"):
        if not points:
            points.append((epoch - 1, 0.0))
        if at is not None and epoch - 1 <= at <= epoch and 100 * value > before:
            points += [(at, before), (at, 100 * value)]
        before = 100 * value
        points.append((epoch, before))
    return points


def _trade_offs(compared: Sequence[Entry]) -> Iterator[Figure]:
    """Accuracy over compression, and over FLOPs as a sweep over penalty ratios draws it."""
    for what, key in (
        ("compression", "compression"),
        ("training FLOPs", "train_flops_ratio"),
        ("inference FLOPs", "inference_flops_ratio"),
    ):
        shown = [
            (entry, value, accuracy)
            for entry in compared
            if entry.run.finished
            and (value := getattr(entry.run, key)) is not None
            and (accuracy := entry.run.accuracy) is not None
        ]
        cost = what != "compression"
        if len({round(value, 3) for _, value, _ in shown} if cost else shown) < 2:
            continue
        points = [Point(e.run.label, (100 if cost else 1) * x, y, e.css) for e, x, y in shown]
        dense = [accuracy for entry, _, accuracy in shown if entry.run.is_dense]
        reference = dense[0] if len(dense) == 1 else None
        side = "left is cheaper" if cost else "right is smaller"
        caption = f"Each point is a finished run: up is more accurate, {side}."
        if reference is not None:
            caption += " The dashed line is the dense run."
        x_name = f"{what}, % of dense" if cost else f"{what} (times smaller)"
        label = f"Validation accuracy over {what}"
        drawn = charts.trade_off_chart(points, label=label, reference=reference, x_name=x_name)
        yield Figure(f"Accuracy, %, against {what}", drawn, caption)


def _accuracy_caption(compared: Sequence[Entry]) -> str:
    ends = [
        f"{e.run.label} at {wording.fixed(e.run.accuracy)}%" for e in compared if e.run.accuracy is not None
    ]
    shown = wording.sentence_list(ends) if len(ends) <= 4 else ""
    return f"The curves end with {shown}." if shown else "Top-1 accuracy on the validation split."


def _flops_spent(run: Run) -> list[tuple[float, float]]:
    """Training FLOPs so far, in percent of what a dense run of the same length spends in all."""
    dense = run.column("train_flops_dense")
    if not dense or not dense[-1][1]:
        return []
    whole = dense[-1][1] / dense[-1][0] * max(run.epochs_asked, 1)
    return [(0.0, 0.0), *((epoch, 100 * value / whole) for epoch, value in run.column("train_flops"))]


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings with several values among the runs that have them: (name, value in each run or a dash)."""
    names = list(dict.fromkeys(name for run in runs for name in run.config))
    rows = []
    for name in names:
        values = [wording.setting(run.config.get(name)) for run in runs]
        if len({value for value, run in zip(values, runs, strict=True) if name in run.config}) > 1:
            rows.append((name, values))
    return rows


def time_factor(entry: Entry) -> float | None:
    """Time of the run, initial weights included, / time of its baseline, where both ran on one device."""
    base = entry.baseline
    if base is None or not (entry.run.finished and base.finished) or base.device != entry.run.device:
        return None
    mine, theirs = entry.run.total_seconds, base.total_seconds
    return mine / theirs if mine is not None and theirs else None


ATTACK_NAMES = {"fgsm": "FGSM", "pgd": "PGD"}


def robustness_figures(runs: Sequence[tuple[Run, str]]) -> list[Figure]:
    """One chart per attack that ``clicktrain evaluate --attack`` made; runs with the class of their color."""
    attacks = list(dict.fromkeys(name for run, _ in runs for name in run.robustness))
    figures = []
    for attack in attacks:
        shown = [(run, css) for run, css in runs if attack in run.robustness]
        lines = [Series(run.label, _points(run, attack), css, dashed=run.is_dense) for run, css in shown]
        last = max(x for line in lines for x, _ in line.points)
        if last <= 0:
            continue
        name = ATTACK_NAMES.get(attack, attack)
        label, epsilons = f"Accuracy under {name} over epsilon", (0.0, last)
        drawn = charts.line_chart(lines, label=label, epochs=epsilons, zero=True, top=100.0, x_name="epsilon")
        ends = [f"{line.label} at {wording.fixed(line.points[-1][1])}%" for line in lines]
        caption = "Epsilon is the largest change of a pixel, pixels being 0 to 1."
        if len(ends) <= 4:
            caption += f" The curves end with {wording.sentence_list(ends)}."
        keys = tuple(Key(run.label, css, dashed=run.is_dense) for run, css in shown)
        figures.append(Figure(f"Accuracy under {name}, %", drawn, caption, keys))
    return figures


def _points(run: Run, attack: str) -> list[tuple[float, float]]:
    """The curve, from the accuracy without an attack on."""
    points = run.robustness[attack]
    clean = [] if run.accuracy is None or any(x == 0 for x, _ in points) else [(0.0, run.accuracy)]
    return [*clean, *points]
