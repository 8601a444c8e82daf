from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from clicktrain.bench.masks import check_sparsity, model_masks, pattern_mask
from clicktrain.bench.peak import measure_peak, measuring_loops, multiply_adds, one_pass
from clicktrain.bench.timing import fastest, median_ms
from clicktrain.errors import UserError
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.native.library import call
from clicktrain.models import create_model

needs_compiler = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")


def test_every_call_is_made_in_every_round() -> None:
    made: list[str] = []
    times = median_ms(
        {name: lambda name=name: made.append(name) for name in "abc"}, rounds=3, repeat=2, warmup=1
    )
    assert set(times) == set("abc")
    assert all(value >= 0 for value in times.values())
    rounds = [made[i : i + 6] for i in range(0, len(made), 6)]
    assert len(rounds) == 4
    assert all(sorted(one) == list("aabbcc") for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1  # not always the same neighbour


def test_the_collector_is_left_as_it_was() -> None:
    seen = []

    def fail() -> None:
        seen.append(gc.isenabled())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        median_ms({"one": fail}, rounds=1)
    assert seen == [False]
    assert gc.isenabled()


def test_medians_are_not_means(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 2.1, 3.0, 3.2, 4.0, 9.0])  # a warm-up, then 0.1, 0.2 and 5 seconds
    monkeypatch.setattr("clicktrain.latency.timer.time.perf_counter", lambda: next(clock))
    assert median_ms({"one": lambda: None}, rounds=3)["one"] == pytest.approx(200)


def test_means_and_the_fastest() -> None:
    assert fastest({"slow": 2.0, "quick": 1.0}) == ("quick", 1.0)
    with pytest.raises(UserError, match="rounds must be at least 1, not 0"):
        median_ms({}, rounds=0)


@pytest.mark.parametrize("shape", [(24, 32, 3, 3), (10, 32, 1, 1), (12, 16, 5, 5), (4, 3, 3, 3)])
@pytest.mark.parametrize("group", [1, 4])
def test_masks_have_patterns_and_equal_filters(shape: tuple[int, int, int, int], group: int) -> None:
    mask = pattern_mask(shape, 4.0, group, torch.Generator().manual_seed(0))
    assert mask.shape == shape
    per_filter = mask.flatten(1).sum(1)
    assert (per_filter == per_filter[0]).all()
    kernels = mask.flatten(2).sum(2)
    entries = {(3, 3): 4, (1, 1): 1, (5, 5): 11}[shape[2:]]
    assert set(kernels.unique().tolist()) <= {0, entries}
    wanted = shape[1] * shape[2] * shape[3] / 4 / entries
    assert per_filter[0] / entries == pytest.approx(max(wanted, 1), abs=0.5)
    for f in range(shape[0]):
        assert torch.equal(mask[f], mask[f - f % group])
    if shape[0] > group:
        assert not torch.equal(mask[0], mask[group]) or shape[1] * shape[2] < 10


def test_masks_of_a_model_leave_the_first_and_grouped_convolutions() -> None:
    model = create_model("mobilenet_v1", num_classes=3, width=0.25)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    masks = model_masks(model, 4.0, 1)
    assert 0 < len(masks) < len(convolutions)
    assert next(iter(convolutions)) not in masks
    assert all(convolutions[name].groups == 1 for name in masks)


@pytest.mark.parametrize(
    ("compressions", "groups", "part"),
    [
        ((2.0,), (1,), "compression is 2: 4 of 9"),
        ((float("nan"),), (1,), "compression is nan"),
        ((4.0, float("inf")), (1,), "compression is inf"),
        ((4.0,), (1, 0), "group is 0"),
        ((), (1,), "at least one compression"),
    ],
)
def test_sparsity_that_cannot_be(compressions: tuple[float, ...], groups: tuple[int, ...], part: str) -> None:
    with pytest.raises(UserError, match=part):
        check_sparsity(compressions, groups)


def test_peak_is_measured() -> None:
    peak = measure_peak(seconds=1e-4)
    if toolchain() is None:
        assert peak is None
    else:
        assert peak is not None
        assert min(peak.gflops, peak.l1_read_gbs, peak.l2_read_gbs) > 0.01


SIZES = [(0, 8), (8, 0), (1000, 24), (24, 3000), (8192, 8192), (7, 1), (33, 65), (2048, 2049)]


@needs_compiler
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_one_pass_writes_all_of_a_result(sizes: tuple[int, int], dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        anywhere = torch.ones(sizes[0] + 1, dtype=dtype)[1:]
        result = one_pass([anywhere, torch.ones(16)], torch.empty(sizes[1], dtype=dtype))()
        assert result.shape == (sizes[1],)
        assert result.dtype == dtype
        assert not result.any()
    finally:
        torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("size", [4, 60, 64, 100, 8196])
def test_one_pass_writes_nothing_else(size: int, stream: int) -> None:
    memory = torch.full((size + 128,), 7, dtype=torch.uint8)
    source = torch.ones(size, dtype=torch.uint8)
    call(measuring_loops()[0].pass_over, source, size, memory[64:], size, stream, 1)
    assert not memory[64 : 64 + size].any()
    assert (memory[:64] == 7).all()
    assert (memory[64 + size :] == 7).all()


@needs_compiler
def test_multiply_adds_are_finite() -> None:
    assert multiply_adds(1000)().isfinite().all()


@needs_compiler
@pytest.mark.parametrize("size", [4, 100, 4096, 5000])
def test_reads_of_any_size_are_counted(size: int) -> None:
    library, _, _ = measuring_loops()
    assert call(library.read_all, torch.ones(2 * size), size, 3, 1) == 1
