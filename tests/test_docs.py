"""What the documents point at is there."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
DEPENDENCY = re.compile(r"^[A-Za-z0-9_.-]+")


@functools.cache
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


def test_papers_tables_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    papers = script("papers_tables")
    assert papers.stale() == "", "python scripts/papers_tables.py rewrites them"
    changed = tmp_path / "papers.md"
    page, reproduced = papers.PAGES
    changed.write_text(page.read_text().replace("| window pruning |", "| windows |"))
    monkeypatch.setattr(papers, "PAGES", (changed, reproduced))
    assert "+| `alg-3` | A | window pruning |" in papers.stale()
    changed.write_text(reproduced.read_text().replace("| `dense` | 70", "| `dense` | 71"))
    monkeypatch.setattr(papers, "PAGES", (changed,))
    assert "+| `dense` | 70" in papers.stale()


def declared(repository: Path) -> set[str]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer")
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(x for extra in project["optional-dependencies"].values() for x in extra),
    ]
    return {DEPENDENCY.match(line).group().lower().replace("_", "-") for line in lines}


def test_every_dependency_is_pinned_and_explained(repository: Path) -> None:
    pins = "\n".join(path.read_text() for path in (repository / "requirements").glob("*.txt"))
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
    by_examples = {"lightning-fabric", "fastapi", "uvicorn"}
    by_name = {"pytorch-lightning", "timm", "torchvision"}  # imported where there is one, by importlib
    for_site = {"mkdocs-material", "mkdocstrings-python"}
    assert others - by_others == declared(repository) - tools - by_others - by_examples - by_name - for_site


def test_the_four_papers_are_cited(repository: Path) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text())
    titles = " ".join(reference["title"] for reference in citation["references"])
    for paper in ("ClickTrain", "PruneTrain", "Campfire", "When to Prune"):
        assert paper in titles


# ---------------------------------------------------------------- studies and the pages that show them


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results() -> Any:
    return script("results")


def test_tables_are_what_the_studies_say(results: Any, repository: Path) -> None:
    assert results.stale_pages(sorted((repository / "docs" / "results").glob("*.md"))) == ""


def test_a_changed_figure_makes_a_page_stale(results: Any, repository: Path, tmp_path: Path) -> None:
    page = tmp_path / "campfire.md"
    page.write_text((repository / "docs" / "results" / "campfire.md").read_text())
    study = (repository / "docs" / "results" / "campfire.jsonl").read_text()
    (tmp_path / "campfire.jsonl").write_text(study.replace('"val_accuracy":80.05', '"val_accuracy":99.05'))
    assert (
        "+| vgg-combined-0.8-s0 | Campfire: windows, then kernels; epochs 4 to 6 | 99.05 |"
        in results.stale_pages([page])
    )


def test_all_seeds_of_a_name_are_a_row_with_mean_and_deviation(results: Any) -> None:
    runs = {
        name: {"seed": seed, "figures": {"val_accuracy": accuracy, "train_flops_ratio": flops}}
        for name, seed, accuracy, flops in (
            ("ct-4-s0", 0, 80.0, 0.5), ("ct-4-s1", 1, 82.0, 0.7), ("ct-4-s10", 10, 84.0, 0.6),
            ("ct-4-share-s0", 0, 9.0, 0.9), ("dense-s0", 0, 85.0, 1.0), ("dense-s1", 1, 86.0, 1.0),
        )
    }  # fmt: skip
    dense = results.runs_called(runs, "dense-s*")
    columns = ["accuracy", "to dense", "training FLOPs", "seed"]
    lines = results.table(runs, dense, columns, [["dense-s*"], ["ct-4-s*"], ["ct-4-s1"]]).splitlines()
    assert lines[2:] == [
        "| dense-s* | 85.50 ± 0.71 (2) |  | 100% | 0, 1 |",
        "| ct-4-s* | 82.00 ± 2.00 (3) | -3.50 | 60% | 0, 1, 10 |",
        "| ct-4-s1 | 82.00 | -3.50 | 70% | 1 |",
    ]
    with pytest.raises(KeyError):
        results.runs_called(runs, "ct-8-s*")


def test_a_run_becomes_a_line_of_its_study(results: Any, tmp_path: Path) -> None:
    rows = {"a": {"model": "resnet20", "seed": 0}, "b": {"model": "resnet20", "seed": 1}}
    for name, config in rows.items():
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        summary = {"val_accuracy": 80.0, "seed": config["seed"], "versions": {"torch": "2.13"}, "layers": [1]}
        (run / "summary.json").write_text(json.dumps(summary))
        (run / "metrics.jsonl").write_text('{"seconds": 2.0}\n{"seconds": 4.0}\n')
        (run / "events.jsonl").write_text(
            '{"event": "hard_prune", "epoch": 1, "layers": []}\n{"event": "pool"}\n'
        )
    study = tmp_path / "study.jsonl"
    results.collect_runs([tmp_path / "a", tmp_path / "b"], study, lambda folder: "1234567")
    results.collect_runs([tmp_path / "b"], study, lambda folder: "89abcde")
    lines = results.read(study)
    assert lines[0] == {"study": "study", "config": {"model": "resnet20"}}
    assert [line["commit"] for line in lines[1:]] == ["1234567", "89abcde"]
    assert lines[1]["decisions"] == [{"event": "hard_prune", "epoch": 1}]
    assert lines[1]["figures"]["epoch_seconds"] == 3.0
    assert {name: run["config"] for name, run in results.runs_of(lines).items()} == rows


def test_links_between_pages(repository: Path) -> None:
    broken = []
    for page in [repository / "README.md", *(repository / "docs").rglob("*.md"), *repository.glob("*.md")]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(repository)}: {target}")
    assert broken == []
