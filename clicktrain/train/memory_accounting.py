"""The cost of an iteration, epoch by epoch: memory, traffic, exchanged gradients (PruneTrain section 5)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from clicktrain.accounting import TrainingMemory, measure_training_memory, training_memory
from clicktrain.train.device import autocast
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
        state.memory_unmeasured, images = False, p.batch_sizes.now.images
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
        "memory_bytes": memory.at_batch(size.images),
        "memory_calibration": memory.calibration,
        "batch_norm_bytes": round(_BATCH_NORM_PASSES * p.cost.current.batch_norm_bytes * size.images),
        "gradient_bytes": memory.gradients,
        "gradient_bytes_epoch": memory.gradients * size.steps,
        "parameters": sum(parameter.numel() for parameter in p.model.parameters()),
        "train_flops_per_image": p.cost.now,
        "inference_flops_per_image": p.cost.current.forward_flops,
    }


def _estimate(run: TrainingRun) -> TrainingMemory:
    p = run.prepared
    averages = [] if run.average is None else [run.average.module]
    example = torch.zeros(1, *p.data.image_shape, device=p.device)
    return training_memory(
        p.model,
        example,
        p.optimizer,
        averages=averages,
        autocast=lambda: autocast(p.device, p.config.precision),
    )


def _measure(run: TrainingRun, images: int) -> int:
    p = run.prepared
    batch = torch.zeros(images, *p.data.image_shape, device=p.device)
    if p.config.channels_last:
        batch = batch.to(memory_format=torch.channels_last)
    target = torch.zeros(images, dtype=torch.int64, device=p.device)
    return measure_training_memory(
        p.model,
        batch,
        lambda output: F.cross_entropy(output.float(), target),
        p.optimizer,
        averages=[] if run.average is None else [run.average.module],
        autocast=lambda: autocast(p.device, p.config.precision),
    )
