"""How long steps, evaluations and checkpoints of a run will take: measured side by side before it starts."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clicktrain.data import Batch
from clicktrain.errors import MissedTarget
from clicktrain.methods import METHODS, Method
from clicktrain.methods.contract import RunLength
from clicktrain.runs.folder import RunFolder
from clicktrain.train.config import RunConfig
from clicktrain.train.device import autocast
from clicktrain.train.loss import training_loss
from clicktrain.train.prepare import prepare
from clicktrain.train.progress import Silent
from clicktrain.train.training_run import TrainingRun
from clicktrain.train.views import mean_logits

_WARM_UP, _ROUNDS, _LEAST_ROUNDS = 1, 7, 3
_ENOUGH_SECONDS = 20.0
"""After these no round is begun beyond the least number."""
_EVALUATED = 3
"""Batches of an evaluation that are timed."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one stage of a run: a batch of training, a whole evaluation, a checkpoint.

    ``setup`` is what comes once, when the stage begins: operators are chosen and compiled.
    """

    batch: float
    evaluation: float
    checkpoint: float
    setup: float = 0.0


@dataclass(frozen=True, eq=False)
class RunTimes:
    """Times of a run, dense and as its method has it.

    Attributes:
        dense: of the dense run of the same settings.
        before, after: before and after masks are frozen; ``after`` is None for methods that never freeze
            them or do not say when, whose steps count as those of the beginning.
        batches: of an epoch.
        latest_cut: see `Pruner.latest_cut`.
    """

    dense: StageTimes
    before: StageTimes
    after: StageTimes | None
    batches: int
    pruner: Any

    def latest_cut(self, epochs: int) -> float | None:
        """Epochs done when masks are frozen at the latest in a run of `epochs`; None: never, or not said."""
        if self.after is None:
            return None
        cut: float | None = self.pruner.latest_cut(RunLength(epochs, self.batches))
        return cut

    def to_json(self) -> dict[str, dict[str, float] | None]:
        """For an event."""
        return {
            "dense": asdict(self.dense),
            "before": asdict(self.before),
            "after": None if self.after is None else asdict(self.after),
        }


def measure_run(config: RunConfig, method: Method[Any]) -> RunTimes:
    """Time a few batches of the dense network, of the method's first steps and of a pruned network.

    The pruned network is what the method makes of the initial weights at once: its sizes and densities are
    those of the run's target, its positions are others. Batches take turns, so that what else the machine
    does falls on all alike.

    Raises:
        UserError: as `prepare`.
    """
    with tempfile.TemporaryDirectory(prefix="clicktrain-") as folder, contextlib.ExitStack() as held:
        path = Path(folder)
        runs = {"before": _probe(config, method, path / "before")}
        first = runs["before"].prepared
        held.callback(first.pruner.close)
        length = RunLength(config.epochs, len(first.train_loader))
        runs["dense"] = runs["before"]
        if method.prunes:
            plain = replace(config, method="dense", dynamic_batch=False, memory_budget=None, batch_limit=None)
            runs["dense"] = _probe(plain, METHODS["dense"](), path / "dense")
            held.callback(runs["dense"].prepared.pruner.close)
        if method.freezes and first.pruner.latest_cut(length) is not None:
            runs["after"] = _probe(config, method, path / "after")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MissedTarget)
                runs["after"].prepared.pruner.finish(packed=config.packed)
        times = _times(runs)
        return RunTimes(
            dense=times["dense"],
            before=times["before"],
            after=times.get("after"),
            batches=length.steps_per_epoch,
            pruner=first.pruner,
        )


def _probe(config: RunConfig, method: Method[Any], path: Path) -> TrainingRun:
    """A run that does not move its weights, in a folder of its own."""
    folder = RunFolder(path)
    folder.checkpoint_folder.mkdir(parents=True)
    run = TrainingRun(prepare(config, method), folder, Silent())
    for group in run.prepared.optimizer.param_groups:
        group["lr"] = 0.0
    run.prepared.model.train()
    return run


def _times(runs: dict[str, TrainingRun]) -> dict[str, StageTimes]:
    distinct = {id(run): run for run in runs.values()}
    data: list[float] = []
    batches: dict[int, list[float]] = {key: [] for key in distinct}
    setup = {key: _seconds_to_wrap(run) for key, run in distinct.items()}
    started = time.perf_counter()
    source = _endless(next(iter(distinct.values())))
    for number in range(_WARM_UP + _ROUNDS):
        enough = time.perf_counter() - started > _ENOUGH_SECONDS
        if number >= _WARM_UP + _LEAST_ROUNDS and enough:
            break
        before = time.perf_counter()
        batch = next(source)
        data.append(time.perf_counter() - before)
        for key, run in distinct.items():
            batches[key].append(_batch_seconds(run, batch))
    waiting = statistics.median(data[_WARM_UP:])
    stages = {}
    for key, run in distinct.items():
        computing = statistics.median(batches[key][_WARM_UP:])
        evaluation, first = _evaluation_seconds(run)
        once = setup[key] + max(batches[key][0] - computing, 0.0) + first
        stages[key] = StageTimes(waiting + computing, evaluation, _checkpoint_seconds(run), once)
    return {name: stages[id(run)] for name, run in runs.items()}


def _seconds_to_wrap(run: TrainingRun) -> float:
    """Seconds in which the operators of a packed network are chosen; next to none without one."""
    started = time.perf_counter()
    _ = run.forward.current
    return time.perf_counter() - started


def _endless(run: TrainingRun) -> Iterator[Batch]:
    while True:
        yield from run.prepared.train_loader.epoch(0)


def _batch_seconds(run: TrainingRun, batch: Batch) -> float:
    """Seconds of a batch; of an optimizer step as many as fall on it."""
    p = run.prepared
    started = time.perf_counter()
    loss, _ = training_loss(run, batch, run.active_teacher)
    run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    watched = not p.pruner.frozen and p.pruner.progress.epoch < p.config.epochs
    if watched:
        p.pruner.observe(loss)
    loss.item()  # waits for the device
    middle = time.perf_counter()
    run.scaler.step(p.optimizer)
    run.scaler.update()
    p.optimizer.zero_grad()
    if run.average is not None:
        run.average.update_parameters(p.model)
    if p.device.type == "cuda":
        torch.cuda.synchronize(p.device)
    return middle - started + (time.perf_counter() - middle) / p.config.accumulate


@torch.no_grad()
def _evaluation_seconds(run: TrainingRun) -> tuple[float, float]:
    """Seconds of an evaluation of the validation images, from a few batches, and excess of the first one."""
    p, model, times = run.prepared, run.evaluated_model, []
    was_training = model.training
    model.eval()
    for number, batch in enumerate(p.val_loader.epoch(0)):
        before = time.perf_counter()
        with autocast(p.device, p.config.precision):
            mean_logits(model, batch.x, p.config.test_time_augmentation).argmax(dim=1).cpu()
        times.append((time.perf_counter() - before) / len(batch.y))
        if number + 1 >= _EVALUATED:
            break
    model.train(was_training)
    of_image = statistics.median(times[1:] or times)
    excess = max(times[0] - of_image, 0.0) * min(p.batch_size, len(p.data.val))
    images = len(p.data.val)
    if run.average is not None:  # its norms are measured before each evaluation
        images += p.config.recalibrate_norms * p.batch_size
    return of_image * images, excess


def _checkpoint_seconds(run: TrainingRun) -> float:
    started = time.perf_counter()
    run.save()
    return time.perf_counter() - started
