"""The decisions of a run as typed events, JSON-able as in ``events.jsonl``. Free of torch.

A field that is `ABSENT` is left out of the JSON; None is written as null. Keys without a field are kept in
`Event.more`, so that a file of another version is read without loss.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

_KINDS: dict[str, type[Event]] = {}
E = TypeVar("E", bound="Event")


class _Absent(enum.Enum):
    ABSENT = "absent"

    def __bool__(self) -> bool:
        return False


ABSENT: Any = _Absent.ABSENT
"""Value of a field that an event does not have; false."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A decision. A subclass with a ``kind`` of its own is registered as it is defined.

    Attributes:
        kind: the value of the key ``event`` in JSON.
        step: batches observed before it (optimizer steps where the trainer decided).
        epoch: epochs done, with a fraction.
        more: keys without a field.
    """

    kind: ClassVar[str] = ""
    step: int = ABSENT
    epoch: float = ABSENT
    more: Mapping[str, Any] = field(default_factory=dict)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("kind"):
            _KINDS[cls.kind] = cls

    @property
    def name(self) -> str:
        """The value of the key ``event``."""
        return self.kind

    def at(self: E, step: int, epoch: float) -> E:
        """The event with a time, unless it has one."""
        return replace(self, step=step, epoch=epoch) if self.step is ABSENT else self

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values that begins with the key ``event``."""
        values = {name: getattr(self, name) for name in _keys(type(self))}
        present = {name: value for name, value in values.items() if value is not ABSENT}
        return {"event": self.name, **present, **self.more}


def from_json(values: Mapping[str, Any]) -> Event:
    """Inverse of `Event.to_json`; an unknown kind, or one without a key it needs, is an `OtherEvent`."""
    name = str(values.get("event"))
    rest = {key: value for key, value in values.items() if key != "event"}
    kind = _KINDS.get(name, OtherEvent)
    if kind is OtherEvent or not {own.name for own in fields(kind) if _is_needed(own)} <= rest.keys():
        times = {key: rest.pop(key) for key in ("step", "epoch") if key in rest}
        return OtherEvent(other=name, more=rest, **times)
    own = {key: rest.pop(key) for key in _keys(kind) if key in rest}
    return kind(**own, more=rest)


def _keys(kind: type[Event]) -> list[str]:
    return [own.name for own in fields(kind) if own.name not in ("more", "other")]


def _is_needed(own: Field[Any]) -> bool:
    return own.default is MISSING and own.default_factory is MISSING


@dataclass(frozen=True, kw_only=True)
class OtherEvent(Event):
    """An event of a kind that is not defined here."""

    other: str

    @property
    def name(self) -> str:
        """The value of the key ``event``."""
        return self.other


# ---- stages and triggers ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StageEvent(Event):
    """A method enters a stage; ``number`` counts from 1."""

    kind = "stage"
    stage: str
    number: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class IndicatorEvent(Event):
    """The early pruning indicator of an epoch (When to Prune?, Eq. 6), None while its window is not full."""

    kind = "epi"
    epi: float | None
    threshold: float
    window: int
    criterion: str
    structure: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class TriggerEvent(Event):
    """Pruning begins, and by which rule."""

    kind = "trigger"
    policy: str
    reason: str
    epi: float | None
    threshold: float
    prune_epoch: int


@dataclass(frozen=True, kw_only=True)
class SwitchEvent(Event):
    """Another method takes over."""

    kind = "switch"
    method: str
    reason: str


# ---- what is pruned -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _LatencyFields(Event):
    """What a latency target came to; milliseconds of one batch.

    ``latency_of`` is ``inference`` or ``step``, ``attempts`` the networks that were measured.
    """

    latency_batch: int = ABSENT
    latency_of: str = ABSENT
    latency_target_ms: float | None = ABSENT
    predicted_ms: float = ABSENT
    measured_ms: float | None = ABSENT
    dense_ms: float = ABSENT
    latency_ratio: float | None = ABSENT
    latency_error: float | None = ABSENT
    latency_met: bool | None = ABSENT
    attempts: int = ABSENT


@dataclass(frozen=True, kw_only=True)
class PoolEvent(Event):
    """The pattern pools: per kernel shape the patterns with their scores, and the number of candidates."""

    kind = "pool"
    pools: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FinalizedEvent(_LatencyFields):
    """Patterns and kernels are chosen; per layer the kernels of a filter, the density and pattern counts."""

    kind = "finalised"
    compression_asked: float | None
    compression_reached: float
    layers: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ThresholdEvent(Event):
    """Campfire's threshold has risen; ``sparsity`` is what it came to."""

    kind = "threshold"
    threshold: float
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class RegrownEvent(Event):
    """Dynamic sparse training has moved weights; ``threshold`` is that of the drop, where there is one."""

    kind = "regrown"
    dropped: int
    grown: int
    threshold: float = ABSENT


@dataclass(frozen=True, kw_only=True)
class HardPruneEvent(Event):
    """Masks are written for good; ``energy_outside`` is the share of the squared norm that was cut.

    ``compression_asked`` or ``sparsity_asked``, whichever the method has; ``layers`` with the sparsity of
    each layer, for a sparsity.
    """

    kind = "hard_prune"
    compression_asked: float | None = ABSENT
    sparsity_asked: float = ABSENT
    sparsity_reached: float = ABSENT
    compression_reached: float
    energy_outside: float
    layers: Sequence[Mapping[str, Any]] = ABSENT


@dataclass(frozen=True, kw_only=True)
class PrunedEvent(_LatencyFields):
    """One of several pruning steps has silenced neurons."""

    kind = "pruned"
    pruning_step: int
    neurons_pruned: int
    neurons: int


@dataclass(frozen=True, kw_only=True)
class PenaltyEvent(Event):
    """The coefficient of the group lasso, and the share of the loss that it was chosen for."""

    kind = "penalty"
    coefficient: float
    penalty_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class WidthsEvent(Event):
    """Which multiple of channels trains fastest, as measured: `clicktrain.latency.WidthChoice`."""

    kind = "widths"
    version: int
    chosen: int
    rows: Sequence[Mapping[str, Any]]
    images: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class ReconfiguredEvent(_LatencyFields):
    """Channels and layers were removed.

    The method fills in what it decided by, the pruner what came of it: ``seconds``, channels before and
    after, ``held`` (channels that stayed after all, and why), the removed layers, every layer's sizes and
    ``max_output_change``, None unless it was measured.
    """

    kind = "reconfigured"
    target: float = ABSENT
    share_left: float = ABSENT
    coefficient: float | None = ABSENT
    planning_seconds: float = ABSENT
    zeroed_channels: int = ABSENT
    round_to: int = ABSENT
    channels_without_rounding: int = ABSENT
    neurons: int = ABSENT
    neurons_pruned: int = ABSENT
    prune_ratio: float = ABSENT
    structure: Mapping[str, int] = ABSENT
    structure_from: str = ABSENT
    seconds: float = ABSENT
    channels_before: int = ABSENT
    channels_after: int = ABSENT
    held: Any = ABSENT
    layers_removed: Sequence[str] = ABSENT
    layers: Sequence[Mapping[str, Any]] = ABSENT
    max_output_change: float | None = ABSENT


@dataclass(frozen=True, kw_only=True)
class OutcomeEvent(Event):
    """The run is over: each target, what was reached, and why not more."""

    kind = "outcome"
    targets: Sequence[Mapping[str, Any]]


# ---- what the trainer decides -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BatchResizedEvent(Event):
    """The batch grows after channels were removed (PruneTrain 4.3); memory in bytes."""

    kind = "batch_resized"
    batch_size: int
    learning_rate_factor: float
    memory_estimated: int
    memory_budget: int


@dataclass(frozen=True, kw_only=True)
class OperatorsEvent(Event):
    """Which implementation each layer runs on after the hard prune, and by which rule."""

    kind = "operators"
    rule: str
    activations: str
    layers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class LogMendedEvent(Event):
    """A log was changed between a checkpoint and resumption; so many of its lines were kept."""

    kind = "log_mended"
    file: str
    lines_kept: int
