"""What was exported, held against the network that it came from: on real images where there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from clicktrain.errors import UserError

Images: TypeAlias = Iterable[tuple[Tensor, Tensor | None]]
"""Batches of normalized images [N, C, H, W] and their classes [N], None where these are unknown."""

Run: TypeAlias = Callable[[Tensor], Tensor]
"""A network, or what was loaded from its file: images [N, C, H, W] -> logits [N, K]."""

RELATIVE = 1e-4
"""Allowed difference, relative to the largest logit. Folded batch norms and reordered fp32 sums stay two
orders of magnitude below it; a wrong weight or operator does not."""

_RANDOM = (4, 40)
"""Batches of random images where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How near what was exported comes to the network.

    Attributes:
        max_difference: largest difference of a logit; nan if one is.
        tolerance: the largest allowed.
        images: compared on.
        accuracy: percent, of what was exported, and of the network in ``network_accuracy``; None without
            classes.
    """

    max_difference: float
    tolerance: float
    images: int
    accuracy: float | None
    network_accuracy: float | None

    def check(self, what: str) -> None:
        """UserError if ``what`` does not compute what the network does."""
        if not self.max_difference <= self.tolerance:  # also when it is nan
            raise UserError(
                f"{what} does not compute what the network does (largest difference "
                f"{self.max_difference:.3g}, allowed {self.tolerance:.3g}): nothing was written"
            )

    def sentence(self) -> str:
        """Difference and accuracy in words."""
        text = f"largest difference to the network {self.max_difference:.2g} (allowed {self.tolerance:.2g})"
        if self.accuracy is None or self.network_accuracy is None:
            return text
        return f"{text}, accuracy {self.accuracy:.2f}%, the network's {self.network_accuracy:.2f}%"


@torch.no_grad()
def compare(network: Run, other: Run, images: Images) -> Comparison:
    """Run both on all images; UserError if shapes differ."""
    largest, scale, seen = 0.0, 1.0, 0
    right: int | None = None
    network_right: int | None = None
    for x, y in images:
        expected, got = network(x), other(x)
        if not isinstance(expected, Tensor):
            raise UserError(
                f"the network gives a {type(expected).__name__}: a network for export gives one tensor"
            )
        if got.shape != expected.shape:
            raise UserError(
                f"what was exported gives outputs of shape {tuple(got.shape)} where the network gives "
                f"{tuple(expected.shape)}: nothing was written"
            )
        seen += len(x)
        worst = float((got.double() - expected.double()).abs().max())
        if worst != worst:
            largest = worst
            break
        largest, scale = max(largest, worst), max(scale, float(expected.abs().max()))
        if y is not None and y.dim() == 1 and expected.dim() == 2:
            right = (right or 0) + int((got.argmax(1) == y).sum())
            network_right = (network_right or 0) + int((expected.argmax(1) == y).sum())
    return Comparison(
        max_difference=largest,
        tolerance=RELATIVE * scale,
        images=seen,
        accuracy=None if right is None else 100 * right / seen,
        network_accuracy=None if network_right is None else 100 * network_right / seen,
    )


def batches(images: Images | None, shape: Sequence[int]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The images in float32, random ones if there are none; the first one alone: any number must do.

    Raises:
        UserError: they are of another shape than [N, *shape].
    """
    given = False
    for x, y in _random(shape) if images is None else images:
        if tuple(x.shape[1:]) != tuple(shape):
            raise UserError(f"images are of shape {list(x.shape)}, the network's are [N, {_listed(shape)}]")
        if len(x) == 0:
            continue
        x = x.float()
        if not given and len(x) > 1:
            yield x[:1], None if y is None else y[:1]
            x, y = x[1:], None if y is None else y[1:]
        given = True
        yield x, y
    if not given:
        yield from batches(None, shape)


def _listed(shape: Sequence[int]) -> str:
    return ", ".join(str(size) for size in shape)


def _random(shape: Sequence[int]) -> Images:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(count, *shape, generator=generator), None) for count in _RANDOM]
