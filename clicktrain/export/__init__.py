"""Export of a finished network to files of other tools, each compared with the network before it is kept."""

from clicktrain.export.checked_export import FORMATS, SUFFIXES, Exported, FinishedRun, Format, export_run

__all__ = ["FORMATS", "SUFFIXES", "Exported", "FinishedRun", "Format", "export_run"]
