"""Figures of a row from what its runs wrote: small arithmetic over summaries, epochs, events and benchmarks.

An expression names a run and what it wrote. ``dense.val_accuracy`` is a key of ``summary.json``, or of the
JSON of ``bench`` and ``evaluate``; ``pat.events.epi.epi`` is the list of a key's values in all events of a
kind, ``dense.epochs.seconds`` of those of ``metrics.jsonl``, one per epoch. Indices, the four operations,
``min``, ``max``, ``mean``, ``sum``, ``len`` and ``abs`` are known; nothing else is. Dashes in names become
``_``.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from clicktrain.files import read_json, read_text
from clicktrain.papers.plan import Step
from clicktrain.papers.rows import Figure, Row
from clicktrain.runs.folder import RunFolder

_OPERATIONS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: Mapping[str, Callable[[Any], Any]] = {
    "min": min,
    "max": max,
    "mean": statistics.fmean,
    "sum": math.fsum,
    "len": len,
    "abs": abs,
}


class Missing(Exception):  # noqa: N818 - not an error of anyone: the figure cannot be had
    """A run did not write what an expression asks for, or was not run."""


@dataclass(frozen=True)
class Measured:
    """A figure with our number, over the seeds that were run.

    Attributes:
        value: mean over seeds; None if it could not be had, for ``reason``.
        deviation: standard deviation over seeds (of the sample); None for one seed.
        seeds: how many.
    """

    figure: Figure
    value: float | None
    deviation: float | None = None
    seeds: int = 1
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """What, the paper's number and ours."""
        figure = self.figure
        return {
            "what": figure.what,
            "unit": figure.unit,
            "paper": figure.paper,
            "ours": self.value,
            "deviation": self.deviation,
            "seeds": self.seeds,
            "reason": self.reason,
        }


def measured_figures(row: Row, steps: Sequence[Step]) -> list[Measured]:
    """The figures of a row from the outputs of its steps."""
    seeds: list[int | None] = [*sorted({step.seed for step in steps if step.seed is not None})] or [None]
    read: dict[Path, Any] = {}

    def result_of(run: str, seed: int | None) -> Any:
        step = next((s for s in steps if s.run == run and s.seed in (seed, None)), None)
        if step is None:
            raise Missing(f"there is no run {run}")
        if step.output not in read:
            read[step.output] = read_result(step)
        return read[step.output]

    found = []
    for figure in row.figures:
        values, reason = [], ""
        for seed in seeds:
            try:
                values.append(float(evaluate(figure.ours, partial(result_of, seed=seed))))
            except Missing as missing:
                reason = str(missing)
        if not values:
            found.append(Measured(figure, None, None, 0, reason))
            continue
        deviation = statistics.stdev(values) if len(values) > 1 else None
        found.append(Measured(figure, statistics.fmean(values), deviation, len(values), reason))
    return found


def read_result(step: Step) -> Any:
    """What a step wrote: for a run its summary, with ``epochs`` and ``events`` beside it."""
    if step.command[0] != "train":
        if not step.output.is_file():
            raise Missing(f"{step.run} was not run")
        return read_json(step.output)
    folder = RunFolder(step.output)
    if not folder.summary_path.is_file():
        raise Missing(f"{step.run} is not finished")
    events: dict[str, list[dict[str, Any]]] = {}
    for line in _lines(folder.events):
        events.setdefault(line["event"], []).append(line)
    return {**read_json(folder.summary_path), "epochs": _lines(folder.metrics), "events": events}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_text(path).splitlines()] if path.is_file() else []


def evaluate(expression: str, result_of: Callable[[str], Any]) -> Any:
    """The value of an expression; ``result_of``: what a run of a name wrote.

    Raises:
        Missing: a run or key that is not there.
        ValueError: an expression that is none.
    """
    return _value(ast.parse(expression, mode="eval").body, result_of)


def _value(node: ast.expr, result_of: Callable[[str], Any]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, result_of)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _value(node.left, result_of), _value(node.right, result_of)
        if isinstance(node.op, ast.Div) and right == 0:
            raise Missing("it would be divided by zero")
        return _OPERATIONS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        (argument,) = node.args
        value = _value(argument, result_of)
        if node.func.id != "abs" and not value:
            raise Missing(f"{ast.unparse(argument)} is empty")
        return _FUNCTIONS[node.func.id](value)
    if isinstance(node, ast.Name):
        return result_of(_run_name(node.id))
    if isinstance(node, ast.Attribute):
        return _key(_value(node.value, result_of), node.attr, ast.unparse(node))
    if isinstance(node, ast.Subscript):
        values, index = _value(node.value, result_of), _value(node.slice, result_of)
        if not isinstance(values, list) or not -len(values) <= index < len(values):
            raise Missing(f"there is no {ast.unparse(node)}")
        return values[index]
    raise ValueError(f"{ast.unparse(node)} is no figure")


def names_in(expression: str) -> set[str]:
    """Names of the runs that an expression reads."""
    tree = ast.parse(expression, mode="eval")
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return {_run_name(node.id) for node in ast.walk(tree) if isinstance(node, ast.Name)} - called


def _run_name(word: str) -> str:
    """Runs have dashes where Python's names have underscores."""
    return word.replace("_", "-")


def _key(value: Any, key: str, where: str) -> Any:
    if isinstance(value, list):  # of events or epochs: this key of each that has it
        return [item[key] for item in _mappings(value) if item.get(key) is not None]
    if not isinstance(value, Mapping) or value.get(key) is None:
        raise Missing(f"there is no {where}")
    return value[key]


def _mappings(values: Iterable[Any]) -> list[Mapping[str, Any]]:
    return [value for value in values if isinstance(value, Mapping)]
