"""``clicktrain train --dry-run``: what a run would do and cost; nothing is written."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F

from clicktrain.accounting import training_memory
from clicktrain.accounting.memory import bytes_in_words
from clicktrain.methods import Method
from clicktrain.train import Prepared, RunConfig
from clicktrain.train.checkpoint import bytes_needed
from clicktrain.train.device import autocast
from clicktrain.train.prepare import prepare
from clicktrain.wording import clock, short

_WARM_UP, _TIMED = 1, 4
"""Training steps before and during the measurement."""


def dry_run(config: RunConfig, method: Method[Any]) -> int:
    """Check everything, print the plan and the estimated cost; the exit code."""
    prepared = prepare(config, method)
    print(prepared.pruner.plan())
    print()
    for line in cost_lines(prepared):
        print(line)
    return 0


def cost_lines(prepared: Prepared) -> list[str]:
    """Model, data, FLOPs, time and disk of the run; time as measured on a few steps of dense training."""
    config, cost = prepared.config, prepared.cost.initial
    batches = len(prepared.train_loader)
    images = config.epochs * batches * config.batch_size
    ms = step_ms(prepared)
    example = torch.zeros(1, *prepared.data.image_shape, device=prepared.device)
    memory = training_memory(
        prepared.model,
        example,
        prepared.optimizer,
        autocast=lambda: autocast(prepared.device, config.precision),
    )
    return [
        f"model: {config.model}, {cost.parameters:,} parameters, "
        f"{short(cost.forward_flops_dense, ' ')}FLOPs forward per image",
        f"data: {prepared.data.describe()}",
        f"training: {config.epochs} epochs x {batches} batches of {config.batch_size}, "
        f"{short(cost.training_flops_dense * images, ' ')}FLOPs if it stayed dense",
        f"time: about {clock(config.epochs * batches * ms / 1000)} at {ms:.0f} ms per dense batch on "
        f"{prepared.device} (measured), without evaluation",
        f"memory: about {bytes_in_words(memory.at_batch(config.batch_size))} per iteration (estimated)",
        f"disk: up to {bytes_needed(prepared.model, config) / 2**20:,.0f} MB",
        "dry run: nothing was written",
    ]


def step_ms(prepared: Prepared) -> float:
    """Median milliseconds of a forward and backward pass with its data, over a few batches."""
    prepared.model.train()
    times: list[float] = []
    batches = iter(prepared.train_loader.epoch(0))
    started = time.perf_counter()
    for x, y in itertools.islice(batches, _WARM_UP + _TIMED):
        with autocast(prepared.device, prepared.config.precision):
            loss = F.cross_entropy(prepared.model(x).float(), y)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # waits for the device
        now = time.perf_counter()
        times.append(1000 * (now - started))
        started = now
    return statistics.median(times[_WARM_UP:] or times)
