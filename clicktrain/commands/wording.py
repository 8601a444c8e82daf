"""Numbers as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def clock(seconds: float | None) -> str:
    """h:mm:ss, or -:--:-- while unknown."""
    if seconds is None:
        return "-:--:--"
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def short(number: float, space: str = "") -> str:
    """1234567 as 1.23M, with ``space`` before the letter."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{space}{letter}"
    return f"{number:.0f}{space}"


def training_share(summary: Mapping[str, Any], digits: int) -> str:
    """Training FLOPs of a run over dense training, and with those of the weights that it started from."""
    text = f"training FLOPs {100 * summary['train_flops_ratio']:.{digits}f}% of dense"
    earlier = summary.get("initial_train_flops", 0)
    if earlier is None:
        return f"{text}, its initial weights not counted"
    if earlier == 0:
        return text
    return f"{text}, {100 * summary['total_train_flops_ratio']:.{digits}f}% with its initial weights"


def asked_and_reached(summary: Mapping[str, Any]) -> str:
    """The compression of a run beside what was asked for."""
    asked = summary.get("compression_asked")
    sparsity = summary.get("sparsity_asked")
    if asked is not None:
        wish = f"compression asked {asked:g}x"
    elif sparsity is not None:
        wish = f"sparsity asked {100 * sparsity:g}% ({1 / (1 - sparsity):.3g}x)"
    elif any(target.get("asked") is not None for target in summary.get("outcome") or ()):
        wish = "compression not asked"
    else:
        wish = "no compression asked"
    return f"{wish}, reached {summary['compression_ratio']:.2f}x"
