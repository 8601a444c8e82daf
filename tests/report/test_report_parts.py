from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from html_tree import parse
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import make_run, resnet_layers
from safetensors.torch import load_file, save_file

from clicktrain.report.charts import Series, line_chart
from clicktrain.report.comparison import entries, headliner, sparsity_steps
from clicktrain.report.masks import MOST_CHANNELS, MOST_FILTERS, mask_pictures
from clicktrain.report.patterns import pools
from clicktrain.report.run_data import read_runs
from clicktrain.report.stages import stage_bands
from clicktrain.report.svg import around, ticks
from clicktrain.report.timeline import timeline


def cells(picture: str) -> set[tuple[int, int]]:
    """(row, column) of every kernel that a mask's picture shows as kept."""
    found = set()
    for column, row, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\3z", picture):
        found |= {(int(row), int(column) + i) for i in range(int(length))}
    return found


def test_the_timeline_tells_latencies_and_what_is_kept(runs: dict[str, Path]) -> None:
    (run,) = read_runs([runs["8x"]])
    events = (
        {
            "event": "finalised",
            "epoch": 2.0,
            "layers": [1, 2],
            "latency_target_ms": 4.0,
            "measured_ms": 3.854,
        },
        {"event": "finalised", "epoch": 2.0, "layers": [1], "latency_target_ms": 4.0, "measured_ms": None},
        {"event": "operators", "epoch": 3, "rule": "measured", "activations": "bf16", "layers": {"a": "x"}},
        {
            "event": "operators",
            "epoch": 3,
            "rule": "measured",
            "activations": "parameters",
            "layers": {"a": "x"},
        },
    )
    told = [moment.detail for moment in timeline(replace(run, events=events))]
    assert told[0].endswith("; measured 3.85 ms, asked 4 ms")
    assert told[1].endswith("; asked 4 ms")
    assert told[2].endswith("; activations kept in bf16")
    assert "kept" not in told[3]


def test_the_mask_picture_shows_exactly_the_kept_kernels(runs: dict[str, Path]) -> None:
    (run,) = read_runs([runs["8x"]])
    weights = load_file(runs["8x"] / "model.safetensors")
    for mask in mask_pictures(run):
        keep = weights[f"{mask.layer}.weight"] != 0
        kept = keep.flatten(2).any(dim=2)
        assert cells(str(mask.whole)) == {(i, j) for i, j in kept.nonzero().tolist()}
        assert mask.kernels == pytest.approx(kept.double().mean().item())
        assert mask.weights == pytest.approx(keep.double().mean().item())
        corner = parse(str(mask.corner))
        assert len(corner.all("rect", "kept")) == int(kept[:9, :9].sum())
        drawn = sum(path.attributes["d"].count("M") for path in corner.all("path"))
        assert drawn == int(keep[:9, :9].sum())


def test_kernels_have_the_color_of_their_pattern(runs: dict[str, Path]) -> None:
    (run,) = read_runs([runs["8x"]])
    (pool,) = pools(run)
    weights = load_file(runs["8x"] / "model.safetensors")
    mask = mask_pictures(run)[0]
    bits = ((weights[f"{mask.layer}.weight"] != 0).flatten(2) * 2 ** torch.arange(9)).sum(dim=2)
    paths = parse(str(mask.whole)).all("path")
    for pattern in pool.patterns:
        own = [p.attributes["d"] for p in paths if p.attributes["class"] == f"on {pattern.css}"]
        expected = {(i, j) for i, j in (bits == pattern.bits).nonzero().tolist()}
        assert cells("".join(own)) == expected


def test_large_layers_are_cropped_and_say_so(tmp_path: Path) -> None:
    layers = [
        {"name": "conv1", "shape": [8, 3, 3, 3], "side": 8},
        {"name": "wide", "shape": [128, 160, 3, 3], "side": 4},
    ]
    (run,) = read_runs([make_run(tmp_path / "run", layers=layers, epochs=5)])
    (mask,) = mask_pictures(run)
    assert mask.shown == (MOST_FILTERS, MOST_CHANNELS)
    assert mask.cropped


def test_layers_of_single_weights_have_no_corner(tmp_path: Path) -> None:
    layers = [
        {"name": "conv1", "shape": [8, 3, 3, 3], "side": 8},
        {"name": "point", "shape": [32, 16, 1, 1], "side": 4},
    ]
    (run,) = read_runs([make_run(tmp_path / "run", layers=layers, epochs=5)])
    assert pools(run)[0].shape == (3, 3)
    (mask,) = mask_pictures(run)
    assert mask.layer == "point"
    assert mask.corner is None


def test_masks_without_a_pool_are_drawn_in_one_color(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=5, layers=resnet_layers(blocks=1))
    (folder / "events.jsonl").unlink()
    (run,) = read_runs([folder])
    paths = parse(str(mask_pictures(run)[0].whole)).all("path")
    assert [path.attributes["class"] for path in paths] == ["on pat-other"]


def test_a_weight_that_happens_to_be_zero_keeps_its_pattern(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=5, layers=resnet_layers(blocks=1))
    (run,) = read_runs([folder])
    name = f"{mask_pictures(run)[0].layer}.weight"
    weights = load_file(folder / "model.safetensors")
    place = tuple(weights[name].nonzero()[0].tolist())
    weights[name][place] = 0.0
    save_file(weights, folder / "model.safetensors")
    (run,) = read_runs([folder])
    assert "pat-other" not in str(mask_pictures(run)[0].whole)


def test_stages_come_from_shares_where_there_are_no_events(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", epochs=37, layers=resnet_layers(blocks=1))
    (run,) = read_runs([folder])
    with_events = stage_bands(run)
    (folder / "events.jsonl").unlink()
    (run,) = read_runs([folder])
    without = stage_bands(run)
    assert [band.stage for band in without] == [band.stage for band in with_events]
    assert [band.end for band in without] == pytest.approx([band.end for band in with_events])
    assert [band.mark for band in without] == ["1", "2", "3", "4", "5"]


def test_sparsity_jumps_at_the_hard_prune(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "run", epochs=37, layers=resnet_layers(blocks=1))])
    points = sparsity_steps(run)
    at = [epoch for epoch, _ in points if epoch == 18.5]
    assert len(at) == 2
    assert points[0] == (0.0, 0.0)
    assert [value for epoch, value in points if epoch < 18.5] == [0.0] * 19
    assert points[-1][0] == 37


def test_the_headline_is_about_the_smallest_network_close_to_dense(runs: dict[str, Path]) -> None:
    found = entries(read_runs([runs[name] for name in ("fixed", "4x", "8x", "dense", "running")]))
    assert headliner(found).run.label == "clicktrain-8x"
    assert headliner([e for e in found if e.run.label != "clicktrain-8x"]).run.label == "clicktrain-4x"
    assert headliner([e for e in found if e.run.label in ("fixed-8x", "dense")]).run.label == "fixed-8x"


def test_the_baseline_is_a_dense_run_of_the_same_task_and_seed(tmp_path: Path) -> None:
    layers = resnet_layers(blocks=1)
    pruned = make_run(tmp_path / "pruned", epochs=5, seed=1, layers=layers)
    other_seed = make_run(tmp_path / "seed0", method="dense", epochs=5, layers=layers)
    same_seed = make_run(tmp_path / "seed1", method="dense", epochs=5, seed=1, layers=layers)
    other_task = make_run(
        tmp_path / "other", method="dense", epochs=5, seed=1, layers=layers, settings={"data": "digits"}
    )
    found = entries(read_runs([pruned, other_seed, other_task, same_seed]))
    assert next(e.baseline.label for e in found if e.run.label == "pruned") == "seed1"
    alone = entries(read_runs([pruned, other_task]))
    assert alone[1].baseline is None
    assert alone[1].difference is None


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    layers = resnet_layers(blocks=1)
    paths = [make_run(tmp_path / day / "run", epochs=4, layers=layers) for day in ("monday", "tuesday")]
    assert [run.label for run in read_runs(paths)] == ["monday/run", "tuesday/run"]


@settings(max_examples=50)
@given(
    st.lists(st.floats(-1e6, 1e6).map(lambda value: round(value, 6)), min_size=1, max_size=20),
    st.booleans(),
)
def test_axes_hold_all_values(values: list[float], zero: bool) -> None:
    low, high = around(values, zero=zero)
    slack = 1e-6 * max(abs(value) for value in values)
    assert low <= min(values) + slack
    assert high >= max(values) - slack
    marks = ticks(low, high)
    assert marks == sorted(marks)
    assert 1 <= len(marks) <= 12
    chart = line_chart(
        [Series("s", list(enumerate(values)), "curve-val")], label="a", epochs=(0, len(values)), zero=zero
    )
    for y in re.findall(r'cy="([-\d.]+)"', str(chart)):
        assert 19 <= float(y) <= 183


@given(st.integers(1, 2000))
def test_epoch_ticks_are_whole(last: int) -> None:
    assert all(value == int(value) for value in ticks(0, last, 6, whole=True))


def colors(css: str) -> list[dict[str, str]]:
    """Color variables of the light and the dark page."""
    light, dark = re.findall(r":root \{([^}]*#[^}]*--pat-other[^}]*)\}", css)
    both = [dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", block)) for block in (light, dark)]
    return [both[0], {**both[0], **both[1]}]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted((luminance(one), luminance(two)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_in_light_and_dark(repository: Path) -> None:
    """WCAG 2.1: 4.5 for text (1.4.3), 3 for what is needed to read a picture (1.4.11)."""
    css = (repository / "clicktrain/report/templates/style.css").read_text()
    for palette in colors(css):
        for name in ("ink", "ink-2", "accent", "good", "bad"):
            assert contrast(palette[name], palette["surface"]) >= 4.5, name
            assert contrast(palette[name], palette["bg"]) >= 4.5, name
        for name, color in palette.items():
            if name.startswith(("run-", "stage-", "pat-")) or name in ("train", "val", "wait"):
                assert contrast(color, palette["surface"]) >= 3, name
