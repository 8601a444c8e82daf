"""Accuracy over a cost as inline SVG: the frontier of the dense points, and the pruned ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from clicktrain.bench.frontier.points import ROOM, Point, advantage, frontier
from clicktrain.report.charts import HEIGHT, WIDTH, Figure, Frame, Key
from clicktrain.report.svg import around, element, picture, polyline, tick_text, ticks
from clicktrain.wording import MISSING, fixed, quantity, short_duration

_DOT, _SMALL = 4.4, 3.0
COLORS = 8
"""Colors of settings in the page's style."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A cost that accuracy is drawn over: a field of `Point`, its name on the axis, and its unit."""

    field: str
    title: str
    axis: str
    unit: str

    def text(self, value: float | None) -> str:
        """A value in words."""
        if value is None:
            return MISSING
        return short_duration(value) if self.unit == "s" else quantity(value, self.unit)


COSTS = (
    Cost("train_seconds", "Accuracy over training time", "training time, s", "s"),
    Cost("latency_ms_b64", "Accuracy over inference, 64 images", "latency, ms", "ms"),
    Cost("latency_ms_b1", "Accuracy over inference, 1 image", "latency, ms", "ms"),
    Cost("train_flops", "Accuracy over training FLOPs", "training FLOPs", "FLOPs"),
    Cost("inference_flops", "Accuracy over inference FLOPs", "FLOPs per image", "FLOPs"),
    Cost("bytes", "Accuracy over size", "bytes of the weights' file", "B"),
)


def difference(value: float | None) -> str:
    """Percentage points with a sign and two digits."""
    text = fixed(value, 2)
    return f"+{text}" if value is not None and round(value, 2) > 0 else text


def colors_of(points: Sequence[Point]) -> dict[str, str]:
    """Setting -> class that gives its color; dense ones have their own."""
    settings = list(dict.fromkeys(point.setting for point in points if point.kind == "pruned"))
    return {setting: f"run-c{number % COLORS + 1}" for number, setting in enumerate(settings)}


def cost_figure(points: Sequence[Point], cost: Cost, colors: Mapping[str, str]) -> Figure | None:
    """A chart of all points of which the cost is known, None if there are none.

    The horizontal axis is logarithmic. A dashed line leads from a pruned point to the dense one that it is
    compared with by this cost alone.
    """
    shown = [p for p in points if p.accuracy_mean is not None and getattr(p, cost.field)]
    if not shown:
        return None
    dense = [p for p in shown if p.kind == "dense"]
    pruned = [p for p in shown if p.kind == "pruned"]
    xs = [math.log10(getattr(p, cost.field)) for p in shown]
    ends = [(p.accuracy_mean or 0.0) + side * (p.accuracy_std or 0.0) for p in shown for side in (-1, 1)]
    room = max(0.04 * (max(xs) - min(xs)), 0.02)
    frame = Frame.of((min(xs) - room, max(xs) + room), around(ends, top=100.0))

    def place(point: Point) -> tuple[float, float]:
        return frame.x(math.log10(getattr(point, cost.field))), frame.y(point.accuracy_mean or 0.0)

    parts = _axes(frame, cost)
    best = frontier(dense, cost.field)
    if best:
        right = frame.x.end
        line = [place(p) for p in best]
        parts.append(element("path", d=polyline(line), class_="line run-dense"))
        parts.append(
            element("path", d=polyline([line[-1], (right, line[-1][1])]), class_="line thin dashed run-dense")
        )
    by_name = {p.name: p for p in dense}
    for point in pruned:
        other = advantage(point, dense, (cost.field,)).dense
        if other is not None:
            parts.append(
                element(
                    "path",
                    d=polyline([place(point), place(by_name[other])]),
                    class_=f"line hair dashed {colors[point.setting]}",
                )
            )
    for point in (*dense, *pruned):
        x, y = place(point)
        css = "run-dense" if point.kind == "dense" else colors[point.setting]
        spread = point.accuracy_std or 0.0
        if spread:
            top, bottom = (frame.y((point.accuracy_mean or 0.0) + side * spread) for side in (1, -1))
            parts.append(element("path", d=polyline([(x, top), (x, bottom)]), class_=f"line hair {css}"))
        on = point in best or point.kind == "pruned"
        title = element("title", _tooltip(point, dense, cost))
        parts.append(element("circle", title, cx=x, cy=y, r=_DOT if on else _SMALL, class_=f"dot {css}"))
    used = [setting for setting in colors if any(p.setting == setting for p in pruned)]
    keys = (Key("dense", "run-dense"), *(Key(setting, colors[setting]) for setting in used))
    return Figure(cost.title, picture(WIDTH, HEIGHT, cost.title, parts), _caption(pruned, dense, cost), keys)


def _axes(frame: Frame, cost: Cost) -> list[Markup]:
    left, _, right, bottom = frame.box
    parts = []
    for value in ticks(frame.y.low, frame.y.high):
        parts.append(frame.across(value, "grid"))
        parts.append(element("text", tick_text(value), x=left - 6, y=frame.y(value) + 4, class_="tick y"))
    for value in round_numbers(10**frame.x.low, 10**frame.x.high):
        x = frame.x(math.log10(value))
        parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(element("text", _tick(value), x=x, y=bottom + 16, class_="tick x"))
    parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(element("text", cost.axis, x=right, y=HEIGHT - 3, class_="axis-name"))
    return parts


def round_numbers(low: float, high: float, most: int = 6) -> list[float]:
    """At most about ``most`` round numbers for a logarithmic axis, the finest steps that are few enough."""
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [f * 10.0**n for n in powers for f in factors if low <= f * 10.0**n <= high]
        if len(found) <= most:
            return found
    return found[:: -(-len(found) // most)]


def _tick(value: float) -> str:
    return quantity(value).replace(" ", "") if value >= 1000 else f"{value:.3g}"


def _tooltip(point: Point, dense: Sequence[Point], cost: Cost) -> str:
    spread = "" if point.accuracy_std is None else f" ± {point.accuracy_std:.2f}"
    text = f"{point.name}: {point.accuracy_mean:.2f}%{spread}, {cost.text(getattr(point, cost.field))}"
    if point.kind == "dense":
        return text
    better = advantage(point, dense, (cost.field,))
    if better.points is None:
        return f"{text}; no dense point is as cheap"
    return f"{text}; {difference(better.points)} points to {better.dense}"


def _caption(pruned: Sequence[Point], dense: Sequence[Point], cost: Cost) -> str:
    values = [advantage(point, dense, (cost.field,)).points for point in pruned]
    compared = [value for value in values if value is not None]
    if not compared:
        return "Each dot is a cell of the grid; the line joins the best dense ones."
    above = sum(value > 0 for value in compared)
    return (
        f"The line joins the best dense points. {above} of {len(compared)} pruned points are above the best "
        f"dense one of at most {ROOM:g} times their cost, by {difference(max(compared))} at most."
    )
