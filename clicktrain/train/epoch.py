"""One epoch: its steps, and what is written down at its end."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.data import Batch, mixup
from clicktrain.errors import NetworkCollapsed
from clicktrain.train.device import autocast, seed_batch
from clicktrain.train.divergence import LossWatch, diverged, explosion
from clicktrain.train.evaluate import Evaluation, evaluate
from clicktrain.train.interrupt import StopRequest, TrainingInterrupted
from clicktrain.train.live import LiveRun
from clicktrain.train.minibatch import next_epoch
from clicktrain.train.optim import trained_parameters
from clicktrain.train.progress import StepProgress
from clicktrain.train.state import EpochTotals

_READ_EVERY = 20
"""Batches between two readings of the loss from an accelerator, which wait for it."""


def train_epoch(run: LiveRun, stop: StopRequest) -> None:
    """Train on the batches of the running epoch that are still to come.

    Raises:
        TrainingDiverged: see `explosion`.
        TrainingInterrupted: a signal came; a checkpoint was written after the current optimizer step.
    """
    p, course = run.prepared, run.course
    batches = len(p.train_loader)
    clock = _Clock(run)
    watch = LossWatch(1 if p.device.type == "cpu" else _READ_EVERY, clock.report)
    p.model.train()
    for batch in _timed(run, stop):
        first = course.batch - course.batch % p.config.accumulate
        group = min(p.config.accumulate, batches - first)
        seed_batch(p.config.seed, p.batch_sizes.batch_number(course.epoch, course.batch), p.device)
        course.totals.stages[p.pruner.stage] = course.totals.stages.get(p.pruner.stage, 0) + 1
        course.train_flops += p.cost.now * len(batch.y)
        course.train_flops_dense += p.cost.dense * len(batch.y)
        loss, correct = _forward(run, batch)
        run.scaler.scale(loss / group).backward()  # type: ignore[no-untyped-call]
        p.pruner.observe(loss)
        course.batch += 1
        step_done = course.batch - first == group
        if step_done:
            _step(run)
        clock.images += len(batch.y)
        if watch.add(loss, correct):
            run.progress.step(_step_info(run))
        if step_done and stop.requested:
            watch.flush()
            raise _interrupted(run, stop)
    watch.flush()


def _forward(run: LiveRun, batch: Batch) -> tuple[Tensor, Tensor]:
    """Loss with its graph, and the number of right answers; both 0-dim."""
    config, device = run.prepared.config, run.prepared.device
    x, target = batch.x, batch.y
    with autocast(device, config.precision):
        if config.mixup:
            generator = torch.Generator().manual_seed(torch.initial_seed())  # seeded for this batch
            x, target = mixup(x, batch.y, run.prepared.facts["num_classes"], config.mixup, generator)
        output = run.forward(x)
        loss = F.cross_entropy(output.float(), target, label_smoothing=config.label_smoothing)
    return loss, (output.detach().argmax(dim=1) == batch.y).sum()


def _step(run: LiveRun) -> None:
    """One step of the optimizer, and of all that follows it."""
    p = run.prepared
    if p.config.clip_grad_norm:
        run.scaler.unscale_(p.optimizer)
        torch.nn.utils.clip_grad_norm_(trained_parameters(p.optimizer), p.config.clip_grad_norm)
    run.course.totals.learning_rate = p.optimizer.param_groups[0]["lr"]
    run.scaler.step(p.optimizer)
    run.scaler.update()
    p.optimizer.zero_grad()
    with warnings.catch_warnings():
        if run.scaler.is_enabled():  # a first step skipped for overflow is no mistake in the order of calls
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        p.scheduler.step()
    run.follow_pruner()
    if run.average is not None:
        run.average.update_parameters(p.model)
    run.course.step += 1


def _timed(run: LiveRun, stop: StopRequest) -> Iterator[Batch]:
    """The batches still to come, with the time spent waiting for them."""
    p, course = run.prepared, run.course
    if course.batch >= len(p.train_loader):
        return  # interrupted while evaluating: the epoch is only to be ended
    batches = iter(p.train_loader.epoch(course.epoch, course.batch))
    while True:
        before = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception:
            # Ctrl-C reaches loading processes too, and they may be gone before this one sees the signal.
            if stop.requested and course.batch % p.config.accumulate == 0:
                raise _interrupted(run, stop) from None
            raise
        course.totals.data_seconds += time.perf_counter() - before
        yield batch


class _Clock:
    """Adds up what is read from the device, and the time it took."""

    def __init__(self, run: LiveRun) -> None:
        self.run = run
        self.images = 0
        self.since = time.perf_counter()

    def report(self, losses: list[float], correct: list[int]) -> None:
        """Take the losses and right answers of the last batches; raises TrainingDiverged."""
        course, totals = self.run.course, self.run.course.totals
        for loss in losses:
            totals.batches += 1
            course.first_loss = loss if course.first_loss is None else course.first_loss
            what = explosion(loss, course.first_loss)
            if what is not None:
                raise diverged(what, course.epoch + 1, totals.batches, self.run.newest_checkpoint())
            totals.loss_sum += loss
        totals.correct += sum(correct)
        totals.images, self.images = totals.images + self.images, 0
        now = time.perf_counter()
        totals.seconds += now - self.since
        totals.window_ms.append(1000 * (now - self.since) / len(losses))
        self.since = now


def _interrupted(run: LiveRun, stop: StopRequest) -> TrainingInterrupted:
    """Write a checkpoint, and make the exception that ends the run."""
    path = run.save()
    assert stop.signum is not None
    course, batches = run.course, len(run.prepared.train_loader)
    command = run.folder.resume_command(run.prepared.config, run.prepared.pruner.method)
    return TrainingInterrupted(
        stop.signum,
        f"stopped in epoch {course.epoch + 1} after batch {course.batch} of {batches}; "
        f"state saved in {path}; continue with '{command}'",
    )


def _step_info(run: LiveRun) -> StepProgress:
    p, course, totals = run.prepared, run.course, run.course.totals
    batches = len(p.train_loader)
    return StepProgress(
        epoch=course.epoch + 1,
        epochs=p.config.epochs,
        batch=course.batch,
        batches=batches,
        step=course.step,
        stage=p.pruner.stage,
        loss=totals.loss,
        accuracy=totals.accuracy,
        density=run.density,
        learning_rate=totals.learning_rate,
        seconds=run.seconds,
        eta_seconds=run.eta_seconds,
        data_share=totals.data_seconds / max(totals.seconds, 1e-9),
    )


def end_epoch(run: LiveRun, stop: StopRequest) -> None:
    """Evaluate, write the line of the epoch down, and a checkpoint when one is due.

    Raises:
        TrainingInterrupted: a signal came during evaluation; resuming evaluates again.
        NetworkCollapsed: pruning has destroyed the network; no checkpoint of it is written.
    """
    p, course, config = run.prepared, run.course, run.prepared.config
    p.pruner.check_zeros()
    p.pruner.check_alive()
    if course.epoch == 0:
        course.first_loss = course.totals.loss
    number, last = course.epoch + 1, course.epoch + 1 == config.epochs
    result: Evaluation | None = None
    if last or number % config.evaluate_every == 0:
        result = evaluate(
            run.evaluated_model,
            p.val_loader,
            device=p.device,
            precision=config.precision,
            stop=lambda: stop.requested,
        )
        if result is None:
            raise _interrupted(run, stop)
        check_outputs(run, result)
        note_accuracy(run, result.accuracy)
    record = _record(run, result)
    run.folder.append_metrics(record)
    course.epoch, course.batch = number, 0
    course.epoch_seconds += course.totals.seconds
    course.data_seconds += course.totals.data_seconds
    course.totals = EpochTotals()
    next_epoch(run)
    if last or number % config.checkpoint_every == 0:
        run.save()
    if run.scalars is not None:
        run.scalars.add(record)
    run.progress.epoch(record)


def check_outputs(run: LiveRun, result: Evaluation) -> None:
    """NetworkCollapsed if a network that is being pruned gives all images the same outputs."""
    p = run.prepared
    if result.constant and p.config.method != "dense":
        epoch = min(run.course.epoch + 1, p.config.epochs)
        raise NetworkCollapsed(
            f"the network has collapsed in epoch {epoch}: it gives all images the same outputs; prune less, "
            "or later, or with another seed"
        )


def note_accuracy(run: LiveRun, accuracy: float) -> None:
    """The accuracy now; the best so far is of the network as it is, not of what it was before pruning."""
    pruner, course = run.prepared.pruner, run.course
    network = len(pruner.plans) + pruner.frozen
    if course.best_of != network:
        course.best_of, course.best_val_accuracy = network, None
    course.val_accuracy = accuracy
    course.best_val_accuracy = max(accuracy, course.best_val_accuracy or 0.0)


def _record(run: LiveRun, result: Evaluation | None) -> dict[str, Any]:
    p, course, totals = run.prepared, run.course, run.course.totals
    val_loss = None if result is None or not math.isfinite(result.loss) else result.loss
    return {
        "epoch": course.epoch + 1,
        "stage": p.pruner.stage,
        "stages": totals.stage_shares,
        "train_loss": totals.loss,
        "train_accuracy": totals.accuracy,
        "val_loss": val_loss,
        "val_accuracy": None if result is None else result.accuracy,
        "density": p.pruner.density,
        "sparsity": 1 - p.pruner.density,
        "learning_rate": totals.learning_rate,
        "batch_size": p.batch_size,
        **course.stock,
        "seconds": totals.seconds,
        "data_seconds": totals.data_seconds,
        "step_ms_median": totals.step_ms_median,
        "train_flops": course.train_flops,
        "train_flops_dense": course.train_flops_dense,
    }
