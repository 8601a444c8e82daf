"""Training runs: settings, the loop, checkpoints that survive anything, and the files that a run leaves.

``fit``, ``evaluate`` and ``prepare`` are modules here, each with a function of its name.
"""

from clicktrain.compiler import MaskedLatency
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.lock import RunFolderInUse
from clicktrain.train.checkpoint import DamagedCheckpoint
from clicktrain.train.config import (
    RunConfig,
    config_to_dict,
    from_dict,
    load_config,
    load_run_config,
    resolve_method,
)
from clicktrain.train.evaluate import Evaluation
from clicktrain.train.interrupt import TrainingDiverged, TrainingInterrupted
from clicktrain.train.prepare import Prepared
from clicktrain.train.progress import Progress, Silent, StepProgress
from clicktrain.train.restore import LoadedRun, load_run

__all__ = [
    "DamagedCheckpoint",
    "Evaluation",
    "LoadedRun",
    "MaskedLatency",
    "Prepared",
    "Progress",
    "RunConfig",
    "RunFolder",
    "RunFolderInUse",
    "Silent",
    "StepProgress",
    "TrainingDiverged",
    "TrainingInterrupted",
    "config_to_dict",
    "from_dict",
    "load_config",
    "load_run",
    "load_run_config",
    "resolve_method",
]
