"""Networks pruned at random, packed, and what two of them are compared by."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import create_model
from clicktrain.kernels.pack_model import pack_model_

SMALL = {
    "resnet20": {"width": 0.5, "stem": "cifar"},
    "resnet50": {"width": 0.125, "stem": "imagenet"},
    "vgg11": {"width": 0.125, "stem": "cifar"},
    "mobilenet_v1": {"width": 0.25, "stem": "cifar"},
}
CLASSES = 5


def prune_(model: nn.Module, density: float = 0.2) -> nn.Module:
    """Pack all convolutions but those that read the image, with random masks."""
    masks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
            masks[name] = torch.rand(layer.weight.shape) < density
    pack_model_(model, masks)
    return model


def network(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return prune_(create_model(name, num_classes=CLASSES, **SMALL[name])).to(dtype)  # type: ignore[arg-type]


def batch(n: int, size: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, size, size, dtype=dtype), torch.randint(CLASSES, (n,))


def assert_same_state(found: nn.Module, expected: nn.Module, tolerance: float = 1e-10) -> None:
    mine, theirs = found.state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(
            mine[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


def assert_same_step(
    found: nn.Module, expected: nn.Module, x: Tensor, y: Tensor, tolerance: float = 1e-10
) -> None:
    """Output, gradients of the input and of all parameters, and running statistics after one step."""
    outputs = []
    for model in (found, expected):
        images = x.clone().requires_grad_()
        model.zero_grad()
        output = model(images)
        F.cross_entropy(output, y).backward()
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        outputs.append((output.detach(), images.grad, gradients))
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    assert_same_state(found, expected, tolerance)


def twins(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """The same network twice."""
    model = network(name, dtype)
    return model, copy.deepcopy(model)
