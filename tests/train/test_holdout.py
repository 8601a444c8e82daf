"""Images held out of the training images, and the test split that is looked at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clicktrain import cli
from clicktrain.data import PixelSource, open_data
from clicktrain.errors import UserError
from clicktrain.train import from_dict
from clicktrain.train.fit import fit


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Bright and dark images, 20 + 20 for training and 5 + 5 for validation, each of its own brightness."""
    for split, count in (("train", 20), ("val", 5)):
        for number, name in enumerate(("dark", "light")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                value = 100 * number + index + (50 if split == "val" else 0)
                pixels = np.full((12, 12, 3), value, np.uint8)
                pixels[:, index % 12] += 3
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{index}.png")
    return f"imagefolder:{tmp_path / 'images'}"


def flat(source: Any) -> set[tuple[int, ...]]:
    assert isinstance(source, PixelSource)
    return {tuple(image.flatten().tolist()) for image in source.images}


def test_validation_images_come_out_of_the_training_images(folder: str, tmp_path: Path) -> None:
    whole = open_data(folder, cache_dir=tmp_path / "cache")
    held = open_data(folder, holdout=10, seed=3, cache_dir=tmp_path / "cache")
    assert (len(held.train), len(held.val)) == (30, 10)
    assert held.val.labels.bincount().tolist() == [5, 5]
    assert not flat(held.train) & flat(held.val)
    assert flat(held.train) | flat(held.val) == flat(whole.train)
    assert whole.test is None
    assert held.test is not None
    assert flat(held.test) == flat(whole.val)
    assert held.mean != whole.mean  # of the images that are trained on
    again = open_data(folder, holdout=10, seed=3, cache_dir=tmp_path / "cache")
    other = open_data(folder, holdout=10, seed=4, cache_dir=tmp_path / "cache")
    assert flat(again.val) == flat(held.val) != flat(other.val)


@pytest.mark.parametrize("holdout", [40, 1000])
def test_more_than_there_are_is_refused(folder: str, tmp_path: Path, holdout: int) -> None:
    with pytest.raises(UserError, match=f"holdout={holdout} is not possible: .* has 40 training images"):
        open_data(folder, holdout=holdout, cache_dir=tmp_path / "cache")


def settings(folder: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "cifarnet", "width": 0.125, "data": folder, "holdout": 10, "method": "dense", "epochs": 1,
        "batch_size": 10, "threads": 1, "workers": 0, **more,
    }  # fmt: skip


def test_a_run_reports_both(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, method = from_dict(settings(folder, cache_dir=str(tmp_path / "cache")))
    summary = fit(config, method, tmp_path / "run")
    assert summary["test_accuracy"] is not None
    assert cli.main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 10
    assert result["val_accuracy"] == summary["val_accuracy"]
    assert cli.main(["evaluate", str(tmp_path / "run"), "--split", "test", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 10
    assert result["test_accuracy"] == summary["test_accuracy"]
    plain, method = from_dict({**settings(folder, cache_dir=str(tmp_path / "cache")), "holdout": None})
    assert fit(plain, method, tmp_path / "plain")["test_accuracy"] is None
    assert cli.main(["evaluate", str(tmp_path / "plain"), "--split", "test"]) == 2
    assert "no test split" in capsys.readouterr().err


def test_the_first_convolution_is_whitened_and_stays(folder: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config, method = from_dict(settings(folder, cache_dir=str(tmp_path / "cache"), learning_rate=0.5))
    fit(config, method, tmp_path / "one")
    first = load_file(tmp_path / "one" / "model.safetensors")
    weight = first["whiten.weight"]
    assert torch.equal(weight[:12], -weight[12:])
    assert first["whiten.bias"].any()  # trained
    off, method = from_dict({**settings(folder, cache_dir=str(tmp_path / "cache")), "whitening": False})
    fit(off, method, tmp_path / "two")
    weight = load_file(tmp_path / "two" / "model.safetensors")["whiten.weight"]
    assert not torch.equal(weight[:12], -weight[12:])


def test_a_network_without_such_a_convolution_cannot_be_whitened(folder: str, tmp_path: Path) -> None:
    config, method = from_dict(settings(folder, model="mobilenet_v1", whitening=True))
    fit(config, method, tmp_path / "mobile")  # its first convolution has fewer filters than components
    config, method = from_dict(settings(folder, model="test_holdout:no_convolution", whitening=True))
    with pytest.raises(UserError, match="does not begin with a convolution"):
        fit(config, method, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def no_convolution(num_classes: int, in_channels: int, width: float) -> torch.nn.Module:
    del width
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(in_channels * 144, num_classes))


def test_a_stem_is_proposed_only_where_it_helps(tmp_path: Path) -> None:
    config, method = from_dict({"model": "cifarnet", "data": "digits", "method": "dense", "threads": 1})
    with pytest.raises(UserError, match=r"those of digits have 8x8: set image_size=9$"):
        fit(config, method, tmp_path / "run")
