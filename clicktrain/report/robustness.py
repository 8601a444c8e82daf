"""Accuracy over the strength of an attack, all runs that were attacked (Campfire section 3.2, Table 6)."""

from __future__ import annotations

from collections.abc import Sequence

from clicktrain.report import wording
from clicktrain.report.charts import Series, line_chart
from clicktrain.report.figure import Figure, Key
from clicktrain.report.run_data import Run

ATTACK_NAMES = {"fgsm": "FGSM", "pgd": "PGD"}


def robustness_figures(runs: Sequence[tuple[Run, str]]) -> list[Figure]:
    """One chart per attack that ``clicktrain evaluate --attack`` made.

    Args:
        runs: each with the class that gives its colour.
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
