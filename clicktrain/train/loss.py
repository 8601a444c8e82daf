"""The loss that is trained on."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.data import Batch, Mixing
from clicktrain.errors import UserError
from clicktrain.train.config import RunConfig
from clicktrain.train.device import autocast
from clicktrain.train.teacher import Teacher, distillation_loss
from clicktrain.train.training_run import TrainingRun


def training_loss(run: TrainingRun, batch: Batch, teacher: Teacher | None = None) -> tuple[Tensor, Tensor]:
    """Loss with its graph, and the number of correct predictions; both 0-dim.

    With a ``teacher``, ``(1 - distill)`` of the loss on labels and ``distill`` of `distillation_loss`, both
    on the images as they were mixed.

    Raises:
        UserError: in training the network gives something else than one tensor.
    """
    return loss_of(run, *mixed(run, batch), batch.y, teacher)


def mixed(run: TrainingRun, batch: Batch) -> tuple[Tensor, Tensor]:
    """Images and targets of a batch as the settings mix them, by the random numbers of the batch."""
    mixing = mixing_of(run.prepared.config)
    if not mixing:
        return batch.x, batch.y
    generator = torch.Generator().manual_seed(torch.initial_seed())  # seeded for this batch
    with autocast(run.prepared.device, run.prepared.config.precision):
        return mixing(batch.x, batch.y, run.prepared.facts["num_classes"], generator)


def loss_of(
    run: TrainingRun, x: Tensor, target: Tensor, y: Tensor, teacher: Teacher | None = None
) -> tuple[Tensor, Tensor]:
    """As `training_loss`, of images and targets that are `mixed`; ``y`` are the labels."""
    config = run.prepared.config
    with autocast(run.prepared.device, config.precision):
        output = run.forward.current(x)
        if not isinstance(output, Tensor):
            raise UserError(
                f"model {config.model} gives a {type(output).__name__} in training mode: let it return the "
                "logits alone, without auxiliary outputs"
            )
        loss = label_loss(config, output.float(), target)
        if teacher is not None:
            taught = distillation_loss(output.float(), teacher.logits(x), config.distill_temperature)
            loss = (1 - config.distill) * loss + config.distill * taught
    return loss, (output.detach().argmax(dim=1) == y).sum()


def mixing_of(config: RunConfig) -> Mixing:
    """How the settings mix batches."""
    return Mixing(mixup=config.mixup, cutmix=config.cutmix, probability=config.mix_probability)


def label_loss(config: RunConfig, logits: Tensor, target: Tensor) -> Tensor:
    """The loss that the settings choose, mean over the images; 0-dim.

    Args:
        config: its loss, label smoothing and threshold.
        logits: float32 [B, K].
        target: int64 [B], or soft targets [B, K].
    """
    if config.loss == "bce":
        return binary_loss(logits, target, config.label_smoothing, config.bce_threshold)
    return F.cross_entropy(logits, target, label_smoothing=config.label_smoothing)


def binary_loss(logits: Tensor, target: Tensor, smoothing: float, threshold: float | None) -> Tensor:
    """Binary cross-entropy, summed over the classes, mean over the images (Wightman et al. 2021).

    A ``threshold`` makes targets above it 1 and others 0, so that all classes of a mixed image are there in
    full; after that, a share of each target, ``smoothing``, is spread evenly over the classes.

    The sum keeps gradients w.r.t. the logits, ``sigmoid(z) - t``, of the size of those of cross-entropy,
    ``softmax(z) - t``, whatever the number of classes; the released code of the paper takes the mean, which
    makes no difference to LAMB.
    """
    classes = logits.shape[1]
    soft = (
        target.to(logits.dtype) if target.is_floating_point() else F.one_hot(target, classes).to(logits.dtype)
    )
    if threshold is not None:
        soft = (soft > threshold).to(logits.dtype)
    if smoothing:
        soft = soft * (1 - smoothing) + smoothing / classes
    return F.binary_cross_entropy_with_logits(logits, soft, reduction="sum") / len(logits)


def guessing_loss(config: RunConfig, classes: int) -> float:
    """The loss of a network that gives each of at least 2 classes the same probability."""
    classes = max(classes, 2)
    rest = (classes - 1) * math.log(classes / (classes - 1)) if config.loss == "bce" else 0.0
    return math.log(classes) + rest
