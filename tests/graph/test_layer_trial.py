"""Layers with a forward of their own: those that use each weight as it is can be pruned."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.graph.layer_trial import uses_weight_as_it_is
from clicktrain.graph.prunable import find_prunable
from clicktrain.methods import ClickTrain, PaT


class Padded(nn.Conv2d):
    """As TensorFlow pads, by the size of the input; no tracer follows it."""

    def forward(self, x: Tensor) -> Tensor:
        pads = [
            max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True)
        ]
        rows, columns = pads
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, self.stride, self.padding)


class Centered(nn.Conv2d):
    """Linear in the weight, and still a zero in it is none."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Activated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Flipped(nn.Conv2d):
    """Reads other channels than its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


class Noisy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(())


class Failing(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        raise OSError("no file")


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Transposed(nn.ConvTranspose2d):
    def forward(self, x: Tensor, output_size: Any = None) -> Tensor:
        return super().forward(x.contiguous(), output_size)


@pytest.mark.parametrize(
    ("layer", "as_it_is"),
    [
        (lambda: Padded(6, 8, 3, stride=2), True),
        (lambda: Padded(6, 8, (1, 5), groups=2, bias=False), True),
        (lambda: Padded(6, 6, 3, groups=6), True),
        (lambda: Cast(5, 7), True),
        (lambda: Transposed(6, 8, 3, stride=2, groups=2), True),
        (lambda: Standardized(6, 8, 3), False),
        (lambda: Centered(6, 8, 3), False),
        (lambda: Activated(6, 8, 3), False),
        (lambda: Flipped(6, 8, 3), False),
        (lambda: Noisy(6, 8, 3), False),
        (lambda: Failing(6, 8, 3), False),
        (lambda: nn.BatchNorm2d(6), False),
        (lambda: nn.utils.parametrizations.weight_norm(Padded(6, 8, 3)), False),
    ],
)
def test_what_is_seen_by_a_trial(layer: Any, as_it_is: bool) -> None:
    torch.manual_seed(0)
    module = layer()
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    assert uses_weight_as_it_is(module) is as_it_is
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), Padded(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), Standardized(16, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def train(model: nn.Module, method: Any, **more: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = method.attach(model, optimizer, epochs=6, steps_per_epoch=2, **more)
    for number in range(12):
        x = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(number))
        loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0]))
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    return pruner


def test_it_is_pruned_and_trains_masked_where_others_are_packed() -> None:
    model = network()
    assert {layer.name for layer in find_prunable(model).layers} == {"2", "5"}
    assert "does not use its weight as it is" in find_prunable(model).left_alone["7"][1]
    with pytest.warns(UserWarning, match="2 trains masked and dense, not packed: its class Padded"):
        pruner = train(model, ClickTrain(compression=2), packed=True, accelerate=False)
    pruner.check_zeros()
    assert (model[2].weight == 0).float().mean() > 0.2
    assert (model[5].weight == 0).float().mean() > 0.2


def test_its_channels_are_removed() -> None:
    model = network()
    method = PaT(policy="epoch", prune_epoch=1, prune_steps=1, prune_ratio=0.4)
    train(model, method, example=torch.zeros(2, 3, 12, 12))
    assert model[2].weight.shape[0] < 16
    assert model[2].weight.shape[0] == model[3].num_features == model[5].weight.shape[1]
