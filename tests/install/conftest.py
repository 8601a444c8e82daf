"""The package as a user has it: a wheel, installed into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

CLEARED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
SOURCES = ("clicktrain", "recipes", "pyproject.toml", "README.md", "LICENSE")
"""What a wheel is built from; a copy, since building writes into the folder."""


@dataclass(frozen=True)
class Environment:
    """An environment of its own, and a copy of the sources."""

    source: Path
    folder: Path

    @property
    def variables(self) -> dict[str, str]:
        """Of a shell in which the environment is active."""
        kept = {name: value for name, value in os.environ.items() if name not in CLEARED}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {
            **kept,
            "PATH": path,
            "VIRTUAL_ENV": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        }

    def run(self, command: str, cwd: Path, seconds: float = 1800) -> str:
        """Type command lines in a folder; what they print. Fails with that where one of them fails."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            capture_output=True, text=True, timeout=seconds, cwd=cwd, env=self.variables,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout


@pytest.fixture
def fresh(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the dependencies and without the package.

    Dependencies are those of the environment of the tests, on its path, not installed again: PyTorch alone is
    a gigabyte. A line of a ``.pth`` file adds their folder without reading ``.pth`` files in there, so that
    the checkout that one of them may name stays out.
    """
    if shutil.which("bash") is None:
        pytest.skip("there is no bash on this machine")
    place = tmp_path_factory.mktemp("fresh")
    source = place / "source"
    source.mkdir()
    for name in SOURCES:
        if (path := repository / name).is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source / name)
    folder = place / "environment"
    venv.EnvBuilder(symlinks=True).create(folder)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    packages = folder / "lib" / version / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return Environment(source, folder)
