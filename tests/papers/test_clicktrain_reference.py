"""The oracle itself, against cases worked out by hand from the paper's text and Figure 6."""

from __future__ import annotations

import math

import clicktrain_reference as reference
import pytest
import torch

MARGIN = 0.0018


def bits(*rows: str) -> int:
    """``bits("11.", "1..")``: ``1`` marks a kept position."""
    flat = "".join(rows)
    return sum(1 << index for index, mark in enumerate(flat) if mark == "1")


def test_a_3x3_kernel_has_126_patterns_of_4() -> None:
    patterns = reference.every_pattern(4, 3, 3)
    assert len(patterns) == len(set(patterns)) == math.comb(9, 4) == 126
    assert all(value.bit_count() == 4 for value in patterns)


def test_the_second_position_may_be_diagonal_and_the_others_may_not() -> None:
    # First 9 (centre), second 8 (diagonal corner). Candidates: the centre's 4-neighbours and the corner's, so
    # not the corner with 7, which touches neither by a side.
    kernel = [[8, 1, 7], [2, 9, 3], [0, 4, 0]]
    assert reference.candidate_pattern(kernel, 4) == bits("1..", ".11", ".1.")


def test_a_far_second_maximum_is_out_of_reach() -> None:
    kernel = [[9, 1, 8], [1, 0, 8], [8, 8, 8]]
    assert reference.candidate_pattern(kernel, 2) == bits("11.", "...", "...")
    # Candidates after (0, 0), (0, 1) are (1, 0), (0, 2), (1, 1).
    assert reference.candidate_pattern(kernel, 4) == bits("111", "1..", "...")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (1, bits("1..", "...", "...")),
        (2, bits("11.", "...", "...")),
        (3, bits("111", "...", "...")),
        (4, bits("111", "1..", "...")),
        (5, bits("111", "11.", "...")),
    ],
)
def test_equal_importances_keep_the_first_positions(entries: int, expected: int) -> None:
    assert reference.candidate_pattern([[1, 1, 1]] * 3, entries) == expected


def test_too_few_candidates_are_all_taken_and_the_search_goes_on() -> None:
    # Along a row the only way is outwards: 5, then 4, then both ends 3 and 0, then 9 behind the 3.
    assert reference.candidate_pattern([[1, 2, 3, 5, 4, 0, 4]], 2) == bits("...11..")
    assert reference.candidate_pattern([[1, 2, 3, 5, 4, 0, 4]], 4) == bits("..1111.")
    assert reference.candidate_pattern([[1, 2, 3, 5, 4, 0, 4]], 5) == bits("..11111")
    assert reference.candidate_pattern([[7]], 4) == bits("1")
    assert reference.candidate_pattern([[1, 2], [3, 4]], 6) == bits("11", "11")


def test_crosses_are_what_neither_of_the_first_two_touches_by_a_side() -> None:
    # First 9 (center), second 8 (corner): the center's 4-neighbors are candidates, the other corners are out.
    kernel = [[8, 1, 7], [2, 9, 3], [0, 4, 0]]
    assert reference.settled_positions(kernel, 4) == [
        [False, False, True],
        [False, False, False],
        [True, False, True],
    ]
    # First 9 (corner), second 8 (its neighbor to the right).
    kernel = [[9, 8, 1], [1, 1, 1], [1, 1, 7]]
    assert reference.settled_positions(kernel, 4) == [
        [False, False, False],
        [False, False, True],
        [True, True, True],
    ]
    assert reference.settled_positions(kernel, 2)[1:] == [[True] * 3] * 2
    assert reference.settled_positions([[1, 2, 3, 5, 4, 0, 4]], 4) == [[True, True, *[False] * 4, True]]
    assert reference.settled_positions([[7]], 1) == [[False]]


def test_the_pool_is_the_most_proposed_patterns() -> None:
    left, right = [[1, 1, 0]], [[0, 1, 1]]
    layer = [[left, right], [right, right]]
    scores = reference.competitive_scores([[layer], [layer, layer]], entries=2)
    assert scores == {bits("11."): 3, bits(".11"): 9}
    assert reference.select_pool(scores, 1) == [bits(".11")]
    assert reference.select_pool({6: 2, 3: 2, 5: 1}, 2) == [3, 6]


def test_votes_final_pattern_and_ties() -> None:
    pool = [bits("11."), bits(".11")]
    left, right, both = [[1, 1, 0]], [[0, 1, 1]], [[1, 1, 1]]
    batches = [[[left, right]], [[right, both]], [[right, right]]]
    votes = reference.pattern_votes(batches, pool)
    assert votes == [[[1, 2], [1, 2]]]
    assert reference.final_patterns(votes) == [[1, 1]]
    assert reference.pattern_votes(batches, pool, [True, True, False]) == [[[1, 1], [1, 1]]]
    assert reference.final_patterns([[[1, 1]]]) == [[0]]


def test_loss_margin_in_both_readings() -> None:
    losses = [2.0, 2.003, 2.5, 2000.0]
    assert reference.which_batches_count(losses, MARGIN, reference.counted_increase) == [
        True,
        True,
        False,
        False,
    ]
    # 2.5 / 2000 = 0.00125 is under 0.0018: the printed rule rejects a loss only when it grows 556-fold.
    assert reference.which_batches_count(losses, MARGIN, reference.counted_literal) == [
        True,
        True,
        True,
        False,
    ]


def test_important_kernels_are_equally_many_per_filter() -> None:
    assert reference.important_kernels([[1, 3, 3], [0, 0, 0]], 2) == [
        [False, True, True],
        [True, True, False],
    ]


def test_group_lasso_by_hand_and_its_gradient() -> None:
    weight = torch.tensor([[[[3.0, 5.0, 4.0]], [[0.0, 2.0, 0.0]]]], dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[[[False, True, False]], [[False, True, False]]]])
    penalty = reference.modified_group_lasso(weight, keep, 0.5)
    assert penalty.item() == pytest.approx(2.5)
    penalty.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == pytest.approx([0.3, 0.0, 0.4, 0.0, 0.0, 0.0])


def test_greedy_allocation_by_hand() -> None:
    layers = [[[5, 3, 1], [5, 3, 1]], [[9, 4, 4]]]
    # Start: 2 * 4 + 1 * 1 = 9. Gains per weight: layer 0 buys (6, 2) / 8, layer 1 buys (4, 4) / 1.
    assert reference.greedy_allocation(layers, [4, 1], 9) == [1, 1]
    assert reference.greedy_allocation(layers, [4, 1], 11) == [1, 3]
    assert reference.greedy_allocation(layers, [4, 1], 18) == [1, 3]
    assert reference.greedy_allocation(layers, [4, 1], 19) == [2, 3]
    assert reference.greedy_allocation(layers, [4, 1], 1000) == [3, 3]
