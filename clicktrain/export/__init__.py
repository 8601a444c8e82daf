"""Export of a finished network to files of other tools, each compared with the network before it is kept."""

from clicktrain.export.c_folder import ExportedC, Images, export_c
from clicktrain.export.checked_export import FORMATS, SUFFIXES, Exported, FinishedRun, Format, export_run

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Exported",
    "ExportedC",
    "FinishedRun",
    "Format",
    "Images",
    "export_c",
    "export_run",
]
