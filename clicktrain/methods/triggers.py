"""When to prune: the early pruning indicator over a run, and the other rules that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from clicktrain.methods.base import Record
from clicktrain.sparsity.stability import early_pruning_indicator
from clicktrain.sparsity.triggers import LossSlope, StructureStable

Policy = Literal["epi", "loss_slope", "epoch", "random", "init"]


@dataclass(slots=True)
class StructureWatch:
    """The structures and indicators of a run's epochs (When to Prune? Algorithm 2, lines 6 to 8)."""

    structures: list[list[int]] = field(default_factory=list)
    indicators: list[float | None] = field(default_factory=list)

    def add(self, structure: Mapping[str, int], window: int, threshold: float, what: str) -> Record:
        """Take the structure of the epoch that has ended; what is to be written down about it.

        Args:
            structure: kept neurons or kernels per layer.
            window: r of Eq. (6).
            threshold: tau.
            what: the criterion, for the record.
        """
        self.structures.append(list(structure.values()))
        epi = early_pruning_indicator(self.structures, window)
        self.indicators.append(epi)
        return Record({"event": "epi", "epi": epi, "threshold": threshold, "window": window,
                       "criterion": what, "structure": dict(structure)})  # fmt: skip

    @property
    def epi(self) -> float | None:
        """Of the last epoch."""
        return self.indicators[-1] if self.indicators else None

    def state_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return {"structures": [list(s) for s in self.structures], "indicators": list(self.indicators)}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> StructureWatch:
        """Inverse of `state_dict`."""
        return cls([list(s) for s in saved["structures"]], list(saved["indicators"]))


def default_window(latest: int) -> int:
    """r where it is not given: a third of the longest dense training, 5 epochs at the most.

    The paper leaves r open; its runs of 90 epochs start at epoch 30 at the latest.
    """
    return max(1, min(5, latest // 3))


@dataclass(frozen=True, slots=True)
class StartRule:
    """In which epoch neurons are pruned; settings as in `clicktrain.methods.pat.PaT`.

    ``latest`` is the last epoch in which pruning may take place.
    """

    policy: Policy
    latest: int
    window: int
    threshold: float
    prune_epoch: int | None
    seed: int
    loss_slope: float

    def due(self, epoch: int, watch: StructureWatch, losses: Sequence[float]) -> str | None:
        """Why pruning takes place in an epoch that begins now, or None.

        Args:
            epoch: from 0.
            watch: the structures so far.
            losses: mean training loss of every epoch so far.
        """
        if self.policy == "init":
            return "before training"
        if self.policy == "epoch":
            return f"epoch {epoch} was asked for" if epoch == self.prune_epoch else None
        if self.policy == "random":
            drawn = self.drawn_epoch()
            return f"epoch {epoch} was drawn from 0 to {self.latest}" if epoch == drawn else None
        if self.policy == "epi":
            reason = StructureStable(self.threshold).fires(watch.indicators)
        else:
            reason = LossSlope(self.loss_slope).fires(losses)
        return reason or (f"epoch {epoch} is the latest to begin" if epoch >= self.latest else None)

    def drawn_epoch(self) -> int:
        """Policy random: uniform from 0 to the latest, as the paper's from [0, 30] of 90."""
        generator = torch.Generator().manual_seed(self.seed)
        return int(torch.randint(0, self.latest + 1, (1,), generator=generator))

    def describe(self) -> str:
        """How long training is dense."""
        latest = f"epoch {self.latest} at the latest"
        return {
            "epi": f"until EPI over {self.window} epochs is at least {self.threshold:g}, {latest}",
            "loss_slope": f"until the loss falls by less than {self.loss_slope:g} per epoch, {latest}",
            "epoch": f"until epoch {self.prune_epoch}",
            "random": f"until an epoch drawn from 0 to {self.latest}",
            "init": "not at all",
        }[self.policy]
