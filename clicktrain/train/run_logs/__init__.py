"""Where the figures of a run go besides its own folder: ``--log csv tensorboard wandb mlflow``.

Another one is a class with the four methods of `RunLog` and an entry in `LOGS` (and in the choices of
`clicktrain.train.RunConfig.log`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from clicktrain.errors import UserError
from clicktrain.train.run_logs.base import RunLog, RunLogs
from clicktrain.train.run_logs.csv_file import CsvLog
from clicktrain.train.run_logs.mlflow_tracking import MlflowLog
from clicktrain.train.run_logs.tensorboard_files import TensorBoardLog
from clicktrain.train.run_logs.weights_and_biases import WandbLog

__all__ = ["LOGS", "RunLog", "RunLogs", "check_logs"]

LOGS: dict[str, type[RunLog]] = {log.name: log for log in (CsvLog, TensorBoardLog, WandbLog, MlflowLog)}
"""Name, as after ``--log`` -> class."""


def check_logs(names: Iterable[str]) -> None:
    """Raise a UserError for a log whose package is not installed."""
    for name in names:
        package = LOGS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(
                f"log {name} is asked for but {package} is not installed: run 'pip install {package}', or "
                "leave it out"
            )
