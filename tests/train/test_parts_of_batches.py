"""A run keeps its parts of a batch: any number of processes trains the same network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from safetensors.torch import load_file
from start_processes import run_together

SCRIPT = Path(__file__).parent / "elastic_processes.py"
RUNS: dict[int, tuple[str, ...]] = {
    1: ("step", "halves", "quarters", "uneven", "local-1", "local-2", "local-3", "moving-4"),
    2: ("halves", "local-1", "local-2", "local-3"),
    3: ("step", "halves", "quarters", "uneven", "local-2", "local-3", "moving-4"),
}
"""Number of processes -> what they train; "local-P" and so on have P parts."""
CASES = [(name, processes) for processes, names in RUNS.items() if processes > 1 for name in names]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for processes, names in RUNS.items():
        run_together(SCRIPT, processes, folder, *names)
    return folder


def decisions(path: Path) -> list[dict[str, Any]]:
    """Events without what is measured or rounded."""
    lines = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not isinstance(v, float | list | dict)} for line in lines]


@pytest.mark.parametrize(("name", "processes"), CASES)
def test_the_network_does_not_depend_on_the_number_of_processes(
    name: str, processes: int, trained: Path
) -> None:
    """16 images are 5, 5 and 6 of three processes, 4 parts are 1, 1 and 2: each image counts the same."""
    one, several = trained / f"{name}-1", trained / f"{name}-{processes}"
    assert decisions(several) == decisions(one)
    expected, weights = load_file(one / "model.safetensors"), load_file(several / "model.safetensors")
    assert weights.keys() == expected.keys()
    tolerance = 5e-6 if name in ("step", "halves", "quarters") else 1e-3
    for key, value in expected.items():
        assert weights[key].shape == value.shape, key
        assert bool(((weights[key] != 0) == (value != 0)).all()), f"other weights of {key} are kept"
        difference = float((weights[key].double() - value.double()).abs().max())
        assert difference <= tolerance * max(float(value.abs().max()), 1e-3), key


@pytest.mark.parametrize("name", ["halves", "local-2"])
def test_two_parts_are_added_as_two_processes_add_them(name: str, trained: Path) -> None:
    files = [trained / f"{name}-{processes}" / "model.safetensors" for processes in (1, 2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_all_processes_evaluate_with_the_norms_that_are_saved(trained: Path) -> None:
    lines = [(trained / f"local-2-{processes}" / "metrics.jsonl").read_text() for processes in (1, 2)]
    accuracies = [[json.loads(line)["val_loss"] for line in text.splitlines()] for text in lines]
    assert accuracies[0] == pytest.approx(accuracies[1], rel=1e-9)
