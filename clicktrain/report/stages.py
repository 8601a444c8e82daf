"""When a run was in which stage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from clicktrain.report.run_data import Run, number

STAGE_NAMES = {
    "dense": "dense training",
    "pool": "pattern pool",
    "finalize": "finalization",
    "regularize": "regularization",
    "accelerated": "accelerated training",
}
"""ClickTrain's five stages in their order (paper, Figure 4), and how they are called in a report."""

_OTHER_CLASSES = ("stage-pool", "stage-finalize", "stage-regularize", "stage-accelerated")


@dataclass(frozen=True, slots=True)
class StageBand:
    """A stretch of a run in one stage; ``begin`` and ``end`` in epochs."""

    stage: str
    begin: float
    end: float
    mark: str
    css: str

    @property
    def title(self) -> str:
        """Name of the stage in words."""
        return STAGE_NAMES.get(self.stage, self.stage)


def stage_bands(run: Run) -> tuple[StageBand, ...]:
    """The stages that a run went through, in order, up to its last finished epoch.

    From the events, which know fractions of epochs, or else from each epoch's shares.
    """
    begins = _from_events(run) or _from_shares(run)
    end = float(run.epochs_done)
    names = list(dict.fromkeys(stage for stage, _ in begins))
    bands = []
    for (stage, begin), (_, following) in itertools.pairwise([*begins, ("", end)]):
        known = stage in STAGE_NAMES
        place = (list(STAGE_NAMES) if known else names).index(stage)
        css = f"stage-{stage}" if known else _OTHER_CLASSES[place % len(_OTHER_CLASSES)]
        until = min(following, end)
        if until > begin:
            bands.append(StageBand(stage, begin, until, str(1 + place), css))
    return tuple(bands)


def _from_events(run: Run) -> list[tuple[str, float]]:
    begins = [
        (str(event.get("stage")), epoch)
        for event in run.events
        if event.get("event") == "stage" and (epoch := number(event, "epoch")) is not None
    ]
    if begins and begins[0][1] > 0:
        begins.insert(0, ("dense", 0.0))
    return begins


def _from_shares(run: Run) -> list[tuple[str, float]]:
    order = list(STAGE_NAMES)
    begins: list[tuple[str, float]] = []
    for line in run.metrics:
        at = (number(line, "epoch") or 1.0) - 1
        shares = line.get("stages") or {line.get("stage", "dense"): 1.0}
        if not isinstance(shares, dict):
            continue
        for stage in sorted(shares, key=lambda name: order.index(name) if name in order else -1):
            if not begins or begins[-1][0] != stage:
                begins.append((str(stage), at))
            at += number(shares, stage) or 0.0
    return begins
