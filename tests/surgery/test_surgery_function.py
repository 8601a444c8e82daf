"""The shrunken network computes what the masked one did: the zoo and odd graphs, both modes, both schemes."""

from __future__ import annotations

import copy
import json
from typing import Literal

import pytest
import torch
from odd_graphs import ALL, ZOO, assert_same_function, images, kept, masked, network
from torch import nn

from clicktrain.surgery import SurgeryPlan, apply_surgery_, channel_groups, plan_from_keep, plan_from_zeros


@pytest.mark.parametrize("name", ALL)
def test_channels_that_are_zero_on_both_sides_go(name: str) -> None:
    model, alive = masked(name)
    before, groups = copy.deepcopy(model), channel_groups(model, images(2))
    plan = plan_from_zeros(model, images(2))
    left = kept(plan, groups)
    for group in groups:
        # Batch norms with a constant of zero can make more go; a squeeze-excite gate of a dead channel lives.
        assert left[group.name] <= int(alive[group.name].sum()) or name == "SqueezeExcite", group.name
    parameters = sum(p.numel() for p in model.parameters())
    apply_surgery_(plan, model)
    assert sum(p.numel() for p in model.parameters()) < 0.75 * parameters
    assert_same_function(model, before)


@pytest.mark.long
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("fraction", [0.9, 0.2])
def test_gating_computes_what_union_computes(name: str, fraction: float) -> None:
    before, _ = masked(name, fraction)
    count = {}
    schemes: tuple[Literal["union", "gating"], ...] = ("union", "gating")
    for scheme in schemes:
        model = copy.deepcopy(before)
        apply_surgery_(plan_from_zeros(model, images(2), scheme=scheme), model)
        assert_same_function(model, before)
        count[scheme] = sum(p.numel() for p in model.parameters())
    assert count["gating"] <= count["union"]


@pytest.mark.long
@pytest.mark.parametrize("name", ALL)
def test_plans_replay_on_a_fresh_model(name: str) -> None:
    model, _ = masked(name)
    plans = [plan_from_zeros(model, images(2), scheme="gating")]
    apply_surgery_(plans[0], model)
    # A second reconfiguration of the shrunken network.
    groups = channel_groups(model, images(2))
    keep = {
        group.name: torch.arange(group.size) % 2 == 0
        for group in groups
        if group.fixed is None and group.size > 1
    }
    plans.append(plan_from_keep(model, images(2), keep))
    apply_surgery_(plans[1], model)
    fresh = network(name)
    for plan in plans:
        again = SurgeryPlan.from_json(json.loads(json.dumps(plan.to_json())))
        assert again == plan
        assert again.layers == plan.layers
        apply_surgery_(again, fresh)
    fresh.load_state_dict(model.state_dict())
    model.eval()
    fresh.eval()
    x = images()
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_layer_notes_its_new_shape(name: str) -> None:
    model, _ = masked(name)
    apply_surgery_(plan_from_zeros(model, images(2)), model)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            per_group = module.in_channels // module.groups
            assert module.weight.shape[:2] == (module.out_channels, per_group)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.num_features == module.weight.numel() == module.running_mean.numel()
        elif isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


def test_narrow_shortcuts_train_in_channels_last() -> None:
    """PyTorch's library corrupts memory there; see `clicktrain.formats.memory_format`."""
    model = network("resnet20")
    keep = {"conv1": torch.arange(16) < 3, "layer1.0.conv2": torch.arange(16) < 3}
    apply_surgery_(plan_from_keep(model, images(2), keep), model)
    before = copy.deepcopy(model)
    model = model.float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(16, 3, 16, 16)
    for _ in range(3):
        model(x.to(memory_format=torch.channels_last)).square().mean().backward()
    before(x.double()).square().mean().backward()
    shortcut, wanted = (m.get_submodule("layer2.0.downsample.0").weight.grad for m in (model, before))
    assert isinstance(shortcut, torch.Tensor)
    assert isinstance(wanted, torch.Tensor)
    assert shortcut.shape == (32, 3, 1, 1)
    assert torch.allclose(shortcut.double(), 3 * wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
