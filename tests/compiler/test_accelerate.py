"""A lowered network against the packed one on the reference operator, in float64."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import SMALL, assert_same_state, assert_same_step, batch, network, twins
from torch import nn

import clicktrain
from clicktrain import UserError, accelerate
from clicktrain.compiler import Accelerated
from clicktrain.formats.packed import Structure
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.sparse_conv2d import PackedConv2d

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SMALL)
def test_a_lowered_network_trains_as_the_packed_one(name: str) -> None:
    model, reference = twins(name)
    # Small maps of deep networks amplify rounding: few numbers per channel make batch norm steep.
    size = {"resnet50": 48, "mobilenet_v1": 32}.get(name, 16)
    # So do filters of one kernel, some of which are left without weights.
    tolerance = 1e-4 if name == "mobilenet_v1" else 1e-8
    x, y = batch(16, size)
    fast = accelerate(model, x, rule="sparse")
    assert isinstance(fast, Accelerated)
    blocked = sum(c.layout == "blocked" for c in fast.plan.choices)
    assert blocked == len(fast.plan.choices)
    assert_same_step(fast, reference, x, y)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.002, momentum=0.9) for m in (fast, reference)]
    for _ in range(5):
        x, y = batch(16, size)
        losses = []
        for m, optimizer in zip((fast, reference), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    tolerance *= 10
    assert_same_state(fast, reference, tolerance)
    fast.eval()
    reference.eval()
    torch.testing.assert_close(fast(x), reference(x), rtol=tolerance, atol=tolerance)
    assert_same_state(fast, reference, tolerance)


@pytest.mark.parametrize("n", [1, 5, 17])
def test_any_number_of_images(n: int) -> None:
    model, reference = twins("resnet20")
    fast = accelerate(model, batch(16)[0], rule="sparse")
    assert_same_step(fast, reference, *batch(n))


def test_another_size_of_images_is_lowered_when_it_comes() -> None:
    model, reference = twins("resnet20")
    fast = accelerate(model, batch(8)[0], rule="sparse")
    for size in (12, 16, 19):
        assert_same_step(fast, reference, *batch(9, size))
    assert_same_step(fast.eval(), reference.eval(), *batch(3, 19))


@pytest.mark.usefixtures("two_threads")
def test_two_threads() -> None:
    model, reference = twins("resnet20")
    x, y = batch(16)
    assert_same_step(accelerate(model, x, rule="sparse"), reference, x, y)


def test_another_number_type_is_lowered_anew() -> None:
    model, reference = twins("resnet20")
    x, y = batch(5)
    fast = accelerate(model, x, rule="sparse")
    assert_same_step(fast, reference, x, y)
    assert_same_step(fast.float(), reference.float(), x.float(), y, 1e-3)
    assert_same_step(fast.double(), reference.double(), x, y, 1e-3)


def test_regions_stay_in_the_number_type_of_the_parameters_under_autocast() -> None:
    model, reference = twins("resnet20", torch.float32)
    x, _ = batch(8, dtype=torch.float32)
    for m in (model, reference):
        m.fc = nn.Identity()
    fast = accelerate(model, x, rule="sparse")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = fast(x.bfloat16().float())
        converted = fast(x.bfloat16())
    assert features.dtype == converted.dtype == torch.float32
    torch.testing.assert_close(features, reference(x.bfloat16().float()), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(converted, features)
    features.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fast.parameters())


def test_the_view_has_the_models_own_tensors() -> None:
    model = network("resnet20")
    fast = accelerate(model, batch(4)[0], rule="sparse")
    fast(batch(4)[0])
    assert list(fast.state_dict()) == list(model.state_dict())
    assert [n for n, _ in fast.named_modules()] == [n for n, _ in model.named_modules()]
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    assert fast.stage_names == model.stage_names
    fast.eval()
    assert not model.training
    assert not any(m.training for m in model.modules())
    model.train()
    assert fast.training


def test_a_checkpoint_with_other_positions_can_be_loaded() -> None:
    model = network("resnet20")
    x, y = batch(6)
    fast = accelerate(model, x, rule="sparse")
    fast(x)
    other = copy.deepcopy(model)
    for layer in other.modules():
        if isinstance(layer, PackedConv2d):
            layer.structure = Structure.from_mask(layer.structure.mask().flip(1))
            layer.keep_bits.copy_(layer.structure.bits())
            assert layer.structure.values_shape == tuple(layer.values.shape)
    fast.load_state_dict(other.state_dict())
    assert_same_step(fast, other, x, y)


def test_copies_and_pickles() -> None:
    model, reference = twins("resnet20")
    x, y = batch(6)
    fast = accelerate(model, x, rule="sparse")
    fast(x)
    reference(x)
    twin = copy.deepcopy(fast)
    assert isinstance(twin, Accelerated)
    assert_same_step(twin, copy.deepcopy(reference), x, y)
    assert not any(a is b for a in twin.parameters() for b in fast.parameters())
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    assert_same_step(torch.load(file, weights_only=False), reference, x, y)


def test_a_pickle_runs_where_there_is_no_compiler(tmp_path: Path) -> None:
    model = network("resnet20").eval()
    x, _ = batch(3)
    fast = accelerate(model, x, rule="sparse")
    torch.save({"fast": fast, "x": x, "y": model(x)}, tmp_path / "it.pt")
    code = """
    import sys, warnings, torch
    found = torch.load(sys.argv[1], weights_only=False)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(found["fast"](found["x"]), found["y"])
    told = [str(one.message) for one in heard if "acceleration" in str(one.message)]
    print(len(told), told[0])
    """
    (tmp_path / "bin").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "bin"), "CC": ""}
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "it.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "1 inputs of [[3, 3, 16, 16]] run without acceleration: there is no C compiler"
    )


def test_a_model_of_another_type_is_accelerated_again_when_it_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network("resnet20").eval()
    x, _ = batch(3)
    fast = accelerate(model, x, rule="sparse")
    other = x[:, :, :12, :12].contiguous()
    model.half()
    told = pytest.warns(UserWarning, match="run without acceleration: its packed layers are not all float32")
    with told, contextlib.suppress(RuntimeError):  # the images are not half
        fast(other)
    model.to(x.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(fast(other), model(other))
    monkeypatch.setattr(type(model), "forward", None)
    fast(other)  # lowered: it does not ask the model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_recording_a_network_records_the_model() -> None:
    model = network("resnet20").eval()
    x, _ = batch(3)
    fast = accelerate(model, x, rule="sparse")
    recorded = torch.jit.trace(fast, (x,))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(recorded(x), model(x))
    if hasattr(torch.compiler, "is_exporting"):
        exported = torch.export.export(accelerate(model, x, rule="sparse"), (x,))
        torch.testing.assert_close(exported.module()(x), model(x))
    torch.testing.assert_close(fast(x), model(x))


def test_exchanged_layers_and_hooks_are_respected() -> None:
    model = network("resnet20")
    x, _ = batch(3)
    fast = accelerate(model, x, rule="sparse").eval()
    seen = []
    fast(x)
    handle = model.layer1[0].conv1.register_forward_hook(lambda *_: seen.append("conv"))  # type: ignore[index, union-attr]
    torch.testing.assert_close(fast(x), model(x))
    assert seen == ["conv", "conv"]
    handle.remove()
    model.layer1[0].conv1 = model.layer1[0].conv1.to_dense()  # type: ignore[index, union-attr]
    model.fc = nn.Linear(model.fc.in_features, 2, dtype=x.dtype)  # type: ignore[arg-type, union-attr]
    assert fast(x).shape == (3, 2)
    torch.testing.assert_close(fast(x), model(x))


def test_a_model_with_zeros_is_packed_first() -> None:
    model = clicktrain.unpack(network("resnet20"))
    x, _ = batch(4)
    fast = accelerate(model, x, rule="sparse").eval()
    assert any(isinstance(m, PackedConv2d) for m in fast.modules())
    assert not any(isinstance(m, PackedConv2d) for m in model.modules())
    torch.testing.assert_close(fast(x), model.eval()(x))


def test_layers_of_another_number_type_stay_as_they_are() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network("resnet20", torch.float32)
            self.first = nn.Conv2d(3, 3, 3, padding=1).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.inner(self.first(x.double()).float())
            return y

    model = Mixed().eval()
    x, _ = batch(5, 16, torch.float32)
    for dtypes in (("fp32",), ("bf16",)):
        fast = accelerate(model, x, rule="sparse", dtypes=dtypes)
        assert isinstance(fast, Accelerated)
        choices = fast.plan.by_layer()
        assert choices["first"].layout == "plain"
        assert choices["first"].refused == ("sparse blocked: its input is not a batch of images in float32",)
        tolerance = 1e-4 if dtypes == ("fp32",) else 0.1
        torch.testing.assert_close(fast(x), model(x), rtol=tolerance, atol=tolerance)


def test_a_layer_that_changes_its_type_afterwards_is_not_misread() -> None:
    model = network("resnet20", torch.float32)
    x, _ = batch(5, 16, torch.float32)
    fast = accelerate(model, x, rule="sparse")
    model.layer2[0].conv1.bfloat16()  # type: ignore[index, union-attr, operator]
    with pytest.raises(UserError, match=r"has weights and bias of torch.float32, not of torch.bfloat16"):
        fast(x)


def test_mistakes() -> None:
    model, x = network("resnet20"), batch(2)[0]
    with pytest.raises(UserError, match="rule is one of measured, density, sparse"):
        accelerate(model, x, rule="fastest")
    with pytest.raises(UserError, match="dtypes are fp32 and bf16, not fp8"):
        accelerate(model, x, dtypes=("fp8",))
    with pytest.raises(UserError, match="at least one"):
        accelerate(model, x[:0])


def test_a_network_without_anything_sparse_is_lowered_too() -> None:
    model = clicktrain.create_model("resnet8", num_classes=2).eval()
    expected = copy.deepcopy(model).double()
    x = torch.randn(3, 3, 16, 16)
    for rule in ("measured", "density", "sparse"):
        fast = accelerate(model, x, rule=rule, remember=False)
        assert fast.base is model, "a view, not a copy"
        assert fast.plan.choices
        assert all(choice.density == 1 for choice in fast.plan.choices)
        torch.testing.assert_close(fast(x).double(), expected(x.double()), rtol=1e-4, atol=1e-5)


def test_tracing_leaves_no_trace() -> None:
    model, untouched = twins("resnet20")
    state = torch.get_rng_state()
    model.layer1[0].bn1.eval()  # type: ignore[index, union-attr]
    accelerate(model, batch(2)[0], rule="sparse")
    del state
    assert not model.layer1[0].bn1.training  # type: ignore[index, union-attr]
    assert model.layer1[0].bn2.training  # type: ignore[index, union-attr]
    assert_same_state(model, untouched, 0.0)


class Pooled(nn.Module):
    """Two convolutions with a pooling between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.pool(self.norm(self.first(x)).relu())).mean((2, 3))
        return y


@pytest.mark.parametrize(
    "change", [{"padding": 0}, {"ceil_mode": True}, {"stride": 3}, {"kernel_size": (2, 3)}], ids=str
)
def test_a_pooling_that_is_set_otherwise_is_lowered_anew(change: dict[str, object]) -> None:
    model, x = Pooled(), torch.randn(5, 3, 12, 11)
    with torch.no_grad():
        for conv in (model.first, model.second):
            conv.weight[:, 1] = 0
    fast = accelerate(clicktrain.pack(model), x, rule="sparse")
    assert isinstance(fast, Accelerated)
    torch.testing.assert_close(fast(x), model(x))
    for name, value in change.items():
        setattr(fast.pool, name, value)
        setattr(model.pool, name, value)
    torch.testing.assert_close(fast(x), model(x))
