"""Runs side by side: baseline, headline, table and the curves over each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clicktrain import wording
from clicktrain.report.channels import flops_of_dense
from clicktrain.report.charts import Figure, Key, Point, Series, lane_chart, line_chart, trade_off_chart
from clicktrain.report.run_data import Run, number
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
        if (
            self.baseline is None
            or not self.run.finished
            or self.run.accuracy is None
            or self.baseline.accuracy is None
        ):
            return None
        return self.run.accuracy - self.baseline.accuracy


def entries(runs: Sequence[Run]) -> tuple[Entry, ...]:
    """Dense runs first; pruned runs with their baselines: same task, same seed and length if possible."""
    ordered = sorted(runs, key=lambda run: not run.is_dense)
    compared, color = [], 0
    for i, run in enumerate(ordered):
        if run.is_dense:
            css = "run-dense"
        else:
            color += 1
            css = f"run-c{(color - 1) % RUN_COLORS + 1}"
        compared.append(Entry(run, i + 1, css, _baseline(run, runs)))
    return tuple(compared)


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
    figures = [_trade_off(compared), *_cost_trade_offs(compared)]

    def curve(title: str, caption: str, key: str, *, since: float = 0.0, zero: bool = False) -> None:
        lines = _lines(compared, lambda run: [p for p in run.column(key) if p[0] >= since])
        if lines:
            label = f"{title} over epochs, all runs"
            drawn = line_chart(lines, label=label, epochs=(since, last), zero=zero, top=None if zero else 100)
            figures.append(Figure(title, drawn, caption, keys))

    curve("Validation accuracy, %", _accuracy_caption(compared), "val_accuracy")
    if last >= 9:
        late = float(round(last * 2 / 3))
        curve(
            "Validation accuracy, last third, %",
            "The same, where the ends are decided.",
            "val_accuracy",
            since=late,
        )
    curve("Training loss", "Mean loss of each epoch’s training batches.", "train_loss", zero=True)  # noqa: RUF001
    curve("Validation loss", "Mean cross-entropy on the validation split.", "val_loss", zero=True)
    sparse = _lines(compared, sparsity_steps)
    if any(y > 0 for line in sparse for _, y in line.points):
        caption = "Share of convolution weights that are zero; it jumps where weights are removed for good."
        drawn = line_chart(
            sparse, label="Sparsity over epochs, all runs", epochs=(0.0, last), y_range=(0, 100)
        )
        figures.append(Figure("Sparsity, %", drawn, caption, keys))
    figures += _cost_so_far(compared, last, keys)
    shrinking = _lines(compared, flops_of_dense)
    if any(y < 99.5 for line in shrinking for _, y in line.points):
        drawn = line_chart(shrinking, label="FLOPs per image, all runs", epochs=(0.0, last), zero=True)
        caption = "Of a training step on one image, in the network that each epoch trained."
        figures.append(Figure("FLOPs per image in training, % of dense", drawn, caption, keys))
    figures += robustness_figures([(e.run, e.css) for e in compared])
    curve("Time per epoch, s", "Training time, evaluation and checkpoints left out.", "seconds", zero=True)
    lanes = [(e.run.label, e.css, stage_bands(e.run)) for e in compared]
    if any(len(bands) > 1 for _, _, bands in lanes):
        drawn = lane_chart(lanes, label="Stages of each run over epochs", last_epoch=last)
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


def _trade_off(compared: Sequence[Entry]) -> Figure | None:
    shown = [e for e in compared if e.run.finished and e.run.compression and e.run.accuracy is not None]
    if len(shown) < 2:
        return None
    points = [Point(e.run.label, e.run.compression or 1.0, e.run.accuracy or 0.0, e.css) for e in shown]
    dense = [e.run.accuracy for e in shown if e.run.is_dense]
    reference = dense[0] if len(dense) == 1 else None
    caption = "Each point is a finished run: up is more accurate, right is smaller."
    if reference is not None:
        caption += " The dashed line is the dense run."
    drawn = trade_off_chart(points, label="Validation accuracy over compression ratio", reference=reference)
    return Figure("Accuracy, %, against compression", drawn, caption)


def _cost_trade_offs(compared: Sequence[Entry]) -> list[Figure]:
    """Accuracy over the FLOPs of training and of a prediction, as a sweep over penalty ratios draws them."""
    figures = []
    for what, key in (("training", "train_flops_ratio"), ("inference", "inference_flops_ratio")):
        shown = [
            (entry, ratio, accuracy)
            for entry in compared
            if entry.run.finished
            and (ratio := getattr(entry.run, key)) is not None
            and (accuracy := entry.run.accuracy) is not None
        ]
        if len({round(ratio, 3) for _, ratio, _ in shown}) < 2:
            continue
        points = [Point(e.run.label, 100 * ratio, accuracy, e.css) for e, ratio, accuracy in shown]
        dense = [accuracy for e, _, accuracy in shown if e.run.is_dense]
        drawn = trade_off_chart(
            points,
            label=f"Validation accuracy over {what} FLOPs",
            reference=dense[0] if len(dense) == 1 else None,
            x_name=f"{what} FLOPs, % of dense",
        )
        caption = "Each point is a finished run: up is more accurate, left is cheaper."
        figures.append(Figure(f"Accuracy, %, against {what} FLOPs", drawn, caption))
    return figures


def _accuracy_caption(compared: Sequence[Entry]) -> str:
    ends = [
        f"{e.run.label} at {wording.fixed(e.run.accuracy)}%" for e in compared if e.run.accuracy is not None
    ]
    shown = wording.sentence_list(ends) if len(ends) <= 4 else ""
    return f"The curves end with {shown}." if shown else "Top-1 accuracy on the validation split."


def _cost_so_far(compared: Sequence[Entry], last: float, keys: tuple[Key, ...]) -> list[Figure]:
    """Training FLOPs spent, relative to what a dense run of the same length spends in all."""

    def spent(run: Run) -> list[tuple[float, float]]:
        dense = run.column("train_flops_dense")
        if not dense or not dense[-1][1]:
            return []
        whole = dense[-1][1] / dense[-1][0] * max(run.epochs_asked, 1)
        return [(0.0, 0.0), *((epoch, 100 * value / whole) for epoch, value in run.column("train_flops"))]

    lines = _lines(compared, spent)
    if not lines:
        return []
    drawn = line_chart(lines, label="Training FLOPs spent, all runs", epochs=(0.0, last), zero=True)
    caption = (
        "Forward and backward passes so far; 100% is what dense training of the same length costs in all."
    )
    return [Figure("Training FLOPs spent, % of dense", drawn, caption, keys)]


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
    """Time of the run / time of its baseline, where both ran on the same device."""
    base = entry.baseline
    if base is None or not entry.run.finished or base.device != entry.run.device:
        return None
    mine, theirs = number(entry.run.summary, "train_seconds"), number(base.summary, "train_seconds")
    return mine / theirs if mine is not None and theirs else None


ATTACK_NAMES = {"fgsm": "FGSM", "pgd": "PGD"}


def robustness_figures(runs: Sequence[tuple[Run, str]]) -> list[Figure]:
    """One chart per attack that ``clicktrain evaluate --attack`` made.

    Args:
        runs: each with the class that gives its color.
    """
    attacks = list(dict.fromkeys(name for run, _ in runs for name in run.robustness))
    figures = []
    for attack in attacks:
        shown = [(run, css) for run, css in runs if attack in run.robustness]
        lines = [Series(run.label, _points(run, attack), css, dashed=run.is_dense) for run, css in shown]
        last = max(x for line in lines for x, _ in line.points)
        if last <= 0:
            continue
        name = ATTACK_NAMES.get(attack, attack)
        drawn = line_chart(
            lines,
            label=f"Accuracy under {name} over epsilon",
            epochs=(0.0, last),
            zero=True,
            top=100.0,
            x_name="epsilon",
        )
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
