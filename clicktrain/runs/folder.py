"""The folder of a run: names of its files, whole files only, and logs that can be cut back on resume."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from clicktrain.errors import UserError
from clicktrain.files import read_yaml
from clicktrain.formats.atomic import remove_leftovers, write_text_atomic
from clicktrain.runs.format import (
    FORMAT_VERSION,
    HEADER,
    check_folder,
    check_summary,
    read_records,
    read_summary,
)
from clicktrain.runs.lock import RunFolderInUse, holder, locked
from clicktrain.runs.logs import LogMark, Mended, take_back
from clicktrain.runs.new_folder import CHECKPOINTS, clear_begun, existing_part, exists, only_begun, remove_new


class _File:
    """Attribute of a `RunFolder`: the path of one of its files."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, folder: RunFolder, owner: type[RunFolder]) -> Path:
        return folder.path / self._name


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run; the object itself touches nothing before `create` or `open`."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def default(cls, model: str, method: str, root: str | Path = "runs") -> RunFolder:
        """A folder under ``root`` named after the date, the model and the method; it is not created."""
        model = re.sub(r"[^A-Za-z0-9_.-]+", "-", model.rpartition(":")[2]) or "model"
        stem = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{model}_{method}"
        names = itertools.chain((stem,), (f"{stem}_{count}" for count in itertools.count(2)))
        return cls(next(path for name in names if not (path := Path(root) / name).exists()))

    config = _File("config.yaml")
    """Resolved settings, YAML."""
    metrics = _File("metrics.jsonl")
    """One JSON line per finished epoch."""
    events = _File("events.jsonl")
    """One JSON line per decision."""
    channels = _File("channels.jsonl")
    """Largest weight of every channel, one JSON line per epoch; exists if a lasso acts on channels."""
    summary_path = _File("summary.json")
    """Summary, JSON; exists once the run is finished."""
    model = _File("model.safetensors")
    """Final weights, dense layout."""
    packed = _File("packed.safetensors")
    """Final weights, packed."""
    surgery = _File("surgery.json")
    """Surgery plans, JSON; exists if channels were removed."""
    operators = _File("operators.json")
    """The operator of each layer after the hard prune, JSON; exists once a compiler chose."""
    moving_operators = _File("operators-moving.json")
    """The operator of each layer while masks move, JSON; exists once a compiler chose."""
    robustness = _File("robustness.json")
    """Accuracy under attacks, JSON; exists once the run was attacked."""
    checkpoint_folder = _File(CHECKPOINTS)
    """Folder of the checkpoints."""

    def check_free(self) -> None:
        """Raise UserError unless the folder is missing, empty or of a run killed before any checkpoint."""
        if exists(self.path) and (user := self.user) is not None:
            raise RunFolderInUse(f"{self.path} is in use: {user} trains in it; give another --out")
        self._check_contents()

    @property
    def user(self) -> str | None:
        """The process that trains in the folder now, in words, or None."""
        return holder(self.path)

    def _check_contents(self) -> None:
        if not exists(self.path):
            return
        if not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give a folder as --out")
        if only_begun(self.path):
            return
        if self.config.exists():
            raise UserError(
                f"{self.path} already holds a run: continue it with 'clicktrain resume {self.path}', "
                "or give another --out"
            )
        raise UserError(f"{self.path} is not empty: give another --out")

    @contextlib.contextmanager
    def in_use(self, message: Callable[[str], None], *, new: bool = False) -> Iterator[None]:
        """Lock the folder against other processes that would train in it, and remove temporary files.

        ``new``: create the folder, and remove it again if the block raises before the first checkpoint.

        Raises:
            RunFolderInUse: another process trains in it.
            UserError: the folder cannot be created or written to, or is not free for a new run.
        """
        there = existing_part(self.path)
        with contextlib.ExitStack() as held:
            try:
                if new:
                    self.path.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(self.path, message))
                for folder in (self.path, self.checkpoint_folder):
                    remove_leftovers(folder)
            except OSError as error:
                what = "make" if new else "write to"
                raise UserError(f"cannot {what} the folder {self.path}: {error.strerror}") from None
            if new:
                self._check_contents()
            try:
                yield
            except Exception:  # not a kill or an interrupt: such a folder can be taken again
                if new and self.path.is_dir() and only_begun(self.path):
                    remove_new(self.path, there)
                raise

    def explained(self, error: OSError) -> Exception:
        """Turn an error of the file system in this folder into a UserError; return any other as it is."""
        name = error.filename2 or error.filename
        if not isinstance(name, str) or not Path(name).is_relative_to(self.path):
            return error
        if not self.path.is_dir():
            return UserError(
                f"the folder of the run, {self.path}, is gone (deleted, moved or unmounted): training stopped"
            )
        return UserError(
            f"cannot write {name}: {error.strerror}; the last checkpoint is kept: continue with "
            f"'clicktrain resume {self.path}'"
        )

    def create(self, settings: Mapping[str, Any]) -> RunFolder:
        """Create the folder and write the settings; UserError unless it is that of a new run."""
        self._check_contents()
        try:
            text = yaml.safe_dump(dict(settings), sort_keys=False)
            if exists(self.path):
                clear_begun(self.path)
            self.checkpoint_folder.mkdir(parents=True, exist_ok=True)
            for path in (self.metrics, self.events):
                path.touch()
            write_text_atomic(self.config, f"{HEADER}{FORMAT_VERSION}\n{text}")
        except OSError as error:
            raise UserError(f"cannot make the folder {self.path}: {error.strerror}") from None
        return self

    def change_setting(self, name: str, value: Any) -> None:
        """Write another value into config.yaml, if it is another one."""
        settings = self.read_settings()
        if settings.get(name) != value:
            text = yaml.safe_dump({**settings, name: value}, sort_keys=False)
            write_text_atomic(self.config, f"{HEADER}{FORMAT_VERSION}\n{text}")

    def open(self) -> RunFolder:
        """Raise a UserError unless this is the folder of a run that this version can read."""
        if not exists(self.config) and self.checkpoint_folder.is_dir() and only_begun(self.path):
            raise UserError(
                f"{self.path} holds only the beginnings of a run that was killed while its folder was made: "
                "start it again with the same command"
            )
        check_folder(self.path)
        return self

    def read_settings(self) -> dict[str, Any]:
        """The settings as they stand in config.yaml; UserError if it is damaged or of another version."""
        self.open()
        values = read_yaml(self.config)
        if not isinstance(values, dict):
            raise UserError(f"{self.path} is not the folder of a run: its config.yaml holds no settings")
        return {str(key): value for key, value in values.items()}

    def read_metrics(self) -> list[dict[str, Any]]:
        """Lines of the finished epochs, in order; an unfinished last line is left out."""
        return read_records(self.metrics)

    def read_events(self) -> list[dict[str, Any]]:
        """The decisions, in order; an unfinished last line is left out."""
        return read_records(self.events)

    def read_channels(self) -> list[dict[str, Any]]:
        """Largest weights of channels, in order of the epochs; an unfinished last line is left out."""
        return read_records(self.channels)

    @property
    def logs(self) -> tuple[Path, ...]:
        """The three files of lines."""
        return self.metrics, self.events, self.channels

    def log_marks(self) -> dict[str, LogMark]:
        """Marks of the logs by file name, for a checkpoint."""
        return {path.name: LogMark.of(path) for path in self.logs}

    def take_back(self, marks: Mapping[str, LogMark], epoch: float) -> list[Mended]:
        """Cut the logs back to a checkpoint, so that repeated epochs are not logged twice.

        A log without a mark is emptied. One that was changed since, which is reported, keeps its lines up to
        the ``epoch`` of the checkpoint.
        """

        def belongs(line: dict[str, Any]) -> bool:
            at = line.get("epoch")
            return isinstance(at, int | float) and at <= epoch + 1e-9

        results = (take_back(path, marks.get(path.name, LogMark()), belongs) for path in self.logs)
        return [mended for mended in results if mended is not None]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, which marks the run as finished."""
        write_text_atomic(self.summary_path, json.dumps(dict(summary), indent=2) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """The summary, or None while the run is not finished; UserError for a damaged file."""
        summary = read_summary(self.summary_path)
        if summary is not None:
            check_summary(summary, self.summary_path)
        return summary

    def finished(self) -> dict[str, Any]:
        """The summary; UserError if the run is not finished, or the file is damaged."""
        summary = self.summary()
        if summary is not None:
            return summary
        if (user := self.user) is not None:
            raise UserError(f"the run in {self.path} is not finished: {user} is training it")
        raise UserError(
            f"the run in {self.path} is not finished: continue it with 'clicktrain resume {self.path}'"
        )

    def checkpoint(self, epoch: int, step: int) -> Path:
        """Path of the checkpoint after ``step`` optimizer steps, of which the last was in ``epoch``."""
        return self.checkpoint_folder / f"step-{step:09d}-epoch-{epoch:04d}.safetensors"

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.checkpoint_folder.glob("step-*.safetensors"))
