"""The cost of every iteration, and batches that grow as it falls (PruneTrain sections 4.3 and 5)."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.accounting import TrainingMemory, measure_training_memory, training_memory
from clicktrain.accounting.memory import bytes_in_words, bytes_of
from clicktrain.comm.agreement import agreed
from clicktrain.errors import UserError
from clicktrain.runs.events import BatchResizedEvent
from clicktrain.train.config import BatchRate
from clicktrain.train.device import autocast
from clicktrain.train.optim import refresh_
from clicktrain.train.training_run import TrainingRun

_BATCH_NORM_PASSES = 2.5
"""Tensors that batch norm moves in an iteration over those of a forward pass: it reads and writes one there;
on the way back it reads its input and a gradient, and writes a gradient."""


def account_iteration(run: TrainingRun) -> TrainingMemory:
    """Account for the network and the batch size of the coming epoch, in the run's state.

    The line of that epoch then shows what it trained with, whatever is removed at its end. Memory is
    estimated again only after the network has changed, and measured after a removal if `measures_memory`.
    """
    p, state = run.prepared, run.state
    if run.memory is None:
        run.memory = _estimate(run)
    if state.memory_unmeasured and measures_memory(run):
        state.memory_unmeasured, images = False, p.planned_batch_size
        state.memory_calibration = run.memory.calibrated(_measure(run, images), images).calibration
    memory = run.memory.with_calibration(state.memory_calibration)
    state.iteration = _figures(run, memory)
    return memory


def measures_memory(run: TrainingRun) -> bool:
    """Whether memory is also measured: where it is needed, or costs nothing.

    On a CPU, tracking the tensors of an iteration takes a few seconds.
    """
    p = run.prepared
    return p.config.dynamic_batch or p.method.reads_graph or p.device.type == "cuda"


def _figures(run: TrainingRun, memory: TrainingMemory) -> dict[str, Any]:
    p, size = run.prepared, run.prepared.batch_sizes.now
    return {
        "memory_bytes": memory.at_batch(p.own_batch_size),
        "memory_calibration": memory.calibration,
        "batch_norm_bytes": round(_BATCH_NORM_PASSES * p.cost.current.batch_norm_bytes * p.own_batch_size),
        "gradient_bytes": memory.gradients,
        "gradient_bytes_epoch": memory.gradients * size.steps,
        "parameters": sum(parameter.numel() for parameter in p.model.parameters()),
        "train_flops_per_image": p.cost.usual,
        "inference_flops_per_image": p.cost.current.forward_flops,
    }


def _surroundings(run: TrainingRun) -> dict[str, Any]:
    """What takes memory, or changes it, beside the network and its optimizer."""
    p, averages = run.prepared, [] if run.average is None else [run.average.module]
    return {"averages": averages, "autocast": partial(autocast, p.device, p.config.precision)}


def _estimate(run: TrainingRun) -> TrainingMemory:
    p = run.prepared
    example = torch.zeros(1, *p.data.image_shape, device=p.device)
    with p.pruner.network.without_gradients():
        return training_memory(p.model, example, p.optimizer, **_surroundings(run))


def _measure(run: TrainingRun, images: int) -> int:
    p = run.prepared
    batch = torch.zeros(images, *p.data.image_shape, device=p.device)
    if p.config.channels_last:
        batch = batch.to(memory_format=torch.channels_last)
    target = torch.zeros(images, dtype=torch.int64, device=p.device)

    def loss(output: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)

    return measure_training_memory(p.model, batch, loss, p.optimizer, **_surroundings(run))


def grown_batch(
    memory: TrainingMemory, images: int, budget: int, granularity: int, limit: int, parts: int = 1
) -> int:
    """The largest batch up to ``limit`` whose iteration takes at most ``budget`` bytes; it never shrinks.

    It grows from the present one by ``granularity`` images at a time. The budget is that of each of ``parts``
    processes.
    """
    while images + granularity <= limit and memory.at_batch(-(-(images + granularity) // parts)) <= budget:
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
    needed = memory.at_batch(run.prepared.planned_batch_size)
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
    parts = p.config.parts or 1
    images = grown_batch(memory, now, state.memory_budget, p.config.batch_granularity, limit, parts)
    images = round(agreed([images], p.device)[0])  # memory was measured by each process
    if images > now:
        _resize(run, images)
        memory = account_iteration(run)
        event = BatchResizedEvent(
            batch_size=images,
            learning_rate_factor=run.prepared.batch_sizes.now.learning_rate_factor,
            memory_estimated=memory.at_batch(run.prepared.planned_batch_size),
            memory_budget=state.memory_budget,
        )
        run.record(event)


def _resize(run: TrainingRun, images: int) -> None:
    p = run.prepared
    factor = rate_factor(images, p.batch_sizes.first.images, p.config.batch_lr)
    loader = p.train_loader.with_batch_size(images)
    p.batch_sizes.resize(run.state.epoch, images, len(loader), factor)
    p.pruner.resize_epoch(len(loader))
    refresh_(p.scheduler)
    run.prepared = dataclasses.replace(p, train_loader=loader)
