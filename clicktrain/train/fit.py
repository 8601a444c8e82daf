"""The training loop. It drives a method exactly as anybody's own loop does: backward, observe, step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from clicktrain.comm.agreement import of_first
from clicktrain.comm.alike import check_same_code, check_same_settings
from clicktrain.comm.processes import TIMEOUT_S, Processes, lost_by, together
from clicktrain.errors import FailedElsewhere, NetworkCollapsed, UserError
from clicktrain.files import is_file
from clicktrain.methods import Method
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.summary import RunSummary
from clicktrain.train.channel_log import watch_channels
from clicktrain.train.checkpoint import bytes_needed, check_disk
from clicktrain.train.config import RunConfig, config_to_dict, resume_command
from clicktrain.train.epoch import end_epoch, train_epoch
from clicktrain.train.interrupt import (
    StoppedAtOnce,
    StopRequest,
    TrainingDiverged,
    TrainingInterrupted,
    collapsed,
    is_out_of_memory,
    out_of_memory,
)
from clicktrain.train.minibatch import set_memory_budget
from clicktrain.train.prepare import prepare
from clicktrain.train.progress import Progress, Silent
from clicktrain.train.summary import finish_run
from clicktrain.train.time_budget import plan_time, too_short
from clicktrain.train.training_run import TrainingRun

Resume = bool | Literal["if begun", "if restarted"]
"""Whether a run is one that has begun; see `fit`."""


def fit(
    config: RunConfig,
    method: Method[Any],
    folder: RunFolder | str | Path,
    *,
    progress: Progress | None = None,
    resume: Resume = False,
    process_timeout: float = TIMEOUT_S,
) -> Mapping[str, Any]:
    """Train and prune, and write the files of a run.

    Same settings, same seed, same machine and thread count give the same weights, bit for bit, and so does a
    run that was interrupted and resumed at any point. On cuda this needs ``deterministic``.

    Where ``torchrun`` has started several processes, each trains on its part of every batch, and all decide
    alike. The first one writes the folder and calls the listener; others keep notes in a temporary folder.

    Args:
        config: settings of the run, from `from_dict`, or `load_run_config` to ``resume``.
        method: what prunes and how, from the same.
        folder: of the run; missing or empty (or left by a run that was killed before its first checkpoint),
            unless ``resume``. One process at a time trains in it.
        progress: listener; silent by default.
        resume: continue the run in ``folder``: always, if it has begun, or if it has and a launcher has
            started this process after those that had begun it.
        process_timeout: seconds that several processes wait for one that does not arrive.

    Returns:
        The summary, as in summary.json.

    Raises:
        UserError: the settings cannot be carried out, and nothing is written; or the folder cannot be written
            to any more, because the disk is full or the folder was deleted.
        RunFolderInUse: another process trains in the folder.
        TrainingDiverged: the loss is not finite or exploded; the last good checkpoint remains.
        NetworkCollapsed: pruning has destroyed the network; the checkpoint from before remains.
        TrainingInterrupted: SIGTERM, SIGINT or SIGHUP; a checkpoint was written if training had begun.
        ProcessLost: another process has died, or does not arrive.
        OutOfMemory: there is no memory left.
    """
    progress = progress or Silent()
    folder = folder if isinstance(folder, RunFolder) else RunFolder(Path(folder))
    if not 0 < process_timeout < math.inf:
        raise UserError(f"process_timeout is {process_timeout}: must be above 0 seconds")
    with together(process_timeout) as processes:
        check_same_code()
        goes_on = resume is True
        if isinstance(resume, str):
            before = resume == "if begun" or processes.restarts > 0 or processes.launch.has_begun(folder.path)
            goes_on = of_first(lambda: before and is_file(folder.config))
        if not goes_on:
            of_first(folder.check_free)
        elif (summary := of_first(lambda: folder.open().summary())) is not None:
            return _finished(folder, summary, progress)
        if processes.first:
            return _fit_or_stop(config, method, folder, progress, goes_on, processes)
        with tempfile.TemporaryDirectory(prefix="clicktrain-") as own, _speechless():
            return _fit_or_stop(config, method, RunFolder(Path(own) / "run"), Silent(), goes_on, processes)


@contextlib.contextmanager
def _speechless() -> Iterator[None]:
    """For a process that is not the first, which decides alike and says it: errors and warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    except (NetworkCollapsed, TrainingDiverged) as error:
        raise FailedElsewhere(str(error)) from None


def _fit_or_stop(
    config: RunConfig,
    method: Method[Any],
    folder: RunFolder,
    progress: Progress,
    resume: bool,
    processes: Processes,
) -> Mapping[str, Any]:
    with StopRequest() as stop:
        try:
            return _fit(config, method, folder, progress, stop, resume, processes)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise out_of_memory(config, error) from error
            # Here, where a launcher's SIGTERM does not end this process in the middle of its sentence.
            if (lost := lost_by(error)) is not None:
                raise lost from error
            raise
        except StoppedAtOnce as stopped:
            command = resume_command(folder, config, method)
            again = f"continue with '{command}'" if resume else "nothing was written"
            raise TrainingInterrupted(stopped.signum, f"stopped before training began; {again}") from None
        except OSError as error:
            explained = folder.explained(error)
            if explained is error:
                raise
            raise explained from error


def _fit(
    config: RunConfig,
    method: Method[Any],
    folder: RunFolder,
    progress: Progress,
    stop: StopRequest,
    resume: bool,
    processes: Processes,
) -> Mapping[str, Any]:
    with contextlib.ExitStack() as held:
        stop.at_once = True
        if resume:
            of_first(lambda: held.enter_context(folder.in_use(progress.message)))
            if (summary := of_first(folder.summary)) is not None:  # finished while this process was starting
                return _finished(folder, summary, progress)
        config = dataclasses.replace(
            config, parts=of_first(lambda: _parts(config, folder, resume, processes))
        )
        check_same_settings(config_to_dict(config, method))
        begun = resume and of_first(lambda: bool(folder.checkpoints()))
        planned = None
        if config.time_budget is not None and not resume:
            if processes.number > 1:
                raise UserError("time_budget is planned for one process: give epochs to several")
            config, planned = plan_time(config, method, progress.message)
        elif config.time_budget is not None and not begun:
            raise UserError(
                f"the run in {folder.path} was killed before its first checkpoint, and its time budget has "
                "to be planned again: start it again with the same command"
            )
        try:
            prepared = prepare(config, method, processes, begins=not begun)
        except UserError as error:
            raise error if planned is None else too_short(config, planned, error) from None
        of_first(lambda: check_disk(folder.path, bytes_needed(prepared.model, config)))
        stop.at_once = False
        if not resume:
            of_first(lambda: held.enter_context(folder.in_use(progress.message, new=True)))
        run = TrainingRun(prepared, folder, progress)
        watch_channels(run)
        if not begun:
            set_memory_budget(run)
        run.planned = planned
        if resume:
            run.go_on()
        else:
            run.begin()
        if processes.first:
            processes.launch.begins(folder.path)
        held.callback(run.logs.close)
        of_first(lambda: run.logs.begin(run.state.epoch + 1))
        progress.start(config, method, prepared)
        if config.second_cycle is not None and prepared.cycle is None:
            progress.message(f"second_cycle has no effect: method {config.method} never freezes masks")
        try:
            while run.state.epoch < config.epochs:
                train_epoch(run, stop)
                end_epoch(run, stop)
            summary = RunSummary(finish_run(run))
        except NetworkCollapsed as collapse:
            raise collapsed(str(collapse), run.newest_checkpoint()) from None
    progress.finish(summary)
    return summary


def _parts(config: RunConfig, folder: RunFolder, resume: bool, processes: Processes) -> int | None:
    """Parts of a batch: as asked for, as in the run that is resumed, else one for each process."""
    if config.parts is not None:
        return config.parts
    if resume:
        parts = folder.read_settings().get("parts")
        return parts if isinstance(parts, int) else None
    return processes.number if processes.number > 1 else None


def _finished(folder: RunFolder, summary: Mapping[str, Any], progress: Progress) -> Mapping[str, Any]:
    progress.message(f"the run in {folder.path} is finished already: nothing to resume")
    return summary
