"""What lies between convolutions as one pass: the same training, what is fused and what must not be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import assert_same_step, batch, prune_
from torch import Tensor, nn

from clicktrain import accelerate
from clicktrain.compiler import Accelerated, steps
from clicktrain.compiler.activations import activation_of_layer, in_torch
from clicktrain.compiler.believe import is_operator
from clicktrain.compiler.units import find_units, pass_of
from clicktrain.graph.trace import trace
from clicktrain.kernels.activations import NONE, Activation
from clicktrain.kernels.batch_norm2d import affine_blocked
from clicktrain.kernels.native import toolchain
from clicktrain.models import create_model

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")
LAYERS = {
    nn.ReLU(): "relu",
    nn.ReLU6(): "clamp 0.0 6.0",
    nn.Hardtanh(-0.5, 2): "clamp -0.5 2.0",
    nn.LeakyReLU(0.125): "leaky 0.125",
    nn.LeakyReLU(-0.5): "none",
    nn.Hardswish(): "hardswish",
    nn.SiLU(inplace=True): "silu",
    nn.GELU(): "gelu",
    nn.GELU("tanh"): "gelu_tanh",
    nn.ELU(): "none",
    nn.Identity(): "none",
}


def fused(
    model: nn.Module, x: Tensor, dtypes: tuple[str, ...] = ("fp32",)
) -> tuple[Accelerated, list[nn.Module]]:
    """Accelerated with all that can run blocked, and the steps of its graph."""
    fast = accelerate(model, x, rule="sparse", dtypes=dtypes)
    assert isinstance(fast, Accelerated)
    return fast, list(fast.graph(x).modules())


def of(modules: list[nn.Module], kind: type) -> list[nn.Module]:
    return [module for module in modules if isinstance(module, kind)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_and_their_kernels_compute_the_same(layer: nn.Module) -> None:
    activation = activation_of_layer(layer)
    assert activation == Activation.read(LAYERS[layer])
    if activation != NONE:
        x = torch.randn(99, dtype=torch.float64) * 4
        torch.testing.assert_close(in_torch(activation)(x), layer(x.clone()))


class Chains(nn.Module):
    """Pooling, norm, addition and activation in the ways that are one pass, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=i > 3) for i in range(6))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.norms[0].weight.requires_grad_(False)
        self.pool, self.gelu = nn.MaxPool2d(2), nn.GELU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gelu(self.stem(x))  # bias and activation
        x = self.gelu(self.norms[0](self.pool(self.convs[0](x))))  # one pass
        x = F.silu(self.norms[1](self.convs[1](x)) + x)  # one pass, which keeps what it adds
        pooled = F.max_pool2d(self.convs[2](x), 3, 2, 1)  # read twice: not part of the norm
        x = F.leaky_relu(self.norms[2](pooled) + pooled, 0.2)
        x = F.gelu(F.relu6(self.norms[3](self.convs[3](x))), approximate="tanh")
        both = self.convs[4](x)  # read twice: keeps its bias
        x = F.hardswish(both) + both
        x = F.relu(self.convs[5](x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_chains(train: bool, frozen: bool) -> None:
    model = prune_(Chains(), 0.4).double()
    model.stem.weight.requires_grad_(not frozen)
    reference = copy.deepcopy(model)
    x, y = batch(11, 13)
    fast, modules = fused(model, x)
    assert_same_step(fast.train(train), reference.train(train), x, y)
    fast.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), reference.eval()(x), rtol=1e-10, atol=1e-10)
    norms = of(modules, steps.BatchNorm)
    assert [(n.activation, n.pooling is not None) for n in norms] == [  # type: ignore[union-attr]
        ("gelu", True),
        ("silu", False),
        ("leaky 0.2", False),
        ("clamp 0.0 6.0", False),
    ]
    assert len(of(modules, steps.MaxPool)) == 1
    biased = [step.conv is not None for step in of(modules, steps.Activation)]  # type: ignore[union-attr]
    assert biased == [True, False, False, True]
    later = [step.bias_later for step in of(modules, steps.SparseConv)]  # type: ignore[union-attr]
    assert later == [True, False, False, False, False, False, True]


def test_a_frozen_first_layer_needs_no_gradient_of_its_result() -> None:
    model = prune_(Chains(), 0.4)
    model.stem.weight.requires_grad_(False)
    x, y = batch(5, 13, torch.float32)
    fast, modules = fused(model, x)
    seen: list[bool] = []
    first, run = next(iter(of(modules, steps.Activation))), affine_blocked

    def watched(z: Tensor, n: int, activation: str, bias: Tensor | None) -> Tensor:
        seen.append(z.requires_grad)
        y: Tensor = run(z, None, bias, None, n, activation)
        return y

    first.run = watched  # type: ignore[assignment]
    F.cross_entropy(fast(x), y).backward()
    assert seen == [False], "neither computed nor kept"
    assert model.stem.bias.grad is not None
    assert model.stem.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["cifarnet", "mobilenet_v1"])
def test_networks_in_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    stem = {"stem": "cifar"}
    model = prune_(create_model(name, num_classes=5, width=0.25, **stem), 0.4)
    exact, cast = copy.deepcopy(model).double(), copy.deepcopy(model)
    x, y = batch(20, 16, torch.float32)
    fast, modules = fused(model, x, ("bf16",))
    assert fast.plan.activations == "bf16"
    assert not of(modules, steps.Elementwise)
    gradients = []
    for network, images, bf16 in ((exact, x.double(), False), (fast, x, False), (cast, x, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(network(images), y)
        loss.backward()
        parameters = [p.grad for p in network.parameters() if p.grad is not None]
        gradients.append(torch.cat([g.double().flatten() for g in parameters]))
    truth, own, usual = gradients
    assert (own - truth).norm() < 1.3 * (usual - truth).norm()


def test_other_settings_are_lowered_again() -> None:
    model = prune_(Chains(), 0.4).double()
    reference = copy.deepcopy(model)
    x, y = batch(5, 13)
    fast, _ = fused(model, x)
    assert_same_step(fast, reference, x, y)
    for one in (model, reference):
        one.gelu.approximate = "tanh"
        one.pool.ceil_mode = True
    assert_same_step(fast, reference, x, y)


def test_units() -> None:
    units, _ = find_units(trace(Chains(), batch(2, 13, torch.float32)[0], leaves=is_operator))
    passes = {unit.name: pass_of(unit) for unit in units if unit.kind != "conv"}
    assert passes["norms.0"] == ("pooled_norm", Activation("gelu").number)
    assert passes["norms.1"] == ("batch_norm", Activation("silu").number)
    assert passes["max_pool2d"] == ("max_pool", 0)
    assert passes["hardswish"] == ("batch_norm", Activation("hardswish").number)
    assert "pool" not in passes


class Head(nn.Module):
    """Adaptive max pooling whose windows are all alike, or not."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8 if i else 3, 8, 3, padding=1) for i in range(3))
        self.pool, self.size = nn.AdaptiveMaxPool2d(1), size

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_max_pool2d(self.convs[1](F.relu(self.convs[0](x))), self.size)
        return self.pool(self.convs[2](x)).flatten(1)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("size", "own"), [(4, 2), (5, 1)])
def test_adaptive_max_pooling(size: int, own: int) -> None:
    model = prune_(Head(size), 0.4).double()
    reference = copy.deepcopy(model)
    x, y = batch(5, 12)
    fast, modules = fused(model, x)
    assert len(of(modules, steps.MaxPool)) == own
    assert_same_step(fast, reference, x, y)
    assert_same_step(fast, reference, *batch(5, 15))
    model.pool.output_size = reference.pool.output_size = (1, 1)
    assert_same_step(fast, reference, x, y)
