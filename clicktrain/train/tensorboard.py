"""The numbers of each epoch as TensorBoard scalars (optional)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ScalarLog:
    """Writes the numbers of metrics.jsonl to a TensorBoard folder, one step per epoch."""

    def __init__(self, folder: Path) -> None:
        """Needs the package ``tensorboard``; nothing is written before the first record."""
        self._folder = folder
        self._writer: Any = None

    def add(self, record: Mapping[str, Any]) -> None:
        """Add the line of an epoch; what a resumed run does again replaces what was written."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=record["epoch"])
        for name, value in record.items():
            if isinstance(value, int | float) and name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Finish the files."""
        if self._writer is not None:
            self._writer.close()
