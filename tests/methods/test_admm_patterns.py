"""ADMM pattern pruning in a loop of one's own: course, settings, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from own_loop import PRUNED, make, snapshot, train
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.methods import AdmmPatterns, Pruner
from clicktrain.sparsity.pattern_pool import natural_patterns
from clicktrain.sparsity.patterns import fixed_pool


def attached(method: AdmmPatterns, optimizer: str = "nesterov", **more: Any) -> tuple[Any, Any, Pruner]:
    model, own = make(optimizer=optimizer)
    return model, own, method.attach(model, own, epochs=6, steps_per_epoch=4, **more)


def ran(method: AdmmPatterns, optimizer: str = "nesterov", **more: Any) -> tuple[Any, Pruner]:
    model, own, pruner = attached(method, optimizer, **more)
    train(model, own, pruner, 24)
    pruner.finish()
    return model, pruner


def named(pruner: Pruner, kind: str) -> list[dict[str, Any]]:
    return [event for event in pruner.events if event["event"] == kind]


def test_the_course_of_a_run() -> None:
    """Dense until masks are frozen; each update at its batch; kernels on patterns, filters alike."""
    method = AdmmPatterns(compression=3, patterns=5, iterations=4)
    model, optimizer, pruner = attached(method)
    (pools,) = named(pruner, "pool")
    threes = [model.get_submodule(name).weight.detach() for name in ("square", "deep")]
    found = torch.cat([natural_patterns(weight.square(), 4).flatten() for weight in threes])
    bits, counts = found.unique(return_counts=True)
    expected = sorted(zip((-counts).tolist(), bits.tolist(), strict=True))[:5]
    three = next(pool for pool in pools["pools"] if pool["shape"] == [3, 3])
    assert [(-p["score"], p["bits"]) for p in three["patterns"]] == expected
    assert {tuple(pool["shape"]) for pool in pools["pools"]} == {(3, 3), (5, 5), (1, 3)}
    stages: list[tuple[int, str, float]] = []
    train(
        model, optimizer, pruner, 24,
        after_step=lambda step: stages.append((step, pruner.stage, pruner.density)),
    )  # fmt: skip
    assert [stage for _, stage, _ in stages] == ["admm"] * 11 + ["fixed"] * 13
    assert all((density == 1) == (stage == "admm") for _, stage, density in stages)
    assert [event["step"] for event in named(pruner, "admm")] == [3, 6, 9]
    assert [event["step"] for event in named(pruner, "hard_prune")] == [12]
    rho = [event["rho"] for event in named(pruner, "admm")]
    assert rho == pytest.approx([0.03 * 10 ** (k / 3) for k in (1, 2, 3)])
    (chosen,) = named(pruner, "finalised")
    assert chosen["compression_reached"] == pytest.approx(pruner.compression_ratio)
    rows = {row["name"]: row for row in chosen["layers"]}
    for name in PRUNED:
        mask = pruner.masks[name]
        kept = mask.flatten(2).any(dim=2)
        assert kept.sum(dim=1).tolist() == [rows[name]["kernels_per_filter"]] * len(mask)
        assert mask.flatten(1).sum(dim=1).tolist() == [rows[name]["nnz_per_filter"]] * len(mask)
        assert sum(rows[name]["pattern_counts"]) == (0 if name == "point" else int(kept.sum()))
    assert pruner.state_dict()["state"]["auxiliary"] == {}
    pruner.finish()


@pytest.mark.parametrize(("optimizer", "left"), [("nesterov", 0.3), ("adamw", 0.75)])
def test_weights_come_near_before_they_are_cut(optimizer: str, left: float) -> None:
    """The hard prune cuts less of what ADMM has pulled; AdamW cannot move weights further in 18 steps."""
    cut = {}
    for rho in (1e-6, 3.0):
        _, pruner = ran(AdmmPatterns(compression=3, stop=0.75, rho=rho / 10, rho_last=rho), optimizer)
        (event,) = named(pruner, "hard_prune")
        cut[rho] = event["energy_outside"]
    assert cut[3.0] < left * cut[1e-6]


def test_weights_that_do_not_come_near_are_reported() -> None:
    """U grows while W stays: what is pulled to what soon has little to do with size."""
    reasons = {}
    for rho in (1e-6, 3.0):
        _, pruner = ran(AdmmPatterns(compression=3, stop=0.75, rho=rho / 10, rho_last=rho))
        reasons[rho] = named(pruner, "stage")[-1]["reason"]
    assert reasons[3.0] == "batch 18 of 24"
    assert "did not come nearer to their projections (from " in reasons[1e-6]
    assert reasons[1e-6].endswith("take a larger rho or a longer run")


def test_packed_and_masked_are_the_same_run() -> None:
    method = AdmmPatterns(compression=3)
    networks = [ran(method, packed=packed)[0].state_dict() for packed in (True, False)]
    for name, tensor in networks[0].items():
        torch.testing.assert_close(tensor, networks[1][name], rtol=1e-4, atol=1e-5)


def test_a_loss_scale_does_not_change_the_pull() -> None:
    """Fused optimizers are given scaled gradients, to which a scaled pull is added."""
    plain, scaled = (attached(AdmmPatterns(compression=3, rho=0.1), "fused-sgd") for _ in range(2))
    train(*plain, 24)
    train(*scaled, 24, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**8))
    one, other = (snapshot(model, pruner) for model, _, pruner in (plain, scaled))
    weights = [key for key, value in one.items() if isinstance(value, Tensor)]
    assert weights
    for key in weights:
        torch.testing.assert_close(one[key], other[key])


def test_other_units_than_patterns() -> None:
    """Single weights are Zhang et al.'s ADMM pruning; no pool is chosen."""
    model, pruner = ran(AdmmPatterns(granularity="weight", sparsity=0.7, densities="uniform"))
    assert not named(pruner, "pool") + named(pruner, "finalised")
    (target,) = pruner.outcome().targets
    assert target.reached == pytest.approx(0.7, abs=0.01)
    weight, mask = model.square.weight, pruner.masks["square"]
    assert not weight[~mask].any()
    _, kernels = ran(AdmmPatterns(granularity="kernel", compression=3))
    mask = kernels.masks["square"].flatten(2)
    assert torch.equal(mask.any(dim=2), mask.all(dim=2))


def test_kernels_that_compete_in_their_layer() -> None:
    """PatDNN's connectivity: as many in all, not in each filter."""
    _, pruner = ran(AdmmPatterns(compression=3, within="layer"))
    _, usual = ran(AdmmPatterns(compression=3))
    kept = pruner.masks["square"].flatten(2).any(dim=2).sum(dim=1)
    assert len(kept.unique()) > 1
    assert pruner.compression_ratio == pytest.approx(usual.compression_ratio, rel=0.05)


@pytest.mark.parametrize("pool", ["dynamic", "fixed"])
def test_other_pools(pool: Any) -> None:
    _, pruner = ran(AdmmPatterns(compression=3, pool=pool, patterns=4))
    (event,) = named(pruner, "pool")
    three = next(one for one in event["pools"] if one["shape"] == [3, 3])
    bits = [pattern["bits"] for pattern in three["patterns"]]
    assert len(bits) == 4
    assert (bits == [pattern.bits for pattern in fixed_pool(4).patterns]) == (pool == "fixed")
    assert set(pruner.masks["large"].flatten(2).sum(dim=2).unique().tolist()) - {0} == (
        {25} if pool == "fixed" else {11}
    )


def test_a_criterion_that_reads_gradients() -> None:
    """Projections read those of the loss alone, and wait for a step that has some."""
    _, by_size = ran(AdmmPatterns(compression=3))
    _, by_taylor = ran(AdmmPatterns(compression=3, criterion="taylor"))
    assert len(named(by_taylor, "admm")) == len(named(by_size, "admm")) == 5
    assert any(not torch.equal(by_size.masks[name], by_taylor.masks[name]) for name in PRUNED)


def test_as_many_iterations_as_there_are_batches() -> None:
    method = AdmmPatterns(compression=3, iterations=100, stop=0.25)
    _, _, pruner = attached(method)
    assert "6 iterations" in str(pruner.plan())
    pruner.close()
    _, done = ran(method)
    assert [event["step"] for event in named(done, "admm")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda: AdmmPatterns(iterations=0), "iterations must be at least 1, not 0"),
        (lambda: AdmmPatterns(rho=0.0), "rho must be above 0, not 0"),
        (lambda: AdmmPatterns(rho_last=float("inf")), "rho_last must be above 0, not inf"),
        (lambda: AdmmPatterns(stop=0.0), "stop is a share of the run, above 0 and at most 1, not 0"),
        (lambda: AdmmPatterns(patterns=7, pool="fixed"), "a fixed pattern pool has 4, 8, 12 or 16"),
        (lambda: AdmmPatterns(entries=3, pool="fixed"), "entries=3 needs pool=dynamic"),
        (lambda: AdmmPatterns(granularity="weight", constraints="split"), "constraints is split, but only"),
        (
            lambda: AdmmPatterns(compression=4, sparsity=0.5),
            "are both given, and say the same thing: give one",
        ),
        (lambda: attached(AdmmPatterns(stop=0.01)), "which leaves ADMM none"),
        (lambda: attached(AdmmPatterns(compression=1.5)), "is less than patterns alone prune"),
        (lambda: attached(AdmmPatterns(compression=200)), "cannot be met by this network"),
    ],
)
def test_what_is_refused(make_it: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        make_it()
    assert "\n" not in str(error.value)
