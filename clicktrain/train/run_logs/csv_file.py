"""metrics.csv in the run's folder, for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any, ClassVar

from clicktrain.files import is_file, read_text
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.train.run_logs.base import RunLog

FILE = "metrics.csv"


class CsvLog(RunLog):
    """One row per epoch, one column per figure; a figure that an epoch does not have is empty.

    The file is written whole each time, so that no row is cut off, and gets a column when a figure is new.
    """

    name: ClassVar[str] = "csv"

    def begin(self, first: int) -> None:
        """Keep the rows of the epochs before."""
        path = self.folder / FILE
        rows = list(csv.DictReader(io.StringIO(read_text(path)))) if is_file(path) else []
        self._rows: list[dict[str, Any]] = [row for row in rows if int(row["epoch"]) < first]

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a row; figures in parts, as the shares of the stages, stay in metrics.jsonl."""
        self._rows.append({key: value for key, value in record.items() if not isinstance(value, Mapping)})
        columns = list(dict.fromkeys(key for row in self._rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text_atomic(self.folder / FILE, text.getvalue())
