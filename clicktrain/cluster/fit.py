"""The model against measured rows: latency and bandwidth are fitted on some, the others are predicted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clicktrain.cluster.links import Cluster, Level, Link
from clicktrain.cluster.overlap import Message, equal_messages, iterate, split_into_buckets
from clicktrain.cluster.ring import allreduce_seconds
from clicktrain.errors import UserError, shown
from clicktrain.files import read_json

FEWEST = 3
"""Rows of a link from which two numbers can be fitted and one row be left to predict."""


@dataclass(frozen=True)
class MeasuredRow:
    """One row of ``clicktrain bench exchange``: what was exchanged by how many processes over which link.

    Attributes:
        num_bytes: that each process hands to the allreduce in a step.
        exchange_ms: of these messages, with nothing else going on.
        calls: number of these messages; None: DistributedDataParallel's buckets.
        step_ms, compute_ms: of a training step with its exchange, and of its computation alone, if measured.
    """

    what: str
    processes: int
    link: str
    num_bytes: float
    exchange_ms: float
    calls: int | None = None
    step_ms: float | None = None
    compute_ms: float | None = None

    @property
    def messages(self) -> list[Message]:
        """What is exchanged, as gradients come about evenly over the backward pass."""
        if self.calls is None:
            return split_into_buckets(self.num_bytes)
        return equal_messages(self.num_bytes, self.calls)


@dataclass(frozen=True)
class Predicted:
    """A row and what the model says of it, fitted on the other rows of its link."""

    row: MeasuredRow
    predicted_ms: float
    predicted_step_ms: float | None
    """The step, from its measured computation and the overlap; None where that was not measured."""

    @property
    def step_error(self) -> float | None:
        """Predicted step over the measured one, less 1."""
        if self.predicted_step_ms is None or not self.row.step_ms:
            return None
        return self.predicted_step_ms / self.row.step_ms - 1

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_ms / self.row.exchange_ms - 1


@dataclass(frozen=True)
class Fit:
    """A link as its measured rows show it, and each row as the others predict it."""

    link: Link
    rows: tuple[Predicted, ...]

    @property
    def median_error(self) -> float:
        """Median of the size of the errors."""
        return statistics.median(abs(row.error) for row in self.rows)

    @property
    def largest_error(self) -> float:
        """Size of the largest error."""
        return max(abs(row.error) for row in self.rows)

    @property
    def median_step_error(self) -> float | None:
        """Median of the size of the errors of steps; None where none was measured."""
        errors = [abs(row.step_error) for row in self.rows if row.step_error is not None]
        return statistics.median(errors) if errors else None


def read_rows(path: str | Path) -> list[MeasuredRow]:
    """Read the rows of a file that ``clicktrain bench exchange --json FILE`` has written.

    Rows of one process exchange nothing and are left out.

    Raises:
        UserError: no such file, or a row without ``what, processes, link, bytes_per_step, exchange_ms``.
    """
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    rows = content.get("rows") if isinstance(content, Mapping) else content
    if not isinstance(rows, list):
        raise UserError(f"{path} holds no rows: write it by 'clicktrain bench exchange --json {path}'")
    return [row for number, values in enumerate(rows) if (row := _row(path, number, values)).processes > 1]


def _row(path: str | Path, number: int, values: Any) -> MeasuredRow:
    wanted: dict[str, type | tuple[type, ...]] = {
        "what": str, "processes": int, "link": str, "bytes_per_step": (int, float),
        "exchange_ms": (int, float),
    }  # fmt: skip
    if not isinstance(values, Mapping):
        raise UserError(f"{path} row {number} is {shown(values)}: an object is needed")
    for key, kind in wanted.items():
        value = values.get(key)
        if (
            not isinstance(value, kind)
            or isinstance(value, bool)
            or (kind is not str and not _countable(value))
        ):
            raise UserError(
                f"{path} row {number} has {key} {shown(value)}: write it by 'clicktrain bench exchange'"
            )
    if values["processes"] > 1 and not values["exchange_ms"] > 0:
        raise UserError(f"{path} row {number} has exchange_ms 0: no time was measured")
    more = {key: values[name] for key, name in _OPTIONAL.items() if _positive(values.get(name))}
    return MeasuredRow(
        values["what"], values["processes"], values["link"], values["bytes_per_step"], values["exchange_ms"],
        **more,
    )  # fmt: skip


_OPTIONAL = {"calls": "calls_per_step", "step_ms": "step_ms", "compute_ms": "compute_ms"}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _countable(value: Any) -> bool:
    """Whether a number is finite and not negative."""
    return 0 <= float(value) < math.inf


def fit_links(rows: Sequence[MeasuredRow]) -> list[Fit]:
    """Fit each link on its rows, and predict each row from a fit on the others of its link.

    Raises:
        UserError: a link with fewer than `FEWEST` rows, or none at all.
    """
    links: dict[str, list[MeasuredRow]] = {}
    for row in rows:
        links.setdefault(row.link, []).append(row)
    if not links:
        raise UserError("there are no rows of two processes or more to fit")
    fits = []
    for name, own in links.items():
        if len(own) < FEWEST:
            raise UserError(
                f"link {shown(name)} has {len(own)} rows: {FEWEST} or more are needed to fit two numbers"
            )
        predicted = []
        for left_out in range(len(own)):
            link = fit_link(name, [*own[:left_out], *own[left_out + 1 :]])
            predicted.append(_predict(own[left_out], link))
        fits.append(Fit(fit_link(name, own), tuple(predicted)))
    return fits


def _predict(row: MeasuredRow, link: Link) -> Predicted:
    cluster = Cluster((Level(row.processes, link),))
    step = None
    if row.compute_ms is not None:
        one = iterate(row.messages, row.compute_ms / 1e3, lambda size: allreduce_seconds(size, cluster))
        step = 1e3 * one.seconds
    return Predicted(row, 1e3 * modeled_seconds(row, link), step)


def modeled_seconds(row: MeasuredRow, link: Link) -> float:
    """What the model says of a row: its messages, one after the other, in one ring."""
    cluster = Cluster((Level(row.processes, link),))
    return sum(allreduce_seconds(message.num_bytes, cluster) for message in row.messages)


def fit_link(name: str, rows: Sequence[MeasuredRow]) -> Link:
    """Least squares of the relative errors over latency and seconds per byte, neither below 0.

    The model is linear in both: a row takes ``steps x latency + bytes / bandwidth``.
    """
    terms = []
    for row in rows:
        seconds = row.exchange_ms / 1e3
        steps = modeled_seconds(row, Link("", float("inf"), 1.0))
        moved = modeled_seconds(row, Link("", 1.0, 0.0))
        terms.append((steps / seconds, moved / seconds))
    aa, ab, bb = (sum(x[i] * x[j] for x in terms) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(x[i] for x in terms) for i in (0, 1))
    determinant = aa * bb - ab * ab
    latency, per_byte = 0.0, 0.0
    if determinant > 1e-12 * aa * bb:
        latency, per_byte = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if latency <= 0 and bb:
        latency, per_byte = 0.0, b / bb
    elif per_byte <= 0 and aa:
        latency, per_byte = a / aa, 0.0
    return Link(name, 1 / per_byte if per_byte else float("inf"), latency)
