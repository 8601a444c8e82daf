"""A recorded training step computes what the loop as written does, and says why where it is not recorded."""

from __future__ import annotations

import copy
import functools
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operator_tape import OperatorTape
from torch import Tensor, nn

from clicktrain.compiler import RecordedStep
from clicktrain.formats.packed import Structure
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.kernels.sparse_conv2d import PackedConv2d

MASK = torch.rand(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4


class Network(nn.Module):
    """Two of its parameters have the very same gradient, and one has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Conv2d(4, 6, 3)
        self.left, self.right = (nn.Parameter(torch.zeros(6)) for _ in range(2))
        self.unused = nn.Parameter(torch.zeros(3))
        self.times = 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.drop(self.norm(self.first(x)).relu()))
        return x.mean((2, 3)) * self.times + self.left + self.right


class Loop:
    """A model, its optimizer and what is called for its gradients."""

    def __init__(self, recorded: bool, model: nn.Module, **settings: Any) -> None:
        self.model, self.calls = model, 0
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.recorded = RecordedStep(self.loss, model, recorder=OperatorTape(), **settings)
        self.run: Callable[..., tuple[Tensor, ...]] = self.recorded if recorded else self.plain

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        output = self.model(x)
        return F.cross_entropy(output, y), (output.argmax(1) == y).sum()

    def plain(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        results = self.loss(x, y)
        results[0].backward()  # type: ignore[no-untyped-call]
        return tuple(one.detach() for one in results)

    def step(self, seed: int, images: int = 4, zero: Callable[[], None] | None = None) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        x, y = torch.randn(images, 2, 5, 5), torch.randint(6, (images,))
        results = self.run(x, y)
        self.optimizer.step()
        (zero or self.optimizer.zero_grad)()
        return results


def loops() -> tuple[Loop, Loop]:
    torch.manual_seed(0)
    model = Network()
    return Loop(True, model), Loop(False, copy.deepcopy(model))


def alike(mine: Loop, plain: Loop) -> None:
    for (name, one), other in zip(
        mine.model.state_dict().items(), plain.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


def test_replays_are_the_step_as_written() -> None:
    mine, plain = loops()
    for seed in range(6):
        torch.testing.assert_close(mine.step(seed), plain.step(seed))
        alike(mine, plain)
    assert mine.recorded.replays == 5
    assert mine.calls == 3, "once as written, once to warm up, once to be recorded"
    assert mine.model.get_parameter("unused").grad is None


def test_batches_of_other_shapes_and_modes_have_recordings_of_their_own() -> None:
    mine, plain = loops()
    for epoch in range(3):
        for images in (4, 4, 4, 3):
            torch.testing.assert_close(mine.step(images, images), plain.step(images, images))
        for one in (mine, plain):
            one.model.train(epoch != 0)
    alike(mine, plain)
    assert 4 <= mine.recorded.replays < 12


def test_gradients_are_added_to_what_is_there() -> None:
    mine, plain = loops()
    for seed in range(5):
        for one in (mine, plain):
            torch.manual_seed(seed)
            one.run(torch.randn(4, 2, 5, 5), torch.randint(6, (4,)))
            zero = functools.partial(one.optimizer.zero_grad, set_to_none=seed % 2 == 0)
            one.step(seed + 100, zero=zero)
        alike(mine, plain)
    assert mine.recorded.replays == 9


def test_what_changes_is_recorded_again() -> None:
    mine, plain = loops()

    def both(change: Callable[[Any], object]) -> None:
        for _ in range(3):
            torch.testing.assert_close(mine.step(1), plain.step(1))
        before = mine.recorded.replays
        for one in (mine, plain):
            change(one.model)
        for _ in range(3):
            torch.testing.assert_close(mine.step(2), plain.step(2))
        alike(mine, plain)
        assert mine.recorded.replays == before + 2, "seen once as it is now, then recorded"

    both(lambda model: setattr(model, "times", 3))
    both(lambda model: model.first.weight.requires_grad_(False))
    both(lambda model: setattr(model.norm, "eps", 0.5))
    both(lambda model: model.drop.eval())
    both(lambda model: setattr(model, "drop", nn.Identity()))


def test_packed_layers_whose_positions_move() -> None:
    torch.manual_seed(0)
    models = [Network(), Network()]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        pack_model_(model, {"second": MASK})
    mine, plain = (Loop(not place, model) for place, model in enumerate(models))
    for mask in (MASK, MASK.flip(0), MASK.flip(1)):
        for one in (mine, plain):
            layer = one.model.second
            assert isinstance(layer, PackedConv2d)
            layer.move_(Structure.from_mask(mask))
        for seed in range(3):
            torch.testing.assert_close(mine.step(seed), plain.step(seed))
        alike(mine, plain)
    assert mine.recorded.replays == 6


def test_a_scaled_loss_scales_gradients_alone() -> None:
    mine, _ = loops()
    scaled = RecordedStep(mine.loss, mine.model, scale=lambda loss: 8 * loss, recorder=OperatorTape())
    mine.model.eval()
    x, y = torch.randn(4, 2, 5, 5), torch.randint(6, (4,))
    loss, _ = mine.plain(x, y)
    assert mine.model.left.grad is not None
    expected = 8 * mine.model.left.grad  # type: ignore[operator]
    for _ in range(3):
        mine.optimizer.zero_grad()
        torch.testing.assert_close(scaled(x, y)[0], loss)
        torch.testing.assert_close(mine.model.left.grad, expected)
    assert scaled.replays == 2


def _hooked(loop: Loop) -> None:
    loop.model.norm.register_forward_hook(lambda *_: None)  # type: ignore[operator]


def _parameter_hooked(loop: Loop) -> None:
    loop.model.left.register_hook(lambda grad: 2 * grad)  # type: ignore[operator]


def _reads(loop: Loop) -> None:
    before = loop.loss
    loop.recorded.function = lambda x, y: before(x if x.sum().item() > 9e9 else x + 0, y)


def _counts(loop: Loop) -> None:
    def count(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        loop.model.times += 1  # type: ignore[operator, assignment]
        return loop.loss(x, y)

    loop.recorded.function = count


def _draws(loop: Loop) -> None:
    loop.recorded.function = lambda x, y: loop.loss(x * random.random(), y)


def _on_a_cpu(loop: Loop) -> None:
    loop.recorded.recorder = RecordedStep(loop.loss, loop.model).recorder


@pytest.mark.parametrize(
    ("prevent", "reason"),
    [
        (_hooked, "norm has hooks, which a replay does not call"),
        (_parameter_hooked, "a parameter has hooks, which a replay does not call"),
        (_reads, "it cannot be recorded: operation not permitted when stream is capturing"),
        (_draws, "it draws random numbers on the CPU"),
        (_counts, "Network.times changes from step to step"),
        (_on_a_cpu, "CUDA graphs are for NVIDIA GPUs, and this runs on cpu"),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_what_cannot_be_recorded_runs_as_written_and_says_so_once(
    prevent: Callable[[Loop], None], reason: str
) -> None:
    mine, plain = loops()
    prevent(mine)
    if prevent is _parameter_hooked:
        prevent(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(23):
            results = mine.step(seed)
            if prevent not in (_counts, _draws):
                torch.testing.assert_close(results, plain.step(seed))
    assert [str(one.message) for one in caught] == [f"the step runs without a CUDA graph: {reason}"]
    assert (mine.recorded.replays, mine.recorded.reason) == (0, reason)


def test_batches_that_cannot_be_recorded() -> None:
    mine, _ = loops()
    y = torch.randint(6, (4,))
    for x, reason in (
        (torch.randn(4, 2, 5, 5, requires_grad=True), "a tensor of the batch wants a gradient itself"),
        (nn.Parameter(torch.randn(4, 2, 5, 5)), "a batch is tensors and nothing else here"),
    ):
        with pytest.warns(UserWarning, match=reason):
            mine.recorded(x, y)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for images in (1, 2, 3, 4, 5) * 2:
            mine.step(0, images + 1)
    assert [str(one.message) for one in caught] == [
        "the step runs without a CUDA graph: batches have more than 4 shapes"
    ]
    assert mine.recorded.replays == 4
