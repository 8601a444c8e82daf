"""examples/first_steps.ipynb runs from its first cell to its last, and what cells return can be shown."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


@pytest.mark.long
def test_the_notebook_runs_top_to_bottom(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((repository / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 8
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [value for source in cells if (value := run_cell(source, names)) is not None]
    html = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert [type(value).__name__ for value in shown] == ["PruningPlan", "Outcome", "RunSummary", "Report"]
    assert len(html) == 4
    assert all(text.startswith("<") for text in html)
    printed = capsys.readouterr().out
    assert "compression 8.0" in printed
    assert float(printed.partition("accuracy ")[2].partition("%")[0]) > 85
    assert (tmp_path / "runs" / "first-steps" / "summary.json").is_file()


def test_it_has_no_outputs_of_somebody(repository: Path) -> None:
    notebook = json.loads((repository / "examples" / "first_steps.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
