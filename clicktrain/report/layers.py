"""Per layer: what was kept, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clicktrain import wording
from clicktrain.report.patterns import decided_layers
from clicktrain.report.run_data import Run, kernel_density, number


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One line of the table of layers; densities are shares of 1, FLOPs are per image and forward pass."""

    name: str
    shape: tuple[int, ...]
    kernels: float | None
    weights: float
    per_filter: int | None
    flops: float | None
    flops_dense: float | None
    operator: str

    @property
    def pruned(self) -> bool:
        """Whether anything was removed."""
        return self.weights < 1

    @property
    def flops_share(self) -> float | None:
        """FLOPs left / dense FLOPs."""
        return self.flops / self.flops_dense if self.flops is not None and self.flops_dense else None


def layer_rows(run: Run) -> tuple[LayerRow, ...]:
    """All weighted layers of a finished run; of an unfinished one, those whose masks are decided."""
    decided = {str(layer.get("name")): layer for layer in decided_layers(run)}
    rows = []
    for layer in run.layers or tuple(decided.values()):
        name = str(layer.get("name"))
        shape = tuple(int(v) for v in layer.get("shape") or ())
        weights = number(layer, "density")
        weights = 1.0 if weights is None else weights
        kernels = number(decided.get(name), "kernels_per_filter")
        if len(shape) != 4:
            share = None
        elif weights >= 1:
            share = 1.0
        elif kernels is not None:
            share = kernels / shape[1]
        else:
            share = kernel_density(run.keep(name)) if name in run.weight_shapes else None
        per_filter = number(layer, "nnz_per_filter")
        kept = None if per_filter is None else int(per_filter)
        flops = number(layer, "forward_flops"), number(layer, "forward_flops_dense")
        rows.append(LayerRow(name, shape, share, weights, kept, *flops, str(layer.get("operator") or "")))
    return tuple(rows)


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """A row of the table."""

    what: str
    asked: str
    reached: str
    reason: str
    missed: bool

    @property
    def sentence(self) -> str:
        """The row in words."""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.what}: asked {self.asked}, reached {self.reached}{why}"


def outcome_rows(records: Any) -> tuple[OutcomeRow, ...]:
    """The rows of a list of targets, in summary.json or in an event; what is no target is left out."""
    targets = records if isinstance(records, list) else []
    return tuple(_row(record) for record in targets if isinstance(record, Mapping))


def _row(record: Mapping[str, Any]) -> OutcomeRow:
    unit = str(record.get("unit"))
    asked, reached = (_value(number(record, key), unit) for key in ("asked", "reached"))
    reason, missed = str(record.get("reason") or ""), bool(record.get("missed"))
    return OutcomeRow(str(record.get("what")), asked, reached, reason, missed)


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return wording.MISSING
    if unit == "times":
        return f"{value:.2f}×"  # noqa: RUF001
    if unit == "s":
        return wording.duration(value)
    return f"{value:.3g} ms" if unit == "ms" else wording.percent(value, 1)
