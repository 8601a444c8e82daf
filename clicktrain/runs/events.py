"""The decisions of a run as typed events, JSON-able as in ``events.jsonl``. Free of torch.

A field that is `ABSENT` is left out of the JSON; None is written as null. Keys without a field are kept in
`Event.more`, so that a file of another version is read without loss.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

if sys.version_info >= (3, 11):
    from typing import dataclass_transform
else:

    def dataclass_transform(**options: Any) -> Any:
        """Only type checkers read it."""
        del options
        return lambda cls: cls


_KINDS: dict[str, type[Event]] = {}
E = TypeVar("E", bound="Event")


class _Absent(enum.Enum):
    ABSENT = "absent"

    def __bool__(self) -> bool:
        return False


ABSENT: Any = _Absent.ABSENT
"""Value of a field that an event does not have; false."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
@dataclass(frozen=True, kw_only=True)
class Event:
    """A decision. Subclasses are frozen dataclasses, ``class PoolEvent(Event, kind="pool")``.

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

    def __init_subclass__(cls, kind: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclass(frozen=True, kw_only=True)(cls)
        cls.kind = kind
        if kind:
            _KINDS[kind] = cls

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
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if not needed <= rest.keys():
        times = {key: rest.pop(key) for key in ("step", "epoch") if key in rest}
        return OtherEvent(other=name, more=rest, **times)
    own = {key: rest.pop(key) for key in _keys(kind) if key in rest}
    return kind(**own, more=rest)


def _keys(kind: type[Event]) -> list[str]:
    return [f.name for f in fields(kind) if f.name not in ("more", "other")]


class OtherEvent(Event):
    """An event of a kind that is not defined here."""

    other: str

    @property
    def name(self) -> str:
        """The value of the key ``event``."""
        return self.other


class StageEvent(Event, kind="stage"):
    """A method enters a stage; ``number`` counts from 1."""

    stage: str
    number: int
    reason: str


class IndicatorEvent(Event, kind="epi"):
    """The early pruning indicator of an epoch (When to Prune?, Eq. 6), None while its window is not full."""

    epi: float | None
    threshold: float
    window: int
    criterion: str
    structure: Mapping[str, int]


class TriggerEvent(Event, kind="trigger"):
    """Pruning begins, and by which rule."""

    policy: str
    reason: str
    epi: float | None
    threshold: float
    prune_epoch: float


class SwitchEvent(Event, kind="switch"):
    """Another method takes over."""

    method: str
    reason: str


class _LatencyFields(Event):
    """Result of a latency target; milliseconds of one batch, ``attempts`` networks measured."""

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


class PoolEvent(Event, kind="pool"):
    """The pattern pools: per kernel shape the patterns with their scores, and the number of candidates."""

    pools: Sequence[Mapping[str, Any]]


class FinalizedEvent(_LatencyFields, kind="finalised"):
    """Patterns and kernels are chosen; per layer the kernels of a filter, the density and pattern counts."""

    compression_asked: float | None
    compression_reached: float
    layers: Sequence[Mapping[str, Any]]


class ThresholdEvent(Event, kind="threshold"):
    """Campfire's threshold has risen; ``sparsity`` is what it came to."""

    threshold: float
    sparsity: float


class RegrownEvent(Event, kind="regrown"):
    """Dynamic sparse training has moved weights; ``threshold`` is that of the drop, where there is one.

    ``patterns_changed`` counts the kernels that stayed and have another pattern now, where they have any.
    """

    dropped: int
    grown: int
    threshold: float = ABSENT
    patterns_changed: int = ABSENT


class DroppedEvent(Event, kind="dropped"):
    """Gradual pruning has dropped weights, which do not grow back; ``sparsity`` is what it came to."""

    dropped: int
    sparsity: float


class AdmmEvent(Event, kind="admm"):
    """The auxiliary and dual variables of ADMM were updated, before its iteration number ``iteration`` of
    ``iterations``, for whose steps ``rho`` is.

    ``residual`` is ||W - Z|| / ||W||, how far weights still are from what they are pulled to, ``moved``
    how far that has moved, ||Z - Z before|| / ||W||: over all layers, root mean square over constraints.
    """

    iteration: int
    iterations: int
    rho: float
    residual: float
    moved: float


class HardPruneEvent(Event, kind="hard_prune"):
    """Masks are frozen; ``energy_outside`` is the share of the squared norm that was cut.

    A method asks for a compression or for a sparsity; ``layers`` has the sparsities of the latter.
    """

    compression_asked: float | None = ABSENT
    sparsity_asked: float = ABSENT
    sparsity_reached: float = ABSENT
    compression_reached: float
    energy_outside: float
    layers: Sequence[Mapping[str, Any]] = ABSENT


class PrunedEvent(_LatencyFields, kind="pruned"):
    """One of several pruning steps has silenced neurons."""

    pruning_step: int
    neurons_pruned: int
    neurons: int


class PenaltyEvent(Event, kind="penalty"):
    """The coefficient of the group lasso, and the share of the loss that it was chosen for."""

    coefficient: float
    penalty_ratio: float | None


class WidthsEvent(Event, kind="widths"):
    """Which multiple of channels trains fastest, as measured: `clicktrain.latency.WidthChoice`."""

    version: int
    chosen: int
    rows: Sequence[Mapping[str, Any]]
    images: int
    dtype: str


class ReconfiguredEvent(_LatencyFields, kind="reconfigured"):
    """Channels and layers were removed.

    The method fills in what it decided by; the pruner adds everything from ``seconds`` on: ``held`` are
    channels that stayed after all, and why; ``max_output_change`` is None unless it was measured.
    """

    target: float = ABSENT
    share_left: float = ABSENT
    coefficient: float | None = ABSENT
    planning_seconds: float = ABSENT
    zeroed_channels: int = ABSENT
    round_to: int = ABSENT
    channels_without_rounding: int = ABSENT
    neurons: int = ABSENT
    neurons_pruned: int = ABSENT
    filters: int = ABSENT
    filters_pruned: int = ABSENT
    prune_ratio: float = ABSENT
    structure: Mapping[str, int] = ABSENT
    structure_from: str = ABSENT
    seconds: float = ABSENT
    channels_before: int = ABSENT
    channels_after: int = ABSENT
    held: Mapping[str, str] = ABSENT
    layers_removed: Sequence[str] = ABSENT
    layers: Sequence[Mapping[str, Any]] = ABSENT
    max_output_change: float | None = ABSENT


class OutcomeEvent(Event, kind="outcome"):
    """The run is over: each target, what was reached, and why not more."""

    targets: Sequence[Mapping[str, Any]]


class BatchResizedEvent(Event, kind="batch_resized"):
    """The trainer's batch grows after channels were removed (PruneTrain 4.3); memory in bytes."""

    batch_size: int
    learning_rate_factor: float
    memory_estimated: int
    memory_budget: int


class OperatorsEvent(Event, kind="operators"):
    """Which implementation each layer runs on after the hard prune, and by which rule."""

    rule: str
    activations: str
    layers: Mapping[str, str]


class RestartEvent(Event, kind="learning_rate_restart"):
    """Masks are frozen and the second cycle of the learning rate begins, at ``height`` of its peak.

    ``planned_epoch`` is where the first cycle was to end, None if that was not known. ``damage`` is what rule
    ``norm`` or ``loss`` says, the latter from the mean loss of the same batches before and after.
    """

    height: float
    rule: str
    planned_epoch: float | None
    damage: float = ABSENT
    loss_before: float = ABSENT
    loss_after: float = ABSENT


class NormsEvent(Event, kind="norms_recalibrated"):
    """Batch norm statistics were measured again, over ``batches`` training batches."""

    batches: int
    images: int
    train_flops: int


class TimePlannedEvent(Event, kind="time_planned"):
    """How many epochs a time budget allows, from times measured before the run; all in seconds.

    ``times`` are those of a batch, an evaluation, a checkpoint, and once of choosing operators (``setup``),
    of the dense run (``dense``), of this one before masks are frozen (``before``) and after (``after``, None
    where that is not known to come).
    ``cut_epoch`` is when masks are frozen at the latest.
    """

    time_budget: float | str
    dense_epochs: int
    epochs: int
    seconds_asked: float
    seconds_planned: float
    planning_seconds: float
    cut_epoch: float | None
    times: Mapping[str, Mapping[str, float] | None]


class LogMendedEvent(Event, kind="log_mended"):
    """A log was changed between a checkpoint and resumption; ``lines_kept`` of its lines remain."""

    file: str
    lines_kept: int
