"""examples/zoo: networks that load in one line, and are what docs/zoo.md says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import clicktrain
from clicktrain.cli import main

ZOO = Path(__file__).resolve().parents[2] / "examples" / "zoo"
NAMES = sorted(path.name for path in ZOO.iterdir() if path.is_dir())


def rows(repository: Path) -> dict[str, list[str]]:
    text = (repository / "docs" / "zoo.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in line.split("|")] for name, line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_a_line_loads_it(name: str, repository: Path) -> None:
    network = clicktrain.load(ZOO / name)
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    summary = json.loads((ZOO / name / "summary.json").read_text())
    _, weights, size, accuracy, flops, _ = rows(repository)[name]
    nonzero = sum(int(value.count_nonzero()) for value in network.parameters())
    assert nonzero == pytest.approx(summary["nonzero_parameters"], rel=1e-3)  # some kept ones may be zero
    assert weights == f"{summary['nonzero_parameters']:,} of {summary['parameters']:,}"
    assert accuracy == f"{summary['test_accuracy']:.2f}%"
    assert flops == f"{100 * summary['inference_flops_ratio']:.0f}%"
    assert size == f"{(ZOO / name / 'packed.safetensors').stat().st_size / 1000:.0f} kB"


def test_the_page_and_the_folder_have_the_same_networks(repository: Path) -> None:
    assert sorted(rows(repository)) == NAMES
    assert len(NAMES) == 4
    for path in ZOO.rglob("*"):
        assert path.is_dir() or path.stat().st_size < 1_000_000, path


def test_commands_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(ZOO / NAMES[0]), "--json"]) == 0
    capsys.readouterr()
    assert main(["list", str(ZOO), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["state"] for row in listed] == ["finished"] * len(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_as_accurate_as_it_says(
    name: str, repository: Path, cifar10_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"parquet:{cifar10_dir}"
    assert main(["evaluate", str(ZOO / name), "--data", data, "--json"]) == 0
    reached = json.loads(capsys.readouterr().out)["val_accuracy"]
    assert reached == pytest.approx(float(rows(repository)[name][3].rstrip("%")), abs=0.1)
