"""Methods that remove channels work with every layer type that has them, and leave unknown layers alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import PaT, PruneTrain
from clicktrain.errors import MissedTarget
from clicktrain.methods import Method, Pruner

Shape = tuple[int, ...]


class Mix(nn.Module):
    """A layer that nobody knows: it mixes channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.eye(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,cd->ndhw", x, self.mix)


def conv1d() -> tuple[nn.Module, Shape]:
    body = [nn.Conv1d(3, 12, 3), nn.BatchNorm1d(12), nn.ReLU(), nn.Conv1d(12, 12, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(12, 4)), (8, 3, 12)


def conv3d() -> tuple[nn.Module, Shape]:
    body = [nn.Conv3d(1, 12, 2), nn.BatchNorm3d(12), nn.ReLU(), nn.Conv3d(12, 12, 2), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(12, 4)), (8, 1, 4, 4, 4)


def between(middle: nn.Module, channels: int) -> tuple[nn.Module, Shape]:
    """A layer from 12 to ``channels`` channels between two convolutions."""
    body = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(channels, 8, 2)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)), (8, 3, 6, 6)


def linear() -> tuple[nn.Module, Shape]:
    body = [nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.Sequential(*body), (8, 10)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Shape]]] = {
    "conv1d": conv1d,
    "conv3d": conv3d,
    "linear": linear,
    "transposed": lambda: between(nn.ConvTranspose2d(12, 10, 2, stride=2), 10),
    "depthwise, two filters": lambda: between(nn.Conv2d(12, 24, 3, groups=12), 24),
}
METHODS: dict[str, Callable[[], Method[Any]]] = {
    "pat": lambda: PaT(policy="epoch", prune_epoch=1, prune_steps=2, prune_ratio=0.8),
    "pat, weight criterion": lambda: PaT(
        policy="epoch", prune_epoch=1, prune_steps=2, prune_ratio=0.8, criterion="mixed"
    ),
    "prunetrain": lambda: PruneTrain(coefficient=0.5, floor=0.2, check_outputs=True),
}
"""So strong that every group of channels has to lose some."""
FIXING: dict[str, Callable[[], nn.Module]] = {
    "unknown": lambda: Mix(12),
    "transposed, grouped": lambda: nn.ConvTranspose2d(12, 12, 2, groups=4),
    "transposed, depthwise": lambda: nn.ConvTranspose2d(12, 12, 2, groups=12),
}


def run(model: nn.Module, method: Method[Any], shape: Shape) -> Pruner:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = method.attach(model, optimizer, epochs=3, steps_per_epoch=4, example=torch.zeros(shape))
    generator = torch.Generator().manual_seed(1)
    for _ in range(12):
        y = torch.randint(0, 4, (shape[0],), generator=generator)
        x = torch.randn(shape, generator=generator) + y.view(-1, *[1] * (len(shape) - 1)) * 0.5
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissedTarget)  # few channels: a target lies between two widths
        pruner.finish()
    return pruner


def weights(model: nn.Module) -> dict[str, torch.Size]:
    """Weights of convolutions and linear layers."""
    return {name: weight.shape for name, weight in model.named_parameters() if weight.dim() > 1}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_layer_type_loses_channels(network: str, method: str) -> None:
    torch.manual_seed(0)
    model, shape = NETWORKS[network]()
    before = weights(model)
    pruner = run(model, METHODS[method](), shape)
    after = weights(model)
    assert after.keys() == before.keys()
    names = list(before)
    stay = {(names[0], 1), (names[-1], 0)}  # the input and the output of the network
    for name in names:
        for dim in (0, 1):
            if before[name][dim] > 1:
                same = after[name][dim] == before[name][dim]
                assert same == ((name, dim) in stay), (name, dim, before[name], after[name])
    assert model(torch.zeros(shape)).shape == (shape[0], 4)
    for parameter in model.parameters():
        assert pruner.optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape
    if method == "prunetrain":  # nothing but zeros is removed
        events = [event for event in pruner.events if event["event"] == "reconfigured"]
        changes = [event["max_output_change"] for event in events]
        assert max(change for change in changes if change is not None) < 1e-5


@pytest.mark.parametrize("layer", FIXING)
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_cannot_be_followed_fixes_the_channels_it_touches(layer: str, method: str) -> None:
    torch.manual_seed(0)
    model, shape = between(FIXING[layer](), 12)
    run(model, METHODS[method](), shape)
    first, last = model.get_submodule("0"), model.get_submodule("5")
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    assert first.out_channels == last.in_channels == 12
    assert last.out_channels < 8, "the others are removed"
