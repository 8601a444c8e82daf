"""Shared by every test: one thread, fixed seeds, hypothesis settings, and the path of the real data."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


# ---- `make fast`: as many tests as fit into some seconds, by what they took when they last ran ------------

DURATIONS, UNMEASURED_S = "clicktrain/durations", 0.2
"""Key in pytest's cache of seconds by test, and what a test counts that has not run here."""
FIRST_TEST = pytest.StashKey[float]()
"""When this process began its first test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, help="run the tests that fit into so many seconds per process")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the quickest tests of the folders given, then the quickest of other files, while they fit."""
    left = config.getoption("--budget")
    if left is None:
        return
    left *= int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    seconds = config.cache.get(DURATIONS, {})
    folders = [Path(word).resolve() for word in config.invocation_params.args if Path(word).is_dir()]

    def cost(item: pytest.Item) -> tuple[bool, float]:
        outside = not any(folder in item.path.parents for folder in folders)
        return outside, seconds.get(item.nodeid, UNMEASURED_S)

    kept = set()
    for item in sorted(items, key=cost):
        left -= cost(item)[1]
        if left >= 0:
            kept.add(item.nodeid)
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would begin after the time is up, where tests take longer than they did."""
    config = item.config
    budget = config.getoption("--budget")
    first = config.stash.setdefault(FIRST_TEST, time.perf_counter())
    if budget is not None and time.perf_counter() - first > 1.3 * budget:
        pytest.skip("out of time: see make test")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Remember what each test took, in the process that hears of all of them."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or session.config.option.collectonly or not hasattr(session.config, "cache"):
        return
    took: Counter[str] = Counter()
    for reports in reporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.outcome != "skipped":
                took[report.nodeid] += report.duration
    if took:
        known = session.config.cache.get(DURATIONS, {})
        session.config.cache.set(DURATIONS, {**known, **{k: round(v, 2) for k, v in took.items()}})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the matrix of the methods' contract, and say what generated kernels ran on.

    CLICKTRAIN_LANES and CLICKTRAIN_PAIRS in the environment set the latter.
    """
    for line in contract_matrix(terminalreporter.stats):
        terminalreporter.write_line(line)
    tools = toolchain()
    if tools is None:
        terminalreporter.write_line("generated kernels: none, for want of a C compiler")
        return
    isa = next(iter(tools.isa), "plain C").strip("_")
    terminalreporter.write_line(
        f"generated kernels: {tools.lanes(torch.float32)} float32 lanes, {tools.simd.registers} registers, "
        f"{'with' if tools.simd.pairs else 'without'} bfloat16 pairs; {tools.version} for {isa}"
    )


def contract_matrix(stats: Mapping[str, Sequence[Any]]) -> list[str]:
    """Methods by properties, from the reports of ``tests/methods/test_contract.py`` by their outcome."""
    cells: dict[str, dict[str, str]] = {}
    reasons = []
    for outcome, sign in (("passed", "yes"), ("failed", "NO"), ("xfailed", "fault"), ("skipped", "skipped")):
        for report in stats.get(outcome, ()):
            for key, value in getattr(report, "user_properties", ()):
                if key == "contract" and report.when == "call":
                    what, name, reason = value
                    cells.setdefault(name, {})[what] = "-" if reason and sign == "yes" else sign
                    reasons += [f"- {name}, {what}: {reason}"] if reason else []
    if not cells:
        return []
    columns = list(dict.fromkeys(what for row in cells.values() for what in row))
    wide = max(map(len, cells))
    lines = ["", "what every method keeps (-: has no meaning for it)"]
    lines.append(" " * wide + "  " + "  ".join(columns))
    for name, row in cells.items():
        lines.append(f"{name:{wide}}  " + "  ".join(row.get(c, "").ljust(len(c)) for c in columns).rstrip())
    return [*lines, *reasons, ""]


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
