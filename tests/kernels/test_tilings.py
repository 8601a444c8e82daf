"""Which tilings are tried: rules for images and masks of every kind, and what a file may say of one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from clicktrain.kernels.sparse_conv2d.blocked.codegen import source
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.tiling import candidates

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
