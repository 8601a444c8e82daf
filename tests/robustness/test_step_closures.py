"""``optimizer.step(closure)``: the same run as backward, observe and step in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_loops import EPOCHS, METHODS_MADE, PER_EPOCH, attached, batch, network, sgd, train
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain, Pruner

TOTAL = EPOCHS * PER_EPOCH


def closure_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, number: int, pruner: Pruner | None = None
) -> Callable[[], Tensor]:
    """As PyTorch's documentation writes it; with a pruner, it observes the loss itself."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(number)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if pruner is not None:
            pruner.observe(loss)
        return loss

    return closure


def trained(method: str, packed: bool, how: str) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    model = network()
    optimizer = sgd(model)
    pruner = attached(METHODS_MADE[method](), model, optimizer, packed=packed)
    if how == "without":
        train(model, pruner)
    else:
        for number in range(TOTAL):
            closure = closure_of(model, optimizer, number, pruner if how == "observes" else None)
            if number % 2:
                optimizer.step(closure)
            else:
                optimizer.step(closure=closure)
    pruner.finish()
    pruner.check_zeros()
    events = [{k: v for k, v in event.items() if "seconds" not in k} for event in pruner.events]
    return dict(model.state_dict()), events


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize("method", METHODS_MADE)
def test_it_is_the_same_run(method: str, packed: bool) -> None:
    plain, events = trained(method, packed, "without")
    weights, same_events = trained(method, packed, "observes" if packed else "returns its loss")
    assert weights.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(weights[name], value), name
    assert same_events == events


def test_gradients_of_several_batches_are_accumulated() -> None:
    """Lightning runs all but the last batch of a step outside of it."""
    results = []
    for with_closure in (False, True):
        model = network()
        optimizer = sgd(model)
        pruner = attached(ClickTrain(compression=3), model, optimizer)

        def one(number: int, model: nn.Module = model, pruner: Pruner = pruner) -> Tensor:
            loss = F.cross_entropy(model(batch(number)[0]), batch(number)[1])
            (loss / 2).backward()
            pruner.observe(loss)
            return loss

        for number in range(0, TOTAL, 2):
            one(number)
            if with_closure:
                optimizer.step(lambda number=number, one=one: one(number + 1))  # type: ignore[misc]
            else:
                one(number + 1)
                optimizer.step()
            optimizer.zero_grad()
        assert pruner.progress.seen == TOTAL
        pruner.finish()
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name


def test_two_optimizers_with_a_closure_each() -> None:
    model = network()
    head = list(model.head.parameters())
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    both = [torch.optim.SGD(body, lr=0.05), torch.optim.Adam(head, lr=1e-2)]
    pruner = attached(ClickTrain(compression=3), model, both)
    for number in range(TOTAL):
        for optimizer in both:
            optimizer.step(closure_of(model, both[0], number))
    assert pruner.progress.seen == TOTAL
    pruner.finish()
    pruner.check_zeros()


class SAM(torch.optim.Optimizer):
    """Sharpness-aware: gradients at the perturbed weights are what the closure computes."""

    def __init__(self, params: Any, base: Any, **settings: Any) -> None:
        super().__init__(params, dict(settings))
        self.base = base(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        old = [p.clone() for p in moved]
        for p in moved:
            p.add_(p.grad, alpha=0.05)
        with torch.enable_grad():
            closure()
        for p, was in zip(moved, old, strict=True):
            p.copy_(was)
        self.base.step()


@pytest.mark.parametrize("method", ["clicktrain", "rigl", "prunetrain"])
def test_a_closure_of_the_second_gradients(method: str) -> None:
    """The loop observes the first loss; the closure's is of the same batch."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05)
    pruner = attached(METHODS_MADE[method](), model, optimizer)
    for number in range(TOTAL):
        pruner.observe(closure_of(model, optimizer, number)())
        optimizer.step(closure_of(model, optimizer, number))
    assert pruner.progress.seen == TOTAL
    pruner.finish()
    pruner.check_zeros()


class Twice(torch.optim.SGD):
    """Calls its closure twice, as a line search does, and steps by the second gradients."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        return super().step(closure)


def test_the_first_call_counts_and_gradients_of_all_are_masked() -> None:
    model = network()
    optimizer = Twice(model.parameters(), lr=0.05, momentum=0.9)
    pruner = attached(ClickTrain(compression=3), model, optimizer)
    for number in range(TOTAL):
        frozen = pruner.frozen
        optimizer.step(closure_of(model, optimizer, number))
        assert not frozen or not model.body.weight.grad[~pruner.masks["body"]].any()
    assert pruner.progress.seen == TOTAL
    pruner.finish()


# ---------------------------------------------------------------- mistakes


def test_a_closure_that_raises_leaves_nothing_behind() -> None:
    model = network()
    optimizer = sgd(model)
    pruner = attached(ClickTrain(compression=3), model, optimizer)

    def broken() -> Tensor:
        raise OSError("the disk is gone")

    for _ in range(3):
        with pytest.raises(OSError, match="disk"):
            optimizer.step(broken)
    for number in range(TOTAL):
        optimizer.step(closure_of(model, optimizer, number))
    assert pruner.frozen
    pruner.finish()
    pruner.check_zeros()


def test_a_closure_that_says_nothing_is_a_step_without_observe() -> None:
    model = network()
    optimizer = sgd(model)
    attached(ClickTrain(compression=3), model, optimizer, epochs=20)

    def silent(number: int) -> None:
        F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()

    for number in range(16):
        optimizer.step(lambda number=number: silent(number))  # type: ignore[misc]
    with pytest.raises(UserError, match=r"16 steps without a call of pruner\.observe\(loss\)"):
        optimizer.step(lambda: silent(16))


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        ("0.5", "returned a str: return the loss"),
        (torch.ones(3), r"a scalar loss, not a tensor of shape \(3,\)"),
    ],
)
def test_a_closure_that_returns_no_loss(returned: Any, sentence: str) -> None:
    model = network()
    optimizer = sgd(model)
    attached(ClickTrain(compression=3), model, optimizer)
    with pytest.raises(UserError, match=sentence):
        optimizer.step(lambda: returned)


def test_a_closure_may_return_a_number() -> None:
    model = network()
    optimizer = sgd(model)
    pruner = attached(ClickTrain(compression=3), model, optimizer)
    optimizer.step(lambda: closure_of(model, optimizer, 0)().item())
    assert pruner.progress.seen == 1


class Deaf(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step()


def test_a_closure_that_is_never_called() -> None:
    model = network()
    optimizer = Deaf(model.parameters(), lr=0.05)
    attached(ClickTrain(compression=3), model, optimizer)
    with pytest.raises(UserError, match=r"Deaf\.step was given a closure and has not called it"):
        optimizer.step(closure_of(model, optimizer, 0))
