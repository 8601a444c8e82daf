"""Weights & Biases."""

from __future__ import annotations

import importlib
import netrc
import os
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import urlsplit

from clicktrain.train.run_logs.base import RunLog, new_id, numbers_of

PROJECT = "clicktrain"
"""Where ``WANDB_PROJECT`` names none."""


class WandbLog(RunLog):
    """A run of a project of Weights & Biases, or its files in ``wandb/`` of the run's folder.

    Its environment variables hold (``WANDB_PROJECT``, ``WANDB_MODE``, ...). Without an API key it is offline,
    where wandb would ask for one and wait.
    """

    name: ClassVar[str] = "wandb"
    package: ClassVar[str | None] = "wandb"

    def begin(self, first: int) -> str | None:
        """Begin a run, or go on with that of the folder."""
        wandb = importlib.import_module("wandb")
        known = self.saved_id()
        chosen = known or new_id()
        mode = None if "WANDB_MODE" in os.environ else "online" if _has_key() else "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", self.folder.name),
            id=chosen,
            resume="allow",
            dir=str(self.folder),
            config=dict(self.settings),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", disable_git=True),
        )
        if known is None:
            self.save_id(chosen)
        if mode == "offline":
            return f"wandb has no API key: its files are in {self.folder}/wandb, 'wandb sync' sends them"
        return f"wandb: {self._run.url}" if self._run.url else None

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an epoch, which is wandb's step. What it has of a repeated epoch, it keeps."""
        self._run.log(numbers_of(record), step=int(record["epoch"]))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Set the summary of the run."""
        self._run.summary.update(numbers_of(summary))

    def close(self, *, finished: bool) -> None:
        """Send the rest; a run that was stopped counts as crashed until it is resumed."""
        self._run.finish(exit_code=0 if finished else 1)


def _has_key() -> bool:
    """Whether wandb can log in without asking: a key in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
