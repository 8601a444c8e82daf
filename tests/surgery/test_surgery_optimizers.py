"""After surgery the same optimizer trains every living parameter, with its state row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_graphs import CLASSES, images, masked
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.surgery import apply_surgery_, plan_from_zeros

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw amsgrad foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    return [{"params": decayed}, {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 0.01}]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def trained(make: Callable[[Any], torch.optim.Optimizer], name: str = "resnet20") -> Any:
    """A masked network, its optimizer with a state of two steps, and gradients; the dead are dead again."""
    model, _ = masked(name)
    zero = {key: p.detach() == 0 for key, p in model.named_parameters() if p.dim() > 1}
    optimizer = make(groups_of(model))
    for _ in range(2):
        step(model, optimizer, images(), torch.randint(CLASSES, (4,)))
    with torch.no_grad():
        for key, mask in zero.items():
            model.get_parameter(key)[mask] = 0
    return model, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_gradients_and_averages_shrink_together(kind: str) -> None:
    model, optimizer = trained(OPTIMIZERS[kind])
    average = copy.deepcopy(model)
    names = {p: name for name, p in model.named_parameters()}
    before = {names[p]: {k: copy.deepcopy(v) for k, v in s.items()} for p, s in optimizer.state.items()}
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    order = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    lists = [group["params"] for group in optimizer.param_groups]
    plan = plan_from_zeros(model, images(2))
    apply_surgery_(plan, model, [optimizer])
    apply_surgery_(plan, average)
    names = {p: name for name, p in model.named_parameters()}
    assert [[names[p] for p in group["params"]] for group in optimizer.param_groups] == order
    assert all(a is b["params"] for a, b in zip(lists, optimizer.param_groups, strict=True))
    assert [names[p] for p in optimizer.state] == list(before)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            expected = before[names[parameter]][key]
            if isinstance(expected, Tensor) and expected.dim():
                expected = plan.shrink(names[parameter], expected)
                assert value.shape == parameter.shape
            torch.testing.assert_close(value, expected, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plan.shrink(name, gradients[name]))
    for mine, theirs in zip(average.state_dict().items(), model.state_dict().items(), strict=True):
        assert mine[0] == theirs[0]
        assert torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_and_moves_every_parameter(kind: str) -> None:
    model, optimizer = trained(OPTIMIZERS[kind])
    apply_surgery_(plan_from_zeros(model, images(2)), model, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        step(model, optimizer, images(), torch.randint(CLASSES, (4,)))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_steps_are_those_of_the_masked_network() -> None:
    """With both sides zero and held there, removal changes nothing in what the living weights do."""
    model, optimizer = trained(OPTIMIZERS["sgd"])
    small = copy.deepcopy((model, optimizer))
    names = {p: name for name, p in model.named_parameters()}
    zero = {p: p.detach() == 0 for p in model.parameters() if p.dim() > 1}
    plan = plan_from_zeros(small[0], images(2))
    apply_surgery_(plan, *small)
    for _ in range(3):
        x, y = images(), torch.randint(CLASSES, (4,))
        step(model, optimizer, x, y)
        step(*small, x, y)
        with torch.no_grad():
            for parameter, mask in zero.items():
                parameter[mask] = 0
    left = dict(small[0].named_parameters())
    for parameter, name in names.items():
        torch.testing.assert_close(left[name], plan.shrink(name, parameter.detach()), rtol=1e-9, atol=1e-9)


def test_named_parameters_hooks_and_attributes_come_along() -> None:
    model, _ = masked("resnet20")
    weight = model.get_parameter("layer1.0.conv1.weight")
    seen: list[torch.Size] = []
    handle = weight.register_hook(lambda grad: seen.append(grad.shape))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.shape))
    weight.group = "mine"  # type: ignore[attr-defined]
    weight.requires_grad_(True)
    model.get_parameter("conv1.weight").requires_grad_(False)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    listed = list(optimizer.param_groups[0]["param_names"])
    apply_surgery_(plan_from_zeros(model, images(2)), model, optimizer)
    small = model.get_parameter("layer1.0.conv1.weight")
    assert small.shape != weight.shape
    assert small.group == "mine"  # type: ignore[attr-defined]
    assert not model.get_parameter("conv1.weight").requires_grad
    assert optimizer.param_groups[0]["param_names"] == listed
    model(images()).sum().backward()
    assert seen == [small.shape, small.shape]
    handle.remove()
    model(images()).sum().backward()
    assert len(seen) == 3


def test_factors_of_a_state_shrink_along_their_own_dimensions() -> None:
    """Adafactor keeps row and column means of each weight, with a 1 in place of what they are taken over."""
    model, optimizer = trained(lambda p: torch.optim.Adafactor(p, lr=1e-2))
    names = {p: name for name, p in model.named_parameters()}
    before = {names[p]: copy.deepcopy(state) for p, state in optimizer.state.items()}
    plan = plan_from_zeros(model, images(2))
    apply_surgery_(plan, model, optimizer)
    factors = 0
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            old = before[name][key]
            if old.numel() == 1:
                torch.testing.assert_close(value, old, rtol=0, atol=0)
                continue
            factors += value.shape != parameter.shape
            expected = old
            for cut in plan.cuts_of(name):
                if old.shape[cut.dim] == cut.size:
                    expected = expected.index_select(cut.dim, torch.tensor(cut.keep))
            assert torch.equal(value, expected), (name, key)
    assert factors > 4
    step(model, optimizer, images(), torch.randint(CLASSES, (4,)))


class RowNorms(torch.optim.SGD):
    """Keeps one number for each row of a weight, without its other dimensions."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["row_norm"] = torch.ones(parameter.shape[0])


@pytest.mark.parametrize("kind", ["LBFGS", "RowNorms"])
def test_a_state_that_cannot_shrink_is_refused_before_anything_changes(kind: str) -> None:
    model, _ = masked("TwoAdditions")
    optimizer = {"LBFGS": torch.optim.LBFGS, "RowNorms": RowNorms}[kind](model.parameters())
    F.cross_entropy(model(images()), torch.randint(CLASSES, (4,))).backward()
    if kind == "RowNorms":
        optimizer.step()
        model, _ = (model, model.zero_grad())
    plan = plan_from_zeros(masked("TwoAdditions")[0], images(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=kind):
        apply_surgery_(plan, model, optimizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], model.parameters(), strict=True))
