"""A run while it lives: the objects that train, and how their whole state is saved and restored."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel

from clicktrain.accounting import TrainingMemory
from clicktrain.compiler import Accelerated
from clicktrain.errors import UserError
from clicktrain.sparsity.masks import conv_masks
from clicktrain.train.averaging import make_average
from clicktrain.train.checkpoint import newest_good, save_checkpoint
from clicktrain.train.config import config_to_dict
from clicktrain.train.divergence import diverged, weights_are_finite
from clicktrain.train.operators import can_accelerate, choose_operators
from clicktrain.train.prepare import Prepared
from clicktrain.train.progress import Progress
from clicktrain.train.run_folder import RunFolder
from clicktrain.train.state import Course
from clicktrain.train.tensorboard import ScalarLog
from clicktrain.train.thin_state import full_optimizer, full_weights, thin_optimizer, thin_weights

_FREE_TO_CHANGE = frozenset(
    ("device", "threads", "workers", "cache_dir", "evaluate_every", "checkpoint_every", "keep_checkpoints",
     "tensorboard", "compile", "deterministic")
)  # fmt: skip
"""Settings that may differ when a run is resumed: they do not change what is trained."""


@dataclass(eq=False)
class LiveRun:
    """The moving parts of a run."""

    prepared: Prepared
    folder: RunFolder
    progress: Progress
    course: Course = field(default_factory=Course)
    average: AveragedModel | None = None
    scalars: ScalarLog | None = None
    frozen: bool = False
    followed_plans: int = 0
    memory: TrainingMemory | None = None
    memory_of: tuple[tuple[int, ...], ...] = ()
    _forward: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        config = self.prepared.config
        self.scaler = GradScaler(self.prepared.device.type, enabled=config.precision == "fp16")
        if config.ema_decay:
            self.average = make_average(self.prepared.model, config.ema_decay)
            self.prepared.pruner.follow(self.average)
        if config.tensorboard:
            self.scalars = ScalarLog(self.folder.path / "tensorboard")
        self.density = 1.0
        self._seconds_before = 0.0
        self._epochs_before = 0.0
        self._started = time.perf_counter()

    @property
    def forward(self) -> Callable[[Tensor], Tensor]:
        """The network as trained: on fast operators after the hard prune, else compiled if so wished."""
        if self._forward is None:
            self._forward = self._accelerated() or self._compiled()
        return self._forward

    def _compiled(self) -> Callable[[Tensor], Tensor]:
        model = self.prepared.model
        if not self.prepared.config.compile:
            return model
        torch.compiler.reset()  # which keeps few versions of one function, and then uses none
        return torch.compile(model)

    def _accelerated(self) -> nn.Module | None:
        """The packed model on fast operators, None before the hard prune or where there are none."""
        p = self.prepared
        if not (self.frozen and conv_masks(p.pruner.masks) and can_accelerate(p)):
            return None
        chosen = choose_operators(p, self.folder, self.progress, self.course.epoch)
        if chosen.event is not None:
            p.events({**chosen.event, "step": self.course.step, "epoch": self.course.epoch})
        return None if chosen.model is p.model and p.config.compile else chosen.model

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated: the moving average if there is one."""
        if self.average is not None:
            return self.average.module
        forward = self.forward
        return forward if isinstance(forward, Accelerated) else self.prepared.model

    @property
    def seconds(self) -> float:
        """Wall clock of the whole run so far, without the time between interruption and resumption."""
        return self._seconds_before + time.perf_counter() - self._started

    @property
    def eta_seconds(self) -> float | None:
        """Seconds to the end at the pace of this process, None before its first batch."""
        done = self._epochs_done - self._epochs_before
        left = self.prepared.config.epochs - self._epochs_done
        return left * (time.perf_counter() - self._started) / done if done else None

    @property
    def _epochs_done(self) -> float:
        return self.course.epoch + self.course.batch / len(self.prepared.train_loader)

    def follow_pruner(self) -> None:
        """After channels have gone, and once after the hard prune: cost and forward pass follow."""
        pruner = self.prepared.pruner
        if len(pruner.plans) > self.followed_plans:
            self.followed_plans = len(pruner.plans)
            self.prepared.cost.shrink()
            self.density = pruner.density
            self._forward = None
        if self.frozen or not pruner.frozen:
            return
        self.frozen = True
        self.density = pruner.density
        self.prepared.cost.freeze(pruner.masks)
        self._forward = None

    # ---- checkpoints ------------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this moment (between two optimizer steps).

        Raises:
            TrainingDiverged: a weight is not a number; no checkpoint is written then.
        """
        course, config = self.course, self.prepared.config
        epoch = course.epoch + (course.batch > 0)
        if not weights_are_finite(self.prepared.model):
            raise diverged("a weight is not a number", max(epoch, 1), course.batch, self.newest_checkpoint())
        course.seconds = self.seconds
        course.logs = self.folder.log_marks()
        return save_checkpoint(self.folder, epoch, course.step, self.state_dict(), config.keep_checkpoints)

    def newest_checkpoint(self) -> Path | None:
        """The last checkpoint written, if any."""
        return next(reversed(self.folder.checkpoints()), None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on. Random numbers need no state: see `seed_batch`."""
        p = self.prepared
        masks = p.pruner.masks if p.pruner.frozen else {}
        return {
            "settings": config_to_dict(p.config, p.method),
            "course": self.course.state_dict(),
            "model": thin_weights(p.model, masks),
            "optimizer": thin_optimizer(p.optimizer, p.model, masks),
            "scheduler": p.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "batch_sizes": p.batch_sizes.state_dict(),
            "pruner": p.pruner.state_dict(),
            "average": None if self.average is None else thin_weights(self.average, masks),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state; the run must be freshly prepared with the same settings."""
        p = self.prepared
        self._check_settings(saved["settings"])
        self.course = Course.from_state(saved["course"])
        self._seconds_before = self.course.seconds
        p.batch_sizes.load_state(saved["batch_sizes"])
        if p.batch_size != p.config.batch_size:
            p = self.prepared = replace(p, train_loader=p.train_loader.with_batch_size(p.batch_size))
        self._epochs_before = self._epochs_done
        p.pruner.load_state_dict(saved["pruner"])  # packs the model and the optimizer if they were packed
        self.follow_pruner()
        masks = p.pruner.masks
        p.model.load_state_dict(full_weights(p.model, saved["model"], masks))
        p.optimizer.load_state_dict(full_optimizer(saved["optimizer"], masks))
        p.scheduler.load_state_dict(saved["scheduler"])
        self.scaler.load_state_dict(saved["scaler"])
        if self.average is not None:
            self.average.load_state_dict(full_weights(self.average, saved["average"], masks))

    def _check_settings(self, saved: Mapping[str, Any]) -> None:
        now = config_to_dict(self.prepared.config, self.prepared.method)
        for name, value in now.items():
            if name not in _FREE_TO_CHANGE and saved.get(name, value) != value:
                raise UserError(
                    f"{name} is {value!r} in {self.folder.config}, the run was started with {saved[name]!r}: "
                    "put it back, or start another run"
                )

    # ---- beginning --------------------------------------------------------------------------

    def begin(self) -> None:
        """Make the run's folder and write the first checkpoint."""
        self.folder.create(self.prepared.config, self.prepared.method)
        self.course.earlier = self.prepared.earlier
        self.prepared.events.connect(self.folder.append_event)
        self.save()

    def go_on(self) -> None:
        """Continue from the newest good checkpoint; from the beginning if none was written yet."""
        saved = newest_good(self.folder, self.progress.message)
        if saved is None:
            self.progress.message("no checkpoint was written yet: starting from the beginning")
            self.folder.take_back({}, 0.0)
            self.course.earlier = self.prepared.earlier
        else:
            self.load_state_dict(saved)
            self.prepared.events.waiting.clear()  # told before the checkpoint
            self._take_back_logs()
        self.prepared.events.connect(self.folder.append_event)
        if saved is None:
            self.save()

    def _take_back_logs(self) -> None:
        """Cut the logs back to the checkpoint; report those that were changed since."""
        for mended in self.folder.take_back(self.course.logs, self._epochs_done):
            self.progress.message(str(mended))
            self.folder.append_event(
                {
                    "event": "log_mended",
                    "step": self.course.step,
                    "epoch": self._epochs_done,
                    "file": mended.path.name,
                    "lines_kept": mended.lines,
                }
            )
