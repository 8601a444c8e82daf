"""A page about the sensitivity of a network's layers, from the plain values that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from clicktrain import wording
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.report.charts import Figure, Series, line_figure
from clicktrain.report.page import Tile, template

SHOWN_LINES = 5
"""Layers with a line of their own: those that lose most."""
TOLERATED = 1.0
"""Points that a layer may cost."""


@dataclass(frozen=True, slots=True)
class Row:
    """A layer in the table; ``cells``: text, points lost, share of the largest loss."""

    name: str
    shape: str
    weights: str
    share: str
    now: str
    cells: tuple[tuple[str, str, float], ...]
    tolerates: str


def write_sensitivity(found: Mapping[str, Any], title: str, output: str | Path) -> Path:
    """Write one self-contained HTML page.

    Args:
        found: as `clicktrain.train.sensitivity.Sensitivity.to_json` gives it.
        title: what was measured, as the folder of the run.
        output: the file.

    Raises:
        UserError: it cannot be written.
    """
    target = Path(output)
    if target.is_dir():
        raise UserError(f"{target} is a folder: give the name of a file, as in {target / 'sensitivity.html'}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(target, render_sensitivity(found, title))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return target


def render_sensitivity(found: Mapping[str, Any], title: str) -> str:
    """The page as text."""
    layers: Sequence[Mapping[str, Any]] = found["layers"]
    worst = sorted(layers, key=lambda layer: -sum(layer["lost"]))
    highest = max([TOLERATED, *(lost for layer in layers for lost in layer["lost"])])
    total = sum(layer["weights"] for layer in layers)
    most, least = worst[:SHOWN_LINES], worst[SHOWN_LINES:][-SHOWN_LINES:]
    figures = [_curves(found, most, "most"), _curves(found, least, "least") if least else None]
    return template("sensitivity.html.j2").render(
        w=wording,
        title=title,
        found=found,
        headline=f"{worst[0]['name']} is the most sensitive of {len(layers)} layers",
        tiles=[
            Tile(f"{wording.fixed(found['accuracy'], 2)}%", "accuracy", "of the network as it is"),
            Tile(wording.integer(found["images"]), "images",
                 f"standard error of an accuracy: {wording.fixed(found['standard_error'], 2)} points"),
            Tile(worst[0]["name"], "most sensitive", "largest loss over all sparsities"),
            Tile(worst[-1]["name"], "least sensitive", "smallest loss over all sparsities"),
        ],
        figures=[figure for figure in figures if figure is not None],
        rows=[_row(found, layer, highest, total) for layer in layers],
        tolerated=TOLERATED,
        breakable=lambda name: Markup(".<wbr>").join(name.split(".")),
    )  # fmt: skip


def _curves(found: Mapping[str, Any], shown: Sequence[Mapping[str, Any]], which: str) -> Figure | None:
    """Lines of some layers; ``which``: those that lose most or least."""
    shares = [100 * share for share in found["sparsities"]]
    layers = found["layers"]
    means = [sum(layer["accuracies"][at] for layer in layers) / len(layers) for at in range(len(shares))]
    series = [
        Series(layer["name"], list(zip(shares, layer["accuracies"], strict=True)), f"run-c{number}")
        for number, layer in enumerate(shown, 1)
    ]
    series.append(
        Series("mean of all layers", list(zip(shares, means, strict=True)), "run-dense", dashed=True)
    )
    return line_figure(
        f"The layers that lose {which}, accuracy in %",
        series,
        "With one layer pruned, and the mean over all layers; dashed across: the network as it is.",
        label=f"Accuracy over the sparsity of a single layer, of those that lose {which}",
        epochs=(0.0, 100.0),
        y_range=(0.0, 100.0),
        x_name="sparsity of the layer, %",
        reference=found["accuracy"],
    )  # fmt: skip


def _row(found: Mapping[str, Any], layer: Mapping[str, Any], highest: float, total: int) -> Row:
    cells = tuple(
        (wording.fixed(accuracy, 1), wording.points(-lost), max(lost, 0.0) / highest)
        for accuracy, lost in zip(layer["accuracies"], layer["lost"], strict=True)
    )
    best = tolerates(found["sparsities"], layer["lost"])
    return Row(
        name=layer["name"],
        shape=wording.shape(layer["shape"]),
        weights=wording.integer(layer["weights"]),
        share=wording.percent(layer["weights"] / max(total, 1), 1),
        now=wording.percent(layer["sparsity"]),
        cells=cells,
        tolerates=wording.MISSING if best is None else wording.percent(best),
    )


def tolerates(sparsities: Sequence[float], lost: Sequence[float], points: float = TOLERATED) -> float | None:
    """The largest sparsity up to which no more than some points are lost; None if the smallest costs more."""
    best = None
    for share, one in zip(sparsities, lost, strict=True):
        if one > points:
            break
        best = share
    return best
