"""PruneTrain through the trainer: its files, kill and resume across a reconfiguration, loading and export."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import At, Killed, assert_same_run, kill, resume, run

import clicktrain
from clicktrain.accounting import count
from clicktrain.deploy import export_run
from clicktrain.errors import UserError
from clicktrain.surgery import read_recipe
from clicktrain.train import RunFolder, load_run

SETTINGS: dict[str, Any] = {
    "model": "resnet8",
    "width": 0.5,
    "method": "prunetrain",
    "coefficient": 0.025,
    "interval": 1,
    "check_outputs": True,
    "epochs": 4,
    "threads": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path, {**SETTINGS, "ema_decay": 0.9})
    return path


@pytest.mark.long
def test_the_files_of_a_run(whole: Path) -> None:
    folder = RunFolder(whole)
    summary = folder.summary()
    assert summary is not None
    metrics, events = folder.read_metrics(), folder.read_events()
    reconfigured = [event for event in events if event["event"] == "reconfigured"]
    assert [event["epoch"] for event in reconfigured] == [1, 2, 3, 4]
    assert any(event["channels_after"] < event["channels_before"] for event in reconfigured[:-1])
    assert all(event["max_output_change"] < 1e-5 for event in reconfigured)
    assert 0 < metrics[-1]["density"] < 1
    per_epoch = [b["train_flops"] - a["train_flops"] for a, b in itertools.pairwise(metrics)]
    assert per_epoch == sorted(per_epoch, reverse=True)
    assert per_epoch[-1] < metrics[0]["train_flops"]
    plans = read_recipe(folder.surgery)
    assert plans
    loaded = load_run(whole)
    cost = count(loaded.model, torch.zeros(1, *loaded.image_shape))
    dense = clicktrain.create_model("resnet8", num_classes=10, in_channels=1, width=0.5, stem="cifar")
    full = count(dense, torch.zeros(1, *loaded.image_shape))
    assert summary["parameters"] == cost.parameters < summary["dense_parameters"] == full.parameters
    assert summary["compression_ratio"] == pytest.approx(full.conv_weights / cost.conv_nonzero)
    assert summary["inference_flops_ratio"] == pytest.approx(cost.forward_flops / full.forward_flops)


@pytest.mark.long
@pytest.mark.parametrize("batch", [5, 16, 38])
def test_killed_and_resumed(tmp_path: Path, whole: Path, batch: int) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", {**SETTINGS, "ema_decay": 0.9}, At(batch, kill))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.long
def test_channels_then_patterns(tmp_path: Path) -> None:
    settings = {
        **SETTINGS,
        "method": "prunetrain-clicktrain",
        "coefficient": 0.04,
        "switch_at": 2,
        "pattern_compression": 3,
        "group": 2,
        "operators": "reference",
    }
    summary = run(tmp_path / "whole", settings)
    folder = RunFolder(tmp_path / "whole")
    channels = [e["epoch"] for e in folder.read_events() if e["event"] == "reconfigured"]
    assert channels == [1, 2]
    hard_prune = next(e for e in folder.read_events() if e["event"] == "hard_prune")
    assert hard_prune["compression_reached"] == pytest.approx(3, rel=0.03)
    loaded = load_run(tmp_path / "whole")
    kept = {layer["name"]: layer["density"] for layer in summary["layers"]}
    assert sum(int(mask.sum()) for mask in loaded.masks.values()) > 0
    assert summary["compression_ratio"] > 1.1 * hard_prune["compression_reached"]
    for name, mask in loaded.masks.items():
        assert mask.shape == loaded.model.get_submodule(name).weight.shape  # type: ignore[union-attr]
        assert mask.shape[0] % 2 == 0
        assert kept[name] == pytest.approx(float(mask.float().mean()))
    for batch in (24, 40):
        with pytest.raises(Killed):
            run(tmp_path / f"killed-{batch}", settings, At(batch, kill))
        resume(tmp_path / f"killed-{batch}")
        assert_same_run(tmp_path / f"killed-{batch}", tmp_path / "whole")


def test_it_loads_into_the_users_own_class_and_exports(tmp_path: Path, whole: Path) -> None:
    loaded = load_run(whole)
    fresh = clicktrain.create_model("resnet8", num_classes=10, in_channels=1, width=0.5, stem="cifar")
    own = clicktrain.load_pruned(fresh, whole).eval()
    x = torch.randn(3, *loaded.image_shape)
    assert torch.equal(own(x), loaded.model(x))
    clicktrain.save(own, tmp_path / "saved")
    assert torch.equal(clicktrain.load(tmp_path / "saved")(x), own(x))
    for format, suffix in (("safetensors", "safetensors"), ("torch", "pt2")):
        assert export_run(loaded, format, tmp_path / f"x.{suffix}").max_difference < 1e-4  # type: ignore[arg-type]
    wrong = clicktrain.create_model("resnet8", num_classes=10, in_channels=1, width=1.0, stem="cifar")
    with pytest.raises(UserError, match="made for another network"):
        clicktrain.load_pruned(wrong, whole)
    (tmp_path / "surgery.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        read_recipe(tmp_path / "surgery.json")


def test_zeros_that_stay_in_place_cost_what_any_weight_costs(tmp_path: Path) -> None:
    settings = {**SETTINGS, "round_to": 8, "check_outputs": False, "coefficient": 0.03}
    summary = run(tmp_path / "run", settings)
    loaded = load_run(tmp_path / "run")
    image = torch.zeros(1, *loaded.image_shape)
    as_it_is, living = count(loaded.model, image, {}), count(loaded.model, image)
    assert living.conv_nonzero < as_it_is.conv_weights  # to fill up the eights
    assert summary["inference_flops"] == as_it_is.forward_flops
    assert summary["nonzero_parameters"] == living.nonzero_parameters < summary["parameters"]
