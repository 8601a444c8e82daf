"""A frontier as a page, a Markdown table and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clicktrain import wording
from clicktrain.bench.frontier.chart import COSTS, Cost, colors_of, cost_figure, difference
from clicktrain.bench.frontier.points import LIMITS, ROOM, Advantage, Point, advantage, missing_dense
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.report.page import Tile

_COSTS = {cost.field: cost for cost in COSTS}


@dataclass(frozen=True)
class FrontierData:
    """All that is shown.

    Attributes:
        times: what was measured, without its figures per network; None while nothing is timed.
        missing: runs of the recipe that have no line yet.
    """

    family: str
    points: tuple[Point, ...]
    times: Mapping[str, Any] | None
    missing: int = 0

    @property
    def dense(self) -> list[Point]:
        """The dense points."""
        return [point for point in self.points if point.kind == "dense"]

    @property
    def pruned(self) -> list[Point]:
        """The pruned points."""
        return [point for point in self.points if point.kind == "pruned"]

    @property
    def note(self) -> str | None:
        """Why no frontier can be claimed, or None."""
        return missing_dense(self.points)

    def compare(self, point: Point) -> dict[str, Advantage]:
        """A pruned point beside the dense ones, by each of `LIMITS`."""
        return {name: advantage(point, self.dense, costs) for name, costs in LIMITS.items()}


def to_json(data: FrontierData) -> dict[str, Any]:
    """The frontier as plain values; of a pruned point also its advantages, and over which dense points."""
    points = []
    for point in data.points:
        row = point.to_json()
        if point.kind == "pruned":
            for name, better in data.compare(point).items():
                row[name], row[f"{name}_over"] = better.points, better.dense
        points.append(row)
    machine = None if data.times is None else data.times["machine"]
    return {
        "family": data.family, "machine": machine, "room": ROOM, "note": data.note,
        "missing_runs": data.missing, "points": points,
    }  # fmt: skip


# ---- Markdown ------------------------------------------------------------------------------------

_HEADS = (
    "network", "seeds", "accuracy, %", "training", "latency, 64", "latency, 1", "training FLOPs",
    "inference FLOPs", "bytes", "equal time and latency", "equal time", "equal latency", "equal bytes",
)  # fmt: skip


def to_markdown(data: FrontierData) -> str:
    """A table of all points; the last columns are points above (+) the best dense network of equal cost."""
    lines = [f"| {' | '.join(_HEADS)} |", "|---" * len(_HEADS) + "|"]
    lines += [f"| {' | '.join(_cells(data, point))} |" for point in data.points]
    note = f"{data.note}\n\n" if data.note else ""
    return f"{note}{chr(10).join(lines)}\n\n{_where(data)}\n"


def _cells(data: FrontierData, point: Point) -> list[str]:
    costs = [cost.text(getattr(point, cost.field)) for cost in COSTS]
    better = [""] * 4
    if point.kind == "pruned":
        compared = data.compare(point)
        better = [
            _in_words(compared[name])
            for name in ("advantage", "advantage_time", "advantage_latency", "advantage_bytes")
        ]
    return [point.name, str(point.seeds), accuracy_text(point), *costs, *better]


def accuracy_text(point: Point) -> str:
    """``86.56 ± 0.12``, or why there is none."""
    if point.accuracy_mean is None:
        return point.reason or wording.MISSING
    spread = "" if point.accuracy_std is None else f" ± {point.accuracy_std:.2f}"
    return f"{point.accuracy_mean:.2f}{spread}"


def _in_words(better: Advantage) -> str:
    return wording.MISSING if better.points is None else f"{difference(better.points)} ({better.dense})"


def _where(data: FrontierData) -> str:
    kinds = sorted({point.accuracy_of for point in data.points if point.accuracy_of})
    what = f"Accuracy on {wording.sentence_list([f'{kind} images' for kind in kinds])}" if kinds else ""
    if data.times is None:
        return f"{what or 'No accuracy yet'}; nothing is timed yet."
    machine, settings = data.times["machine"], data.times["settings"]
    return (
        f"{what}; times on {machine['cpu']}, {machine['threads']} thread(s), torch "
        f"{machine['versions']['torch']}, medians of {settings['rounds']} rounds in one process"
        f"{'' if settings['alone'] else '; planning of operators is not counted'}."
    )


# ---- HTML ----------------------------------------------------------------------------------------


def to_html(data: FrontierData) -> str:
    """One self-contained page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("clicktrain.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    colors = colors_of(data.points)
    figures = [figure for cost in COSTS if (figure := cost_figure(data.points, cost, colors)) is not None]
    return environment.get_template("frontier.html.j2").render(
        w=wording,
        data=data,
        headline=_headline(data),
        tiles=_tiles(data),
        figures=figures,
        rows=[_row(data, point, colors) for point in data.points],
        where=_where(data),
        room=f"{ROOM:g}",
        engines=_engines(data),
        facts=_facts(data),
    )


def _best(data: FrontierData, name: str) -> tuple[Point, Advantage] | None:
    compared = [(point, data.compare(point)[name]) for point in data.pruned]
    known = [(point, better) for point, better in compared if better.points is not None]
    return max(known, key=lambda pair: pair[1].points or 0.0, default=None)


def _headline(data: FrontierData) -> str:
    best = None if data.note else _best(data, "advantage")
    if best is None or best[1].points is None:
        return f"{data.family}: accuracy against cost"
    point, better = best
    words = f"{abs(better.points or 0.0):.2f} points {'above' if (better.points or 0) > 0 else 'below'}"
    return f"{data.family}: {point.name} is {words} the best dense network of equal time and latency"


def _tiles(data: FrontierData) -> list[Tile]:
    tiles = []
    for name, title in (
        ("advantage", "equal time and latency"), ("advantage_time", "equal training time"),
        ("advantage_latency", "equal latency"), ("advantage_bytes", "equal bytes"),
    ):  # fmt: skip
        best = _best(data, name)
        if best is not None:
            tiles.append(Tile(difference(best[1].points), title, f"{best[0].name} over {best[1].dense}"))
    return tiles


def _row(data: FrontierData, point: Point, colors: Mapping[str, str]) -> dict[str, Any]:
    def text(field: str) -> str:
        cost: Cost = _COSTS[field]
        return cost.text(getattr(point, field))

    compared = data.compare(point) if point.kind == "pruned" else {}
    return {
        "point": point,
        "css": "run-dense" if point.kind == "dense" else colors[point.setting],
        "accuracy": accuracy_text(point),
        "holdout": wording.fixed(point.holdout_mean, 2),
        "costs": [text(cost.field) for cost in COSTS],
        "wall": wording.MISSING if point.train_seconds_wall is None
        else wording.short_duration(point.train_seconds_wall),
        "memory": wording.MISSING if point.train_memory_mb is None else f"{point.train_memory_mb:.0f} MB",
        "compression": wording.times(point.compression),
        "better": [
            (difference(compared[name].points), compared[name].dense, _tone(compared[name])) if compared
            else ("", None, "")
            for name in LIMITS
        ],
    }  # fmt: skip


def _tone(better: Advantage) -> str:
    return "" if better.points is None else "good" if better.points > 0 else "bad"


def _engines(data: FrontierData) -> list[tuple[str, ...]]:
    """Rows of the table of networks: name, engine and time of a step, of an evaluated batch, of inference."""
    if data.times is None:
        return []
    rows: list[tuple[str, ...]] = []
    for key, own in data.times["networks"].items():
        if "step_ms" in own:
            rows.append(
                (
                    key, own["engine"], f"{own['step_ms']:.1f}", f"{own['evaluate_ms']:.1f}",
                    f"{own['latency_ms_b64']:.2f} ({own['latency_engine_b64']})",
                    f"{own['latency_ms_b1']:.3f} ({own['latency_engine_b1']})",
                    f"{own['plan_seconds']:.1f}" if "plan_seconds" in own else "",
                )
            )  # fmt: skip
    return rows


def _facts(data: FrontierData) -> list[tuple[str, str]]:
    if data.times is None:
        return []
    machine = data.times["machine"]
    versions = [(f"version of {name}", value) for name, value in sorted(machine["versions"].items())]
    return [
        ("CPU", str(machine["cpu"])), ("threads", str(machine["threads"])),
        ("instructions", ", ".join(machine["isa"])), ("compiler", str(machine["compiler"])),
        ("timed for", wording.duration(data.times["seconds"])), *versions,
    ]  # fmt: skip


def write(path: Path, text: str) -> None:
    """Write a file whole; its folder is made. UserError where that is impossible."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def json_text(values: Mapping[str, Any] | Sequence[Any]) -> str:
    """JSON to be read and compared by people."""
    return json.dumps(values, indent=2) + "\n"
