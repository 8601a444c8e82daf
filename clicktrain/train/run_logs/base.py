"""What a log of a run is, and several of them as one."""

from __future__ import annotations

import abc
import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from clicktrain.errors import UserError, shortened
from clicktrain.files import is_file, read_json
from clicktrain.formats.atomic import write_text_atomic

IDS = "log-ids.json"
"""File of the run's folder with the names under which other programs know the run."""


class RunLog(abc.ABC):
    """One place for the figures of a run. Called from the training thread, of the first process alone.

    Args:
        folder: of the run, which exists when `begin` is called.
        settings: all settings, flat, as in config.yaml.
    """

    name: ClassVar[str]
    """As after ``--log``."""
    package: ClassVar[str | None] = None
    """The package that has to be installed."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, settings

    @abc.abstractmethod
    def begin(self, first: int) -> str | None:
        """Open it; epochs from ``first`` on (counted from 1) follow, and replace what is there of them.

        Returns:
            A sentence that says where the figures are, or None.
        """

    @abc.abstractmethod
    def add(self, record: Mapping[str, Any]) -> None:
        """Add an epoch: its line in metrics.jsonl."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add what is known at the end of the run: summary.json."""
        del summary

    def close(self, *, finished: bool) -> None:
        """Write out and release everything; ``finished``: the run is, and was not stopped."""
        del finished

    # ---- for subclasses -------------------------------------------------------------------------

    def saved_id(self) -> str | None:
        """The name under which another program knows this run, from before it was stopped."""
        path = self.folder / IDS
        found = read_json(path).get(self.name) if is_file(path) else None
        return found if isinstance(found, str) else None

    def save_id(self, value: str) -> None:
        """Keep that name for the day when the run is resumed."""
        path = self.folder / IDS
        known = read_json(path) if is_file(path) else {}
        write_text_atomic(path, json.dumps({**known, self.name: value}) + "\n")


def new_id() -> str:
    """A name that no other run has."""
    return uuid.uuid4().hex[:12]


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record is a figure, by name; the parts of a mapping are called ``stages/pool``."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}": number for key, number in numbers_of(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = value
    return found


class RunLogs:
    """Several logs as one. What goes wrong in one of them during a run never ends the run.

    Nothing is written before `begin`: a run that is only measured has logs too.
    """

    def __init__(self, logs: Sequence[RunLog], message: Callable[[str], None]) -> None:
        self._waiting, self._open, self._message = list(logs), list[RunLog](), message
        self._finished = False

    def begin(self, first: int) -> None:
        """Open all of them.

        Raises:
            UserError: one cannot be opened, which is better known before hours of training.
        """
        while self._waiting:
            log = self._waiting.pop(0)
            try:
                sentence = log.begin(first)
            except Exception as error:  # another package's, of any kind
                raise UserError(
                    f"log {log.name} cannot be opened: {_words(error)}; mend that, or leave it out and "
                    f"continue with 'clicktrain resume {log.folder}'"
                ) from error
            self._open.append(log)
            if sentence:
                self._message(sentence)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an epoch to all of them."""
        self._each(lambda log: log.add(record))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add the end of the run to all of them."""
        self._finished = True
        self._each(lambda log: log.finish(summary))

    def close(self) -> None:
        """Close all of them; may be called twice."""
        self._each(lambda log: log.close(finished=self._finished))
        self._open.clear()

    def _each(self, act: Callable[[RunLog], None]) -> None:
        for log in tuple(self._open):
            try:
                act(log)
            except Exception as error:
                self._open.remove(log)
                self._message(
                    f"log {log.name} has failed and gets nothing more: {_words(error)}; the run goes on, "
                    "its own figures are in metrics.jsonl"
                )


def _words(error: Exception) -> str:
    """An error of another package in one line."""
    return shortened(" ".join(str(error).split()) or type(error).__name__, 200)
