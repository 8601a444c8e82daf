"""Test-time augmentation against the average written out image by image, in runs and in evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import DENSE, run
from torch import Tensor, nn

from clicktrain.cli import main
from clicktrain.errors import UserError
from clicktrain.train import RunConfig, RunFolder
from clicktrain.train.views import mean_logits


def moved(image: Tensor, down: int, right: int) -> Tensor:
    """[C, H, W], pixel by pixel, with the edges reflected."""
    _, height, width = image.shape

    def inside(at: int, size: int) -> int:
        return -at if at < 0 else 2 * (size - 1) - at if at >= size else at

    result = torch.empty_like(image)
    for y in range(height):
        for x in range(width):
            result[:, y, x] = image[:, inside(y - down, height), inside(x - right, width)]
    return result


def literal(network: nn.Module, x: Tensor, views: str) -> Tensor:
    """Weights of the views: 1/2 each of two, or 1/4 each of two and 1/8 each of four."""
    rows = []
    for image in x:
        weighted = [(image, 0.5 if views == "flip" else 0.25)]
        if views == "shift":
            weighted += [(moved(image, 1, 1), 0.125), (moved(image, -1, -1), 0.125)]
        both = [(view, w) for view, w in weighted] + [(view.flip(-1), w) for view, w in weighted]
        rows.append(sum(w * network(view[None])[0] for view, w in both))
    return torch.stack(rows)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("views", ["flip", "shift"])
def test_mean_of_the_views(views: Any, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 3 * 5, 4)).eval()
    x = torch.randn(3, 2, 5, 7).contiguous(memory_format=layout)
    with torch.no_grad():
        assert torch.allclose(mean_logits(network, x, views), literal(network, x, views), atol=1e-6)
        assert torch.equal(mean_logits(network, x), network(x))


def test_refused() -> None:
    with pytest.raises(UserError, match="test_time_augmentation is 'crop': use one of none, flip, shift"):
        RunConfig(test_time_augmentation="crop")  # type: ignore[arg-type]


def test_in_a_run_and_in_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    small = {**DENSE, "model": "resnet20", "width": 0.25, "epochs": 1, "threads": 1}
    summary = run(path, {**small, "test_time_augmentation": "flip"})
    assert summary["test_time_augmentation"] == "flip"
    assert "test_time_augmentation" not in run(tmp_path / "plain", small)
    results = {}
    for tta in ("none", "flip", "shift", None):
        flags = [] if tta is None else ["--tta", tta]
        assert main(["evaluate", str(path), "--json", *flags]) == 0
        results[tta] = json.loads(capsys.readouterr().out)
    assert results[None] == results["flip"]  # as in training
    assert results["flip"]["val_accuracy"] == RunFolder(path).read_metrics()[-1]["val_accuracy"]
    assert [results[tta].get("test_time_augmentation") for tta in ("none", "shift")] == [None, "shift"]
    assert len({results[tta]["val_loss"] for tta in ("none", "flip", "shift")}) == 3
    assert main(["evaluate", str(path)]) == 0
    assert "test-time augmentation flip" in capsys.readouterr().out
    assert main(["evaluate", str(path), "--attack", "fgsm"]) == 2
    assert "attacks are made on images as they are: add --tta none" in capsys.readouterr().err
