"""A wheel has everything that its commands read, and works where no checkout is."""

from __future__ import annotations

import json
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import clicktrain

pytestmark = pytest.mark.long


def test_it_holds_the_package_and_nothing_else(installed, repository: Path) -> None:
    with zipfile.ZipFile(installed.wheel) as file:
        names = set(file.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = message_from_bytes(file.read(metadata))
    package = repository / "clicktrain"
    wanted = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    wanted |= set((package / "recipes").iterdir())
    assert {path.relative_to(repository).as_posix() for path in wanted} == {
        name for name in names if name.startswith("clicktrain/")
    }
    other = {name.split("/")[0] for name in names} - {"clicktrain"}
    assert other == {f"clicktrain-{clicktrain.__version__}.dist-info"}
    assert facts["Version"] == clicktrain.__version__
    assert facts["License-Expression"] == "Apache-2.0"


def test_its_commands_need_no_checkout(installed, tmp_path: Path) -> None:
    where = "python -c 'import clicktrain; print(clicktrain.__file__)'"
    assert Path(installed.run(where, tmp_path).strip()).is_relative_to(installed.folder)
    assert installed.run("clicktrain --version", tmp_path) == f"clicktrain {clicktrain.__version__}\n"
    assert "Report: " in installed.run("clicktrain demo --epochs 1 --quiet", tmp_path)
    runs = tmp_path / "runs" / "demo"
    assert json.loads((runs / "clicktrain" / "summary.json").read_text())["val_accuracy"] > 0
    assert (runs / "report.html").stat().st_size > 10_000
    # Each of these reads other files of the package: C sources, templates, recipes, the papers' rows.
    installed.run("clicktrain export runs/demo/clicktrain --format c", tmp_path)
    assert (runs / "clicktrain" / "export-c" / "CMakeLists.txt").is_file()
    assert "dry run" in installed.run("clicktrain train --config recipes/digits.yaml --dry-run", tmp_path)
    plan = installed.run("clicktrain reproduce prunetrain/table-1 --scale digits --dry-run", tmp_path)
    assert "--config recipes/digits.yaml" in plan
