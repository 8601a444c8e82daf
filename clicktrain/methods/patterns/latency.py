"""A time as ClickTrain's target: kernels are allocated over layers by what they cost as measured.

When to Prune? (section 4.3) weighs importance against the time that pruning saves, for channels. Here it is
kernels per filter: importance kept is bought with milliseconds, in tables of the sparse operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clicktrain.comm.agreement import agreed
from clicktrain.errors import UserError
from clicktrain.graph import Inputs, as_inputs
from clicktrain.graph.batch import blank, first_of_batch, first_tensor
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.kernels.native import keep_memory, missing_toolchain, toolchain
from clicktrain.kernels.sparse_conv2d import refusal
from clicktrain.latency.allocation import allocate_within, least_compression_within
from clicktrain.latency.channels import ROUNDS, SECONDS, Measured, bare_copy
from clicktrain.latency.search import next_aim
from clicktrain.latency.sparse_times import SparseGeometry, Timed, sparse_times
from clicktrain.latency.timer import clock_of, timed_for
from clicktrain.methods.patterns.selection import Target
from clicktrain.sparsity.allocation import allocate

TOLERANCE = 0.05
"""A latency is met within so much of it."""
ATTEMPTS = 6
"""Networks that are measured at most; where operators change from one to the next, times jump."""
_CPU = torch.device("cpu")


class MeasureMasks(Protocol):
    """Measures the network with masks beside the dense one; made above the methods, where compilers are."""

    def __call__(self, masks: Mapping[str, Tensor], batch: int, timed: Timed) -> Measured:
        """Milliseconds of both.

        Args:
            masks: layer name -> bool [F, C, R, S], True = kept.
            batch: images.
            timed: ``inference``, or a training ``step`` without the optimizer's part.
        """
        ...


@dataclass(frozen=True, slots=True)
class LatencyAim:
    """What is asked for: a share of the dense network's time or milliseconds per batch; one is None."""

    ratio: float | None
    ms: float | None
    batch: int
    timed: Timed

    def reached(self, measured: Measured) -> float:
        """Measured over asked for."""
        return measured.pruned_ms / self.ms if self.ms is not None else measured.ratio / (self.ratio or 1.0)


@dataclass(frozen=True, slots=True)
class Allocation:
    """Kept kernels per filter of every layer and the time that they are predicted to take."""

    kernels: dict[str, int]
    predicted_ms: float


class SparseLatency:
    """Predicts the time of a network from the kept kernels per filter of each layer.

    The time of a layer is that of its faster operator, dense or sparse. What the network takes beyond them is
    what the network with one kernel per filter, accelerated and measured, takes beyond its layers; where
    nobody can measure that, what the dense one does.

    Attributes:
        aim: what is asked for.
        dense_ms: the dense network, measured.
        target_ms: milliseconds to end at.
    """

    def __init__(
        self, prunable: PrunableLayers, targets: Sequence[Target], patterns: int, aim: LatencyAim
    ) -> None:
        """Measure what is not known yet.

        Raises:
            UserError: the target is below what one kernel per filter takes.
        """
        model, example = _check(prunable)
        floor: Measured | None = None
        self.aim = aim
        self._budgets = [target.budget for target in targets]
        self._other = prunable.other_conv_weights
        keep_memory()  # as accelerated networks do: else what is timed is how the system hands out pages
        with torch.random.fork_rng(devices=[]):
            geometries = _geometries(model, example, targets, patterns, aim)
            known = sparse_times(geometry for of_layer in geometries.values() for geometry in of_layer)
            if prunable.measure is not None:
                masks = _least_masks(targets, geometries)
                floor = prunable.measure(masks, aim.batch, aim.timed).agreed(_CPU)
                self.dense_ms = floor.dense_ms  # they took turns: what else the machine does hits both
            else:
                times = network_times({"dense": bare_copy(model)}, example, aim.batch, aim.timed)["dense"]
                (self.dense_ms,) = agreed([min(times)], _CPU)
        tables = {name: [known[geometry] for geometry in of_layer] for name, of_layer in geometries.items()}
        self._times = {
            t.layer.name: [sum(table.at(k) for table in tables[t.layer.name]) for k in _counts(t)]
            for t in targets
        }
        dense = sum(table.dense_ms for found_tables in tables.values() for table in found_tables)
        self._rest_ms = max(self.dense_ms - dense, 0.0)
        self.target_ms = aim.ms if aim.ms is not None else (aim.ratio or 1.0) * self.dense_ms
        fewest = {b.name: b.fixed or 1 for b in self._budgets}
        least = self.predict(fewest)
        too_slow = self.target_ms < (1 - 2 * TOLERANCE) * least
        if floor is not None:
            self._rest_ms = max(floor.pruned_ms - (least - self._rest_ms), 0.0)
            least, too_slow = floor.pruned_ms, aim.reached(floor) > 1 + TOLERANCE
        if too_slow:
            raise UserError(
                f"a latency of {self.target_ms:.3g} ms cannot be met by this network: with one kernel per "
                f"filter it takes about {least:.3g} ms, dense {self.dense_ms:.3g} ms a batch of {aim.batch} "
                "(ask for a larger one, larger batches, fewer entries, or a smaller network)"
            )

    def predict(self, kernels: Mapping[str, int]) -> float:
        """Milliseconds with so many kernels per filter."""
        return self._rest_ms + sum(self._times[name][count - 1] for name, count in kernels.items())

    def even(self, ms: float | None = None) -> tuple[float, dict[str, int]]:
        """The compression at which equal densities take so long (by default the target); their kernels."""
        ms = self.target_ms if ms is None else ms
        return least_compression_within(self._budgets, self._other, self.predict, ms)

    def allocate(
        self, ms: float, gains: Mapping[str, Tensor] | None, by_time: bool, floor: float
    ) -> Allocation:
        """Kernels per filter that are predicted to take ``ms``.

        Args:
            ms: of the network.
            gains: per layer [C], worth of the 1st, 2nd, ... kernel of every filter; None: equal densities.
            by_time: buy gains with milliseconds; else with weights, as many as the time allows.
            floor: every layer keeps at least this share of what equal densities give it in that time.
        """
        if gains is None:
            kernels = self.even(ms)[1]
        elif by_time:
            even = self.even(ms)[1]
            least = {name: max(1, math.floor(floor * count)) for name, count in even.items()}
            worth = {name: gain.tolist() for name, gain in gains.items()}
            kernels = allocate_within(self._budgets, self._times, worth, ms - self._rest_ms, least)
        else:
            _, kernels = least_compression_within(
                self._budgets,
                self._other,
                self.predict,
                ms,
                lambda ratio: allocate(self._budgets, self._other, ratio, gains, floor=floor),
            )
        return Allocation(kernels, self.predict(kernels))

    def search(
        self,
        allocated: Callable[[float], Allocation],
        masks: Callable[[Mapping[str, int]], dict[str, Tensor]],
        measure: MeasureMasks | None,
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """The allocation that meets the target, as measured if that is possible.

        Args:
            allocated: predicted milliseconds -> an allocation.
            masks: kernels per filter -> the masks.
            measure: of the network with masks; None: the prediction is believed.

        Returns:
            Kernels per filter, and what to write down.
        """
        aim, now = self.target_ms, allocated(self.target_ms)
        if measure is None:
            return now.kernels, self._about(now, None, 0)
        tried: list[tuple[Allocation, Measured]] = []
        while len(tried) < ATTEMPTS and all(now.kernels != other.kernels for other, _ in tried):
            with torch.random.fork_rng(devices=[]):
                measured = measure(masks(now.kernels), self.aim.batch, self.aim.timed).agreed(_CPU)
            tried.append((now, measured))
            if abs(self.aim.reached(measured) - 1) <= TOLERANCE:
                break
            aim = aim_after([(a.predicted_ms, self.aim.reached(m)) for a, m in tried])
            now = allocated(aim)
        best, measured = min(tried, key=lambda one: abs(math.log(self.aim.reached(one[1]))))
        return best.kernels, self._about(best, measured, len(tried))

    def _about(self, chosen: Allocation, measured: Measured | None, attempts: int) -> dict[str, Any]:
        error = None if measured is None else self.aim.reached(measured) - 1
        dense_ms = self.dense_ms if measured is None else measured.dense_ms
        target_ms = self.aim.ms if self.aim.ms is not None else (self.aim.ratio or 1.0) * dense_ms
        return {
            "latency_batch": self.aim.batch,
            "latency_of": self.aim.timed,
            "latency_target_ms": target_ms,
            "predicted_ms": chosen.predicted_ms,
            "measured_ms": None if measured is None else measured.pruned_ms,
            "dense_ms": dense_ms,
            "latency_ratio": None if measured is None else measured.ratio,
            "latency_error": error,
            "latency_met": None if error is None else abs(error) <= TOLERANCE,
            "attempts": attempts,
        }


def aim_after(tried: Sequence[tuple[float, float]]) -> float:
    """Where to go on: between the nearest network that is too slow and the nearest that is not.

    Where there are not both, or they contradict each other, as `next_aim`. Predictions are not wrong by
    a factor alone: whole networks convert layouts and fuse steps.

    Args:
        tried: predicted milliseconds of what was measured, and measured / target; at least one.

    Example:
        >>> aim_after([(10.0, 1.5), (6.0, 0.5)])
        8.0
    """
    slow = min((one for one in tried if one[1] > 1), default=None)
    fast = max((one for one in tried if one[1] <= 1), default=None)
    if slow is None or fast is None or fast[0] >= slow[0]:
        return next_aim(tried)
    share = (1 - fast[1]) / (slow[1] - fast[1])
    return fast[0] + min(max(share, 0.1), 0.9) * (slow[0] - fast[0])


def _check(prunable: PrunableLayers) -> tuple[nn.Module, Any]:
    """The network and an input; a UserError unless the sparse kernels run here and both are known."""
    model, example = prunable.model, prunable.example
    assert model is not None
    wrong = {str(p.device) for p in model.parameters() if p.device.type != "cpu"}
    why = (
        f"the network is on {min(wrong)}"
        if wrong
        else missing_toolchain().rpartition(":")[0]
        if toolchain() is None
        else ""
    )
    if why:
        raise UserError(
            f"a latency as ClickTrain's target needs the sparse kernels, which run on CPUs and are built by "
            f"a C compiler, but {why}: give a compression instead"
        )
    if example is None:
        raise UserError(
            "a latency as the target needs the size of the images: give attach an example, e.g. "
            "example=torch.zeros(1, 3, 32, 32)"
        )
    return model, example


def network_times(
    models: Mapping[str, nn.Module], example: Any, batch: int, timed: Timed, seconds: float = SECONDS
) -> dict[str, list[float]]:
    """Milliseconds of networks that take turns, in each round.

    Args:
        models: copies that measuring may change; they are put into the mode that is timed.
        example: input of one image or more, whose size counts.
        batch: images.
        timed: ``inference`` in evaluation mode, or the forward and backward pass of a training ``step``.
        seconds: for about so long.
    """
    inputs = blank(as_inputs(example), batch)
    calls = {name: network_call(model, inputs, timed) for name, model in models.items()}
    return timed_for(calls, seconds, ROUNDS, clock=clock_of(first_tensor(inputs).device))


def network_call(model: nn.Module, inputs: Inputs, timed: Timed) -> Callable[[], object]:
    """What is timed of a network."""
    model.train(timed == "step")
    trained = [p for p in model.parameters() if p.requires_grad]

    def infer() -> None:
        with torch.no_grad():
            inputs.call(model)

    def step() -> None:
        with torch.enable_grad():
            y = inputs.call(model)
            if not isinstance(y, Tensor):
                raise UserError("the time of a step is measured of networks that return one tensor")
            torch.autograd.grad(y, trained, torch.ones_like(y), allow_unused=True)

    return step if timed == "step" else infer


def _counts(target: Target) -> range:
    return range(1, target.layer.shape[1] + 1)


def _geometries(
    model: nn.Module, example: Any, targets: Sequence[Target], patterns: int, aim: LatencyAim
) -> dict[str, list[SparseGeometry]]:
    """What the time of every layer depends on, once for each call of it."""
    images = _image_sizes(model, example, [target.layer.name for target in targets])
    wanted: dict[str, list[SparseGeometry]] = {}
    for target in targets:
        conv = target.layer.module
        assert isinstance(conv, nn.Conv2d)
        # Where it stays dense its time is not to be saved.
        sizes = [] if refusal(conv) else images[target.layer.name]
        wanted[target.layer.name] = [
            SparseGeometry.of(conv, size, entries=target.entries, patterns=patterns, together=target.group,
                              batch=aim.batch, timed=aim.timed)
            for size in sizes
        ]  # fmt: skip
    return wanted


def _least_masks(
    targets: Sequence[Target], geometries: Mapping[str, Sequence[SparseGeometry]]
) -> dict[str, Tensor]:
    """As few kernels per filter as there can be, anywhere. Layers that cannot be packed have no mask."""
    masks = {}
    for target in targets:
        if geometries[target.layer.name]:
            count = target.budget.fixed or 1
            masks[target.layer.name] = geometries[target.layer.name][0].masks((count,))[count]
    return masks


def _image_sizes(model: nn.Module, example: Any, names: Sequence[str]) -> dict[str, list[tuple[int, int]]]:
    """[H, W] of what layers read, call by call."""
    sizes: dict[str, list[tuple[int, int]]] = {name: [] for name in names}
    replica = bare_copy(model).eval()

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def see(module: nn.Module, args: Any) -> None:
            sizes[name].append((args[0].shape[-2], args[0].shape[-1]))

        return see

    for name in names:
        replica.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        first_of_batch(as_inputs(example, model), 1).call(replica)
    return sizes
