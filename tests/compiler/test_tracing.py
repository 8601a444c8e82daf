"""What can run blocked, in every spelling, and what happens to what cannot be traced."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import assert_same_step, batch, network, prune_
from torch import Tensor, nn

from clicktrain import accelerate
from clicktrain.compiler import Accelerated, module
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.sparse_conv2d import PackedConv2d

needs_compiler = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")


class Spellings(nn.Module):
    """One block of each spelling of batch norm, addition, ReLU, pooling, concatenation and mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=i % 2 == 0) for i in range(8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(8))
        self.norms[3] = nn.BatchNorm2d(8, affine=False)
        self.norms[4] = nn.BatchNorm2d(8, momentum=None)  # type: ignore[arg-type]
        self.norms[5] = nn.BatchNorm2d(8, track_running_stats=False)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.smooth = nn.AvgPool2d(2)
        self.last = nn.Conv2d(24, 8, 1, groups=2)
        self.head = nn.Linear(16, 5)

    def branch(self, i: int, x: Tensor) -> Tensor:
        y: Tensor = self.norms[i](self.convs[i](x))
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.stem(x)))
        x = self.relu(self.branch(0, x) + x)
        x = F.relu(torch.add(x, self.branch(1, x)), inplace=True)
        y = self.branch(2, x)
        y += self.branch(3, x)
        x = torch.relu(y)
        before = self.branch(4, x)  # read twice: not to be fused with what follows
        x = (before.add(x)).relu() + F.silu(before)
        x = self.smooth(x) + F.max_pool2d(x, 2)
        z = self.relu(self.branch(5, x))
        x = torch.cat([x, z, self.branch(6, x) * 0.5], 1)
        x = F.relu_(self.last(x))
        return self.head(torch.cat([x.mean((2, 3)), F.adaptive_avg_pool2d(x, 1).flatten(1)], 1))  # type: ignore[no-any-return]


@needs_compiler
@pytest.mark.parametrize("train", [True, False])
def test_every_spelling(train: bool) -> None:
    model = prune_(Spellings(), 0.3).double()
    reference = copy.deepcopy(model)
    x, y = batch(11, 17)
    fast = accelerate(model, x, rule="sparse")
    assert isinstance(fast, Accelerated)
    assert_same_step(fast.train(train), reference.train(train), x, y)
    kinds = {c.layer: c.kind for c in fast.plan.choices}
    assert set(kinds.values()) == {"conv", "batch_norm", "elementwise", "pool", "global_pool", "cat"}
    code = fast.graph(x).code
    assert "self.base.norms" not in code


class Inside(nn.Module):
    """Looks at numbers: cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y if float(y.detach().abs().sum()) > 0 else x


class Outside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = Inside()
        self.conv = nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.conv(F.relu(self.block(self.stem(x))))
        if scale is not None:
            x = x * scale
        return x.mean((2, 3))


class NotTraceable(Outside):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return super().forward(x, scale) if float(x.detach().sum()) != 0 else x


@needs_compiler
def test_what_cannot_be_traced_runs_layer_by_layer() -> None:
    model = prune_(NotTraceable()).double()
    reference = copy.deepcopy(model)
    x, y = batch(5)
    with pytest.warns(
        UserWarning, match=r"cannot be traced \(.*\): 2 of its packed layers run sparse one by one"
    ):
        fast = accelerate(model, x, rule="sparse")
    assert isinstance(fast, Accelerated)
    assert fast.base is model
    assert "cannot be traced" in fast.plan.notes[0]
    assert {m.impl for m in model.modules() if isinstance(m, PackedConv2d)} == {"blocked"}
    assert_same_step(fast, reference, x, y)


@needs_compiler
def test_a_module_that_cannot_be_traced_is_the_only_one_left_out() -> None:
    model = prune_(Outside()).double()
    reference = copy.deepcopy(model)
    x, y = batch(5)
    with pytest.warns(UserWarning, match=r"block cannot be traced .* run one by one"):
        fast = accelerate(model, x, rule="sparse")
    assert isinstance(fast, Accelerated)
    assert model.block.conv.impl == "blocked"  # type: ignore[union-attr]
    assert "block" in fast.plan.notes[0]
    assert_same_step(fast, reference, x, y)


@needs_compiler
def test_a_call_in_another_way_than_the_examples() -> None:
    model = prune_(Outside()).double()
    x, _ = batch(5)
    with pytest.warns(UserWarning, match="block cannot be traced"):
        fast = accelerate(model, x, rule="sparse")
    torch.testing.assert_close(fast(x, scale=torch.tensor(2.0)), 2 * fast(x=x))


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x))
        if self.training:
            x = 3 * x
        return x.mean((2, 3))


@needs_compiler
def test_a_forward_that_asks_for_the_mode() -> None:
    model = prune_(ByMode()).double()
    reference = copy.deepcopy(model)
    x, _ = batch(5)
    fast = accelerate(model, x, rule="sparse")
    for mode in (True, False, True):
        torch.testing.assert_close(fast.train(mode)(x), reference.train(mode)(x))


def test_without_a_compiler_the_packed_model_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "toolchain", lambda: None)
    model, (x, _) = network("resnet20"), batch(2)
    with pytest.warns(UserWarning, match="reference operator: there is no C compiler"):
        fast = accelerate(model, x)
    assert fast.base is model
    assert not fast.active
    assert "no C compiler" in fast.plan.notes[0]
    assert torch.equal(fast.eval()(x), model(x))


def test_other_devices_and_types_are_left_alone() -> None:
    model = network("resnet20").to("meta")
    with pytest.warns(UserWarning, match="on meta, the sparse kernels are for CPUs"):
        assert not accelerate(model, torch.empty(2, 3, 16, 16, device="meta")).active
    model = network("resnet20").bfloat16()
    with pytest.warns(UserWarning, match="not all float32"):
        assert not accelerate(model, torch.randn(2, 3, 16, 16).bfloat16()).active


@needs_compiler
def test_the_blocked_implementation_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = PackedConv2d.from_dense(nn.Conv2d(4, 4, 3), torch.rand(4, 4, 3, 3) < 0.3)
    layer.use("blocked")
    with pytest.raises(ValueError, match=r"input is torch\.float64, the weight torch\.float32"):
        layer(torch.randn(2, 4, 8, 8).double())
    with pytest.raises(ValueError, match=r"float32 or float64, not in torch\.bfloat16"):
        copy.deepcopy(layer).bfloat16()(torch.randn(2, 4, 8, 8).bfloat16())
    with pytest.raises(ValueError, match="on the CPU, not on meta"):
        copy.deepcopy(layer).to("meta")(torch.randn(2, 4, 8, 8, device="meta"))
    monkeypatch.setattr("clicktrain.kernels.native.toolchain", lambda: None)
    with pytest.raises(ValueError, match="needs a C compiler"):
        layer(torch.randn(2, 4, 8, 8))
