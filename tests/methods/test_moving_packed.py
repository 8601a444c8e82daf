"""Masks that move while layers are packed: the same run as with masked dense weights, step by step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from own_loop import PRUNED, Net, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.methods import DSR, GMP, MEST, GraNet, Pruner, RigL

# Kernels of a layer as small as these may be fewer than its filters.
pytestmark = pytest.mark.filterwarnings("ignore:.* lose their last nonzero weight")
ALL = (*PRUNED, "head")
BATCHES = 24
METHODS: dict[str, Any] = {
    "rigl": RigL(sparsity=0.7, interval=3),
    "rigl-kernel": RigL(sparsity=0.7, interval=4, granularity="kernel", densities="uniform"),
    "set": RigL(sparsity=0.7, interval=3, growth="random"),
    "mest": MEST(sparsity=0.7, interval=3),
    "mest-gradient": MEST(sparsity=0.7, interval=3, growth="gradient", gradient_weight=0.5, soft_bound=False),
    "dsr": DSR(sparsity=0.7, interval=2, threshold=0.02),
    "dsr-gradient-kernel": DSR(
        sparsity=0.7, interval=2, threshold=0.05, growth="gradient", granularity="kernel"
    ),
    "granet": GraNet(sparsity=0.8, interval=2),
    "granet-sparse": GraNet(sparsity=0.8, initial_sparsity=0.6, interval=3),
    "gmp": GMP(sparsity=0.8, interval=2, criterion="taylor"),
}
BEGINS = {"granet": 6, "gmp": 8}
"""Batch after which enough is zero for layers to be packed; the others are from the start."""
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.05),
}


class Run:
    """A method on the network of `own_loop`, in float64: no near ties."""

    def __init__(self, method: Any, optimizer: str = "sgd", packed: bool = True, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = Net().double()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.pruner: Pruner = method.attach(
            self.model, self.optimizer, epochs=6, steps_per_epoch=4, packed=packed
        )

    def train(self, stop: int = BATCHES, start: int = 0, **options: Any) -> Run:
        train(_Double(self.model), self.optimizer, self.pruner, stop, start=start, **options)
        return self

    @property
    def packed(self) -> list[str]:
        return [name for name, m in self.model.named_modules() if isinstance(m, PackedLayer)]

    def dense(self, name: str) -> Tensor:
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def states(self, name: str) -> dict[str, Tensor]:
        """What the optimizer keeps for a weight, dense, zero outside the mask."""
        layer = self.model.get_submodule(name)
        if isinstance(layer, PackedLayer):
            kept = self.optimizer.state[layer.values]
            flat = layer.structure.flat().long()
            full = {
                key: torch.zeros(layer.structure.numel, dtype=value.dtype).index_put((flat,), value)
                for key, value in kept.items()
                if isinstance(value, Tensor) and value.dim()
            }
            return {key: value.view(layer.structure.shape) for key, value in full.items()}
        kept = self.optimizer.state[layer.weight]
        return {key: value for key, value in kept.items() if isinstance(value, Tensor) and value.dim()}


class _Double(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x.double())
        return result


def same(one: Run, two: Run, tolerance: float = 1e-10) -> None:
    masks, others = one.pruner.masks, two.pruner.masks
    assert masks.keys() == others.keys()
    for name in masks:
        assert torch.equal(masks[name], others[name]), name
        assert torch.allclose(one.dense(name), two.dense(name), atol=tolerance, rtol=0), name
        states, expected = one.states(name), two.states(name)
        assert states.keys() == expected.keys()
        for key in states:
            assert torch.allclose(states[key], expected[key], atol=tolerance, rtol=0), (name, key)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("key", METHODS)
def test_every_step_is_that_of_masked_dense_weights(key: str, optimizer: str) -> None:
    packed, dense = Run(METHODS[key], optimizer), Run(METHODS[key], optimizer, packed=False)
    held = []
    for done in range(1, BATCHES + 1):
        held.append(packed.packed)
        for run in (packed, dense):
            run.train(done, done - 1)
        same(packed, dense)
        assert packed.pruner.stage == dense.pruner.stage
    first = next(number for number, names in enumerate(held) if names)
    assert first == BEGINS.get(key, 0)
    assert set(held[first]) == set(held[-1]) == set(ALL)  # frozen or not
    moves = [e for e in packed.pruner.events if e["event"] in ("regrown", "dropped")]
    assert moves == [e for e in dense.pruner.events if e["event"] in ("regrown", "dropped")]
    assert len([e for e in moves if e["step"] > first]) >= 2
    packed.pruner.finish()
    dense.pruner.finish()
    assert not packed.packed
    same(packed, dense)


@pytest.mark.parametrize("key", ["rigl", "set", "mest", "dsr"])
def test_parameters_stay_while_their_number_does(key: str) -> None:
    run = Run(METHODS[key])
    layers = [run.model.get_submodule(name) for name in ALL]
    values = [layer.values for layer in layers]
    structures = [layer.structure for layer in layers]
    revision = run.pruner.revision
    run.train(17)
    assert [layer.structure is old for layer, old in zip(layers, structures, strict=True)].count(False) >= 3
    constant = key in ("rigl", "set")
    assert (run.pruner.revision == revision) == constant
    assert all(layer.values is value for layer, value in zip(layers, values, strict=True)) == constant
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}
    moved = [layer.structure for layer in layers]
    run.train(24, 17)
    assert run.pruner.frozen
    last = [layer.structure for layer in layers]
    if key in ("rigl", "set"):  # freezing them moves nothing
        assert all(one is other for one, other in zip(moved, last, strict=True))


@pytest.mark.parametrize("key", ["rigl", "mest-gradient", "dsr-gradient-kernel", "mest", "set", "gmp"])
def test_all_gradients_are_computed_for_updates_alone(key: str) -> None:
    run = Run(METHODS[key])
    collected = []

    def look(model: nn.Module, inputs: Any) -> None:
        if model.training:
            collected.append(run.pruner.collecting)

    run.model.register_forward_pre_hook(look)
    run.train()
    updates = {e["step"] for e in run.pruner.events if e["event"] == "regrown"}
    wanted = {number for number, one in enumerate(collected, start=1) if one}
    grows = key in ("rigl", "mest-gradient", "dsr-gradient-kernel")
    if grows:
        assert updates <= wanted
        assert len(wanted) <= len(updates) + 1  # mest moves once more before it freezes
    else:
        assert not wanted
    assert all(
        layer.dense_gradient is None for layer in run.model.modules() if isinstance(layer, PackedLayer)
    )


@pytest.mark.parametrize("key", ["rigl", "mest-gradient"])
def test_gradients_of_accumulated_batches(key: str) -> None:
    packed, dense = Run(METHODS[key]), Run(METHODS[key], packed=False)
    for run in (packed, dense):
        run.train(accumulate=2)
    same(packed, dense)
    steps = [e["step"] for e in packed.pruner.events if e["event"] == "regrown"]
    assert len(steps) >= 4
    assert all(step % 2 == 0 for step in steps)


@pytest.mark.parametrize("unscale", [False, True])
def test_gradients_with_a_mixed_precision_scale(unscale: bool) -> None:
    method = METHODS["mest-gradient"]  # adds |gradient| to |weight|
    packed, dense = Run(method), Run(method, packed=False)
    for run in (packed, dense):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        run.train(scaler=scaler, unscale=unscale)
    same(packed, dense)


@pytest.mark.parametrize("key", ["rigl-kernel", "mest-gradient", "dsr-gradient-kernel", "granet"])
def test_going_on_at_any_moment_is_the_same_run(key: str) -> None:
    whole = Run(METHODS[key], "adamw").train()
    for stop in (4, 7, 13):
        first = Run(METHODS[key], "adamw").train(stop)
        saved = copy.deepcopy(
            (first.pruner.state_dict(), first.model.state_dict(), first.optimizer.state_dict())
        )
        second = Run(METHODS[key], "adamw", seed=stop)
        second.pruner.load_state_dict(saved[0])
        second.model.load_state_dict(saved[1])
        second.optimizer.load_state_dict(saved[2])
        same(first, second, 0.0)
        same(second.train(start=stop), whole, 0.0)


def test_a_state_of_masked_dense_weights_is_gone_on_with_as_such() -> None:
    first = Run(METHODS["rigl"], packed=False).train(7)
    second = Run(METHODS["rigl"])
    saved = copy.deepcopy((first.pruner.state_dict(), first.model.state_dict(), first.optimizer.state_dict()))
    second.pruner.load_state_dict(saved[0])
    assert not second.packed
    second.model.load_state_dict(saved[1])
    second.optimizer.load_state_dict(saved[2])
    second.train(start=7)
    same(second, first.train(start=7))
    assert set(second.packed) == set(ALL)  # from the next move on


def test_an_average_moves_along() -> None:
    run = Run(METHODS["rigl"])
    average = AveragedModel(run.model, avg_fn=lambda a, b, n: 0.5 * a + 0.5 * b)
    expected = {name: run.dense(name).clone() for name in ALL}
    for done in range(1, BATCHES + 1):
        run.train(done, done - 1)
        average.update_parameters(run.model)
        for name in ALL:
            mask = run.pruner.masks[name]
            expected[name] = (expected[name] * mask if done > 1 else run.dense(name)) * 1.0
            expected[name] = 0.5 * expected[name] + 0.5 * run.dense(name) if done > 1 else expected[name]
            copied = average.module.get_submodule(name)
            assert isinstance(copied, PackedLayer)
            assert torch.allclose(copied.dense_weight(), expected[name], atol=1e-12)
    run.pruner.finish()
    assert not any(isinstance(module, PackedLayer) for module in average.modules())


def test_an_average_that_was_made_before_catches_up() -> None:
    torch.manual_seed(0)
    model = Net().double()
    average = AveragedModel(model)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = METHODS["rigl"].attach(model, optimizer, epochs=6, steps_per_epoch=4, packed=True)
    pruner.follow(average)
    train(_Double(model), optimizer, pruner, 7)
    average.update_parameters(model)
    late = copy.deepcopy(model)
    train(_Double(model), optimizer, pruner, 11, start=7)
    pruner.follow(late)
    for name in ALL:
        own = model.get_submodule(name)
        for other in (average.module, late):
            twin = other.get_submodule(name)
            assert isinstance(twin, PackedLayer)
            assert torch.equal(twin.structure.mask(), own.structure.mask())


def test_a_finished_network_may_stay_packed() -> None:
    run = Run(METHODS["rigl-kernel"]).train()
    expected = {name: run.dense(name).clone() for name in ALL}
    run.pruner.finish(packed=True)
    for name in ALL:
        layer = run.model.get_submodule(name)
        assert isinstance(layer, PackedLayer)
        assert layer.structure.patterns is None
        assert torch.equal(layer.dense_weight(), expected[name])
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}


def test_what_cannot_be_packed_moves_masked(recwarn: pytest.WarningsRecorder) -> None:
    """A linear layer with a hook on its weight; the others are packed."""
    runs = []
    for packed in (True, False):
        torch.manual_seed(0)
        model = Net().double()
        model.head.weight.register_hook(lambda g: g)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        run = Run.__new__(Run)
        run.model, run.optimizer = model, optimizer
        run.pruner = METHODS["rigl"].attach(model, optimizer, epochs=6, steps_per_epoch=4, packed=packed)
        runs.append(run.train())
    assert set(runs[0].packed) == set(PRUNED)
    assert any("head trains masked and dense" in str(w.message) for w in recwarn)
    same(*runs)
