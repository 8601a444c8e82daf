"""``bench runs --by-layer``: which layers are timed, at which shapes, and what is made of the times."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from clicktrain.bench import layers as module
from clicktrain.bench.gates import LayerGates, gate_text, with_gates
from clicktrain.bench.layers import PACKED, LayerTable, bench_layers, check_pruned, to_json
from clicktrain.bench.runs import RunRow, safe_layouts
from clicktrain.errors import UserError
from clicktrain.models import create_model
from clicktrain.sparsity.masks import conv_masks
from clicktrain.surgery import read_recipe
from clicktrain.surgery.layers import ChannelScatter, ChannelSelect
from clicktrain.train import from_dict, load_run
from clicktrain.train.fit import fit

COMMON: dict[str, Any] = {
    "model": "resnet8", "width": 0.5, "batch_size": 32, "learning_rate": 0.1, "threads": 1,
    "data": "synthetic:classes=3,size=8,channels=1,train=128,val=16", "operators": "reference",
}  # fmt: skip
CHANNELS: dict[str, Any] = {
    **COMMON, "method": "prunetrain", "coefficient": 0.085, "interval": 2, "epochs": 5,
}  # fmt: skip


def row_of(path: Path, what: str, pruned_name: str = "NCHW", dense_name: str = "NCHW") -> RunRow:
    """As `bench_runs` would have it, with times of a simple kind."""
    return RunRow(str(path), "method", what, 4, 10.0, dense_name, 6.0, pruned_name, 10 / 6, 0.5, 0.8)


def without_a_branch(folder: Path) -> Path:
    """Weights to begin with, in which one residual branch computes nothing."""
    torch.manual_seed(0)
    network = create_model("resnet8", num_classes=3, in_channels=1, width=0.5)
    weights = network.state_dict()
    weights["layer1.0.conv2.weight"].zero_()
    weights["layer1.0.bn2.weight"].zero_()
    path = folder / "weights.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module", params=["union", "gating", "layers-gone"])
def channels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    settings: dict[str, dict[str, Any]] = {"union": {}, "gating": {"scheme": "gating"}}
    settings["layers-gone"] = {"initial_weights": str(without_a_branch(path.parent))}
    fit(*from_dict({**CHANNELS, **settings[request.param]}), path)
    return path


@pytest.fixture(scope="module")
def trained(channels: Path) -> LayerTable:
    """The layers of a training step."""
    (table,) = bench_layers([row_of(channels, "training step")], rounds=1)
    return table


def literal_shapes(
    model: nn.Module, image: torch.Tensor
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Name -> (weight, input) by running every module's parent network once."""
    found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, own in model.named_modules():
        if isinstance(own, (nn.Conv2d, nn.Linear)):
            own.register_forward_hook(
                lambda m, args, out, name=name: found.__setitem__(
                    name, (tuple(m.weight.shape), tuple(args[0].shape))
                )
            )
    model.eval()(image)
    return found


@pytest.mark.long
@pytest.mark.parametrize("what", ["inference", "training step"])
def test_every_layer_at_its_own_shapes(channels: Path, trained: LayerTable, what: str) -> None:
    (table,) = [trained] if what == "training step" else bench_layers([row_of(channels, what)], rounds=1)
    image = torch.zeros(4, 1, 8, 8)
    dense = create_model("resnet8", num_classes=3, in_channels=1, width=0.5, stem="cifar")
    before = literal_shapes(dense, image)
    after = {name.replace(".layer", ""): shapes for name, shapes in
             literal_shapes(load_run(channels).model, image).items()}  # fmt: skip
    assert {layer.layer for layer in table.layers} == before.keys()
    assert any(plan.cuts for plan in read_recipe(channels / "surgery.json"))
    for layer in table.layers:
        assert (layer.dense_shape, layer.dense_input) == before[layer.layer]
        assert layer.dense_ms > 0
        if layer.layer in after:
            assert (layer.pruned_shape, layer.pruned_input) == after[layer.layer]
            assert layer.pruned_ms is not None
            assert layer.pruned_ms > 0
            assert layer.note == ""
        else:
            assert (layer.pruned_shape, layer.pruned_input, layer.pruned_ms, layer.pruned_flops) == (
                None,
                None,
                0,
                0,
            )
            assert layer.note == "removed"
    assert sum(layer.flops_share for layer in table.layers) == pytest.approx(1)
    cost = {layer.layer: layer for layer in table.layers}["layer1.0.conv1"]
    passes = 1 if what == "inference" else 3
    assert cost.dense_flops == passes * 2 * 8 * 8 * 9 * 64
    assert {layer.layer: layer for layer in table.layers}["conv1"].dense_flops == min(
        passes, 2
    ) * 2 * 8 * 9 * 64


def gated_network() -> nn.Module:
    """A stage of 8 channels whose branch works on 3 of them, makes 5 and adds these at their places."""
    torch.manual_seed(0)
    network = create_model("resnet8", num_classes=3, in_channels=1, width=0.5, stem="cifar")
    select = ChannelSelect((0, 3, 6), 8)
    conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    block = network.get_submodule("layer1.0")
    block.conv1 = nn.Sequential(OrderedDict(select=select, layer=conv))
    block.conv2 = nn.Conv2d(8, 5, 3, padding=1, bias=False)
    scatter = ChannelScatter((1, 2, 4, 5, 7), 8)
    block.bn2 = nn.Sequential(OrderedDict(layer=nn.BatchNorm2d(5), scatter=scatter))
    return network


Call = tuple[str, tuple[int, ...], torch.dtype, bool]


def watch(network: nn.Module) -> Callable[[Callable[[], object]], list[Call]]:
    """A function that says what modules of a network, and of copies of it, read while it calls another."""
    seen: list[Call] = []

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
            seen.append((name, tuple(args[0].shape), args[0].dtype, args[0].requires_grad))

        return note  # functions are not copied with a module

    for name, own in network.named_modules():
        if not [*own.children()]:
            own.register_forward_hook(hook(name))

    def of(call: Callable[[], object]) -> list[Call]:
        seen.clear()
        call()
        return list(seen)

    return of


SELECT, FIRST, LAST, SCATTER = (
    f"layer1.0.{name}" for name in ("conv1.select", "conv1.layer", "conv2", "bn2.scatter")
)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "NCHW bf16"])
def test_select_and_scatter_belong_to_the_time_of_their_layer(layout: str) -> None:
    network = gated_network()
    reads_of = watch(network)
    x = torch.zeros(4, 1, 8, 8)
    side = module._side(network, x, {}, layout, module.TRAINING)
    assert side.gates(FIRST) == LayerGates(select=SELECT)
    assert side.gates(LAST) == LayerGates(scatter=SCATTER)
    assert set(side.calls.gates) == {FIRST, LAST}
    assert gate_text(network, side.gates(FIRST)) == ("select 3 of 8",)
    assert gate_text(network, side.gates(LAST)) == ("scatter 5 of 8",)
    for layer, expected, gates in (
        (FIRST, [(SELECT, 8), (FIRST, 3)], [(SELECT, 8)]),
        (LAST, [(LAST, 8), (SCATTER, 5)], [(SCATTER, 5)]),
        ("layer2.0.conv1", [("layer2.0.conv1", 8)], []),
    ):
        for call, wanted in ((side.call(layer), expected), (side.gate_calls(layer), gates)):
            seen = reads_of(call)
            assert [(name, shape) for name, shape, *_ in seen] == [(n, (4, c, 8, 8)) for n, c in wanted]
            assert all(needed for *_, needed in seen)  # the image's gradient alone is not needed
            if layout.endswith("bf16"):
                assert {dtype for _, _, dtype, _ in seen} <= {torch.bfloat16}


@pytest.mark.parametrize("training", [False, True])
def test_what_is_timed_computes_what_the_network_does(training: bool) -> None:
    """Select, layer and scatter in a row: output and gradients of the stage's tensors, by hand."""
    network = gated_network()
    x, gradient = torch.randn(2, 8, 8, 8, requires_grad=True), torch.randn(2, 8, 8, 8)
    first, last = (network.get_submodule(name) for name in (FIRST, LAST))
    assert isinstance(first, nn.Conv2d)
    assert isinstance(last, nn.Conv2d)
    y = with_gates(network, FIRST, LayerGates(select=SELECT))(x)
    torch.testing.assert_close(y, F.conv2d(x[:, [0, 3, 6]], first.weight, padding=1))
    z = with_gates(network, LAST, LayerGates(scatter=SCATTER))(x)
    expected = torch.zeros(2, 8, 8, 8)
    expected[:, [1, 2, 4, 5, 7]] = F.conv2d(x, last.weight, padding=1).detach()
    torch.testing.assert_close(z.detach(), expected)
    if training:
        (dx,) = torch.autograd.grad(y, x, gradient)
        full = first.weight.new_zeros(8, 8, 3, 3)
        full[:, [0, 3, 6]] = first.weight.detach()  # the same convolution of all channels
        torch.testing.assert_close(dx, F.conv_transpose2d(gradient, full, padding=1))
        (dx,) = torch.autograd.grad(z, x, gradient)
        own = gradient[:, [1, 2, 4, 5, 7]]
        torch.testing.assert_close(dx, F.conv_transpose2d(own, last.weight, padding=1))


def test_gates_of_a_finished_run(channels: Path, trained: LayerTable) -> None:
    """Each gate of its network belongs to one layer, whose time it is part of."""
    gates = {n: m for n, m in load_run(channels).model.named_modules() if isinstance(m, ChannelSelect)}
    assert bool(gates) == any(plan.gates for plan in read_recipe(channels / "surgery.json"))
    texts = [text for layer in trained.layers for text in layer.gates]
    written = [gate.extra_repr() for gate in gates.values()]
    assert sorted(text.partition(" ")[2] for text in texts) == sorted(written)
    selects = {name.removesuffix(".select") for name in gates if name.endswith(".select")}
    for layer in trained.layers:
        assert layer.gate_ms is not None
        assert (layer.gate_ms > 0) == bool(layer.gates)
        assert (layer.layer in selects) == any(text.startswith("select") for text in layer.gates)
        for text in layer.gates:
            kind, channels_left, *_ = text.split()
            assert layer.pruned_shape is not None
            assert int(channels_left) == layer.pruned_shape[1 if kind == "select" else 0]


def test_what_is_made_of_the_times(trained: LayerTable) -> None:
    table = trained
    timed = [layer.pruned_ms for layer in table.layers if layer.pruned_ms is not None]
    assert len(timed) == len(table.layers)
    assert table.dense_rest_ms == pytest.approx(
        table.dense_ms - sum(layer.dense_ms for layer in table.layers)
    )
    assert table.pruned_rest_ms == pytest.approx(table.pruned_ms - sum(timed))
    assert table.rest_excess_ms == pytest.approx(table.pruned_rest_ms - 0.5 * table.dense_rest_ms)
    for layer, own in zip(table.layers, timed, strict=True):
        left = layer.pruned_flops / layer.dense_flops
        assert layer.time_share == pytest.approx(layer.dense_ms / table.dense_ms)
        assert layer.excess_ms == pytest.approx(own - left * layer.dense_ms)
        if left == 1:
            assert layer.share_of_saving is None
        else:
            assert layer.share_of_saving == pytest.approx((1 - own / layer.dense_ms) / (1 - left))
    assert len(to_json([table])[0]["layers"]) == len(table.layers)


@pytest.mark.parametrize("name", ["conv1", "layer3.0.conv2"])
def test_layers_run_in_the_order_and_precision_of_the_network(name: str) -> None:
    network = create_model("resnet8", num_classes=3, in_channels=1, width=0.5, stem="cifar")
    seen: list[tuple[bool, torch.dtype, bool]] = []

    def note(conv: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        last = out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
        seen.append((last, out.dtype, args[0].requires_grad))

    network.get_submodule(name).register_forward_hook(note)  # copies have it too
    x = torch.zeros(4, 1, 8, 8)
    for layout, what, expected in (
        ("NCHW", "inference", (False, torch.float32, False)),
        ("channels_last", "training step", (True, torch.float32, name != "conv1")),
        ("channels_last bf16", "inference", (True, torch.bfloat16, False)),
    ):
        side = module._side(network, x, {}, layout, what)
        seen.clear()
        side.call(name)()
        assert set(seen) == {expected}


@pytest.mark.parametrize(
    ("conv", "safe"),
    [
        (nn.Conv2d(5, 8, 1, stride=2), False),
        (nn.Conv2d(64, 64, 1, stride=2, groups=16), False),
        (nn.Conv2d(5, 8, 1), True),
        (nn.Conv2d(5, 8, 3, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2), True),
    ],
    ids=["narrow shortcut", "grouped", "not strided", "3x3", "wide"],
)
def test_no_training_in_channels_last_where_it_computes_rubbish(conv: nn.Module, safe: bool) -> None:
    layouts = safe_layouts(nn.Sequential(nn.ReLU(), conv))
    assert layouts == (("NCHW", "channels_last") if safe else ("NCHW",))


def test_packed_layers_are_left_out_of_an_accelerated_network(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    fit(*from_dict({**COMMON, "method": "campfire", "sparsity": 0.8, "era": (0, 1), "epochs": 2}), path)
    fast, plain = bench_layers(
        [row_of(path, "inference", "accelerated"), row_of(path, "inference", "NCHW")], rounds=1
    )
    masked = conv_masks(load_run(path).masks)  # fully connected layers stay as they are
    assert masked
    for layer in fast.layers:
        assert (layer.pruned_ms is None) == (layer.note == PACKED) == (layer.layer in masked)
        assert layer.layer not in masked or layer.pruned_flops < layer.dense_flops
    assert fast.pruned_rest_ms is fast.rest_excess_ms is fast.rest_share_of_saving is None
    assert (fast.dense_ms, fast.pruned_ms) == (10.0, 6.0)
    assert all(layer.pruned_ms for layer in plain.layers)  # zeros in place: dense layers
    assert plain.pruned_rest_ms is not None


def test_a_run_that_pruned_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dense"
    fit(*from_dict({**COMMON, "method": "dense", "epochs": 1}), path)
    with pytest.raises(UserError, match=r"nothing was pruned in .*dense \(method dense\)"):
        check_pruned([str(path)])
    with pytest.raises(UserError, match="not the folder of a run"):
        check_pruned([str(tmp_path)])
