"""DSR and RigL through the trainer: the files they leave, and runs that are killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import At, Killed, Messages, assert_same_run, kill, resume, run, weights
from tiny_networks import tiny

from clicktrain.compiler import LoweringPlan
from clicktrain.kernels.native import toolchain
from clicktrain.report import write_report
from clicktrain.train import RunFolder, load_run

SETTINGS: dict[str, Any] = {
    "model": "tiny_networks:tiny",
    "sparsity": 0.7,
    "interval": 3,
    "stop": 0.5,
    "epochs": 4,
    "threads": 1,
    "operators": "reference",
    "learning_rate": 0.05,
}
PRUNED = {"3", "7", "13"}


@pytest.mark.parametrize("method", ["rigl", "dsr"])
def test_the_files_of_a_run(tmp_path: Path, method: str) -> None:
    summary = run(tmp_path / "run", {**SETTINGS, "method": method, "seed": 3})
    folder = RunFolder(tmp_path / "run")
    assert summary["hard_prune_epoch"] == 2.0
    assert summary["sparsity_asked"] == 0.7
    metrics = folder.read_metrics()
    assert [line["stage"] for line in metrics] == ["dynamic", "fixed", "fixed", "fixed"]
    assert metrics[1]["stages"] == {"dynamic": 1.0}
    density = {line["density"] for line in metrics}
    assert max(density) - min(density) < 0.05  # of convolutions; DSR moves weights to the head and back
    spent = [line["train_flops"] for line in metrics]
    fixed, dense = spent[3] - spent[2], metrics[0]["train_flops_dense"]
    assert fixed < 0.7 * dense
    if method == "rigl":  # 3 of 11 batches compute the gradients of all weights, a third of the work
        more = spent[0] - fixed
        images = 11 * 128
        assert 0 < more / images <= 3 / 11 * dense / images / 3
        assert spent[1] - spent[0] == fixed + more * 4 // 3  # 4 of 11
    else:
        assert 0.5 * fixed < spent[0] < 2 * fixed  # weights move to layers that use them more or less often
    loaded = load_run(folder.path, model=tiny)
    assert set(loaded.masks) == PRUNED
    for name in PRUNED:
        weight = loaded.model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        assert not weight[~loaded.masks[name]].any()
    events = [event["event"] for event in folder.read_events()]
    assert events.count("regrown") >= 4
    assert events[:1] == ["stage"]
    page = write_report([folder.path], tmp_path / "report.html").read_text("utf-8")
    assert {"rigl": "RigL", "dsr": "DSR"}[method] in page
    again = run(tmp_path / "again", {**SETTINGS, "method": method, "seed": 4})
    assert again["seed"] == 4
    masks = load_run(tmp_path / "again", model="tiny_networks:tiny").masks
    assert any(not torch.equal(masks[name], loaded.masks[name]) for name in PRUNED)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rigl"},
        {"method": "rigl", "granularity": "kernel", "growth": "random", "ema_decay": 0.9, "accumulate": 2},
        {"method": "dsr", "packed": False, "optimizer": "adam", "learning_rate": 3e-3, "exclude": ["7"]},
        {"method": "rigl", "granularity": "kernel", "operators": "sparse", "precision": "bf16"},
        {"method": "dsr", "operators": "sparse", "growth": "gradient", "ema_decay": 0.9},
        {"method": "rigl", "granularity": "pattern", "patterns": 4, "operators": "sparse"},
        {"method": "clicktrain-gradual", "patterns": 4, "operators": "sparse", "start": 0.3},
    ],
    ids=[
        "rigl",
        "set-kernel-average",
        "dsr-masked-adam",
        "rigl-kernel-fast-bf16",
        "dsr-fast-average",
        "rigl-pattern-fast",
        "gradual-fast",
    ],
)
def test_killed_in_each_stage(tmp_path: Path, settings: dict[str, Any]) -> None:
    if settings.get("operators") == "sparse" and toolchain() is None:
        pytest.skip("there is no C compiler")
    settings = {**SETTINGS, "epochs": 3, **settings}
    run(tmp_path / "whole", settings)
    for batch, stage in ((14, "dynamic"), (28, "fixed")):
        progress = At(batch, kill)
        with pytest.raises(Killed):
            run(tmp_path / stage, settings, progress)
        assert progress.stage == ("pruning" if stage == "dynamic" and "start" in settings else stage)
        resume(tmp_path / stage)
        assert_same_run(tmp_path / stage, tmp_path / "whole")


def test_a_compression_is_what_was_asked(tmp_path: Path) -> None:
    settings = {key: value for key, value in SETTINGS.items() if key != "sparsity"}
    asked = {"method": "rigl", "granularity": "pattern", "compression": 4, "epochs": 2}
    summary = run(tmp_path / "run", {**settings, **asked})
    assert (summary["compression_asked"], summary["sparsity_asked"]) == (4, None)
    assert summary["compression_ratio"] == pytest.approx(4, rel=0.05)
    (target,) = summary["outcome"]
    assert target["what"] == "compression of convolution weights"


@pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
def test_moving_masks_run_on_the_fast_kernels(tmp_path: Path) -> None:
    """From the first step, by one choice; the weights are those of masked dense training."""
    settings = {**SETTINGS, "method": "rigl", "augment": "none", "learning_rate": 0.01, "epochs": 3}
    messages = Messages()
    run(tmp_path / "fast", {**settings, "operators": "sparse"}, messages)
    assert len([text for text in messages.messages if "run in the blocked layout" in text]) == 1
    folder = RunFolder(tmp_path / "fast")
    events = [(event["event"], event["step"]) for event in folder.read_events()]
    assert events[:2] == [("stage", 0), ("operators", 0)]
    assert [event for event, _ in events].count("operators") == 1
    assert folder.operators.read_text() == folder.moving_operators.read_text()
    run(tmp_path / "masked", {**settings, "packed": False})
    fast, masked = weights(tmp_path / "fast"), weights(tmp_path / "masked")
    for name, tensor in masked.items():
        assert torch.allclose(tensor.double(), fast[name].double(), atol=2e-3, rtol=2e-2), name


@pytest.mark.long
@pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
def test_a_gradual_method_is_sparse_before_its_end(tmp_path: Path) -> None:
    """Packed at 60% zeros; operators are chosen again for the final masks, which keep far fewer weights."""
    settings = {**SETTINGS, "method": "gmp", "interval": 2, "sparsity": 0.9, "stop": 0.7, "start": 0.0}
    settings |= {"operators": "sparse"}
    messages = Messages()
    run(tmp_path / "run", settings, messages)
    assert len([text for text in messages.messages if "run in the blocked layout" in text]) == 2
    folder = RunFolder(tmp_path / "run")
    steps = {event["event"]: event["step"] for event in folder.read_events()}
    first = next(event["step"] for event in folder.read_events() if event["event"] == "operators")
    assert 0 < first < steps["hard_prune"] <= steps["operators"]
    moving, last = (
        LoweringPlan.from_json(path.read_text()) for path in (folder.moving_operators, folder.operators)
    )
    assert moving.by_layer()["3"].density > 1.2 * last.by_layer()["3"].density
    for batch in (first + 3, 33):
        with pytest.raises(Killed):
            run(tmp_path / str(batch), settings, At(batch, kill))
        resume(tmp_path / str(batch))
        assert_same_run(tmp_path / str(batch), tmp_path / "run")
