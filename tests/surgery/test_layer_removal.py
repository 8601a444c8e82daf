"""Dead residual branches disappear, what their batch norm adds is kept exactly, and living ones stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_graphs import CLASSES, assert_same_function, conv_bn, images, masked, network
from torch import Tensor, nn

from clicktrain.surgery import apply_surgery_, plan_from_zeros
from clicktrain.surgery.layers import ConstantBatchNorm2d, RemovedConv2d


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv2d) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "layer", "layers_fewer"),
    [("resnet20", "layer1.1.conv2", 2), ("resnet50", "layer2.1.conv3", 3), ("resnet20", "layer2.0.conv2", 2)],
)
@pytest.mark.parametrize("vanishes", [False, True])
def test_a_zero_layer_takes_its_branch_along(
    name: str, layer: str, layers_fewer: int, vanishes: bool
) -> None:
    model: Any = network(name)
    norm = model.get_submodule(layer.replace("conv", "bn"))
    nn.init.zeros_(model.get_submodule(layer).weight)
    if vanishes:
        nn.init.zeros_(norm.bias)
        nn.init.zeros_(norm.running_mean)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, count = copy.deepcopy(model), convolutions(model)
    plan = plan_from_zeros(model, images(2))
    assert {r.name for r in plan.removed_layers} >= {layer}
    assert "removed" in next(line for line in plan.table().splitlines() if line.startswith(layer))
    apply_surgery_(plan, model, optimizer)
    assert convolutions(model) == count - layers_fewer
    assert isinstance(model.get_submodule(layer), RemovedConv2d)
    kept = model.get_submodule(layer.replace("conv", "bn"))
    assert isinstance(kept, nn.Identity if vanishes else ConstantBatchNorm2d)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert_same_function(model, before)
    # Nothing more to do, and the removed branch is no obstacle to another round.
    assert not plan_from_zeros(model, images(2))


def test_gradients_of_what_stays_are_those_of_the_masked_network() -> None:
    model: Any = network("resnet20")
    nn.init.zeros_(model.layer1[1].conv2.weight)
    small = copy.deepcopy(model)
    apply_surgery_(plan_from_zeros(small, images(2)), small)
    x, y = images(), torch.randint(CLASSES, (4,))
    for net in (model, small):
        F.cross_entropy(net(x), y).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-12)


def test_a_constant_into_a_living_convolution_keeps_the_branch() -> None:
    model: Any = network("resnet20")
    nn.init.zeros_(model.layer1[1].conv1.weight)
    before = copy.deepcopy(model)
    plan = plan_from_zeros(model, images(2))
    assert not plan.removed_layers
    apply_surgery_(plan, model)
    assert_same_function(model, before)
    assert "constant of their batch norm" in plan.table()


def test_sub_threshold_weights_that_a_batch_norm_makes_large_stay() -> None:
    model: Any = network("resnet20")
    nn.init.uniform_(model.layer1[1].conv2.weight, -5e-5, 5e-5)
    before = copy.deepcopy(model)
    plan = plan_from_zeros(model, images(2))
    assert not plan.removed_layers
    apply_surgery_(plan, model)
    assert_same_function(model, before)


class Torchvision(nn.Module):
    """``out += identity`` and ReLU in place, as most residual networks are written."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=kind == "bias")
        self.bn2 = nn.BatchNorm2d(8) if kind == "norm" else nn.Identity()
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x
        return self.fc(self.relu(out).mean((2, 3)))


@pytest.mark.parametrize("kind", ["norm", "bias", "neither"])
@pytest.mark.parametrize("vanishes", [True, False])
def test_additions_in_place(kind: str, vanishes: bool) -> None:
    model = Torchvision(kind).double()
    nn.init.zeros_(model.conv2.weight)
    for bias in (model.bn2.bias if isinstance(model.bn2, nn.BatchNorm2d) else None, model.conv2.bias):
        if bias is not None:
            nn.init.constant_(bias, 0.0 if vanishes else 1.0)
    before = copy.deepcopy(model)
    apply_surgery_(plan_from_zeros(model, images(2)), model)
    # Without batch norm and bias nothing is left that could take the sum.
    assert isinstance(model.conv2, RemovedConv2d) == (kind != "neither")
    assert_same_function(model, before)


def test_channels_of_a_stage_are_cut_in_what_is_left_of_a_branch() -> None:
    model, _ = masked("resnet20")
    nn.init.zeros_(model.get_parameter("layer2.1.conv2.weight"))
    before = copy.deepcopy(model)
    apply_surgery_(plan_from_zeros(model, images(2)), model)
    constant, other = model.get_submodule("layer2.1.bn2"), model.get_submodule("layer2.0.bn2")
    assert isinstance(constant, ConstantBatchNorm2d)
    assert constant.num_features == other.num_features < 32
    assert_same_function(model, before)
