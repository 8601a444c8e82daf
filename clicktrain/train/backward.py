"""Gradients of a batch: as written, or replayed from a CUDA graph."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from clicktrain.compiler import RecordedStep
from clicktrain.data import Batch
from clicktrain.train.loss import loss_of, mixed, training_loss
from clicktrain.train.teacher import Teacher
from clicktrain.train.training_run import TrainingRun


def add_gradients(
    run: TrainingRun, batch: Batch, teacher: Teacher | None, share: float, group: int
) -> tuple[Tensor, Tensor]:
    """Forward and backward pass; gradients of ``share / group`` of the mean loss are added to those there.

    Returns:
        ``share`` of the loss, without its graph, and the number of correct predictions; both 0-dim.
    """
    if run.prepared.config.cuda_graphs and share == 1 and group == run.prepared.config.accumulate:
        loss, correct = _recorded(run, teacher, group)(*mixed(run, batch), batch.y)
        return loss, correct
    loss, correct = training_loss(run, batch, teacher)
    loss = loss if share == 1 else loss * share
    run.scaler.scale(loss / group).backward()  # type: ignore[no-untyped-call]
    return loss.detach(), correct


def _recorded(run: TrainingRun, teacher: Teacher | None, group: int) -> RecordedStep:
    """The step of the network as it is trained now."""
    forward = cast("nn.Module", run.forward.current)
    if run.recorded is None or run.recorded.model is not forward or run.recorded_teacher is not teacher:
        run.recorded = RecordedStep(
            lambda x, target, y: loss_of(run, x, target, y, teacher),
            forward,
            scale=lambda loss: run.scaler.scale(loss / group),
        )
        run.recorded_teacher = teacher
    return run.recorded
