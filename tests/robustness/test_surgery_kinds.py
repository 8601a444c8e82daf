"""Whatever a forward pass does, what is left computes what the network with silenced channels did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from network_kinds import CLASSES, NAMES, inputs, network
from torch import Tensor, nn

from clicktrain import PaT, PruneTrain
from clicktrain.errors import UserError
from clicktrain.graph import as_inputs
from clicktrain.graph.observe import tensors_in
from clicktrain.methods import Method
from clicktrain.surgery import (
    Cut,
    SurgeryPlan,
    apply_surgery_,
    channel_groups,
    plan_from_keep,
    plan_from_zeros,
    verified,
)
from clicktrain.surgery.apply import zero_
from clicktrain.surgery.steady import steadily

METHODS: dict[str, Method[Any]] = {
    "prunetrain": PruneTrain(coefficient=0.3, interval=1),
    "pat": PaT(policy="epoch", prune_epoch=0, prune_ratio=0.3, prune_ratio_of="neurons"),
}


def outputs(model: nn.Module, name: str, training: bool) -> list[Tensor]:
    torch.manual_seed(1)
    call = as_inputs(inputs(name), model)
    with steadily(()):
        return tensors_in(call.call(model.train(training)))


def assert_same(found: nn.Module, expected: nn.Module, name: str) -> None:
    """In evaluation mode, while training, and in evaluation mode with the statistics of that."""
    found, expected = copy.deepcopy(found), copy.deepcopy(expected)
    for training in (False, True, False):
        for a, b in zip(outputs(found, name, training), outputs(expected, name, training), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def plan_of_a_third(model: nn.Module, name: str) -> SurgeryPlan:
    groups = channel_groups(model, inputs(name))
    keep = {g.name: torch.arange(g.size) % 3 != 1 for g in groups if g.fixed is None and g.size > 2}
    assert keep, [(group.name, group.fixed) for group in groups]
    return plan_from_keep(model, inputs(name), keep)


@pytest.mark.parametrize("name", NAMES)
def test_channels_that_are_cut_are_those_that_were_silenced(name: str) -> None:
    torch.manual_seed(0)
    model = network(name)
    before = copy.deepcopy(model)
    plan = plan_of_a_third(model, name)
    assert plan.cuts
    zero_(plan, before)
    apply_surgery_(plan, model)
    assert_same(model, before, name)
    # What is left trains: every parameter that had a gradient has one, of its own new shape.
    for network_ in (model, before):
        sum(t.square().mean() for t in outputs(network_, name, True)).backward()  # type: ignore[union-attr]
    wanted = dict(before.named_parameters())
    for path, parameter in model.named_parameters():
        if (gradient := wanted[path].grad) is not None:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, plan.shrink(path, gradient), rtol=1e-6, atol=1e-9)


CUT_TOO = {
    "AuxiliaryHead": "aux.weight",
    "DeepSupervision": "heads.0.weight",
    "EvaluationOnly": "calibrate.weight",
    "AuxiliaryBranch": "aux.weight",
    "batch norm with activation": "special.1.weight",
    "scale per channel": "special.gamma",
    "convolution written again": "special.weight",
    "depthwise": "special.0.weight",
    "squeeze-excite": "special.up.weight",
    "stochastic depth": "stem.0.weight",
    "autograd function": "stem.0.weight",
    "circular padding": "stem.0.weight",
    "instance norm": "special.weight",
    "inputs: two": "embed.weight",
}
KEPT = {
    "FeaturesForALoss": "it is an output of the network",
    "OutChannels": "stem.0.out_channels is read in forward",
    "WeightNumel": "the shape of stem.0.weight is read in forward",
    "LengthOfWeight": "the shape of stem.0.weight is read in forward",
    "NumFeatures": "stem.1.num_features is read in forward",
    "InputShape": "truediv computes with the number of channels",
    "NumberBehindAFunction": "without one of its channels the network computes something else",
    "layer norm over channels": "layer_norm is not understood",
    "standardised convolution": "conv2d is not understood",
    "branch on data": "special (DataDependent) is not understood",
    "softmax over channels": "special (Softmax) is not understood",
    "group norm": "special (GroupNorm) is not understood",
}


@pytest.mark.parametrize("name", CUT_TOO)
def test_what_is_understood_is_cut_with_the_rest(name: str) -> None:
    torch.manual_seed(0)
    plan = plan_of_a_third(network(name), name)
    assert CUT_TOO[name] in {cut.name for cut in plan.cuts}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_understood_keeps_what_it_touches_and_says_why(name: str) -> None:
    torch.manual_seed(0)
    model = network(name)
    groups = {group.name: group for group in channel_groups(model, inputs(name))}
    assert KEPT[name] in (groups["stem.0.weight:0"].fixed or "")
    assert groups["inner.0.0.weight:0"].fixed is None
    table = plan_of_a_third(model, name).table()
    assert KEPT[name] in next(line for line in table.splitlines() if line.startswith("stem.0 "))


@pytest.mark.parametrize("name", NAMES)
def test_what_has_become_zero_goes_without_a_change(name: str) -> None:
    torch.manual_seed(0)
    model = network(name)
    zero_(plan_of_a_third(model, name), model)
    before = copy.deepcopy(model)
    plan = plan_from_zeros(model, inputs(name), sides="readers")
    assert plan.cuts
    apply_surgery_(plan, model)
    assert_same(model, before, name)


# One of each family in every run; what they prune is compared for all of them above.
QUICK = (
    "AuxiliaryHead", "AuxiliaryBranch", "FeaturesForALoss", "OutChannels", "NumberBehindAFunction",
    "attention",
    "batch norm with activation", "branch on data", "split", "weight norm", "dropout",
)  # fmt: skip
RUNS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RUNS)
def test_methods_prune_in_the_user_s_loop(name: str, method: str) -> None:
    torch.manual_seed(0)
    model = network(name).float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = sum(p.numel() for p in model.parameters())
    pruner = METHODS[method].attach(model, optimizer, epochs=3, steps_per_epoch=2)
    target = torch.arange(4) % CLASSES
    for _ in range(6):
        call = as_inputs(inputs(name), model).map(Tensor.float)
        heads = [y for y in tensors_in(call.call(model)) if y.shape[-1] == CLASSES]
        loss = torch.stack([F.cross_entropy(y, target) for y in heads]).sum()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    done = [event for event in pruner.events if event["event"] == "reconfigured"]
    assert done
    assert not any(event["held"] for event in done)
    assert sum(p.numel() for p in model.parameters()) < before
    for training in (True, False):
        as_inputs(inputs(name), model).map(Tensor.float).call(model.train(training))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


# ---------------------------------------------------------------- the safety net


class Switch(nn.Module):
    """A number that nothing shows and that no single channel changes: widths of 4 and less mean something."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        factor = 1.0 if self.a.__dict__["_parameters"]["weight"].detach().numpy().shape[0] > 4 else 2.0
        return self.c(F.relu(self.b(F.relu(self.a(x)) * factor)))


def test_what_only_the_real_plan_shows_stays_and_is_told() -> None:
    torch.manual_seed(0)
    model, x = Switch().double(), torch.randn(4, 3, 12, 12).double()
    assert all(g.fixed is None for g in channel_groups(model, x) if g.name in ("a.weight:0", "b.weight:0"))
    with pytest.warns(UserWarning, match=r"channels of a\.weight:0 stay, because without them"):
        plan = plan_from_keep(model, x, {"a": torch.arange(8) < 3, "b": torch.arange(8) < 3})
    before = copy.deepcopy(model)
    zero_(plan, before)
    apply_surgery_(plan, model)
    assert (model.a.out_channels, model.b.out_channels) == (8, 3)
    torch.testing.assert_close(model(x), before(x))


def test_looking_at_a_network_waits_for_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A synchronised batch norm would: one process may print a plan alone."""
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(network("dropout"))

    def wait(self: nn.Module, x: Tensor) -> Tensor:
        raise AssertionError("waits for the others")

    with monkeypatch.context() as patched:
        patched.setattr(nn.SyncBatchNorm, "forward", wait)
        plan = plan_of_a_third(model, "dropout")
    assert {"stem.1.weight", "stem.1.running_mean"} <= {cut.name for cut in plan.cuts}
    assert plan == plan_of_a_third(network("dropout"), "dropout")


class Restless(nn.Module):
    """Gives something else at each call, whatever random numbers are set."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        Restless.calls += 1
        return self.b(F.relu(self.a(x))) * Restless.calls


def test_a_network_that_does_not_repeat_itself_is_refused() -> None:
    model, x = Restless().double(), torch.randn(4, 3, 12, 12).double()
    with pytest.raises(UserError, match="gives other outputs each time"):
        channel_groups(model, x)


def test_a_plan_that_is_wrong_is_taken_apart() -> None:
    """As it would be if the analysis of the graph were mistaken about one group."""
    torch.manual_seed(0)
    model = network("OutChannels")
    x = inputs("OutChannels")
    groups = {group.name: group for group in channel_groups(model, x)}
    assert "stem.0.out_channels is read in forward" in (groups["stem.0.weight:0"].fixed or "")
    good = plan_from_keep(model, x, {"inner.0.0": torch.arange(8) < 5})
    stem = groups["stem.0.weight:0"].members

    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    wrong = tuple(Cut(m.name, m.dim, (0, 1, 2), tensors[m.name].shape[m.dim]) for m in stem)
    result = verified(SurgeryPlan((*good.cuts, *wrong), layers=good.layers), model, x)
    assert set(result.plan.cuts) == set(good.cuts)
    assert list(result.held) == ["stem.0.weight:0"]


def test_reconfiguring_leaves_a_network_as_it_is_where_nothing_can_go() -> None:
    """Model, optimizer and state are those of before: nothing is half done."""
    torch.manual_seed(0)
    model = Switch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    method = PaT(policy="epoch", prune_epoch=0, prune_ratio=0.6, exclude=("b",))
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=2, example=torch.randn(4, 3, 12, 12))
    for step in range(2):
        loss = model(torch.randn(4, 3, 12, 12)).square().mean()
        loss.backward()
        pruner.observe(loss)
        if step == 1:
            with pytest.warns(UserWarning, match="nothing is removed"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    assert model.a.weight.shape == (8, 3, 3, 3)
    assert pruner.plans == []
    assert next(event["held"] for event in pruner.events if event["event"] == "reconfigured")
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
