"""Methods of each kind on the networks of the zoo with squeeze-and-excitation, and with many bottlenecks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clicktrain import PaT, create_model
from clicktrain.methods import ClickTrain, Method, PruneTrain, RigL
from clicktrain.surgery import apply_surgery_, channel_groups, plan_from_keep
from clicktrain.surgery.apply import zero_

NETWORKS: dict[str, dict[str, Any]] = {
    "mobilenet_v3_small": {"width": 0.25, "stem": "cifar"},
    "resnet50_cifar": {"width": 0.5},
}
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, **NETWORKS[name])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # two networks are compared while they train
    return model


def train(model: nn.Module, method: Method[Any], epochs: int) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = method.attach(model, optimizer, epochs=epochs, steps_per_epoch=1, example=X[:1])
    for _ in range(epochs):
        loss = F.cross_entropy(model(X), torch.arange(4))
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    return pruner


# The other network's blocks are those of resnet50, which the tests of surgery have.
@pytest.mark.parametrize("name", ["mobilenet_v3_small"])
def test_channels_go_and_the_function_stays(name: str) -> None:
    model = network(name).double()
    groups = [group for group in channel_groups(model, X.double()) if group.fixed is None and group.size > 2]
    plan = plan_from_keep(model, X.double(), {g.name: torch.arange(g.size) % 3 != 1 for g in groups})
    before = copy.deepcopy(model)
    zero_(plan, before)
    apply_surgery_(plan, model)
    cut, whole = (sum(p.numel() for p in m.parameters()) for m in (model, before))
    assert cut < 0.65 * whole
    for mode in (False, True):
        torch.testing.assert_close(model.train(mode)(X.double()), before.train(mode)(X.double()))


@pytest.mark.slow
def test_squeeze_and_excitation_shrinks_with_its_channels() -> None:
    model = network("mobilenet_v3_small")
    train(model, PaT(policy="epoch", prune_epoch=0, prune_ratio=0.4, prune_steps=1), 1)
    excited = 0
    for block in model.get_submodule("features").children():
        parts = dict(block.named_modules())
        squeezes = [m for m in parts.values() if type(m).__name__ == "SqueezeExcitation"]
        for squeeze in squeezes:
            (depthwise,) = (m for m in parts.values() if isinstance(m, nn.Conv2d) and m.groups > 1)
            fc1, fc2 = squeeze.get_submodule("fc1"), squeeze.get_submodule("fc2")
            assert isinstance(fc1, nn.Conv2d)
            assert isinstance(fc2, nn.Conv2d)
            assert fc1.in_channels == fc2.out_channels == depthwise.out_channels
            assert fc1.out_channels == fc2.in_channels
            excited += 1
    assert excited == 9


@pytest.mark.parametrize(
    ("name", "method"),
    [
        # Its kernels of several positions are depthwise: what is left to patterns and kernels is 1x1.
        ("mobilenet_v3_small", ClickTrain(compression=2)),
        ("mobilenet_v3_small", RigL(sparsity=0.5)),
        ("resnet50_cifar", ClickTrain(compression=4)),
    ],
)
def test_weights_go(name: str, method: Method[Any]) -> None:
    model = network(name)
    pruner = train(model, method, 6)
    zeros = sum(int((~mask).sum()) for mask in pruner.masks.values())
    assert zeros > 0.4 * sum(mask.numel() for mask in pruner.masks.values())
    patterns = {int(m.flatten(2).sum(2).max()) for m in pruner.masks.values() if m.shape[2:] == (3, 3)}
    if name == "resnet50_cifar":
        assert patterns == {4}
    else:
        assert all(mask.shape[2:] == (1, 1) for mask in pruner.masks.values() if mask.dim() == 4)
    model.eval()
    assert model(X).isfinite().all()


@pytest.mark.slow
def test_prunetrain_removes_bottlenecks() -> None:
    model = network("resnet50_cifar")
    pruner = train(model, PruneTrain(coefficient=40.0, floor=0.1, interval=1, check_outputs=True), 3)
    events = [event for event in pruner.events if event["event"] == "reconfigured"]
    assert any(plan.removed_layers for plan in pruner.plans)
    assert max(event["max_output_change"] or 0 for event in events) < 1e-5
    assert model.eval()(X).shape == (4, 4)
