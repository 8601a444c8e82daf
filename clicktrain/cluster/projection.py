"""What the exchange of a run would cost on a cluster, from the sizes that the run has recorded itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clicktrain.cluster.links import Cluster
from clicktrain.cluster.overlap import (
    Iteration,
    Message,
    Profile,
    equal_messages,
    iterate,
    split_into_buckets,
)
from clicktrain.cluster.ring import allreduce_seconds, sent_bytes
from clicktrain.errors import UserError

Source = Literal["counted", "gradients", "masks"]
"""Where the bytes of an iteration are from: see `Exchanged.source`."""


@dataclass(frozen=True)
class Exchanged:
    """What an iteration of one epoch exchanges, and what it computes.

    Attributes:
        epoch: from 1.
        num_bytes: that every GPU hands to the allreduce in an iteration.
        dense_bytes: the same of the network before anything was pruned.
        calls: messages of an iteration where a run counted them, else None.
        source: where ``num_bytes`` is from: counted at the collective of a run of several processes, the
            gradients of all stored parameters, or those that frozen masks keep.
        images: of the epoch.
        batch: images of an iteration, that is a step of the optimizer, in one process.
        step_ms: measured time of that, None if there is none.
        flops, dense_flops: of training on one image, as executed and dense; None if unknown.
    """

    epoch: float
    num_bytes: float
    dense_bytes: float
    calls: float | None
    source: Source
    images: int
    batch: float
    step_ms: float | None
    flops: float | None
    dense_flops: float | None


@dataclass(frozen=True)
class EpochCost:
    """One epoch on a cluster; bytes are those that a GPU sends.

    Attributes:
        steps: iterations of an epoch; a fraction where the data set is less than one batch of all GPUs.
        dense_steps: those of dense training, whose batches stay those of the first epoch.
        run, dense: an iteration of the run, and one of dense training.
        all_gradients: the run's computation with all gradients of the dense network (ClickTrain's figure 13).
    """

    epoch: float
    source: Source
    steps: float
    dense_steps: float
    bytes_step: float
    dense_bytes_step: float
    run: Iteration
    dense: Iteration
    all_gradients: Iteration

    @property
    def bytes_epoch(self) -> float:
        """Bytes that a GPU sends in the epoch."""
        return self.bytes_step * self.steps

    @property
    def seconds(self) -> float:
        """Seconds of the epoch."""
        return self.run.seconds * self.steps


@dataclass(frozen=True)
class Projection:
    """All epochs of a run on a cluster.

    Attributes:
        dense_known: whether the time of a dense step is known: by FLOPs, or measured in this run or another.
            Else the first epoch, which was pruned already, stands in for it.
    """

    cluster: Cluster
    epochs: tuple[EpochCost, ...]
    dense_known: bool

    @property
    def bytes_saved(self) -> float:
        """Share of the bytes of an iteration that is saved, mean over the epochs (PruneTrain 5.3: 55%)."""
        return 1 - _mean([cost.bytes_step / cost.dense_bytes_step for cost in self.epochs])

    @property
    def bytes_saved_run(self) -> float:
        """Share of the bytes of the whole run that is saved; larger batches save more than `bytes_saved`.

        Against the dense network in batches of the first epoch.
        """
        dense = sum(cost.dense_bytes_step * cost.dense_steps for cost in self.epochs)
        return 1 - sum(cost.bytes_epoch for cost in self.epochs) / dense if dense else 0.0

    @property
    def exchange_saved(self) -> float:
        """Share of the exchange's time of an iteration that the last epoch saves (ClickTrain 6.4: 21-31%)."""
        last = self.epochs[-1]
        return 1 - last.run.exchange / last.dense.exchange if last.dense.exchange else 0.0

    @property
    def exposed_saved(self) -> float:
        """The same of the time that an iteration waits for."""
        last = self.epochs[-1]
        return 1 - last.run.exposed / last.all_gradients.exposed if last.all_gradients.exposed else 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the run."""
        return sum(cost.seconds for cost in self.epochs)

    @property
    def dense_seconds(self) -> float:
        """Seconds of as many epochs of dense training, in batches of the first epoch."""
        return sum(cost.dense.seconds * cost.dense_steps for cost in self.epochs)


def recorded(
    metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None, accumulate: int = 1
) -> list[Exchanged]:
    """Read what each epoch of a run exchanges from its lines of metrics.

    ``accumulate``: batches of a step of the optimizer; a line's times and sizes are those of one.

    A run of several processes has counted bytes and calls at the collective, those of gradients are taken.
    Others have the bytes of the gradients of their stored parameters (packed layers store kept ones only);
    once masks are frozen, those of layers that are not packed count by the positions that they keep.

    Raises:
        UserError: no epoch with such sizes.
    """
    lines = [line for line in metrics if _number(line, "gradient_bytes") and _number(line, "batch_size")]
    if not lines:
        raise UserError(
            "the run has no finished epoch with the bytes of its gradients: finish one, or train with a "
            "newer version"
        )
    facts = summary or {}
    first = _number(lines[0], "gradient_bytes") or 0.0
    whole = _number(facts, "dense_parameters")
    dense = first if (_number(lines[0], "density") or 1.0) >= 1.0 or whole is None else max(first, 4 * whole)
    frozen = _number(facts, "hard_prune_epoch")
    flops_before, dense_before = 0.0, 0.0
    found = []
    for line in lines:
        epoch, batch = _number(line, "epoch") or 0.0, accumulate * (_number(line, "batch_size") or 1.0)
        step_ms = _number(line, "step_ms_median")
        gradients = _number(line, "gradient_bytes") or 0.0
        steps = (_number(line, "gradient_bytes_epoch") or gradients) / gradients
        size, calls, source = _size(line, facts, frozen is not None and epoch - 1 >= frozen)
        flops, dense_flops = (_number(line, key) or 0.0 for key in ("train_flops", "train_flops_dense"))
        images = round(steps * batch)
        found.append(
            Exchanged(
                epoch=epoch,
                num_bytes=size,
                dense_bytes=dense,
                calls=calls,
                source=source,
                images=images,
                batch=batch / (_number(line, "processes") or 1.0),
                step_ms=None if step_ms is None else accumulate * step_ms,
                flops=max(flops - flops_before, 0.0) / images or None,
                dense_flops=max(dense_flops - dense_before, 0.0) / images or None,
            )
        )
        flops_before, dense_before = flops, dense_flops
    return found


def _size(
    line: Mapping[str, Any], facts: Mapping[str, Any], frozen: bool
) -> tuple[float, float | None, Source]:
    """Bytes of an iteration, its messages if they were counted, and where that is from."""
    counted, steps = line.get("exchange"), _number(line, "exchange_steps")
    if isinstance(counted, Mapping) and steps:
        rows = [row for purpose, row in counted.items() if purpose in ("gradients", "growth")]
        sums = [sum(_number(row, key) or 0.0 for row in rows) for key in ("bytes", "calls")]
        if sums[0] and sums[1]:
            return sums[0] / steps, sums[1] / steps, "counted"
    stored = _number(line, "gradient_bytes") or 0.0
    density, parameters = _number(line, "density"), _number(line, "parameters")
    whole, convs = _number(facts, "dense_parameters"), _number(facts, "conv_weights")
    if frozen and density is not None and parameters and whole and convs:
        itemsize = stored / parameters
        kept = itemsize * (whole - (1 - density) * convs)
        if kept < 0.999 * stored:
            return kept, None, "masks"
    return stored, None, "gradients"


def profile_of(summary: Mapping[str, Any] | None, *, dense: bool) -> list[tuple[float, float]]:
    """Bytes and backward cost of the layers of a finished run, from the last one on; empty without them."""
    rows = [row for row in (summary or {}).get("layers") or () if isinstance(row, Mapping)]
    layers = []
    for row in reversed(rows):
        shape = row.get("shape")
        weights = math.prod(shape) if isinstance(shape, list | tuple) and shape else 0
        cost = _number(row, "forward_flops_dense" if dense else "forward_flops") or 0.0
        layers.append((4.0 * weights * (1.0 if dense else _number(row, "density") or 0.0), cost))
    return layers


def project(
    metrics: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any] | None,
    cluster: Cluster,
    *,
    batch: int | None = None,
    tflops: float | None = None,
    dense_step_ms: float | None = None,
    accumulate: int = 1,
) -> Projection:
    """Project a run onto a cluster.

    Args:
        metrics, summary: of the run's folder.
        batch: images of a GPU in an iteration; None: those of a process in the run, epoch by epoch.
        tflops: what a GPU computes, in 1e12 floating point operations a second; None: steps take as long as
            the run measured, in proportion to the batch.
        dense_step_ms: measured time of the run's first batch on the dense network; None: the run's own dense
            steps, or those of its first epoch.
        accumulate: batches of a step of the optimizer in the run's settings; only the last one's backward
            pass hides the exchange.

    Raises:
        UserError: the run has not recorded what is needed.
    """
    epochs = recorded(metrics, summary, accumulate)
    kept_profile, dense_profile = (profile_of(summary, dense=dense) for dense in (False, True))
    dense_image = (
        None if tflops is not None else _dense_image_seconds(epochs, summary, dense_step_ms, accumulate)
    )
    dense_known = (
        tflops is not None
        or (dense_step_ms or _own_dense_step(summary)) is not None
        or epochs[0].num_bytes >= epochs[0].dense_bytes
    )
    costs = []

    @functools.lru_cache(maxsize=4096)  # many epochs exchange the same
    def seconds_of(num_bytes: float) -> float:
        return allreduce_seconds(num_bytes, cluster)

    def step(messages: Sequence[Message], seconds: float) -> Iteration:
        return iterate(messages, seconds, seconds_of, accumulate)

    for one in epochs:
        images, dense_images = float(batch or one.batch), float(batch or epochs[0].batch)
        compute = images * _image_seconds(one, tflops)
        dense_compute = dense_images * (
            _by_flops(one.dense_flops, tflops) if dense_image is None else dense_image
        )
        pruned = one.num_bytes < one.dense_bytes
        own_profile: Profile = kept_profile if pruned else dense_profile
        own = (
            split_into_buckets(one.num_bytes, own_profile)
            if one.calls is None
            else equal_messages(one.num_bytes, max(round(one.calls), 1), own_profile)
        )
        all_messages = split_into_buckets(one.dense_bytes, dense_profile)
        costs.append(
            EpochCost(
                epoch=one.epoch,
                source=one.source,
                steps=one.images / (images * cluster.gpus),
                dense_steps=one.images / (dense_images * cluster.gpus),
                bytes_step=sent_bytes(one.num_bytes, cluster),
                dense_bytes_step=sent_bytes(one.dense_bytes, cluster),
                run=step(own, compute),
                dense=step(all_messages, dense_compute),
                all_gradients=step(all_messages, compute),
            )
        )
    return Projection(cluster, tuple(costs), dense_known)


def _image_seconds(one: Exchanged, tflops: float | None) -> float:
    """Seconds of a step for each image."""
    if tflops is not None:
        return _by_flops(one.flops, tflops)
    if one.step_ms is None:
        raise UserError("the run has no measured steps: say what a GPU computes by tflops")
    return one.step_ms / 1e3 / one.batch


def _by_flops(flops: float | None, tflops: float | None) -> float:
    if not flops or not tflops:
        raise UserError("the run has not recorded its FLOPs: leave tflops out, and its measured steps count")
    return flops / (tflops * 1e12)


def _dense_image_seconds(
    epochs: Sequence[Exchanged], summary: Mapping[str, Any] | None, given: float | None, accumulate: int
) -> float:
    """Measured seconds of a dense step for each image."""
    batch_ms = given or _own_dense_step(summary)
    step_ms = epochs[0].step_ms if batch_ms is None else accumulate * batch_ms
    if step_ms is None:
        raise UserError("the run has no measured steps: say what a GPU computes by tflops")
    return step_ms / 1e3 / epochs[0].batch


def _own_dense_step(summary: Mapping[str, Any] | None) -> float | None:
    """Median milliseconds of the dense steps of a finished run."""
    steps = (summary or {}).get("step_ms")
    return _number(steps, "dense") if isinstance(steps, Mapping) else None


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
