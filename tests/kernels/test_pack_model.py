"""Packing in the middle of training: the run goes on exactly as it would have masked and dense."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import Optimizer

import clicktrain
from clicktrain.errors import UserError
from clicktrain.kernels.pack_model import (
    dense_state_dict,
    pack,
    pack_model_,
    pack_refusals,
    unpack,
    unpack_model_,
)
from clicktrain.kernels.sparse_conv2d import PackedConv2d


class Net(nn.Module):
    """Strided, grouped, 1x1 and biased convolutions; one is nested and used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.ReLU())
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.point = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = self.block(x + self.block(x))
        x = F.relu(self.point(F.relu(self.down(x))))
        y: Tensor = self.fc(x.mean((2, 3)))
        return y


NAMES = ("block.0", "down", "point")


def make_net() -> Net:
    return Net().double()


def make_masks(model: nn.Module, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    """Half of the weights; unequal numbers per filter in ``down``."""
    masks = {}
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        flat = torch.rand(weight.shape).flatten(1)
        kept = flat < 0.5 if name == "down" else flat.argsort(1).argsort(1) < flat.shape[1] // 2
        masks[name] = kept.view(weight.shape)
    return masks


def train(
    model: nn.Module, optimizer: Optimizer, steps: range, masks: Mapping[str, Tensor] | None = None
) -> None:
    """Plain training; with masks, as dense training with fixed zeros: gradients masked before each step."""
    model.train()
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(0, 3, (4,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, mask in (masks or {}).items():
            model.get_submodule(name).weight.grad.masked_fill_(~mask, 0)
        optimizer.step()


def prune_(model: nn.Module, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> None:
    """Hard prune: weights, gradients and state are zero outside the masks."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        held = [v for v in optimizer.state.get(weight, {}).values() if isinstance(v, Tensor)]
        with torch.no_grad():
            for tensor in [weight, *([weight.grad] if weight.grad is not None else []), *held]:
                if tensor.shape == mask.shape:
                    tensor.masked_fill_(~mask, 0)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, out of the model's order, with options of their own."""
    convs = [p for p in model.parameters() if p.dim() == 4]
    rest = [p for p in model.parameters() if p.dim() != 4]
    return [{"params": rest, "weight_decay": 0.0, "name": "rest"}, {"params": convs[::-1]}]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-3),
    "momentum-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-3, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}


def assert_same_weights(packed: nn.Module, dense: nn.Module) -> None:
    one, two = dense_state_dict(packed), dense.state_dict()
    assert list(one) == list(two)
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_packed_training_is_masked_dense_training(name: str) -> None:
    """Pack after 3 steps, train 4, unpack, train 3 more: always the same weights as without packing."""
    dense = make_net()
    masks = make_masks(dense)
    model = copy.deepcopy(dense)
    ours, theirs = OPTIMIZERS[name](groups_of(model)), OPTIMIZERS[name](groups_of(dense))
    train(model, ours, range(3))
    train(dense, theirs, range(3))
    pack_model_(model, masks, [ours])
    prune_(dense, theirs, masks)
    assert_same_weights(model, dense)
    train(model, ours, range(3, 7))
    train(dense, theirs, range(3, 7), masks)
    assert_same_weights(model, dense)
    unpack_model_(model, [ours])
    assert not any(isinstance(m, PackedConv2d) for m in model.modules())
    train(model, ours, range(7, 10), masks)
    train(dense, theirs, range(7, 10), masks)
    assert_same_weights(model, dense)
    for layer, mask in masks.items():
        assert not bool(model.get_submodule(layer).weight[~mask].any())


@pytest.mark.parametrize("name", ["momentum", "adamw-amsgrad"])
def test_optimizer_state_is_packed_and_order_and_options_stay(name: str) -> None:
    model = make_net()
    optimizer = OPTIMIZERS[name](groups_of(model))
    train(model, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    kept = {id(p) for p in (*model.fc.parameters(), model.stem.weight, model.down.bias)}
    masks = make_masks(model)
    pack_model_(model, masks, [optimizer])
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert list(after["state"]) == list(before["state"])
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert kept <= {id(p) for p in held}
    index = next(i for i, p in enumerate(held) if p is model.down.values)
    for key, value in before["state"][index].items():
        packed = after["state"][index][key]
        if value.dim() == 4:
            assert torch.equal(packed, value[masks["down"]])
        else:
            assert torch.equal(packed, value)


def test_hooks_schedulers_and_gradients_survive() -> None:
    model = make_net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, optimizer, range(1))
    grad = model.point.weight.grad.clone()
    masks = make_masks(model)
    pack_model_(model, masks, [optimizer])
    assert torch.equal(model.point.values.grad, pack_values_of(grad, masks["point"]))
    train(model, optimizer, range(1, 2))
    scheduler.step()
    assert seen == ["pre", "post"] * 2
    assert optimizer.param_groups[0]["lr"] == 0.025


def pack_values_of(dense: Tensor, mask: Tensor) -> Tensor:
    return dense[mask].view(dense.shape[0], -1)


def test_packing_inside_a_step_hook() -> None:
    """The hard prune happens there: the optimizer must go on with the parameters that it then has."""
    model = make_net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    masks = make_masks(model)

    def hook(*_: Any) -> None:
        if not isinstance(model.point, PackedConv2d):
            pack_model_(model, masks, [optimizer])

    optimizer.register_step_post_hook(hook)
    train(model, optimizer, range(1))
    before = model.point.values.detach().clone()
    train(model, optimizer, range(1, 3))
    assert not torch.equal(model.point.values, before)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_state_dicts_round_trip_when_packed(name: str) -> None:
    """What a checkpoint does: pack a fresh model by the masks, then load; both go on bit for bit."""
    model = make_net()
    optimizer = OPTIMIZERS[name](groups_of(model))
    masks = make_masks(model)
    train(model, optimizer, range(2))
    pack_model_(model, masks, [optimizer])
    train(model, optimizer, range(2, 4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other = make_net()
    fresh = OPTIMIZERS[name](groups_of(other))
    pack_model_(other, masks, [fresh])
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    train(model, optimizer, range(4, 6))
    train(other, fresh, range(4, 6))
    for key, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], tensor), key


def test_two_optimizers() -> None:
    model = make_net()
    convs = [p for p in model.parameters() if p.dim() == 4]
    rest = [p for p in model.parameters() if p.dim() != 4]
    one, two = torch.optim.SGD(convs, 0.1, momentum=0.9), torch.optim.Adam(rest)
    train(model, one, range(1))
    pack_model_(model, make_masks(model), [one, two])
    held = {id(p) for o in (one, two) for group in o.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_packing_again_and_other_positions() -> None:
    model = make_net()
    masks = make_masks(model)
    pack_model_(model, masks)
    layer = model.point
    pack_model_(model, masks)
    assert model.point is layer
    with pytest.raises(UserError, match=r"point: it is packed already, with other positions"):
        pack_model_(model, {"point": ~masks["point"]})
    unpack_model_(model)
    unpack_model_(model)
    assert type(model.point) is nn.Conv2d


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(2, 2, 3) for _ in range(3))
        self.b.weight = self.a.weight


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 2, 3)
        self.b = self.a
        self.c = nn.Conv2d(2, 2, 3)


def normed() -> nn.Module:
    model = nn.ModuleDict({"a": parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), "c": nn.Conv2d(2, 2, 3)})
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Tied, "a: its weight is shared by a.weight and b.weight"),
        (Twice, "a: it is the same module as a and b"),
        (normed, "a: its weight is computed by a parametrization"),
        (lambda: nn.ModuleDict({"c": nn.Conv2d(2, 2, 3)}), "a: there is no such layer"),
        (lambda: nn.ModuleDict({"a": nn.Embedding(2, 2), "c": nn.Conv2d(2, 2, 3)}), "a: it is a Emb"),
        (lambda: nn.ModuleDict({"a": nn.Conv2d(2, 1, 3), "c": nn.Conv2d(2, 2, 3)}), "a: its mask is"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_changed(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    modules, parameters = list(model.modules()), list(model.parameters())
    masks = {name: torch.rand(2, 2, 3, 3) < 0.5 for name in ("c", "a")}
    with pytest.raises(UserError, match=reason):
        pack_model_(model, masks, [optimizer])
    assert list(model.modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(optimizer.param_groups[0]["params"], parameters, strict=True))


def test_a_block_that_is_registered_twice_is_packed() -> None:
    block = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1))
    model = nn.Sequential(block, nn.ReLU(), block)
    mask = torch.rand(2, 2, 3, 3) < 0.5
    pack_model_(model, {"0.0": mask})
    assert model[0][0] is model[2][0]
    assert isinstance(model[2][0], PackedConv2d)


class RowNorms(torch.optim.SGD):
    """Keeps one value a filter."""

    def step(self, closure: Any = None) -> Any:
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter]["row_norm"] = parameter.detach().flatten(1).norm(dim=1)
        return super().step(closure)


@pytest.mark.parametrize("layer", ["point", "down"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS"),
        (lambda p: torch.optim.Adafactor(p), "Adafactor keeps step, row_var, col_var"),
        (lambda p: RowNorms([q for q in p if q.dim() > 1]), "RowNorms keeps row_norm"),
    ],
    ids=["lbfgs", "adafactor", "row-norms"],
)
def test_optimizers_whose_state_cannot_be_packed(
    layer: str, make: Callable[[Any], Optimizer], reason: str
) -> None:
    model = make_net()
    optimizer = make(model.parameters())
    if not isinstance(optimizer, torch.optim.LBFGS):
        train(model, optimizer, range(1))
    masks = make_masks(model, [layer])
    assert list(pack_refusals(model, masks, [optimizer])) == [layer]
    with pytest.raises(UserError, match=f"{layer}: {reason}"):
        pack_model_(model, masks, [optimizer])
    assert type(model.get_submodule(layer)) is nn.Conv2d


def test_such_an_optimizer_may_be_packed_before_its_first_step() -> None:
    model = make_net()
    optimizer = torch.optim.Adafactor(model.parameters())
    pack_model_(model, make_masks(model), [optimizer])
    before = [one.detach().clone() for one in model.parameters()]
    train(model, optimizer, range(2))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_refusals_are_data() -> None:
    assert pack_refusals(make_net(), NAMES) == {}
    refusals = pack_refusals(make_net(), ["fc", "bn", "head"])
    assert refusals == {
        "bn": "it is a BatchNorm2d, which has no packed form",
        "head": "there is no such layer",
    }
    assert "parent" in pack_refusals(nn.Conv2d(1, 1, 1), [""])[""]


def test_pack_and_unpack_copies() -> None:
    model = make_net().eval()
    masks = make_masks(model)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.masked_fill_(~mask, 0)
        model.stem.weight[0, 0, 0, 0] = 0.0  # by chance: packing it would not pay
    packed = clicktrain.pack(model)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(packed(x), model(x))
    assert type(model.point) is nn.Conv2d
    assert type(packed.stem) is nn.Conv2d
    assert [name for name in NAMES if isinstance(packed.get_submodule(name), PackedConv2d)] == list(NAMES)
    assert not packed.training
    back = clicktrain.unpack(packed)
    assert isinstance(packed.point, PackedConv2d)
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor)
    assert list(dense_state_dict(packed)) == list(model.state_dict())
    assert list(dense_state_dict(model)) == list(model.state_dict())


def test_pack_leaves_what_cannot_be_packed() -> None:
    model = Tied()
    with torch.no_grad():
        for conv in (model.a, model.c):
            conv.weight[:, 0] = 0
    packed = pack(model)
    assert packed.a.weight is packed.b.weight
    assert isinstance(packed.c, PackedConv2d)


def test_a_model_that_is_a_convolution_itself() -> None:
    conv = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        conv.weight[:, 0] = 0
    packed = pack(conv)
    assert isinstance(packed, PackedConv2d)
    assert list(dense_state_dict(packed)) == ["weight", "bias"]
    assert torch.equal(unpack(packed).weight, conv.weight)
    with pytest.raises(UserError, match="no parent"):
        pack_model_(conv, {"": conv.weight != 0})
    with pytest.raises(UserError, match=r"use unpack\(model\)"):
        unpack_model_(packed)


def test_frozen_weights_and_other_groups_of_masks() -> None:
    """A layer that is not trained is packed all the same, and layers without a mask stay."""
    model = make_net()
    model.point.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    pack_model_(model, make_masks(model, ["point"]), [optimizer])
    train(model, optimizer, range(2))
    assert not model.point.values.requires_grad
    assert type(model.down) is nn.Conv2d
