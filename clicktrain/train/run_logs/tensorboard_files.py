"""TensorBoard's files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import yaml

from clicktrain.train.run_logs.base import RunLog, numbers_of


class TensorBoardLog(RunLog):
    """Scalars by epoch, and the settings as text, in ``tensorboard/`` of the run's folder."""

    name: ClassVar[str] = "tensorboard"
    package: ClassVar[str | None] = "tensorboard"

    def begin(self, first: int) -> None:
        """Open a file; TensorBoard then hides what older files hold of these epochs."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first)
        if first == 1:
            self._writer.add_text("settings", f"```\n{yaml.safe_dump(dict(self.settings))}```", 0)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an epoch's scalars."""
        for name, value in numbers_of(record).items():
            if name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Add the figures of the whole run, as ``summary/...``."""
        for name, value in numbers_of(summary).items():
            self._writer.add_scalar(f"summary/{name}", value, summary["epochs"])

    def close(self, *, finished: bool) -> None:
        """Finish the file."""
        del finished
        self._writer.close()
