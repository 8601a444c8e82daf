from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from html_tree import Node, parse
from run_folders import make_run

from clicktrain.report import write_report


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished and unfinished runs of one network on one data set; not to be changed by a test."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "dense": make_run(root / "dense", method="dense", accuracy=87.62),
        "4x": make_run(root / "clicktrain-4x", compression=4, accuracy=87.4),
        "8x": make_run(root / "clicktrain-8x", compression=8, accuracy=87.1),
        "fixed": make_run(root / "fixed-8x", accuracy=85.93, given_pool=True, settings={"pool": "fixed"}),
        "running": make_run(root / "running", stop_after=23, seed=1),
        "begun": make_run(root / "begun", stop_after=0),
    }


@pytest.fixture(scope="session")
def report(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Node]:
    """Write a report about some of the runs and read it back; a page is made once."""
    root = tmp_path_factory.mktemp("pages")

    @functools.cache
    def write(*names: str) -> Node:
        path = write_report([runs[name] for name in names], root / "report.html")
        return parse(path.read_text(encoding="utf-8"))

    return write
