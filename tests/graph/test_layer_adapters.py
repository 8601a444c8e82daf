"""Which registered method prunes which layer type, and the adapters by themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clicktrain
from clicktrain.errors import UserError
from clicktrain.graph.adapters import ADAPTERS, UNITS, LayerAdapter, adapter_of, register_layer
from clicktrain.graph.prunable import PrunableLayer, find_prunable
from clicktrain.methods import METHODS
from clicktrain.methods.base import Method

EPOCHS, PER_EPOCH = 4, 4


class Sound(nn.Module):
    """One-dimensional convolutions; the last one has kernels of more positions than a pattern can have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv1d(2, 8, 7, padding=3), nn.Conv1d(8, 16, 3, padding=1)
        self.norm, self.long = nn.BatchNorm1d(16), nn.Conv1d(16, 16, 80, padding=40, bias=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.long(F.relu(self.norm(self.body(F.relu(self.stem(x)))))))
        result: Tensor = self.head(x.mean(2))
        return result


class Volume(nn.Module):
    """Three-dimensional convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 16, 3, padding=1)
        self.norm, self.last, self.head = nn.BatchNorm3d(16), nn.Conv3d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(F.relu(self.norm(self.body(F.relu(self.stem(x)))))))
        result: Tensor = self.head(x.mean((2, 3, 4)))
        return result


class Autoencoder(nn.Module):
    """Convolutions down, one with groups in the middle, transposed convolutions up."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.up, self.norm = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.BatchNorm2d(8)
        self.image = nn.ConvTranspose2d(8, 1, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.deep(F.relu(self.down(x))))))
        result: Tensor = self.image(F.relu(self.norm(self.up(x))))
        return result


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution with 49 positions, layer norm, and two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm, self.scale = nn.LayerNorm(width), nn.Parameter(torch.full((width,), 0.1))
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two stages of blocks, with a strided convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 2, stride=2), ConvNeXtBlock(8)
        self.between, self.second = nn.Conv2d(8, 16, 2, stride=2), ConvNeXtBlock(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.second(self.between(self.first(self.stem(x)))).mean((2, 3)))
        return result


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "sound": (Sound, (4, 2, 32)),
    "volume": (Volume, (4, 1, 4, 4, 4)),
    "autoencoder": (Autoencoder, (4, 1, 8, 8)),
    "convnext": (ConvNeXt, (4, 3, 16, 16)),
    "perceptron": (perceptron, (4, 16)),
}
COLUMNS = (
    "Conv1d", "Conv1d, 80 positions", "Conv2d", "Conv2d, grouped", "Conv2d, depthwise", "Conv3d",
    "ConvTranspose2d", "Linear",
)  # fmt: skip

# Method -> settings that make it act on small networks in a short run.
SETTINGS: dict[str, dict[str, Any]] = {
    "clicktrain": {"compression": 2.5},
    "clicktrain-gradual": {"compression": 2.5},
    "admm-patterns": {"compression": 2.5},
    "prunetrain": {"target_flops": 0.7},
    "pat": {"policy": "epoch", "prune_epoch": 0, "prune_steps": 1},
    "rigl": {"densities": "uniform"},
}
DEPTHWISE = "its channels are those of a residual stream that layer norm reads, which stay"
PATTERNS = "patterns and kernels are parts of a convolution: it prunes no linear layers"
# Method -> column -> why it prunes no such layer.
UNPRUNED: dict[str, dict[str, str]] = {
    "dense": dict.fromkeys(COLUMNS, "it prunes nothing"),
    "clicktrain": {"Linear": PATTERNS},
    "clicktrain-gradual": {"Linear": PATTERNS},
    "admm-patterns": {"Linear": PATTERNS},
    "prunetrain": {"Conv2d, depthwise": DEPTHWISE},
    "prunetrain-clicktrain": {"Conv2d, depthwise": "it has no include: depthwise layers keep their patterns"},
    "pat": {"Conv2d, depthwise": DEPTHWISE},
    "nm": {"Conv2d, depthwise": "one input per filter is no multiple of M"},
}
# Method -> network -> the sentence that refuses it.
REFUSED: dict[tuple[str, str], str] = {
    ("clicktrain", "perceptron"): "no convolution that ClickTrain can prune",
    ("clicktrain-gradual", "perceptron"): "no convolution that Gradual ClickTrain can prune",
    ("admm-patterns", "perceptron"): "no convolution that ADMM patterns can prune",
    ("prunetrain-clicktrain", "perceptron"): "no convolution that",
    ("prunetrain-clicktrain", "convnext"): "cannot be met by this network",  # its depthwise layers stay
}


def column_of(module: nn.Module) -> str | None:
    """The table's column of a layer."""
    adapter = adapter_of(module)
    if adapter is None:
        return None
    name, (_, _, r, s) = type(module).__name__, adapter.view_shape(module)
    if adapter.depthwise(module):
        return f"{name}, depthwise"
    if adapter.groups(module) > 1:
        return f"{name}, grouped"
    return f"{name}, {r * s} positions" if r * s > 62 else name


def method_of(name: str) -> Method[Any]:
    kind = METHODS[name]
    include = {"include": ("*",)} if "include" in {field.name for field in fields(kind)} else {}
    return kind(**include, **SETTINGS.get(name, {}))


def trained(name: str, network: str) -> tuple[nn.Module, nn.Module, clicktrain.Pruner]:
    """The network before and after a short run, packed where it can be; and the pruner."""
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    model, x = make(), torch.randn(shape)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    pruner = method_of(name).attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=PER_EPOCH, packed=True, example=x
    )
    for _ in range(EPOCHS * PER_EPOCH):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
    pruner.finish(packed=False)
    return before, model, pruner


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")
def test_method_by_layer_type(name: str) -> None:
    """A layer of every type loses weights, or the table says why none does."""
    pruned: dict[str, bool] = {}
    for network in NETWORKS:
        if (refusal := REFUSED.get((name, network))) is not None:
            with pytest.raises(UserError, match=refusal):
                trained(name, network)
            continue
        before, model, pruner = trained(name, network)
        x = torch.randn(NETWORKS[network][1])
        assert bool(model(x).isfinite().all())
        modules = dict(model.named_modules())
        for path, module in before.named_modules():
            column = column_of(module)
            if column is None:
                continue
            now = modules.get(path)
            weight = None if now is None else getattr(now, "weight", None)
            full = isinstance(weight, Tensor) and weight.count_nonzero() >= module.weight.numel()
            if path in pruner.masks:
                assert pruner.masks[path].shape == weight.shape
                assert bool((weight[~pruner.masks[path]] == 0).all())
            pruned[column] = pruned.get(column, False) or not full
    reasons = UNPRUNED.get(name, {})
    for column in COLUMNS:
        cell = "pruned" if pruned.get(column) else f"not pruned: {reasons.get(column, 'UNEXPLAINED')}"
        print(f"{name:22} {column:22} {cell}")
    assert {column for column in COLUMNS if not pruned.get(column)} == set(reasons)


# ---- adapters by themselves -----------------------------------------------------------------

LAYERS = [
    (nn.Conv1d(4, 6, 5, groups=2), (6, 2, 1, 5)),
    (nn.Conv2d(4, 6, (3, 2)), (6, 4, 3, 2)),
    (nn.Conv3d(4, 6, (2, 3, 5)), (6, 4, 6, 5)),
    (nn.ConvTranspose1d(4, 6, 3), (6, 4, 1, 3)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), (6, 2, 3, 3)),
    (nn.ConvTranspose3d(4, 6, 2), (6, 4, 4, 2)),
    (nn.Linear(4, 6), (6, 4, 1, 1)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=lambda value: str(value))
def test_views_go_there_and_back(module: nn.Module, shape: tuple[int, ...]) -> None:
    adapter = ADAPTERS[type(module)]
    layer = PrunableLayer("layer", module, adapter)
    assert layer.view_shape == shape
    numbers = torch.arange(layer.weight.numel()).view(layer.shape)
    assert torch.equal(layer.unview(layer.view(numbers)), numbers)
    assert layer.kind == ("linear" if isinstance(module, nn.Linear) else "conv")


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=lambda value: str(value))
def test_row_and_column_of_a_view_are_what_makes_an_output_and_reads_an_input(
    module: Any, shape: tuple[int, ...]
) -> None:
    """Zero filter 0: output channel 0 is the bias. Zero what reads the inputs: nothing depends on them."""
    adapter = ADAPTERS[type(module)]
    module = copy.deepcopy(module)
    x = torch.randn(2, 4, *[8] * (module.weight.dim() - 2)) if module.weight.dim() > 2 else torch.randn(2, 4)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[0] = False
    with torch.no_grad():
        module.weight.masked_fill_(~adapter.unview(module, mask), 0.0)
    y = module(x)
    assert torch.allclose(y[:, 0], module.bias[0].expand_as(y[:, 0]))
    assert not torch.allclose(y[:, 1], module.bias[1].expand_as(y[:, 1]))
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, 0] = False
    with torch.no_grad():
        module.weight.masked_fill_(~adapter.unview(module, mask), 0.0)
    other = x.clone()
    other[:, :: shape[1]] += 1.0  # channel 0 of every group
    assert torch.allclose(module(x), module(other))


def test_units_without_a_meaning_have_a_reason() -> None:
    def refused(module: nn.Module) -> dict[str, str]:
        adapter = ADAPTERS[type(module)]
        return {unit: why for unit in UNITS if (why := adapter.unit_refusal(module, unit)) is not None}

    assert refused(nn.Conv2d(4, 4, 3)) == {}
    assert set(refused(nn.Conv2d(4, 4, 1))) == set(refused(nn.Linear(4, 4))) == {"pattern"}
    assert "62 positions" in refused(nn.Conv1d(4, 4, 80))["pattern"]
    assert "one kernel each" in refused(nn.Conv2d(4, 4, 7, groups=4))["kernel"]


def test_a_network_without_convolutions_is_compressed_over_its_linear_layers() -> None:
    model = perceptron()
    prunable = find_prunable(model, linear=True, exclude=("5",))
    assert prunable.conv_weights == 16 * 32 + 32 * 32 + 32 * 4
    with torch.no_grad():
        for layer in prunable.linears:
            layer.weight.zero_()
    assert clicktrain.compression_ratio(model) == (16 * 32 + 32 * 32 + 32 * 4) / (32 * 4)


class ScaledConv2d(nn.Conv2d):
    """A user's own layer: a convolution whose filters are multiplied by a trained scale."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.scale = nn.Parameter(torch.ones(self.out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Mixer(nn.Module):
    """Another one, whose weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class MixerAdapter(LayerAdapter):
    out_axis, in_axis = 1, 0

    def view(self, module: nn.Module, tensor: Tensor) -> Tensor:
        return tensor.t()[:, :, None, None]

    def unview(self, module: nn.Module, tensor: Tensor) -> Tensor:
        return tensor[:, :, 0, 0].t()


@pytest.fixture
def own_types() -> Any:
    known = dict(ADAPTERS)
    yield
    ADAPTERS.clear()
    ADAPTERS.update(known)


def test_recipe_adding_a_layer_type(own_types: None) -> None:
    """Adding a layer type (CONTRIBUTING, "Add a layer type").

    1. Is its weight [outputs, inputs / groups, *kernel], used as it is? Then one line makes it prunable:
       ``register_layer(LayerAdapter(YourLayer))``, with ``kind="linear"`` if it is not to count in the
       compression ratio over convolution weights. A subclass with a forward of its own is tried
       (``graph/layer_trial.py``), and left alone until you register it unless a zero in its weight is seen to
       be a zero in what it computes.
    2. Is the weight stored otherwise? Subclass `LayerAdapter` and say in `view` how a tensor of the weight's
       shape becomes [filters, channels per group, rows, columns], in `unview` the way back, and which axes
       are ``out_axis`` and ``in_axis``. Override `weight_uses` if a weight is not used once per output
       position.
    3. To train packed values instead of masked weights, subclass `kernels.sparse_conv2d.PackedLayer` with
       ``dense = YourLayer``. Until then attach with ``packed=False``.
    4. Channels are removed by `surgery`; a type that it does not know fixes the channels that it touches. The
       rules are in ``surgery/flow.py``, by the words of ``surgery/operations.py``.
    5. Add the type to the table of this file.
    """
    register_layer(LayerAdapter(ScaledConv2d))
    register_layer(MixerAdapter(Mixer, kind="linear"))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        ScaledConv2d(8, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Mixer(16, 4),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = clicktrain.RigL(sparsity=0.5, densities="uniform").attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=PER_EPOCH
    )
    for _ in range(EPOCHS * PER_EPOCH):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 8, 8)).square().mean()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
    pruner.finish()
    assert set(pruner.masks) == {"1", "5"}
    for name in ("1", "5"):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert 0.3 < (weight == 0).double().mean() < 0.7
    cost = clicktrain.count(model, torch.randn(1, 3, 8, 8))
    assert [layer.name for layer in cost.layers] == ["0", "1", "5"]
    assert cost.layers[1].forward_flops_dense == 2 * 16 * 8 * 9 * 16
    assert cost.layers[2].forward_flops_dense == 2 * 16 * 4
