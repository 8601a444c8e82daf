"""The summary of a run as notebooks show it. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clicktrain.wording import (
    file_size,
    fixed,
    html_table,
    html_text,
    percent,
    quantity,
    shape,
    short_duration,
    times,
)


class RunSummary(dict[str, Any]):
    """summary.json: a plain dictionary, which a notebook shows as what was reached, layer by layer."""

    def _repr_html_(self) -> str:
        files = file_rows(self)
        return _figures(self) + _targets(self) + (html_table(files) if files else "") + _layers(self)


def file_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The network's files in a table: name, size, share of the dense network's file, and what is in it.

    The dense network's is the file with zeros in place, and what was removed in float32. No rows for a run
    that has not noted its files.
    """
    sizes = summary.get("file_bytes") or {}
    whole = sizes.get("model.safetensors")
    if not whole:
        return []
    removed = 4 * ((summary.get("dense_parameters") or 0) - (summary.get("parameters") or 0))
    dense = whole + max(removed, 0)
    rows = [
        (name, file_size(size), percent(size / dense), _FILES.get(name, "")) for name, size in sizes.items()
    ]
    return [("file", "size", "of dense", "what"), *rows]


_FILES = {
    "model.safetensors": "the network with zeros in place, as other tools have it",
    "packed.safetensors": "kept weights and their positions: clicktrain.load reads it alone",
}


def _figures(summary: Mapping[str, Any]) -> str:
    what = " on ".join(str(summary.get(key)) for key in ("method", "model", "data") if summary.get(key))
    accuracy, best = (fixed(summary.get(key), 2) for key in ("val_accuracy", "best_val_accuracy"))
    rows = [
        ("accuracy", f"{accuracy}% (best {best}%)"),
        ("compression", times(summary.get("compression_ratio"))),
        ("training FLOPs of dense", percent(summary.get("train_flops_ratio"))),
        ("inference FLOPs of dense", percent(summary.get("inference_flops_ratio"))),
        ("training time", short_duration(summary.get("train_seconds") or 0.0)),
    ]  # fmt: skip
    return html_table([("", what), *rows])


def _targets(summary: Mapping[str, Any]) -> str:
    rows = [
        [row["what"], _amount(row["asked"], row), _amount(row["reached"], row), row["reason"] or ""]
        for row in summary.get("outcome") or ()
    ]
    warnings = "".join(f"<p><b>{html_text(text)}</b></p>" for text in summary.get("warnings") or ())
    return (html_table([("asked for", "asked", "reached", "why not"), *rows]) if rows else "") + warnings


def _amount(value: float | None, row: Mapping[str, Any]) -> str:
    if row["unit"] == "share":
        return percent(value, 1)
    return times(value) if row["unit"] == "times" else quantity(value, row["unit"])


def _layers(summary: Mapping[str, Any]) -> str:
    rows = [
        [row["name"], shape(row["shape"]), percent(row["density"], 1), quantity(row["forward_flops"]),
         quantity(row["forward_flops_dense"])]
        for row in summary.get("layers") or ()
    ]  # fmt: skip
    return html_table([("layer", "shape", "density", "FLOPs", "dense FLOPs"), *rows]) if rows else ""
