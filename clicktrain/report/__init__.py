"""One self-contained HTML page about one or several runs, made from their folders alone."""

from __future__ import annotations

from clicktrain.report.notebook import Report
from clicktrain.report.page import write_report
from clicktrain.report.sensitivity import write_sensitivity
from clicktrain.report.watching import watch_report

__all__ = ["Report", "watch_report", "write_report", "write_sensitivity"]
