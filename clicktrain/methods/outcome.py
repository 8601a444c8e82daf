"""Targets of a run and what it reached, with reasons: the table at the end of every run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.sparsity.masks import sparsity_of
from clicktrain.wording import html_table, table_lines

TOLERANCE = 0.05
"""A target is missed if the result differs from it by more than this share of it."""
NOTED = 0.01
"""A larger difference than this share gets a reason."""

FAR_OFF = "this network allows nothing closer"
"""In the summary of a plan whose target is known to be missed."""
MOST_WEIGHTS = 1.25
"""A sparsity is missed too where this many times the weights asked for are kept: near 1 shares hide that."""
_NOTHING = "nothing was asked for and nothing pruned"

Unit = Literal["share", "times", "ms", "s"]


@dataclass(frozen=True, slots=True)
class Target:
    """A target of a run.

    Attributes:
        what: in words, "sparsity of the pruned layers".
        asked: None where the method has no target.
        reached: None where it is not known.
        unit: share (0.6), times (8x), ms or s.
        reason: why it was not reached exactly, "" if nothing is known.
    """

    what: str
    asked: float | None
    reached: float | None
    unit: Unit = "share"
    reason: str = ""

    @property
    def missed(self) -> bool:
        """Whether the result differs from the target by more than 5% of it, to either side."""
        if self.asked is None:
            return False
        return self.reached is None or abs(self.reached - self.asked) > TOLERANCE * self.asked

    def sentence(self) -> str:
        """The target, the result and the reason, in a sentence."""
        why = f": {self.reason}" if self.reason else ""
        return (
            f"{self.what}: asked {in_unit(self.asked, self.unit)}, "
            f"reached {in_unit(self.reached, self.unit)}{why}"
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The table; ``str(outcome)`` prints it. ``targets`` is empty where nothing was asked, as of dense."""

    targets: tuple[Target, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each missed target."""
        return tuple(target.sentence() for target in self.targets if target.missed)

    def to_json(self) -> list[dict[str, Any]]:
        """One record per target, for events.jsonl and summary.json."""
        return [{**dataclasses.asdict(target), "missed": target.missed} for target in self.targets]

    @classmethod
    def from_json(cls, records: Sequence[Mapping[str, Any]]) -> Outcome:
        """Inverse of `to_json`."""
        names = [field.name for field in dataclasses.fields(Target)]
        return cls(tuple(Target(**{name: record[name] for name in names}) for record in records))

    def __str__(self) -> str:
        return "\n".join(table_lines(self._table)) if self.targets else _NOTHING

    def _repr_html_(self) -> str:
        return html_table(self._table) if self.targets else f"<p>{_NOTHING}</p>"

    @property
    def _table(self) -> list[tuple[str, ...]]:
        """The head and a row per target."""
        head = ("", "asked", "reached", "why not")
        rows = [
            (
                target.what,
                in_unit(target.asked, target.unit),
                in_unit(target.reached, target.unit) + (" (missed)" if target.missed else ""),
                target.reason,
            )
            for target in self.targets
        ]
        return [head, *rows]


@dataclass(frozen=True, slots=True, eq=False)
class Reached:
    """The result of a run, for `Method.targets_of`.

    Attributes:
        prunable: the layers that are left.
        conv_weights: convolution weights at first; ``conv_weights_now`` those of the channels that are left,
            ``conv_nonzero`` those that are not pruned either.
        masks: layer -> bool mask of its weight.
        events: all that was decided.
    """

    prunable: PrunableLayers
    conv_weights: int
    conv_weights_now: int
    conv_nonzero: int
    masks: Mapping[str, Tensor]
    events: Sequence[Mapping[str, Any]]

    def last_event(self, name: str, key: str) -> Mapping[str, Any]:
        """The last event of a name that has a key; an empty one if there is none."""
        return next((e for e in reversed(self.events) if e["event"] == name and key in e), {})


def planned_far_off(asked: float, planned: float) -> str:
    """The end of a plan's summary if its target, a sparsity or a compression, is missed; else nothing."""
    if abs(planned - asked) > TOLERANCE * asked:
        return f"; that is more than 5% from what was asked, and {FAR_OFF}"
    if asked < 1 and (1 - planned) > MOST_WEIGHTS * (1 - asked):
        factor = (1 - planned) / (1 - asked)
        return f"; that is {factor:.3g} times the weights that were to be kept, and {FAR_OFF}"
    return ""


def in_unit(value: float | None, unit: Unit) -> str:
    """60.0%, 8.00x, 3.2 ms or 75 s; a dash where there is no number."""
    if value is None:
        return "-"
    texts = {"share": f"{100 * value:.1f}%", "times": f"{value:.2f}x", "ms": f"{value:.3g} ms"}
    return f"{value:.4g} s" if unit == "s" else texts[unit]


def sparsity_target(asked: float, reached: Reached, reason: str) -> Target:
    """The target of a sparsity over the pruned layers."""
    share = sparsity_of(reached.masks) if reached.masks else 0.0
    reason = reason if abs(share - asked) > NOTED * asked else ""
    return Target("sparsity of the pruned layers", asked, share, "share", reason)


def check_latency_target(ratio: float | None, ms: float | None) -> None:
    """Raise UserError for a latency target that is out of range or given twice."""
    if ratio is not None and ms is not None:
        raise UserError("latency_target and latency_target_ms are both set: give one")
    if ratio is not None and not 0 < ratio < 1:
        raise UserError(
            f"latency_target is a share of the dense network's time, between 0 and 1, not {ratio}; "
            "milliseconds are latency_target_ms"
        )
    if ms is not None and not 0 < ms < math.inf:
        raise UserError(f"latency_target_ms must be above 0, not {ms}")


def latency_target(
    event: Mapping[str, Any], ratio: float | None, ms: float | None, what: str = "inference time"
) -> Target:
    """A latency target, as a share of the dense network's time or in milliseconds, and what was reached.

    ``event`` chose the pruned network, with ``latency_ratio``, ``measured_ms``, ``predicted_ms`` and
    ``dense_ms``, or is empty. ``what`` is the measured time, in words.
    """
    reason = "" if event else "the run ended before anything was chosen"
    measured, predicted, dense = (event.get(key) for key in ("measured_ms", "predicted_ms", "dense_ms"))
    if event and measured is None:
        reason = "predicted: nothing measured the pruned network"
    elif event and event.get("latency_met") is False:
        reason = "no choice of what is pruned came closer when it was measured"
    reached = predicted if measured is None else measured
    if ms is not None:
        return Target(f"{what} per batch", ms, reached, "ms", reason)
    share = event.get("latency_ratio")
    if share is None and reached is not None and dense:
        share = reached / dense
    return Target(f"{what} over dense", ratio, share, "share", reason)
