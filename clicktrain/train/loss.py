"""The loss that is trained on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.data import Batch, mixup
from clicktrain.train.device import autocast
from clicktrain.train.teacher import Teacher, distillation_loss
from clicktrain.train.training_run import TrainingRun


def training_loss(run: TrainingRun, batch: Batch, teacher: Teacher | None = None) -> tuple[Tensor, Tensor]:
    """Loss with its graph, and the number of correct predictions; both 0-dim.

    With a ``teacher``, ``(1 - distill)`` of the cross-entropy and ``distill`` of `distillation_loss`.
    """
    config, device = run.prepared.config, run.prepared.device
    x, target = batch.x, batch.y
    with autocast(device, config.precision):
        if config.mixup:
            generator = torch.Generator().manual_seed(torch.initial_seed())  # seeded for this batch
            x, target = mixup(x, batch.y, run.prepared.facts["num_classes"], config.mixup, generator)
        output = run.forward.current(x)
        loss = F.cross_entropy(output.float(), target, label_smoothing=config.label_smoothing)
        if teacher is not None:
            taught = distillation_loss(output.float(), teacher.logits(x), config.distill_temperature)
            loss = (1 - config.distill) * loss + config.distill * taught
    return loss, (output.detach().argmax(dim=1) == batch.y).sum()
