from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args

import pytest
from short_runs import BATCHES, DENSE, At

from clicktrain.errors import UserError
from clicktrain.train import RunConfig, RunFolder, TrainingInterrupted, from_dict, load_run_config
from clicktrain.train.config import LogName
from clicktrain.train.fit import fit
from clicktrain.train.progress import Silent
from clicktrain.train.run_logs import LOGS, RunLog, RunLogs, check_logs
from clicktrain.train.run_logs.base import numbers_of
from clicktrain.train.run_logs.csv_file import CsvLog

RECORD = {"epoch": 1, "stage": "dense", "stages": {"dense": 1.0}, "train_loss": 0.5, "val_loss": None}
SETTINGS = {"model": "resnet20", "epochs": 3, "layers": {}}


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


class Told(Silent):
    """Remembers messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:  # type: ignore[override]
        self.messages.append(text)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- settings ---------------------------------------------------------------------------------------


def test_the_choices_are_the_logs_that_there_are() -> None:
    assert get_args(LogName) == tuple(LOGS)
    assert RunConfig(log=("csv", "wandb"), tensorboard=True).log_names == ("csv", "wandb", "tensorboard")
    assert RunConfig(log=("tensorboard",), tensorboard=True).log_names == ("tensorboard",)
    assert RunConfig().log_names == ()
    with pytest.raises(UserError, match="log is 'excel': use one of csv, tensorboard, wandb, mlflow"):
        from_dict({"log": ["excel"]})


def test_a_package_that_is_missing_is_named_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOGS["wandb"], "package", "no_such_package")
    with pytest.raises(
        UserError, match="no_such_package is not installed: run 'pip install no_such_package'"
    ):
        check_logs(["csv", "wandb"])
    check_logs(["csv"])


# ---- csv --------------------------------------------------------------------------------------------


def test_a_run_writes_a_row_per_epoch(tmp_path: Path) -> None:
    fit(*from_dict({**DENSE, "log": ["csv"]}), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 2
    for row, line in zip(rows, lines, strict=True):
        plain = {key: value for key, value in line.items() if not isinstance(value, dict)}
        assert {key: "" if value is None else str(value) for key, value in plain.items()} == row


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    config, method = from_dict({**DENSE, "epochs": 3, "log": ["csv"], "checkpoint_every": 2})

    class Lost(BaseException):
        """As a kill."""

    def lose() -> None:
        raise Lost

    with pytest.raises(Lost):  # in the third epoch: the checkpoint is of the second
        fit(config, method, tmp_path / "run", progress=At(2 * BATCHES + 3, lose))
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["1", "2"]
    (tmp_path / "run" / "metrics.csv").write_text("epoch,train_loss\n1,0.5\n2,0.4\n3,99\n")
    fit(config, method, tmp_path / "run", resume=True)
    rows = rows_of(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["train_loss"] == "0.5"
    assert rows[2]["train_loss"] != "99"
    assert rows[0]["val_accuracy"] == ""  # a column that is new


def test_logs_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    config, method = from_dict({**DENSE, "epochs": 2})
    stop = At(BATCHES + 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterrupted):
        fit(config, method, tmp_path / "run", progress=stop)
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace("log: []", "log: [csv]"))
    config, method = load_run_config(RunFolder(tmp_path / "run"), DENSE["model"])
    fit(config, method, tmp_path / "run", resume=True)
    assert [row["epoch"] for row in rows_of(tmp_path / "run")] == ["2"]


# ---- the interface ----------------------------------------------------------------------------------


class Broken(RunLog):
    """Fails where it is told to."""

    name: ClassVar[str] = "broken"
    where: ClassVar[str] = "add"

    def begin(self, first: int) -> str:
        if self.where == "begin":
            raise RuntimeError("no\n connection")
        return f"it begins at {first}"

    def add(self, record: Mapping[str, Any]) -> None:
        if self.where == "add":
            raise RuntimeError("the server is gone")


def test_a_log_that_fails_leaves_the_run_and_the_others_alone(tmp_path: Path) -> None:
    told: list[str] = []
    logs = RunLogs([Broken(tmp_path, SETTINGS), CsvLog(tmp_path, SETTINGS)], told.append)
    logs.add(RECORD)  # a run that is only measured: nothing was opened
    assert told == []
    logs.begin(1)
    for epoch in (1, 2):
        logs.add({**RECORD, "epoch": epoch})
    logs.finish({"epochs": 2})
    logs.close()
    assert told == [
        "it begins at 1",
        "log broken has failed and gets nothing more: the server is gone; the run goes on, its own figures "
        "are in metrics.jsonl",
    ]
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1", "2"]


def test_a_log_that_cannot_be_opened_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Broken, "where", "begin")
    monkeypatch.setitem(LOGS, "csv", Broken)
    with pytest.raises(UserError, match="log broken cannot be opened: no connection; mend that, or leave it"):
        fit(*from_dict({**DENSE, "epochs": 1, "log": ["csv"]}), tmp_path / "run")
    monkeypatch.undo()
    again = fit(*from_dict({**DENSE, "epochs": 1, "log": ["csv"]}), tmp_path / "run", resume=True)
    assert again["epochs"] == 1


def test_numbers_of_a_record() -> None:
    record = {**RECORD, "on": True, "nan": float("nan"), "layers": [1, 2]}
    assert numbers_of(record) == {"epoch": 1, "stages/dense": 1.0, "train_loss": 0.5}


# ---- other programs ---------------------------------------------------------------------------------


def train(folder: Path, name: str, told: Told) -> Mapping[str, Any]:
    return fit(*from_dict({**DENSE, "epochs": 2, "log": [name]}), folder, progress=told)


def test_tensorboard(tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = train(tmp_path / "run", "tensorboard", Told())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(one.step, one.value > 0) for one in events.Scalars("train_loss")] == [(1, True), (2, True)]
    assert events.Scalars("val_accuracy")[-1].value == pytest.approx(summary["val_accuracy"])
    assert events.Scalars("summary/compression_ratio")[0].value == 1.0
    assert "settings/text_summary" in events.Tags()["tensors"]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    told = Told()
    train(tmp_path / "run", "wandb", told)
    assert any("wandb has no API key" in text for text in told.messages)
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    known = json.loads((tmp_path / "run" / "log-ids.json").read_text())["wandb"]
    assert (folder / f"run-{known}.wandb").stat().st_size > 0
    log = LOGS["wandb"](tmp_path / "run", SETTINGS)  # as when the run is resumed
    log.begin(3)
    log.add({**RECORD, "epoch": 3})
    log.close(finished=False)
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert all(one.name.endswith(known) for one in folders)


def test_mlflow_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'store'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    told = Told()
    summary = train(tmp_path / "run", "mlflow", told)
    known = json.loads((tmp_path / "run" / "log-ids.json").read_text())["mlflow"]
    assert any(f"mlflow: run {known} in file:" in text for text in told.messages)
    client = MlflowClient()
    run = client.get_run(known)
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == "2"
    assert run.data.metrics["summary/compression_ratio"] == 1.0
    history = client.get_metric_history(known, "val_accuracy")
    assert [one.step for one in history] == [1, 2]
    assert history[-1].value == pytest.approx(summary["val_accuracy"])
    log = LOGS["mlflow"](tmp_path / "run", SETTINGS)
    log.begin(3)
    assert client.get_run(known).info.status == "RUNNING"
    log.close(finished=False)
    assert client.get_run(known).info.status == "KILLED"
