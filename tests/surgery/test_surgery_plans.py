"""Groups by hand, plans as data, rounding, and what users are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from odd_graphs import CLASSES, assert_same_function, images, masked, network
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.surgery import (
    Cut,
    SurgeryPlan,
    apply_surgery_,
    channel_groups,
    plan_from_keep,
    plan_from_zeros,
)
from clicktrain.surgery.layers import ChannelScatter, ChannelSelect


def group_called(model: nn.Module, name: str) -> Any:
    return next(group for group in channel_groups(model, images(2)) if group.name == name)


def test_a_residual_stage_is_one_group() -> None:
    group = group_called(network("resnet20"), "conv1.weight:0")
    weights = [(m.name, m.dim) for m in group.members if m.name.endswith("weight") and "bn" not in m.name]
    assert sorted(weights) == sorted(
        [
            ("conv1.weight", 0),
            *[(f"layer1.{i}.conv{c}.weight", 2 - c) for i in range(3) for c in (1, 2)],
            ("layer2.0.downsample.0.weight", 1),
            ("layer2.0.conv1.weight", 1),
        ]
    )
    assert group.size == 16
    assert group.fixed is None


def test_concatenation_and_flatten_have_offsets() -> None:
    model = network("Concatenation")
    first, second = group_called(model, "conv1.weight:0"), group_called(model, "conv2.weight:0")
    columns = {m.name: m.indices for m in second.members if m.dim == 1}
    assert columns["hidden.weight"][0] == (44, 45, 46, 47)
    columns = {m.name: m.indices for m in first.members if m.dim == 1}
    assert columns == {
        "conv2.weight": tuple((6 + i,) for i in range(5)),
        "hidden.weight": tuple(tuple(range(4 * (6 + i), 4 * (7 + i))) for i in range(5)),
    }


def test_inputs_and_outputs_are_fixed() -> None:
    for group in channel_groups(network("TwoAdditions"), images(2)):
        members = {(m.name, m.dim) for m in group.members}
        if ("stem.0.weight", 1) in members:
            assert group.fixed == "it is an input of the network"
        elif ("fc.weight", 0) in members:
            assert group.fixed == "it is an output of the network"
        else:
            assert group.fixed is None


class Strange(nn.Module):
    """Things that are not understood, one by one, between two convolutions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.register_buffer("template", torch.ones(8, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        match self.kind:
            case "group norm":
                x = self.norm(x)
            case "shuffle":
                n, c, h, w = x.shape
                x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            case "slice":
                x = torch.cat([x[:, :4], x[:, 4:]], 1)
            case "chunk":
                a, b = x.chunk(2, 1)
                x = torch.cat([a, b], 1)
            case "softmax":
                x = x.softmax(1)
            case "mean over channels":
                x = x * x.mean(1, keepdim=True)
            case "written size":
                x = x.view(-1, 8, 16, 16)
            case "functional weight":
                x = F.conv2d(x, self.template)
            case "channel count":
                x = x / x.shape[1]
            case "data":
                x = self.helper(x)
        return self.conv2(x).mean((2, 3))

    def helper(self, x: Tensor) -> Tensor:
        return torch.flip(x, (1,))


@pytest.mark.parametrize(
    "kind",
    """group norm,shuffle,slice,chunk,softmax,mean over channels,written size,functional weight,channel count,
data""".replace("\n", "").split(","),
)
def test_what_is_not_understood_keeps_its_channels_and_says_why(kind: str) -> None:
    model = Strange(kind).double()
    with torch.no_grad():
        model.conv1.weight[3:] = 0
        model.conv1.bias[3:] = 0  # type: ignore[index]
        model.conv2.weight[:, 3:] = 0
    before = copy.deepcopy(model)
    plan = plan_from_zeros(model, images(2))
    assert not plan.cuts
    assert plan.layers[0].stays
    apply_surgery_(plan, model)
    assert_same_function(model, before)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.odd = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), Branching()
        self.c, self.d = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.odd(self.b(self.a(x)))))


def test_an_untraceable_model_is_a_clear_error() -> None:
    with pytest.raises(UserError, match=r"torch\.fx cannot trace its forward"):
        plan_from_zeros(Branching(), images(2))


def test_an_untraceable_module_inside_keeps_only_its_neighbours() -> None:
    fixed = {group.name: group.fixed for group in channel_groups(Mixed().double(), images(2))}
    assert fixed["a.weight:0"] is None
    assert fixed["c.weight:0"] is None
    assert "odd (Branching)" in str(fixed["b.weight:0"])


def test_analysis_leaves_no_trace() -> None:
    model = network("Concatenation").train()
    calls: list[str] = []
    model.register_forward_hook(lambda *_: calls.append("model"))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plan_from_zeros(model, images(2) if state is None else torch.ones(2, 3, 16, 16).double())
    assert not calls
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(images())
    assert calls == ["model"]


@pytest.mark.parametrize("scheme", ["union", "gating"])
def test_widths_are_rounded_up_with_the_largest_of_the_dead(scheme: Any) -> None:
    model, alive = masked("vgg11")
    with torch.no_grad():
        dead = (~alive["features.4.weight:0"]).nonzero().flatten()
        weight = model.get_parameter("features.8.weight")
        weight[:, dead] = 0
        weight[0, dead[-1]] = 5e-5
    before = copy.deepcopy(model)
    plan = plan_from_zeros(model, images(2), round_to=8, scheme=scheme)
    kept = plan.cuts_of("features.4.weight")[0].keep
    living = int(alive["features.4.weight:0"].sum())
    assert len(kept) % 8 == 0
    if living % 8:
        assert int(dead[-1]) in kept
    apply_surgery_(plan, model)
    assert all(m.out_channels % 8 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))
    assert_same_function(model, before, tolerance=1e-3)


def test_a_group_that_is_all_zero_keeps_a_channel() -> None:
    model = network("vgg11")
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    before = copy.deepcopy(model)
    apply_surgery_(plan_from_zeros(model, images(2)), model)
    assert {m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)} == {1}
    assert_same_function(model, before)


def test_gates_select_and_scatter() -> None:
    model: Any = network("resnet20")
    with torch.no_grad():
        model.layer1[1].conv1.weight[:, :6] = 0
        model.layer1[1].conv2.weight[4:] = 0
        model.layer1[1].bn2.bias[4:] = 0
        model.layer1[1].bn2.running_mean[4:] = 0
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not plan_from_zeros(model, images(2))
    plan = plan_from_zeros(model, images(2), scheme="gating")
    assert [(g.name, g.kind, len(g.channels), g.size) for g in plan.gates] == [
        ("layer1.1.conv1", "select", 10, 16),
        ("layer1.1.bn2", "scatter", 4, 16),
    ]
    assert plan.new_name("layer1.1.conv1.weight") == "layer1.1.conv1.layer.weight"
    apply_surgery_(plan, model, optimizer)
    assert_same_function(model, before)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    # A later reconfiguration cuts the stage under the gates.
    keep = {"conv1": torch.arange(16) % 3 > 0}
    apply_surgery_(plan_from_keep(model, images(2), keep), model)
    model(images())
    select, scatter = model.layer1[1].conv1.select, model.layer1[1].bn2.scatter
    assert select.channels.tolist() == [4, 5, 6, 7, 8, 9]
    assert scatter.channels.tolist() == [0, 1]
    assert select.size == scatter.size == 10


# PyTorch's exporter about itself.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_gates_and_remnants_export(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model: Any = network("resnet20").float().eval()
    nn.init.zeros_(model.layer2[1].conv2.weight)
    with torch.no_grad():
        model.layer1[1].conv1.weight[:, :6] = 0
    plan = plan_from_zeros(model, torch.zeros(2, 3, 16, 16), scheme="gating")
    apply_surgery_(plan, model)
    assert plan.gates
    assert plan.removed_layers
    x = images().float()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), str(path), dynamo=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-4)


def test_select_and_scatter_are_inverse() -> None:
    x = torch.randn(2, 3, 4, 4)
    wide = ChannelScatter((1, 4, 5), 7)(x)
    assert wide.shape == (2, 7, 4, 4)
    assert torch.equal(ChannelSelect((1, 4, 5), 7)(wide), x)
    assert wide[:, [0, 2, 3, 6]].abs().sum() == 0


def test_keep_masks_of_layers_that_meet_keep_their_union() -> None:
    model = network("resnet20")
    rest = torch.arange(16) >= 8
    plan = plan_from_keep(model, images(2), {"conv1": rest, "layer1.0.conv2": torch.arange(16) < 2})
    assert plan.cuts_of("layer1.2.conv2.weight")[0].keep == (0, 1, *range(8, 16))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nothing": torch.ones(8, dtype=torch.bool)}, "no layer or group"),
        ({"conv1": torch.ones(8, dtype=torch.bool)}, "16 channels"),
        ({"conv1": torch.zeros(16, dtype=torch.bool)}, "keep at least one"),
        ({"fc": torch.arange(5) > 2}, "output of the network"),
    ],
)
def test_wrong_masks_are_refused(keep: dict[str, Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_from_keep(network("resnet20"), images(2), keep)


def test_wrong_plans_are_refused_and_change_nothing() -> None:
    model = network("resnet20")
    before = copy.deepcopy(model.state_dict())
    good = plan_from_keep(model, images(2), {"conv1": torch.arange(16) < 8})
    half = SurgeryPlan((*good.cuts, Cut("fc.bias", 0, (0, 1), 5)))
    for plan, message in [
        (SurgeryPlan((Cut("nowhere", 0, (0,), 2),)), "no nowhere"),
        (SurgeryPlan((Cut("conv1.weight", 0, (0,), 32),)), "shape"),
        (SurgeryPlan((Cut("conv1.weight", 0, (), 16),)), "keeps no channels"),
        (half, "fc alike"),
    ]:
        with pytest.raises(UserError, match=message):
            apply_surgery_(plan, model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match="not a surgery plan"):
        SurgeryPlan.from_json({"version": 2})
    for version in (1, 99):
        with pytest.raises(UserError, match=f"format version {version}; this version reads 2"):
            SurgeryPlan.from_json({"version": version})
    with pytest.raises(UserError, match="scheme"):
        plan_from_zeros(model, images(2), scheme="other")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="inside"):
        plan_from_zeros(nn.parallel.DataParallel(model), images(2))


def test_tied_weights_stay_tied() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 1))
    model.append(nn.Conv2d(6, 2, 1)).double()
    model[3].weight = model[1].weight
    keep = {"0": torch.tensor([True, False, True, True, False, True])}
    apply_surgery_(plan_from_keep(model, images(2), keep), model)
    assert model[3].weight is model[1].weight
    assert model[3].weight.shape == (4, 4, 1, 1)
    assert model[3].out_channels == model[1].in_channels == 4
    model(images())


@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_a_group_that_comes_down_to_one_channel_remains(inputs: int, outputs: int) -> None:
    """Not to be taken for a depthwise layer, of which whole groups go; a second plan may then do that."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 1, groups=2), nn.ReLU(), nn.Conv2d(6, CLASSES, 1), nn.Flatten()
    ).double()
    fresh = copy.deepcopy(model)
    keep = {"0": torch.arange(4) % 2 < inputs, "1": torch.arange(6) % 3 < outputs}
    plans = [plan_from_keep(model, images(2), keep)]
    apply_surgery_(plans[0], model)
    grouped: Any = model[1]
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 2 * inputs, 2 * outputs)
    assert grouped.weight.shape == (2 * outputs, inputs, 1, 1)
    assert plans[0].layers[1].inputs == (4, 2 * inputs)
    if inputs == 1:
        plans.append(plan_from_keep(model, images(2), {"0": torch.tensor([True, False])}))
        apply_surgery_(plans[1], model)
        assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (1, 1, outputs)
    for plan in plans:
        apply_surgery_(SurgeryPlan.from_json(plan.to_json()), fresh)
    assert_same_function(model, fresh)
