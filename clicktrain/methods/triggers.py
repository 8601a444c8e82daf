"""When to prune, over a run: the structures that the early pruning indicator compares, and who reads it.

A structure (When to Prune?, section 3.3) is how many neurons of each layer are among the best of the network,
or how many kernels, for methods that prune kernels. Scores of kernels are means over their positions, so that
layers with kernels of different sizes compete, and over the batches of an epoch (Algorithm 2, line 6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
    POLICIES,
    SLOPE,
    EarlyTriggerChoice,
    History,
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
    """Past epochs r that a structure is compared with; a third of the longest dense training by default, 5 at
    the most."""

    def check_structure(self) -> None:
        """UserError for a value out of range."""
        if self.epi_threshold is not None and not 0 <= self.epi_threshold <= 1:
            raise UserError(f"epi_threshold must be between 0 and 1, not {self.epi_threshold}")
        if self.epi_window is not None and self.epi_window < 1:
            raise UserError(f"epi_window must be at least 1, not {self.epi_window}")

    def tau(self, criterion: Any, known: Mapping[str, Any] = CRITERIA) -> float:
        """EPI from which the structure is stable (section 4.2). Imports nothing."""
        if self.epi_threshold is not None:
            return self.epi_threshold
        function = known.get(criterion) if isinstance(criterion, str) else criterion
        reads = function is None or reads_gradient(function)
        return GRADIENT_THRESHOLD if reads else MAGNITUDE_THRESHOLD

    def window(self, latest: int) -> int:
        """r, for the longest dense training in epochs.

        The paper leaves r open; its runs of 90 epochs start at epoch 30 at the latest.
        """
        return self.epi_window or max(1, min(5, latest // 3))


@dataclass(frozen=True, kw_only=True)
class EarlyTrigger(StructureSettings):
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
        self, trigger: str | Trigger, step: StepInfo, threshold: float, slope: float = SLOPE
    ) -> str | None:
        """Why pruning may begin after this step, or None."""
        epoch, latest = math.floor(step.position), step.length.epochs
        seen = History(epoch, latest, step.epoch_losses, self.watch.indicators, threshold, slope)
        return EARLY_TRIGGERS.resolve(trigger)(seen)


@dataclass(frozen=True, slots=True)
class StartRule:
    """In which epoch neurons are pruned; settings as in `clicktrain.methods.pat.PaT`.

    ``latest`` is the last epoch in which pruning may take place.
    """

    policy: str | Trigger
    latest: int
    window: int
    threshold: float
    prune_epoch: int | None
    seed: int
    loss_slope: float

    def due(self, epoch: int, watch: StructureWatch, losses: Sequence[float]) -> str | None:
        """Why pruning takes place in an epoch, from 0, that begins now, or None; losses as in `History`."""
        seen = History(epoch, self.latest, losses, watch.indicators, self.threshold, self.loss_slope,
                       self.prune_epoch, self.seed)  # fmt: skip
        return fires(POLICIES.resolve(self.policy), seen)

    def drawn_epoch(self) -> int:
        """The epoch of policy random."""
        return History(0, self.latest, seed=self.seed).drawn

    def describe(self) -> str:
        """How long training is dense."""
        latest = f"epoch {self.latest} at the latest"
        known = {
            "epi": f"until EPI over {self.window} epochs is at least {self.threshold:g}, {latest}",
            "loss_slope": f"until the loss falls by less than {self.loss_slope:g} per epoch, {latest}",
            "epoch": f"until epoch {self.prune_epoch}",
            "random": f"until an epoch drawn from 0 to {self.latest}",
            "init": "not at all",
        }
        name = choice_name(self.policy)
        return known.get(name, f"until {name} says so, {latest}")
