"""Patterns that move over a run, dense and packed; gradual ClickTrain; identities at the start."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_loop import PRUNED, assert_same, make, snapshot, train
from test_moving_packed import Run, same
from torch import Tensor, nn

from clicktrain.errors import MissedTarget, UserError
from clicktrain.methods import DSR, GMP, MEST, ClickTrain, GradualClickTrain, GraNet, Method, Pruner, RigL
from clicktrain.methods.base import RunLength
from clicktrain.models.cifarnet import CifarNet
from clicktrain.sparsity.patterns import all_patterns, fixed_pool
from clicktrain.sparsity.schedules import cosine

sys.path.append(str(Path(__file__).parents[1] / "sparsity"))
import moving_pattern_reference as reference

METHODS: dict[str, Method[Any]] = {
    "rigl": RigL(granularity="pattern", compression=3.5, interval=3),
    "rigl-uniform": RigL(granularity="pattern", compression=3, interval=3, patterns=126, densities="uniform"),
    "rigl-linear": RigL(granularity="pattern", sparsity=0.7, interval=3, patterns=84, entries=3),
    "set": RigL(granularity="pattern", compression=3.5, interval=3, growth="random", patterns=16),
    "mest": MEST(granularity="pattern", compression=3.5, interval=3),
    "dsr": DSR(granularity="pattern", compression=3.5, interval=2, threshold=0.02),
    "granet": GraNet(granularity="pattern", compression=4, interval=2),
    "gmp": GMP(granularity="pattern", compression=4, interval=2),
    "weights": RigL(within="filter", sparsity=0.7, interval=3),
    "gradual": GradualClickTrain(compression=4, start=0.3, interval=2),
    "gradual-fixed": GradualClickTrain(sparsity=0.75, start=0.3, interval=2, pool="fixed", densities="erk"),
}
THREES = ("square", "deep")
"""Layers of 3x3 kernels."""


def patterns_of(method: Any, pruner: Pruner) -> set[int]:
    """Bits of the pool of 3x3 patterns."""
    if isinstance(method, GradualClickTrain) and method.pool == "dynamic":
        (event,) = (e for e in pruner.events if e["event"] == "pool")
        return {p["bits"] for pool in event["pools"] if pool["shape"] == [3, 3] for p in pool["patterns"]}
    every = len(all_patterns(method.entries)) == method.patterns
    return {p.bits for p in (all_patterns(method.entries) if every else fixed_pool(method.patterns).patterns)}


@pytest.mark.parametrize("key", METHODS)
def test_packed_and_dense_are_the_same_run(key: str) -> None:
    """Step by step; kernels have patterns of the pool, filters equally many of them; what grows is zero."""
    method: Any = METHODS[key]
    packed, dense = Run(method), Run(method, packed=False)
    before: dict[str, Tensor] = {}
    for done in range(1, 25):
        packed.train(done, done - 1)
        dense.train(done, done - 1)
        same(packed, dense)
        masks = dense.pruner.masks
        for name, mask in masks.items():
            each = mask.flatten(1).sum(dim=1)
            if key != "weights" or done:
                assert int(each.min()) == int(each.max()), name
            if name in before:
                assert not dense.dense(name)[mask & ~before[name]].any()
        if key != "weights" and masks:
            bits = {
                sum(1 << i for i in range(9) if kernel[i])
                for name in THREES
                for kernel in masks[name].flatten(2).flatten(0, 1).tolist()
            }
            assert bits - {0} <= patterns_of(method, dense.pruner)
        before = {name: mask.clone() for name, mask in masks.items()}
    assert packed.packed
    moves = [e for e in dense.pruner.events if e["event"] in ("regrown", "dropped")]
    assert len(moves) >= 3
    if key not in ("weights", "gmp"):
        assert sum(e["patterns_changed"] for e in moves) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissedTarget)  # one kernel in each filter is a large step here
        packed.pruner.finish()
        dense.pruner.finish()
    same(packed, dense)
    (target,) = dense.pruner.outcome().targets
    assert target.asked is not None
    assert target.reached == pytest.approx(target.asked, rel=0.06)


@pytest.mark.parametrize("key", ["rigl", "gradual"])
@pytest.mark.parametrize("packed", [True, False])
def test_going_on_from_a_saved_state_is_the_same_run(key: str, packed: bool) -> None:
    whole = Run(METHODS[key], packed=packed).train()
    for stop in (4, 7, 13):
        first = Run(METHODS[key], packed=packed).train(stop)
        saved = copy.deepcopy(
            (first.pruner.state_dict(), first.model.state_dict(), first.optimizer.state_dict())
        )
        second = Run(METHODS[key], packed=packed, seed=stop)
        second.pruner.load_state_dict(saved[0])
        second.model.load_state_dict(saved[1])
        second.optimizer.load_state_dict(saved[2])
        second.train(start=stop)
        assert_same(snapshot(second.model, second.pruner), snapshot(whole.model, whole.pruner))


@pytest.mark.long
def test_a_run_of_rigl_against_plain_loops() -> None:
    """Every update of a run is the reference's, of the weights and gradients of its step."""
    model, optimizer = make()
    method = RigL(granularity="pattern", compression=3, interval=3, densities="uniform", patterns=126)
    grads: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}

    def layer(name: str) -> Tensor:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def keep(where: dict[str, Tensor], grad: bool) -> None:
        for name in THREES:
            weight = layer(name)
            kept = weight.grad if grad else weight.detach()
            assert kept is not None
            where[name] = kept.clone()

    optimizer.register_step_pre_hook(lambda *_: keep(grads, True))
    optimizer.register_step_post_hook(lambda *_: keep(weights, False))
    pruner = method.attach(model, optimizer, epochs=6, steps_per_epoch=4)
    pool = [frozenset(i for i in range(9) if p.bits >> i & 1) for p in all_patterns(4)]
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    seen = []

    def look(step: int) -> None:
        nonlocal before
        now = pruner.masks
        if step % 3 == 0 and step < 18:
            seen.append(step)
            count = 0
            for name in THREES:
                lists = [t.flatten(2).double().tolist() for t in (weights[name], grads[name], before[name])]
                masks = [[[bool(k) for k in kernel] for kernel in row] for row in lists[2]]
                expected, changed = reference.update(*lists[:2], masks, pool, 0.3 * cosine(step / 18))
                found = [
                    [frozenset(k.nonzero().flatten().tolist()) for k in row] for row in now[name].flatten(2)
                ]
                assert found == expected, (name, step)
                count += changed
            assert [e for e in pruner.events if e["event"] == "regrown"][-1]["patterns_changed"] == count
        else:
            assert all(torch.equal(now[name], before[name]) for name in THREES)
        before = {name: mask.clone() for name, mask in now.items()}

    train(model, optimizer, pruner, 24, after_step=look)
    assert seen == [3, 6, 9, 12, 15]


# ---- gradual ClickTrain -----------------------------------------------------------------------------


def test_pool_and_first_patterns_are_those_of_clicktrain() -> None:
    """With the same stages, batches and criterion the votes are the same."""
    shared = {"criterion": "taylor", "selection": "votes", "patterns": 6, "compression": 4}
    gradual = GradualClickTrain(
        **shared, start=0.5, complete=0.6, pool_length=0.125, finalize_length=0.125, interval=1
    )
    paper = ClickTrain(
        **shared, earliest_start=0.25, latest_start=0.25, pool_length=0.125, finalize_length=0.125,
        loss_margin_rule="increase",
    )  # fmt: skip
    found = []
    for method in (gradual, paper):
        run = Run(method, packed=False).train(12)
        (pool,) = (e["pools"] for e in run.pruner.events if e["event"] == "pool")
        found.append((pool, run))
    (pools, one), (expected, two) = found
    assert pools == [pool for pool in expected if pool["shape"] != [1, 1]]
    assert one.pruner.stage == "pruning"
    state = two.pruner._state
    assert state.stage == "regularize"
    for layer in state.layers:
        ids = state.selection.pattern_id[layer.name]
        mask = state.selection.pools[layer.kernel_shape].masks()[ids]
        if layer.has_patterns:
            assert torch.equal(one.pruner.masks[layer.name], layer.layer.unview(mask)), layer.name


def test_kernels_leave_by_the_schedule_and_return() -> None:
    method = GradualClickTrain(
        compression=4, start=0.25, complete=0.5, stop=0.75, interval=1, densities="uniform"
    )
    run = Run(method, packed=False)
    stages, living, returned = [], [], 0
    before: Tensor | None = None
    for done in range(1, 25):
        run.train(done, done - 1)
        stages.append(run.pruner.stage)
        if run.pruner.masks:
            kernels = run.pruner.masks["deep"].flatten(2).any(dim=2)
            living.append(int(kernels[0].sum()))
            returned += 0 if before is None else int((kernels & ~before).sum())
            before = kernels
    assert [stages.index(stage) + 1 for stage in ("dense", "pool", "finalize", "pruning", "fixed")] == [
        1, 4, 5, 6, 18,
    ]  # fmt: skip
    method, prunable = run.pruner.method, run.pruner.network.prunable
    assert isinstance(method, GradualClickTrain)
    sizes = {layer.name: layer.weight.numel() for layer in prunable.layers}
    most = sum(method.most_of(layer) * sizes[layer.name] for layer in prunable.layers) / sum(sizes.values())
    expected = [8]  # every kernel, on its pattern
    for step in range(7, 13):  # complete at half of the run
        density = 1 - method.sparsity + (most - 1 + method.sparsity) * (1 - (step - 6) / 6) ** 3
        expected.append(method.layer_counts(prunable, 1 - density)["deep"] // 16)
    assert living[:7] == expected
    assert set(living[6:]) == {expected[-1]}
    assert expected[-1] < 4 < expected[2]
    assert returned > 0
    assert run.pruner.outcome().targets[0].what == "compression of convolution weights"


def test_a_run_that_ends_early_ends_at_its_target() -> None:
    for done in (2, 4, 6):
        run = Run(METHODS["gradual"], packed=False).train(done)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.pruner.finish()
        assert run.pruner.outcome().targets[0].reached == pytest.approx(4, rel=0.05)
        run.pruner.check_zeros()


# ---- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "settings", "sentence"),
    [
        (RigL, {"granularity": "pattern", "patterns": 7}, "patterns must be 4, 8, 12, 16 or 126"),
        (
            RigL,
            {"granularity": "pattern", "entries": 3},
            r"patterns must be 84 \(all patterns of 3 positions\)",
        ),
        (RigL, {"granularity": "pattern", "entries": 9}, "entries is a number of positions of a 3x3 kernel"),
        (RigL, {"patterns": 8}, "patterns and entries are of granularity pattern, not weight"),
        (RigL, {"compression": 1.0}, "compression must be more than 1"),
        (
            RigL,
            {"compression": 8.0, "sparsity": 0.5},
            "sparsity 0.5 and compression 8.0 are both given, and say the same thing: give one",
        ),
        (RigL, {"within": "channel"}, "within must be one of layer, filter"),
        (GradualClickTrain, {"granularity": "kernel"}, "granularity is pattern for Gradual ClickTrain"),
        (GradualClickTrain, {"complete": 0.1}, "complete is a share of the run, above start"),
        (GradualClickTrain, {"pool_length": 0.3}, "pool_length and finalize_length are shares"),
        (GradualClickTrain, {"pool": "fixed", "patterns": 5}, "4, 8, 12 or 16"),
        (GradualClickTrain, {"pool": "fixed", "entries": 3}, "a fixed pool keeps 4 positions"),
        (GradualClickTrain, {"patterns": 0}, "patterns must be at least 1"),
        (GradualClickTrain, {"loss_margin": -1.0}, "loss_margin must not be negative"),
    ],
)
def test_settings_that_cannot_be(cls: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        cls(**settings)


def test_runs_that_cannot_be() -> None:
    model, optimizer = make()
    refused: list[tuple[Method[Any], str]] = [
        (RigL(granularity="pattern", compression=1.2), "is less than patterns alone prune: they keep 0"),
        (RigL(granularity="pattern", sparsity=0.99), r"leaves \d+ kernels to \d+ filters"),
        (RigL(compression=40), r"the convolutions that stay dense alone are 20.6x"),
        (RigL(compression=1.01, include=("stem",)), ""),
    ]
    for method, sentence in refused[:-1]:
        with pytest.raises(UserError, match=sentence):
            method.attach(model, optimizer, epochs=6, steps_per_epoch=4)
    with pytest.raises(UserError, match="a run of 4 batches is too short for the stages of gradual ClickTr"):
        GradualClickTrain().ends(RunLength(1, 4))
    assert GradualClickTrain().ends(RunLength(1, 8)) == {"dense": 1, "pool": 2, "finalize": 3}
    assert GradualClickTrain().ends(RunLength(10, 10)) == {"dense": 16, "pool": 18, "finalize": 20}
    assert GradualClickTrain(pool="fixed").ends(RunLength(1, 8)) == {"dense": 1, "pool": 1, "finalize": 2}
    assert GradualClickTrain().compression == 8
    assert GradualClickTrain(sparsity=0.9).compression is None


def test_the_plan_says_what_is_kept() -> None:
    run = Run(RigL(granularity="pattern", compression=3.5))
    rows = {row.name: row for row in run.pruner.plan().rows}
    assert rows["square"].action == "kernels, 4 of 9"
    assert rows["point"].action == rows["large"].action == "kernels"
    assert rows["head"].reason.startswith("linear")
    assert "compression asked 3.5, planned 3.5" in str(run.pruner.plan())
    for name in PRUNED:
        mask = run.pruner.masks[name]
        assert rows[name].density == pytest.approx(float(mask.float().mean()))


# ---- networks that begin as the identity --------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        RigL(sparsity=0.9, interval=2),
        RigL(sparsity=0.9, interval=2, densities="uniform", growth="random"),
        RigL(sparsity=0.9, interval=2, granularity="kernel"),
        RigL(compression=8, interval=2, granularity="pattern"),
        MEST(sparsity=0.9, interval=2),
        DSR(sparsity=0.9, interval=2),
        GraNet(sparsity=0.9, initial_sparsity=0.5, interval=2),
    ],
    ids=["rigl", "set", "kernel", "pattern", "mest", "dsr", "granet"],
)
def test_a_network_that_begins_as_the_identity_lives(method: Method[Any]) -> None:
    """Norms without scale and an epsilon of 1e-12: a constant filter would have gradients times a million."""
    torch.manual_seed(0)
    model = CifarNet(num_classes=4, width=0.125)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.3, momentum=0.9)
    pruner = method.attach(model, optimizer, epochs=3, steps_per_epoch=4)
    losses, largest = [], 0.0
    for number in range(12):
        y = torch.arange(16) % 4
        draw = torch.Generator().manual_seed(number)
        x = torch.randn(16, 3, 12, 12, generator=draw) + torch.eye(4, 3)[y][:, :, None, None] * 2
        outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        grads = [p.grad.abs().max() for p in trained if p.grad is not None]
        largest = max(largest, float(torch.stack(grads).max()))
        optimizer.zero_grad()
        losses.append(loss.detach().item())
        assert float(outputs.detach().std(dim=0).max()) > 1e-3, number
        for name, mask in pruner.masks.items():
            module = model.get_submodule(name)
            assert isinstance(module.weight, Tensor)
            kept = module.weight.detach() * mask
            if isinstance(module, nn.Conv2d):
                assert kept.flatten(1).any(dim=1).all(), name  # no filter of zeros
    assert losses[-1] < 0.97 * losses[0]
    assert largest < 1
    pruner.finish()


def test_filters_that_get_nothing_are_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 32, 1), nn.Conv2d(32, 16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"filters without a nonzero weight .*: 26 of 32 of 1; a lower"):
        RigL(sparsity=0.95, densities="uniform").attach(model, optimizer, epochs=4, steps_per_epoch=4)


def test_filters_that_lose_everything_are_reported_once() -> None:
    """Kernels of two filters are large, those of six tiny: fewer kernels than filters are left."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    with torch.no_grad():
        model[1].weight[2:] *= 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = DSR(sparsity=0.7, granularity="kernel", threshold=1e-3, interval=1, drop=0.5)
    pruner = method.attach(model, optimizer, epochs=4, steps_per_epoch=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loss = model(torch.randn(2, 3, 8, 8)).square().mean()
            loss.backward()
            pruner.observe(loss.detach())
            optimizer.step()
    told = [str(one.message) for one in caught if "lose their last" in str(one.message)]
    assert len(told) == 1
    assert "5 of 8 filters of 1 lose their last nonzero weight and compute a constant" in told[0]
    assert not pruner.masks["1"].flatten(1).any(dim=1).all()


def test_a_sparsity_that_is_asked_for_is_not_replaced_by_the_usual_compression() -> None:
    assert GradualClickTrain().compression == 8
    assert (GradualClickTrain(sparsity=0.8).compression, GradualClickTrain(sparsity=0.8).sparsity) == (
        None,
        0.8,
    )
    with pytest.raises(UserError, match="both given"):
        GradualClickTrain(compression=8, sparsity=0.8)
