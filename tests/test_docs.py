"""What the documents point at is there."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DEPENDENCY = re.compile(r"^[A-Za-z0-9_.-]+")


def names_in(path: Path) -> set[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assigned = {
        t.id for node in body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)
    }
    return assigned | {node.name for node in body if hasattr(node, "name")}


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sorted((REPOSITORY / "clicktrain").rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    ],
    ids=lambda path: str(path.relative_to(REPOSITORY)),
)
def test_examples_in_docstrings(path: Path) -> None:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    module = importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


def test_papers_table_names_what_exists(repository: Path) -> None:
    text = (repository / "docs" / "papers.md").read_text(encoding="utf-8")
    pointers = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(pointers) > 40
    missing = []
    for file, name in pointers:
        root = "tests" if re.search(r"(^|/)test_", file) else "clicktrain"
        path = repository / root / file
        if not path.exists() or name not in names_in(path):
            missing.append(f"{root}/{file}::{name}")
    assert missing == []


def declared(repository: Path) -> set[str]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer")
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    return {DEPENDENCY.match(line).group().lower().replace("_", "-") for line in lines}


def test_every_dependency_is_pinned_and_explained(repository: Path) -> None:
    pins = (repository / "requirements" / "run.txt").read_text()
    pins += (repository / "requirements" / "test.txt").read_text()
    pinned = {match.lower() for match in re.findall(r"^([A-Za-z0-9_.-]+)==", pins, re.MULTILINE)}
    wanted = declared(repository)
    assert wanted <= {name.replace("_", "-") for name in pinned}
    explained = (repository / "docs" / "dependencies.md").read_text().lower()
    assert [name for name in wanted if name not in explained] == []


def test_dependencies_are_what_the_package_imports(repository: Path) -> None:
    imported = set()
    for path in (repository / "clicktrain").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add((node.module or "").partition(".")[0])
    distribution = {"pil": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
    others = {name.lower() for name in imported - sys.stdlib_module_names - {"clicktrain"}}
    others = {distribution.get(name, name.replace("_", "-")) for name in others}
    tools = {"pytest", "pytest-xdist", "hypothesis", "mypy", "ruff", "types-pyyaml", "torch-pruning"}
    by_others = {"onnx", "onnxscript", "tensorboard"}  # PyTorch imports them for us
    assert others - by_others == declared(repository) - tools - by_others


def test_the_four_papers_are_cited(repository: Path) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    titles = " ".join(reference["title"] for reference in citation["references"])
    for paper in ("ClickTrain", "PruneTrain", "Campfire", "When to Prune"):
        assert paper in titles
