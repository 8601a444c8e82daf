"""Accelerated networks among the user's other code: memory formats, threads, arguments, derivatives."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clicktrain
from clicktrain import UserError
from clicktrain.compiler import Accelerated, Choice
from clicktrain.compiler.plan import DENSE, LoweringPlan
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.latency.machine import Machine

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")


def view(x: Tensor) -> Tensor:
    return x.view(x.size(0), -1)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().view(x.size(0), -1)


class Flat(nn.Module):
    """Convolutions, a pooling and code of the user's own that depends on strides."""

    def __init__(self, own: Callable[[Tensor], Tensor], pool: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.fc, self.pool, self.own = nn.Linear(16 * pool * pool, 5), pool, own

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x))))
        y: Tensor = self.fc(self.own(F.dropout(F.adaptive_avg_pool2d(x, self.pool), 0.3, self.training)))
        return y


def pack_(model: nn.Module, *names: str) -> nn.Module:
    masks = {name: torch.rand_like(model.get_submodule(name).weight) < 0.3 for name in names}  # type: ignore[arg-type]
    pack_model_(model, masks)
    return model


@pytest.mark.parametrize("own", [view, transposed])
@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("way", ["blocked", *DENSE[:2]])
def test_the_users_code_gets_the_memory_format_it_knows(
    own: Callable[[Tensor], Tensor], pool: int, way: str
) -> None:
    model = pack_(Flat(own, pool), "b")
    plain, x = copy.deepcopy(model), torch.randn(6, 3, 12, 12)
    layout = {"layout": "blocked"} if way == "blocked" else {"layout": "plain", "dense": way}
    choices = (Choice("a", "conv", **layout), Choice("b", "conv", density=0.3, **layout))  # type: ignore[arg-type]
    fast = clicktrain.accelerate(model, x, plan=LoweringPlan("density", 6, Machine.here(), choices))
    assert isinstance(fast, Accelerated)
    for mode in (True, False):
        images = [x, x[:1]]
        if own is transposed:  # the other one takes no images in channels_last
            images.append(x.contiguous(memory_format=torch.channels_last))
        for image in images:
            torch.manual_seed(3)
            found = fast.train(mode)(image)
            torch.manual_seed(3)
            torch.testing.assert_close(found, plain.train(mode)(image), rtol=1e-4, atol=1e-5)


class Arguments(nn.Module):
    """Optional arguments, a flag, a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.e, self.fc = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, pixels: Any, cond: Tensor | None = None, *, double: bool = False) -> Tensor:
        if isinstance(pixels, dict):
            pixels = pixels["x"]
        x = F.relu(self.b(F.relu(self.a(pixels)))).mean((2, 3))
        if cond is not None:
            x = x + self.e(cond)
        y: Tensor = self.fc(2 * x if double else x)
        return y


def test_every_way_to_call_is_lowered_when_it_first_comes() -> None:
    model = pack_(Arguments().double(), "b")
    plain = copy.deepcopy(model)
    x, c = torch.randn(5, 3, 8, 8).double(), torch.randn(5, 4).double()
    fast = clicktrain.accelerate(model, {"pixels": x}, rule="sparse")
    assert isinstance(fast, Accelerated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for args, kwargs in (
            ((x,), {}), ((), {"pixels": x}), ((x, c), {}), ((x,), {"cond": c}), ((x,), {"double": True}),
            ((x, None), {}), (({"x": x},), {"cond": c}), ((), {"double": False, "cond": c, "pixels": x}),
        ):  # fmt: skip
            torch.testing.assert_close(fast(*args, **kwargs), plain(*args, **kwargs))
            assert "base.b(" not in fast.graph(*args, **kwargs).code
    with pytest.raises(UserError, match="the model does not run on the example"):
        clicktrain.accelerate(model, x[:, :2])


def test_threads_may_call_at_once_also_with_new_sizes() -> None:
    model = pack_(Flat(view, 2), "b").double().eval()
    plain = copy.deepcopy(model)
    fast = clicktrain.accelerate(model, torch.randn(4, 3, 8, 8).double(), rule="sparse")
    images = [torch.randn(3, 3, 6 + i, 6 + i).double() for i in range(3)]
    with torch.no_grad():
        expected = [plain(image) for image in images]
    failed: list[Any] = []

    def work(start: int) -> None:
        try:
            for step in range(6):
                index = (start + step) % len(images)
                with torch.no_grad():
                    torch.testing.assert_close(fast(images[index]), expected[index])
                x = images[index].clone().requires_grad_()
                fast(x).sum().backward()
                assert x.grad is not None
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_second_derivatives_are_refused_in_a_sentence() -> None:
    model = pack_(Flat(view, 2), "b")
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    fast = clicktrain.accelerate(model, x.detach(), rule="sparse")
    (gradient,) = torch.autograd.grad(fast(x).sum(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivatives"):
        gradient.square().sum().backward()
    (gradient,) = torch.autograd.grad(fast(x).sum(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivatives"):
        torch.autograd.grad(gradient.square().sum(), x, allow_unused=True)


def test_recomputation_keeps_its_saving() -> None:
    """Inside a checkpoint nothing is kept between forward and backward."""

    class Recomputed(Flat):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
            return y

    model = pack_(Recomputed(view, 2), "b").eval()
    x = torch.randn(8, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"Recomputed uses torch\.utils\.checkpoint"):
        fast = clicktrain.accelerate(model, x, rule="sparse")
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fast(x.requires_grad_())
    assert max(kept, default=0) <= x.numel()


def test_what_was_compared_is_released() -> None:
    """Without waiting for the garbage collector: copies of large networks are large."""
    model = pack_(Flat(view, 2), "b")
    head = torch.Size((7, 13))
    model.fc = nn.Sequential(nn.Linear(64, 13), nn.Linear(13, 7))
    x = torch.randn(4, 3, 8, 8)
    clicktrain.accelerate(model, x, rule="sparse")(x)  # whatever is made once
    gc.collect()
    gc.disable()
    try:
        fast = clicktrain.accelerate(model, x, rule="sparse")
        alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.shape == head]
    finally:
        gc.enable()
    assert isinstance(fast, Accelerated)
    assert len(alive) == 1


@pytest.mark.parametrize("rule", ["sparse", "measured"])
def test_what_inference_mode_lowers_serves_training(rule: str) -> None:
    model = pack_(Flat(view, 2).double(), "b").eval()
    x, larger = torch.randn(6, 3, 12, 12).double(), torch.randn(4, 3, 20, 20).double()
    plain = copy.deepcopy(model)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = torch.randn(6, 3, 12, 12).double()
        fast = clicktrain.accelerate(model, inside, rule=rule, remember=False)
        for images in (inside, inside[:, :, 2:], larger, larger.clone()):
            torch.testing.assert_close(fast(images), plain(images))
    for images in (x, larger):
        expected, found = (
            torch.autograd.grad(net(images).sum(), list(net.parameters())) for net in (plain, fast)
        )
        torch.testing.assert_close(found, expected)
