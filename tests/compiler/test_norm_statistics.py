"""Convolutions that take the statistics of the batch norm behind them: the same training, and who may."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import SMALL, assert_same_state, assert_same_step, batch, network, prune_, twins
from torch import Tensor, nn

from clicktrain import UserError, accelerate
from clicktrain.compiler import Accelerated, LoweringPlan, steps
from clicktrain.compiler.believe import is_operator
from clicktrain.compiler.norm_statistics import convolutions_before_norms
from clicktrain.compiler.units import find_units
from clicktrain.graph.trace import trace
from clicktrain.kernels.native import toolchain

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")


def with_statistics(model: nn.Module, x: Tensor) -> Accelerated:
    """Everything runs blocked, and every convolution that can takes the statistics."""
    plan = accelerate(model, x, rule="sparse").plan  # type: ignore[union-attr]
    assert isinstance(plan, LoweringPlan)
    assert not any(choice.statistics for choice in plan.choices)
    able = convolutions_before_norms(find_units(trace(model, x, leaves=is_operator))[0])
    choices = tuple(replace(choice, statistics=choice.layer in able) for choice in plan.choices)
    fast = accelerate(model, x, plan=replace(plan, choices=choices))
    assert isinstance(fast, Accelerated)
    return fast


def joined(fast: Accelerated, x: Tensor) -> list[steps.ConvBatchNorm]:
    return [step for step in fast.graph(x).modules() if isinstance(step, steps.ConvBatchNorm)]


@pytest.mark.parametrize("name", ["resnet20", "vgg11"])
def test_training_is_the_same(name: str) -> None:
    model, reference = twins(name)
    without = copy.deepcopy(model)
    x, y = batch(13)
    fast, plain = with_statistics(model, x), accelerate(without, x, rule="sparse")
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    assert len(joined(fast, x)) == norms
    assert_same_step(fast, reference, x, y)
    models = (fast, plain, reference)
    reference.load_state_dict(model.state_dict())
    without.load_state_dict(model.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.002, momentum=0.9) for m in models]
    for _ in range(5):
        x, y = batch(13)
        losses = []
        for m, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == pytest.approx([losses[2]] * 3, rel=1e-8)
    assert_same_state(fast, reference, 1e-7)
    torch.testing.assert_close(fast.eval()(x), reference.eval()(x), rtol=1e-7, atol=1e-7)
    assert_same_state(fast, reference, 1e-7)


def test_two_threads_other_sizes_and_frozen_norms() -> None:
    model, reference = twins("resnet20")
    fast = with_statistics(model, batch(16)[0])
    torch.set_num_threads(2)
    try:
        assert_same_step(fast, reference, *batch(17))
    finally:
        torch.set_num_threads(1)
    assert_same_step(fast, reference, *batch(3, 19))
    for m in (model, reference):
        m.get_submodule("layer2.0.bn1").eval()  # frozen by hand: the running statistics count
    before = copy.deepcopy(model.get_submodule("layer2.0.bn1").state_dict())
    assert_same_step(fast, reference, *batch(16))
    assert all(torch.equal(before[k], v) for k, v in model.get_submodule("layer2.0.bn1").state_dict().items())


def test_the_plan_says_so_and_is_replayed() -> None:
    model, reference = twins("vgg11", torch.float32)
    x, y = batch(4, 8, torch.float32)
    fast = accelerate(model, x, remember=False)
    assert isinstance(fast, Accelerated)
    choices = fast.plan.by_layer()
    able = convolutions_before_norms(find_units(trace(model, x, leaves=is_operator))[0])
    assert able
    for name, norm in able.items():
        both = choices[name].layout == choices[norm.name].layout == "blocked"
        reasons = [reason for reason in choices[name].refused if reason.startswith("statistics ")]
        assert len(reasons) == both
        if both:
            other = "apart" if choices[name].statistics else "together"
            assert reasons[0].startswith(f"statistics {other}: ")
    taken = [row["layer"] for row in fast.plan.table() if row["statistics"] == "taken"]
    assert taken == [choice.layer for choice in fast.plan.choices if choice.statistics]
    assert len(joined(fast, x)) == len(taken)
    again = LoweringPlan.from_json(fast.plan.to_json())
    assert again == fast.plan
    assert_same_step(accelerate(model, x, plan=again), reference, x, y, 1e-3)


def test_a_plan_can_be_edited_but_not_into_the_impossible() -> None:
    model = network("resnet20")
    x, _ = batch(4)
    data = json.loads(accelerate(model, x, rule="sparse").plan.to_json())  # type: ignore[union-attr,operator]

    def edited(**layers: dict[str, object]) -> LoweringPlan:
        own = copy.deepcopy(data)
        for choice in own["choices"]:
            choice.update(layers.get(choice["layer"].replace(".", "_"), {}))
        return LoweringPlan.from_json(json.dumps(own))

    fast = accelerate(model, x, plan=edited(layer1_0_conv2={"statistics": True}))
    assert isinstance(fast, Accelerated)
    assert len(joined(fast, x)) == 1
    wrong: dict[str, dict[str, dict[str, object]]] = {
        "layer1.0.conv2 is no convolution that runs blocked": {
            "layer1_0_conv2": {"statistics": True, "layout": "plain"}
        },
        "layer1.0.bn1 is no convolution": {"layer1_0_bn1": {"statistics": True}},
        "the statistics of conv1 are true or false, not 'yes'": {"conv1": {"statistics": "yes"}},
        "layer1.0.conv2 takes the statistics of layer1.0.bn2, which the plan does not run blocked": {
            "layer1_0_conv2": {"statistics": True},
            "layer1_0_bn2": {"layout": "plain"},
        },
    }
    for message, layers in wrong.items():
        with pytest.raises(UserError, match=message):
            accelerate(model, x, plan=edited(**layers))


class Shared(nn.Module):
    """One convolution that two read, one that a batch norm alone reads, one before no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.both, self.alone, self.last = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(3))
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(self.first(x))
        x = torch.relu(self.norm1(both) + both)
        x = torch.relu(self.norm2(self.alone(x)) + both)
        y: Tensor = self.fc(self.last(x).mean((2, 3)))
        return y


def test_only_where_a_batch_norm_alone_reads() -> None:
    model = prune_(Shared(), 0.4).double()
    reference = copy.deepcopy(model)
    x, y = batch(6)
    fast = with_statistics(model, x)
    assert [name for name, choice in fast.plan.by_layer().items() if choice.statistics] == ["alone"]
    assert_same_step(fast, reference, x, y)
    choices = tuple(replace(c, statistics=c.layer in ("both", "alone")) for c in fast.plan.choices)
    with pytest.raises(UserError, match="both cannot take the statistics of a batch norm: its result is"):
        accelerate(model, x, plan=replace(fast.plan, choices=choices))


def test_small_networks_are_listed() -> None:
    """Every convolution of these networks stands before a batch norm; what cannot run blocked is left out."""
    for name in SMALL:
        model, x = network(name), batch(2, 32)[0]
        convolutions = [
            unit for unit in find_units(trace(model, x, leaves=is_operator))[0] if unit.kind == "conv"
        ]
        assert len(convolutions_before_norms(find_units(trace(model, x, leaves=is_operator))[0])) == len(
            convolutions
        )
