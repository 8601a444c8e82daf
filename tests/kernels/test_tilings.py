"""Which tilings are tried: rules for images and masks of every kind, and what a file may say of one."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from clicktrain.kernels.sparse_conv2d.blocked.codegen import source
from clicktrain.kernels.sparse_conv2d.blocked.patterns.pairs import pair_taps
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Backward, Forward, tiles
from clicktrain.kernels.sparse_conv2d.blocked.tiling import candidates, pair_candidates

PATTERNS: tuple[Taps, ...] = ((0, 1, 3, 4), (1, 2, 4, 5), (3, 4, 6, 7))
IMAGES = [(1, 1), (1, 16000), (1, 70000), (4, 4), (7, 7), (8, 2048), (9, 13), (28, 28), (224, 224)]


def problem(image: tuple[int, int], stride: int = 1, channels: int = 64) -> ConvProblem:
    kernel = (min(image[0], 3), min(image[1], 3))
    padding = (kernel[0] // 2, kernel[1] // 2)
    return ConvProblem.make(channels, channels, kernel, image, (stride, stride), padding)


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("registers", [16, 32])
@pytest.mark.parametrize("stride", [1, 2])
def test_every_image_has_candidates_whose_work_is_bounded(
    image: tuple[int, int], registers: int, stride: int
) -> None:
    for phase in PHASES:
        found = candidates(phase, problem(image, stride), registers, 8, ((0, 1, 2),))
        large = phase != "wgrad" and image[0] * image[1] // stride**2 > 8
        codes = {one.code for one in found}
        assert ("cache_blocked" in codes) == large
        assert ("unrolled" in codes) == (registers >= 32 or not large)
        assert "indexed" in codes
        for one in found:
            if one.code == "cache_blocked":
                assert one.region[0] * one.region[1] <= 64
            if one.code == "indexed" and phase == "wgrad":
                assert one.tile[1] * one.region[0] * one.region[1] <= 512


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("image", [(3, 3), (7, 7), (15, 15), (31, 31), (1, 16000)], ids=str)
def test_few_kernels_are_built_for_pairs(phase: Phase, image: tuple[int, int]) -> None:
    one = problem(image, channels=128)
    plain = candidates(phase, one, 32, 16, PATTERNS)
    found = pair_candidates(phase, one, plain, 32, 16)
    assert found[0].pairs
    assert [tiling.pairs for tiling in found].count(False) == 1  # where pairs do not pay
    assert len(found) == len(set(found)) <= 3
    assert {tiling.code for tiling in found} <= {"unrolled", "indexed"}
    for tiling in found:
        text = source(phase, one, PATTERNS[:1], replace(tiling, images=1), torch.bfloat16, 16)
        assert len(text.splitlines()) < 4000
    # Masks without patterns: taps that are neighbors in a row.
    plain = candidates(phase, one, 32, 16, PATTERNS, complete=False)
    codes = {tiling.code for tiling in pair_candidates(phase, one, plain, 32, 16, False) if tiling.pairs}
    assert "indexed" in codes


def test_one_tap_has_no_pairs() -> None:
    point = ConvProblem.make(64, 64, (1, 1), (8, 8))
    plain = candidates("forward", point, 32, 16, ((0,),))
    assert pair_candidates("forward", point, plain, 32, 16) == plain


@pytest.mark.parametrize("phase", ["forward", "dgrad"])
def test_four_taps_anywhere_are_two_pairs(phase: Phase) -> None:
    one = problem((9, 9))
    for taps in itertools.combinations(range(9), 4):
        pairs = pair_taps(taps, phase, one)
        assert sorted(number for pair in pairs for number in pair if number is not None) == [0, 1, 2, 3]
        assert len(pairs) == 2
    # Neighbors in a row find both operands in one cell: the left one of the source is its low half.
    assert set(pair_taps((0, 1, 3, 4), phase, one)) == (
        {(0, 1), (2, 3)} if phase == "forward" else {(1, 0), (3, 2)}
    )
    assert [pair[1] for pair in pair_taps((0, 4, 8), phase, one)].count(None) == 1


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (4, 1), (5, 1), (6, 2), (9, 3), (64, 2)])
@pytest.mark.parametrize("length", [1, 3, 7, 15, 31])
def test_tiles_are_about_alike(length: int, size: int, stride: int) -> None:
    axis = ConvProblem.make(1, 1, (3, 3), (length, length), (stride, stride), (1, 1)).rows
    for direction in (Forward(axis), Backward(axis)):
        cut = tiles(direction, size)
        assert [tile.start for tile in cut] == [0, *itertools.accumulate(tile.size for tile in cut[:-1])]
        assert sum(tile.size for tile in cut) == direction.length
        assert all(tile.start % direction.step == 0 and 1 <= tile.size <= size for tile in cut)
        assert len(cut) == -(-direction.length // size)
        assert max(tile.size for tile in cut) - min(tile.size for tile in cut) < 2 * direction.step


def test_a_wide_image_does_not_make_a_long_text() -> None:
    lengths = []
    for width in (4000, 64000):
        wide = problem((1, width), channels=8)  # 768,000 multiply-adds and more: it sweeps
        for phase in ("forward", "dgrad"):
            tiling = candidates(phase, wide, 16, 8, ((0, 1, 2),))[0]
            assert tiling.code == "cache_blocked"
            lengths.append(len(source(phase, wide, ((0, 1, 2),), tiling, torch.float32, 8).splitlines()))
    assert max(lengths) < 2000


@pytest.mark.parametrize(
    ("tap_patterns", "complete", "image", "sweeps"),
    [
        (PATTERNS, True, (28, 28), True),
        (PATTERNS, False, (28, 28), False),  # kernels fall apart into single taps
        (((0,), (4,), (8,)), True, (28, 28), False),
        ((), True, (28, 28), False),
        (tuple(tuple(range(i, i + 9)) for i in range(16)), True, (7, 7), False),  # too much code
    ],
)
def test_kernels_of_several_taps_and_few_sets_sweep(
    tap_patterns: tuple[Taps, ...], complete: bool, image: tuple[int, int], sweeps: bool
) -> None:
    found = candidates("forward", problem(image), 16, 8, tap_patterns, complete=complete)
    assert any(one.code == "cache_blocked" for one in found) == sweeps


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("results", -1, "results of a tiling is a number of at least 0, not -1"),
        ("sources", 1.5, "sources of a tiling is a number of at least 0, not 1.5"),
        ("filters_per_tile", 0, "filters_per_tile of a tiling is a number of at least 1, not 0"),
        ("tile", [4, 0], "tile of a tiling is a number of at least 1, not 0"),
        ("region", [4], r"region of a tiling is two numbers, not \[4\]"),
        ("images", True, "images of a tiling is a number of at least 1, not True"),
    ],
)
def test_what_a_file_says_is_checked(field: str, value: Any, message: str) -> None:
    fields = asdict(Tiling((4, 4), code="cache_blocked"))
    assert Tiling.from_dict(fields) == Tiling((4, 4), code="cache_blocked")
    with pytest.raises(ValueError, match=message):
        Tiling.from_dict({**fields, field: value})


def test_no_filters_no_channels() -> None:
    nothing = ConvProblem.make(0, 0, (3, 3), (6, 6))
    for phase in PHASES:
        assert "run(" in source(phase, nothing, (), Tiling((2, 4)), torch.float32, 8)
