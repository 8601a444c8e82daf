"""Two methods in one run: PruneTrain removes channels, then ClickTrain prunes what is left by patterns.

The first part of the run is `PruneTrain` and ends with a reconfiguration; the rest is a run of `ClickTrain`
on the smaller network. Both are used unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.base import Action, Method, PruningPlan, Record, RunLength, StepInfo
from clicktrain.methods.clicktrain import ClickTrain, ClickTrainState
from clicktrain.methods.outcome import Reached, Target
from clicktrain.methods.patterns.settings import PatternChoices
from clicktrain.methods.prunetrain import ChannelSettings, PruneTrain, PruneTrainState
from clicktrain.runs.events import SwitchEvent
from clicktrain.settings import field_names
from clicktrain.sparsity.allocation import compression_limits
from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.surgery import SurgeryPlan

_LEAST_COMPRESSION = 1.005
"""The target for a network from which nothing more can be removed."""


@dataclass(slots=True)
class TwoPartState:
    """The states of both parts; ``second`` is None until it begins.

    ``seen`` and ``epochs`` are batches and epochs when it began; ``compression`` replaces its target where
    the remaining layers cannot reach what was asked for. ``prunable`` has the layers of the second part, and
    follows from the network.
    """

    first: PruneTrainState
    second: ClickTrainState | None = None
    switched: bool = False
    seen: int = 0
    epochs: int = 0
    compression: float | None = None
    prunable: PrunableLayers | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class ChannelsThenPatterns(ChannelSettings, PatternChoices, Method[TwoPartState]):
    """Remove channels, then prune patterns in what is left (both papers).

    Widths are rounded to a multiple of ``group``.
    """

    name: ClassVar[str] = "prunetrain-clicktrain"
    title: ClassVar[str] = "PruneTrain, then ClickTrain"
    dense_until_chosen: ClassVar[bool] = True
    reads_graph: ClassVar[bool] = True

    switch_at: float | None = None
    """Epoch at which channels are removed for the last time and ClickTrain begins; 40% of the run by
    default."""
    pattern_compression: float = 4.0
    """ClickTrain's compression of the convolution weights that the removal of channels leaves."""

    def __post_init__(self) -> None:
        """Check every setting, those of the parts by the parts themselves."""
        super().__post_init__()
        if self.switch_at is not None and not self.switch_at >= 1:
            raise UserError(f"switch_at is an epoch, 1 or later, not {self.switch_at}")
        if self.round_to == "auto" and self.group > 1:
            raise UserError(
                f"round_to is auto but filters go in groups of {self.group}: set round_to to a number"
            )
        _ = self.first, self.second

    @property
    def first(self) -> PruneTrain:
        """The part that removes channels."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in field_names(ChannelSettings)}
        if isinstance(self.round_to, int):
            settings["round_to"] = max(self.round_to, self.group)
        elif self.round_to != "auto" and self.group > 1:
            settings["round_to"] = self.group
        return PruneTrain(**settings)

    def first_of(self, length: RunLength) -> PruneTrain:
        """The part that removes channels; its target is to be met at the switch."""
        first = self.first
        return first if first.target is None else replace(first, target_at=float(self.switch_epoch(length)))

    @property
    def second(self) -> ClickTrain:
        """The part that chooses patterns."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in field_names(PatternChoices)}
        return ClickTrain(**settings, compression=self.pattern_compression)

    def second_of(self, state: TwoPartState) -> ClickTrain:
        """The part that chooses patterns; its target is what the smaller network can reach."""
        compression = state.compression
        return self.second if compression is None else replace(self.second, compression=compression)

    def _reachable(self, own: PrunableLayers) -> float | None:
        """The nearest compression that the smaller network can reach; None if that is what was asked for."""
        budgets = [target.budget for target in self.second.targets(own)]
        low, high = compression_limits(budgets, own.other_conv_weights)
        reachable = max(min(max(self.pattern_compression, low), high), _LEAST_COMPRESSION)
        return None if reachable == self.pattern_compression else reachable

    def _begin_second(self, state: TwoPartState, own: PrunableLayers, length: RunLength) -> ClickTrainState:
        state.compression = self._reachable(own)
        return self.second_of(state).init(own, length)

    @property
    def keeps_inputs(self) -> bool:
        """As the part that removes channels."""
        return self.first.keeps_inputs

    def switch_epoch(self, length: RunLength) -> int:
        """Finished epochs when ClickTrain begins."""
        return round(self.switch_at) if self.switch_at is not None else max(1, round(0.4 * length.epochs))

    def _rest(self, length: RunLength) -> RunLength:
        return RunLength(length.epochs - self.switch_epoch(length), length.steps_per_epoch)

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """The layers that may lose channels."""
        return self.first.find_prunable(model, trained)

    def init(self, prunable: PrunableLayers, length: RunLength) -> TwoPartState:
        """Check both parts, as far as the network is known."""
        if self.switch_at is None and length.epochs == 1:
            raise UserError(
                f"a run of 1 epoch is too short for {self.title}, which changes over between two: give "
                "more epochs"
            )
        if self.switch_epoch(length) >= length.epochs:
            raise UserError(
                f"switch_at is {self.switch_epoch(length)} but the run has {length.epochs} epochs: "
                "leave some to ClickTrain"
            )
        assert prunable.model is not None
        try:
            self.second.init(self.second.find_prunable(prunable.model), self._rest(length))
        except UserError as error:
            raise UserError(f"from epoch {self.switch_epoch(length)} on: {error}") from None
        return TwoPartState(self.first_of(length).init(prunable, length))

    def stage(self, state: TwoPartState) -> str:
        """PruneTrain's, then ClickTrain's."""
        return self.first.stage(state.first) if state.second is None else self.second.stage(state.second)

    def _own(self, state: TwoPartState, prunable: PrunableLayers) -> PrunableLayers:
        """The layers of the smaller network that ClickTrain may prune."""
        if state.prunable is None:
            assert prunable.model is not None
            state.prunable = self.second.find_prunable(prunable.model)
        return state.prunable

    def _own_step(self, state: TwoPartState, step: StepInfo) -> StepInfo:
        """The step as ClickTrain counts it."""
        return replace(
            step,
            seen=step.seen - state.seen,
            epoch_losses=step.epoch_losses[state.epochs :],
            length=RunLength(step.length.epochs - state.epochs, step.length.steps_per_epoch),
            epoch=step.epoch - state.epochs,
            position=step.position - state.epochs,
        )

    def before_step(self, state: TwoPartState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Call the active part; ClickTrain begins with the first step after the switch."""
        if not state.switched:
            self.first_of(step.length).before_step(state.first, prunable, step)
            return
        own = self._own(state, prunable)
        if state.second is None:
            state.seen, state.epochs = step.seen - step.batches, step.epoch
            state.second = self._begin_second(state, own, self._own_step(state, step).length)
            state.first.lasso.axes = None
        self.second_of(state).before_step(state.second, own, self._own_step(state, step))

    def after_step(self, state: TwoPartState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Call the active part; the last reconfiguration and the switch take place at the end of an epoch."""
        if state.second is not None:
            own = self._own(state, prunable)
            return self.second_of(state).after_step(state.second, own, self._own_step(state, step))
        if state.switched:
            return ()
        if step.ends_epoch and int(step.position) >= self.switch_epoch(step.length):
            state.switched = True
            done = int(step.position)
            event = SwitchEvent(method=self.second.name, reason=f"epoch {done} begins")
            return [*self.first.reconfigure_now(state.first, prunable, done, final=True), Record(event)]
        return self.first_of(step.length).after_step(state.first, prunable, step)

    def cut_epoch(self, state: TwoPartState, length: RunLength, *, latest: bool = False) -> float | None:
        """When ClickTrain freezes its masks."""
        second = state.second or ClickTrainState()
        own = self.second.cut_epoch(second, self._rest(length), latest=latest)
        return None if own is None else self.switch_epoch(length) + own

    def after_surgery(self, state: TwoPartState, plan: SurgeryPlan, prunable: PrunableLayers) -> None:
        """Shrink PruneTrain's state."""
        state.prunable = None
        self.first.after_surgery(state.first, plan, prunable)

    def after_freeze(self, state: TwoPartState, masks: Mapping[str, Tensor]) -> None:
        """Shrink ClickTrain's state."""
        assert state.second is not None
        self.second.after_freeze(state.second, masks)

    def penalized_channels(self, state: TwoPartState) -> Mapping[str, tuple[ChannelAxis, ...]]:
        """Those of PruneTrain, until the switch."""
        return {} if state.second is not None else self.first.penalized_channels(state.first)

    def at_end(self, state: TwoPartState, prunable: PrunableLayers) -> Sequence[Action]:
        """End with ClickTrain's compression of the smaller network."""
        own = self._own(state, prunable)
        if state.second is None:
            assert prunable.example is not None
            state.second = self._begin_second(state, own, RunLength(1, 10_000))
        return self.second_of(state).at_end(state.second, own)

    def targets_of(self, state: TwoPartState, reached: Reached) -> Sequence[Target]:
        """The channels at the switch, then the patterns in the smaller network."""
        channels = [
            replace(row, reason=row.reason if state.switched else "the run ended before the switch")
            for row in self.first.targets_of(state.first, reached)
        ]
        second = state.second or ClickTrainState()
        rows = self.second_of(state).targets_of(second, reached)
        patterns = [replace(row, what=f"{row.what} that are left") for row in rows]
        if state.compression is not None:
            bound = "least" if state.compression > self.pattern_compression else "most"
            reason = f"the layers that are left reach {state.compression:.2f}x at the {bound}"
            patterns = [replace(row, asked=self.pattern_compression, reason=reason) for row in patterns]
        return [*channels, *patterns]

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: TwoPartState | None = None
    ) -> PruningPlan:
        """Before the switch PruneTrain's plan with ClickTrain's stages, then ClickTrain's."""
        assert prunable.model is not None
        if state is not None and state.second is not None:
            return self.second_of(state).plan(self._own(state, prunable), self._rest(length), state.second)
        channels = self.first_of(length).plan(prunable, length, None if state is None else state.first)
        own = self.second.find_prunable(prunable.model)
        compression = None if state is None else self._reachable(own)
        second = self.second if compression is None else replace(self.second, compression=compression)
        patterns = second.plan(own, self._rest(length))
        switch = (
            "switch",
            f"after epoch {self.switch_epoch(length)}; shares of the rest of the run from there",
        )
        return replace(
            channels,
            stages=(*channels.stages, switch, *patterns.stages),
            summary=f"{channels.summary}; then compression {second.compression:.4g} of what is left",
        )

    def load_state(
        self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]
    ) -> TwoPartState:
        """The inverse of `state_dict`, on the network as it was then."""
        own = {**saved, "first": self.first.load_state(prunable, length, saved["first"]), "second": None}
        state = TwoPartState(**own)
        if saved["second"] is not None:
            rest = RunLength(length.epochs - state.epochs, length.steps_per_epoch)
            layers = self._own(state, prunable)
            state.second = self.second_of(state).load_state(layers, rest, saved["second"])
            state.first.lasso.axes = None
        return state
