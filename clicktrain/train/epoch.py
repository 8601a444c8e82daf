"""One epoch: its steps, its evaluation and its line in metrics.jsonl."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from clicktrain.comm import add_exchange, counted
from clicktrain.comm.agreement import largest_over_processes, several_processes, sum_over_processes
from clicktrain.comm.alike import check_same_weights
from clicktrain.data import Batch
from clicktrain.errors import NetworkCollapsed
from clicktrain.formats.atomic import append_jsonl
from clicktrain.train.after_cut import after_cut, recalibrated
from clicktrain.train.averages import LOOKAHEAD_STEPS, SlowWeights
from clicktrain.train.backward import add_gradients
from clicktrain.train.config import resume_command
from clicktrain.train.evaluate import Evaluation, evaluate
from clicktrain.train.exchange import epoch_figures
from clicktrain.train.interrupt import LossWatch, StopRequest, TrainingInterrupted, diverged, explosion
from clicktrain.train.minibatch import next_epoch
from clicktrain.train.optim import shown_learning_rate, trained_parameters
from clicktrain.train.progress import StepProgress
from clicktrain.train.state import EpochTotals
from clicktrain.train.training_run import TrainingRun

_READ_EVERY = 20
"""Batches between two readings of the loss from an accelerator."""


def train_epoch(run: TrainingRun, stop: StopRequest) -> None:
    """Train on the remaining batches of the running epoch.

    Raises:
        TrainingDiverged: see `explosion`.
        TrainingInterrupted: a signal came; a checkpoint was written after the current optimizer step.
    """
    p = run.prepared
    clock = _Clock(run)
    watch = LossWatch(1 if p.device.type == "cpu" else _READ_EVERY, clock.report)
    p.model.train()
    for batch in _timed(run, stop):
        with counted(run.state.totals.exchange):
            loss, correct, step_done = train_batch(run, batch)
        clock.images += p.batch_images
        if watch.add(loss, correct):
            run.progress.step(_step_info(run))
        if step_done and _stop_agreed(run, stop):
            watch.flush()
            raise _interrupted(run, stop)
    watch.flush()


def _stop_agreed(run: TrainingRun, stop: StopRequest) -> bool:
    """Whether a signal has asked any process to stop, which then all of them do after the same step."""
    if several_processes():
        stop.signum = largest_over_processes(stop.signum or 0, run.prepared.device) or None
    return stop.requested


def train_batch(run: TrainingRun, batch: Batch) -> tuple[Tensor, Tensor, bool]:
    """Train on one batch, the next of the running epoch, or on this process's parts of it, one by one.

    Each image counts the same in the gradient, whatever part it is in.

    Returns:
        Loss and number of correct predictions of the whole batch, 0-dim, and whether the optimizer has made
        its step.
    """
    p, state = run.prepared, run.state
    first = state.batch - state.batch % p.config.accumulate
    group = min(p.config.accumulate, len(p.train_loader) - first)
    number = p.batch_sizes.batch_number(state.epoch, state.batch)
    state.totals.stages[p.pruner.stage] = state.totals.stages.get(p.pruner.stage, 0) + 1
    images = p.batch_images
    state.train_flops += p.cost.now * images
    state.train_flops_dense += p.cost.dense * images
    state.add_nominal(p.cost.nominal(first + group - state.batch) * images)
    teacher = run.active_teacher
    if teacher is not None:
        state.train_flops += teacher.forward_flops * images
        state.add_nominal(teacher.forward_flops * images)
    step_done = state.batch + 1 - first == group
    loss = correct = torch.zeros((), device=p.device)
    begins = state.batch == first
    for piece, last, share in run.pieces(batch, number):
        with run.together(begins, step_done and last):
            one, right = add_gradients(run, piece, teacher, share, group)
        begins = False
        loss, correct = loss + one, correct + right
    p.pruner.observe(loss)
    if several_processes():
        own = torch.zeros(2 + p.processes.number, dtype=torch.float64, device=p.device)
        own[0], own[1], own[2 + p.processes.rank] = loss, correct, ~loss.isfinite()
        sums = sum_over_processes(own)
        loss, correct = sums[0] / p.processes.number, sums[1]
        run.note_not_finite(sums[2:])
    if p.cycle is not None and p.cycle.wants_losses:
        p.cycle.note_loss(loss.item())
    state.batch += 1
    if step_done:
        _step(run)
    return loss, correct, step_done


def _step(run: TrainingRun) -> None:
    p = run.prepared
    if p.config.clip_grad_norm:
        run.scaler.unscale_(p.optimizer)
        p.pruner.mask_gradients()
        torch.nn.utils.clip_grad_norm_(trained_parameters(p.optimizer), p.config.clip_grad_norm)
    run.state.totals.learning_rate = shown_learning_rate(p.optimizer)
    frozen = p.pruner.frozen
    run.state.totals.exchange_steps += several_processes()
    run.scaler.step(p.optimizer)
    run.scaler.update()
    p.optimizer.zero_grad()
    if p.pruner.frozen and not frozen:
        after_cut(run)
    elif p.cycle is not None and p.cycle.is_open and (cut := p.pruner.cut_epoch) is not None:
        p.cycle.learn(p.batch_sizes.schedule_step(p.scheduler.last_epoch + 1), cut)
    with warnings.catch_warnings():
        if run.scaler.is_enabled():  # a first step skipped for overflow is no mistake in the order of calls
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        p.scheduler.step()
    run.state.step += 1
    if run.average is not None:
        _follow(run, run.average)


def _follow(run: TrainingRun, average: AveragedModel) -> None:
    """Update the average of the weights after an optimizer step."""
    p, step = run.prepared, run.state.step
    if not isinstance(average, SlowWeights):
        average.update_parameters(p.model)
    elif step % LOOKAHEAD_STEPS == 0:
        done = p.batch_sizes.schedule_step(step)
        share = done / (p.config.epochs * p.batch_sizes.first.steps)
        masks = {} if p.pruner.frozen else p.pruner.network.dense_masks
        average.exchange_(p.model, share if p.cycle is None else p.cycle.share(done), masks)


def _timed(run: TrainingRun, stop: StopRequest) -> Iterator[Batch]:
    """The remaining batches; counts the time spent waiting for them."""
    p, state = run.prepared, run.state
    if state.batch >= len(p.train_loader):
        return  # interrupted while evaluating: the epoch is only to be ended
    batches = iter(p.train_loader.epoch(state.epoch, state.batch))
    while True:
        before = time.perf_counter()
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError):
            # Ctrl-C also reaches the loading processes, whose death the data loader reports by these.
            if stop.requested and state.batch % p.config.accumulate == 0:
                raise _interrupted(run, stop) from None
            raise
        state.totals.data_seconds += time.perf_counter() - before
        yield batch


class _Clock:
    """Sums what is read from the device, and the time it took."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.images = 0
        self.since = time.perf_counter()

    def report(self, losses: list[float], correct: list[int]) -> None:
        """Add the losses and correct predictions of the last batches; raises TrainingDiverged."""
        state, totals = self.run.state, self.run.state.totals
        for loss in losses:
            totals.batches += 1
            state.first_loss = loss if state.first_loss is None else state.first_loss
            what = explosion(loss, state.first_loss)
            if what is not None:
                what = f"{what}{self.run.whose_loss}"
                raise diverged(what, state.epoch + 1, totals.batches, self.run.newest_checkpoint())
            totals.loss_sum += loss
        totals.correct += sum(correct)
        totals.images, self.images = totals.images + self.images, 0
        now = time.perf_counter()
        totals.seconds += now - self.since
        totals.window_ms.append(1000 * (now - self.since) / len(losses))
        self.since = now


def _interrupted(run: TrainingRun, stop: StopRequest) -> TrainingInterrupted:
    """Write a checkpoint, and return the exception that ends the run."""
    path = run.save()
    assert stop.signum is not None
    state, batches = run.state, len(run.prepared.train_loader)
    command = resume_command(run.folder, run.prepared.config, run.prepared.method)
    return TrainingInterrupted(
        stop.signum,
        f"stopped in epoch {state.epoch + 1} after batch {state.batch} of {batches}; "
        f"state saved in {path}; continue with '{command}'",
    )


def _step_info(run: TrainingRun) -> StepProgress:
    p, state, totals = run.prepared, run.state, run.state.totals
    batches, ms = len(p.train_loader), totals.recent_ms
    return StepProgress(
        epoch=state.epoch + 1,
        epochs=p.config.epochs,
        batch=state.batch,
        batches=batches,
        step=state.step,
        stage=p.pruner.stage,
        loss=totals.loss,
        accuracy=totals.accuracy,
        density=run.density,
        learning_rate=totals.learning_rate,
        seconds=run.seconds,
        eta_seconds=run.eta_seconds,
        data_share=totals.data_seconds / max(totals.seconds, 1e-9),
        images_per_second=1000 * p.batch_size / ms if ms else 0.0,
        epoch_eta_seconds=None if ms is None else (batches - state.batch) * ms / 1000,
    )


def end_epoch(run: TrainingRun, stop: StopRequest) -> None:
    """Evaluate, write the line of the epoch, and a checkpoint when one is due.

    Raises:
        TrainingInterrupted: a signal came during evaluation; resuming evaluates again.
        NetworkCollapsed: pruning has destroyed the network; no checkpoint of it is written.
    """
    p, state, config = run.prepared, run.state, run.prepared.config
    p.pruner.check_zeros()
    p.pruner.check_alive()
    check_same_weights(run.prepared.model.parameters(), f"after epoch {run.state.epoch + 1}")
    run.take_norms_of_first()
    if state.epoch == 0:
        state.first_loss = state.totals.loss
    number, last = state.epoch + 1, state.epoch + 1 == config.epochs
    result: Evaluation | None = None
    if last or number % config.evaluate_every == 0:
        with recalibrated(run) as model:
            result = evaluate(
                model,
                p.val_loader,
                device=p.device,
                precision=config.precision,
                views=config.test_time_augmentation,
                stop=lambda: stop.requested,
                shared=True,
            )
        if result is None:
            _stop_agreed(run, stop)  # the signal may have come to another process
            raise _interrupted(run, stop)
        check_outputs(run, result)
        note_accuracy(run, result.accuracy)
    record = _record(run, result)
    append_jsonl(run.folder.metrics, record)
    state.epoch, state.batch = number, 0
    state.epoch_seconds += state.totals.seconds
    state.data_seconds += state.totals.data_seconds
    add_exchange(state.exchange, state.totals.exchange)
    state.exchange_steps += state.totals.exchange_steps
    state.totals = EpochTotals()
    next_epoch(run)
    if last or number % config.checkpoint_every == 0:
        run.save()
    run.logs.add(record)
    run.progress.epoch(record)


def check_outputs(run: TrainingRun, result: Evaluation) -> None:
    """NetworkCollapsed if a network that is being pruned gives all images the same outputs."""
    p = run.prepared
    if result.constant and p.config.method != "dense":
        epoch = min(run.state.epoch + 1, p.config.epochs)
        raise NetworkCollapsed(
            f"the network has collapsed in epoch {epoch}: it gives all images the same outputs; prune less, "
            "or later, or with another seed"
        )


def note_accuracy(run: TrainingRun, accuracy: float) -> None:
    """Keep the accuracy of the network as it is, and the best so far."""
    state = run.state
    state.val_accuracy = accuracy
    state.best_val_accuracy = max(accuracy, state.best_val_accuracy or 0.0)


def _record(run: TrainingRun, result: Evaluation | None) -> dict[str, Any]:
    p, state, totals = run.prepared, run.state, run.state.totals
    val_loss = None if result is None or not math.isfinite(result.loss) else result.loss
    return {
        "epoch": state.epoch + 1,
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
        **state.iteration,
        **epoch_figures(state, p.processes.number),
        "seconds": totals.seconds,
        "data_seconds": totals.data_seconds,
        "step_ms_median": totals.step_ms_median,
        "train_flops": state.train_flops,
        "train_flops_dense": state.train_flops_dense,
        "train_flops_nominal": state.train_flops_nominal,
    }
