"""Numbers, sizes and durations as text."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

MISSING = "–"  # noqa: RUF001
"""Shown where there is no number."""

_SI = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def fixed(value: float | None, digits: int = 1) -> str:
    """``87.1``; a real minus sign."""
    if value is None:
        return MISSING
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", "−")  # noqa: RUF001


def percent(share: float | None, digits: int = 0) -> str:
    """0.41 -> ``41%``; shares that are neither 0 nor 1 are not rounded to them."""
    if share is None:
        return MISSING
    text = fixed(100 * share, digits)
    if 0 < share < 1 and float(fixed(100 * share, digits)) in (0.0, 100.0):
        return f"{100 * share:.2g}%" if share < 0.5 else f"{100 * share:.{digits + 2}f}%"
    return f"{text}%"


def points(value: float | None) -> str:
    """Difference in percentage points with its sign: ``+0.3``."""
    if value is None:
        return MISSING
    text = fixed(value, 1)
    return f"+{text}" if float(f"{value:.1f}") > 0 else text


def times(ratio: float | None) -> str:
    """8.03 -> ``8.0×``."""
    return MISSING if ratio is None else f"{ratio:.1f}×" if ratio < 99.95 else f"{ratio:.0f}×"  # noqa: RUF001


def quantity(value: float | None, unit: str = "") -> str:
    """81.3e6, ``FLOPs`` -> ``81.3 MFLOPs``; three digits."""
    if value is None:
        return MISSING
    for size, prefix in _SI:
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)} {prefix}{unit}".rstrip()
    return f"{_three_digits(value)} {unit}".rstrip()


def _three_digits(value: float) -> str:
    if value == int(value) and abs(value) < 1000:
        return f"{int(value)}"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"


def integer(value: float | None) -> str:
    """272474 -> ``272,474``."""
    return MISSING if value is None else f"{round(value):,}"


def file_size(size: float | None) -> str:
    """Bytes as ``1.1 MB`` (10^6)."""
    return quantity(size, "B")


def duration(seconds: float | None) -> str:
    """Wall clock: ``42.1 s``, ``8 min 03 s``, ``2 h 05 min``."""
    if seconds is None:
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def short_duration(seconds: float) -> str:
    """Wall clock in one number: ``42.1 s``, ``8.1 min``, ``2.1 h``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 59.95 else f"{minutes / 60:.1f} h"


def shape(values: object) -> str:
    """[64, 32, 3, 3] -> ``64×32×3×3``."""
    return "×".join(str(v) for v in values) if isinstance(values, list | tuple) else MISSING  # noqa: RUF001


def epoch(value: float | None) -> str:
    """18.0 -> ``18``, 18.25 -> ``18.25``."""
    return MISSING if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def saved(ratio: float, what: str) -> str:
    """0.59, ``training FLOPs`` -> ``41% of training FLOPs saved``."""
    if abs(1 - ratio) < 0.005:
        return f"as many {what} as dense"
    return f"{percent(1 - ratio)} of {what} saved" if ratio < 1 else f"{percent(ratio - 1)} more {what}"


def setting(value: object) -> str:
    """A value of config.yaml as it is written there; 8.0 and 8 are the same."""
    if value is None:
        return MISSING
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def sentence_list(items: list[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def clock(seconds: float | None) -> str:
    """h:mm:ss, or -:--:-- while unknown."""
    if seconds is None:
        return "-:--:--"
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def short(number: float, space: str = "") -> str:
    """1234567 as 1.23M, with ``space`` before the letter."""
    for size, letter in _SI:
        if number >= size:
            return f"{number / size:.3g}{space}{letter}"
    return f"{number:.0f}{space}"


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a text table, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def html_text(text: object) -> str:
    """Text inside HTML."""
    return html.escape(str(text))


def html_table(rows: Sequence[Sequence[object]]) -> str:
    """A table for notebooks, whose own style it takes; the first row is its head."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    head, *body = rows
    lines = "".join(line(cells, "td") for cells in body)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{lines}</tbody></table>"
