"""Dynamic mini-batch adjustment: the batch grows as the network shrinks (PruneTrain section 4.3)."""

from __future__ import annotations

import dataclasses
import math

from clicktrain.accounting import TrainingMemory
from clicktrain.accounting.memory import bytes_in_words, bytes_of
from clicktrain.errors import UserError
from clicktrain.runs.events import BatchResizedEvent
from clicktrain.train.config import BatchRate
from clicktrain.train.memory_accounting import account_iteration
from clicktrain.train.schedule import refresh_
from clicktrain.train.training_run import TrainingRun


def grown_batch(memory: TrainingMemory, images: int, budget: int, granularity: int, limit: int) -> int:
    """The largest batch that fits, in steps of ``granularity`` from the present one; it never shrinks.

    Args:
        memory: of an iteration of the network as it is now, calibrated.
        images: in a batch now.
        budget: bytes that an iteration may take.
        granularity: images that are added at a time.
        limit: no batch has more images.
    """
    while images + granularity <= limit and memory.at_batch(images + granularity) <= budget:
        images += granularity
    return images


def rate_factor(images: int, first: int, rule: BatchRate) -> float:
    """The factor on the learning rate for batches of ``images`` instead of ``first`` images."""
    ratio = images / first
    return {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]


def set_memory_budget(run: TrainingRun) -> None:
    """Account for the first epoch, and set the memory budget of a growing batch.

    Raises:
        UserError: the budget is less than the first batches take.
    """
    config, state = run.prepared.config, run.state
    memory = account_iteration(run)
    if not config.dynamic_batch:
        return
    needed = memory.at_batch(config.batch_size)
    state.memory_budget = needed if config.memory_budget is None else bytes_of(config.memory_budget)
    if state.memory_budget < needed:
        raise UserError(
            f"memory_budget is {config.memory_budget} but an iteration at batch_size={config.batch_size} "
            f"takes {bytes_in_words(needed)}: lower batch_size, or raise memory_budget"
        )


def next_epoch(run: TrainingRun) -> None:
    """Account for the next epoch, with larger batches if the network has become smaller."""
    state, p = run.state, run.prepared
    if state.epoch >= p.config.epochs:
        return
    memory = account_iteration(run)
    if not p.config.dynamic_batch or not state.batch_outdated:
        return
    state.batch_outdated = False
    assert state.memory_budget is not None
    now = p.batch_sizes.now.images
    limit = min(len(p.data.train), p.config.batch_limit or len(p.data.train))
    images = grown_batch(memory, now, state.memory_budget, p.config.batch_granularity, limit)
    if images > now:
        _resize(run, images)
        memory = account_iteration(run)
        run.record(
            BatchResizedEvent(
                batch_size=images,
                learning_rate_factor=run.prepared.batch_sizes.now.learning_rate_factor,
                memory_estimated=memory.at_batch(images),
                memory_budget=state.memory_budget,
            )
        )


def _resize(run: TrainingRun, images: int) -> None:
    """Change everything that depends on the batch size."""
    p = run.prepared
    factor = rate_factor(images, p.batch_sizes.first.images, p.config.batch_lr)
    loader = p.train_loader.with_batch_size(images)
    p.batch_sizes.resize(run.state.epoch, images, len(loader), factor)
    p.pruner.resize_epoch(len(loader))
    refresh_(p.scheduler)
    run.prepared = dataclasses.replace(p, train_loader=loader)
