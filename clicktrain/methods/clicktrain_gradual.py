"""Gradual ClickTrain: pool and votes of the paper, then kernels leave one by one and may come back.

ClickTrain (sections 4.1 to 4.4) decides patterns and kernels once and cuts once. Here its first three stages
choose the patterns, and from then on kernels leave by the cubic schedule of Zhu and Gupta (2017), some are
replaced where the gradient is largest (GraNet, 2021), and patterns may change, until masks are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import Patterns
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import Action, ApplyMasks, Record, RunLength, StepInfo
from clicktrain.methods.masks.growing import Growing
from clicktrain.methods.masks.masked import MaskState, Tensors
from clicktrain.methods.masks.moving import Gradual
from clicktrain.methods.masks.own_pool import OwnPool
from clicktrain.methods.masks.update_times import Timing, check_shares
from clicktrain.methods.patterns.selection import PatternLayer, Selection
from clicktrain.methods.patterns.voting import close_pools, fill_in, read_batch
from clicktrain.sparsity.finalize import batch_counts, pattern_mask
from clicktrain.sparsity.importance import CRITERIA
from clicktrain.sparsity.patterns import PatternPool
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import DROPS, DropChoice, Units, Update
from clicktrain.sparsity.schedules import ScheduleChoice, left_at


@dataclass(slots=True)
class GradualState(MaskState):
    """Masks that move, and before them the votes."""

    selection: Selection = field(default_factory=Selection)
    previous_loss: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class GradualClickTrain(OwnPool, Gradual, Growing):
    """Vote for patterns, then let kernels leave and return until masks are frozen (after ClickTrain, 2021).

    Stages: dense; pool, in which every kernel proposes patterns; finalize, in which it votes for one of the
    pool; pruning, in which all kernels have a pattern, and leave, return and change it; fixed.
    """

    name: ClassVar[str] = "clicktrain-gradual"
    title: ClassVar[str] = "Gradual ClickTrain"
    reason: ClassVar[str] = "each filter of a layer keeps as many whole kernels"
    usual_interval: ClassVar[tuple[int, int]] = (100, 50)

    pool: Literal["dynamic", "fixed"] = "dynamic"
    """Pattern pool generated while training (section 4.2), or 4, 8, 12 or 16 fixed 3x3 patterns."""
    selection: Literal["votes", "accumulated"] = "votes"
    """A kernel's first pattern: the one that is best in most batches (section 4.3), or best by importance
    summed over batches."""
    pool_length: float = 0.02
    """Share of the run in which kernels propose patterns, before they vote."""
    finalize_length: float = 0.02
    """Share of the run in which kernels vote for a pattern of the pool, before start."""
    loss_margin: float = 0.0018
    """Batches whose loss rises by more do not vote (section 4.3)."""
    loss_margin_rule: Literal["ratio", "increase"] = "increase"
    """The margin read literally (previous / current < margin), or as current > previous * (1 + margin)."""
    drop: float = 0.3
    """Share of each layer's kernels that is replaced at the first step."""
    drop_rule: DropChoice = "layer"
    """Which are replaced: the smallest of each layer, or of the whole network, or what is below an adaptive
    threshold."""
    drop_schedule: ScheduleChoice = "cosine"
    """How that share falls to 0 until masks are frozen."""
    start: float = 0.2
    """Share of the run at which every kernel takes its pattern, and kernels begin to leave."""
    complete: float = 0.5
    """Share of the run at which the compression is reached; kernels and patterns still move."""
    stop: float = 0.75
    """Share of the run after which masks are frozen."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_shares(self, ("drop",))
        if self.granularity != "pattern":
            raise UserError(f"granularity is pattern for {self.title}: take gmp or granet for other units")
        if not self.start < self.complete <= self.stop:
            raise UserError(
                f"complete is a share of the run, above start ({self.start:g}) and at most stop "
                f"({self.stop:g}), not {self.complete}"
            )
        lengths = self.pool_length, self.finalize_length
        if min(lengths) < 0 or sum(lengths) > self.start:
            raise UserError(
                f"pool_length and finalize_length are shares of the run before start ({self.start:g}), "
                f"not {lengths[0]:g} and {lengths[1]:g}"
            )
        if self.loss_margin < 0:
            raise UserError(f"loss_margin must not be negative, got {self.loss_margin}")

    # ---- units ----------------------------------------------------------------------------------

    def pools_of(self, state: MaskState) -> Mapping[tuple[int, int], PatternPool]:
        """The pools that kernels voted for, or the fixed one."""
        assert isinstance(state, GradualState)
        return state.selection.pools

    def mask_patterns(self, state: MaskState, layer: PrunableLayer) -> Patterns | None:
        """The patterns of the pool, from the end of the votes on; until then layers are dense."""
        decided = state.stage in (self.moves_in, "fixed")
        return super().mask_patterns(state, layer) if decided else None

    # ---- times ----------------------------------------------------------------------------------

    @property
    def first_sparsity(self) -> float:
        """It begins dense."""
        return 0.0

    @property
    def stages(self) -> tuple[str, ...]:
        """Those of ClickTrain until patterns are chosen; masks move; masks are fixed."""
        pool = ("pool",) if self.pool == "dynamic" else ()
        return ("dense", *pool, "finalize", self.moves_in, "fixed")

    def timing(self, length: RunLength) -> Timing:
        """When units move; in a very short run not before each stage has had a batch."""
        timing = super().timing(length)
        least = len(self.stages) - 2
        if timing.end <= least:
            raise UserError(
                f"a run of {length.total} batches is too short for the stages of gradual ClickTrain: they "
                f"take {least} before masks move; give more epochs or a smaller batch_size"
            )
        return replace(timing, begin=max(timing.begin, least))

    def ends(self, length: RunLength) -> dict[str, int]:
        """Batch at which each stage before pruning is over."""
        begin, dynamic = self.timing(length).begin, self.pool == "dynamic"
        votes = max(begin - max(round(self.finalize_length * length.total), 1), 1 + dynamic)
        pool = max(votes - max(round(self.pool_length * length.total), 1), 1) if dynamic else votes
        return {"dense": pool, "pool": votes, "finalize": begin}

    # ---- life cycle -----------------------------------------------------------------------------

    def new_state(self) -> GradualState:
        """A state before the first step."""
        return GradualState()

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Check that the run can be done as asked."""
        self.ends(length)
        return super().init(prunable, length)

    def before_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Read the gradients while patterns are chosen; then as masks that move need it."""
        assert isinstance(state, GradualState)
        if state.stage not in ("pool", "finalize"):
            super().before_step(state, prunable, step)
            return
        counts = batch_counts(state.previous_loss, step.loss, self.loss_margin, self.loss_margin_rule)
        weight, state.previous_loss = counts if state.stage == "finalize" else None, step.loss
        criterion, votes = CRITERIA.resolve(self.criterion), self.selection == "votes"
        read_batch(state.selection, self.pattern_layers(prunable), step, criterion, weight, votes)

    def after_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Go on to the next stage when it is time; move masks in theirs."""
        assert isinstance(state, GradualState)
        if state.stage in (self.moves_in, "fixed"):
            return super().after_step(state, prunable, step)
        actions: list[Action] = []
        ends = self.ends(step.length)
        while state.stage in ends and step.seen >= ends[state.stage]:
            reason = f"batch {ends[state.stage]} of {step.length.total}"
            actions += self._close(state, prunable)
            following = self.stages[self.stages.index(state.stage) + 1]
            actions.append(self.enter(state, following, reason))
        if state.stage == self.moves_in:
            actions.append(ApplyMasks(state.masks, forget=True))
        return actions

    def _close(self, state: GradualState, prunable: PrunableLayers) -> list[Action]:
        """End a stage before pruning: decide the pools after its second, first masks after its third."""
        selection, layers, votes = state.selection, self.pattern_layers(prunable), self.selection == "votes"
        actions: list[Action] = []
        last_of_pools = "pool" if self.pool == "dynamic" else "dense"
        fill_in(selection, layers, votes, state.stage == "pool", state.stage == "finalize")
        if state.stage == last_of_pools:
            actions.append(Record(close_pools(selection, layers, self.patterns, self.fixed)))
        if state.stage == "finalize":
            self._first_masks(state, prunable, layers)
        return actions

    def _first_masks(
        self, state: GradualState, prunable: PrunableLayers, layers: Sequence[PatternLayer]
    ) -> None:
        """All kernels live, each on its pattern."""
        selection, masks = state.selection, {}
        for layer in prunable.layers:
            masks[layer.name] = torch.ones_like(layer.weight, dtype=torch.bool)
        for own in layers:
            selection.choose_patterns(own, self.selection == "votes")
            pool, ids = selection.pools[own.kernel_shape].masks(), selection.pattern_id.pop(own.name)
            mask = pattern_mask(ids, ids >= 0, pool)
            masks[own.name] = own.layer.unview(mask)
        state.masks = masks
        selection.forget_gradients()

    def last_masks(self, state: MaskState, prunable: PrunableLayers) -> Tensors:
        """The masks that are frozen, after a last move; patterns by magnitudes if the run ended before."""
        assert isinstance(state, GradualState)
        while state.stage not in (self.moves_in, "fixed"):
            self._close(state, prunable)
            state.stage = self.stages[self.stages.index(state.stage) + 1]
        return super().last_masks(state, prunable)

    def after_freeze(self, state: MaskState, masks: Mapping[str, Tensor]) -> None:
        """The network holds the masks from here on; pools stay, which packed layers were made for."""
        assert isinstance(state, GradualState)
        super().after_freeze(state, masks)
        state.selection, state.previous_loss = Selection(pools=state.selection.pools), None

    # ---- moves ----------------------------------------------------------------------------------

    def move(self, now: Update) -> tuple[Units, Units]:
        """Keep the schedule's share of the kernels, the best of each filter; then replace some of them."""
        whole = (self.complete - self.start) / (self.stop - self.start)
        left = left_at(self.sparsity_schedule, min(now.done / whole, 1.0))
        weights = {name: math.prod(shape) for name, shape in now.shapes.items()}
        most = sum(now.most(name) * weights[name] for name in weights) / sum(weights.values())
        target = 1 - self.sparsity
        alive = now.keep(self.counts_at(now, target + (most - target) * left))
        if now.done >= 1:
            return alive, alive
        pruned = replace(now, alive=alive)
        kept = DROPS.resolve(self.drop_rule)(pruned, self.drop * left_at(self.drop_schedule, now.done))
        return kept, self.grow(pruned, kept, pruned.lost(kept))

    def describe(self) -> str:
        """How units move, in words."""
        rise, fall = choice_name(self.sparsity_schedule), choice_name(self.drop_schedule)
        return (
            f"the smallest of each filter go by a {rise} schedule until {self.complete:g} of the run; "
            f"{100 * self.drop:g}%, falling to 0 by {fall}, are replaced by {self.grown}, "
            "as many patterns change"
        )

    def stage_texts(self, length: RunLength) -> dict[str, str]:
        """What happens in each stage, in words."""
        ends = {stage: f"until batch {end} of {length.total}" for stage, end in self.ends(length).items()}
        by = "most votes" if self.selection == "votes" else "summed importance"
        return {
            **super().stage_texts(length),
            "dense": ends["dense"],
            "pool": f"{ends['pool']}, a pool of {self.patterns} patterns, by {choice_name(self.criterion)}",
            "finalize": f"{ends['finalize']}, the pattern of every kernel, by {by}",
        }
