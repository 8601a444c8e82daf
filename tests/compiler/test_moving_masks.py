"""Masks that move under an accelerated network: steps are those of masked dense weights, code stays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.compiler import Accelerated, accelerate
from clicktrain.kernels import layouts
from clicktrain.kernels.native import library, toolchain
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.methods import DSR, GMP, MEST, GraNet, Pruner, RigL

pytestmark = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")

STEPS, CLASSES = 12, 4
METHODS: dict[str, Any] = {
    "rigl-kernel": RigL(sparsity=0.7, interval=2, granularity="kernel", densities="uniform"),
    "rigl-weight": RigL(sparsity=0.7, interval=3, densities="uniform", linear=False),
    "mest": MEST(sparsity=0.7, interval=3, growth="gradient", granularity="kernel"),
    "dsr": DSR(sparsity=0.7, interval=2, threshold=0.02, growth="gradient", granularity="kernel"),
    "granet": GraNet(sparsity=0.8, initial_sparsity=0.65, interval=2, granularity="kernel"),
    "gmp": GMP(sparsity=0.8, interval=2, start=0.0, stop=0.8, granularity="kernel"),
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.05),
}


class Net(nn.Module):
    """A stem, two convolutions of a block and a head: few kernels to build."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.one, self.between = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.two, self.after = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.after(self.two(F.relu(self.between(self.one(x))))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def batch(number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(6, 3, 8, 8, generator=generator, dtype=dtype), torch.arange(6) % CLASSES


class Run:
    """A method on a small residual network."""

    def __init__(self, method: Any, optimizer: str, packed: bool, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = Net().to(dtype)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.pruner: Pruner = method.attach(
            self.model, self.optimizer, epochs=3, steps_per_epoch=4, packed=packed
        )
        self.dtype = dtype
        self.forward: nn.Module = self.model
        self.collected: list[int] = []

    def accelerate(self, **options: Any) -> Run:
        x, _ = batch(0, self.dtype)
        self.forward = accelerate(self.model, x, rule="sparse", **options)
        assert isinstance(self.forward, Accelerated)
        return self

    def step(self, number: int, autocast: bool = False) -> float:
        if self.pruner.collecting:
            self.collected.append(number)
        x, y = batch(number, self.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(self.forward(x).float(), y)
        loss.backward()
        self.pruner.observe(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def weights(self) -> dict[str, Tensor]:
        layers = ((name, self.model.get_submodule(name)) for name in self.pruner.masks)
        return {name: layer.weight.detach() for name, layer in layers}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "optimizer"), [(key, "sgd") for key in METHODS] + [("rigl-kernel", "adamw"), ("dsr", "adamw")]
)
def test_steps_are_those_of_masked_dense_weights(key: str, optimizer: str) -> None:
    fast = Run(METHODS[key], optimizer, True, torch.float64)
    masked = Run(METHODS[key], optimizer, False, torch.float64)
    moves = 0
    for number in range(STEPS):
        if fast.pruner.moving and fast.forward is fast.model:
            fast.accelerate()
        before = fast.pruner.masks
        assert fast.step(number) == pytest.approx(masked.step(number), rel=1e-6)
        masks, expected = fast.pruner.masks, masked.pruner.masks
        assert all(torch.equal(masks[name], expected[name]) for name in expected)
        moves += any(not torch.equal(masks[name], before[name]) for name in before)
        ours, theirs = fast.weights(), masked.weights()
        for name in theirs:
            assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-9), name
    assert fast.forward is not fast.model
    assert moves >= 2
    assert bool(fast.collected) == (key not in ("gmp",))
    assert fast.pruner.frozen


def test_no_code_is_generated_traced_or_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = Run(METHODS["rigl-kernel"], "sgd", True, torch.float32).accelerate()
    fast.step(0)
    lowered = fast.forward._lowered
    known = {key: [one.run for one in every] for key, every in lowered.items()}
    monkeypatch.setattr(library, "build_all", lambda *_: pytest.fail("kernels are built again"))
    monkeypatch.setattr(Accelerated, "_lower", lambda *_: pytest.fail("it is lowered again"))
    steps = [m for m in lowered[next(iter(lowered))][0].run.steps.modules() if hasattr(m, "kernels")]
    plans = [step.kernels.arguments[1] for step in steps]
    structures = [step.structure for step in steps]
    for number in range(1, 9):
        fast.step(number)
    assert {key: [one.run for one in every] for key, every in fast.forward._lowered.items()} == known
    assert [step.kernels.arguments[1] for step in steps] == plans
    changed = [step.structure is not old for step, old in zip(steps, structures, strict=True)]
    assert changed == [isinstance(step.layer, PackedLayer) for step in steps]


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_gradients_of_all_weights(half: bool) -> None:
    """To the accuracy of the dtype, in the step before the first move."""
    fast = Run(METHODS["rigl-kernel"], "sgd", True, torch.float32)
    fast.accelerate(dtypes=("fp32", "bf16") if half else ("fp32",))
    masked = Run(METHODS["rigl-kernel"], "sgd", False, torch.float32)
    collected: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    fast.step(0, half)
    masked.step(0, half)
    fast.optimizer.register_step_pre_hook(lambda *_: look(fast, collected))
    masked.optimizer._optimizer_step_pre_hooks.clear()  # which zero those of pruned weights
    masked.optimizer.register_step_pre_hook(lambda *_: look(masked, gradients))
    fast.step(1, half)
    masked.step(1, half)
    assert fast.collected == [1]
    for name, expected in gradients.items():
        error = (collected[name] - expected).norm() / expected.norm()
        assert error < (0.1 if half else 1e-3), (name, float(error))


def look(run: Run, into: dict[str, Tensor]) -> None:
    for name in run.pruner.masks:
        grad = run.model.get_submodule(name).weight.grad
        assert isinstance(grad, Tensor)
        into[name] = grad.clone()


def test_a_layout_that_cannot_collect_leaves_it_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layouts.LAYOUTS, "blocked", replace(layouts.BLOCKED, images=None))
    fast = Run(METHODS["rigl-kernel"], "sgd", True, torch.float64).accelerate()
    masked = Run(METHODS["rigl-kernel"], "sgd", False, torch.float64)
    for number in range(5):
        fast.step(number)
        masked.step(number)
    assert fast.collected == [1, 3]
    masks, expected = fast.pruner.masks, masked.pruner.masks
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
