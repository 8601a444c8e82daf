"""The report inside a notebook."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from clicktrain.report.comparison import entries, headline, headliner
from clicktrain.report.page import render, write_report
from clicktrain.report.run_data import read_runs


class Report:
    """The page about one or several runs, shown by a notebook as the value of a cell.

    It reads the folders when it is shown, so that a cell that is run again shows how far a run has come.

    Example:
        ``clicktrain.report.Report("runs/dense", "runs/first")``
    """

    def __init__(self, *runs: str | Path, height: int = 800) -> None:
        """``height``: of the frame, in pixels. UserError as `write_report`, for folders that hold no run."""
        self.runs: Sequence[str | Path] = runs
        self.height = height
        read_runs(runs)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, as ``clicktrain report`` does."""
        return write_report(self.runs, path)

    def __repr__(self) -> str:
        return f"{', '.join(map(str, self.runs))}: {headline(headliner(entries(read_runs(self.runs))))}"

    def _repr_html_(self) -> str:
        """A frame of its own, so that neither the page's style nor the notebook's reaches the other."""
        page = html.escape(render(read_runs(self.runs)), quote=True)
        return (
            f'<iframe title="clicktrain report" srcdoc="{page}" width="100%" height="{self.height}" '
            'style="border:0" sandbox></iframe>'
        )
