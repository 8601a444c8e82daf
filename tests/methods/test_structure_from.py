"""The final structure of a run from scratch: ClickTrain's figure 2, with layers that PruneTrain removed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clicktrain import PaT, PruneTrain, create_model
from clicktrain.errors import UserError
from clicktrain.methods import Pruner
from clicktrain.surgery import apply_surgery_, write_recipe

STEPS = 2
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 4


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("resnet8", num_classes=4, width=0.5, stem="cifar")


def begin(method: Any, model: nn.Module, epochs: int, rate: float = 0.05) -> Pruner:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    return method.attach(model, optimizer, epochs=epochs, steps_per_epoch=STEPS, example=X[:1])


def train(pruner: Pruner, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(pruner.model(X), Y)
        loss.backward()
        pruner.observe(loss)
        pruner.optimizer.step()
        pruner.optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def pruned(scheme: Any) -> Pruner:
    """PruneTrain on weights that are zero: channels go first, then a branch, or gates come around one."""
    method = PruneTrain(coefficient=1e-6, interval=1, floor=0.0, scheme=scheme)
    pruner = begin(method, network(), 2, rate=0.0)
    layers = dict(pruner.model.named_modules())
    with torch.no_grad():
        layers["layer3.0.conv1"].weight[::2] = 0
        layers["layer3.0.bn1"].bias[::2] = 0
        if scheme == "gating":  # the branch gives a quarter of the channels to its stage
            layers["layer2.0.conv2"].weight[4:] = 0
            layers["layer2.0.bn2"].bias[4:] = 0
    train(pruner, STEPS)
    with torch.no_grad():
        layers["layer1.0.conv2"].weight.zero_()
    train(pruner, STEPS)
    pruner.finish()
    return pruner


@pytest.fixture(scope="module", params=["union", "gating"])
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pruner]:
    first = pruned(request.param)
    path = tmp_path_factory.mktemp(request.param) / "surgery.json"
    write_recipe(path, first.plans)
    return path, first


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_structure_without_layers_from_scratch(recipe: tuple[Path, Pruner]) -> None:
    path, first = recipe
    assert any(plan.removed_layers or plan.gates for plan in first.plans)
    expected = network(7)
    model = copy.deepcopy(expected)
    method = PaT(policy="epoch", prune_epoch=0, structure_from=str(path))
    again = begin(method, model, 4)
    train(again, 1)  # no weight moves
    assert shapes(again.model) == shapes(first.model)
    assert again.plans == first.plans
    for plan in first.plans:
        apply_surgery_(plan, expected)
    for name, parameter in expected.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    events = [event for event in again.events if event["event"] == "reconfigured"]
    assert [event["structure_from"] for event in events] == [str(path)] * len(first.plans)
    assert not any(event["held"] for event in events)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(again, 4 * STEPS - 1)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.dim() > 1)
    again.finish()


def test_it_is_resumed(recipe: tuple[Path, Pruner]) -> None:
    path, _ = recipe
    method = PaT(policy="epoch", prune_epoch=0, structure_from=str(path))
    whole = begin(method, network(), 3)
    train(whole, 2)
    saved = whole.state_dict(), copy.deepcopy(whole.model.state_dict()), whole.optimizer.state_dict()
    saved = copy.deepcopy(saved)
    train(whole, 3 * STEPS - 2)
    resumed = begin(method, network(3), 3)
    resumed.load_state_dict(saved[0])
    resumed.model.load_state_dict(saved[1])
    resumed.optimizer.load_state_dict(saved[2])
    train(resumed, 3 * STEPS - 2)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_what_does_not_fit_is_said_at_once(recipe: tuple[Path, Pruner], tmp_path: Path) -> None:
    path, _ = recipe
    with pytest.raises(UserError, match="structure_shuffle draws other neurons in each layer, but"):
        begin(PaT(policy="epoch", prune_epoch=0, structure_from=str(path), structure_shuffle=1), network(), 2)
    method = PaT(policy="epoch", prune_epoch=0, structure_from=str(path))
    other = create_model("vgg11", num_classes=4, width=0.125, stem="cifar")
    with pytest.raises(UserError, match="made for another network"):
        begin(method, other, 2)
    (tmp_path / "surgery.json").write_text(json.dumps({}))
    method = PaT(policy="epoch", prune_epoch=0, structure_from=str(tmp_path / "surgery.json"))
    with pytest.raises(UserError, match="is not a list of surgery plans"):
        begin(method, network(), 2)
