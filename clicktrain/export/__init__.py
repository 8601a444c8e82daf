"""Files of a finished network for other tools, each loaded back and compared before it gets its name."""

from clicktrain.export.checked_export import FORMATS, SUFFIXES, Exported, FinishedRun, Format, export_run

__all__ = ["FORMATS", "SUFFIXES", "Exported", "FinishedRun", "Format", "export_run"]
