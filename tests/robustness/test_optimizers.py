"""Every optimizer by every method: the target is reached and zeros stay, or it is refused at attach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_loops import METHODS_MADE, OPTIMIZERS, Net, attached, batch, network, train
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d.module import PackedConv2d
from clicktrain.methods import ClickTrain, PaT, Pruner

REMOVES_CHANNELS = ("prunetrain", "prunetrain-clicktrain", "pat")


def refusal(optimizer: str, packed: bool) -> str | None:
    """What attach has to say, None where it has to work."""
    if optimizer == "LBFGS":
        return "LBFGS cannot train a network that is pruned"
    if optimizer == "SGD maximize":
        return "maximize=True cannot be attached"
    if optimizer == "Adafactor" and packed:
        return "Adafactor keeps .* packed=False"
    return None


def assert_consistent(model: nn.Module, optimizer: Optimizer) -> None:
    """The optimizer holds just the parameters of the network, with states of their sizes."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    for parameter, state in optimizer.state.items():
        assert any(parameter is p for p in held)
        for name, value in state.items():
            if isinstance(value, Tensor) and value.numel() > 1:
                assert len(value.shape) == len(parameter.shape), name
                assert all(a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True)), name


def assert_pruned(model: nn.Module, pruner: Pruner, method: str) -> None:
    """What the method promises, on the network that it leaves."""
    if method == "dense":
        assert pruner.density == 1
        return
    for name, mask in pruner.masks.items():
        weight = model.get_submodule(name).weight
        assert bool((weight[~mask] == 0).all()), name
        assert bool((weight[mask] != 0).any()), name
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    if method in ("clicktrain", "campfire", "dsr", "rigl"):
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
        alive = sum(int((m.weight != 0).sum()) for m in model.modules() if isinstance(m, nn.Conv2d))
        assert alive / weights == pytest.approx(pruner.density, abs=0.02)
        assert pruner.density < 0.75
    if method == "pat":
        assert pruner.plans


EVERYWHERE = ("SGD momentum nesterov", "AdamW foreach amsgrad", "Adafactor", "LBFGS", "SGD maximize")
"""Optimizers that every method meets in each run; the others meet one there, and all in the slow tests."""
PAIRS = [
    pytest.param(
        optimizer,
        method,
        id=f"{optimizer}-{method}",
        marks=() if optimizer in EVERYWHERE or method == "prunetrain" else pytest.mark.slow,
    )
    for optimizer in OPTIMIZERS
    for method in METHODS_MADE
]


@pytest.mark.long
@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize(("optimizer", "method"), PAIRS)
def test_every_optimizer_by_every_method(optimizer: str, method: str, packed: bool) -> None:
    model = network()
    made = OPTIMIZERS[optimizer](model.parameters())
    why = refusal(optimizer, packed)
    if why is not None:
        with pytest.raises(UserError, match=why):
            attached(METHODS_MADE[method](), model, made, packed=packed)
        return
    pruner = attached(METHODS_MADE[method](), model, made, packed=packed)
    before = [p.detach().clone() for p in model.parameters()]

    def check(number: int) -> None:
        pruner.check_zeros()
        assert_consistent(model, made)
        if number == 0:
            assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=False))

    train(model, pruner, after_step=check)
    if packed and pruner.frozen and pruner.masks:
        assert any(isinstance(module, PackedConv2d) for module in model.modules())
    assert pruner.finish() is model
    assert_consistent(model, made)
    assert_pruned(model, pruner, method)
    loss = F.cross_entropy(model(batch(99)[0]), batch(99)[1])  # whoever goes on, goes on in the same form
    loss.backward()
    made.step()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
@pytest.mark.parametrize("method", METHODS_MADE)
def test_muon_beside_another(method: str) -> None:
    """Muon takes matrices only, so it comes with a second optimizer for everything else."""
    model = network()
    first = torch.optim.SGD([p for n, p in model.named_parameters() if n != "head.weight"], lr=0.05)
    muon = torch.optim.Muon([model.head.weight], lr=1e-2)
    pruner = attached(METHODS_MADE[method](), model, [muon, first])
    assert pruner.optimizers == (muon, first)
    before = model.head.weight.detach().clone()
    train(model, pruner)
    assert model.head.weight.shape != before.shape or not torch.equal(model.head.weight, before)
    assert any(p is model.head.weight for p in muon.param_groups[0]["params"])
    pruner.finish()
    assert_pruned(model, pruner, method)


# ---------------------------------------------------------------- optimizers of other people


class RowNorms(torch.optim.Optimizer):
    """Keeps one number for each filter, which nobody can pack."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        norm = self.state[p].setdefault("row_norm", torch.ones(p.shape[0]))
                        norm.lerp_(p.grad.flatten(1).norm(dim=1) if p.dim() > 1 else p.grad.abs(), 0.1)
                        p.add_(p.grad / norm.view(-1, *[1] * (p.dim() - 1)), alpha=-group["lr"])


@pytest.mark.parametrize(("method", "packed"), [("clicktrain", True), ("pat", False)])
def test_an_unknown_state_is_refused_at_attach(method: str, packed: bool) -> None:
    model = network()
    with pytest.raises(UserError, match="RowNorms keeps row_norm for a weight"):
        attached(METHODS_MADE[method](), model, RowNorms(model.parameters()), packed=packed)
    pruner = attached(METHODS_MADE["clicktrain"](), model, RowNorms(model.parameters()))
    train(model, pruner)
    pruner.finish(packed=True)  # the run is over, so the state of packed layers may start again
    assert any(isinstance(module, PackedConv2d) for module in model.modules())
    F.cross_entropy(model(batch(99)[0]), batch(99)[1]).backward()
    pruner.optimizer.step()


class Untried(RowNorms):
    """Cannot be made from its own defaults, so nobody can try it; keeps copies where only it knows."""

    def __init__(self, params: Any, secret: object, copies: bool) -> None:
        super().__init__(params)
        assert secret is not None
        self.copies = copies

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.copies:
            self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        else:
            super().step(closure)


@pytest.mark.parametrize("copies", [False, True])
def test_what_cannot_be_tried_is_refused_at_the_first_step(copies: bool) -> None:
    model = network()
    optimizer = Untried(model.parameters(), object(), copies)
    pruner = attached(ClickTrain(compression=3), model, optimizer, packed=True)
    with pytest.raises(UserError, match="in its attribute 'slow'" if copies else "Untried keeps row_norm"):
        train(model, pruner, batches=range(1))


class SAM(torch.optim.Optimizer):
    """Two steps of its own, neither of which runs step hooks; the one it wraps does."""

    def __init__(self, params: Any, base: Any, rho: float = 0.05, **settings: Any) -> None:
        super().__init__(params, {"rho": rho, **settings})
        self.base = base(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.clone()
                    p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self.state[p]["old"])
        self.base.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError


class Lookahead(torch.optim.Optimizer):
    """As timm writes it, without ``Optimizer.__init__``; slow weights are in the state of the other."""

    def __init__(self, base: Optimizer, outside: bool = False) -> None:
        self.base, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = base.state
        self.steps = 0
        if outside:
            self.slow = [p.detach().clone() for group in base.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()
        self.steps += 1
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                outside = getattr(self, "slow", None)
                slow = outside[index] if outside else self.state[p].setdefault("slow", p.clone())
                if self.steps % 3 == 0:
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize("method", METHODS_MADE)
@pytest.mark.parametrize("kind", ["sam", "lookahead"])
def test_an_optimizer_around_another(kind: str, method: str, packed: bool) -> None:
    model = network()
    if kind == "sam":
        optimizer: Any = SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    else:
        optimizer = Lookahead(torch.optim.Adam(model.parameters(), lr=1e-2))
    pruner = attached(METHODS_MADE[method](), model, optimizer, packed=packed)
    for number in range(24):
        x, y = batch(number)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        if kind == "sam":
            optimizer.first_step()
            F.cross_entropy(model(x), y).backward()
            optimizer.second_step()
        else:
            optimizer.step()
            optimizer.zero_grad()
        pruner.check_zeros()
        assert_consistent(model, optimizer)
    decided = pruner.frozen or method in ("dense", "prunetrain", "pat", "prunetrain-clicktrain")
    assert decided, "steps of the wrapped optimizer carry the method through its stages"
    pruner.finish()
    assert_pruned(model, pruner, method)


def test_copies_of_the_weights_outside_of_the_state() -> None:
    """Where parameters are replaced they would be left behind; where zeros are written they do no harm."""
    model = network()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.05), outside=True)
    for method, packed in ((ClickTrain(compression=3), True), (PaT(), False)):
        with pytest.raises(UserError, match="Lookahead keeps copies of the weights in its attribute 'slow'"):
            attached(method, model, optimizer, packed=packed)
    pruner = attached(ClickTrain(compression=3), model, optimizer)
    train(model, pruner, after_step=lambda _: pruner.check_zeros())
    pruner.finish()
    assert_pruned(model, pruner, "clicktrain")


class OwnSteps(torch.optim.Optimizer):
    """SAM without anything inside: nothing of it ever runs a step hook."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def update(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError


def test_weights_that_move_without_a_step_are_noticed_soon() -> None:
    model = network()
    optimizer = OwnSteps(model.parameters())
    pruner = attached(ClickTrain(compression=3), model, optimizer, epochs=50)

    def step(number: int) -> None:
        loss = F.cross_entropy(model(batch(number)[0]), batch(number)[1])
        loss.backward()
        pruner.observe(loss)
        optimizer.update()
        optimizer.zero_grad()

    for number in range(8):
        step(number)
    with pytest.raises(UserError, match="weights change from batch to batch, but the attached OwnSteps"):
        step(8)


def test_what_is_no_optimizer() -> None:
    model = Net()
    for odd in (None, "sgd", [], [torch.optim.SGD(model.parameters(), lr=0.1), "adam"], model):
        with pytest.raises(UserError, match=r"attach takes a torch\.optim\.Optimizer or a list of them"):
            attached(ClickTrain(compression=3), model, odd)
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    for twice in ([one, one], [Lookahead(one), one]):
        with pytest.raises(UserError, match="twice, or together with an optimizer that wraps it"):
            attached(ClickTrain(compression=3), model, twice)
    with pytest.raises(UserError, match="trains no parameter of this network"):
        attached(ClickTrain(compression=3), model, torch.optim.SGD(network().parameters(), lr=0.1))


def test_the_table_in_the_documents() -> None:
    text = (Path(__file__).parents[2] / "docs" / "own-loops.md").read_text(encoding="utf-8")
    table = text.split("<!-- optimizers -->")[1].split("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.strip().splitlines()[2:]]
    said = {
        name: ["refused" if refusal(name, packed) else "yes" for packed in (False, True)]
        for name in OPTIMIZERS
    }
    assert {name: cells for name, *cells in rows} == said
