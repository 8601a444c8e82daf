"""Devices, precision, threads and seeds."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from clicktrain.comm.processes import ALONE, Processes
from clicktrain.errors import UserError
from clicktrain.kernels.native import keep_memory
from clicktrain.train.config import Precision, RunConfig

_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes cuda, then mps, then cpu. UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name, False):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise UserError(f"device is '{name}', which PyTorch does not find here: use auto or one of {there}")
    return torch.device(name)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Context that runs the forward pass in the given precision; fp32 turns autocast off."""
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def set_up(config: RunConfig, device: torch.device, processes: Processes = ALONE) -> None:
    """Threads, determinism and memory, which belong to the process; ``threads`` is that of each process."""
    threads = processes.threads if config.threads is None else config.threads
    if threads is not None:
        torch.set_num_threads(threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by the next line on cuda
        torch.use_deterministic_algorithms(True)
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":
        # Choosing convolution algorithms by timing them is faster, but two runs may choose differently.
        torch.backends.cudnn.benchmark = not config.deterministic


def seed_batch(seed: int, batch: int, device: torch.device, rank: int = 0) -> None:
    """Seed all random numbers that a batch may draw (dropout and the like) from its number in the run.

    With this nothing about random numbers has to be stored to resume bit for bit. Each process of several
    draws others, for its images.
    """
    value = (seed * 2_654_435_761 + batch * 40_503 + rank * 97_755_673 + 1) % 2**32
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)
    random.seed(value)
    np.random.seed(value)
