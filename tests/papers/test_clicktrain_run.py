"""Whole ClickTrain runs against the loops of ``clicktrain_reference``, on the gradients of a real loop.

The loop writes down the importance of every weight in every batch; the reference then decides alone, and must
come to the pool, the patterns and the kernels of the run.
"""

from __future__ import annotations

from typing import Any

import clicktrain_reference as reference
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.adapters import ADAPTERS
from clicktrain.graph.prunable import PrunableLayer
from clicktrain.methods import ClickTrain, Pruner
from clicktrain.methods.patterns.axes import ALLOCATIONS, allocation_gains
from clicktrain.methods.patterns.selection import PatternLayer
from clicktrain.sparsity.group_lasso import shrink_groups_

SCHEDULE: dict[str, Any] = {
    "earliest_start": 0.1,
    "latest_start": 0.1,
    "pool_length": 0.2,
    "finalize_length": 0.3,
    "regularize_length": 0.2,
}


class Net(nn.Module):
    def __init__(self, filters: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a = nn.Conv2d(4, filters, 3, padding=1)
        self.b = nn.Conv2d(filters, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.wide = nn.Conv2d(4, 4, (1, 5), padding=(0, 2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.b(torch.tanh(self.a(x))))
        x = torch.tanh(self.wide(torch.tanh(self.point(x))) + x)
        return self.head(x.mean(dim=(2, 3)))


LAYERS = {"a": 4, "b": 4, "point": 1, "wide": 2}
"""Layer -> entries per kernel when 4 of 9 are kept."""
STEPS = 20


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(6, 1, 5, 5, generator=generator), torch.randint(0, 3, (6,), generator=generator)


class Recorded:
    """What a run did, and the importance and the loss of every batch of stages 2 and 3."""

    def __init__(self, method: ClickTrain, *, learning_rate: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = Net()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=learning_rate, momentum=0.9)
        self.pruner: Pruner = method.attach(self.model, optimizer, epochs=2, steps_per_epoch=STEPS // 2)
        self.importance: dict[str, list[dict[str, Any]]] = {"pool": [], "finalize": []}
        self.losses: dict[str, list[float]] = {"pool": [], "finalize": []}
        for number in range(STEPS):
            x, y = batch(number)
            loss = F.cross_entropy(self.model(x), y)
            optimizer.zero_grad()
            loss.backward()
            stage = self.pruner.stage
            if stage in self.importance:
                layers = {name: self.model.get_submodule(name) for name in LAYERS}
                self.importance[stage].append(
                    {
                        name: reference.weight_importance(conv.weight.tolist(), conv.weight.grad.tolist())
                        for name, conv in layers.items()
                    }
                )
                self.losses[stage].append(loss.item())
            self.pruner.observe(loss)
            optimizer.step()

    def event(self, kind: str) -> dict[str, Any]:
        return next(event for event in self.pruner.events if event["event"] == kind)

    def kernels(self) -> dict[str, int]:
        return {layer["name"]: layer["kernels_per_filter"] for layer in self.event("finalised")["layers"]}


def shape_of(name: str) -> tuple[int, int]:
    return {"a": (3, 3), "b": (3, 3), "point": (1, 1), "wide": (1, 5)}[name]


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("selection", ["votes", "accumulated"])
@pytest.mark.parametrize("kernel_score", ["kernel", "pattern"])
def test_a_run_decides_what_the_reference_decides(group: int, selection: Any, kernel_score: Any) -> None:
    method = ClickTrain(
        compression=3, preset="paper", criterion="taylor", patterns=3, group=group, selection=selection,
        kernel_score=kernel_score, allocation="importance", allocation_floor=0, **SCHEDULE,
    )  # fmt: skip
    run = Recorded(method)
    grouped = {
        stage: [
            {name: reference.group_filters(layer, group) for name, layer in layers.items()}
            for layers in batches
        ]
        for stage, batches in run.importance.items()
    }
    assert len(grouped["pool"]) == 4
    assert len(grouped["finalize"]) == 6

    # Stage 2: one pool per kernel shape; kernels that are kept whole have nothing to choose.
    pools: dict[tuple[int, int], list[int]] = {(1, 1): [1]}
    for entries, shape in ((4, (3, 3)), (2, (1, 5))):
        names = [name for name in LAYERS if shape_of(name) == shape]
        scores = reference.competitive_scores(
            [[layers[name] for name in names] for layers in grouped["pool"]], entries
        )
        pools[shape] = reference.select_pool(scores, 3)
        shown = next(pool for pool in run.event("pool")["pools"] if tuple(pool["shape"]) == shape)
        assert shown["patterns"] == [{"bits": bits, "score": scores[bits]} for bits in pools[shape]]
        assert shown["candidates"] == len(scores)

    # Stage 3: patterns, then kernels, then how many of them each layer keeps.
    patterns, totals = {}, {}
    for name in LAYERS:
        batches = [layers[name] for layers in grouped["finalize"]]
        pool = pools[shape_of(name)]
        if selection == "votes":
            chosen = reference.final_patterns(reference.pattern_votes(batches, pool))
        else:
            summed = [
                [
                    [
                        [sum(x[f][c][r][s] for x in batches) for s in range(shape_of(name)[1])]
                        for r in range(shape_of(name)[0])
                    ]
                    for c in range(len(batches[0][f]))
                ]
                for f in range(len(batches[0]))
            ]
            chosen = [[reference.best_pattern(kernel, pool) for kernel in kernels] for kernels in summed]
        patterns[name] = [[pool[index] for index in row] for row in chosen]
        inside = patterns[name] if kernel_score == "pattern" else None
        totals[name] = reference.accumulated_kernel_importance(batches, inside)
    weights = {name: run.model.get_submodule(name).weight for name in (*LAYERS, "stem")}
    budget = round(sum(w.numel() for w in weights.values()) / 3) - weights["stem"].numel()
    # Grouped rows stand for several filters: the price counts them all.
    expected = reference.greedy_allocation(
        [totals[name] for name in LAYERS], [entries * group for entries in LAYERS.values()], budget
    )
    assert run.kernels() == dict(zip(LAYERS, expected, strict=True))
    for (name, kept), (height, width) in zip(run.kernels().items(), map(shape_of, LAYERS), strict=True):
        alive = reference.important_kernels(totals[name], kept)
        mask = reference.keep_mask(patterns[name], alive, height, width, group)
        assert run.pruner.masks[name].tolist() == mask, name


@pytest.mark.parametrize(("rule", "margin"), [("ratio", 0.0018), ("ratio", 0.98), ("increase", 0.02)])
def test_batches_outside_the_loss_margin_do_not_vote(rule: Any, margin: float) -> None:
    method = ClickTrain(
        compression=3, preset="paper", patterns=3, loss_margin=margin, loss_margin_rule=rule, **SCHEDULE
    )
    run = Recorded(method)
    rules = {"ratio": reference.counted_literal, "increase": reference.counted_increase}
    losses = run.losses["pool"] + run.losses["finalize"]
    counted = reference.which_batches_count(losses, margin, rules[rule])[len(run.losses["pool"]) :]
    if margin > 0.0018:
        assert True in counted
        assert False in counted
    pool = [pattern["bits"] for pattern in run.event("pool")["pools"][0]["patterns"]]
    for name in ("a", "b"):
        batches = [layers[name] for layers in run.importance["finalize"]]
        votes = reference.pattern_votes(batches, pool, counted)
        patterns = [[pool[index] for index in row] for row in reference.final_patterns(votes)]
        totals = reference.accumulated_kernel_importance(
            [x for x, yes in zip(batches, counted, strict=True) if yes]
        )
        alive = reference.important_kernels(totals, run.kernels()[name])
        assert run.pruner.masks[name].tolist() == reference.keep_mask(patterns, alive, 3, 3), name


class DerivedSGD(torch.optim.SGD):
    """Calls its parent's step, which runs the step hooks once more."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, DerivedSGD])
@pytest.mark.parametrize("coefficient", [0.0, 0.00025, 0.5])
def test_stage_4_adds_the_gradient_of_the_group_lasso(
    coefficient: float, optimizer_class: type[torch.optim.SGD]
) -> None:
    """One plain SGD step of stage 4 is that of the loss plus the reference's penalty under autograd."""
    torch.manual_seed(0)
    model = Net().double()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    method = ClickTrain(compression=3, preset="paper", penalty="lasso", lasso=coefficient, **SCHEDULE)
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=STEPS)
    for number in range(STEPS):
        if pruner.stage == "regularize":
            break
        step(model, optimizer, pruner, number)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, optimizer, pruner, number)
    assert pruner.stage == "regularize"
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    for later in range(number + 1, STEPS):
        step(model, optimizer, pruner, later)
    masks = pruner.masks  # decided before stage 4, shown from the hard prune on

    model.load_state_dict(before)
    x, y = batch(number)
    objective = F.cross_entropy(model(x.double()), y)
    for name in LAYERS:
        weight = model.get_submodule(name).weight
        objective = objective + reference.modified_group_lasso(weight, masks[name], coefficient)
    model.zero_grad()
    objective.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(after[name], before[name] - 0.1 * p.grad, rtol=1e-9, atol=1e-12, msg=name)


def settled(importance: list[dict[str, Any]], name: str, group: int, summed: bool) -> Tensor:
    """Figure 6's crosses by the reference, after the batches seen so far: bool [F, C, R, S]."""
    batches = importance if summed else importance[-1:]
    total = sum(torch.tensor(reference.group_filters(layers[name], group)) for layers in batches)
    crosses = [[reference.settled_positions(kernel, LAYERS[name]) for kernel in f] for f in total.tolist()]
    return torch.tensor(crosses).repeat_interleave(group, dim=0)


@pytest.mark.parametrize("stage", ["pool", "finalize"])
@pytest.mark.parametrize(("early", "group"), [("none", 1), ("batch", 1), ("batch", 2), ("summed", 2)])
def test_stages_2_and_3_penalize_what_is_outside_the_candidates(early: Any, group: int, stage: str) -> None:
    """One plain SGD step is that of the loss plus the penalty on the crosses of Figure 6 under autograd."""
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = ClickTrain(
        compression=3, preset="paper", early_penalty=early, lasso=0.5, group=group, **SCHEDULE
    )
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=STEPS)
    importance: list[dict[str, Any]] = []
    done, checked = 0, 0
    while pruner.stage in ("dense", "pool", "finalize"):
        before, now = {name: p.detach().clone() for name, p in model.named_parameters()}, pruner.stage
        x, y = batch(done)
        objective = F.cross_entropy(model(x.double()), y)
        grads = dict(zip(before, torch.autograd.grad(objective, list(model.parameters())), strict=True))
        step(model, optimizer, pruner, done)
        done += 1
        if now == "dense":
            continue
        weights = {name: (before[f"{name}.weight"], grads[f"{name}.weight"]) for name in LAYERS}
        importance.append(
            {name: reference.weight_importance(w.tolist(), g.tolist()) for name, (w, g) in weights.items()}
        )
        if now != stage:
            continue
        checked += 1
        for name in LAYERS if early != "none" else ():
            leaf = before[f"{name}.weight"].clone().requires_grad_()
            crosses = settled(importance, name, group, early == "summed")
            assert crosses.any() == (name != "point")
            penalty = reference.modified_group_lasso(leaf, ~crosses, 0.5)
            if penalty.requires_grad:
                grads[f"{name}.weight"] = grads[f"{name}.weight"] + torch.autograd.grad(penalty, leaf)[0]
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[name] - 0.1 * grads[name], rtol=1e-6, atol=1e-9)
    assert checked == {"pool": 4, "finalize": 6}[stage]


def test_the_early_penalty_shrinks_towards_the_hard_prune() -> None:
    """A penalty that acts after the step: on the crosses, with the steps left until the hard prune."""
    torch.manual_seed(0)
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = ClickTrain(
        compression=3, preset="paper", penalty="shrink", earliest_start=0.1, latest_start=0.1,
        pool_length=0.2, finalize_length=0.3, hard_prune=0.75,
    )  # fmt: skip
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=STEPS)
    for number in range(2):
        step(model, optimizer, pruner, number)
    assert pruner.stage == "pool"
    weight = model.a.weight.detach().clone()
    x, y = batch(2)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x.double()), y), model.a.weight)
    importance = [{"a": reference.weight_importance(weight.tolist(), grad.tolist())}]
    shrink_groups_(weight, ~settled(importance, "a", 1, summed=False), round(0.75 * STEPS) - 3)
    step(model, optimizer, pruner, 2)
    torch.testing.assert_close(model.a.weight.detach(), weight)


@pytest.mark.parametrize("other", [{"penalty": "none"}, {"pool": "fixed", "patterns": 8}])
def test_an_early_penalty_needs_a_penalty_and_candidates(other: dict[str, Any]) -> None:
    assert ClickTrain(preset="paper", **other).early_penalty == "none"
    with pytest.raises(UserError, match="early_penalty is batch, which"):
        ClickTrain(preset="paper", early_penalty="batch", **other)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, number: int) -> None:
    x, y = batch(number)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x.double()), y)
    loss.backward()
    pruner.observe(loss)
    optimizer.step()


def test_grouping_does_not_change_what_a_layer_is_worth() -> None:
    """Filters with equal scores are worth the same whether they are counted one by one or in groups."""
    scores = torch.tensor([[4.0, 3.0, 1.0]]).repeat(8, 1)
    for rule in ("importance", "relative"):
        worth = []
        for group in (1, 2, 8):
            target = PatternLayer(
                PrunableLayer("conv", nn.Conv2d(3, 8, 3), ADAPTERS[nn.Conv2d]), entries=4, group=group
            )
            grouped = scores.unflatten(0, (-1, group)).sum(dim=1)
            gains = allocation_gains((target,), {"conv": grouped}, ALLOCATIONS[rule])
            assert gains is not None
            worth.append(gains["conv"])
        torch.testing.assert_close(worth[1], worth[0], msg=rule)
        torch.testing.assert_close(worth[2], worth[0], msg=rule)
