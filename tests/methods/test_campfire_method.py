"""Campfire over a run in somebody's own loop: when, what, and that zeros stay."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_loop import OPTIMIZERS, PRUNED, Net, assert_same, batches, entered, make, snapshot, train
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.packed import bits_from_mask
from clicktrain.kernels.sparse_conv2d.module import PackedConv2d
from clicktrain.methods import Campfire, Pruner
from clicktrain.methods.base import RunLength
from clicktrain.sparsity.granularity import CutRule, cut_mask, cut_of
from clicktrain.sparsity.masks import sparsity_of
from clicktrain.sparsity.schedules import Era

ALL = (*PRUNED, "head")
GRANULARITIES = ("window", "ck", "combined", "inter_epoch", "pattern")


def attach(
    optimizer_name: str = "nesterov", packed: bool = False, epochs: int = 5, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    """A run of four batches an epoch, by default with an era from epoch 1 to 3."""
    model, optimizer = make(optimizer=optimizer_name)
    method = Campfire(**{"era": (1, 3), **settings})
    return model, optimizer, method.attach(model, optimizer, epochs=epochs, steps_per_epoch=4, packed=packed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach() for name in ALL}


def zeros(model: nn.Module) -> float:
    return sparsity_of({name: weight != 0 for name, weight in weights(model).items()})


@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")  # tiny layers
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_course_of_a_run(granularity: str) -> None:
    """Dense, then after every step at the threshold of its epoch, then fixed at the final one."""
    model, optimizer, pruner = attach(granularity=granularity, sparsity=0.6)
    course: list[tuple[str, float]] = []
    train(model, optimizer, pruner, 20, after_step=lambda _: course.append((pruner.stage, zeros(model))))
    stages = [stage for stage, _ in course]
    assert stages == ["dense"] * 3 + ["era"] * 8 + ["fixed"] * 9
    sparsities = [value for _, value in course]
    assert sparsities[:7] == [0.0] * 7  # the threshold of the era's first epoch is 0
    assert all(value >= 0.5 for value in sparsities[7:11])  # 0.6 * (1 - 0.5^3)
    assert sparsities[7:11] == pytest.approx([sparsities[7]] * 4, abs=0.02)
    assert all(0.59 < value < 0.75 for value in sparsities[11:])
    assert sparsities[11:] == [sparsities[11]] * 9
    threshold = next(event for event in pruner.events if event["event"] == "threshold")
    assert threshold["threshold"] == pytest.approx(0.525)
    assert threshold["step"] == 8
    assert entered(pruner) == {"era": 4, "fixed": 12}
    done = next(event for event in pruner.events if event["event"] == "hard_prune")
    assert done["step"] == 12
    assert {layer["name"] for layer in done["layers"]} == set(ALL)
    for layer in done["layers"]:
        assert layer["true_sparsity"] == pytest.approx(sparsity_of({"": pruner.masks[layer["name"]]}))
        assert layer["target_sparsity"] == 0.6
    assert done["compression_reached"] == pytest.approx(pruner.compression_ratio)
    assert pruner.finish() is model
    pruner.check_zeros()


@pytest.mark.parametrize(
    ("settings", "mask_of"),
    [
        ({"granularity": "window"}, lambda s: masked("window", s)),
        ({"granularity": "window", "max_non_zero": 2}, lambda s: masked("window", s, most=most(s, 2))),
        ({"granularity": "ck"}, lambda s: masked("ck", s)),
        ({"granularity": "ck", "within": "filter"}, lambda s: masked("ck", s, within="filter")),
        ({"granularity": "combined"}, lambda s: masked("combined", s)),
        ({"granularity": "inter_epoch"}, lambda s: masked("inter_epoch", s, ck_threshold=0.525)),
    ],
)
def test_the_masks_are_those_of_the_weights(settings: dict[str, Any], mask_of: Any) -> None:
    """At the end of the era: what the optimizer has just made of the weights, ranked by magnitude."""
    model, optimizer, pruner = attach(sparsity=0.6, linear="none", **settings)
    train(model, optimizer, pruner, 11)
    before: dict[str, Tensor] = {}
    # Hooks run in the order of their registration: this one would come after the pruner's.
    optimizer._optimizer_step_post_hooks.clear()
    optimizer.register_step_post_hook(
        lambda *_: before.update({k: v.clone() for k, v in weights(model).items()})
    )
    optimizer.register_step_post_hook(pruner._steps.after)
    train(model, optimizer, pruner, 12, start=11)
    assert set(pruner.masks) == set(PRUNED)
    for name in PRUNED:
        assert torch.equal(pruner.masks[name], mask_of(before[name].abs())), name


def masked(granularity: str, scores: Tensor, threshold: float = 0.6, **rule: Any) -> Tensor:
    f, c, r, s = scores.shape
    cut = cut_of(granularity, (f, c, r, s), threshold, CutRule(**rule))
    return cut_mask(scores, cut, rule.get("within", "channel"))


def most(scores: Tensor, of_9: int) -> int:
    return max(1, round(of_9 * scores.shape[2] * scores.shape[3] / 9))


def test_an_era_that_begins_with_the_run_masks_the_initial_weights() -> None:
    initial, _ = make()
    expected = {name: masked("combined", weights(initial)[name].abs(), 0.3) for name in PRUNED}
    model, optimizer, pruner = attach(era=(0, 2), sparsity=0.6, initial_sparsity=0.3)
    assert pruner.stage == "era"
    assert pruner.events[0]["step"] == 0
    for name in PRUNED:
        assert torch.equal(pruner.masks[name], expected[name]), name
        assert torch.equal(weights(model)[name], weights(initial)[name] * expected[name]), name
    course: list[float] = []
    train(model, optimizer, pruner, 20, after_step=lambda _: course.append(zeros(model)))
    assert 0.25 < course[0] < 0.5 < course[3] < course[7] < 0.75  # thresholds 0.3, 0.5625, 0.6
    assert entered(pruner) == {"era": 0, "fixed": 8}
    pruner.check_zeros()
    paper = Campfire(preset="from-scratch", granularity="window")
    assert paper.era_of(RunLength(100, 7)) == Era(0, 30)


@pytest.mark.parametrize("packed", [False, True])
def test_a_fixed_mask_from_initialisation(packed: bool) -> None:
    """From the first forward pass on the same positions, whether fixed slowly or in a moment."""
    model, optimizer, pruner = attach(era=(0, 2), sparsity=0.6, initial_sparsity=0.6, regrow=False)
    first = {name: mask.clone() for name, mask in pruner.masks.items()}
    assert set(first) == set(ALL)
    train(model, optimizer, pruner, 20)
    at_once, its_optimizer, its_pruner = attach(packed=packed, era=(0, 0), sparsity=0.6)
    assert its_pruner.stage == "era"
    train(at_once, its_optimizer, its_pruner, 1)
    assert its_pruner.stage == "fixed"
    assert its_pruner.frozen
    train(at_once, its_optimizer, its_pruner, 20, start=1)
    for name in ALL:
        assert torch.equal(pruner.masks[name], first[name]), name
        assert torch.equal(its_pruner.masks[name], first[name]), name
    its_pruner.finish()
    pruner.finish()
    for name in ALL:
        assert torch.equal(weights(model)[name] != 0, first[name]), name
        assert torch.allclose(weights(model)[name], weights(at_once)[name], atol=1e-5), name


def test_the_first_step_does_not_choose_again() -> None:
    """Pruning after training goes by the trained weights, whatever the first step makes of them."""
    model, optimizer, pruner = attach(era=(0, 0), sparsity=0.6)
    first = {name: mask.clone() for name, mask in pruner.masks.items()}
    x, y = next(batches(1))
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    for name in ALL:
        grad = model.get_submodule(name).weight.grad
        assert isinstance(grad, Tensor)
        grad[~first[name]] = 1e3
    pruner.observe(loss)
    optimizer.step()
    assert pruner.frozen
    assert all(torch.equal(pruner.masks[name], first[name]) for name in ALL)
    assert not any(weights(model)[name][~first[name]].any() for name in ALL)


def test_an_era_without_length_prunes_at_once() -> None:
    model, optimizer, pruner = attach(era=(2, 2), sparsity=0.6)
    course: list[float] = []
    train(model, optimizer, pruner, 20, after_step=lambda _: course.append(zeros(model)))
    assert course[:7] == [0.0] * 7
    assert course[7] > 0.55
    assert course[7:] == [course[7]] * 13
    assert "0.6 all at once" in str(pruner.plan())


@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("packed", [False, True])
def test_zero_stays_zero_over_a_hundred_steps(optimizer_name: str, packed: bool) -> None:
    """With momentum and weight decay, in weights and optimizer state; packed layers hold no zeros."""
    model, optimizer, pruner = attach(optimizer_name, packed, epochs=28, sparsity=0.7)
    train(model, optimizer, pruner, 12)
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}

    def look(_: int) -> None:
        for name in ALL:
            layer = model.get_submodule(name)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            assert not weight.detach()[~masks[name]].any()
            parameter = layer.values if packed else weight
            state = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.dim()]  # type: ignore[index]
            assert state
            for tensor in state:
                if packed:
                    assert tensor.numel() == int(masks[name].sum())
                else:
                    assert not tensor[~masks[name]].any()

    train(model, optimizer, pruner, 112, start=12, after_step=look)
    assert packed == any(isinstance(module, PackedConv2d) for module in model.modules())
    pruner.finish()
    assert pruner.masks.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(mask, pruner.masks[name])
        weight = model.get_submodule(name).weight
        assert not weight[~mask].any()
        assert weight[mask].ne(0).all()


@pytest.mark.parametrize("regrow", [True, False])
def test_weights_come_back_inside_the_era_or_not(regrow: bool) -> None:
    """Algorithm 2 keeps the gradients of pruned weights; section 2 says "once zero, always zero"."""
    model, optimizer, pruner = attach(
        "nesterov", epochs=12, sparsity=0.6, era=(0, 10), initial_sparsity=0.5, regrow=regrow
    )
    history: list[dict[str, Tensor]] = []
    train(model, optimizer, pruner, 39, after_step=lambda _: history.append(dict(pruner.masks)))
    returned = sum(
        int((later[name] & ~earlier[name]).sum())
        for earlier, later in itertools.pairwise(history)
        for name in PRUNED
    )
    assert (returned > 0) == regrow


def test_rising_step_by_step() -> None:
    model, optimizer, pruner = attach(sparsity=0.6, era=(0, 5), rise="step", granularity="ck")
    course: list[float] = []
    train(model, optimizer, pruner, 20, after_step=lambda _: course.append(zeros(model)))
    assert len(set(course[:10])) > 4
    assert course[-1] == max(course)


def test_gradients_decide_if_asked_to() -> None:
    """(g*w)^2 with the running mean of g^2; a layer without gradients goes by magnitude."""
    model, optimizer, pruner = attach(criterion="taylor", granularity="window", linear="none")
    squares: dict[str, Tensor] = {}

    def follow(*_: Any) -> None:
        for name in PRUNED:
            square = model.get_submodule(name).weight.grad.square()
            squares[name] = square if name not in squares else 0.9 * squares[name] + 0.1 * square

    train(model, optimizer, pruner, 3)
    optimizer.register_step_pre_hook(follow)
    train(model, optimizer, pruner, 11, start=3)
    saved = pruner.state_dict()["state"]["squares"]
    for name in PRUNED:
        torch.testing.assert_close(saved[name], squares[name])
    train(model, optimizer, pruner, 12, start=11)
    assert pruner.state_dict()["state"]["squares"] == {}  # nothing to remember once masks are fixed

    model, optimizer = make()
    method = Campfire(criterion="taylor", era=(1, 2), granularity="window")
    pruner = method.attach(model, optimizer, epochs=3, steps_per_epoch=2)
    for _ in range(6):  # a loop in which nothing has a gradient
        pruner.observe(torch.tensor(1.0))
        optimizer.step()
    assert torch.equal(pruner.masks["deep"], masked("window", weights_of_fresh_net()["deep"].abs()))


def weights_of_fresh_net() -> dict[str, Tensor]:
    return weights(make()[0])


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "combined"},
        {"granularity": "pattern", "criterion": "taylor", "rise": "step"},
        {"granularity": "ck", "regrow": False, "linear": "block", "initial_sparsity": 0.2},
    ],
    ids=["combined", "pattern", "no-regrowth"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_going_on_from_a_saved_state_is_the_same_run(settings: dict[str, Any], packed: bool) -> None:
    """Saved after every single batch."""
    model, optimizer, pruner = attach(packed=packed, **settings)
    saved: list[Any] = []

    def save(_: int) -> None:
        saved.append(copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict())))

    train(model, optimizer, pruner, 20, after_step=save)
    expected = snapshot(model, pruner)
    for done, (state, values, moments) in enumerate(saved, start=1):
        model, optimizer, again = attach(packed=packed, **settings)
        again.load_state_dict(state)
        model.load_state_dict(values)
        optimizer.load_state_dict(moments)
        assert again.density == pytest.approx(sum_density(again.masks, again))
        saved_masks = saved[done - 1][0]["masks"]
        assert all(torch.equal(bits_from_mask(again.masks[name]), bits) for name, bits in saved_masks.items())
        assert again.masks.keys() == saved_masks.keys()
        train(model, optimizer, again, 20, start=done)
        assert_same(snapshot(model, again), expected)
        assert again.events == pruner.events
        assert str(again.plan()) == str(pruner.plan())


def sum_density(masks: dict[str, Tensor], pruner: Pruner) -> float:
    dead = sum(int((~mask).sum()) for name, mask in masks.items() if name != "head")
    return 1 - dead / pruner.network.conv_weights


def test_a_packed_run_is_the_same_run() -> None:
    results = []
    for packed in (False, True):
        model, optimizer, pruner = attach(packed=packed, granularity="ck")
        model.double()
        for x, y in batches(20):
            loss = F.cross_entropy(model(x.double()), y)
            loss.backward()
            pruner.observe(loss)
            optimizer.step()
            optimizer.zero_grad()
        pruner.finish()
        results.append(dict(model.state_dict()))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-7, atol=1e-10, msg=name)


def test_a_run_that_ends_in_the_era_is_pruned_all_the_same() -> None:
    model, optimizer, pruner = attach(sparsity=0.8)
    train(model, optimizer, pruner, 9)
    with pytest.warns(UserWarning, match=r"the loop ended after 2\.25 of the 5 epochs"):
        packed = pruner.finish(packed=True)
    assert any(isinstance(module, PackedConv2d) for module in packed.modules())
    assert pruner.density < 0.25 + 216 / pruner.network.conv_weights  # the first convolution stays


@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")  # tiny layers
def test_the_head_reads_the_last_convolution() -> None:
    """Its inputs from filters that CK emptied are eliminated (section 2.1.2, Figure 3)."""
    model, optimizer, pruner = attach(granularity="ck", sparsity=0.8)
    train(model, optimizer, pruner, 7)
    with torch.no_grad():
        model.deep.weight[:5] = 0.0
        model.head.weight[:, :5] = 9.0
    train(model, optimizer, pruner, 12, start=7)
    pruner.finish()
    dead = ~pruner.masks["deep"].flatten(1).any(dim=1)
    assert dead.any()
    assert not pruner.masks["head"][:, dead].any()
    assert pruner.masks["head"].any(dim=1).all()


class Heads(nn.Module):
    """Linear layers behind an addition, behind each other, and one of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.Linear(4 * 4, 8), nn.Linear(8, 4)
        self.other = Doubled(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.max_pool2d(x + self.b(x), 3)
        return self.other(self.second(F.relu(self.first(x.view(x.size(0), -1)))))


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_linear_layers_that_are_pruned_and_left_alone() -> None:
    model = Heads()
    found = Campfire().find_prunable(model, list(model.parameters()))
    assert [layer.name for layer in found.linears] == ["first", "second"]
    assert [layer.source for layer in found.linears] == [None, None]
    assert "Doubled" in found.left_alone["other"][1]
    assert Campfire(linear="none").find_prunable(model).linears == ()
    assert "excluded" in Campfire(exclude=("second",)).find_prunable(model).left_alone["second"][1]
    with pytest.raises(UserError, match="no layer is called 'nothing'"):
        Campfire(exclude=("nothing",)).find_prunable(model)
    found = Campfire().find_prunable(Net())
    assert [(layer.name, layer.source) for layer in found.linears] == [("head", "deep")]


class Untraceable(Net):
    """The same network, but its course depends on the numbers in it."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            x = -x
        return super().forward(x)


def test_the_plan_says_why_no_input_is_eliminated() -> None:
    model = Untraceable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Campfire().attach(model, optimizer, epochs=5, steps_per_epoch=4)
    row = next(row for row in pruner.plan().rows if row.name == "head")
    assert "inputs from dead filters stay: torch.fx cannot trace this network (TraceError: symbolically" in (
        row.reason
    )
    model, optimizer, pruner = attach()
    row = next(row for row in pruner.plan().rows if row.name == "head")
    assert row.reason.endswith(", without inputs from dead filters of deep")


def test_the_plan_shows_target_and_true_sparsity() -> None:
    _, _, pruner = attach(granularity="window", sparsity=0.6)
    text = str(pruner.plan())
    row = next(line for line in text.splitlines() if line.startswith("square"))
    assert "3 of 9" in row
    assert "target sparsity 0.600, true 0.667" in row
    assert "until epoch 3, 0 to 0.6 by epoch" in text
    model, optimizer, pruner = attach(granularity="window", sparsity=0.6)
    planned = {row.name: row.density for row in pruner.plan().rows}
    train(model, optimizer, pruner, 12)
    decided = {row.name: row.density for row in pruner.plan().rows}
    for name in PRUNED:  # no ties among trained weights: what was planned is what came
        assert decided[name] == pytest.approx(planned[name]), name
    assert "reached" in str(pruner.plan())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sparsity": 1.0}, "sparsity is a share and must be between 0 and 1"),
        ({"sparsity": 0.0}, "sparsity is a share and must be between 0 and 1"),
        ({"initial_sparsity": 0.7}, "initial_sparsity must be between 0 and sparsity"),
        ({"era": (50, 30)}, r"era is the first and the last epoch of pruning, as in 30 50, not \[50, 30\]"),
        ({"preset": "late"}, "preset must be one of default, from-scratch, after-training"),
        ({"granularity": "kernel"}, "granularity must be one of window, ck, combined"),
        ({"block": 5}, "block must be 1 to 4"),
        ({"max_non_zero": 0}, "max_non_zero is a number of weights"),
        ({"window_share": 1.0}, "window_share must be at least 0 and below 1"),
        ({"exponent": 0.0}, "exponent must be above 0"),
        ({"patterns": 0}, "patterns must be at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Campfire(**settings)


def test_runs_that_cannot_be() -> None:
    with pytest.raises(UserError, match="the era ends at epoch 6 but the run has 5"):
        attach(era=(1, 6))
    with pytest.raises(UserError, match="holds no batch"):
        attach(era=(1, 1.1))
    head = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with pytest.raises(UserError, match="no convolution that Campfire can prune"):
        Campfire(linear="none").attach(head, optimizer, epochs=3, steps_per_epoch=2)
