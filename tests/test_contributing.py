"""The recipes of CONTRIBUTING.md, followed literally: files are written, tests run, commands typed."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clicktrain.cli import main
from clicktrain.graph.adapters import ADAPTERS
from clicktrain.kernels.sparse_conv2d import IMPLS
from clicktrain.methods import METHODS
from clicktrain.sparsity.importance import CRITERIA

TESTS = Path(__file__).parent
RECIPES = ("criterion", "method", "layer type", "kernel backend")


@pytest.fixture
def _registries(tmp_path: Path) -> Iterator[None]:
    """Registries and modules as they were before."""
    tables = (METHODS._entries, CRITERIA._entries, CRITERIA._own, ADAPTERS, IMPLS)
    copies = [dict(table) for table in tables]
    yield
    for table, before in zip(tables, copies, strict=True):
        table.clear()  # type: ignore[attr-defined]
        table.update(before)  # type: ignore[attr-defined]
    for name in [path.stem for path in tmp_path.glob("*.py")]:
        del sys.modules[name]


def blocks(recipe: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks under a recipe's heading."""
    text = (TESTS.parent / "CONTRIBUTING.md").read_text("utf-8")
    section = text.partition(f"## Adding a {recipe}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.S)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("_registries")
def test_a_recipe_works_as_it_stands(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (TESTS / "methods", tmp_path):
        monkeypatch.syspath_prepend(folder)
    found = blocks(recipe)
    assert found
    for language, text in found:
        if language == "python":
            name = text.split()[1]
            assert re.fullmatch(r"\w+\.py", name)
            Path(name).write_text(text)
            importlib.invalidate_caches()
            module = importlib.import_module(name.removesuffix(".py"))
            tests = [test for key, test in vars(module).items() if key.startswith("test_")]
            assert bool(tests) == name.startswith("test_")
            for test in tests:
                test(*[tmp_path] * len(inspect.signature(test).parameters))
        else:
            for line in text.splitlines():
                program, *words = shlex.split(line)
                assert program == "clicktrain"
                assert main([*words, *(() if "--help" in words else ("--threads", "1"))]) == 0
    reports = list(tmp_path.rglob("report.html"))
    assert len(reports) == sum("--out" in text for _, text in found)


def test_every_recipe_is_followed() -> None:
    text = (TESTS.parent / "CONTRIBUTING.md").read_text("utf-8")
    assert tuple(re.findall(r"^## Adding a (.*)$", text, re.M)) == RECIPES
