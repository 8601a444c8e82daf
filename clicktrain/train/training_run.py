"""The objects of a run in progress, and how their whole state is saved and restored."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from clicktrain.accounting import TrainingMemory
from clicktrain.comm.agreement import agree_on_, of_first
from clicktrain.comm.meeting import numbered
from clicktrain.comm.sync_batch_norm import run_together
from clicktrain.compiler import Accelerated, RecordedStep
from clicktrain.data import Batch
from clicktrain.errors import UserError
from clicktrain.formats.atomic import append_jsonl
from clicktrain.methods.driver.publisher import (
    ChannelsRemoved,
    MasksFrozen,
    MasksMoved,
    ParametersReplaced,
    Wrapped,
)
from clicktrain.runs.events import Event, FinalizedEvent, LogMendedEvent, TimePlannedEvent
from clicktrain.runs.folder import RunFolder
from clicktrain.sparsity.masks import conv_masks
from clicktrain.train.averages import SlowWeights, make_average
from clicktrain.train.checkpoint import (
    full_optimizer,
    full_weights,
    newest_good,
    save_checkpoint,
    thin_optimizer,
    thin_weights,
)
from clicktrain.train.config import config_to_dict
from clicktrain.train.device import seed_batch
from clicktrain.train.exchange import in_parallel, share_buffers_
from clicktrain.train.interrupt import diverged, weights_are_finite
from clicktrain.train.norms import norms_kept
from clicktrain.train.operators import can_accelerate, choose_operators
from clicktrain.train.prepare import Prepared
from clicktrain.train.progress import Progress
from clicktrain.train.run_logs import LOGS, RunLogs
from clicktrain.train.state import TrainState
from clicktrain.train.teacher import Teacher, load_teacher, own_teacher

_FREE_TO_CHANGE = frozenset(
    ("device", "parts", "threads", "workers", "cache_dir", "evaluate_every", "checkpoint_every",
     "keep_checkpoints", "tensorboard", "log", "compile", "deterministic", "exchange")
)  # fmt: skip
"""Settings that may change when a run is resumed: because they do not change what is trained, or (parts)
because it was asked for."""


@dataclass(eq=False)
class TrainingRun:
    """A run in progress; subscribes to its pruner and writes to its folder."""

    prepared: Prepared
    folder: RunFolder
    progress: Progress
    state: TrainState = field(default_factory=TrainState)
    average: AveragedModel | None = None
    planned: TimePlannedEvent | None = None
    """How long the run was planned to be, where there is a time budget and the run begins."""
    memory: TrainingMemory | None = None
    """Memory of an iteration of the present network; None while it has to be estimated again."""

    def __post_init__(self) -> None:
        config, pruner = self.prepared.config, self.prepared.pruner
        self.scaler = GradScaler(self.prepared.device.type, enabled=config.precision == "fp16")
        if config.ema_decay:
            self.average = make_average(self.prepared.model, config.ema_decay)
        elif config.lookahead:
            self.average = SlowWeights(self.prepared.model)
        if self.average is not None:
            pruner.follow(self.average)
        names = config.log_names if self.prepared.processes.first else ()
        settings = config_to_dict(config, self.prepared.method) if names else {}
        self.logs = RunLogs([LOGS[name](self.folder.path, settings) for name in names], self.progress.message)
        self.teacher: Teacher | None = None
        """What the network learns from besides the labels; its own dense weights from when they are known."""
        if config.teacher is not None:
            self.teacher = load_teacher(config, self.prepared.facts, self.prepared.device)
        elif config.distill:
            pruner.subscribe(self._keep_dense, FinalizedEvent)
        self.forward: Wrapped[Callable[..., Any]] = pruner.wrapped(self._wrap)
        """The network as trained: on fast operators once it is packed, else compiled if so wished."""
        self.recorded: RecordedStep | None = None
        """The step of ``forward`` and of ``recorded_teacher`` as CUDA graphs, where these are asked for."""
        self.recorded_teacher: Teacher | None = None
        self._fast: Accelerated | None = None
        self._density: float | None = None if pruner.moving else 1.0
        self._seconds_before = 0.0
        self._epochs_before = 0.0
        self._not_finite: Tensor | None = None
        self._started = time.perf_counter()
        pruner.subscribe(self._follow_removal, ChannelsRemoved)
        pruner.subscribe(self._follow_freezing, MasksFrozen)
        pruner.subscribe(self._follow_replacement, ParametersReplaced)
        pruner.subscribe(self._follow_move, MasksMoved)

    def _follow_removal(self, removal: ChannelsRemoved) -> None:
        self.state.note_removal()
        self._density = None

    def _follow_freezing(self, freezing: MasksFrozen) -> None:
        self.state.best_val_accuracy = None  # was that of another network
        self._density = self.memory = None
        if self._fast is not None:
            self.forward.renew()  # other operators may suit the final masks

    def _follow_replacement(self, replacement: ParametersReplaced) -> None:
        self.memory = None
        if self.prepared.pruner.moving:
            self._density = None

    def _follow_move(self, move: MasksMoved) -> None:
        if self._density is not None and self.prepared.pruner.moving:
            self._density = None

    def _keep_dense(self, chosen: FinalizedEvent) -> None:
        self._set_own_teacher(self.prepared.model.state_dict())

    def _set_own_teacher(self, weights: Mapping[str, Tensor]) -> None:
        p = self.prepared
        self.teacher = own_teacher(p.facts, p.pruner.plans, weights, p.model, p.config.channels_last)

    @property
    def active_teacher(self) -> Teacher | None:
        """The teacher in the steps that learn from it: with frozen masks, or where none are ever frozen."""
        p = self.prepared
        return self.teacher if p.pruner.frozen or not p.method.freezes else None

    @property
    def density(self) -> float:
        """Density of the convolution weights; 1 until layers are packed, masks frozen or channels removed."""
        if self._density is None:
            self._density = self.prepared.pruner.density
        return self._density

    def record(self, event: Event) -> None:
        """Write a decision of the trainer into events.jsonl."""
        self._write_event(event.at(self.state.step, self.state.epoch))

    def _write_event(self, event: Event) -> None:
        append_jsonl(self.folder.events, event.to_json())

    def _wrap(self, model: nn.Module) -> Callable[..., Any]:
        """The fast or compiled network, whose gradients are means over all processes if there are several."""
        forward = self._fast_or_compiled(model)
        several = self.prepared.processes.number > 1 and any(p.requires_grad for p in model.parameters())
        return in_parallel(forward, self.prepared) if several else forward

    def pieces(self, batch: Batch, number: int) -> Iterator[tuple[Batch, bool, float]]:
        """This process's images of a batch, of one part after another, while they are trained on.

        Random numbers are seeded for each by ``number``, that of the batch in the run. Batch norms keep the
        statistics of the first one.

        Yields:
            Images, whether they are the last ones, and the factor on their mean loss with which the mean over
            processes is the mean over the batch.
        """
        p = self.prepared
        whole, first = p.batch_images, p.part.rows(p.batch_images).start
        pieces = p.part.pieces(whole)
        for place, (rows, stream) in enumerate(zip(pieces, p.part.streams, strict=True)):
            images = rows.stop - rows.start
            one = batch if len(pieces) == 1 else batch.cut(slice(rows.start - first, rows.stop - first))
            seed_batch(p.config.seed, number, p.device, stream)
            with norms_kept(p.model) if place else contextlib.nullcontext():
                yield one, place + 1 == len(pieces), images * p.processes.number / whole

    def note_not_finite(self, processes: Tensor) -> None:
        """Keep whose loss was not finite when the first one was; [processes], 0 or 1, from all of them."""
        before = processes if self._not_finite is None else self._not_finite
        self._not_finite = torch.where(before.any(), before, processes)

    @property
    def whose_loss(self) -> str:
        """The processes whose loss was not finite first, in words; nothing if it was that of all."""
        if self._not_finite is None:
            return ""
        ranks = self._not_finite.nonzero().flatten().tolist()
        return f" in {numbered(ranks)}" if 0 < len(ranks) < len(self._not_finite) else ""

    def take_norms_of_first(self) -> None:
        """Evaluate, in all processes, with the batch norm statistics that the first one has and saves."""
        models = [self.prepared.model, *([] if self.average is None else [self.average])]
        agree_on_([buffer for model in models for buffer in model.buffers()])

    @contextlib.contextmanager
    def together(self, begins: bool, step: bool) -> Iterator[None]:
        """Around forward and backward pass of images of a batch that all processes share.

        What each process has for itself (``begins``: of a step) becomes the first one's, and gradients travel
        where a ``step`` follows: where batches are accumulated, with the last of them.
        """
        forward = self.forward.current
        with contextlib.ExitStack() as held:
            if isinstance(forward, DistributedDataParallel):
                group = self.prepared.norm_group
                if begins:
                    share_buffers_(forward, norms_alike=group is None)
                held.enter_context(run_together(group))
                if not step:
                    held.enter_context(forward.no_sync())
            yield

    def _fast_or_compiled(self, model: nn.Module) -> nn.Module:
        p, before = self.prepared, self._fast
        if (p.pruner.frozen or p.pruner.moving) and conv_masks(p.pruner.masks) and can_accelerate(p):
            # A view of the model goes on whatever its layers' positions and values are.
            if before is not None and not p.pruner.frozen:
                return before
            fast, event = choose_operators(p, self.folder, self.progress, self.state.epoch, before)
            if event is not None and (before is not None or not self.state.operators_recorded):
                self.record(event)
                self.state.operators_recorded = True
            if isinstance(fast, Accelerated):
                self._fast, self.memory = fast, None  # layers that run one by one keep other activations
                return fast
        if not p.config.compile:
            return model
        torch.compiler.reset()  # which keeps few versions of one function, and then uses none
        return cast("nn.Module", torch.compile(model))

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated: the moving average if there is one."""
        if self.average is not None:
            return self.average.module
        forward = self.forward.current
        if isinstance(forward, DistributedDataParallel):
            forward = forward.module
        return forward if isinstance(forward, Accelerated) else self.prepared.model

    @property
    def seconds(self) -> float:
        """Wall clock of the whole run so far, without interruptions."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def eta_seconds(self) -> float | None:
        """Time left at the pace of this process, None before its first batch."""
        done = self._epochs_done - self._epochs_before
        left = self.prepared.config.epochs - self._epochs_done
        return left * (time.perf_counter() - self._started) / done if done else None

    @property
    def _epochs_done(self) -> float:
        return self.state.epoch + self.state.batch / len(self.prepared.train_loader)

    def save(self) -> Path:
        """Write a checkpoint, between two optimizer steps.

        Raises:
            TrainingDiverged: a weight is not a number; no checkpoint is written then.
        """
        state, config = self.state, self.prepared.config
        epoch = state.epoch + (state.batch > 0)
        if not weights_are_finite(self.prepared.model):
            raise diverged("a weight is not a number", max(epoch, 1), state.batch, self.newest_checkpoint())
        state.seconds = self.seconds
        if not self.prepared.processes.first:
            return self.folder.checkpoint(epoch, state.step)
        state.logs = self.folder.log_marks()
        return save_checkpoint(self.folder, epoch, state.step, self.state_dict(), config.keep_checkpoints)

    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint written, if any."""
        return next(reversed(self.folder.checkpoints()), None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; random numbers have no state, see `seed_batch`."""
        p = self.prepared
        masks = p.pruner.masks if p.pruner.frozen else {}
        return {
            "settings": config_to_dict(p.config, p.method),
            "state": self.state.state_dict(),
            "model": thin_weights(p.model, masks),
            "optimizer": thin_optimizer(p.optimizer, p.model, masks),
            "scheduler": p.scheduler.state_dict(),
            "teacher": self.teacher.model.state_dict()
            if self.teacher is not None and p.config.teacher is None
            else None,
            "cycle": None if p.cycle is None else p.cycle.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batch_sizes": p.batch_sizes.state_dict(),
            "pruner": p.pruner.state_dict(),
            "average": None if self.average is None else thin_weights(self.average, masks),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resume from a saved state; the run must be freshly prepared with the same settings."""
        p = self.prepared
        self._check_settings(saved["settings"])
        p.batch_sizes.load_state(saved["batch_sizes"])
        if p.batch_size != p.config.batch_size:
            p = self.prepared = replace(p, train_loader=p.train_loader.with_batch_size(p.batch_size))
        p.pruner.load_state_dict(saved["pruner"])  # packs the model and the optimizer if they were packed
        self.state = TrainState.from_state(saved["state"])  # knows of the removals that were done again
        self._seconds_before, self._epochs_before = self.state.seconds, self._epochs_done
        masks = p.pruner.masks
        p.model.load_state_dict(full_weights(p.model, saved["model"], masks))
        p.optimizer.load_state_dict(full_optimizer(saved["optimizer"], masks))
        p.scheduler.load_state_dict(saved["scheduler"])
        if saved["teacher"] is not None:
            self._set_own_teacher(saved["teacher"])
        if p.cycle is not None:
            p.cycle.load_state(saved["cycle"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.load_state_dict(full_weights(self.average, saved["average"], masks))

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        now = config_to_dict(self.prepared.config, self.prepared.method)
        for name, value in now.items():
            # A setting that a version before had not is at its default in config.yaml.
            if name not in _FREE_TO_CHANGE and saved.get(name, value) != value:
                raise UserError(
                    f"{name} is {value!r} in {self.folder.config}, the run was started with {saved[name]!r}: "
                    "put it back, or start another run"
                )

    def begin(self) -> None:
        """Create the run's folder and write the first checkpoint."""
        self.folder.create(config_to_dict(self.prepared.config, self.prepared.method))
        self._start()

    def _start(self) -> None:
        """Write what was decided before the first step, and the checkpoint that comes before it."""
        self.state.earlier = self.prepared.earlier
        if self.planned is not None:
            self.state.seconds_asked = self.planned.seconds_asked
            self.state.seconds_planned = self.planned.seconds_planned
            self.record(self.planned)
        for event in self.prepared.pruner.events:
            append_jsonl(self.folder.events, event)
        self.prepared.pruner.subscribe(self._write_event, Event)
        self.save()

    def go_on(self) -> None:
        """Resume from the newest good checkpoint, or from the beginning if there is none."""
        if not self.prepared.processes.first:  # the folder of its own is a new one
            self.folder.create(config_to_dict(self.prepared.config, self.prepared.method))
        saved = of_first(lambda: newest_good(self.folder, self.progress.message))
        if saved is None:
            self.progress.message("no checkpoint was written yet: starting from the beginning")
            if self.prepared.processes.first:
                self.folder.take_back({}, 0.0)
            self._start()
        else:
            self.load_state_dict(saved)
            if self.prepared.processes.first:
                self.folder.change_setting("parts", self.prepared.config.parts)
                self._take_back_logs()
            self.prepared.pruner.subscribe(self._write_event, Event)

    def _take_back_logs(self) -> None:
        for mended in self.folder.take_back(self.state.logs, self._epochs_done):
            self.progress.message(str(mended))
            event = LogMendedEvent(file=mended.path.name, lines_kept=mended.lines)
            self.record(event.at(self.state.step, self._epochs_done))
