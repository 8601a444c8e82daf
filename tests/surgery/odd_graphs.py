"""Small networks that no zoo has, channels set to zero at random, and what two networks are compared by."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import create_model
from clicktrain.surgery import ChannelGroup, SurgeryPlan, channel_groups

CLASSES = 5
ZOO: dict[str, dict[str, object]] = {
    "resnet18": {"width": 0.25, "stem": "cifar"},
    "resnet20": {"width": 1.0},
    "resnet50": {"width": 0.125, "stem": "imagenet"},
    "resnet50_v1": {"width": 0.125, "stem": "cifar"},
    "vgg11": {"width": 0.25, "stem": "cifar"},
    "mobilenet_v1": {"width": 0.25, "stem": "cifar"},
}


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class SharedStem(nn.Module):
    """One stem read by three branches, one of them twice; one convolution is called at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.a, self.b = conv_bn(8, 12), conv_bn(8, 12, 1)
        self.shared = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        a, b = self.shared(F.relu(self.a(x))), self.shared(F.relu(self.b(x)))
        return self.fc(torch.cat([a.mean((2, 3)), torch.amax(b, dim=(2, 3))], 1))


class TwoAdditions(nn.Module):
    """Two additions into one value, one in place, and a branch without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.one, self.two = conv_bn(8, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.three = conv_bn(8, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.one(x)
        y += self.two(x)
        y = y + self.three(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(self.relu(y), 1), 1))


class Concatenation(nn.Module):
    """A dense block: every layer reads all before it; average pooling, flatten of more than one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(11), nn.Conv2d(11, 7, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(18)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.hidden, self.fc = nn.Linear(72, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.bn1(x)))], 1)
        x = torch.cat((x, self.conv2(F.relu(self.bn2(x)))), dim=1)
        x = self.pool(F.relu(self.bn3(x)))
        return self.fc(F.dropout(F.silu(self.hidden(x.view(x.size(0), -1))), 0.0))


class SqueezeExcite(nn.Module):
    """A gate by linear layers and one by convolutions, each over a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv_bn(3, 8), conv_bn(8, 8), conv_bn(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 4), nn.Linear(4, 8)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.a(x)
        n, c, _, _ = y.shape
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(y.mean((2, 3)).view(n, c))))).view(n, c, 1, 1)
        x = x + y * gate.expand_as(y)
        y = self.b(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        x = F.relu(x + self.scale * (y * gate))
        return self.fc(x.mean([2, 3]))


class Depthwise(nn.Module):
    """An inverted residual, a depthwise convolution with two filters per channel, one with four groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = conv_bn(3, 8), conv_bn(8, 16, 1)
        self.depthwise, self.project = conv_bn(16, 16, 3, groups=16), conv_bn(16, 8, 1)
        self.twice = conv_bn(8, 16, 3, groups=8)
        self.grouped = conv_bn(16, 24, 3, groups=4)
        self.prelu = nn.PReLU(24)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        y = self.project(F.hardswish(self.depthwise(F.relu6(self.expand(x)))))
        x = self.prelu(self.grouped(F.relu(self.twice(x + y))))
        return self.fc(x.flatten(2).mean(-1))


class Plain(nn.Module):
    """No batch norm at all, flatten + linear, a transposed convolution, a spatial gate of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 7, 3, stride=2, padding=1)
        self.up, self.gate = nn.ConvTranspose2d(7, 6, 2, stride=2), nn.Conv2d(6, 1, 1)
        self.norm, self.fc = nn.InstanceNorm2d(6, affine=True), nn.Linear(6 * 4 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = self.norm(x + self.up(torch.tanh(self.conv2(x)))) * torch.sigmoid(self.gate(x))
        x = F.max_pool2d(F.pad(F.avg_pool2d(x, 2), (1, 1, 1, 1))[:, :, 1:-1, 1:-1], 2, ceil_mode=True)
        return self.fc(torch.flatten(F.interpolate(x, (4, 4)).permute(0, 2, 3, 1).permute(0, 3, 1, 2), 1))


ODD = {c.__name__: c for c in (SharedStem, TwoAdditions, Concatenation, SqueezeExcite, Depthwise, Plain)}
ALL = (*ZOO, *ODD)


def network(name: str) -> nn.Module:
    """In float64, with batch norms that have seen something."""
    model = create_model(name, num_classes=CLASSES, **ZOO[name]) if name in ZOO else ODD[name]()  # type: ignore[arg-type]
    model.double()
    shake_(model)
    return model


@torch.no_grad()
def shake_(model: nn.Module) -> None:
    """Batch norms anywhere but at their start values; weights that keep activations of the order of one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.bias, module.running_mean):
                assert tensor is not None
                tensor.normal_(0, 0.3)
            for tensor in (module.weight, module.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5)


def images(n: int = 4, size: int = 16) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64)


@torch.no_grad()
def kill_(model: nn.Module, groups: tuple[ChannelGroup, ...], fraction: float) -> dict[str, Tensor]:
    """Zero both sides of random channels: all weights with two dimensions or more, never the batch norms.

    Returns:
        group name -> bool [size], True = lives.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    alive = {}
    for group in groups:
        mask = torch.rand(group.size) >= fraction
        if group.fixed is not None:
            mask[:] = True
        if not mask.any():
            mask[torch.randint(group.size, ())] = True
        alive[group.name] = mask
        for member in group.members:
            tensor = tensors[member.name]
            if tensor.dim() < 2 or math.prod(tensor.shape) == max(tensor.shape):
                continue
            dead = [i for c, lives in enumerate(mask.tolist()) if not lives for i in member.indices[c]]
            tensor.index_fill_(member.dim, torch.tensor(dead, dtype=torch.int64), 0.0)
    return alive


def masked(name: str, fraction: float = 0.5) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network with dead channels, and which live."""
    model = network(name)
    return model, kill_(model, channel_groups(model, images(2)), fraction)


def assert_same_function(found: nn.Module, expected: nn.Module, *, tolerance: float = 1e-9) -> None:
    """Outputs in evaluation mode, while training, and in evaluation after the statistics have moved."""
    found, expected = copy.deepcopy(found), copy.deepcopy(expected)
    for mode in (False, True, True, False):
        found.train(mode)
        expected.train(mode)
        x = images()
        torch.testing.assert_close(found(x), expected(x), rtol=tolerance, atol=tolerance)


def kept(plan: SurgeryPlan, groups: tuple[ChannelGroup, ...]) -> dict[str, int]:
    """Channels left in every group, by its first member."""
    left = {}
    for group in groups:
        member = group.members[0]
        cut = [c for c in plan.cuts_of(member.name) if c.dim == member.dim]
        indices = set(cut[0].keep) if cut else None
        left[group.name] = sum(indices is None or set(i) <= indices for i in member.indices)
    return left
