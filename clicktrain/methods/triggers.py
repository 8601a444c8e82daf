"""When to prune, over a run: the structures that the early pruning indicator compares, and who reads it.

A structure (When to Prune?, section 3.3) is how many neurons of each layer are among the best of the network,
or how many kernels, for methods that prune kernels. Scores of kernels are means over their positions, so that
layers with kernels of different sizes compete, and over the batches of an epoch (Algorithm 2, line 6).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer
from clicktrain.methods.base import Record, StepInfo
from clicktrain.runs.events import IndicatorEvent
from clicktrain.sparsity.importance import CRITERIA, Criterion, kernel_scores, reads_gradient
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.triggers import (
    EARLY_TRIGGERS,
    GRADIENT_THRESHOLD,
    MAGNITUDE_THRESHOLD,
    NOT_LOWER_THAN,
    POLICIES,
    SLOPE,
    EarlyTriggerChoice,
    History,
    LossSlope,
    Trigger,
    early_pruning_indicator,
    fires,
    kept_kernels,
)


@dataclass(slots=True)
class StructureWatch:
    """The structures and indicators of a run's epochs (When to Prune? Algorithm 2, lines 6 to 8)."""

    structures: list[list[int]] = field(default_factory=list)
    indicators: list[float | None] = field(default_factory=list)

    def add(self, structure: Mapping[str, int], window: int, threshold: float, what: str) -> Record:
        """Take the kept neurons or kernels per layer of the epoch that has ended; what to record about it."""
        self.structures.append(list(structure.values()))
        epi = early_pruning_indicator(self.structures, window)
        self.indicators.append(epi)
        return Record(
            IndicatorEvent(
                epi=epi, threshold=threshold, window=window, criterion=what, structure=dict(structure)
            )
        )

    @property
    def epi(self) -> float | None:
        """EPI of the last epoch."""
        return self.indicators[-1] if self.indicators else None


@dataclass(frozen=True, kw_only=True)
class StructureSettings:
    """From when on a structure is stable."""

    epi_threshold: float | None = None
    """EPI from which the structure is stable; by default 0.983 for magnitude, 0.944 for criteria that read
    gradients."""
    epi_window: int | None = None
    """Past epochs r that a structure is compared with: 5 by default, fewer (2 at the least) in runs of under
    43 epochs: a third of the longest dense training."""
    epi_history: int | None = None
    """Earlier values of EPI that there must be and that it must not be under: the 5 of the paper, fewer (1 at
    the least) in such runs."""

    def check_structure(self) -> None:
        """UserError for a value out of range."""
        if self.epi_threshold is not None and not 0 <= self.epi_threshold <= 1:
            raise UserError(f"epi_threshold must be between 0 and 1, not {self.epi_threshold}")
        if self.epi_window is not None and self.epi_window < 1:
            raise UserError(f"epi_window must be at least 1, not {self.epi_window}")
        if self.epi_history is not None and not 0 <= self.epi_history <= NOT_LOWER_THAN:
            raise UserError(f"epi_history must be 0 to {NOT_LOWER_THAN}, not {self.epi_history}")

    def tau(self, criterion: Any, known: Mapping[str, Any] = CRITERIA) -> float:
        """EPI from which the structure is stable (section 4.2). Imports nothing."""
        if self.epi_threshold is not None:
            return self.epi_threshold
        function = known.get(criterion) if isinstance(criterion, str) else criterion
        reads = function is None or reads_gradient(function)
        return GRADIENT_THRESHOLD if reads else MAGNITUDE_THRESHOLD

    def window(self, latest: int) -> int:
        """r, for the longest dense training in epochs.

        The paper leaves r open. With 5, and the five values that its Algorithm 2 compares, pruning begins in
        epoch 11 at the earliest, where ResNet-34 begins in its Table 2; its runs of 90 epochs may begin until
        epoch 30. Shorter runs keep that proportion, but one epoch alone says nothing about stability.
        """
        return self.epi_window or max(2, min(5, latest // 3))

    def history(self, latest: int) -> int:
        """Earlier values of EPI that there must be, for the longest dense training in epochs."""
        if self.epi_history is not None:
            return self.epi_history
        return max(1, min(NOT_LOWER_THAN, latest // 3))

    def warn_of_short_run(self, latest: int, at_latest: str) -> None:
        """Warn if EPI has nothing to decide before the last epoch in which pruning may begin.

        ``at_latest`` names what makes that epoch the last.
        """
        window, history = self.window(latest), self.history(latest)
        if (first := window + history + 1) >= latest:
            warnings.warn(
                f"EPI decides nothing in so short a run: it compares structures over {window} epochs and "
                f"{history} earlier values, so that pruning could begin in epoch {first}, but it begins in "
                f"epoch {latest} at the latest ({at_latest}): train longer, begin later, or set epi_window "
                "and epi_history",
                stacklevel=5,
            )


@dataclass(frozen=True, kw_only=True)
class LossSlopeSettings:
    """From when on the loss has settled."""

    loss_slope: float = SLOPE
    """The loss has settled when it falls by less than this in an epoch (trigger loss_slope; ClickTrain,
    sections 4.1 and 6.1)."""
    loss_slope_of: Literal["sum", "mean"] = "sum"
    """The loss that must settle: summed over the batches of an epoch, or their mean."""
    loss_slope_epochs: int = 2
    """Epochs over which its fall is measured, and divided by; 1 is the difference of two epochs."""

    def check_loss_slope(self) -> None:
        """UserError for a value out of range."""
        if self.loss_slope_epochs < 1:
            raise UserError(f"loss_slope_epochs must be at least 1, not {self.loss_slope_epochs}")

    @property
    def settled(self) -> LossSlope:
        """The rule."""
        return LossSlope(self.loss_slope, self.loss_slope_of, self.loss_slope_epochs)


@dataclass(frozen=True, kw_only=True)
class EarlyTrigger(StructureSettings, LossSlopeSettings):
    """What may begin pruning before the time that a method's own settings say."""

    trigger: EarlyTriggerChoice = "own"
    """Pruning begins by the method's own rule (own), or as soon as it is stable how many kernels each layer
    keeps (epi: When to Prune?, Eq. (4) to (6)), or the loss settles (loss_slope); by its own rule at the
    latest."""

    @property
    def watches_structure(self) -> bool:
        """Whether the trigger reads EPI."""
        return self.trigger not in ("own", "loss_slope")


@dataclass(slots=True)
class KernelWatch:
    """Scores of the running epoch, [F, C] per layer, and the structures of kernels before."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    watch: StructureWatch = field(default_factory=StructureWatch)

    def see(self, layers: Sequence[PrunableLayer], criterion: str | Criterion, step: StepInfo) -> None:
        """Add up the scores of a batch; without gradients they are read once, at the end of an epoch."""
        score = CRITERIA.resolve(criterion)
        if not reads_gradient(score) and not step.ends_epoch:
            return
        for layer in layers:
            grad = step.gradient(layer.weight)
            if grad is None:
                continue
            scores = layer.view(score(layer.weight.detach().float(), grad.float()))
            kernels = kernel_scores(scores) / scores[0, 0].numel()
            before = self.sums.get(layer.name)
            self.sums[layer.name] = kernels if before is None else before.add_(kernels)

    def close_epoch(
        self,
        layers: Sequence[PrunableLayer],
        share: float,
        window: int,
        threshold: float,
        criterion: str | Criterion,
    ) -> Record:
        """The structure of the epoch that has ended, with this share of all kernels kept, and EPI."""
        for layer in layers:
            self.sums.setdefault(layer.name, torch.zeros(layer.view_shape[:2], device=layer.weight.device))
        scores, self.sums = {layer.name: self.sums[layer.name] for layer in layers}, {}
        structure = dict(zip(scores, kept_kernels(scores, share), strict=True))
        return self.watch.add(structure, window, threshold, choice_name(criterion))

    def fires(
        self, rule: EarlyTrigger, trigger: str | Trigger, threshold: float, latest: int, step: StepInfo
    ) -> str | None:
        """Why pruning may begin after this step, or None.

        Args:
            rule: the settings.
            trigger: that of the settings, or what stands for it.
            threshold: EPI from which the structure is stable.
            latest: longest dense training, in epochs.
            step: the step that was taken.
        """
        seen = History(
            epoch=math.floor(step.position),
            latest=step.length.epochs,
            losses=step.epoch_losses,
            batches=step.length.steps_per_epoch,
            indicators=self.watch.indicators,
            threshold=threshold,
            compared=rule.history(latest),
            slope=rule.settled,
        )
        return EARLY_TRIGGERS.resolve(trigger)(seen)


@dataclass(frozen=True, slots=True)
class StartRule:
    """In which epoch neurons are pruned; settings as in `clicktrain.methods.pat.PaT`.

    ``latest`` is the last epoch in which pruning may take place, ``compared`` as in `History`, ``batches`` of
    an epoch.
    """

    policy: str | Trigger
    latest: int
    window: int
    compared: int
    threshold: float
    prune_epoch: int | None
    seed: int
    slope: LossSlope
    batches: int

    def due(self, epoch: int, watch: StructureWatch, losses: Sequence[float]) -> str | None:
        """Why pruning takes place in an epoch, from 0, that begins now, or None; losses as in `History`."""
        seen = History(
            epoch=epoch,
            latest=self.latest,
            losses=losses,
            batches=self.batches,
            indicators=watch.indicators,
            threshold=self.threshold,
            compared=self.compared,
            slope=self.slope,
            chosen=self.prune_epoch,
            seed=self.seed,
        )
        return fires(POLICIES.resolve(self.policy), seen)

    def drawn_epoch(self) -> int:
        """The epoch of policy random."""
        return History(0, self.latest, seed=self.seed).drawn

    def describe(self) -> str:
        """How long training is dense."""
        latest = f"epoch {self.latest} at the latest"
        known = {
            "epi": f"until EPI over {self.window} epochs is at least {self.threshold:g}, {latest}",
            "loss_slope": f"until {self.slope.describe()}, {latest}",
            "epoch": f"until epoch {self.prune_epoch}",
            "random": f"until an epoch drawn from 0 to {self.latest}",
            "init": "not at all",
        }
        name = choice_name(self.policy)
        return known.get(name, f"until {name} says so, {latest}")
