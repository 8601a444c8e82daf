"""The trainer's own steps and evaluations, one at a time, so that those of several runs can take turns.

What is timed is what a run does: loading and augmenting images, forward, loss, backward, the pruner's hooks
and the optimizer. Images are drawn, in the sizes of the run's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clicktrain.compiler import Accelerated
from clicktrain.data import Batch
from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers, find_prunable
from clicktrain.methods.base import (
    Action,
    LayerPlan,
    Method,
    PruningPlan,
    Record,
    RunLength,
    StepInfo,
    hard_prune,
    plan_rows,
)
from clicktrain.runs.events import FinalizedEvent
from clicktrain.runs.folder import RunFolder
from clicktrain.train.augmentation import augment_preset
from clicktrain.train.config import RunConfig
from clicktrain.train.epoch import train_batch
from clicktrain.train.evaluate import evaluate
from clicktrain.train.prepare import prepare
from clicktrain.train.progress import Silent
from clicktrain.train.training_run import TrainingRun

ENDLESS = 1_000_000
"""Epochs of a run that is only timed."""
STEPS_PER_EPOCH = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class GivenMasks(Method[None]):
    """Freezes masks that are given, after the first step: the network of a run that has pruned."""

    name: ClassVar[str] = "given-masks"
    title: ClassVar[str] = "given masks"
    dense_until_chosen: ClassVar[bool] = True

    masks: Mapping[str, Tensor]
    """Layer name -> bool of the weight's shape, True = kept."""

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """The layers with masks, whatever they are."""
        linear = any(mask.dim() == 2 for mask in self.masks.values())
        return find_prunable(model, trained, include=tuple(self.masks), linear=linear)

    def init(self, prunable: PrunableLayers, length: RunLength) -> None:
        """No state; UserError where the network lacks a layer."""
        if missing := set(self.masks) - {layer.name for layer in prunable.layers}:
            raise UserError(f"the network has no layer {min(missing)} that could be pruned")

    def plan(self, prunable: PrunableLayers, length: RunLength, state: None = None) -> PruningPlan:
        """What is kept of each layer."""
        rows = [
            LayerPlan(layer.name, layer.shape, "given", float(self.masks[layer.name].float().mean()))
            for layer in prunable.layers
            if layer.name in self.masks
        ]
        return PruningPlan(plan_rows(prunable, rows), "masks are given")

    def after_step(self, state: None, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Freeze, once; whoever wants to learn from the dense network takes its weights before."""
        if step.seen > 1:
            return ()
        chosen = FinalizedEvent(compression_asked=None, compression_reached=1.0, layers=())
        return [Record(chosen), *hard_prune(prunable, self.masks)]


def drawn_images(config: RunConfig, network: Mapping[str, Any], steps_per_epoch: int) -> RunConfig:
    """The settings of a run with drawn images in place of its own, and the augmentation of its own.

    Args:
        config: of the run.
        network: ``classes`` and ``image_shape`` [C, H, W] of its data.
        steps_per_epoch: batches of an epoch; validation images make one batch.

    Raises:
        UserError: the images are not square.
    """
    channels, height, width = network["image_shape"]
    if height != width:
        raise UserError(f"images of {height}x{width} cannot be timed: only square ones can be drawn")
    images, classes = config.batch_size, network["classes"]
    augment: Any = augment_preset(config, config.data, network["image_shape"])
    train = max(images * steps_per_epoch, classes)
    text = f"classes={classes},size={height},channels={channels},train={train},val={images}"
    return replace(
        config, data=f"synthetic:{text}", augment=augment, image_size=None, holdout=None, shuffle_buffer=None,
        log=(), tensorboard=False, device="cpu",
        # What is drawn is not to be learned: weights hardly move, and no loss explodes.
        learning_rate=1e-4, learning_rate_batch=None, schedule="constant", warmup_epochs=0.0,
        second_cycle=None, time_budget=None, budget_epochs=None, recalibrate_norms=0,
    )  # fmt: skip


class TrainerSteps:
    """A run that is only timed: ``step()`` trains on a batch, ``evaluate()`` evaluates on one.

    Args:
        config: from `drawn_images`; its epochs are those of the method's schedule.
        method: attached as in a run; weights that it expects are not loaded.
    """

    def __init__(self, config: RunConfig, method: Method[Any]) -> None:
        if method.expects_trained:
            config = replace(config, initial_weights="none: only timed")
        prepared = prepare(config, method, begins=False)
        # A short run would not measure operators before it chooses: the one that it stands for is long.
        prepared = replace(prepared, config=replace(config, epochs=ENDLESS))
        self._files = tempfile.TemporaryDirectory(prefix="clicktrain-frontier-")
        self.run = TrainingRun(prepared, RunFolder(Path(self._files.name)), Silent())
        self._batches: Iterator[Batch] = iter(())
        prepared.model.train()

    @property
    def stage(self) -> str:
        """Stage of the method."""
        return self.run.prepared.pruner.stage

    @property
    def density(self) -> float:
        """Density of the convolutions as the method has them now."""
        return self.run.prepared.pruner.density

    @property
    def frozen(self) -> bool:
        """Whether masks do not change any more."""
        return self.run.prepared.pruner.frozen

    @property
    def accelerated(self) -> bool:
        """Whether the network runs on fast operators."""
        return isinstance(self.run.forward.current, Accelerated)

    def step(self) -> None:
        """Train on the next batch, as the trainer does; waits for the loss, as it does on a CPU."""
        batch = next(self._batches, None)
        if batch is None:
            state, loader = self.run.state, self.run.prepared.train_loader
            state.epoch, state.batch = state.epoch + (state.batch > 0), 0
            self._batches = iter(loader.epoch(state.epoch % STEPS_PER_EPOCH))
            batch = next(self._batches)
        loss, correct, _ = train_batch(self.run, batch)
        torch.stack((loss.detach().float(), correct.float())).tolist()

    def evaluate(self) -> None:
        """Evaluate on a batch."""
        p = self.run.prepared
        evaluate(self.run.evaluated_model, p.val_loader, device=p.device, precision=p.config.precision)
        p.model.train()

    def close(self) -> None:
        """Take the hooks off and remove temporary files."""
        self.run.prepared.pruner.close()
        self._files.cleanup()
