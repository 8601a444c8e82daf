"""Training runs: settings, the loop, checkpoints that survive anything, and the files that a run leaves."""

from clicktrain.compiler.masked_latency import MaskedLatency
from clicktrain.runs.lock import RunFolderInUse
from clicktrain.train.checkpoint import DamagedCheckpoint
from clicktrain.train.config import RunConfig, config_to_dict, from_dict, load_config, resolve_method
from clicktrain.train.divergence import TrainingDiverged
from clicktrain.train.evaluate import Evaluation, evaluate
from clicktrain.train.fit import fit
from clicktrain.train.interrupt import TrainingInterrupted
from clicktrain.train.prepare import Prepared, prepare
from clicktrain.train.progress import Progress, Silent, StepProgress
from clicktrain.train.restore import LoadedRun, load_run
from clicktrain.train.run_folder import RunFolder

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
    "evaluate",
    "fit",
    "from_dict",
    "load_config",
    "load_run",
    "prepare",
    "resolve_method",
]
