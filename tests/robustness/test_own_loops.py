"""Loops of other people: what is right works, what is not is reported in one sentence, soon."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_loops import EPOCHS, METHODS_MADE, PER_EPOCH, Net, attached, batch, network, sgd, train
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

import clicktrain
from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d.module import PackedConv2d
from clicktrain.methods import ClickTrain, PaT, Pruner, PruneTrain

TOTAL = EPOCHS * PER_EPOCH


def started(
    method: Any = None, *, model: Net | None = None, **more: Any
) -> tuple[Net, torch.optim.Optimizer, Pruner]:
    model = network() if model is None else model
    optimizer = sgd(model)
    return model, optimizer, attached(method or ClickTrain(compression=3), model, optimizer, **more)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6, msg=name)


def refused_at(act: Callable[[int], Any], most: int) -> tuple[int, str]:
    """At what number a loop is refused, and with what sentence."""
    for number in range(most):
        try:
            act(number)
        except UserError as error:
            return number, str(error)
    raise AssertionError("the loop was never refused")


# ---------------------------------------------------------------- several optimizers


def parts(model: Net) -> list[torch.optim.Optimizer]:
    head = [model.head.weight, model.head.bias]
    body = [p for p in model.parameters() if all(p is not q for q in head)]
    return [torch.optim.SGD(body, lr=0.05, momentum=0.9), torch.optim.Adam(head, lr=1e-2)]


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize("method", METHODS_MADE)
def test_backbone_and_head(method: str, packed: bool) -> None:
    model = network()
    both = parts(model)
    pruner = attached(METHODS_MADE[method](), model, both, packed=packed)

    def check(number: int) -> None:
        held = [p for o in both for g in o.param_groups for p in g["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}
        if number == TOTAL - 2:
            last.append(model.head.weight.detach().clone())

    last: list[Tensor] = []
    train(model, pruner, both, after_step=check)
    assert not torch.equal(last[0], model.head.weight), "the head is trained to the end"
    pruner.finish()
    pruner.check_zeros()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_prunable_weights_in_two_optimizers(order: tuple[int, int]) -> None:
    """One round is one step of each; the same as one optimizer with both groups, in whatever order."""
    results = []
    for two in (False, True):
        model = network()
        groups = [[*model.stem.parameters(), *model.body.parameters()], [
            p for n, p in model.named_parameters() if not n.startswith(("stem", "body"))
        ]]  # fmt: skip
        made = [torch.optim.SGD(group, lr=0.05, momentum=0.9) for group in groups]
        if not two:
            made = [torch.optim.SGD([{"params": group} for group in groups], lr=0.05, momentum=0.9)]
        method = ClickTrain(compression=3, preset="paper", penalty="lasso")
        pruner = attached(method, model, made)
        train(model, pruner, [made[i] for i in order] if two else made)
        assert pruner.frozen
        pruner.check_zeros()
        results.append(weights(pruner.finish()))
    assert_same(*results)


def test_optimizers_that_take_turns_are_refused() -> None:
    model = network()
    first = torch.optim.SGD([*model.body.parameters()], lr=0.05)
    second = torch.optim.SGD([*model.point.parameters()], lr=0.05)
    pruner = attached(ClickTrain(compression=3), model, [first, second], epochs=20)
    number, sentence = refused_at(
        lambda n: train(model, pruner, [first, second][n % 2], batches=range(n, n + 1)), 20
    )
    assert number < 12
    assert "do not step together" in sentence
    alone = network(1)
    pruner = attached(ClickTrain(compression=3), alone, sgd(alone))  # one method for each network works
    train(alone, pruner)


def test_a_head_may_step_more_often() -> None:
    model = network()
    both = parts(model)
    pruner = attached(ClickTrain(compression=3), model, both)
    train(model, pruner, [both[1], both[0], both[1]])
    assert pruner.frozen
    pruner.finish()


# ---------------------------------------------------------------- parameters that others train


@pytest.mark.parametrize(
    "method", [PaT(policy="epoch", prune_epoch=1, prune_ratio=0.4), PruneTrain(coefficient=0.05, interval=1)]
)
def test_a_parameter_that_another_optimizer_trains_is_not_orphaned(method: Any) -> None:
    model = network()
    first, second = parts(model)
    pruner = attached(method, model, first)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"head\.weight is trained by an optimizer that attach was not given"):
        train(model, pruner, [first, second])
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before


class ThroughData(torch.optim.Optimizer):
    """Writes as optimizers did before PyTorch 0.4: version counters do not see it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.01})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad.data, alpha=-group["lr"])


def test_not_even_if_it_writes_through_data() -> None:
    model = network()
    first, second = parts(model)
    other = ThroughData(second.param_groups[0]["params"])
    pruner = attached(PaT(policy="epoch", prune_epoch=1, prune_ratio=0.4), model, first)
    with pytest.raises(UserError, match=r"attach\(model, \[first, second\], \.\.\.\)"):
        train(model, pruner, [first, other])


def test_parameters_that_nobody_trains_are_no_orphans() -> None:
    """A frozen head loses its inputs with the channels before it."""
    model = network()
    first, _ = parts(model)
    pruner = attached(PaT(policy="epoch", prune_epoch=1, prune_ratio=0.4), model, first)
    train(model, pruner, first)
    assert pruner.plans
    model = network()
    pruner = attached(PaT(policy="epoch", prune_epoch=1, prune_ratio=0.4), model, first := parts(model)[0])
    model.load_state_dict(network(3).state_dict())  # moves the head once
    train(model, pruner, first)
    assert pruner.plans


def test_masks_alone_need_no_second_optimizer() -> None:
    model = network()
    both = parts(model)
    pruner = attached(ClickTrain(compression=3), model, both[0], packed=True)
    train(model, pruner, both)
    pruner.finish()


# ---------------------------------------------------------------- misuse


def test_observe_without_a_step() -> None:
    model, _, pruner = started(epochs=60)

    def act(number: int) -> None:
        F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
        pruner.observe(torch.tensor(1.0))

    number, sentence = refused_at(act, 240)
    assert number <= 64
    assert re.search(r"observe was called \d+ times without a step of the attached SGD", sentence)


def test_an_epoch_of_gradients_may_be_accumulated() -> None:
    model, optimizer, pruner = started(epochs=4, steps_per_epoch=80)
    for number in range(320):
        loss = F.cross_entropy(model(batch(number)[0]), batch(number)[1])
        (loss / 80).backward()
        pruner.observe(loss)
        if number % 80 == 79:
            optimizer.step()
            optimizer.zero_grad()
    pruner.finish()


def test_a_step_without_observe() -> None:
    model, optimizer, _ = started()

    def act(number: int) -> None:
        F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
        optimizer.step()

    number, sentence = refused_at(act, 100)
    assert number == 16
    assert "16 steps without a call of pruner.observe(loss)" in sentence


@pytest.mark.parametrize("how", ["deepcopy", "other optimizer"])
def test_a_copy_is_trained(how: str) -> None:
    model, optimizer, pruner = started(epochs=40)
    trained = copy.deepcopy(model) if how == "deepcopy" else model
    stepped = optimizer if how == "deepcopy" else sgd(trained)
    number, sentence = refused_at(lambda n: train(trained, pruner, stepped, batches=range(n, n + 1)), 40)
    assert number <= 8
    assert re.search(
        "no gradient in any layer|weights change from batch to batch, but the attached", sentence
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite(value: float) -> None:
    model, optimizer, pruner = started(epochs=40)
    for number in range(160):
        F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
        odd = number >= 20 or number % 3 == 0  # single ones, then all
        if number == 34 + 1:
            with pytest.raises(UserError, match="the last 16 losses were not finite numbers"):
                pruner.observe(torch.tensor(value))
            break
        pruner.observe(torch.tensor(value if odd else 1.0))
        optimizer.step()
        optimizer.zero_grad()
    assert pruner.progress.epoch_losses[:4] == [1.0 - 0.25 * 1.0, 1, 1, 1], (
        "a loss that is not finite counts as the last"
    )


def test_weights_that_have_become_nan_are_no_collapse() -> None:
    model = network()
    pruner = attached(METHODS_MADE["rigl"](), model, sgd(model), epochs=40)  # masks from the first batch on
    train(model, pruner, batches=range(5))
    with torch.no_grad():
        model.stem.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="the last 16 losses were not finite numbers"):
        train(model, pruner, batches=range(5, 40))


@pytest.mark.parametrize("overflows", [False, True])
def test_a_loss_scaler_that_skips_steps(overflows: bool) -> None:
    """Gradients that overflow cost a few steps at the beginning."""
    model, optimizer, pruner = started()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for number in range(TOTAL):
        loss = F.cross_entropy(model(batch(number)[0]), batch(number)[1])
        scaler.scale(loss).backward()
        if overflows and number < 5:
            model.body.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        pruner.observe(loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (scaler.get_scale() < 2.0**20) == overflows
    assert pruner.frozen
    pruner.finish()
    pruner.check_zeros()


@pytest.mark.parametrize("odd", [1.0, None, "0.5", [1.0]])
def test_no_tensor_is_no_loss(odd: Any) -> None:
    _, _, pruner = started()
    with pytest.raises(UserError, match="observe takes the loss as a tensor"):
        pruner.observe(odd)


def replace(model: Net) -> None:
    model.body = nn.Conv2d(8, 8, 3, padding=1)


def replace_weight(model: Net) -> None:
    model.body.weight = nn.Parameter(torch.zeros_like(model.body.weight))


def parametrize(model: Net) -> None:
    parametrizations.weight_norm(model.body)


@pytest.mark.parametrize("change", [replace, replace_weight, parametrize])
@pytest.mark.parametrize("after", [0, 3, 20])
def test_a_layer_is_replaced(after: int, change: Callable[[Net], None]) -> None:
    model, _, pruner = started()
    train(model, pruner, batches=range(after))
    change(model)
    with pytest.raises(UserError, match="the layer body, or its weight, was replaced"):
        train(model, pruner, batches=range(after, after + 1))


def test_the_network_is_cast_or_moved() -> None:
    model, _, pruner = started()
    model.double()  # before the first batch it does no harm
    pruner.observe(torch.tensor(1.0))
    model.bfloat16()
    with pytest.raises(
        UserError, match="was float64 on cpu when its pruning began and is bfloat16 on cpu now"
    ):
        pruner.observe(torch.tensor(1.0))
    model, _, pruner = started(METHODS_MADE["rigl"]())
    model.to("meta")
    with pytest.raises(UserError, match="and is float32 on meta now"):
        pruner.observe(torch.tensor(1.0))


def test_attaching_twice() -> None:
    model, optimizer, pruner = started()
    for again in (
        lambda: attached(PaT(), model, optimizer),
        lambda: attached(PaT(), model, sgd(model)),
        lambda: attached(PaT(), nn.Sequential(model), sgd(model)),
        lambda: attached(PaT(), network(), optimizer),
    ):
        with pytest.raises(UserError, match=r"has the method clicktrain attached already: call finish\(\)"):
            again()
    train(model, pruner)
    pruner.finish()
    second = attached(ClickTrain(compression=3), model, optimizer)
    second.close()
    attached(ClickTrain(compression=3), model, optimizer)
    fresh = network()
    with pytest.raises(UserError, match="cannot be met"):
        attached(ClickTrain(compression=1e6), fresh, sgd(fresh))
    attached(ClickTrain(compression=3), fresh, sgd(fresh))  # what was refused is not attached


def test_a_loop_that_failed_may_be_run_again_on_its_network() -> None:
    model = network()

    def loop(fails: bool) -> None:
        optimizer = sgd(model)
        pruner = attached(ClickTrain(compression=3), model, optimizer)
        train(model, pruner, batches=range(3))
        if fails:
            raise ValueError("a mistake in the loop")
        pruner.close()

    with pytest.raises(ValueError, match="a mistake"):
        loop(fails=True)
    loop(fails=False)


@pytest.mark.parametrize("method", METHODS_MADE)
def test_a_packed_network_is_refused(method: str) -> None:
    model = network()
    pruner = attached(ClickTrain(compression=3), model, sgd(model))
    train(model, pruner)
    packed = pruner.finish(packed=True)
    if method == "dense":
        attached(METHODS_MADE[method](), packed, sgd(packed)).close()
    else:
        with pytest.raises(UserError, match=r"^body is packed already: .*clicktrain\.unpack\(model\)"):
            attached(METHODS_MADE[method](), packed, sgd(packed))
        plain = clicktrain.unpack(packed)
        attached(METHODS_MADE[method](), plain, sgd(plain)).close()


def test_after_the_end() -> None:
    model, _, pruner = started()
    train(model, pruner)
    assert pruner.finish() is model
    with pytest.raises(UserError, match=r"observe was called after finish\(\)"):
        pruner.observe(torch.tensor(1.0))
    with pytest.warns(UserWarning, match="finish was called twice"):
        assert pruner.finish() is model


def test_a_loop_of_another_length() -> None:
    model, _, pruner = started(epochs=3)
    with pytest.warns(UserWarning, match=r"the loop runs longer than attach expects \(epochs=3"):
        train(model, pruner)
    pruner.finish()
    model, _, pruner = started(epochs=20)
    train(model, pruner)
    with pytest.warns(
        UserWarning, match=r"the loop ended after 6 of the 20 epochs .* without training after"
    ):
        pruner.finish()
    assert pruner.density < 0.5


@pytest.mark.parametrize("odd", [0, -1, 1.5, "8", None, float("nan"), True])
def test_a_length_that_cannot_be(odd: Any) -> None:
    for lengths in ({"epochs": odd}, {"steps_per_epoch": odd}):
        with pytest.raises(UserError, match=r"at least 1 epoch of 1 batch|a whole number is needed"):
            started(**lengths)


# ---------------------------------------------------------------- dense weights after the hard prune


def test_dense_weights_loaded_into_a_masked_network() -> None:
    model, _, pruner = started()
    train(model, pruner, batches=range(20))
    assert pruner.frozen
    density = pruner.density
    model.load_state_dict(network(5).state_dict())
    assert pruner.density == 1, "the density is that of the weights"
    with pytest.warns(
        UserWarning, match="pruned weights of body, point were no longer zero and are cut again"
    ):
        train(model, pruner, batches=range(20, 22))
    assert pruner.density == density
    train(model, pruner, batches=range(22, TOTAL))
    pruner.finish()
    pruner.check_zeros()


def test_dense_weights_loaded_before_finish() -> None:
    model, _, pruner = started()
    train(model, pruner)
    model.load_state_dict(network(5).state_dict())
    with pytest.warns(UserWarning, match="pruned weights of body, point were no longer zero"):
        pruner.finish()
    pruner.check_zeros()
    alive = sum(int((m.weight != 0).sum()) for m in (model.stem, model.body, model.point))
    assert alive == pruner.nonzero_conv_weights


def test_an_optimizer_made_after_the_hard_prune() -> None:
    for observes in (True, False):
        model, _, pruner = started(epochs=12)
        train(model, pruner, batches=range(38))
        assert pruner.frozen
        density = pruner.density
        other = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if observes:
            act = functools.partial(train, model, pruner, other)
            number, sentence = refused_at(lambda n: act(batches=range(38 + n, 39 + n)), 10)  # noqa: B023
            assert "the attached SGD takes no step" in sentence
        else:
            for number in range(38, 48):
                F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
                other.step()
        assert pruner.density > density
        with pytest.warns(UserWarning, match="were no longer zero and are cut again"):
            pruner.finish()
        assert pruner.density == density
        pruner.check_zeros()


def test_weights_loaded_into_packed_layers() -> None:
    model, _, pruner = started(packed=True)
    masked, _, other = started()
    train(model, pruner, batches=range(20))
    train(masked, other, batches=range(20))
    assert isinstance(model.body, PackedConv2d)
    model.load_state_dict(masked.state_dict())  # dense tensors with zeros in the same places
    x = batch(0)[0]
    torch.testing.assert_close(model.eval()(x), masked.eval()(x))
    model.train()
    with pytest.raises(RuntimeError, match="body: these weights are not zero where this packed layer has no"):
        model.load_state_dict(network(5).state_dict())
    with pytest.raises(RuntimeError, match=r"body: a weight of shape \(16, 16, 3, 3\) does not fit"):
        model.load_state_dict(Net(width=16).state_dict())
    train(model, pruner, batches=range(20, TOTAL))
    pruner.finish()


def test_an_optimizer_state_of_another_moment() -> None:
    """Saved before the hard prune it has other shapes than after packing; nothing is changed."""
    model, optimizer, pruner = started(packed=True)
    train(model, pruner, batches=range(2))
    early = copy.deepcopy(optimizer.state_dict())
    train(model, pruner, batches=range(2, 20))
    now = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError, match="this state of SGD does not fit: momentum_buffer has shape"):
        optimizer.load_state_dict(early)
    assert str(optimizer.state_dict()) == str(now)
    model, optimizer, pruner = started()
    train(model, pruner, batches=range(20))
    optimizer.load_state_dict(early)  # of the same shapes: momentum of what is pruned goes
    pruner.check_zeros()
    train(model, pruner, batches=range(20, TOTAL))
    pruner.finish()


# ---------------------------------------------------------------- copies and files


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize("given", [False, True], ids=["no example", "example"])
@pytest.mark.parametrize("method", ["clicktrain", "prunetrain", "pat", "rigl", "campfire"])
def test_models_are_copied_and_saved_at_every_stage(method: str, given: bool, packed: bool) -> None:
    model = network()
    more = {} if given else {"example": None}
    pruner = attached(METHODS_MADE[method](), model, sgd(model), packed=packed, **more)

    def check(number: int) -> None:
        if number not in (0, 5, 12, 20, 23):
            return
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        same = [
            torch.load(file, weights_only=False),
            pickle.loads(pickle.dumps(model)),
            copy.deepcopy(model),
        ]
        x = batch(99)[0]
        events = len(pruner.events)
        for other in same:
            torch.testing.assert_close(other(x), copy.deepcopy(model)(x), rtol=0, atol=0)
            train_alone(other)
        assert len(pruner.events) == events, "what copies do is theirs"

    train(model, pruner, after_step=check)
    pruner.finish()


def train_alone(model: nn.Module) -> None:
    optimizer = sgd(model)
    loss = F.cross_entropy(model(batch(0)[0]), batch(0)[1])
    loss.backward()
    optimizer.step()


def test_a_copy_of_the_optimizer_has_no_hooks() -> None:
    model, optimizer, pruner = started()
    train(model, pruner, batches=range(2))
    other = copy.deepcopy(optimizer)
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    other.step()
    optimizer.load_state_dict(state)
    train(model, pruner, batches=range(2, TOTAL))
    assert pruner.frozen
    pruner.check_zeros()


# ---------------------------------------------------------------- how gradients come about


def one_forward(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def several_forwards(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number)
    loss = (F.cross_entropy(model(x[:4]), y[:4]) + F.cross_entropy(model(x[4:]), y[4:])) / 2
    loss.backward()
    return loss


def evaluates_in_between(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number)
    loss = F.cross_entropy(model(x), y)
    model.eval()
    with torch.no_grad():
        model(batch(number + 1)[0])
    model(batch(number + 2)[0])  # nor does one whose graph is thrown away matter
    model.train()
    loss.backward()
    return loss


def backward_twice(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number)
    loss = F.cross_entropy(model(x), y)
    (loss / 2).backward(retain_graph=True)
    (loss / 2).backward()
    return loss


def gradients_by_hand(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number)
    loss = F.cross_entropy(model(x), y)
    parameters = list(model.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.grad = gradient
    return loss


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "accelerated"])
@pytest.mark.parametrize(
    "backward", [several_forwards, evaluates_in_between, backward_twice, gradients_by_hand]
)
def test_gradients_are_right_however_they_come_about(
    backward: Callable[[nn.Module, int], Tensor], fast: bool, packed: bool
) -> None:
    """After the hard prune, on packed layers and on fast operators: those of a plain, masked network."""
    if fast and not packed:
        pytest.skip("what is accelerated is the packed network")
    model, optimizer, pruner = started(packed=packed)
    train(model, pruner, batches=range(20))
    assert pruner.frozen
    plain = clicktrain.unpack(model)
    network_used: Any = clicktrain.accelerate(model, batch(0)[0]) if fast else model
    for number in range(20, TOTAL):
        optimizer.zero_grad()
        plain.zero_grad()
        plain.load_state_dict(clicktrain.unpack(model).state_dict())
        loss = backward(network_used, number)
        backward(plain, number)
        for name, parameter in model.named_parameters():
            layer = model.get_submodule(name.rpartition(".")[0])
            gradient = parameter.grad
            assert gradient is not None
            dense = plain.get_parameter(name.replace(".values", ".weight")).grad
            assert dense is not None
            if isinstance(layer, PackedConv2d) and name.endswith("values"):
                dense = dense[layer.structure.mask()].reshape(gradient.shape)
            torch.testing.assert_close(gradient, dense, rtol=1e-4, atol=1e-6, msg=name)
        pruner.observe(loss)
        optimizer.step()
    pruner.finish()


# ---------------------------------------------------------------- what else loops do


@pytest.mark.parametrize("method", ["clicktrain", "pat", "prunetrain", "rigl"])
@pytest.mark.parametrize(
    "kind", ["accumulate", "clip", "keep zeros", "one cycle", "lambda", "plateau", "late group"]
)
def test_what_loops_do(kind: str, method: str) -> None:
    model = network()
    trained = [p for n, p in model.named_parameters() if kind != "late group" or not n.startswith("head")]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    pruner = attached(METHODS_MADE[method](), model, optimizer)
    schedulers: dict[str, Any] = {
        "one cycle": lambda: OneCycleLR(optimizer, 0.1, TOTAL),
        "lambda": lambda: LambdaLR(optimizer, lambda step: 0.9**step),
        "plateau": lambda: ReduceLROnPlateau(optimizer, patience=1),
    }
    scheduler = schedulers[kind]() if kind in schedulers else None
    for number in range(TOTAL):
        x, y = batch(number)
        loss = F.cross_entropy(model(x), y)
        (loss / 2 if kind == "accumulate" else loss).backward()
        pruner.observe(loss)
        if kind == "clip":
            clip_grad_norm_(model.parameters(), 0.1)
        if kind != "accumulate" or number % 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=kind != "keep zeros")
        if scheduler is not None:
            scheduler.step(*([loss.item()] if kind == "plateau" else []))
        if kind == "late group" and number == 2:
            optimizer.add_param_group({"params": list(model.head.parameters()), "lr": 0.01})
        if number == TOTAL // 2:
            middle = model.head.weight.detach().clone()
    pruner.finish()
    pruner.check_zeros()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert middle.shape != model.head.weight.shape or not torch.equal(middle, model.head.weight)
    assert pruner.frozen or pruner.plans or method == "prunetrain"
