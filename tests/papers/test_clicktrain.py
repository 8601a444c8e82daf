"""clicktrain.sparsity against the loops of ``clicktrain_reference``: ClickTrain, sections 4.1-4.4.

Importances are small integers, so that float32 sums are exact and ties are frequent: the library must then
agree with the reference bit by bit. Real-valued inputs check scale and sign.
"""

from __future__ import annotations

import clicktrain_reference as reference
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clicktrain.sparsity.allocation import LayerBudget, allocate, kernel_gains
from clicktrain.sparsity.finalize import (
    add_pattern_votes_,
    batch_counts,
    best_patterns,
    chosen_scores,
    keep_kernels,
    pattern_mask,
)
from clicktrain.sparsity.group_lasso import add_lasso_gradient_, lasso_penalty
from clicktrain.sparsity.importance import group_sum, kernel_scores, pattern_scores, taylor_importance
from clicktrain.sparsity.pattern_pool import (
    PatternVotes,
    add_votes,
    candidate_patterns,
    outside_candidates,
    select_pool,
)
from clicktrain.sparsity.patterns import PatternPool, all_patterns

SHAPES = ((1, 1), (1, 2), (1, 3), (3, 1), (2, 2), (2, 3), (3, 3), (5, 5), (1, 7), (3, 5), (7, 7))
LARGEST = (1, 2, 5, 1000)
"""Largest importance: 1 makes nearly all comparisons ties, 1000 few; sums stay exact in float32."""


def check(examples: int) -> settings:
    return settings(max_examples=examples)


@st.composite
def layers(draw: st.DrawFn, shapes: tuple[tuple[int, int], ...] = SHAPES, filters: int = 4) -> Tensor:
    """Integer importance [F, C, R, S]; all zero now and then."""
    shape = (draw(st.integers(1, filters)), draw(st.integers(1, 4)), *draw(st.sampled_from(shapes)))
    top = draw(st.sampled_from((0, *LARGEST)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    return torch.randint(0, top + 1, shape, generator=generator).float()


@st.composite
def batches_and_pools(draw: st.DrawFn) -> tuple[list[Tensor], list[int]]:
    """Importances of a few batches of one layer, and a pool of distinct patterns for it."""
    first = draw(layers(shapes=SHAPES[:-1]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    top = max(1, int(first.max()))
    others = [
        torch.randint(0, top + 1, first.shape, generator=generator).float()
        for _ in range(draw(st.integers(0, 5)))
    ]
    size = first.shape[2] * first.shape[3]
    entries = draw(st.integers(1, min(4, size)))
    pattern = st.lists(st.integers(0, size - 1), min_size=entries, max_size=entries, unique=True)
    pool = draw(
        st.lists(pattern.map(lambda kept: sum(1 << i for i in kept)), min_size=1, max_size=6, unique=True)
    )
    return [first, *others], pool


def masks_of(pool: list[int], importance: Tensor) -> Tensor:
    return PatternPool.from_bits(pool, (importance.shape[2], importance.shape[3])).masks()


# ---------------------------------------------------------------- 4.1


def test_all_patterns_are_those_of_the_reference() -> None:
    assert len(all_patterns()) == 126
    for shape in SHAPES[:-3]:
        for entries in range(1, min(5, shape[0] * shape[1]) + 1):
            ours = sorted(pattern.bits for pattern in all_patterns(entries, shape))
            assert ours == reference.every_pattern(entries, *shape)


@check(40)
@given(batches_and_pools(), st.integers(0, 10_000))
def test_importance_of_weights_patterns_and_kernels(case: tuple[list[Tensor], list[int]], seed: int) -> None:
    batches, pool = case
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-9, 10, batches[0].shape, generator=generator).float()
    grad = torch.randint(-9, 10, batches[0].shape, generator=generator).float()
    importance = taylor_importance(weight, grad)
    expected = reference.weight_importance(weight.tolist(), grad.tolist())
    assert importance.tolist() == expected
    assert pattern_scores(importance, masks_of(pool, weight)).tolist() == [
        [[reference.pattern_importance(kernel, bits) for bits in pool] for kernel in kernels]
        for kernels in expected
    ]
    assert kernel_scores(importance).tolist() == [
        [reference.kernel_importance(kernel) for kernel in kernels] for kernels in expected
    ]


@check(30)
@given(layers(filters=2), st.sampled_from((1, 2, 4)))
def test_filters_of_a_group_are_summed(importance: Tensor, group: int) -> None:
    importance = torch.cat([importance * (i + 1) for i in range(group)])
    assert group_sum(importance, group).tolist() == reference.group_filters(importance.tolist(), group)


# ---------------------------------------------------------------- 4.2


@check(300)
@given(layers(filters=3), st.integers(1, 6))
@example(torch.zeros(1, 1, 7, 7), 6)
@example(torch.eye(3)[None, None], 4)
def test_candidate_patterns(importance: Tensor, entries: int) -> None:
    entries = min(entries, importance.shape[2] * importance.shape[3])
    expected = [[reference.candidate_pattern(kernel, entries) for kernel in f] for f in importance.tolist()]
    assert candidate_patterns(importance, entries).tolist() == expected


@check(200)
@given(layers(filters=3), st.integers(1, 9))
@example(torch.zeros(1, 1, 7, 7), 9)
@example(torch.eye(3)[None, None], 4)
def test_positions_outside_the_candidates(importance: Tensor, entries: int) -> None:
    entries = min(entries, importance.shape[2] * importance.shape[3])
    outside = outside_candidates(importance, entries)
    assert outside.tolist() == [
        [reference.settled_positions(kernel, entries) for kernel in f] for f in importance.tolist()
    ]
    bits = candidate_patterns(importance, entries)[..., None]
    kept = (bits >> torch.arange(importance[0, 0].numel())) & 1
    assert not (outside.flatten(2) & kept.bool()).any(), "no candidate pattern keeps one"


@check(300)
@given(st.lists(st.integers(0, 3), min_size=9, max_size=9))
def test_candidate_patterns_of_the_papers_case(values: list[int]) -> None:
    kernel = torch.tensor(values, dtype=torch.float32).view(1, 1, 3, 3)
    assert candidate_patterns(kernel, 4).item() == reference.candidate_pattern(kernel[0, 0].tolist(), 4)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (2, 5), (3, 3), (4, 4), (5, 5)], ids=str)
def test_candidate_patterns_with_any_number_of_entries(shape: tuple[int, int]) -> None:
    """Up to the whole kernel: the neighbourhood has to grow several times."""
    generator = torch.Generator().manual_seed(0)
    importance = torch.randint(0, 4, (3, 4, *shape), generator=generator).float()
    few = shape[0] * shape[1] <= 10
    for entries in [*range(1, shape[0] * shape[1] + 1)] if few else [7, 9]:
        expected = [
            [reference.candidate_pattern(kernel, entries) for kernel in f] for f in importance.tolist()
        ]
        assert candidate_patterns(importance, entries).tolist() == expected, entries


@pytest.mark.parametrize("scale", [1.0, 1e-16, 1e16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_candidate_patterns_of_real_gradients(dtype: torch.dtype, scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, grad = torch.randn(2, 16, 8, 3, 3, generator=generator).to(dtype)
    importance = taylor_importance(weight, grad * scale)
    expected = [[reference.candidate_pattern(kernel, 4) for kernel in f] for f in importance.tolist()]
    assert candidate_patterns(importance, 4).tolist() == expected


@check(60)
@given(
    st.lists(
        st.lists(layers(shapes=((2, 3), (3, 3), (1, 3)), filters=3), min_size=1, max_size=3), max_size=4
    ),
    st.integers(1, 4),
    st.integers(1, 12),
)
def test_competitive_scores_and_pool(batches: list[list[Tensor]], entries: int, num_patterns: int) -> None:
    shape = (3, 3)
    batches = [
        [torch.nn.functional.pad(x, (0, 3 - x.shape[3], 0, 3 - x.shape[2])) for x in b] for b in batches
    ]
    votes = PatternVotes.empty()
    for batch in batches:
        for importance in batch:
            votes = add_votes(votes, candidate_patterns(importance, entries), shape)
    expected = reference.competitive_scores([[x.tolist() for x in batch] for batch in batches], entries)
    assert dict(zip(votes.bits.tolist(), votes.counts.tolist(), strict=True)) == expected
    if expected:
        pool = select_pool(votes, num_patterns, shape)
        assert [pattern.bits for pattern in pool.patterns] == reference.select_pool(expected, num_patterns)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (5, 5), (7, 7)], ids=str)
def test_competitive_scores_of_other_kernel_sizes(shape: tuple[int, int]) -> None:
    """Small kernels are counted by their bits, large ones by sorting: both are the same count."""
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 2, (6, 5, *shape), generator=generator).float() for _ in range(3)]
    entries = min(4, shape[0] * shape[1])
    votes = PatternVotes.empty()
    for importance in batches:
        votes = add_votes(votes, candidate_patterns(importance, entries), shape)
    expected = reference.competitive_scores([[x.tolist()] for x in batches], entries)
    assert dict(zip(votes.bits.tolist(), votes.counts.tolist(), strict=True)) == expected
    pool = select_pool(votes, 8, shape)
    assert [pattern.bits for pattern in pool.patterns] == reference.select_pool(expected, 8)


# ---------------------------------------------------------------- 4.3


@check(100)
@given(batches_and_pools(), st.data())
def test_votes_over_batches(case: tuple[list[Tensor], list[int]], data: st.DataObject) -> None:
    batches, pool = case
    counted = data.draw(st.lists(st.booleans(), min_size=len(batches), max_size=len(batches)))
    masks = masks_of(pool, batches[0])
    counts = torch.zeros(*batches[0].shape[:2], len(pool), dtype=torch.int32)
    for importance, counts_too in zip(batches, counted, strict=True):
        add_pattern_votes_(counts, importance, masks, torch.tensor(float(counts_too)))
    expected = reference.pattern_votes([x.tolist() for x in batches], pool, counted)
    assert counts.tolist() == expected
    assert counts.argmax(dim=-1).tolist() == reference.final_patterns(expected)
    assert best_patterns(batches[0], masks).tolist() == [
        [reference.best_pattern(kernel, pool) for kernel in kernels] for kernels in batches[0].tolist()
    ]


LOSSES = st.lists(
    st.sampled_from((0.5, 1.0, 1.0009, 1.0018, 1.002, 2.0, 600.0, 5000.0)), min_size=1, max_size=12
)


@check(100)
@given(LOSSES, st.sampled_from((0.0, 0.0018, 0.5)))
def test_loss_margin(losses: list[float], margin: float) -> None:
    rules = {"ratio": reference.counted_literal, "increase": reference.counted_increase}
    for name, rule in rules.items():
        previous, counted = None, []
        for loss in torch.tensor(losses, dtype=torch.float64):
            counted.append(bool(batch_counts(previous, loss, margin, name)))
            previous = loss
        assert counted == reference.which_batches_count(losses, margin, rule), name


@check(100)
@given(layers(), st.data())
def test_each_filter_keeps_its_most_important_kernels(importance: Tensor, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, importance.shape[1]))
    alive = keep_kernels(kernel_scores(importance), kept)
    assert alive.tolist() == reference.important_kernels(
        reference.accumulated_kernel_importance([importance.tolist()]), kept
    )
    assert (alive.sum(dim=1) == kept).all()


@check(100)
@given(batches_and_pools(), st.sampled_from((1, 2, 4)), st.booleans(), st.data())
def test_finalisation_as_a_whole(
    case: tuple[list[Tensor], list[int]], group: int, inside: bool, data: st.DataObject
) -> None:
    """From importances of several batches to the mask, with filters in groups."""
    batches = [torch.cat([x.roll(i, dims=1) for i in range(group)]) for x in case[0]]
    pool = case[1]
    filters, channels, height, width = batches[0].shape
    kept = data.draw(st.integers(0, channels))
    masks = masks_of(pool, batches[0])

    counts = torch.zeros(filters // group, channels, len(pool), dtype=torch.int32)
    summed = torch.zeros(filters // group, channels, height, width)
    for importance in batches:
        grouped = group_sum(importance, group)
        add_pattern_votes_(counts, grouped, masks, torch.tensor(1.0))
        summed += grouped
    pattern_id = counts.argmax(dim=-1)
    scores = chosen_scores(summed, masks, pattern_id) if inside else kernel_scores(summed)
    mask = pattern_mask(pattern_id, keep_kernels(scores, kept), masks, group)

    lists = [reference.group_filters(x.tolist(), group) for x in batches]
    pattern_of = [
        [pool[index] for index in row]
        for row in reference.final_patterns(reference.pattern_votes(lists, pool))
    ]
    totals = reference.accumulated_kernel_importance(lists, pattern_of if inside else None)
    alive = reference.important_kernels(totals, kept)
    assert mask.tolist() == reference.keep_mask(pattern_of, alive, height, width, group)
    assert (mask.flatten(1).sum(dim=1) == kept * pool[0].bit_count()).all()


# ---------------------------------------------------------------- 4.4


@check(60)
@given(layers(filters=3), st.integers(0, 10_000), st.sampled_from((0.00025, 0.1)))
def test_group_lasso_gradient_is_that_of_autograd(shape_of: Tensor, seed: int, coefficient: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape_of.shape, generator=generator, dtype=torch.float64)
    keep = torch.rand(shape_of.shape, generator=generator) < 0.4
    keep &= torch.rand(shape_of.shape[:2], generator=generator)[..., None, None] < 0.7  # whole kernels
    weight *= torch.rand(shape_of.shape[:2], generator=generator)[..., None, None] < 0.8  # norms of 0
    before = torch.randn(shape_of.shape, generator=generator, dtype=torch.float64)

    leaf = weight.clone().requires_grad_()
    penalty = reference.modified_group_lasso(leaf, keep, coefficient)
    expected = torch.zeros_like(weight)
    if penalty.requires_grad:
        (expected,) = torch.autograd.grad(penalty, leaf)

    grad = before.clone()
    add_lasso_gradient_(grad, weight, keep, coefficient)
    torch.testing.assert_close(grad, before + expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        lasso_penalty(weight, keep) * coefficient, penalty.detach(), rtol=1e-12, atol=1e-15
    )
    assert (grad[keep] == before[keep]).all(), "kept weights are not penalised"


def test_group_lasso_coefficient_may_be_a_tensor() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 2, 3, 3, generator=generator)
    keep = torch.rand(3, 2, 3, 3, generator=generator) < 0.5
    number, tensor = torch.zeros_like(weight), torch.zeros_like(weight)
    add_lasso_gradient_(number, weight, keep, 0.3)
    add_lasso_gradient_(tensor, weight, keep, torch.tensor(0.3))
    assert number.any()
    torch.testing.assert_close(number, tensor)


# ---------------------------------------------------------------- kernels per filter and layer


@st.composite
def networks(draw: st.DrawFn) -> list[tuple[Tensor, int]]:
    """Kernel scores [F, C] and entries of one to four layers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    result = []
    for _ in range(draw(st.integers(1, 4))):
        shape = (draw(st.integers(1, 6)), draw(st.integers(1, 8)))
        top = draw(st.sampled_from(LARGEST))
        result.append(
            (torch.randint(0, top + 1, shape, generator=generator).float(), draw(st.integers(1, 4)))
        )
    return result


@check(200)
@given(networks(), st.integers(0, 40), st.floats(0, 1))
def test_allocation_over_layers(network: list[tuple[Tensor, int]], other: int, spend: float) -> None:
    budgets = [
        LayerBudget(str(i), filters=len(scores), kernels=scores.shape[1], entries=entries, positions=9)
        for i, (scores, entries) in enumerate(network)
    ]
    total = sum(layer.weights for layer in budgets) + other
    least, most = (sum(b.price * k(b) for b in budgets) + other for k in (lambda b: 1, lambda b: b.kernels))
    nonzero = round(least + spend * (most - least))
    gains = {str(i): kernel_gains(scores) for i, (scores, _) in enumerate(network)}
    kept = allocate(budgets, other, total / nonzero, gains)
    expected = reference.greedy_allocation(
        [scores.tolist() for scores, _ in network], [entries for _, entries in network], nonzero - other
    )
    assert list(kept.values()) == expected
    assert sum(layer.price * kept[layer.name] for layer in budgets) + other <= nonzero
