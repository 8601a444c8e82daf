"""A network that pruning has destroyed is noticed, by the loop and by the trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import RigL
from clicktrain.errors import NetworkCollapsed, UserError
from clicktrain.graph.prunable import check_convolutions, find_prunable
from clicktrain.methods.driver.progress import at_chance


class Chain(nn.Module):
    """Layers one after the other, through which no gradient comes if they begin at zero."""

    def __init__(self, begins: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(4))
        for layer in self.body:
            if begins is not None:
                begins(layer.weight)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for layer in self.body:
            x = F.relu(layer(x))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def run(begins: Callable[[Tensor], Tensor] | None, epochs: int = 3) -> None:
    torch.manual_seed(0)
    model = Chain(begins)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    method = RigL(sparsity=0.9, mask_seed=1, linear=False, growth="random")
    pruner = method.attach(model, optimizer, epochs=epochs, steps_per_epoch=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(4 * epochs):
            y = torch.arange(6) % 3
            x = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(number))
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            pruner.observe(loss)
            optimizer.step()
            optimizer.zero_grad()
        pruner.finish()


def test_a_network_without_a_path_is_noticed_in_the_next_epoch() -> None:
    run(None)
    run(nn.init.dirac_)  # of which random masks would leave nothing
    with pytest.raises(NetworkCollapsed, match="collapsed in epoch 1: no gradient reaches any convolution"):
        run(nn.init.zeros_)


def test_it_is_noticed_at_the_end_of_the_last_epoch_too() -> None:
    with pytest.raises(NetworkCollapsed):
        run(nn.init.zeros_, epochs=1)


def test_it_belongs_to_the_state() -> None:
    """Saved right after the step that showed it, a run ends all the same."""
    torch.manual_seed(0)
    model, again = Chain(nn.init.zeros_), Chain(nn.init.zeros_)
    method = RigL(sparsity=0.9, mask_seed=1, linear=False, growth="random")
    pruner, other = (
        method.attach(m, torch.optim.SGD(m.parameters(), lr=0.01), epochs=3, steps_per_epoch=1)
        for m in (model, again)
    )
    loss = F.cross_entropy(model(torch.randn(6, 1, 6, 6)), torch.arange(6) % 3)
    loss.backward()
    pruner.observe(loss)
    pruner.optimizer.step()
    other.load_state_dict(pruner.state_dict())
    with pytest.raises(NetworkCollapsed, match="collapsed in epoch 1: no gradient"):
        other.observe(loss)


HARD_PRUNE = [{"event": "hard_prune", "epoch": 3.0}]


@pytest.mark.parametrize(
    ("losses", "events", "expected"),
    [
        ([2.0, 1.0, 0.5, 2.3, 2.3], HARD_PRUNE, True),
        ([2.0, 1.0, 0.5, 2.3], HARD_PRUNE, False),  # one epoch is not enough
        ([2.0, 1.0, 0.5, 2.3, 1.5], HARD_PRUNE, False),  # it recovers
        ([2.3, 2.3, 2.3, 2.3, 2.3], HARD_PRUNE, False),  # it had not learned anything yet
        ([2.0, 1.0, 0.5, 2.3, 2.3], [], False),  # nothing was removed
        ([2.0, 1.0, 0.5, 2.3, 2.3], [{"event": "reconfigured", "epoch": 3, "channels_before": 9,
                                      "channels_after": 9}], False),
        ([2.0, 1.0, 0.5, 2.3, 2.3], [{"event": "reconfigured", "epoch": 2.5, "channels_before": 9,
                                      "channels_after": 8}], True),
    ],
)  # fmt: skip
def test_a_loss_that_stays_at_chance(
    losses: list[float], events: list[dict[str, float]], expected: bool
) -> None:
    assert (at_chance(losses, 2.3, events) is not None) is expected


def test_networks_that_a_method_cannot_prune_are_refused() -> None:
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(UserError, match=r"no convolution that X can prune \(0: first convolution.*include"):
        check_convolutions(find_prunable(one, linear=True), "X")
    check_convolutions(find_prunable(one, linear=True, include=("0",)), "X")
    check_convolutions(find_prunable(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), linear=True), "X")
