"""Small pieces of inline SVG. Every text and attribute is escaped; colors come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


def element(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element; ``_`` in attribute names is written ``-`` (``class_``: ``class``), None leaves one out."""
    parts = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _plain(value))
        for key, value in attributes.items()
        if value is not None
    ]
    start = Markup("").join([Markup("<" + name), *parts])
    if not children:
        return start + Markup("/>")
    return start + Markup(">") + Markup("").join(map(escape, children)) + Markup(f"</{name}>")


def _plain(value: object) -> str:
    return coordinate(value) if isinstance(value, float) else str(value)


def coordinate(value: float) -> str:
    """Two decimals at most."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def picture(
    width: float, height: float, label: str, children: Iterable[Markup], css: str = "chart"
) -> Markup:
    """The ``<svg>`` element: scales with its container, and has a name for those who cannot see it."""
    return element(
        "svg",
        *children,
        class_=css,
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        role="img",
        aria_label=label,
        xmlns=None,
    )


def polyline(points: Sequence[tuple[float, float]]) -> str:
    """Path data through points."""
    return "M" + "L".join(f"{coordinate(x)} {coordinate(y)}" for x, y in points) if points else ""


@dataclass(frozen=True, slots=True)
class Scale:
    """Linear map of data ``low..high`` onto pixels ``begin..end``."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        span = self.high - self.low or 1.0
        return self.begin + (value - self.low) / span * (self.end - self.begin)


def ticks(low: float, high: float, most: int = 5, *, whole: bool = False) -> list[float]:
    """Round numbers in ``low..high``: steps of 1, 2, 2.5 or 5 times a power of ten; ``whole``: integers."""
    if not high > low:
        return [low]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    steps = [power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9)]
    step = next(s for s in [*steps, 1.0] if not whole or s == int(s))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def around(values: Sequence[float], *, zero: bool = False, top: float | None = None) -> tuple[float, float]:
    """A range of round numbers that holds all values; optionally from zero, or up to at most ``top``."""
    low, high = min(values), max(values)
    low = 0.0 if zero and low >= 0 else low
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-6):  # all the same
        low, high = (0.0, high if high > 1e-12 else 1.0) if zero and low >= 0 else (low - 1, high + 1)
    marks = ticks(low, high)
    step = marks[1] - marks[0] if len(marks) > 1 else high - low
    low = math.floor(low / step + 1e-9) * step
    high = math.ceil(high / step - 1e-9) * step
    return low, high if top is None else min(high, max(top, max(values)))


def tick_text(value: float) -> str:
    """A tick's number, without needless digits."""
    return f"{value:,.10g}".replace("-", "−")  # noqa: RUF001
