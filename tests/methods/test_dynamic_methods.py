"""DSR and RigL over a run in somebody's own loop: what moves and when, and that the dead stay dead."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from own_loop import OPTIMIZERS, PRUNED, assert_same, entered, make, snapshot, train
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d.module import PackedConv2d
from clicktrain.methods import DSR, Pruner, RigL
from clicktrain.methods.base import ApplyMasks, RunLength, StepInfo
from clicktrain.sparsity.masks import sparsity_of

sys.path.append(str(Path(__file__).parents[1] / "papers"))
import dynamic_reference as reference

# Kernels of a layer as small as these may be fewer than its filters.
pytestmark = pytest.mark.filterwarnings("ignore:.* lose their last nonzero weight")
ALL = (*PRUNED, "head")
METHODS: dict[str, Any] = {"rigl": RigL, "dsr": DSR}
VARIANTS: list[dict[str, Any]] = [
    {"method": "rigl", "interval": 3},
    {"method": "rigl", "interval": 4, "granularity": "kernel", "densities": "uniform"},
    {"method": "rigl", "interval": 3, "growth": "random"},
    {"method": "dsr", "interval": 2, "threshold": 0.02},
    {"method": "dsr", "interval": 1, "granularity": "kernel", "drop": 0.2, "threshold": 0.05},
    {"method": "dsr", "interval": 2, "growth": "gradient", "threshold": 0.02},
]
TIMES = {
    ("rigl", 3): [3, 6, 9, 12, 15],
    ("rigl", 4): [4, 8, 12, 16],
    ("dsr", 2): [2, 4, 6, 8, 12, 16],  # quarters of 6 batches: every 2, 4, 8 and 16
    ("dsr", 1): [1, 2, 3, 4, 5, 6, 8, 10, 12, 16],
}
"""Batches at which units move."""
IDS = ["rigl", "rigl-kernel", "set", "dsr", "dsr-kernel", "dsr-gradient"]


class Watched:
    """A run of 24 batches whose raw gradients, and weights just after the optimizer's step, are kept."""

    def __init__(self, optimizer_name: str = "nesterov", packed: bool = False, **settings: Any) -> None:
        self.model, self.optimizer = make(optimizer=optimizer_name)
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.optimizer.register_step_pre_hook(lambda *_: self._copy_gradients())
        self.optimizer.register_step_post_hook(lambda *_: self._copy_weights())
        settings = {"sparsity": 0.7, "stop": 0.75, **settings}
        method = METHODS[settings.pop("method")](**settings)
        self.pruner: Pruner = method.attach(
            self.model, self.optimizer, epochs=6, steps_per_epoch=4, packed=packed
        )

    def layer(self, name: str) -> Tensor:
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def _copy_gradients(self) -> None:
        if not self.pruner.frozen:
            self.gradients = {name: self.layer(name).grad.clone() for name in ALL}  # type: ignore[union-attr]

    def _copy_weights(self) -> None:
        if not self.pruner.frozen:
            self.weights = {name: self.layer(name).detach().clone() for name in ALL}


def as_units(tensor: Tensor, kernel: bool) -> list[list[float]]:
    if kernel and tensor.dim() == 4:
        return tensor.flatten(2).flatten(0, 1).tolist()  # type: ignore[no-any-return]
    return tensor.reshape(-1, 1).tolist()  # type: ignore[no-any-return]


def alive(mask: Tensor, kernel: bool) -> list[bool]:
    return [bool(unit[0]) for unit in as_units(mask.float(), kernel)]


@pytest.mark.parametrize("settings", VARIANTS, ids=IDS)
def test_every_step_is_that_of_the_paper(settings: dict[str, Any]) -> None:
    run = Watched(**settings)
    kernel = settings.get("granularity") == "kernel"
    assert run.pruner.stage == "dynamic"
    previous = {name: mask.clone() for name, mask in run.pruner.masks.items()}
    assert set(previous) == set(ALL)
    total = sum(mask.numel() for mask in previous.values())
    budget = sum(int(mask.sum()) for mask in previous.values())
    assert budget == pytest.approx(0.3 * total, rel=0.05)
    for name in ALL:
        assert not run.layer(name)[~previous[name]].any()  # sparse before the first forward pass
    threshold = settings.get("threshold", 0.0)
    updates = []
    times = TIMES[settings["method"], settings["interval"]]

    def look(seen: int) -> None:
        nonlocal threshold, previous
        masks = run.pruner.masks
        if seen >= 18:  # 75% of 24
            assert run.pruner.stage == "fixed"
            assert all(torch.equal(masks[name], previous[name]) for name in ALL)
            return
        if seen not in times:
            assert all(torch.equal(masks[name], previous[name]) for name in ALL), seen
            return
        updates.append(seen)
        if settings["method"] == "rigl":
            check_rigl(run, previous, seen, kernel, settings.get("growth") != "random")
        else:
            threshold = check_dsr(run, previous, threshold, settings, kernel, budget)
        for name in ALL:  # what grows begins at zero
            new = masks[name] & ~previous[name]
            assert not run.layer(name)[new].any()
            old = masks[name] & previous[name]
            assert torch.equal(run.layer(name)[old], run.weights[name][old])
        previous = {name: mask.clone() for name, mask in masks.items()}

    train(run.model, run.optimizer, run.pruner, 24, after_step=look)
    assert updates == times
    assert entered(run.pruner) == {"dynamic": 0, "fixed": 18}
    assert [e["step"] for e in run.pruner.events if e["event"] == "regrown"] == updates
    done = next(event for event in run.pruner.events if event["event"] == "hard_prune")
    assert done["sparsity_reached"] == pytest.approx(0.7, abs=0.03)
    run.pruner.finish()
    run.pruner.check_zeros()
    for name in ALL:
        assert not run.layer(name)[~run.pruner.masks[name]].any()


def check_rigl(run: Watched, previous: dict[str, Tensor], seen: int, kernel: bool, gradient: bool) -> None:
    for name in ALL:
        before, now = alive(previous[name], kernel), alive(run.pruner.masks[name], kernel)
        weights, grads = as_units(run.weights[name], kernel), as_units(run.gradients[name], kernel)
        kept, expected = reference.rigl_halves(weights, grads, before, seen, 18, 0.3)
        expected = reference.with_living_filters(
            weights, grads, before, kept, expected, len(run.weights[name])
        )
        assert sum(now) == sum(before)
        if gradient:
            assert now == expected, (name, seen)
        else:
            dropped = math.floor(0.15 * (1 + math.cos(seen * math.pi / 18)) * sum(before))
            lost = [n for n, b in zip(now, before, strict=True) if b].count(False)
            assert lost == min(dropped, before.count(False))  # a layer that is dense has nowhere else to grow


def check_dsr(
    run: Watched,
    previous: dict[str, Tensor],
    threshold: float,
    settings: dict[str, Any],
    kernel: bool,
    budget: int,
) -> float:
    kept, sizes = {}, {}
    for name in ALL:
        kept[name] = reference.dsr_prune(
            as_units(run.weights[name], kernel), alive(previous[name], kernel), threshold
        )
        sizes[name] = len(as_units(previous[name], kernel)[0])
    before = sum(int(previous[name].sum()) for name in ALL)
    survivors = [sum(kept[name]) * sizes[name] for name in ALL]
    event = next(e for e in reversed(run.pruner.events) if e["event"] == "regrown")
    assert event["threshold"] == threshold
    assert event["dropped"] == before - sum(survivors)
    now = {name: alive(run.pruner.masks[name], kernel) for name in ALL}
    for name in ALL:  # no survivor is lost
        assert all(n for n, k in zip(now[name], kept[name], strict=True) if k)
    grown = [sum(now[name]) - sum(kept[name]) for name in ALL]
    if not kernel:
        free = [len(kept[name]) - sum(kept[name]) for name in ALL]
        assert grown == reference.dsr_grow_counts(budget - sum(survivors), survivors, free)
    alive_now = sum(sum(now[name]) * sizes[name] for name in ALL)
    assert budget - max(sizes.values()) < alive_now <= budget
    target = settings.get("drop", 0.08) * before
    return reference.dsr_threshold(threshold, before - sum(survivors), target, 0.1)


@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("method", ["rigl", "dsr"])
def test_the_dead_have_no_momentum(method: str, optimizer_name: str) -> None:
    """At every step, before positions are fixed and after; and what grows starts without any."""
    run = Watched(optimizer_name, method=method, interval=2)
    train(run.model, run.optimizer, run.pruner, 1)

    def look(_: int) -> None:
        for name in ALL:
            weight, mask = run.layer(name), run.pruner.masks[name]
            state = [v for v in run.optimizer.state[weight].values() if isinstance(v, Tensor) and v.dim()]
            assert state
            for tensor in (weight, *state):
                assert not tensor[~mask].any()

    train(run.model, run.optimizer, run.pruner, 24, start=1, after_step=look)


@pytest.mark.parametrize("settings", [VARIANTS[0], VARIANTS[4]], ids=["rigl", "dsr-kernel"])
def test_packed_from_the_first_step(settings: dict[str, Any]) -> None:
    plain, packed = Watched(**settings), Watched(packed=True, **settings)
    assert isinstance(packed.model.get_submodule("deep"), PackedConv2d)
    train(plain.model, plain.optimizer, plain.pruner, 24)
    train(packed.model, packed.optimizer, packed.pruner, 24)
    assert isinstance(packed.model.get_submodule("deep"), PackedConv2d)
    packed.pruner.finish()
    plain.pruner.finish()
    for name in ALL:
        assert torch.equal(plain.pruner.masks[name], packed.pruner.masks[name])
        assert torch.allclose(plain.layer(name), packed.layer(name), atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("settings", VARIANTS, ids=IDS)
def test_going_on_from_a_saved_state_is_the_same_run(settings: dict[str, Any], packed: bool) -> None:
    whole = Watched(packed=packed, **settings)
    train(whole.model, whole.optimizer, whole.pruner, 24)
    for stop in (1, 7, 13, 20):
        first = Watched(packed=packed, **settings)
        train(first.model, first.optimizer, first.pruner, stop)
        saved = copy.deepcopy(
            (first.pruner.state_dict(), first.model.state_dict(), first.optimizer.state_dict())
        )
        second = Watched(packed=packed, **settings)
        torch.manual_seed(stop)  # the positions do not come from here
        second.pruner.load_state_dict(saved[0])
        second.model.load_state_dict(saved[1])
        second.optimizer.load_state_dict(saved[2])
        train(second.model, second.optimizer, second.pruner, 24, start=stop)
        assert_same(snapshot(second.model, second.pruner), snapshot(whole.model, whole.pruner))


def test_accumulated_gradients_and_steps_without_any() -> None:
    run = Watched(method="rigl", interval=3)
    train(run.model, run.optimizer, run.pruner, 24, accumulate=2)
    # 3 falls between two steps, the one at 4 makes up for it.
    assert [e["step"] for e in run.pruner.events if e["event"] == "regrown"] == [4, 6, 10, 12, 16]
    run = Watched(method="rigl", interval=3)
    method, prunable, state = run.pruner.method, run.pruner.network.prunable, run.pruner._state
    step = StepInfo(3, 1, torch.tensor(1.0), [], RunLength(6, 4))
    (action,) = method.after_step(state, prunable, step)  # a mixed-precision overflow: no gradients were read
    assert isinstance(action, ApplyMasks)
    assert state.updated == 0  # to be made up for at the next


def test_positions_depend_on_the_seed_alone() -> None:
    runs = [Watched(method="rigl", mask_seed=seed) for seed in (1, 1, 2)]
    assert all(torch.equal(runs[0].pruner.masks[name], runs[1].pruner.masks[name]) for name in ALL)
    assert any(not torch.equal(runs[0].pruner.masks[name], runs[2].pruner.masks[name]) for name in ALL)
    drawn = []
    for seed in (1, 2):  # by default that of PyTorch, which is not advanced
        model, optimizer = make(seed)
        before = torch.random.get_rng_state()
        pruner = RigL().attach(model, optimizer, epochs=6, steps_per_epoch=4)
        assert torch.equal(torch.random.get_rng_state(), before)
        drawn.append(pruner.masks)
    assert any(not torch.equal(drawn[0][name], drawn[1][name]) for name in ALL)


def test_the_plan() -> None:
    run = Watched(method="dsr", interval=2)
    text = str(run.pruner.plan())
    assert "until batch 18 of 24, every 2 batches, twice as many by quarters" in text
    assert "random positions grow in layers by their survivors" in text
    assert "sparsity asked 0.7, planned 0.700" in text
    train(run.model, run.optimizer, run.pruner, 24)
    rows = {row.name: row for row in run.pruner.plan().rows}
    for name in ALL:
        assert rows[name].density == pytest.approx(1 - sparsity_of({name: run.pruner.masks[name]}))
    densities = [rows[name].density for name in ALL]
    assert max(densities) - min(densities) > 0.02  # type: ignore[type-var, operator] # weights have moved
    assert rows["stem"].reason.startswith("first convolution")
    run = Watched(method="rigl", linear=False)
    assert set(run.pruner.masks) == set(PRUNED)
    spread = {row.name: row.density for row in run.pruner.plan().rows}
    assert spread["point"] > spread["square"]  # type: ignore[operator] # Erdos-Renyi: small ones are denser


def test_defaults_fit_runs_of_any_length() -> None:
    for cls, (epochs, steps) in itertools.product((RigL, DSR), ((1, 4), (4, 11), (60, 11), (90, 5000))):
        timing = cls().timing(RunLength(epochs, steps))
        updates, updated = 0, 0
        for seen in range(1, min(epochs * steps, 7000) + 1):
            if timing.due(seen, updated):
                updates, updated = updates + 1, seen
        assert updates >= 1, (cls, epochs, steps)
    assert RigL().timing(RunLength(90, 5000)).interval == 100
    assert DSR().timing(RunLength(100, 5000)).interval == 1000


@pytest.mark.parametrize(
    ("cls", "settings", "sentence"),
    [
        (RigL, {"sparsity": 1.0}, "sparsity is a share and must be between 0 and 1, not 1.0"),
        (RigL, {"drop": 0.0}, "drop is a share"),
        (RigL, {"growth": "magnitude"}, "growth must be one of gradient, random"),
        (RigL, {"granularity": "window"}, "granularity must be one of weight, kernel"),
        (RigL, {"densities": "equal"}, "densities must be one of erk, uniform"),
        (RigL, {"interval": 0}, "interval is a number of batches, at least 1"),
        (RigL, {"stop": 1.5}, "stop is a share of the run"),
        (RigL, {"mask_seed": -1}, "mask_seed must be at least 0"),
        (DSR, {"tolerance": 1.0}, "tolerance is a share"),
        (DSR, {"threshold": 0.0}, "threshold must be above 0"),
    ],
)
def test_settings_that_cannot_be(cls: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        cls(**settings)


def test_runs_that_cannot_be() -> None:
    with pytest.raises(UserError, match="interval is 100 but masks are fixed after 18 of 24 batches"):
        Watched(method="rigl", interval=100)
    head = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"no convolution that DSR can prune \(linear: this method"):
        DSR(linear=False).attach(head, optimizer, epochs=3, steps_per_epoch=2)
    model = nn.Sequential(nn.Conv2d(4, 10, 3), nn.Conv2d(10, 6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    few = r"a sparsity of 0.99 leaves 5 weights to 6 filters: at most 0.988 can be asked"
    with pytest.raises(UserError, match=few):  # of 540 weights: the first layer stays dense
        RigL(sparsity=0.99).attach(model, optimizer, epochs=3, steps_per_epoch=2)
    RigL(sparsity=0.988).attach(model, optimizer, epochs=3, steps_per_epoch=2).close()
    with pytest.raises(UserError, match=r"leaves 3 kernels to 6 filters: at most 0.9 can be asked"):
        DSR(sparsity=0.95, granularity="kernel").attach(model, optimizer, epochs=3, steps_per_epoch=2)


def test_the_target_is_a_share_of_what_lives() -> None:
    """100 weights live, 10 of them tiny: just what is to go, so the threshold stays; with 13 it is halved."""
    for tiny, then in ((10, 0.01), (13, 0.005), (7, 0.02)):
        layer = nn.Linear(20, 10)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        method = DSR(sparsity=0.5, drop=0.1, tolerance=0.05, threshold=0.01, interval=1)
        pruner = method.attach(nn.Sequential(layer), optimizer, epochs=4, steps_per_epoch=4)
        living = pruner.masks["0"].nonzero()
        assert len(living) == 100
        with torch.no_grad():
            layer.weight[tuple(living.T)] = 1.0
            layer.weight[tuple(living[:tiny].T)] = 0.001
        pruner.observe(layer(torch.ones(2, 20)).sum())
        optimizer.step()
        (event,) = (event for event in pruner.events if event["event"] == "regrown")
        assert (event["dropped"], event["grown"], event["threshold"]) == (tiny, tiny, 0.01)
        assert pruner._state.memory["threshold"] == then
