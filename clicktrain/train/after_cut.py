"""What a run does once masks are frozen: norms, averages and the learning rate begin again.

All of it happens between two optimizer steps, so that a checkpoint holds all or nothing of it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.comm.agreement import mean_over_processes
from clicktrain.comm.sync_batch_norm import run_together
from clicktrain.data import Batch
from clicktrain.runs.events import HardPruneEvent, NormsEvent, RestartEvent
from clicktrain.sparsity.masks import sparsity_of
from clicktrain.train.averages import begin_again_
from clicktrain.train.device import autocast, seed_batch
from clicktrain.train.loss import guessing_loss, training_loss
from clicktrain.train.norms import measure_norms_, norms_kept, norms_of
from clicktrain.train.second_cycle import DAMAGE_BATCHES, SecondCycle, damage_by_loss, damage_by_norm
from clicktrain.train.training_run import TrainingRun


def after_cut(run: TrainingRun) -> None:
    """Masks were frozen by the optimizer's step; the scheduler has not been stepped yet."""
    p = run.prepared
    if p.config.recalibrate_norms:
        recalibrate_(run, p.model, epoch=run.state.epoch)
    if run.average is not None:
        begin_again_(run.average, p.model)
    if p.cycle is not None:
        _restart(run, p.cycle)


def _restart(run: TrainingRun, cycle: SecondCycle) -> None:
    p = run.prepared
    rule = p.config.second_cycle
    about: dict[str, Any] = {}
    if rule == "norm":
        about = {"damage": _damage_by_norm(run)}
    elif rule == "loss":
        before, after = _losses(run, cycle)
        damage = damage_by_loss(before, after, guessing_loss(p.config, p.facts["num_classes"]))
        about = {"damage": damage, "loss_before": before, "loss_after": after}
    step = p.batch_sizes.schedule_step(p.scheduler.last_epoch + 1)
    planned = cycle.planned_epoch
    height = cycle.restart(step, about.get("damage", 0.0))
    name = rule if isinstance(rule, str) else "fixed"
    run.record(RestartEvent(height=height, rule=name, planned_epoch=planned, **about))


def _damage_by_norm(run: TrainingRun) -> float:
    events = [event for event in run.prepared.pruner.events if event["event"] == HardPruneEvent.kind]
    energy = events[-1]["energy_outside"] if events else 0.0
    return damage_by_norm(energy, sparsity_of(run.prepared.pruner.masks))


def _losses(run: TrainingRun, cycle: SecondCycle) -> tuple[float, float]:
    """Mean loss of the last batches as they were trained on, and with frozen masks."""
    p, state = run.prepared, run.state
    count = min(DAMAGE_BATCHES, state.batch, len(cycle.state.losses))
    first = state.batch - count
    after, images = 0.0, 0
    with torch.no_grad(), norms_kept(p.model):
        batches = p.train_loader.epoch(state.epoch, first)
        for number, batch in enumerate(itertools.islice(batches, count), start=first):
            drawn = p.batch_sizes.batch_number(state.epoch, number)
            loss = torch.zeros((), device=p.device)
            for piece, _, share in run.pieces(batch, drawn):
                loss += training_loss(run, piece)[0] * share
            after += mean_over_processes(loss).item()
            images += p.batch_images
    run.state.train_flops += p.cost.forward_now * images
    run.state.add_nominal(p.cost.forward_now * images)
    return sum(cycle.state.losses[-count:]) / count, after / count


def recalibrate_(run: TrainingRun, model: nn.Module, *, epoch: int) -> None:
    """Measure the batch norm statistics of the network, or of its average, again; counted in FLOPs.

    On the first batches of an epoch, which need not be one of the run.
    """
    p = run.prepared
    images = _measure(run, model, epoch)
    flops = p.cost.forward_now * images
    run.state.train_flops += flops
    run.state.add_nominal(flops)
    event = NormsEvent(batches=p.config.recalibrate_norms, images=images, train_flops=flops)
    run.record(event)


@contextlib.contextmanager
def recalibrated(run: TrainingRun) -> Iterator[nn.Module]:
    """The model that is evaluated; an average has newly measured norms inside the block, if it is to.

    Training does not see them: what is trained must not depend on how often a run is evaluated.
    """
    if run.average is None or not run.prepared.config.recalibrate_norms:
        yield run.evaluated_model
        return
    model = run.evaluated_model
    with norms_kept(model):
        _measure(run, model, run.prepared.config.epochs)
        yield model


def _measure(run: TrainingRun, model: nn.Module, epoch: int) -> int:
    p = run.prepared

    def forward(x: Tensor) -> Any:
        with autocast(p.device, p.config.precision):
            return (run.forward.current if model is p.model else model)(x)

    count = p.config.recalibrate_norms
    with run_together(p.norm_group) if p.norms_shared else contextlib.nullcontext():
        measure_norms_(model, _images(run, epoch, count), forward)
    # Every part counts the same, and those who share one have its statistics.
    weight = len(p.part.own) / len(p.part.sharers) * p.processes.number / p.part.number
    for norm in norms_of(model):
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            mean_over_processes(statistic if weight == 1 else statistic.mul_(weight))
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(count)  # of all parts
    return count * p.batch_images


def _images(run: TrainingRun, epoch: int, count: int) -> Iterator[Tensor]:
    """Training images of some batches from the start of an epoch, and of those after it, part by part."""
    p = run.prepared
    epochs = map(p.train_loader.epoch, itertools.count(epoch))
    batches: Iterator[Batch] = itertools.chain.from_iterable(epochs)
    first = p.part.rows(p.batch_images).start
    for number, batch in enumerate(itertools.islice(batches, count)):
        for rows, stream in zip(p.part.pieces(p.batch_images), p.part.streams, strict=True):
            seed_batch(p.config.seed, number, p.device, stream)  # dropout
            yield batch.x[rows.start - first : rows.stop - first]
