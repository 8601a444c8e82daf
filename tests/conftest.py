"""Shared by every test: one thread, fixed seeds, hypothesis settings, and the path of the real data."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from clicktrain.kernels.native import toolchain

REPOSITORY = Path(__file__).resolve().parent.parent
CIFAR10 = REPOSITORY.parent / "shared" / "data" / "cifar10"

# Tests run in parallel processes: more threads in each only fight, and one thread sums in one order.
torch.set_num_threads(1)

# A shared machine is no place for deadlines. CI draws the same examples each time: red means changed code.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what generated kernels ran on: CLICKTRAIN_LANES and CLICKTRAIN_PAIRS in the environment set it."""
    tools = toolchain()
    if tools is None:
        terminalreporter.write_line("generated kernels: none, for want of a C compiler")
        return
    isa = next(iter(tools.isa), "plain C").strip("_")
    terminalreporter.write_line(
        f"generated kernels: {tools.lanes(torch.float32)} float32 lanes, {tools.registers} registers, "
        f"{'with' if tools.multiplies_pairs else 'without'} bfloat16 pairs; {tools.version} for {isa}"
    )


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New memory is NaN, so that what a kernel leaves unwritten fails loudly."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]  # type: ignore[assignment]


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """Real CIFAR-10 as Parquet files (image bytes and label); skips where it is not beside the checkout."""
    if not any(CIFAR10.rglob("*.parquet")):
        pytest.skip(f"real CIFAR-10 is not at {CIFAR10}")
    return CIFAR10
