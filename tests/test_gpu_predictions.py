"""The predictions of docs/gpu.md are what the model says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "gpu_predictions", repository / "scripts/gpu_predictions.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_of_each_table_is_current(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- predicted:") == 4
    assert script.rebuilt(page, "64 @ 32x32") == page, "run python scripts/gpu_predictions.py"


@pytest.mark.slow
def test_all_rows_are_current(script: ModuleType) -> None:
    assert script.main(["--check"]) == 0
