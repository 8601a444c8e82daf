"""Export of a finished network to files of other tools, each compared with the network before it is kept."""

from clicktrain.deploy.c_folder import ExportedC, export_c
from clicktrain.deploy.checked_export import FORMATS, SUFFIXES, Exported, FinishedRun, export_run
from clicktrain.deploy.comparison import Comparison, Images
from clicktrain.deploy.file_formats import FILE_FORMATS, Format

__all__ = [
    "FILE_FORMATS",
    "FORMATS",
    "SUFFIXES",
    "Comparison",
    "Exported",
    "ExportedC",
    "FinishedRun",
    "Format",
    "Images",
    "export_c",
    "export_run",
]
