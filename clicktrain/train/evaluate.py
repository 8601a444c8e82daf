"""Accuracy and loss of a model on a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.data import Loader
from clicktrain.train.config import Precision
from clicktrain.train.device import autocast

TOP5_CLASSES = 10
"""Top-5 accuracy is reported from this many classes on."""

_FEW = 8
"""Fewer images than this may have equal outputs by chance."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model reaches.

    Attributes:
        accuracy: top-1, percent.
        top5_accuracy: percent of images whose class is among the five best; None under 10 classes.
        loss: mean cross-entropy, without label smoothing.
        images: number of images.
        constant: all images got the same outputs.
    """

    accuracy: float
    top5_accuracy: float | None
    loss: float
    images: int
    constant: bool = False


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Evaluate in eval mode, and put the model back into the mode it was in.

    Args:
        model: gives logits [B, K].
        loader: batches of the split; every image is counted once.
        device: where model and batches are.
        precision: of the forward pass; logits are compared and the loss is computed in fp32.
        stop: called before each batch; True ends the evaluation.

    Returns:
        The result, or None if ``stop`` ended it.

    Raises:
        ValueError: the loader gives no image.
    """
    was_training = model.training
    model.eval()
    sums: list[Tensor] = []
    ranges: list[Tensor] = []
    images, classes = 0, 0
    try:
        for x, y in loader.epoch(0):
            if stop is not None and stop():
                return None
            with autocast(device, precision):
                output = model(x)
            logits = output.float()
            classes = logits.shape[1]
            sums.append(_batch_sums(logits, y))
            ranges.append(torch.stack((logits.amin(dim=0), logits.amax(dim=0))))
            images += len(y)
    finally:
        model.train(was_training)
    if not images:
        raise ValueError("there is no image to evaluate on")
    top1, top5, loss = torch.stack(sums).double().cpu().sum(dim=0).tolist()
    return Evaluation(
        accuracy=100 * top1 / images,
        top5_accuracy=100 * top5 / images if classes >= TOP5_CLASSES else None,
        loss=loss / images,
        images=images,
        constant=images >= _FEW and _constant(torch.stack(ranges)),
    )


def _constant(ranges: Tensor) -> bool:
    """Whether outputs differ by rounding only; ``ranges`` [batches, 2, K], smallest and largest."""
    low, high = ranges[:, 0].amin(dim=0), ranges[:, 1].amax(dim=0)
    return bool(((high - low) <= 1e-6 * torch.maximum(low.abs(), high.abs())).all())


def _batch_sums(logits: Tensor, y: Tensor) -> Tensor:
    """[3]: correct in the first guess, correct among five, sum of the losses."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == y[:, None]
    loss = F.cross_entropy(logits, y, reduction="sum")
    return torch.stack((hits[:, 0].sum().float(), hits.sum().float(), loss))
