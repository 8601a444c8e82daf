from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import TINY, Outcome, call


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder which is the current one."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """The folder of a finished run, which no test may change, and what its command printed."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    outcome = call("train", *TINY, "--compression", "4", "--epochs", "4", "--out", folder)
    assert outcome.code == 0, outcome.err
    return folder, outcome


@pytest.fixture
def copy_of_finished(finished: tuple[Path, Outcome], tmp_path: Path) -> Callable[[], Path]:
    """Makes copies of the finished run that may be damaged."""

    def make() -> Path:
        return Path(shutil.copytree(finished[0], tmp_path / "copy"))

    return make
