"""Points of a frontier: accuracy over seeds and costs; and each pruned point beside the dense ones.

Training time is put together: batches of each stage x the time of such a step, evaluations, and planning.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from clicktrain.bench.frontier.lines import Line
from clicktrain.bench.frontier.recipe import Cell, Kind, Recipe
from clicktrain.errors import UserError
from clicktrain.files import is_file, read_json

ROOM = 1.05
"""A dense network of at most this many times the cost counts as one of equal cost."""
LEAST_WIDTHS, LEAST_LENGTHS = 5, 3
"""With fewer dense widths, or lengths of training, there is no frontier to compare with."""

AccuracyOf = Literal["test", "holdout"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A cell of the grid as it came out; None where something is not known.

    Attributes:
        seeds: finished runs.
        accuracy_mean, accuracy_std: percent of the test images over seeds (sample deviation, None for one
            seed), None if a run failed; ``accuracy_of`` is ``test``, ``holdout`` if asked for, or
            ``validation`` where no images were held out.
        holdout_mean: percent of the images that were held out of training.
        train_seconds: put together from times of steps, earlier runs included; ``train_seconds_wall``: by
            the clock.
        latency_ms_b64, latency_ms_b1: of 64 images and of one.
        train_flops: earlier runs included; ``inference_flops``: of one image; ``bytes``: of the weights.
        train_memory_mb: peak of a step, of the larger of the networks that were trained.
        reason: why there is no accuracy.
    """

    kind: Kind
    name: str
    method: str
    setting: str
    width: float
    epochs: int
    seeds: int
    accuracy_mean: float | None = None
    accuracy_std: float | None = None
    accuracy_of: str | None = None
    holdout_mean: float | None = None
    train_seconds: float | None = None
    train_seconds_wall: float | None = None
    latency_ms_b64: float | None = None
    latency_ms_b1: float | None = None
    train_flops: float | None = None
    inference_flops: float | None = None
    bytes: float | None = None
    compression: float | None = None
    train_memory_mb: float | None = None
    engine: str | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Advantage:
    """A pruned point less the best dense one within `ROOM` times some of its costs.

    ``points`` is the difference in percentage points, ``dense`` the name of the dense point; both None where
    no dense point is within the costs, or a cost is not known.
    """

    points: float | None
    dense: str | None


LIMITS: dict[str, tuple[str, ...]] = {
    "advantage": ("train_seconds", "latency_ms_b64"),
    "advantage_time": ("train_seconds",),
    "advantage_latency": ("latency_ms_b64",),
    "advantage_bytes": ("bytes",),
    "advantage_flops": ("train_flops", "inference_flops"),
}
"""Costs that a dense point may not exceed, by name of the comparison."""


def advantage(point: Point, dense: Iterable[Point], costs: Sequence[str]) -> Advantage:
    """The accuracy of a point less that of the best dense one that costs at most `ROOM` times as much."""
    limits = [getattr(point, cost) for cost in costs]
    if point.accuracy_mean is None or None in limits:
        return Advantage(None, None)
    best: Point | None = None
    for one in dense:
        values = [getattr(one, cost) for cost in costs]
        if one.accuracy_mean is None or None in values:
            continue
        if all(value <= ROOM * limit for value, limit in zip(values, limits, strict=True)) and (
            best is None or best.accuracy_mean is None or one.accuracy_mean > best.accuracy_mean
        ):
            best = one
    if best is None or best.accuracy_mean is None:
        return Advantage(None, None)
    return Advantage(point.accuracy_mean - best.accuracy_mean, best.name)


def frontier(dense: Iterable[Point], cost: str) -> list[Point]:
    """The dense points that no cheaper or equally cheap one beats, by rising cost and accuracy."""
    known = [p for p in dense if p.accuracy_mean is not None and getattr(p, cost) is not None]
    best: list[Point] = []
    for point in sorted(known, key=lambda p: (getattr(p, cost), -(p.accuracy_mean or 0.0))):
        if not best or (point.accuracy_mean or 0.0) > (best[-1].accuracy_mean or 0.0):
            best.append(point)
    return best


def missing_dense(points: Iterable[Point]) -> str | None:
    """Why the dense points are too few to claim a frontier, in a sentence; None if they are not."""
    done = {(p.width, p.epochs) for p in points if p.kind == "dense" and p.accuracy_mean is not None}
    lengths = {epochs for _, epochs in done}
    widths = {width for width, _ in done}
    full = [width for width in widths if sum(one == width for one, _ in done) >= LEAST_LENGTHS]
    if len(full) >= LEAST_WIDTHS:
        return None
    return (
        f"no frontier yet: {len(widths)} dense widths and {len(lengths)} lengths of training are there, "
        f"{len(full)} of the widths at {LEAST_LENGTHS} lengths or more; {LEAST_WIDTHS} are needed"
    )


def read_times(path: Path) -> dict[str, Any] | None:
    """The times that `clicktrain.bench.frontier.timing` has measured, None if there is no file.

    Raises:
        UserError: the file holds something else.
    """
    if not is_file(path):
        return None
    times = read_json(path)
    if not isinstance(times, dict) or not all(
        isinstance(times.get(key), dict) for key in ("machine", "settings", "networks")
    ):
        raise UserError(f"{path} is damaged: it does not hold times; measure them again with --time")
    return times


# ---- from lines and times ------------------------------------------------------------------------


def points_of(
    recipe: Recipe,
    lines: Mapping[tuple[str, int], Line],
    times: Mapping[str, Any] | None,
    accuracy_of: AccuracyOf = "test",
) -> list[Point]:
    """The points of all cells that have a line of their settings, in the recipe's order.

    ``times`` is what `clicktrain.bench.frontier.timing` measured, None for no times.
    """
    networks = {} if times is None else times["networks"]
    return [
        _point(cell, recipe, lines, networks, accuracy_of)
        for cell in recipe.cells
        if any((cell.name, seed) in lines for seed in cell.seeds)
    ]


def _point(
    cell: Cell,
    recipe: Recipe,
    lines: Mapping[tuple[str, int], Line],
    networks: Mapping[str, Any],
    accuracy_of: AccuracyOf,
) -> Point:
    own = [lines[cell.name, seed] for seed in cell.seeds if (cell.name, seed) in lines]
    done = [line for line in own if line["status"] == "finished"]
    failed = [line["reason"] for line in own if line["status"] == "failed"]
    head: dict[str, Any] = {
        "kind": cell.kind, "name": cell.name, "method": cell.method, "setting": cell.setting,
        "width": cell.width, "epochs": cell.epochs, "seeds": len(done),
    }  # fmt: skip
    if failed:
        head["reason"] = f"{len(failed)} of {len(own)} runs failed: {failed[0]}"
    if not done:
        return Point(**head)
    accuracies, what = _accuracies(done, accuracy_of) if not failed else ([], None)
    figures = networks.get(cell.name) if cell.kind == "pruned" else None
    dense = _dense_figures(cell, done[0], networks)
    last = figures if cell.kind == "pruned" else dense
    tested = [line["figures"].get("test_accuracy") for line in done]
    memory = [f.get("memory_mb") for f in _trained(done[0], figures, dense)]
    return Point(
        **head,
        accuracy_mean=_mean(accuracies),
        accuracy_std=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        accuracy_of=what,
        holdout_mean=None if None in tested or failed else _mean(_figure(done, "val_accuracy")),
        train_seconds=_mean([_seconds(cell, line, recipe, lines, networks) for line in done]),
        train_seconds_wall=_mean([_wall(cell, line, lines) for line in done]),
        latency_ms_b64=(last or {}).get("latency_ms_b64"),
        latency_ms_b1=(last or {}).get("latency_ms_b1"),
        train_flops=_mean([line["figures"]["train_flops"] + _initial(line) for line in done]),
        inference_flops=_mean(_figure(done, "inference_flops")),
        bytes=_mean(_figure(done, "bytes")),
        compression=_mean(_figure(done, "compression_ratio")),
        train_memory_mb=None if None in memory or not memory else max(m for m in memory if m is not None),
        engine=(last or {}).get("engine"),
    )


def _accuracies(done: Sequence[Line], accuracy_of: AccuracyOf) -> tuple[list[float], str | None]:
    tested = [line["figures"].get("test_accuracy") for line in done]
    if accuracy_of == "holdout" or None in tested:
        what = "validation" if None in tested else "holdout"
        return _figure(done, "val_accuracy"), what
    return [float(value) for value in tested if value is not None], "test"


def _figure(done: Sequence[Line], key: str) -> list[float]:
    return [float(line["figures"][key]) for line in done]


def _initial(line: Line) -> float:
    return float(line["figures"].get("initial_train_flops") or 0)


def _mean(values: Sequence[float | None]) -> float | None:
    """None if one of them is not known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _dense_figures(cell: Cell, line: Line, networks: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What was measured of a cell's network before anything is removed from it."""
    if not networks:
        return None
    from clicktrain.bench.frontier.networks import dense_network  # brings the compiler

    figures: Mapping[str, Any] | None = networks.get(dense_network(cell, line).key)
    return figures


def _trained(
    line: Line, own: Mapping[str, Any] | None, dense: Mapping[str, Any] | None
) -> list[Mapping[str, Any]]:
    """Figures of the networks that a run trains."""
    pruned = {phase["frozen"] or phase.get("fast", False) for phase in line["phases"]}
    return [figures or {} for is_pruned, figures in ((False, dense), (True, own)) if is_pruned in pruned]


# ---- time of training ----------------------------------------------------------------------------


def _seconds(
    cell: Cell,
    line: Line,
    recipe: Recipe,
    lines: Mapping[tuple[str, int], Line],
    networks: Mapping[str, Any],
) -> float | None:
    """Seconds of a run and of the one that it started from."""
    own = networks.get(cell.name) if cell.kind == "pruned" else None
    dense = _dense_figures(cell, line, networks)
    seconds = run_seconds(line, dense, own)
    if cell.after is None or seconds is None:
        return seconds
    before = lines.get((cell.after, line["seed"]))
    if before is None or before["status"] != "finished":
        return None
    earlier = _seconds(recipe.cell(cell.after), before, recipe, lines, networks)
    return None if earlier is None else seconds + earlier


def _wall(cell: Cell, line: Line, lines: Mapping[tuple[str, int], Line]) -> float | None:
    own = float(line["figures"]["train_seconds"])
    if cell.after is None:
        return own
    before = lines.get((cell.after, line["seed"]))
    return None if before is None else own + float(before["figures"]["train_seconds"])


def run_seconds(line: Line, dense: Mapping[str, Any] | None, own: Mapping[str, Any] | None) -> float | None:
    """Seconds that a run takes on a quiet core: batches x time of a step, evaluations, planning.

    Args:
        line: of the run.
        dense: measured figures of its network before anything is removed.
        own: of the network that it has pruned, None for a dense run.

    Returns:
        None if something is not measured.
    """
    if dense is None:
        return None
    total = pruned = everything = 0.0
    for phase in line["phases"]:
        ms = _step_ms(phase, dense, own)
        if ms is None:
            return None
        total += ms / 1000
        everything += phase["batches"]
        pruned += phase["batches"] if phase["frozen"] or phase.get("fast") else 0
    share = pruned / max(everything, 1)
    after = (own or {}).get("evaluate_ms", dense["evaluate_ms"])
    evaluation_ms = share * after + (1 - share) * dense["evaluate_ms"]
    total += line["figures"]["evaluated_batches"] * evaluation_ms / 1000
    if line.get("rule"):  # operators were chosen
        if "not_measured" in (own or {}):
            return None
        total += line.get("plans", 1) * (own or {}).get("plan_seconds", 0.0)
    return float(total)


def _step_ms(
    phase: Mapping[str, Any], dense: Mapping[str, Any], own: Mapping[str, Any] | None
) -> float | None:
    """Milliseconds of all batches of a phase together."""
    batches = phase["batches"]
    if phase["frozen"]:
        if own is None or "step_ms" not in own:
            return None
        return float(batches * own["step_ms"])
    if phase["stage"] == "dense":
        return float(batches * dense["step_ms"])
    rows = (own or {}).get("stages", {}).get(phase["stage"])
    if not rows:
        return None
    row = min(rows, key=lambda row: abs(row["density"] - phase["density"]))
    plain, update = (_over_dense(row[key], dense) for key in ("ratio", "update_ratio"))
    updates = min(phase["updates"], batches)
    return float(batches * plain + updates * max(update - plain, 0.0))


def _over_dense(ratio: float, dense: Mapping[str, Any]) -> float:
    """A step that takes ``ratio`` dense steps in an engine that is not compiled, beside the fastest one.

    What a stage costs beyond the dense step stays the same when that step is compiled.
    """
    eager = dense.get("eager_step_ms", dense["step_ms"])
    return float(ratio * eager if ratio < 1 else dense["step_ms"] + (ratio - 1) * eager)
