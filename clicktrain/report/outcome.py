"""What was asked of a run, what it reached, and why not, from its summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clicktrain.report import wording
from clicktrain.report.run_data import number


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
    found = records if isinstance(records, list) else []
    return tuple(_row(record) for record in found if isinstance(record, Mapping))


def _row(record: Mapping[str, Any]) -> OutcomeRow:
    unit = str(record.get("unit"))
    return OutcomeRow(
        str(record.get("what")),
        _value(number(record, "asked"), unit),
        _value(number(record, "reached"), unit),
        str(record.get("reason") or ""),
        bool(record.get("missed")),
    )


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return wording.MISSING
    if unit == "times":
        return f"{value:.2f}×"  # noqa: RUF001
    return f"{value:.3g} ms" if unit == "ms" else wording.percent(value, 1)
