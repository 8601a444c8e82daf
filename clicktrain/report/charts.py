"""Charts as inline SVG: lines over epochs, bars per epoch, points, and lanes of stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from clicktrain.report.stages import StageBand
from clicktrain.report.svg import Scale, around, coordinate, element, picture, polyline, tick_text, ticks

WIDTH, HEIGHT = 340.0, 216.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 38.0, 12.0, 20.0, 34.0
_MOST_TOOLTIPS = 200
_CHARACTER = 6.2  # pixels of a character of a label, roughly


@dataclass(frozen=True, slots=True)
class Key:
    """An entry of a chart's key: a line, or an area."""

    label: str
    css: str
    dashed: bool = False
    area: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """What a template shows as ``<figure>``."""

    title: str
    drawn: Markup
    caption: str
    keys: tuple[Key, ...] = ()
    keys_below: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """A line: points (epoch, value), the class that gives its color, and ``dashed`` or not."""

    label: str
    points: Sequence[tuple[float, float]]
    css: str
    dashed: bool = False
    bold: bool = True


@dataclass(frozen=True, slots=True)
class Frame:
    """The plotting area."""

    x: Scale
    y: Scale

    @classmethod
    def of(cls, x_range: tuple[float, float], y_range: tuple[float, float]) -> Frame:
        """Frame of a chart of the usual size, with room for the numbers on its left."""
        left = max(_LEFT, 12 + _CHARACTER * max(len(tick_text(value)) for value in ticks(*y_range)))
        return cls(Scale(*x_range, left, WIDTH - _RIGHT), Scale(*y_range, HEIGHT - _BOTTOM, _TOP))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        return self.x.begin, self.y.end, self.x.end, self.y.begin

    def across(self, height: float, css: str = "reference") -> Markup:
        """A line over the whole width."""
        y = self.y(height)
        return element("line", x1=self.x.begin, x2=self.x.end, y1=y, y2=y, class_=css)

    def upright(self, place: float, css: str, *title: Markup) -> Markup:
        """A line over the whole height."""
        x = self.x(place)
        return element("line", *title, x1=x, x2=x, y1=self.y.end, y2=self.y.begin, class_=css)


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    epochs: tuple[float, float],
    bands: Sequence[StageBand] = (),
    y_range: tuple[float, float] | None = None,
    zero: bool = False,
    top: float | None = None,
    x_name: str = "epoch",
    reference: float | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> Markup:
    """Lines over epochs, with the stages as colored bands behind them.

    There is at least one point in all; screen readers say ``label``. The vertical axis has ``y_range``, or
    round numbers around the values: from zero if asked for, up to at most ``top`` (100 for percents).
    ``reference`` is the height of a dashed line; ``marks`` are upright ones, (place, text when pointed at).
    """
    values = [y for one in series for _, y in one.points] + ([] if reference is None else [reference])
    frame = Frame.of(epochs, y_range or around(values, zero=zero, top=top))
    parts = [*_bands(bands, frame), *_axes(frame, x_name)]
    if reference is not None:
        parts.append(frame.across(reference))
    for one in series:
        parts += _line(one, frame)
    parts += _tooltips(series, frame, x_name)
    parts += [frame.upright(place, "reference", element("title", text)) for place, text in marks]
    return picture(WIDTH, HEIGHT, label, parts)


def line_figure(
    title: str, series: Sequence[Series], caption: str, keys: tuple[Key, ...] | None = None, **options: Any
) -> Figure | None:
    """A `line_chart` as a figure, None without points; several series are its key, unless it has another."""
    drawn = [one for one in series if one.points]
    if keys is None:
        keys = tuple(Key(s.label, s.css, dashed=s.dashed) for s in drawn) if len(series) > 1 else ()
    return Figure(title, line_chart(drawn, **options), caption, keys) if drawn else None


def _bands(bands: Sequence[StageBand], frame: Frame) -> list[Markup]:
    _, top, _, bottom = frame.box
    parts, free = [], 0.0
    for band in bands:
        x, end = frame.x(band.begin), frame.x(band.end)
        text = f"stage {band.mark}, {band.title}: epochs {band.begin:.2f} to {band.end:.2f}"
        area = {"x": x, "width": end - x, "class_": f"band {band.css}"}
        parts.append(element("rect", element("title", text), y=top, height=bottom - top, **area))
        edge = {**area, "class_": f"band-edge {band.css}"}
        parts.append(element("rect", y=top - 3, height=3.0, **edge))
        middle = (x + end) / 2
        if middle >= free:  # numbers of very short stages would run into each other
            parts.append(element("text", band.mark, x=middle, y=top - 7, class_="band-mark"))
            free = middle + 9
    return parts


def _axes(frame: Frame, x_name: str, heights: Sequence[tuple[float, str]] | None = None) -> list[Markup]:
    """Both axes; ``heights`` are marks (value, text) other than round numbers."""
    parts = []
    for value, text in heights or [(v, tick_text(v)) for v in ticks(frame.y.low, frame.y.high)]:
        parts.append(frame.across(value, "grid"))
        parts.append(element("text", text, x=frame.x.begin - 6, y=frame.y(value) + 4, class_="tick y"))
    return [*parts, *_x_axis(frame, x_name, HEIGHT)]


def _x_axis(frame: Frame, name: str, height: float) -> list[Markup]:
    """The horizontal axis of a picture that is ``height`` pixels high."""
    left, _, right, bottom = frame.box
    parts = []
    for value in ticks(frame.x.low, frame.x.high, 6, whole=True):
        x = frame.x(value)
        parts.append(element("line", x1=x, x2=x, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(element("text", tick_text(value), x=x, y=bottom + 16, class_="tick x"))
    parts.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(element("text", name, x=right, y=height - 3, class_="axis-name"))
    return parts


def log_line_chart(
    series: Sequence[Series],
    *,
    label: str,
    epochs: tuple[float, float],
    floor: float,
    reference: float | None,
    marks: Sequence[float],
) -> Markup:
    """Many fine lines over epochs, heights by their logarithm; pointing at one shows its label.

    As `line_chart`; a dot is the end of a line that is not bold, and ``marks`` are places of dotted lines.
    What is below ``floor``, and zero, lies on the bottom line, which is marked 0.
    """
    low = math.floor(math.log10(floor))
    highest = max(y for one in series for _, y in one.points)
    high = math.ceil(math.log10(max(highest, reference or 0.0, 10.0 ** (low + 1))))
    frame = Frame.of(epochs, (float(low), float(high)))
    names = [(float(n), f"{10.0**n:g}" if n > -3 else f"1e{n}") for n in range(low + 1, high + 1)]
    parts = _axes(frame, "epoch", [(float(low), "0"), *names])
    parts += [frame.upright(place, "dotted") for place in marks]
    for one in series:
        pixels = [(frame.x(x), frame.y(math.log10(max(y, 10.0**low)))) for x, y in one.points]
        title = element("title", one.label)
        parts.append(element("path", title, d=polyline(pixels), class_=f"line hair {one.css}"))
        if not one.bold:
            x, y = pixels[-1]
            parts.append(element("circle", cx=x, cy=y, r=2.2, class_=f"dot {one.css}"))
    if reference is not None:
        parts.append(frame.across(math.log10(reference)))
    return picture(WIDTH, HEIGHT, label, parts)


def _line(one: Series, frame: Frame) -> list[Markup]:
    if not one.points:
        return []
    pixels = [(frame.x(x), frame.y(y)) for x, y in one.points]
    css = f"line {one.css}{' dashed' if one.dashed else ''}{'' if one.bold else ' thin'}"
    x, y = pixels[-1]
    return [
        element("path", d=polyline(pixels), class_=css),
        element("circle", cx=x, cy=y, r=3.0 if one.bold else 2.2, class_=f"dot {one.css}"),
    ]


def _tooltips(series: Sequence[Series], frame: Frame, x_name: str) -> list[Markup]:
    """Invisible columns that show the values of an epoch on hover."""
    at: dict[float, list[str]] = {}
    for one in series:
        for x, y in one.points:
            at.setdefault(x, []).append(f"{one.label}: {y:.4g}")
    if len(at) > _MOST_TOOLTIPS:
        return []
    left, top, right, bottom = frame.box
    half = (right - left) / max(len(at), 1) / 2
    parts = []
    for x, lines in sorted(at.items()):
        title = element("title", "\n".join([f"{x_name} {coordinate(x)}", *lines]))
        size = {"width": 2 * half, "y": top, "height": bottom - top}
        parts.append(element("rect", title, x=frame.x(x) - half, **size, class_="tip"))
    return parts


def bar_chart(
    parts: Sequence[Series],
    *,
    label: str,
    last_epoch: float,
    bands: Sequence[StageBand] = (),
    reference: float | None = None,
    x_name: str = "epoch",
) -> Markup:
    """Stacked steps, one per epoch (that of epoch e spans e-1..e); ``reference`` is a dashed line."""
    stacks: dict[float, float] = {}
    for part in parts:
        for x, y in part.points:
            stacks[x] = stacks.get(x, 0.0) + y
    highest = max([*stacks.values(), reference or 0.0])
    frame = Frame.of((0.0, max(last_epoch, 1e-9)), around([0.0, highest], zero=True))
    drawn = [*_bands(bands, frame), *_axes(frame, x_name)]
    base = dict.fromkeys(stacks, 0.0)
    for part in parts:
        upper: list[tuple[float, float]] = []
        lower: list[tuple[float, float]] = []
        for x, y in part.points:
            begin, end = frame.x(x - 1), frame.x(x)
            lower += [(begin, frame.y(base[x])), (end, frame.y(base[x]))]
            base[x] += y
            upper += [(begin, frame.y(base[x])), (end, frame.y(base[x]))]
        drawn.append(element("path", d=polyline([*upper, *reversed(lower)]) + "z", class_=f"bar {part.css}"))
        drawn.append(element("path", d=polyline(upper), class_=f"line thin {part.css}"))
    if reference is not None:
        drawn.append(frame.across(reference))
    return picture(WIDTH, HEIGHT, label, [*drawn, *_tooltips(parts, frame, x_name)])


@dataclass(frozen=True, slots=True)
class Point:
    """A run in the trade-off picture."""

    label: str
    x: float
    y: float
    css: str


def trade_off_chart(
    points: Sequence[Point],
    *,
    label: str,
    reference: float | None,
    x_name: str,
) -> Markup:
    """Accuracy over compression, or over a cost; ``reference`` is the dense accuracy, a dashed line."""
    heights = [p.y for p in points] + ([reference] if reference is not None else [])
    low, high = around(heights, top=100.0)
    _, furthest = around([p.x for p in points], zero=True)
    frame = Frame.of((0.0, furthest), (low, high))
    parts = _axes(frame, x_name)
    left, top, right, bottom = frame.box
    line = -100.0
    if reference is not None:
        line = frame.y(reference)
        parts.append(frame.across(reference))
    taken = [(frame.x(p.x), 6.0, frame.y(p.y) + 5) for p in points]
    for point in sorted(points, key=lambda p: (-p.y, p.x)):
        x, y, title = frame.x(point.x), frame.y(point.y), element("title", point.label)
        parts.append(element("circle", title, cx=x, cy=y, r=5.0, class_=f"dot {point.css}"))
        text = point.label if len(point.label) <= 24 else point.label[:23] + "…"
        half = _CHARACTER * len(text) / 2
        middle = min(max(x, left + half), right - half)
        name_y = _free_height(y - 10, middle, half, taken, (top, bottom, line))
        taken.append((middle, half, name_y))
        parts.append(element("text", text, x=middle, y=name_y, class_="name middle"))
    return picture(WIDTH, HEIGHT, label, parts)


def _free_height(
    y: float,
    x: float,
    half: float,
    taken: Sequence[tuple[float, float, float]],
    bounds: tuple[float, float, float],
) -> float:
    """The height nearest to ``y`` at which a name around ``x`` runs into nothing.

    ``taken`` holds (middle, half a width, height) of points and names that are there, ``bounds`` the top and
    bottom of the plot and the height of the dense line.
    """
    top, bottom, line = bounds
    for i in range(80):
        here = y + (i + 1) // 2 * (3.0 if i % 2 else -3.0)
        clear = all(abs(here - ty) >= 12 or abs(x - tx) > half + th + 4 for tx, th, ty in taken)
        if top - 10 < here < bottom and clear and not here - 10 < line < here + 3:
            return here
    return y


def lane_chart(
    lanes: Sequence[tuple[str, str, Sequence[StageBand]]], *, label: str, last_epoch: float
) -> Markup:
    """When each run was in which stage: one row per run, given as (name, color class, bands)."""
    step = min(44.0, (HEIGHT - _TOP - _BOTTOM) / max(len(lanes), 1))
    height = _TOP + step * len(lanes) + _BOTTOM
    x = Scale(0.0, max(last_epoch, 1e-9), 12.0, WIDTH - _RIGHT)
    frame = Frame(x, Scale(0.0, 1.0, height - _BOTTOM, _TOP - 8))
    parts = []
    for i, (name, css, bands) in enumerate(lanes):
        y = _TOP - 4 + i * step
        parts.append(element("circle", cx=17.0, cy=y + 5, r=4.0, class_=f"dot {css}"))
        parts.append(element("text", name[:44], x=26.0, y=y + 9, class_="name"))
        for band in bands:
            begin, end = x(band.begin), x(band.end)
            title = element("title", f"{name}: {band.title}, epochs {band.begin:.2f} to {band.end:.2f}")
            size = {"x": begin, "y": y + 14, "width": end - begin, "height": max(step - 22, 4.0)}
            parts.append(element("rect", title, class_=f"lane {band.css}", **size))
    return picture(WIDTH, height, label, [*parts, *_x_axis(frame, "epoch", height)])
