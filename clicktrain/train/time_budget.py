"""How many epochs fit into a time budget: chosen before a run starts, from measured times."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from clicktrain.errors import UserError
from clicktrain.methods import Method
from clicktrain.methods.outcome import NOTED, Target
from clicktrain.runs.events import TimePlannedEvent
from clicktrain.train.config import RunConfig
from clicktrain.train.setting_checks import budget_of
from clicktrain.train.stage_times import RunTimes, measure_run
from clicktrain.wording import short_duration

_MOST_EPOCHS = 1_000_000


def plan_time(
    config: RunConfig, method: Method[Any], message: Callable[[str], None]
) -> tuple[RunConfig, TimePlannedEvent]:
    """Measure, and choose the epochs that fit; ``message`` is sent what was found.

    Returns:
        The settings with these epochs, and the decision for events.jsonl.

    Raises:
        UserError: the budget is too short for the method; or as `prepare`.
    """
    assert config.time_budget is not None
    dense_epochs = config.budget_epochs or config.epochs
    share, seconds = budget_of(config.time_budget)
    started = time.perf_counter()
    message(f"measuring steps for time_budget {config.time_budget}")
    asked = dataclasses.replace(config, epochs=dense_epochs, time_budget=None, budget_epochs=None)
    times = measure_run(asked, method)
    dense = run_seconds(config, times, dense_epochs, dense=True)
    budget = seconds if share is None else share * dense
    assert budget is not None
    epochs = fitting_epochs(config, times, budget)
    if epochs == 0:
        raise UserError(
            f"time_budget is {config.time_budget}, {short_duration(budget)} here, but one epoch takes about "
            f"{short_duration(run_seconds(config, times, 1))}: give more time"
        )
    try:
        cut = times.latest_cut(epochs)
        planned = dataclasses.replace(config, epochs=epochs, budget_epochs=dense_epochs)
    except UserError as error:
        raise _too_short(config, budget, epochs, error) from None
    event = TimePlannedEvent(
        time_budget=config.time_budget,
        dense_epochs=dense_epochs,
        epochs=epochs,
        seconds_asked=budget,
        seconds_planned=run_seconds(config, times, epochs),
        planning_seconds=time.perf_counter() - started,
        cut_epoch=cut,
        times=times.to_json(),
    )
    message(_in_words(event, times, dense, share is not None))
    return planned, event


def too_short(config: RunConfig, event: TimePlannedEvent, error: UserError) -> UserError:
    """The error of a method that cannot do with the epochs that were chosen."""
    return _too_short(config, event.seconds_asked, event.epochs, error)


def _too_short(config: RunConfig, budget: float, epochs: int, error: UserError) -> UserError:
    plural = "" if epochs == 1 else "s"
    return UserError(
        f"time_budget is {config.time_budget}, {short_duration(budget)} here, which is too short for method "
        f"{config.method}: {epochs} epoch{plural} fit, but {error}"
    )


def run_seconds(config: RunConfig, times: RunTimes, epochs: int, *, dense: bool = False) -> float:
    """Seconds of a run of this many epochs: batches, evaluations and checkpoints in each of its stages.

    ``dense``: of the dense run.
    """
    before = times.dense if dense else times.before
    after, cut = before, float(epochs)
    if not dense and times.after is not None:
        try:
            known = times.latest_cut(epochs)
        except UserError:  # too short for the method: an upper estimate
            known = None
        if known is not None:
            after, cut = times.after, min(known, float(epochs))
    first, whole = round(cut * times.batches), math.floor(cut)
    total = before.setup + first * before.batch
    if (rest := epochs * times.batches - first) > 0:
        total += rest * after.batch + (after.setup if after is not before else 0.0)
    for every, kind in ((config.evaluate_every, "evaluation"), (config.checkpoint_every, "checkpoint")):
        early, all_of_them = _count(every, whole, epochs), _count(every, epochs, epochs)
        total += early * getattr(before, kind) + (all_of_them - early) * getattr(after, kind)
    return total


def _count(every: int, until: int, epochs: int) -> int:
    """How often something happens that is due after every `every` epochs, and after the last one."""
    return until // every + (until == epochs and epochs % every > 0)


def fitting_epochs(config: RunConfig, times: RunTimes, budget: float) -> int:
    """The largest number of epochs whose run takes at most ``budget`` seconds; 0 if not even one does."""
    low, high = 0, 1
    while high <= _MOST_EPOCHS and run_seconds(config, times, high) <= budget * (1 + 1e-9):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if run_seconds(config, times, middle) <= budget * (1 + 1e-9):
            low = middle
        else:
            high = middle
    return low


def _in_words(event: TimePlannedEvent, times: RunTimes, dense: float, relative: bool) -> str:
    of = f" (the dense run of {event.dense_epochs} epochs takes {short_duration(dense)})" if relative else ""
    milliseconds = [f"{1000 * times.before.batch:.4g} ms a batch"]
    if times.after is not None:
        milliseconds.append(f"{1000 * times.after.batch:.4g} ms once masks are frozen")
    milliseconds.append(f"{1000 * times.dense.batch:.4g} ms dense")
    return (
        f"{event.epochs} epochs fit into {short_duration(event.seconds_asked)}{of}, about "
        f"{short_duration(event.seconds_planned)}: {', '.join(milliseconds)}"
    )


def time_target(asked: float, planned: float, used: float, epochs: int) -> Target:
    """The budget beside the seconds that the run took, with a reason where they differ."""
    reason = ""
    if abs(used - asked) > NOTED * asked:
        reason = f"{short_duration(planned)} were planned for {epochs} whole epochs"
        if abs(used - planned) > NOTED * asked:
            what = "longer" if used > planned else "shorter"
            reason += f", and steps took {what} than was measured"
    return Target("training time", asked, used, "s", reason)
