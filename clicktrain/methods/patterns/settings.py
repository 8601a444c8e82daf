"""ClickTrain's settings: presets, checks, and what follows from settings alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers, matches
from clicktrain.latency.network_times import Timed
from clicktrain.latency.sparse_latency import LatencyAim
from clicktrain.methods.base import RunLength
from clicktrain.methods.outcome import check_latency_target
from clicktrain.methods.patterns.axes import AllocationChoice, PenaltyChoice
from clicktrain.methods.patterns.selection import PatternLayer
from clicktrain.methods.triggers import EarlyTrigger
from clicktrain.settings import check_choices
from clicktrain.sparsity.allocation import LayerBudget
from clicktrain.sparsity.importance import CriterionChoice
from clicktrain.sparsity.patterns import default_entries, fixed_pool

PRESETS: dict[str, dict[str, Any]] = {
    # Chosen in short runs of one seed (docs/results/cifar10.md): magnitudes, decided late, pruned at half.
    "default": {
        "criterion": "magnitude", "selection": "accumulated", "kernel_score": "pattern",
        "allocation": "uniform", "penalty": "shrink", "early_penalty": "none",
        "pool": "dynamic", "patterns": 12,
        "earliest_start": 0.44, "latest_start": 0.44,
        "pool_length": 0.02, "finalize_length": 0.02, "regularize_length": 0.02,
    },
    # Sections 4 and 6.1: Taylor votes, the modified group lasso, one ratio for every layer, penalized from
    # stage 2 on. Stage 2 starts when the loss has settled, at epoch 50 of 190 at the latest (Figure 5). The
    # hard prune has its own time, as in Table 1 and the slides: 0.48 is epoch 91 of 190 and epoch 43 of 90.
    "paper": {
        "criterion": "taylor", "selection": "votes", "kernel_score": "kernel",
        "allocation": "uniform", "penalty": "lasso", "early_penalty": "batch",
        "pool": "dynamic", "patterns": 12,
        "earliest_start": 0.1, "latest_start": 0.26,
        "pool_length": 0.08, "finalize_length": 0.08, "hard_prune": 0.48,
    },
    # Magnitudes once, fixed patterns, no penalty: the baseline of section 3.2.
    "one-shot": {
        "criterion": "magnitude", "selection": "accumulated", "kernel_score": "kernel",
        "allocation": "uniform", "penalty": "none", "early_penalty": "none",
        "pool": "fixed", "patterns": 8,
        "earliest_start": 0.5, "latest_start": 0.5,
        "pool_length": 0.0, "finalize_length": 0.0, "regularize_length": 0.0,
    },
}  # fmt: skip

_SHARES = ("earliest_start", "latest_start", "pool_length", "finalize_length", "regularize_length")
_NO_EARLY_PENALTY = {"penalty": "none", "pool": "fixed"}
"""Settings with which no position can be penalized before stage 4."""


@dataclass(frozen=True, kw_only=True)
class PatternChoices:
    """Settings of ClickTrain that compositions with it have too."""

    preset: Literal["default", "paper", "one-shot"] = "default"
    """Source of settings that are not given: chosen in short runs (default), the paper's own, or magnitudes
    once with fixed patterns (one-shot, a baseline)."""
    patterns: int | None = None
    """Size N of the pattern pool (8 or 12 in the paper)."""
    group: int = 1
    """Neighboring filters that share patterns and kernels; 1 is the paper's."""
    share: Literal["kernels", "channels", "similar"] = "kernels"
    """What a group of filters shares: channels with their patterns (kernels); channels alone, each filter has
    patterns of its own (channels); or that, of filters that want similar channels, wherever in the layer they
    are (similar). Kernels for GPUs gather once for a group (docs/gpu.md)."""
    criterion: CriterionChoice | None = None
    """Importance of a weight: (g*w)^2 (the paper's), w^2, or |g|*w^2."""
    allocation: AllocationChoice | None = None
    """Kept kernels per layer: equal densities, by importance, by importance relative to the layer's mean or
    sum (share), or Erdos-Renyi-kernel."""


@dataclass(frozen=True, kw_only=True)
class PatternSettings(PatternChoices, EarlyTrigger):
    """The settings of ClickTrain. Those left at None come from the preset.

    Lengths are shares of the run, so that the stages fit whatever its length; 0 means as short as possible
    (one step, or none for stages 2 and 4).
    """

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("compression", "latency_target", "latency_target_ms"),
        ("hard_prune", "regularize_length"),
    )

    compression: float = 8.0
    """All convolution weights / nonzero ones at the end; not used with a latency as the target."""
    entries: int = 4
    """Kept positions of a 3x3 kernel; other kernel sizes keep the same share."""
    pool: Literal["dynamic", "fixed"] | None = None
    """Pattern pool generated while training (section 4.2), or 4, 8, 12 or 16 fixed 3x3 patterns."""
    selection: Literal["votes", "accumulated"] | None = None
    """A kernel's pattern: the one that is best in most batches (section 4.3), or best by importance summed
    over batches."""
    kernel_score: Literal["kernel", "pattern"] | None = None
    """Importance of a kernel: over all its positions (Eq. 2), or inside its chosen pattern."""
    allocation_floor: float = 0.2
    """Least density of a layer, as a share of that under equal densities."""
    latency_target: float | None = None
    """Target time as a share of the dense network's, instead of a compression (on CPUs); kernels are then
    allocated by their measured time, and allocation is share unless it is given."""
    latency_target_ms: float | None = None
    """Target time in milliseconds per batch, instead of a compression."""
    latency_batch: int = 64
    """Batch size whose time counts."""
    latency_of: Timed = "inference"
    """The time that counts: inference, or a training step (forward and backward pass)."""
    layers: dict[str, float] = field(default_factory=dict)
    """Compression ratio of single layers, by module path (shell-style): the paper's fixed ratios."""
    exclude: tuple[str, ...] = ()
    """Convolutions to leave dense, by module path (shell-style)."""
    include: tuple[str, ...] = ()
    """Convolutions to prune that are left alone by default (the first, depthwise ones)."""
    earliest_start: float | None = None
    """Earliest start of stage 2, share of the run."""
    latest_start: float | None = None
    """Latest start of stage 2, share of the run."""
    pool_length: float | None = None
    """Length of stage 2, share of the run."""
    finalize_length: float | None = None
    """Length of stage 3, share of the run."""
    regularize_length: float | None = None
    """Length of stage 4, share of the run; instead of hard_prune."""
    hard_prune: float | None = None
    """Share of the run after which pruned weights are zero for good: stage 4 lasts until then, however early
    stage 2 started. Instead of regularize_length."""
    penalty: PenaltyChoice | None = None
    """Stage 4: the modified group lasso (section 4.4), its proximal form with a strength set by the remaining
    steps (shrink), or nothing."""
    early_penalty: Literal["none", "batch", "summed"] | None = None
    """Stages 2 and 3: penalize the positions of a kernel that none of its candidate patterns keeps (the
    crosses of Figure 6), by the gradients of each batch (the paper's) or by importance summed since stage 2
    began; or nothing until stage 4."""
    lasso: float = 0.00025
    """Coefficient of the group lasso (section 6.1)."""
    loss_margin: float = 0.0018
    """Batches whose loss rises by more are not counted in stage 3 (section 4.3)."""
    loss_margin_rule: Literal["ratio", "increase"] = "ratio"
    """The margin read literally (previous / current < margin), or as current > previous * (1 + margin)."""

    def __post_init__(self) -> None:
        """Fill in the preset and check every setting."""
        if self.preset not in PRESETS:
            raise UserError(f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        self._take_preset(dict(PRESETS[self.preset]))
        check_choices(self)
        self.check_structure()
        self.check_loss_slope()
        check_latency_target(self.latency_target, self.latency_target_ms)
        if not self.compression > 1:
            raise UserError(
                f"compression must be more than 1 (8 keeps an eighth of the weights), not {self.compression}"
            )
        for key in ("group", "entries", "patterns", "latency_batch"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise UserError(f"{key} must be at least 1, not {value}")
        if self.share != "kernels" and self.group == 1:
            raise UserError(f"share is {self.share} but group is 1: set group to the filters that share them")
        if self.entries > 9:
            raise UserError(
                f"entries is the number of kept positions of a 3x3 kernel, 1 to 9, not {self.entries}"
            )
        if self.pool == "fixed":
            fixed_pool(self.patterns or 0)
            if self.entries != 4:
                raise UserError(
                    f"a fixed pool keeps 4 positions per kernel; entries={self.entries} needs pool=dynamic"
                )
        self._check_times()
        for key in ("lasso", "loss_margin"):
            if getattr(self, key) < 0:
                raise UserError(f"{key} must not be negative, got {getattr(self, key)}")
        for glob, ratio in self.layers.items():
            if not ratio >= 1:
                raise UserError(f"the compression of layer {glob!r} must be at least 1, not {ratio}")

    def _take_preset(self, defaults: dict[str, Any]) -> None:
        """Take settings that are None from a preset, but for those that others exclude."""
        if self.hard_prune is not None and self.regularize_length is not None:
            raise UserError(
                "hard_prune and regularize_length both say when stage 4 is over: give one of them"
            )
        for given, other in (("hard_prune", "regularize_length"), ("regularize_length", "hard_prune")):
            if getattr(self, given) is not None:
                defaults.pop(other, None)
        if self.watches_structure:
            defaults["earliest_start"] = 0.0
        if self.aim is not None:
            defaults["allocation"] = "share"
        early = self.early_penalty
        for key, value in defaults.items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        for key, value in _NO_EARLY_PENALTY.items():
            if getattr(self, key) == value:
                if early not in (None, "none"):
                    raise UserError(
                        f"early_penalty is {early}, which {key} {value} rules out: set it to none"
                    )
                object.__setattr__(self, "early_penalty", "none")

    def _check_times(self) -> None:
        """UserError for stages that do not fit into a run."""
        for key in (*_SHARES, "hard_prune", "allocation_floor"):
            if (value := getattr(self, key)) is not None and not 0 <= value <= 1:
                raise UserError(f"{key} must be between 0 and 1, not {value}")
        needed = sum(getattr(self, key) or 0.0 for key in _SHARES[1:])
        if needed > 1 + 1e-9:
            raise UserError("latest_start and the lengths of stages 2 to 4 must not add up to more than 1")
        if self.hard_prune is not None and needed > self.hard_prune + 1e-9:
            raise UserError(
                f"latest_start and the lengths of stages 2 and 3 add up to {needed:.3g}, but hard_prune is "
                f"{self.hard_prune:g}: begin earlier, give a later one, or regularize_length instead of it"
            )
        if (self.earliest_start or 0) > (self.latest_start or 0):
            raise UserError("earliest_start must not be later than latest_start")

    @property
    def aim(self) -> LatencyAim | None:
        """The latency to end at, if that is the target."""
        if self.latency_target is None and self.latency_target_ms is None:
            return None
        return LatencyAim(self.latency_target, self.latency_target_ms, self.latency_batch, self.latency_of)

    @property
    def compression_asked(self) -> float | None:
        """The compression ratio to end at; None if a latency is the target."""
        return None if self.aim is not None else self.compression

    def targets(self, prunable: PrunableLayers) -> tuple[PatternLayer, ...]:
        """The layers with their kept positions per kernel, group size and fixed number of kernels."""
        return tuple(self._target(layer) for layer in prunable.convs)

    def _target(self, layer: PrunableLayer) -> PatternLayer:
        f, c, r, s = layer.view_shape
        entries = default_entries((r, s), self.entries)
        if layer.unit_refusal("pattern") or (self.pool == "fixed" and (r, s) != (3, 3)):
            entries = r * s  # kept or pruned whole: kernels without patterns; the fixed patterns are 3 x 3
        ratio = next((v for glob, v in self.layers.items() if matches(layer.name, [glob])), None)
        fixed = None
        if ratio is not None:
            least = r * s / entries
            if ratio < 0.99 * least:
                raise UserError(
                    f"layers asks for {ratio:g}x in {layer.name}, but keeping {entries} of {r * s} positions "
                    f"per kernel is {least:.2f}x at the least: ask for more, or exclude the layer"
                )
            fixed = LayerBudget(layer.name, f, c, entries, r * s).kernels_for_density(1 / ratio)
        group = math.gcd(f, self.group)
        if self.share == "kernels":
            return PatternLayer(layer, entries, group, fixed)
        return PatternLayer(layer, entries, 1, fixed, group, self.share == "similar")

    def schedule(self, length: RunLength) -> dict[str, int]:
        """Batches: ``earliest`` and ``latest`` start of stage 2 and the lengths of stages 2 to 4.

        With a time for the hard prune, that is ``hard_prune``, and the length of stage 4 is its least.

        Raises:
            UserError: the run is too short for its stages.
        """
        total, end = length.total, length.total - 1
        shares = {
            "pool": self.pool_length if self.pool == "dynamic" else None,
            "finalize": self.finalize_length,
            "regularize": self.regularize_length if self.penalty != "none" else None,
        }
        lengths = {stage: max(1, round(share * total)) if share else 0 for stage, share in shares.items()}
        lengths["finalize"] = max(1, lengths["finalize"])
        if self.pool == "dynamic":
            lengths["pool"] = max(1, lengths["pool"])
        if self.hard_prune is not None:
            lengths["regularize"] = int(self.penalty != "none")
            end = min(max(round(self.hard_prune * total), sum(lengths.values()) + 1), end)
        needed = sum(lengths.values())
        latest = min(max(1, round((self.latest_start or 0) * total)), end - needed)
        if latest < 1:
            raise UserError(
                f"a run of {total} batches is too short for the stages of ClickTrain, which need "
                f"{needed + 2} here: give more epochs or a smaller batch_size"
            )
        earliest = min(latest, max(1, round((self.earliest_start or 0) * total)))
        if self.hard_prune is not None:
            lengths["hard_prune"] = end
        return {"earliest": earliest, "latest": latest, **lengths}

    @property
    def stable_from(self) -> float:
        """EPI from which the structure is stable (trigger epi)."""
        return self.tau(self.criterion or "taylor")

    def epi_epochs(self, length: RunLength) -> int:
        """Past epochs that a structure is compared with (trigger epi)."""
        return self.window(self.schedule(length)["latest"] // length.steps_per_epoch)


def stage_end(stage: str, entered: int, lengths: Mapping[str, int]) -> int:
    """Batches seen when a stage, 2 to 4, is over that was entered after ``entered``; see `schedule`."""
    return max(entered + lengths[stage], lengths.get("hard_prune", 0) if stage == "regularize" else 0)
