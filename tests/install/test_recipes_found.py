"""``recipes/NAME.yaml`` is the package's own where no such file is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from clicktrain.errors import UserError
from clicktrain.files import find_recipe
from clicktrain.train.config import load_config, read_settings


def test_the_package_brings_every_recipe(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (repository / "recipes").iterdir():
        assert find_recipe(f"recipes/{path.name}").read_bytes() == path.read_bytes()
    assert load_config("recipes/digits.yaml")[0].data == "digits"


def test_a_file_that_is_there_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits.yaml").write_text("epochs: 3\n")
    assert read_settings("recipes/digits.yaml") == {"epochs": 3}


@pytest.mark.parametrize(
    "name", ["recipes/none.yaml", "digits.yaml", "recipes/../files.py", "mine/recipes/digits.yaml"]
)
def test_nothing_else_is_searched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"there is no file {name}"):
        read_settings(name)
