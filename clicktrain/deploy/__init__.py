"""Export of a finished network to files of other tools, each compared with the network before it is kept."""

from clicktrain.deploy.c_folder import ExportedC, Images, export_c
from clicktrain.deploy.checked_export import FORMATS, SUFFIXES, Exported, FinishedRun, Format, export_run

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
