"""Points of a frontier against slow references, and the time that is put together by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.bench.frontier.lines import phases_of
from clicktrain.bench.frontier.page import FrontierData, to_json, to_markdown
from clicktrain.bench.frontier.points import (
    ROOM,
    Point,
    advantage,
    frontier,
    missing_dense,
    points_of,
    read_times,
    run_seconds,
)
from clicktrain.bench.frontier.recipe import parse_recipe
from clicktrain.bench.frontier.structure import density_of, describe_masks, similar_masks
from clicktrain.bench.masks import pattern_mask
from clicktrain.errors import UserError

JSON_FIELDS = {
    "kind", "method", "setting", "epochs", "seeds", "accuracy_mean", "accuracy_std", "holdout_mean",
    "train_seconds", "train_seconds_wall", "latency_ms_b64", "latency_ms_b1", "train_flops",
    "inference_flops", "bytes", "width", "name",
}  # fmt: skip


def point(kind: str = "dense", name: str = "d", **values: Any) -> Point:
    head = {"method": kind, "setting": kind, "width": 1.0, "epochs": 8, "seeds": 3}
    return Point(kind=kind, name=name, **{**head, **values})  # type: ignore[arg-type]


# ---- the advantage and the frontier, against what their definitions say ---------------------------

# Few values, so that ties and equal costs come; None is what was not measured.
COST = st.sampled_from([None, 1.0, 1.04, 1.05, 1.06, 2.0, 2.1, 3.0])
ACCURACY = st.sampled_from([None, 80.0, 81.5, 83.0, 84.0])
POINTS = st.lists(st.tuples(ACCURACY, COST, COST), max_size=7)


def dense_points(rows: list[tuple[Any, Any, Any]]) -> list[Point]:
    return [
        point(name=f"d{i}", accuracy_mean=a, train_seconds=t, latency_ms_b64=b)
        for i, (a, t, b) in enumerate(rows)
    ]


@given(POINTS, st.tuples(ACCURACY, COST, COST))
def test_the_advantage_is_over_the_best_dense_point_within_the_costs(rows: Any, own: Any) -> None:
    dense = dense_points(rows)
    pruned = point("pruned", "p", accuracy_mean=own[0], train_seconds=own[1], latency_ms_b64=own[2])
    for costs in (("train_seconds", "latency_ms_b64"), ("train_seconds",), ("latency_ms_b64",)):
        allowed = []
        for one in dense:
            fits = one.accuracy_mean is not None and pruned.accuracy_mean is not None
            for cost in costs:
                theirs, mine = getattr(one, cost), getattr(pruned, cost)
                fits = fits and theirs is not None and mine is not None and theirs <= 1.05 * mine
            if fits:
                allowed.append(one.accuracy_mean)
        result = advantage(pruned, dense, costs)
        if not allowed:
            assert result.points is None
            assert result.dense is None
        else:
            assert result.points == pytest.approx(own[0] - max(allowed))
            (named,) = [one for one in dense if one.name == result.dense]
            assert named.accuracy_mean == max(allowed)
    assert ROOM == 1.05


@given(POINTS)
def test_the_frontier_is_what_no_cheaper_point_beats(rows: Any) -> None:
    dense = dense_points(rows)
    known = [p for p in dense if p.accuracy_mean is not None and p.train_seconds is not None]
    best = {
        (p.train_seconds, p.accuracy_mean)
        for p in known
        if not any(
            q.train_seconds <= p.train_seconds and q.accuracy_mean >= p.accuracy_mean  # type: ignore[operator]
            and (q.train_seconds, q.accuracy_mean) != (p.train_seconds, p.accuracy_mean)
            for q in known
        )
    }  # fmt: skip
    line = [(p.train_seconds, p.accuracy_mean) for p in frontier(dense, "train_seconds")]
    assert line == sorted(best)  # type: ignore[type-var]


def test_a_frontier_needs_five_widths_at_three_lengths() -> None:
    grid = [
        point(name=f"{w}-{e}", width=w, epochs=e, accuracy_mean=80.0)
        for w in (0.25, 0.35, 0.5, 0.7, 1.0)
        for e in (8, 16, 32)
    ]
    assert missing_dense(grid) is None
    reason = missing_dense(grid[:-1])
    assert reason is not None
    assert "4 of the widths at 3 lengths or more; 5 are needed" in reason
    grid[0] = point(name="failed", width=0.25, epochs=8, reason="it diverged")
    assert missing_dense(grid) is not None


# ---- masks that look the same --------------------------------------------------------------------


def some_masks(seed: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    uneven = torch.rand(12, 9, 3, 3, generator=g) < torch.linspace(0.05, 0.9, 12)[:, None, None, None]
    return {
        "patterns": pattern_mask((24, 16, 3, 3), 8.0, 1, g),
        "shared": pattern_mask((16, 12, 3, 3), 4.0, 4, g),
        "weights": uneven,
        "linear": torch.rand(10, 40, generator=g) < 0.3,
        "pointwise": torch.rand(9, 7, 1, 1, generator=g) < 0.5,
        "none": torch.zeros(8, 4, 3, 3, dtype=torch.bool),
        "five": torch.rand(6, 5, 5, 5, generator=g) < 0.2,
    }


@given(st.integers(0, 50))
def test_similar_masks_are_described_alike(seed: int) -> None:
    masks = some_masks(seed)
    layers = json.loads(json.dumps(describe_masks(masks)))
    similar = similar_masks(layers, seed + 1)
    assert describe_masks(similar) == layers
    for name, mask in masks.items():
        assert similar[name].shape == mask.shape
        assert similar[name].dtype == torch.bool
        assert int(similar[name].sum()) == int(mask.sum())
        kept = [sorted(m.flatten(1).sum(1).tolist()) for m in (mask, similar[name])]
        assert kept[0] == kept[1]
    total = sum(mask.numel() for mask in masks.values())
    assert density_of(layers) == pytest.approx(sum(int(m.sum()) for m in masks.values()) / total)


def test_what_filters_share_is_kept() -> None:
    masks = {"shared": pattern_mask((16, 12, 3, 3), 4.0, 4, torch.Generator().manual_seed(0))}
    (layer,) = describe_masks(masks)
    assert layer["group"] == 4
    grouped = similar_masks([layer])["shared"].view(4, 4, 12, 3, 3)
    assert bool((grouped == grouped[:, :1]).all())
    used = {tuple(kernel.flatten().tolist()) for kernel in grouped.reshape(-1, 3, 3) if kernel.any()}
    assert used == {tuple(k.flatten().tolist()) for k in masks["shared"].reshape(-1, 3, 3) if k.any()}


# ---- phases, and time put together ---------------------------------------------------------------

CUT = [
    {"event": "stage", "step": 14, "stage": "pool"},
    {"event": "hard_prune", "step": 16, "epoch": 1.6},
    {"event": "stage", "step": 16, "stage": "accelerated"},
    {"event": "operators", "step": 16, "rule": "measured"},
]


def test_phases_of_a_run_that_was_cut_within_an_epoch() -> None:
    metrics = [
        {"stages": {"dense": 1.0}, "density": 1.0},
        {"stages": {"dense": 0.4, "pool": 0.2, "accelerated": 0.4}, "density": 0.25},
        {"stages": {"accelerated": 1.0}, "density": 0.25},
    ]
    phases = phases_of(metrics, CUT, batches=10)
    rows = [(p["stage"], p["frozen"], p["fast"], p["density"], p["batches"], p["updates"]) for p in phases]
    assert rows == [
        ("dense", False, False, 1.0, 14, 0), ("pool", False, False, 1.0, 2, 0),
        ("accelerated", True, True, 0.25, 14, 0),
    ]  # fmt: skip


def test_phases_of_moving_masks_count_the_updates() -> None:
    metrics = [{"stages": {"dynamic": 1.0}, "density": 0.2}] * 2 + [
        {"stages": {"fixed": 1.0}, "density": 0.2}
    ]
    events = [{"event": "regrown", "step": step} for step in (4, 8, 12, 16)]
    events += [{"event": "stage", "step": 20, "stage": "fixed"}, {"event": "hard_prune", "step": 20}]
    phases = phases_of(metrics, events, batches=10)
    assert [(p["stage"], p["frozen"], p["batches"], p["updates"]) for p in phases] == [
        ("dynamic", False, 20, 4), ("fixed", True, 10, 0),
    ]  # fmt: skip


DENSE = {"step_ms": 100.0, "eager_step_ms": 120.0, "evaluate_ms": 40.0, "memory_mb": 300.0}
OWN = {
    "step_ms": 30.0, "evaluate_ms": 10.0, "plan_seconds": 5.0, "memory_mb": 200.0,
    "latency_ms_b64": 4.0, "latency_ms_b1": 1.0, "engine": "fp32 NCHW",
    "stages": {
        "pool": [{"density": 1.0, "ratio": 1.5, "update_ratio": 1.5}],
        "dynamic": [
            {"density": 0.5, "ratio": 0.8, "update_ratio": 1.4},
            {"density": 0.2, "ratio": 0.5, "update_ratio": 1.5},
        ],
    },
}  # fmt: skip


def line(phases: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"phases": phases, "figures": {"evaluated_batches": 8}, "rule": None, **more}


def phase(stage: str, batches: int, *, frozen: bool = False, density: float = 1.0, updates: int = 0) -> Any:
    return {
        "stage": stage,
        "frozen": frozen,
        "density": density,
        "batches": batches,
        "updates": updates,
    }


def test_time_is_batches_times_steps_and_evaluations_and_planning() -> None:
    dense = line([phase("dense", 50)])
    assert run_seconds(dense, DENSE, None) == pytest.approx(50 * 0.1 + 8 * 0.04)
    # What a stage costs beyond the dense step, 50% of the eager one, comes on top of the compiled one.
    cut = line([phase("dense", 14), phase("pool", 2), phase("accelerated", 16, frozen=True)], rule="measured")
    steps = 14 * 0.1 + 2 * (0.1 + 0.5 * 0.12) + 16 * 0.03
    assert run_seconds(cut, DENSE, OWN) == pytest.approx(steps + 8 * (0.5 * 0.01 + 0.5 * 0.04) + 5.0)
    # Of the densities that were timed the nearest counts; less than a dense step is less in any engine.
    moving = line([phase("dynamic", 30, density=0.25, updates=3), phase("fixed", 10, frozen=True)])
    plain, update = 0.5 * 0.12, 0.1 + 0.5 * 0.12
    steps = 27 * plain + 3 * update + 10 * 0.03
    evaluations = 8 * (0.25 * 0.01 + 0.75 * 0.04)
    assert run_seconds(moving, DENSE, OWN) == pytest.approx(steps + evaluations)


def test_what_was_not_timed_has_no_time() -> None:
    cut = line([phase("dense", 14), phase("finalize", 2), phase("accelerated", 16, frozen=True)])
    assert run_seconds(cut, None, OWN) is None
    assert run_seconds(cut, DENSE, OWN) is None  # finalize was not
    assert run_seconds(line([phase("fixed", 3, frozen=True)]), DENSE, None) is None
    planned = line([phase("fixed", 3, frozen=True)], rule="measured", plans=2)
    assert run_seconds(planned, DENSE, OWN) == pytest.approx(3 * 0.03 + 8 * 0.01 + 2 * 5.0)
    assert run_seconds(planned, DENSE, {**OWN, "not_measured": "it failed"}) is None


# ---- from lines to points ------------------------------------------------------------------------

BASE = {"model": "resnet20", "data": "digits", "batch_size": 64}
RECIPE = parse_recipe(
    {
        "base": BASE,
        "seeds": [0, 1],
        "dense": {"widths": [0.25, 0.5], "epochs": [2]},
        "pruned": [
            {"method": "clicktrain", "setting": "cut", "width": 0.5, "epochs": 2},
            {"method": "rigl", "setting": "broken", "width": 0.5, "epochs": 2},
            {"method": "gmp", "setting": "later", "width": 0.5, "epochs": 2, "after": "dense-w0.5-e2"},
        ],
    },
    "tiny",
)


def finished(name: str, seed: int, accuracy: float, **figures: Any) -> dict[str, Any]:
    cell = RECIPE.cell(name)
    frozen = cell.kind == "pruned"
    values = {
        "val_accuracy": accuracy - 1, "test_accuracy": accuracy, "train_flops": 1000, "inference_flops": 50,
        "bytes": 70, "compression_ratio": 4.0, "train_seconds": 9.0, "evaluated_batches": 0, **figures,
    }  # fmt: skip
    return {
        "name": name, "seed": seed, "status": "finished", "settings": dict(cell.settings), "figures": values,
        "network": {"classes": 10, "image_shape": [1, 8, 8]}, "rule": None, "structure": [],
        "phases": [phase("dense", 10), *([phase("fixed", 10, frozen=True)] if frozen else [])],
    }  # fmt: skip


@pytest.fixture
def data() -> FrontierData:
    from clicktrain.bench.frontier.networks import dense_network

    rows = [
        finished("dense-w0.25-e2", 0, 80.0), finished("dense-w0.25-e2", 1, 81.0),
        finished("dense-w0.5-e2", 0, 84.0),
        finished("cut-w0.5-e2", 0, 86.0), finished("cut-w0.5-e2", 1, 87.0),
        finished("later-w0.5-e2", 0, 88.0, initial_train_flops=500),
        finished("broken-w0.5-e2", 0, 85.0),
        {"name": "broken-w0.5-e2", "seed": 1, "status": "failed", "reason": "it collapsed", "settings": {}},
    ]  # fmt: skip
    lines = {(row["name"], row["seed"]): row for row in rows}
    networks: dict[str, Any] = dict.fromkeys(("cut-w0.5-e2", "later-w0.5-e2", "broken-w0.5-e2"), OWN)
    for name, ms in (("dense-w0.25-e2", 40.0), ("dense-w0.5-e2", 100.0)):
        key = dense_network(RECIPE.cell(name), lines[name, 0]).key
        networks[key] = {
            **DENSE,
            "step_ms": ms,
            "latency_ms_b64": ms / 10,
            "latency_ms_b1": 1.0,
            "engine": "e",
        }
    machine = {"cpu": "a CPU", "threads": 1, "versions": {"torch": "2"}, "isa": [], "compiler": None}
    times = {
        "networks": networks,
        "machine": machine,
        "settings": {"rounds": 7, "alone": True},
        "seconds": 1.0,
    }
    return FrontierData("tiny", tuple(points_of(RECIPE, lines, times)), times, missing=2)


def test_a_point_is_the_mean_over_seeds(data: FrontierData) -> None:
    by_name = {p.name: p for p in data.points}
    dense, cut = by_name["dense-w0.25-e2"], by_name["cut-w0.5-e2"]
    assert (dense.accuracy_mean, dense.holdout_mean, dense.seeds) == (80.5, 79.5, 2)
    assert dense.accuracy_std == pytest.approx(0.5**0.5)
    assert dense.train_seconds == pytest.approx(10 * 0.04)
    assert by_name["dense-w0.5-e2"].accuracy_std is None  # one seed
    assert cut.train_seconds == pytest.approx(10 * 0.1 + 10 * 0.03)
    assert (cut.latency_ms_b64, cut.train_memory_mb) == (4.0, 300.0)
    assert (cut.train_seconds_wall, cut.train_flops) == (9.0, 1000)
    assert data.compare(cut)["advantage"].dense == "dense-w0.25-e2"  # the wider one is slower in inference
    assert data.compare(cut)["advantage"].points == pytest.approx(6.0)
    assert data.compare(cut)["advantage_time"].dense == "dense-w0.5-e2"


def test_a_run_that_starts_from_another_pays_for_it(data: FrontierData) -> None:
    (later,) = [p for p in data.points if p.name == "later-w0.5-e2"]
    assert later.train_seconds == pytest.approx(1.3 + 1.0)
    assert (later.train_seconds_wall, later.train_flops) == (18.0, 1500)


def test_a_failed_seed_leaves_no_accuracy(data: FrontierData) -> None:
    (broken,) = [p for p in data.points if p.name == "broken-w0.5-e2"]
    assert (broken.accuracy_mean, broken.seeds) == (None, 1)
    assert broken.reason == "1 of 2 runs failed: it collapsed"
    assert data.compare(broken)["advantage"].points is None


def test_validation_images_serve_where_none_were_held_out_or_when_settings_are_chosen() -> None:
    rows = [finished("dense-w0.25-e2", 0, 80.0), finished("dense-w0.5-e2", 0, 84.0, test_accuracy=None)]
    lines = {(row["name"], row["seed"]): row for row in rows}
    held, none = points_of(RECIPE, lines, None, "holdout")
    assert (held.accuracy_mean, held.accuracy_of, held.holdout_mean) == (79.0, "holdout", 79.0)
    assert (none.accuracy_mean, none.accuracy_of, none.holdout_mean) == (83.0, "validation", None)
    assert (held.train_seconds, held.latency_ms_b64, held.train_seconds_wall) == (None, None, 9.0)


def test_the_json_has_the_fields_that_readers_count_on(data: FrontierData) -> None:
    values = json.loads(json.dumps(to_json(data)))
    assert values["family"] == "tiny"
    assert values["machine"]["cpu"] == "a CPU"
    assert values["missing_runs"] == 2
    assert "no frontier yet" in values["note"]
    for row in values["points"]:
        assert row.keys() >= JSON_FIELDS
        assert row["kind"] in ("dense", "pruned")
        assert type(row["seeds"]) is int
        numbers = JSON_FIELDS - {"kind", "method", "setting", "name"}
        assert all(row[key] is None or isinstance(row[key], int | float) for key in numbers)
        assert ("advantage" in row) == (row["kind"] == "pruned")
    (cut,) = [row for row in values["points"] if row["setting"] == "cut"]
    assert (cut["advantage"], cut["advantage_over"]) == (pytest.approx(6.0), "dense-w0.25-e2")


def test_the_table_names_the_dense_point_that_is_beaten(data: FrontierData) -> None:
    text = to_markdown(data)
    (row,) = [row for row in text.splitlines() if row.startswith("| cut-")]
    assert "86.50 ± 0.71" in row
    assert "+6.00 (dense-w0.25-e2)" in row
    (row,) = [row for row in text.splitlines() if row.startswith("| broken-")]
    assert "1 of 2 runs failed: it collapsed" in row
    assert "a CPU" in text


@pytest.mark.parametrize("text", ["[]", "{}", '{"machine": 1, "settings": {}, "networks": {}}'])
def test_a_file_of_times_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    assert read_times(path) is None
    path.write_text(text)
    with pytest.raises(UserError, match="does not hold times"):
        read_times(path)
