"""Accuracy under adversarial attacks on the image's own pixels (Campfire section 3.2).

FGSM is that of Goodfellow et al. (the paper's reference [20]), PGD its iterated form with a random start
(Madry et al., ICLR 2018, arXiv:1706.06083). Both move every pixel, a number in [0, 1] before normalization,
by at most epsilon, and the result stays in [0, 1]: it is still an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.data import Loader, seeded_generator
from clicktrain.errors import UserError
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import write_robustness
from clicktrain.train.config import Precision
from clicktrain.train.device import autocast

AttackName = Literal["fgsm", "pgd"]
Network = Callable[[Tensor], Tensor]
"""Pixels [B, C, H, W] in [0, 1] -> logits [B, K]."""

PAPER_EPSILONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Campfire, Table 6."""

_REACH = 2.5
"""Length of all steps of PGD together, in epsilons, so that they can turn back at the edge."""


@dataclass(frozen=True, slots=True)
class Attack:
    """An attack. Raises UserError for a value out of range.

    Attributes:
        name: fgsm or pgd.
        epsilon: largest change of a pixel, in [0, 1] as the pixels are.
        steps: gradient steps of pgd.
        seed: of pgd's random start.
    """

    name: AttackName
    epsilon: float
    steps: int = 10
    seed: int = 0

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
    """Fast gradient sign method: ``clip(x + epsilon * sign(dL/dx), 0, 1)``.

    Args:
        network: gives logits from pixels, in evaluation mode.
        pixels: [B, C, H, W] in [0, 1].
        y: int64 [B], the true classes, whose cross-entropy rises.
        epsilon: change of each pixel.
    """
    return (pixels + epsilon * _ascent(network, pixels, y)).clamp_(0, 1)


def pgd(network: Network, pixels: Tensor, y: Tensor, epsilon: float, steps: int, start: Tensor) -> Tensor:
    """Projected gradient descent: steps of FGSM, each cut back to within epsilon of the image and to [0, 1].

    Args:
        network, pixels, y: as `fgsm`.
        epsilon: largest change of each pixel.
        steps: of size ``2.5 * epsilon / steps``.
        start: change to begin with, of the shape of ``pixels``.
    """
    size = _REACH * epsilon / steps
    low, high = (pixels - epsilon).clamp_(0, 1), (pixels + epsilon).clamp_(0, 1)
    attacked = (pixels + start).clamp(low, high)
    for _ in range(steps):
        attacked = (attacked + size * _ascent(network, attacked, y)).clamp(low, high)
    return attacked


def _ascent(network: Network, pixels: Tensor, y: Tensor) -> Tensor:
    """Sign of the loss gradient of each pixel."""
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
        loader: batches of the split, normalized with ``mean`` and ``std`` of pixels in [0, 1].
        attacks: one accuracy each.
        mean, std: per channel.
        device: where model and batches are.
        precision: of forward and backward passes.

    Raises:
        ValueError: the loader gives no image.
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
