"""MLflow's tracking."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar

from clicktrain.train.run_logs.base import RunLog, numbers_of

EXPERIMENT = "clicktrain"
"""Where ``MLFLOW_EXPERIMENT_NAME`` names none."""
MOST_PARAMETERS, LONGEST_VALUE = 100, 500
"""Settings in one call, and characters of one, that every store of MLflow takes."""


class MlflowLog(RunLog):
    """A run of an experiment, in the store that MLflow uses here (``MLFLOW_TRACKING_URI``).

    It goes through a client: a run of the user's own that is active stays so.
    """

    name: ClassVar[str] = "mlflow"
    package: ClassVar[str | None] = "mlflow"

    def begin(self, first: int) -> str:
        """Begin a run with the settings as its parameters, or go on with that of the folder."""
        mlflow = importlib.import_module("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient()
        known = self.saved_id()
        if known is not None:
            self._id = known
            self._client.update_run(known, status="RUNNING")
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            self._id = self._client.create_run(number, run_name=self.folder.name).info.run_id
            self.save_id(self._id)
            self._add_settings()
        return f"mlflow: run {self._id} in {mlflow.get_tracking_uri()}"

    def _add_settings(self) -> None:
        settings = iter(self.settings.items())
        while part := list(islice(settings, MOST_PARAMETERS)):
            parameters = [self._entities.Param(key, str(value)[:LONGEST_VALUE]) for key, value in part]
            self._client.log_batch(self._id, params=parameters)

    def _add_numbers(self, numbers: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(key, float(value), now, step) for key, value in numbers.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an epoch, which is MLflow's step. A repeated epoch stands there twice, the later value last."""
        numbers = numbers_of(record)
        del numbers["epoch"]
        self._add_numbers(numbers, int(record["epoch"]))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add the figures of the whole run, as ``summary/...``."""
        numbers = {f"summary/{name}": value for name, value in numbers_of(summary).items()}
        self._add_numbers(numbers, int(summary["epochs"]))

    def close(self, *, finished: bool) -> None:
        """End MLflow's run."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")
