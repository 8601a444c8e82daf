"""Sentences of the command line about a run's summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
