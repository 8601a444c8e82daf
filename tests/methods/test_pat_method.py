"""PaT in somebody's own loop: when it decides, what goes, and what is left (When to Prune?, section 3)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import Campfire, ClickTrain, PaT
from clicktrain.errors import UserError
from clicktrain.methods import Method, Pruner
from clicktrain.methods.base import RunLength
from clicktrain.methods.triggers import StructureWatch
from clicktrain.surgery import write_recipe

PER_EPOCH = 4


class Block(nn.Module):
    """A stem and a residual branch: the outputs of ``stem`` and ``second`` can only go together."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=not norm)
        self.bn = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.first = nn.Conv2d(6, 10, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(10) if norm else nn.Identity()
        self.second = nn.Conv2d(10, 6, 3, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.second(F.relu(self.bn1(self.first(x))))))
        return self.head(x.mean(dim=(2, 3)))


STAGE, INSIDE = "stem.weight:0", "first.weight:0"


def make(norm: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Block(norm)
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def attach(method: PaT, epochs: int = 6, norm: bool = True, example: bool = True) -> Pruner:
    model, optimizer = make(norm)
    blank = torch.zeros(1, 3, 6, 6) if example else None
    return method.attach(model, optimizer, epochs=epochs, steps_per_epoch=PER_EPOCH, example=blank)


def gradients(pruner: Pruner, number: int) -> None:
    """Backward pass of batch ``number``."""
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(0, 4, (8,), generator=generator)
    x = torch.randn(8, 3, 6, 6, generator=generator) + y.view(8, 1, 1, 1) * 0.5
    loss = F.cross_entropy(pruner.model(x), y)
    loss.backward()
    pruner.observe(loss)


def train(pruner: Pruner, until: int, start: int = 0) -> Pruner:
    for number in range(start, until):
        gradients(pruner, number)
        pruner.optimizer.step()
        pruner.optimizer.zero_grad()
    return pruner


def events(pruner: Pruner, name: str) -> list[dict[str, Any]]:
    return [event for event in pruner.events if event["event"] == name]


def channels(model: nn.Module) -> tuple[int, int]:
    """Of the stage and inside the branch; everything around them must agree."""
    assert isinstance(model, Block)
    stage, inside = model.stem.out_channels, model.first.out_channels
    assert model.second.out_channels == model.first.in_channels == model.head.in_features == stage
    assert model.second.in_channels == inside
    return stage, inside


def test_the_course_of_a_run() -> None:
    pruner = attach(
        PaT(prune_ratio=0.5, prune_ratio_of="neurons", policy="epoch", prune_epoch=1, prune_steps=2), epochs=4
    )
    optimizer = pruner.optimizer
    assert "16 neurons, 22 filters: 8 neurons are removed" in str(pruner.plan())
    train(pruner, PER_EPOCH)
    assert pruner.stage == "prune"
    assert channels(pruner.model) == (6, 10)
    train(pruner, PER_EPOCH + 2, PER_EPOCH)
    event = events(pruner, "pruned")[-1]
    assert event["neurons_pruned"] == 16 - round(16 * 0.5**0.5) == 5
    m: Any = pruner.model
    silent = [layer.weight.flatten(1).eq(0).all(dim=1) for layer in (m.stem, m.second)]
    assert torch.equal(*silent), "coupled filters go together"
    assert sum(int(s.sum()) for s in (silent[0], m.first.weight.flatten(1).eq(0).all(dim=1))) == 5
    train(pruner, PER_EPOCH + 3, PER_EPOCH + 2)
    now = [norm.weight.eq(0) & norm.bias.eq(0) for norm in (m.bn, m.bn1)]
    assert sum(int(silent.sum()) for silent in now) == 5, "the steps between bring nothing back"
    train(pruner, 2 * PER_EPOCH, PER_EPOCH + 3)
    assert pruner.stage == "sparse"
    stage, inside = channels(pruner.model)
    assert stage + inside == 8
    event = events(pruner, "reconfigured")[0]
    assert event["epoch"] == 2.0
    assert (event["neurons"], event["neurons_pruned"]) == (16, 8)
    assert event["structure"] == {STAGE: stage, INSIDE: inside}
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in pruner.model.parameters()), (
        "momentum shrank too"
    )
    before = m.first.weight.detach().clone()
    train(pruner, 4 * PER_EPOCH, 2 * PER_EPOCH)
    assert not torch.equal(before, m.first.weight)
    assert channels(pruner.finish()) == (stage, inside)
    assert len(events(pruner, "reconfigured")) == 1


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.75, 0.875])
@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_the_pruned_count_is_exact(ratio: float, criterion: Any) -> None:
    settings: Any = {"criterion": criterion, "policy": "epoch", "prune_epoch": 0, "prune_steps": 3}
    method = PaT(prune_ratio=ratio, prune_ratio_of="neurons", **settings)
    pruner = train(attach(method, epochs=2), PER_EPOCH)
    assert sum(channels(pruner.model)) == 16 - round(ratio * 16)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.75])
@pytest.mark.parametrize("criterion", ["taylor", "magnitude"])
def test_the_ratio_is_that_of_filters(ratio: float, criterion: Any) -> None:
    """|P| / |F| of Eq. (1): the 6 neurons of the stage are 12 filters, those of the branch 10."""
    method = PaT(prune_ratio=ratio, criterion=criterion, policy="epoch", prune_epoch=0, prune_steps=3)
    pruner = attach(method, epochs=2)
    assert f"16 neurons, 22 filters: {round(22 * ratio)} filters are removed" in str(pruner.plan())
    train(pruner, PER_EPOCH)
    stage, inside = channels(pruner.model)
    gone = 22 - 2 * stage - inside
    assert 0 <= gone - round(22 * ratio) < 2, "met within one group"
    event = events(pruner, "reconfigured")[0]
    assert (event["filters"], event["filters_pruned"]) == (22, gone)
    assert event["prune_ratio"] == gone / 22
    target = pruner.outcome().targets[0]
    assert (target.what, target.reached) == ("filters removed", gone / 22)


def test_stages_that_matter_do_not_change_the_share_of_filters_that_goes() -> None:
    """Where neurons of one filter go, those of a stage count twice in |F|: 30% is 7 of 22, not 5 of 16."""
    gone = {}
    for of in ("filters", "neurons"):
        method = PaT(prune_ratio=0.3, prune_ratio_of=of, criterion="magnitude", policy="epoch", prune_epoch=0)
        pruner = attach(method, epochs=2)
        m: Any = pruner.model
        with torch.no_grad():
            for layer in (m.stem, m.second):
                layer.weight.mul_(10)
        stage, inside = channels(train(pruner, PER_EPOCH).model)
        assert stage == 6
        gone[of] = 22 - 2 * stage - inside
    assert gone == {"filters": 7, "neurons": 5}


def test_stable_structures_start_it_and_so_does_the_last_moment() -> None:
    method = PaT(epi_threshold=0.0, epi_window=1, epi_history=0, latest_start=0.8)
    pruner = train(attach(method, epochs=10), 2 * PER_EPOCH)
    trigger = events(pruner, "trigger")[0]
    assert trigger["prune_epoch"] == 2, "the first epoch that can be compared with another"
    assert "the structure is stable" in trigger["reason"]
    late = train(attach(PaT(epi_threshold=1.0, epi_window=4, latest_start=0.3), epochs=10), 3 * PER_EPOCH)
    assert late.stage == "prune"
    assert "latest" in events(late, "trigger")[0]["reason"]


@pytest.mark.parametrize("epochs", [10, 13, 15, 16, 20, 33, 44, 90])
def test_the_indicator_does_not_fire_at_once(epochs: int) -> None:
    """Even where every structure is stable it takes several, and an earlier indicator to compare with."""
    method = PaT(epi_threshold=0.0, policy="epi")
    length = RunLength(epochs, PER_EPOCH)
    start = method.start(length)
    assert start.latest == round(0.34 * epochs)
    if start.latest <= 2 + 1 + 1:
        with pytest.warns(UserWarning, match="EPI decides nothing in so short a run"):
            attach(method, epochs=epochs)
        return
    pruner = attach(method, epochs=epochs)
    watch = StructureWatch()
    for epoch in range(1, start.latest + 1):
        watch.add({"a": 3, "b": 5}, start.window, 0.0, "taylor")
        if start.due(epoch, watch, ()) is not None:
            break
    assert start.window >= 2
    assert start.compared >= 1
    assert epoch == start.window + start.compared + 1 < start.latest
    expected = {90: 11, 44: 11, 33: 7, 20: 5, 16: 4, 15: 4}
    assert epoch == expected[epochs], "of 90 epochs 11, where ResNet-34 begins in Table 2"
    assert pruner.stage == "dense"


@pytest.mark.parametrize(
    "method", [ClickTrain(trigger="epi", compression=3), Campfire(trigger="epi", era=(3, 5))]
)
def test_other_methods_warn_too(method: Method[Any]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(1, 3, 6, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match="begins in epoch [34] at the latest"):
        method.attach(model, optimizer, epochs=10, steps_per_epoch=4)


def test_other_policies() -> None:
    method = PaT(policy="random", policy_seed=3, latest_start=0.5)
    pruner = attach(method, epochs=8)
    drawn = method.start(pruner.length).drawn_epoch()
    assert 0 <= drawn <= 4
    assert {PaT(policy="random", policy_seed=s).start(pruner.length).drawn_epoch() for s in range(40)} == {
        0,
        1,
        2,
        3,
    }
    train(pruner, (drawn + 1) * PER_EPOCH)
    assert events(pruner, "reconfigured")[0]["epoch"] == drawn + 1
    slope = train(
        attach(PaT(policy="loss_slope", loss_slope=99.0, loss_slope_epochs=1), epochs=8), 2 * PER_EPOCH
    )
    assert events(slope, "trigger")[0]["reason"].startswith("the loss fell by")
    assert slope.stage == "prune"


@pytest.mark.parametrize("steps", [1, 3])
def test_before_training_no_weight_moves(steps: int) -> None:
    method = PaT(policy="init", prune_steps=steps, init_batches=3, prune_ratio=0.5, prune_ratio_of="neurons")
    pruner = attach(method)
    initial = {name: p.detach().clone() for name, p in pruner.model.named_parameters()}
    train(pruner, 2)
    gone = {
        name
        for name, p in pruner.model.named_parameters()
        if not torch.equal(p[p != 0], initial[name][p != 0])
    }
    assert gone == set()
    train(pruner, 3, 2)
    assert pruner.stage == "sparse"
    assert sum(channels(pruner.model)) == 8
    plan = pruner.plans[0]
    for name, parameter in pruner.model.named_parameters():
        assert torch.equal(parameter, plan.shrink(name, initial[name])), name
    assert not any(pruner.optimizer.state.get(p) for p in pruner.model.parameters())
    assert "before training" in events(pruner, "trigger")[0]["reason"]
    train(pruner, 4, 3)
    assert not torch.equal(pruner.model.first.weight, plan.shrink("first.weight", initial["first.weight"]))


def test_rewinding_brings_the_initial_weights_back() -> None:
    model, _ = make()
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method = PaT(policy="epoch", prune_epoch=1, rewind=True, prune_ratio=0.5)
    pruner = train(attach(method, epochs=4), 2 * PER_EPOCH)
    plan = pruner.plans[0]
    for name, tensor in pruner.model.state_dict().items():
        assert torch.equal(tensor, plan.shrink(name, initial[name])), name
    assert not any(pruner.optimizer.state.get(p) for p in pruner.model.parameters())
    train(pruner, 4 * PER_EPOCH, 2 * PER_EPOCH)


def test_the_structure_of_another_run(tmp_path: Path) -> None:
    first = train(attach(PaT(policy="epoch", prune_epoch=1, prune_ratio=0.5), epochs=4), 3 * PER_EPOCH)
    recipe = tmp_path / "surgery.json"
    write_recipe(recipe, first.plans)
    model, _ = make()
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    ticket = train(attach(PaT(policy="epoch", prune_epoch=0, structure_from=str(recipe)), epochs=4), 1)
    assert ticket.plans == first.plans
    for name, parameter in ticket.model.named_parameters():
        assert torch.equal(parameter, ticket.plans[0].shrink(name, initial[name])), "a lottery ticket"
    method = PaT(policy="epoch", prune_epoch=1, structure_from=str(recipe), structure_shuffle=1)
    other = train(attach(method, epochs=4), PER_EPOCH)
    assert channels(other.model) == channels(first.model)
    assert other.plans != first.plans
    recipe.write_text(json.dumps([]))
    whole = train(attach(PaT(policy="epoch", prune_epoch=0, structure_from=str(recipe)), epochs=2), 1)
    assert channels(whole.model) == (6, 10)


@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")  # widths in twos
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"criterion": "magnitude", "rewind": True},
        {"criterion": "taylor_weights", "round_to": 2, "exclude": ("first",)},
    ],
    ids=["taylor", "magnitude-rewind", "weights"],
)
@pytest.mark.parametrize("stop", [2, 5, 6, 7, 9])
def test_goes_on_bit_for_bit(settings: dict[str, Any], stop: int) -> None:
    method = PaT(prune_ratio=0.4, policy="epoch", prune_epoch=1, prune_steps=2, **settings)
    whole = train(attach(method, epochs=3), 3 * PER_EPOCH)
    first = train(attach(method, epochs=3), stop)
    second = attach(method, epochs=3)
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    train(second, 3 * PER_EPOCH, stop)
    finished = second.finish().state_dict()
    for name, tensor in whole.finish().state_dict().items():
        assert torch.equal(tensor, finished[name]), name
    assert [e for e in whole.events if e["event"] != "reconfigured"] == [
        e for e in second.events if e["event"] != "reconfigured"
    ]
    assert whole.plans == second.plans


def test_what_is_excluded_stays_and_widths_are_multiples() -> None:
    method = PaT(prune_ratio=0.3, policy="epoch", prune_epoch=0, exclude=("stem",))
    assert channels(train(attach(method), PER_EPOCH).model) == (6, 10 - round(0.3 * 10))
    method = PaT(prune_ratio=0.4, policy="epoch", prune_epoch=0, round_to=2, prune_steps=3)
    stage, inside = channels(train(attach(method), PER_EPOCH).model)
    assert stage % 2 == inside % 2 == 0
    method = PaT(prune_ratio=0.6, policy="epoch", prune_epoch=0, min_channels=3)
    assert min(channels(train(attach(method), PER_EPOCH).model)) >= 3


def test_networks_without_batch_norm_and_without_an_example() -> None:
    method = PaT(prune_ratio=0.5, prune_ratio_of="neurons", policy="epoch", prune_epoch=1)
    pruner = attach(method, norm=False, example=False)
    assert "after the first batch" in str(pruner.plan())
    train(pruner, 2 * PER_EPOCH)
    assert sum(channels(pruner.model)) == 8


def test_a_run_that_is_cut_short_ends_pruned() -> None:
    pruner = train(attach(PaT(prune_ratio=0.5, prune_ratio_of="neurons", latest_start=1.0), epochs=9), 2)
    with pytest.warns(UserWarning, match=r"ended after 0\.5 of the 9 epochs"):
        model = pruner.finish()
    assert sum(channels(model)) == 8
    assert events(attach(PaT(), epochs=9), "reconfigured") == []


def test_gradient_accumulation_over_the_end_of_an_epoch() -> None:
    method = PaT(prune_ratio=0.5, prune_ratio_of="neurons", policy="epoch", prune_epoch=1, prune_steps=2)
    pruner = attach(method, epochs=4)
    for number in range(3 * PER_EPOCH):
        gradients(pruner, number)
        if number % 3 == 2:  # steps after batches 3, 6, 9, 12 of epochs of 4
            pruner.optimizer.step()
            pruner.optimizer.zero_grad()
    assert sum(channels(pruner.model)) == 8
    assert events(pruner, "trigger")[0]["epoch"] == 1.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_ratio": 1.0}, "prune_ratio must be between 0 and 1"),
        ({"policy": "epoch"}, "set both"),
        ({"prune_epoch": 3}, "set both"),
        ({"policy": "soon"}, "policy must be one of epi"),
        ({"prune_ratio_of": "channels"}, "prune_ratio_of must be one of filters, neurons"),
        ({"criterion": "random"}, "criterion must be one of taylor"),
        ({"latency_target": 0.5, "latency_target_ms": 3.0}, "give one"),
        ({"latency_target": 5.0}, "latency_target_ms"),
        ({"latency_target_ms": -1.0}, "above 0"),
        ({"structure_shuffle": 1}, "structure_from"),
        ({"epi_threshold": 2.0}, "epi_threshold must be between"),
        ({"prune_steps": 0}, "prune_steps must be at least 1"),
        ({"latency_penalty": -1.0}, "latency_penalty"),
        ({"latency_batch": 64}, "latency_batch is 64 but no latency counts"),
        ({"policy": "init", "structure_from": "x"}, "prune_epoch 0 instead of init"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PaT(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_ratio": 0.95}, "asks for 21 of 22 filters, but at most 19 can go: ask for 0.863 or less"),
        (
            {"prune_ratio": 0.95, "prune_ratio_of": "neurons"},
            "15 of 16 neurons, but at most 14 can go: ask for 0.875 or less",
        ),
        ({"policy": "epoch", "prune_epoch": 6}, "the last of 6 epochs is 5"),
        ({"exclude": ("nothing",)}, "no layer is called 'nothing'"),
        ({"exclude": ("stem", "first")}, "no neuron of this network can be removed"),
        ({"policy": "epoch", "prune_epoch": 0, "structure_from": "no.json"}, "no file no.json"),
        ({"latency_target_ms": 1e6}, "the whole network takes"),
        ({"latency_target_ms": 1e-6}, "even with 1 channel"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(
    settings: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLICKTRAIN_LATENCY_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message):
        attach(PaT(**settings))


def test_a_recipe_of_another_network(tmp_path: Path) -> None:
    first = train(attach(PaT(policy="epoch", prune_epoch=0), epochs=2), PER_EPOCH)
    document = [plan.to_json() for plan in first.plans]
    for cut in document[0]["cuts"]:
        cut["name"] = "other." + cut["name"]
    (tmp_path / "surgery.json").write_text(json.dumps(document))
    method = PaT(policy="epoch", prune_epoch=0, structure_from=str(tmp_path / "surgery.json"))
    with pytest.raises(UserError, match="another network"):
        train(attach(method), 1)
