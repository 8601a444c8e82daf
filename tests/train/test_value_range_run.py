"""The range of pixel values belongs to the network: other images are scaled as those of its training were."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from short_runs import run

from clicktrain.cli import main
from clicktrain.train import load_run


def write_images(root: Path, largest: int) -> None:
    generator = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (root / name).mkdir(parents=True)
        for index in range(6):
            values = generator.integers(0, largest, (8, 8)) // (2 - number)
            values[0, 0] = largest if number else 0
            Image.fromarray(values.astype(np.uint16)).save(root / name / f"{index}.png")


def test_evaluation_scales_as_training_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "bright", 4095)
    write_images(tmp_path / "dim", 200)
    settings = {
        "model": "resnet8",
        "width": 0.1,
        "method": "dense",
        "epochs": 1,
        "threads": 1,
        "batch_size": 4,
    }
    run(tmp_path / "run", {**settings, "data": f"imagefolder:{tmp_path / 'bright'}"})
    assert load_run(tmp_path / "run").value_range == (0, 4095)
    capsys.readouterr()
    other = f"imagefolder:{tmp_path / 'dim'}"
    assert main(["evaluate", str(tmp_path / "run"), "--data", other, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    cached = list((tmp_path / "cache" / "clicktrain").glob("imagefolder-*.safetensors"))
    assert len(cached) == 2
    from safetensors.numpy import load_file

    largest = sorted(int(load_file(path)["train"].max()) for path in cached)
    assert largest == [12, 255]  # 200 of 4,095, and not of 200
