"""What ClickTrain leaves alone and why, and settings that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_loop import OPTIMIZERS, Net, conv_weights, make, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from clicktrain.errors import UserError
from clicktrain.graph.adapters import ADAPTERS
from clicktrain.graph.prunable import PrunableLayer
from clicktrain.methods import ClickTrain
from clicktrain.methods.patterns.selection import PatternLayer, Selection
from clicktrain.methods.patterns.settings import PRESETS
from clicktrain.sparsity.patterns import fixed_pool


class StandardisedConv(nn.Conv2d):
    """Computes its kernel from its weight: zeros in the weight are no zeros in the kernel."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Odd(nn.Module):
    """Layers of several kinds to prune among those that ought to be left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.tied_a = nn.Conv2d(8, 8, 3, padding=1)
        self.tied_b = nn.Conv2d(8, 8, 3, padding=1)
        self.tied_b.weight = self.tied_a.weight
        self.twice = nn.Conv2d(8, 8, 1)
        self.alias = self.twice
        self.outside = nn.Conv2d(8, 8, 3, padding=1)
        self.fixed = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
        self.normed = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.spectral = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
        self.standardised = StandardisedConv(8, 8, 3, padding=1)
        self.huge = nn.Conv2d(8, 8, 9, padding=4)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.cube = nn.Conv3d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(F.relu(self.stem(x))))
        for name in ("up", "grouped", "depthwise", "tied_a", "tied_b", "twice", "alias", "outside"):
            x = x + 0.1 * F.relu(self.get_submodule(name)(x))
        for name in ("fixed", "normed", "spectral", "standardised", "huge"):
            x = x + 0.1 * F.relu(self.get_submodule(name)(x))
        x = x + 0.1 * self.line(x.flatten(2)).view_as(x) + 0.1 * self.cube(x[:, :, None])[:, :, 0]
        return self.head(x.mean(dim=(2, 3)))


PRUNED = {"body", "grouped", "up", "huge", "line", "cube"}
LEFT_ALONE = {
    "stem": "first",
    "depthwise": "depthwise",
    "tied_a": "shared",
    "tied_b": "shared",
    "twice": "shared",
    "outside": "not in the optimizer",
    "fixed": "not trained",
    "normed": "parametrization",
    "spectral": "parametrization",
    "standardised": "StandardisedConv",
    "head": "linear",
}


def test_unknown_layers_are_left_alone_with_a_reason() -> None:
    torch.manual_seed(0)
    model = Odd()
    outside = {id(p) for p in model.outside.parameters()}
    optimizer = OPTIMIZERS["nesterov"]([p for p in model.parameters() if id(p) not in outside])
    pruner = ClickTrain(compression=1.5).attach(model, optimizer, epochs=1, steps_per_epoch=8)
    rows = {row.name: row for row in pruner.plan().rows}
    assert {name for name, row in rows.items() if row.action != "none"} == PRUNED
    for name, reason in LEFT_ALONE.items():
        assert reason in rows[name].reason, name
        assert reason in str(pruner.plan())
        assert rows[name].density == 1.0
    train(model, optimizer, pruner, 8)
    pruner.finish()
    assert set(pruner.masks) == PRUNED
    assert all(pruner.masks[name].shape == model.get_submodule(name).weight.shape for name in PRUNED)
    assert set(pruner.masks["huge"].sum(dim=(2, 3)).unique().tolist()) <= {0, 81}  # without patterns: whole
    for name, module in model.named_modules():
        if name in LEFT_ALONE and isinstance(module.weight, Tensor):
            assert module.weight.count_nonzero() == module.weight.numel(), name


def test_a_lazy_layer_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.LazyConv2d(8, 3), nn.Flatten())
    optimizer = torch.optim.SGD(model[:2].parameters(), lr=0.1)
    pruner = ClickTrain(compression=2).attach(model, optimizer, epochs=1, steps_per_epoch=10)
    rows = {row.name: row for row in pruner.plan().rows}
    assert rows["2"].action == "none"
    assert "lazy" in rows["2"].reason
    str(pruner.plan())


def test_a_layer_that_gets_no_gradient_is_no_crash() -> None:
    """An auxiliary head that the loss never reaches is in the optimizer all the same."""

    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(8, 8, 3)
            self.unused_size = nn.Conv2d(8, 8, 7)

    for preset in sorted(PRESETS):
        torch.manual_seed(0)
        model = Unused()
        optimizer = OPTIMIZERS["nesterov"](model.parameters())
        pruner = ClickTrain(compression=5, preset=preset).attach(
            model, optimizer, epochs=1, steps_per_epoch=10
        )
        train(model, optimizer, pruner, 10)
        pruner.finish()
        nonzero = sum(int(w.count_nonzero()) for w in conv_weights(model).values())
        total = sum(w.numel() for w in conv_weights(model).values())
        assert total / nonzero == pytest.approx(5, rel=0.02)


def test_a_network_without_anything_to_prune_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(UserError, match="no convolution that ClickTrain can prune"):
        ClickTrain(compression=2).attach(
            model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=1, steps_per_epoch=10
        )


@pytest.mark.parametrize(
    "settings", [{"exclude": ("nothing",)}, {"include": ("nothing",)}, {"layers": {"nothing": 2.0}}], ids=str
)
def test_a_name_that_matches_no_layer_is_refused(settings: dict[str, Any]) -> None:
    model, optimizer = make()
    with pytest.raises(UserError, match="'nothing'"):
        ClickTrain(compression=4, **settings).attach(model, optimizer, epochs=1, steps_per_epoch=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "other"}, "preset"),
        ({"criterion": "other"}, "criterion"),
        ({"pool": "other"}, "pool"),
        ({"selection": "other"}, "selection"),
        ({"kernel_score": "other"}, "kernel_score"),
        ({"allocation": "other"}, "allocation"),
        ({"penalty": "other"}, "penalty"),
        ({"loss_margin_rule": "other"}, "loss_margin_rule"),
        ({"group": 0}, "group"),
        ({"entries": 0}, "entries"),
        ({"entries": 10}, "entries"),
        ({"patterns": 0}, "patterns"),
        ({"pool": "fixed", "patterns": 5}, "4, 8, 12 or 16"),
        ({"pool": "fixed", "patterns": 8, "entries": 3}, "entries"),
        ({"pool_length": -0.1}, "pool_length"),
        ({"latest_start": 0.9, "regularize_length": 0.5}, "add up"),
        ({"earliest_start": 0.9, "latest_start": 0.1}, "earliest_start"),
        ({"lasso": -1.0}, "lasso"),
        ({"loss_margin": -1.0}, "loss_margin"),
        ({"layers": {"deep": 0.5}}, "'deep'"),
        ({"allocation_floor": 1.5}, "allocation_floor"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClickTrain(**settings)


def test_a_shared_weight_counts_once_in_the_compression() -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)))
    model[2].weight = model[1].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = ClickTrain(compression=1.5).find_prunable(model, optimizer.param_groups[0]["params"])
    assert [layer.name for layer in found.layers] == ["3"]
    assert found.conv_weights == 3 * 8 * 8 * 9


def test_a_layer_ratio_below_what_patterns_give_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"layers asks for 1x in 1.*2\.25x"):
        ClickTrain(compression=2, layers={"1": 1.0}).attach(model, optimizer, epochs=1, steps_per_epoch=10)


def test_a_rejected_batch_with_infinite_importance_leaves_no_trace() -> None:
    target = PatternLayer(PrunableLayer("conv", nn.Conv2d(2, 2, 3), ADAPTERS[nn.Conv2d]), entries=4, group=1)
    selection = Selection(pools={(3, 3): fixed_pool(4)})
    selection.read(target, torch.ones(2, 2, 3, 3), torch.ones(()), True)
    selection.read(target, torch.full((2, 2, 3, 3), float("inf")), torch.zeros(()), True)
    assert torch.equal(selection.importance["conv"], torch.ones(2, 2, 3, 3))
    assert int(selection.votes["conv"].sum()) == 4


class EveryConvolution(nn.Module):
    """Convolutions of every dimension, forward and transposed, with and without groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped_up = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 3, padding=1)
        self.line = nn.Conv1d(4, 8, 5, padding=2)
        self.cube = nn.Conv3d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.grouped_up(F.relu(self.stem(x))))))
        x = F.relu(self.line(x.flatten(2)))
        return self.head(self.cube(x[:, :, None, :, None]).flatten(2).mean(2))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_convolutions_of_every_kind_are_pruned_in_their_own_shape(preset: Any) -> None:
    torch.manual_seed(0)
    model = EveryConvolution()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    method = ClickTrain(
        compression=4, preset=preset, earliest_start=0.1, latest_start=0.1, pool_length=0.2,
        finalize_length=0.2, regularize_length=0.2,
    )  # fmt: skip
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=20)
    train(model, optimizer, pruner, 20)
    pruner.finish()
    assert pruner.compression_ratio == pytest.approx(4, rel=0.05)
    assert set(pruner.masks) == {"grouped_up", "up", "line", "cube"}
    for name, mask in pruner.masks.items():
        module = model.get_submodule(name)
        assert mask.shape == module.weight.shape
        assert not module.weight[~mask].any()
        per_filter = ADAPTERS[type(module)].view(module, mask).flatten(1).sum(1)
        assert len(set(per_filter.tolist())) == 1, "each filter keeps as many weights"


def test_a_view_that_is_a_copy_is_written_back() -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, groups=2)
    layer = PatternLayer(PrunableLayer("up", conv, ADAPTERS[nn.ConvTranspose2d]), entries=4, group=1)
    assert not layer.is_view
    tensor = torch.zeros_like(conv.weight)
    layer.change_(lambda view, value: view[2].fill_(value), tensor, 3.0)
    view = layer.view(tensor)
    assert (view[2] == 3).all()
    assert int(tensor.count_nonzero()) == view[2].numel()
