"""Attacks worked out by hand on networks of one layer, and their limits on real ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_networks import tiny
from torch import Tensor, nn

from clicktrain.data import Batch, Loader
from clicktrain.errors import UserError
from clicktrain.train.evaluate import Attack, attacked_accuracy, fgsm, pgd

CPU = torch.device("cpu")
MEAN, STD = (0.5,), (0.25,)


class Batches(Loader):
    """Given pixels, normalised as a data set's loader does it."""

    def __init__(self, pixels: Tensor, y: Tensor, batch_size: int = 2) -> None:
        self.x, self.y, self.size = (pixels - MEAN[0]) / STD[0], y, batch_size

    def __len__(self) -> int:
        return -(-len(self.y) // self.size)

    def with_batch_size(self, batch_size: int) -> Batches:
        raise AssertionError("evaluation takes the batches as they are")

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for at in range(0, len(self.y), self.size):
            yield Batch(self.x[at : at + self.size], self.y[at : at + self.size])


def two_classes(weights: list[float], bias: float = 0.0) -> nn.Module:
    """Class 1 where ``weights . x + bias`` is positive, x being normalised."""
    linear = nn.Linear(len(weights), 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0] * len(weights), weights]))
        linear.bias.copy_(torch.tensor([0.0, bias]))
    return nn.Sequential(nn.Flatten(), linear)


def images(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


def test_fgsm_by_hand() -> None:
    """The loss of class 1 rises against the weights, that of class 0 along them; no weight, no change."""
    network = two_classes([1.0, -2.0, 0.0])
    pixels = images([[0.9, 0.02, 0.5], [0.95, 0.05, 0.5]])
    attacked = fgsm(network, pixels, torch.tensor([1, 0]), 0.1)
    expected = images([[0.8, 0.12, 0.5], [1.0, 0.0, 0.5]])  # clipped to the range of pixels
    torch.testing.assert_close(attacked, expected)
    assert not attacked.requires_grad


def test_accuracy_by_hand() -> None:
    """One pixel, boundary at 0.5: epsilon 0.1 turns what is nearer than that, in pixels and not in x."""
    pixels = images([[0.55], [0.65], [0.45], [0.2], [0.9]])
    y = torch.tensor([1, 1, 0, 0, 0])  # the last one is wrong from the beginning
    model = two_classes([1.0])
    attacks = [Attack("fgsm", epsilon) for epsilon in (0.0, 0.1, 0.2, 0.35)]
    found = attacked_accuracy(model, Batches(pixels, y), attacks, mean=MEAN, std=STD, device=CPU)
    assert found == [80.0, 40.0, 20.0, 0.0]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_an_image_that_was_wrong_stays_wrong() -> None:
    """Without clipping or at a kink an attack may make a wrong answer right; that is no success."""

    class Kink(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1) * STD[0] + MEAN[0]  # pixels again
            return torch.cat((torch.zeros_like(x), (x - 0.3) * (0.75 - x)), dim=1)

    pixels, y = images([[0.7], [0.8]]), torch.tensor([0, 1])
    (found,) = attacked_accuracy(
        Kink(), Batches(pixels, y), [Attack("fgsm", 0.7)], mean=MEAN, std=STD, device=CPU
    )
    assert found == 0.0


def test_pgd_by_hand() -> None:
    """Two steps of 2.5 * 0.1 / 2 reach the edge of the box from anywhere; the image's range cuts it."""
    network = two_classes([1.0, -2.0])
    pixels = images([[0.9, 0.02]])
    for start in ([0.0, 0.0], [0.1, -0.1], [-0.1, 0.1]):
        attacked = pgd(network, pixels, torch.tensor([1]), 0.1, 2, images([start]))
        torch.testing.assert_close(attacked, images([[0.8, 0.12]]))
    attacked = pgd(network, pixels, torch.tensor([0]), 0.15, 2, images([[0.0, 0.0]]))
    torch.testing.assert_close(attacked, images([[1.0, 0.0]]))
    one = pgd(network, pixels, torch.tensor([1]), 0.1, 10, images([[0.05, 0.0]]))
    assert (one - pixels).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_attacks_of_a_network_with_batch_norm(name: str) -> None:
    """They stay within epsilon and the range, repeat, leave no trace, and hurt."""
    torch.manual_seed(0)
    model = tiny(10, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pixels, y = torch.rand(12, 1, 8, 8), torch.randint(0, 10, (12,))
    model.eval()
    attack = Attack(name, 0.07, steps=4, seed=3)
    attacked = attack(model, pixels, y, batch=1)
    assert (attacked - pixels).abs().max() <= 0.07 + 1e-6
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert torch.equal(attacked, attack(model, pixels, y, batch=1))
    loss = nn.functional.cross_entropy
    assert loss(model(attacked), y) > loss(model(pixels), y)
    model.train()
    attacked_accuracy(model, Batches(pixels, y), [attack], mean=MEAN, std=STD, device=CPU)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_attacks_that_cannot_be() -> None:
    with pytest.raises(UserError, match="epsilon is 8: must be between 0 and 1, as pixels are"):
        Attack("fgsm", 8)
    with pytest.raises(UserError, match="steps is 0: must be at least 1"):
        Attack("pgd", 0.1, steps=0)
    empty = Batches(torch.zeros(0, 1, 1, 1), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="no image"):
        attacked_accuracy(two_classes([1.0]), empty, [], mean=MEAN, std=STD, device=CPU)
