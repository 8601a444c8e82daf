"""A run's own sizes on a cluster, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from clicktrain.cluster import Cluster, Level, Link, project
from clicktrain.cluster.projection import profile_of, recorded
from clicktrain.errors import UserError

LINK = Link("link", 1e6, 0.0)
PAIR = Cluster((Level(2, LINK),))
SUMMARY: dict[str, Any] = {"dense_parameters": 1000, "conv_weights": 800, "hard_prune_epoch": 1.4}


def line(epoch: int, **values: Any) -> dict[str, Any]:
    usual = {
        "density": 1.0, "batch_size": 10, "gradient_bytes": 4000, "gradient_bytes_epoch": 20_000,
        "parameters": 1000, "step_ms_median": 30.0, "train_flops": 3e9 * epoch,
        "train_flops_dense": 3e9 * epoch,
    }  # fmt: skip
    return {"epoch": epoch, **usual, **values}


def test_sizes_of_packed_layers_are_those_that_the_run_stored() -> None:
    lines = [line(1), line(2), line(3, gradient_bytes=1000, gradient_bytes_epoch=5000, parameters=250)]
    sizes = recorded(lines, None)
    assert [(one.num_bytes, one.dense_bytes, one.source, one.images) for one in sizes] == [
        (4000, 4000, "gradients", 50), (4000, 4000, "gradients", 50), (1000, 4000, "gradients", 50)
    ]  # fmt: skip
    assert [one.flops for one in sizes] == [pytest.approx(3e9 / 50)] * 3


def test_frozen_masks_of_layers_that_are_not_packed_count_by_what_they_keep() -> None:
    lines = [line(1), line(2, density=0.25), line(3, density=0.25)]
    sizes = recorded(lines, SUMMARY)
    assert [(one.num_bytes, one.source) for one in sizes] == [
        (4000, "gradients"),
        (4000, "gradients"),  # masks were frozen in the middle of it
        (4 * (1000 - 0.75 * 800), "masks"),
    ]
    packed = line(3, density=0.25, gradient_bytes=1600, gradient_bytes_epoch=8000, parameters=400)
    assert recorded([line(1), packed], SUMMARY)[1].source == "gradients"


def test_bytes_counted_at_the_collective_come_first() -> None:
    counted = {"gradients": {"bytes": 5000, "calls": 15}, "growth": {"bytes": 500, "calls": 5},
               "decisions": {"bytes": 10_000, "calls": 100}}  # fmt: skip
    lines = [line(1, exchange=counted, exchange_steps=5, processes=2)]
    (one,) = recorded(lines, SUMMARY)
    assert (one.num_bytes, one.calls, one.source, one.batch) == (1100, 4, "counted", 5)
    assert one.images == 50


def test_a_network_that_is_sparse_from_the_start_is_compared_with_the_dense_one() -> None:
    lines = [line(1, density=0.5, gradient_bytes=2400, gradient_bytes_epoch=12_000, parameters=600)]
    assert recorded(lines, SUMMARY)[0].dense_bytes == 4000
    projection = project(lines, SUMMARY, PAIR)
    assert projection.bytes_saved == pytest.approx(0.4)
    assert not projection.dense_known
    assert project(lines, SUMMARY, PAIR, dense_step_ms=50).dense_known
    assert project(lines, {**SUMMARY, "step_ms": {"dense": 50}}, PAIR).dense_known
    assert project([line(1)], SUMMARY, PAIR).dense_known


def test_an_epoch_by_hand() -> None:
    """Two GPUs: half a message twice. Steps take 30 ms, of which 20 are backward; 4 ms of exchange follow."""
    lines = [line(1), line(2, gradient_bytes=1000, gradient_bytes_epoch=5000, step_ms_median=12.0)]
    projection = project(lines, None, PAIR)
    first, second = projection.epochs
    assert (first.steps, first.bytes_step) == (2.5, 4000)
    assert first.run.exchange == first.run.exposed == pytest.approx(4e-3)
    assert first.seconds == pytest.approx(2.5 * 34e-3)
    assert second.run.seconds == pytest.approx(13e-3)
    assert second.dense.seconds == pytest.approx(34e-3)
    assert second.all_gradients.seconds == pytest.approx(16e-3)
    assert projection.bytes_saved == pytest.approx(1 - (1 + 0.25) / 2)
    assert [projection.exchange_saved, projection.exposed_saved] == pytest.approx([0.75, 0.75])
    assert projection.seconds == pytest.approx(2.5 * (34e-3 + 13e-3))
    assert projection.dense_seconds == pytest.approx(5 * 34e-3)


def test_larger_batches_save_bytes_of_an_epoch_as_well() -> None:
    """PruneTrain's figure 11, dotted lines."""
    grown = line(2, batch_size=25, gradient_bytes=2000, gradient_bytes_epoch=4000)
    projection = project([line(1), grown], None, PAIR)
    first, second = projection.epochs
    assert second.bytes_step == first.bytes_step / 2
    assert second.bytes_epoch == pytest.approx(first.bytes_epoch / 5)
    assert projection.bytes_saved == pytest.approx(0.25)
    assert projection.bytes_saved_run == pytest.approx(0.4)
    assert second.dense.seconds == first.dense.seconds
    fixed = project([line(1), grown], None, PAIR, batch=5)
    assert [cost.steps for cost in fixed.epochs] == [5, 5]
    assert fixed.epochs[0].run.seconds == pytest.approx(15e-3 + 4e-3)


def test_a_step_of_several_batches_exchanges_once() -> None:
    """5 steps of 2 batches; the exchange is hidden by the backward pass of the second one only."""
    once, twice = (project([line(1)], None, PAIR, accumulate=number).epochs[0] for number in (1, 2))
    assert recorded([line(1)], None, 2)[0].images == 100
    assert twice.steps == once.steps == 2.5
    assert twice.run.seconds == pytest.approx(60e-3 + 4e-3)
    assert twice.bytes_epoch == once.bytes_epoch


def test_computation_by_flops_and_by_a_dense_run() -> None:
    lines = [line(1, train_flops=1.5e9)]
    by_flops = project(lines, None, PAIR, tflops=1e-3).epochs[0]  # 1e9 a second; 3e7 of an image
    assert by_flops.run.seconds == pytest.approx(10 * 3e7 / 1e9 + 4e-3)
    assert by_flops.dense.seconds == pytest.approx(10 * 6e7 / 1e9 + 4e-3)
    assert project(lines, None, PAIR, dense_step_ms=50).epochs[0].dense.seconds == pytest.approx(54e-3)
    assert project(lines, {"step_ms": {"dense": 40}}, PAIR).epochs[0].dense.seconds == pytest.approx(44e-3)


def test_layers_of_the_summary_say_when_gradients_are_ready() -> None:
    rows = [
        {
            "name": "first",
            "shape": [4, 3, 3, 3],
            "density": 1.0,
            "forward_flops": 9,
            "forward_flops_dense": 9,
        },
        {"name": "last", "shape": [10, 4], "density": 0.5, "forward_flops": 2, "forward_flops_dense": 4},
    ]
    assert profile_of({"layers": rows}, dense=True) == [(160, 4), (432, 9)]
    assert profile_of({"layers": rows}, dense=False) == [(80, 2), (432, 9)]
    assert profile_of(None, dense=True) == []


def test_runs_without_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="no finished epoch with the bytes of its gradients"):
        project([{"epoch": 1}], None, PAIR)
    with pytest.raises(UserError, match="no measured steps: say what a GPU computes by tflops"):
        project([line(1, step_ms_median=None)], None, PAIR)
    with pytest.raises(UserError, match="has not recorded its FLOPs"):
        project([line(1, train_flops=None)], None, PAIR, tflops=10)
