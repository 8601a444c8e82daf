"""Accuracy and loss of a model on a split, as it is and under adversarial attacks (Campfire section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.comm.agreement import gathered
from clicktrain.data import Loader, seeded_generator
from clicktrain.errors import UserError
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import write_robustness
from clicktrain.train.config import Precision
from clicktrain.train.device import autocast
from clicktrain.train.views import Views, mean_logits

TOP5_CLASSES = 10
"""Top-5 accuracy is reported from this many classes on."""

_FEW = 8
"""Fewer images than this may have equal outputs by chance."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model reaches: accuracies in percent, mean cross-entropy without label smoothing."""

    accuracy: float
    top5_accuracy: float | None
    """None under 10 classes."""
    loss: float
    images: int
    constant: bool = False
    """All images got the same outputs."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    views: Views = "none",
    stop: Callable[[], bool] | None = None,
    shared: bool = False,
) -> Evaluation | None:
    """Evaluate in eval mode, and put the model back into the mode it was in.

    Args:
        model: gives logits [B, K].
        loader: batches of the split, on ``device`` as the model; every image is counted once.
        device: where model and batches are.
        precision: of the forward pass; logits are compared and the loss is computed in fp32.
        views: of each image whose outputs are averaged (`clicktrain.train.views`).
        stop: called before each batch; True ends the evaluation, without a result.
        shared: each process has its part of the batches, and all of them get the whole result, or none if one
            of them was stopped.
    """
    was_training = model.training
    model.eval()
    sums: list[Tensor] = []
    ranges: list[Tensor] = []
    images, classes, stopped = 0, 0, False
    try:
        for x, y in loader.epoch(0):
            if stopped := stop is not None and stop():
                break
            with autocast(device, precision):
                logits = mean_logits(model, x, views)
            classes = logits.shape[1]
            sums.append(_batch_sums(logits, y))
            ranges.append(torch.stack((logits.amin(dim=0), logits.amax(dim=0))))
            images += len(y)
    finally:
        model.train(was_training)
    part = _Counted(images, classes, stopped, _cpu(sums), _cpu(ranges))
    parts = [one for one in (gathered(part) if shared else [part]) if one.images or one.stopped]
    if any(one.stopped for one in parts):
        return None
    if not parts:
        raise ValueError("there is no image to evaluate on")
    images, classes = sum(one.images for one in parts), parts[0].classes
    top1, top5, loss = torch.cat([one.sums for one in parts]).sum(dim=0).tolist()
    return Evaluation(
        accuracy=100 * top1 / images,
        top5_accuracy=100 * top5 / images if classes >= TOP5_CLASSES else None,
        loss=loss / images,
        images=images,
        constant=images >= _FEW and _constant(torch.cat([one.ranges for one in parts])),
    )


@dataclass(frozen=True, slots=True)
class _Counted:
    """What one process has counted: `_batch_sums` and `_constant`'s ranges of its batches."""

    images: int
    classes: int
    stopped: bool
    sums: Tensor
    ranges: Tensor


def _cpu(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows).cpu().double() if rows else torch.empty(0, dtype=torch.float64)


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


AttackName = Literal["fgsm", "pgd"]
Network = Callable[[Tensor], Tensor]
"""Pixels [B, C, H, W] in [0, 1] -> logits [B, K]."""

PAPER_EPSILONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Campfire, Table 6."""

_REACH = 2.5
"""Length of all steps of PGD together, in epsilons, so that they can turn back at the edge."""


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack. Raises UserError for a value out of range."""

    name: AttackName
    epsilon: float
    """Largest change of a pixel, in [0, 1] as the pixels are."""
    steps: int = 10
    """Gradient steps of pgd."""
    seed: int = 0
    """Seed of pgd's random start."""

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise UserError(f"epsilon is {self.epsilon:g}: must be between 0 and 1, as pixels are")
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}: must be at least 1")

    def __call__(self, network: Network, pixels: Tensor, y: Tensor, batch: int = 0) -> Tensor:
        """Attacked images of batch number ``batch``, [B, C, H, W] in [0, 1]."""
        if self.name == "fgsm":
            return fgsm(network, pixels, y, self.epsilon)
        generator = seeded_generator("attack", self.seed, batch)
        noise = torch.rand(pixels.shape, generator=generator).to(pixels) * 2 - 1
        return pgd(network, pixels, y, self.epsilon, self.steps, noise * self.epsilon)


def fgsm(network: Network, pixels: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """Fast gradient sign method on ``pixels`` [B, C, H, W] of classes ``y``, int64 [B].

    ``clip(x + epsilon * sign(dL/dx), 0, 1)``, L the cross-entropy of the network in evaluation mode.
    """
    return (pixels + epsilon * _ascent(network, pixels, y)).clamp_(0, 1)


def pgd(network: Network, pixels: Tensor, y: Tensor, epsilon: float, steps: int, start: Tensor) -> Tensor:
    """Projected gradient descent: steps of FGSM, each cut back to within epsilon of the image and to [0, 1].

    ``steps`` of size ``2.5 * epsilon / steps``, from ``pixels + start``.
    """
    size = _REACH * epsilon / steps
    low, high = (pixels - epsilon).clamp_(0, 1), (pixels + epsilon).clamp_(0, 1)
    attacked = (pixels + start).clamp(low, high)
    for _ in range(steps):
        attacked = (attacked + size * _ascent(network, attacked, y)).clamp(low, high)
    return attacked


def _ascent(network: Network, pixels: Tensor, y: Tensor) -> Tensor:
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        loss = F.cross_entropy(network(pixels).float(), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, pixels)
    return grad.sign()


@torch.no_grad()
def attacked_accuracy(
    model: nn.Module,
    loader: Loader,
    attacks: Sequence[Attack],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    precision: Precision = "fp32",
) -> list[float]:
    """Accuracy under each attack, percent. The network makes its own adversarial images (section 3.2).

    As in the tutorial that the paper follows, an image that is not recognized in the first place counts as
    wrong whatever the attack makes of it.

    Args:
        model: takes normalized images.
        loader: batches of the split on ``device``, normalized with ``mean`` and ``std`` of pixels in [0, 1].
        attacks: one accuracy each.
        mean, std: per channel.
        device: of the model.
        precision: of forward and backward passes.
    """
    shift, scale = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))

    def network(pixels: Tensor) -> Tensor:
        with autocast(device, precision):
            logits: Tensor = model((pixels - shift) / scale)
        return logits

    was_training = model.training
    model.eval()
    right = torch.zeros(len(attacks), dtype=torch.int64, device=device)
    images = 0
    try:
        for batch, (x, y) in enumerate(loader.epoch(0)):
            pixels = (x * scale + shift).clamp_(0, 1)  # rounding may leave the range by a hair
            known = network(pixels).argmax(dim=1) == y
            for index, attack in enumerate(attacks):
                guess = network(attack(network, pixels, y, batch)).argmax(dim=1)
                right[index] += ((guess == y) & known).sum()
            images += len(y)
    finally:
        model.train(was_training)
    if not images:
        raise ValueError("there is no image to attack")
    return [100 * count / images for count in right.tolist()]


def save_robustness(folder: RunFolder, attacks: Sequence[Attack], accuracies: Sequence[float]) -> None:
    """Add accuracies, in percent, to the run's robustness.json for reports."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for attack, accuracy in zip(attacks, accuracies, strict=True):
        curves.setdefault(attack.name, []).append((attack.epsilon, accuracy))
    write_robustness(folder.robustness, curves)
