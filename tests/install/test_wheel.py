"""A wheel has everything that its commands read, and works where no checkout is.

``test_tutorial.py`` types further commands there, `clicktrain demo` and `export` among them.
"""

from __future__ import annotations

import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import clicktrain

PIP = "python -m pip --disable-pip-version-check --quiet"


@pytest.mark.long
def test_a_wheel_has_all_that_commands_read(fresh, repository: Path, tmp_path: Path) -> None:
    fresh.run(f"{PIP} wheel --no-deps --no-build-isolation --no-index --wheel-dir wheels .", fresh.source)
    (wheel,) = (fresh.source / "wheels").glob("*.whl")
    check_contents(wheel, repository)
    fresh.run(f"{PIP} install --no-deps --no-index {wheel}", tmp_path)
    where = "python -c 'import clicktrain; print(clicktrain.__file__)'"
    assert Path(fresh.run(where, tmp_path).strip()).is_relative_to(fresh.folder)
    assert fresh.run("clicktrain --version", tmp_path) == f"clicktrain {clicktrain.__version__}\n"
    assert "dry run" in fresh.run("clicktrain train --config recipes/digits.yaml --dry-run", tmp_path)
    plan = fresh.run("clicktrain reproduce prunetrain/table-1 --scale digits --dry-run", tmp_path)
    assert "--config recipes/digits.yaml" in plan


def check_contents(wheel: Path, repository: Path) -> None:
    """It holds the package, its recipes and nothing else, and says what the package says."""
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        facts = message_from_bytes(file.read(metadata))
    package = repository / "clicktrain"
    wanted = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    wanted |= set((package / "recipes").iterdir())
    assert {path.relative_to(repository).as_posix() for path in wanted} == {
        name for name in names if name.startswith("clicktrain/")
    }
    others = {name.split("/")[0] for name in names} - {"clicktrain"}
    assert others == {f"clicktrain-{clicktrain.__version__}.dist-info"}
    assert facts["Version"] == clicktrain.__version__
    assert facts["License-Expression"] == "Apache-2.0"
