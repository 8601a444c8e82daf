"""GMP, GraNet, MEST and N:M over a run, against their papers' updates in plain loops."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sparse_training_reference as reference
import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.methods import GMP, MEST, NM, GraNet, Method, Pruner
from clicktrain.methods.base import RunLength
from clicktrain.sparsity.units import best_of_each_group

sys.path.append(str(Path(__file__).parents[1] / "methods"))
from own_loop import PRUNED, assert_same, make, snapshot, train

ALL = (*PRUNED, "head")
STEPS = 24


class Watched:
    """A run of 24 batches whose raw gradients, and weights just after the optimizer's step, are kept."""

    def __init__(self, method: Method[Any], optimizer: str = "nesterov") -> None:
        self.model, self.optimizer = make(optimizer=optimizer)
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        self.optimizer.register_step_pre_hook(lambda *_: self._copy(self.gradients, grad=True))
        self.optimizer.register_step_post_hook(lambda *_: self._copy(self.weights, grad=False))
        self.pruner: Pruner = method.attach(self.model, self.optimizer, epochs=6, steps_per_epoch=4)

    def layer(self, name: str) -> Tensor:
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def _copy(self, where: dict[str, Tensor], grad: bool) -> None:
        for name in ALL if not self.pruner.frozen else ():
            found = self.layer(name).grad if grad else self.layer(name).detach()
            assert found is not None
            where[name] = found.clone()

    def masks(self) -> dict[str, list[bool]]:
        """Of every layer, all of it before the first update."""
        masks = self.pruner.masks
        return {
            name: masks[name].flatten().tolist() if name in masks else [True] * self.layer(name).numel()
            for name in ALL
        }


def flat(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: tensor.double().flatten().tolist() for name, tensor in tensors.items()}


def assert_dead_are_zero(run: Watched) -> None:
    for name, mask in run.pruner.masks.items():
        assert not run.layer(name)[~mask].any()
        state = run.optimizer.state.get(run.layer(name), {})
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                assert not value[~mask].any()


@pytest.mark.parametrize("settings", [{}, {"sparsity_schedule": "linear"}], ids=["cubic", "linear"])
def test_gradual_magnitude_pruning(settings: dict[str, Any]) -> None:
    run = Watched(GMP(sparsity=0.8, interval=4, start=0.25, stop=0.75, **settings))
    before, times = run.masks(), []

    def look(seen: int) -> None:
        nonlocal before
        now = run.masks()
        if now != before:
            times.append(seen)
            sparsity = reference.cubic_sparsity(seen, 6, 18, 0.0, 0.8)
            if settings:
                sparsity = min((seen - 6) / 12, 1) * 0.8
            for name in ALL:
                expected = reference.gmp_update(flat(run.weights)[name], before[name], sparsity)
                assert now[name] == expected, (name, seen)
        assert_dead_are_zero(run)
        before = now

    train(run.model, run.optimizer, run.pruner, STEPS, after_step=look)
    assert times == [10, 14, 18]  # 6 + n * 4, and the end
    assert [e["stage"] for e in run.pruner.events if e["event"] == "stage"] == ["pruning", "fixed"]
    (target,) = run.pruner.outcome().targets
    assert target.reached == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize("initial", [0.0, 0.5], ids=["dense-to-sparse", "sparse-to-sparse"])
def test_granet(initial: float) -> None:
    run = Watched(GraNet(sparsity=0.8, initial_sparsity=initial, interval=4, stop=0.75, drop=0.4))
    before, times = run.masks(), []
    assert sum(map(sum, before.values())) == pytest.approx(
        (1 - initial) * sum(map(len, before.values())), rel=0.02
    )

    def look(seen: int) -> None:
        nonlocal before
        now = run.masks()
        if seen in (4, 8, 12, 16, 18):
            times.append(seen)
            sparsity = reference.cubic_sparsity(seen, 0, 18, initial, 0.8)
            replaced = 0.4 * reference.cosine(seen, 18)
            weights, gradients = flat(run.weights), flat(run.gradients)
            expected = reference.granet_update(
                [weights[n] for n in ALL],
                [gradients[n] for n in ALL],
                [before[n] for n in ALL],
                sparsity,
                replaced if seen < 18 else 0.0,
            )
            assert [now[name] for name in ALL] == expected, seen
        else:
            assert now == before
        assert_dead_are_zero(run)
        before = now

    train(run.model, run.optimizer, run.pruner, STEPS, after_step=look)
    assert times == [4, 8, 12, 16, 18]
    (target,) = run.pruner.outcome().targets
    assert target.reached == pytest.approx(0.8, abs=0.002)
    densities = [sum(m) / len(m) for m in before.values()]
    assert max(densities) - min(densities) > 0.05  # layers compete


@pytest.mark.parametrize("soft_bound", [True, False], ids=["EM&S", "EM"])
def test_mest(soft_bound: bool) -> None:
    run = Watched(
        MEST(sparsity=0.7, interval=4, stop=0.75, mutation=0.1, gradient_weight=0.5, soft_bound=soft_bound)
    )
    before = run.masks()

    def look(seen: int) -> None:
        nonlocal before
        now = run.masks()
        if seen in (4, 8, 12, 16):
            weights, gradients = flat(run.weights), flat(run.gradients)
            for name in ALL:
                share = 0.1 * reference.cosine(seen, 18)
                stay, live = reference.mest_counts(len(now[name]), 0.7, share, soft_bound)
                kept = reference.mest_remove(weights[name], gradients[name], before[name], stay, 0.5)
                assert all(n for n, k in zip(now[name], kept, strict=True) if k), (name, seen)
                assert sum(kept) == min(stay, sum(before[name]))
                assert sum(now[name]) == max(live, stay), (name, seen)
        elif seen < 18:
            assert now == before
        assert_dead_are_zero(run)
        before = now

    train(run.model, run.optimizer, run.pruner, STEPS, after_step=look)
    (target,) = run.pruner.outcome().targets
    assert target.reached == pytest.approx(0.7, abs=0.005)
    moved = [e for e in run.pruner.events if e["event"] == "regrown"]
    assert all(event["grown"] > 0 for event in moved)
    assert moved[0]["grown"] > moved[-1]["grown"]


def test_mest_with_a_mutation_that_leaves_nothing() -> None:
    with pytest.raises(UserError, match=r"sparsity 0.9 and mutation 0.2 leave no weight"):
        MEST(sparsity=0.9, mutation=0.2, soft_bound=False)


# ---- N:M ------------------------------------------------------------------------------------------


def rows(tensor: Tensor) -> list[list[float]]:
    """Rows along the input channels: [F, C, R, S] -> [F * R * S][C]."""
    view = tensor if tensor.dim() == 4 else tensor[:, :, None, None]
    return view.double().movedim(1, 3).reshape(-1, view.shape[1]).tolist()  # type: ignore[no-any-return]


def test_masks_of_n_of_m() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, n, m in (((5, 8, 3, 3), 2, 4), ((3, 16, 1, 1), 1, 8), ((4, 12, 1, 3), 3, 4)):
        scores = torch.randint(0, 5, shape, generator=generator).float()  # with ties
        mask = best_of_each_group(scores, n, m)
        assert rows(mask) == reference.nm_mask(rows(scores), n, m)
        assert mask.float().mean() == pytest.approx(n / m)


def test_sr_ste_step_by_step() -> None:
    """Dense weights, momentum and weight decay are those of the paper's formula, through the whole run."""
    run = Watched.__new__(Watched)
    run.model, _ = make()
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    run.gradients, run.weights = {}, {}
    dense = {name: rows(run.layer(name)) for name in ALL}
    run.optimizer.register_step_pre_hook(lambda *_: run._copy(run.gradients, grad=True))
    run.pruner = NM(decay=0.1, stop=0.75).attach(run.model, run.optimizer, epochs=6, steps_per_epoch=4)
    momentum = {name: [[0.0] * len(row) for row in dense[name]] for name in ALL}

    def look(seen: int) -> None:
        for name in ALL:
            if seen <= 18:
                mask = reference.nm_mask(dense[name], 2, 4)
                reference.sr_ste_step(
                    dense[name], momentum[name], rows(run.gradients[name]), mask, (0.05, 0.9, 5e-4, 0.1)
                )
            mask = reference.nm_mask(dense[name], 2, 4)
            if seen < 18:
                masked = [
                    [w * k for w, k in zip(*pair, strict=True)]
                    for pair in zip(dense[name], mask, strict=True)
                ]
                torch.testing.assert_close(
                    torch.tensor(rows(run.layer(name))), torch.tensor(masked), rtol=1e-4, atol=1e-6
                )

    train(run.model, run.optimizer, run.pruner, STEPS, after_step=look)
    assert run.pruner.stage == "fixed"
    run.pruner.finish()
    (target,) = run.pruner.outcome().targets
    assert target.reached == pytest.approx(0.5)
    for name in ALL:
        kept = torch.tensor(rows(run.layer(name))).ne(0).unflatten(1, (-1, 4)).sum(2)
        assert kept.max() <= 2


def test_hidden_weights_return() -> None:
    """What the forward pass does not see is trained on: a group may choose again; and it is in the state."""
    run = Watched(NM())
    first = {name: mask.clone() for name, mask in run.pruner.masks.items()}
    train(run.model, run.optimizer, run.pruner, 12)
    now = run.pruner.masks
    assert any((now[name] & ~first[name]).any() for name in ALL)
    saved = copy.deepcopy((run.pruner.state_dict(), run.model.state_dict(), run.optimizer.state_dict()))
    again = Watched(NM())
    again.pruner.load_state_dict(saved[0])
    again.model.load_state_dict(saved[1])
    again.optimizer.load_state_dict(saved[2])
    for one in (run, again):
        train(one.model, one.optimizer, one.pruner, STEPS, start=12)
    assert_same(snapshot(run.model, run.pruner), snapshot(again.model, again.pruner))


def test_what_n_of_m_cannot_do() -> None:
    assert NM(n=1, m=4).sparsity == 0.75
    assert NM(n=1, m=4, sparsity=0.75).sparsity == 0.75
    with pytest.raises(UserError, match=r"sparsity is 0.8, but 2:4 is 0.5: leave it out"):
        NM(sparsity=0.8)
    with pytest.raises(UserError, match="1 <= n < m"):
        NM(n=4, m=4)
    model, optimizer = make()
    with pytest.warns(
        UserWarning, match="2 of 6 layers have a multiple of 16 input channels: the others, 96%"
    ):
        pruner = NM(n=1, m=16).attach(model, optimizer, epochs=6, steps_per_epoch=4)
    reasons = {row.name: row.reason for row in pruner.plan().rows}
    assert reasons["square"] == "8 inputs are no multiple of 16"
    assert reasons["point"] == ""
    odd = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(
        UserError, match=r"no convolution that N:M \(SR-STE\) can prune .*8 inputs are no multiple"
    ):
        NM(n=1, m=3).attach(odd, torch.optim.SGD(odd.parameters(), lr=0.1), epochs=2, steps_per_epoch=2)


def test_settings_that_cannot_be() -> None:
    for method, sentence in (
        (lambda: GMP(start=0.7, stop=0.6), "start is a share of the run, from 0 to below stop"),
        (lambda: GMP(sparsity=1.2), "sparsity is a share"),
        (lambda: GraNet(initial_sparsity=0.9), "initial_sparsity must be between 0 and sparsity"),
        (lambda: GraNet(drop=1.0), "drop is a share"),
        (lambda: MEST(mutation=0.0), "mutation is a share"),
        (lambda: MEST(gradient_weight=-1.0), "gradient_weight must not be negative"),
        (lambda: NM(decay=-1.0), "decay must not be negative"),
    ):
        with pytest.raises(UserError, match=sentence):
            method()
    with pytest.raises(UserError, match=r"interval is 50 but masks are fixed .*start 0.1"):
        GMP(interval=50).timing(RunLength(4, 10))
