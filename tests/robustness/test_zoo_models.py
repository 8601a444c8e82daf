"""Networks of timm and torchvision as they are: what can go goes, and nothing else changes."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import PaT, accelerate, pack
from clicktrain.graph.observe import tensors_in
from clicktrain.surgery import (
    apply_surgery_,
    channel_groups,
    plan_from_keep,
    plan_from_zeros,
)
from clicktrain.surgery.apply import zero_
from clicktrain.surgery.steady import steadily

CLASSES = 10
pytestmark = pytest.mark.slow

# Largest share of the parameters that is left when a third of the channels that can go have gone. Networks
# whose channels are split and shuffled, or normalised together, keep more.
TIMM = {
    "resnet18": 0.5,
    "resnet26d": 0.5,
    "mobilenetv3_small_050": 0.55,
    "efficientnet_b0": 0.55,
    "efficientnet_lite0": 0.55,
    "regnetx_002": 0.5,
    "convnext_atto": 0.8,
    "densenet121": 0.5,
    "vgg11_bn": 0.97,
    "ghostnet_050": 0.75,
    "mnasnet_small": 0.55,
    "repvgg_a0": 0.5,
    "cspresnet50": 0.6,
}
TORCHVISION = {
    "resnet18": 0.5,
    "googlenet": 0.5,
    "shufflenet_v2_x0_5": 0.75,
    "squeezenet1_1": 0.5,
    "mobilenet_v2": 0.55,
    "regnet_y_400mf": 0.5,
}
CASES = [*((f"timm {n}", left) for n, left in TIMM.items()),
         *((f"torchvision {n}", left) for n, left in TORCHVISION.items())]  # fmt: skip


def network(name: str) -> nn.Module:
    """Freshly initialised, on small images."""
    library, _, kind = name.partition(" ")
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        model: nn.Module = timm.create_model(kind, num_classes=CLASSES)
        return model
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    settings: dict[str, Any] = {"init_weights": True} if kind == "googlenet" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result: nn.Module = getattr(models, kind)(num_classes=CLASSES, **settings)
    return result


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 64, 64)


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def assert_same(found: nn.Module, expected: nn.Module) -> None:
    found, expected = copy.deepcopy(found).double(), copy.deepcopy(expected).double()
    x = images().double()
    for training in (True, False):
        with steadily(()):
            outputs = tensors_in(found.train(training)(x))
        with steadily(()):
            wanted = tensors_in(expected.train(training)(x))
        for a, b in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize(("name", "left"), CASES)
def test_channels_go_and_the_function_stays(name: str, left: float) -> None:
    model = network(name)
    whole = size(model)
    groups = channel_groups(model, images())
    keep = {g.name: torch.arange(g.size) % 3 != 1 for g in groups if g.fixed is None and g.size > 2}
    ranked = plan_from_keep(model, images(), keep)
    before = copy.deepcopy(model)
    zero_(ranked, before)
    # The same channels once more, found by their zeros as PruneTrain does.
    zeros = plan_from_zeros(before, images(), sides="readers")
    assert set(zeros.cuts) or name == "timm convnext_atto"
    again = copy.deepcopy(before)
    apply_surgery_(zeros, again)
    assert_same(again, before)
    apply_surgery_(ranked, model)
    assert size(model) < left * whole
    assert_same(model, before)
    sum(t.square().mean() for t in tensors_in(model.train()(images()))).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_pat_prunes_and_the_rest_is_accelerated(name: str) -> None:
    model = network(name)
    whole = size(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    method = PaT(policy="epoch", prune_epoch=0, prune_ratio=0.2, prune_steps=2)
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=2)
    for _ in range(2):
        heads = [y for y in tensors_in(model(images(4))) if y.dim() == 2]
        loss = torch.stack([F.cross_entropy(y, torch.arange(4)) for y in heads]).sum()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    (done,) = [event for event in pruner.events if event["event"] == "reconfigured"]
    assert not done["held"]
    assert size(model) < whole
    model.eval()
    convs = [m for m in model.modules() if type(m) is nn.Conv2d and m.groups == 1 and m.weight.shape[1] > 3]
    with torch.no_grad():
        for conv in convs[:3]:
            conv.weight[:, ::2] = 0
        wanted = tensors_in(model(images_fixed()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = accelerate(pack(model), images_fixed())
        for a, b in zip(tensors_in(fast(images_fixed())), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def images_fixed() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
