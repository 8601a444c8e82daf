"""One self-contained HTML page about one or several runs, made from their folders alone."""

from __future__ import annotations

from clicktrain.report.page import write_report

__all__ = ["write_report"]
