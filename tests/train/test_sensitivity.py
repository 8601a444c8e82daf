from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

import pytest
import torch
from torch import nn

from clicktrain import cli
from clicktrain.data import Batch, Loader
from clicktrain.errors import UserError
from clicktrain.graph.prunable import find_prunable
from clicktrain.report.sensitivity import render_sensitivity, tolerates
from clicktrain.train.evaluate import evaluate
from clicktrain.train.sensitivity import UNITS, SomeImages, layer_sensitivity, magnitude_mask

CPU = torch.device("cpu")


class Images(Loader):
    """Random images in batches of 7, the last one of 2."""

    def __init__(self, images: int = 30) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(images, 2, 6, 6, generator=generator)
        self.y = torch.randint(0, 3, (images,), generator=generator)

    def __len__(self) -> int:
        return -(-len(self.y) // 7)

    def with_batch_size(self, batch_size: int) -> Loader:
        raise NotImplementedError

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for x, y in zip(self.x.split(7), self.y.split(7), strict=True):
            yield Batch(x, y)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3, bias=False),
    )


@pytest.mark.parametrize("granularity", ["weight", "kernel"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_the_smallest_units_of_a_layer_go(granularity: str, share: float) -> None:
    layer = find_prunable(network(), include=("*",)).layers[1]
    weight = layer.weight.detach().clone()
    weight[0, 0] = weight[3, 2] = 0.5  # equal kernels: that which comes first goes first
    mask = magnitude_mask(layer, weight, share, UNITS[granularity])
    units = {}
    for f in range(4):
        for c in range(5):
            if granularity == "kernel":
                units[f, c] = float(weight[f, c].square().mean())
            else:
                units |= {(f, c, r, s): float(weight[f, c, r, s] ** 2) for r in range(3) for s in range(3)}
    gone = sorted(units, key=lambda unit: (units[unit], unit))[: round(share * len(units))]
    expected = torch.ones_like(weight, dtype=torch.bool)
    for unit in gone:
        expected[unit] = False
    assert mask.equal(expected)


def test_accuracies_are_those_of_a_network_pruned_by_hand() -> None:
    model, images = network(), Images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said: list[str] = []
    found = layer_sensitivity(model, images, device=CPU, sparsities=(0.9, 0.5, 0.5), message=said.append)
    assert found.sparsities == (0.5, 0.9)
    assert found.images == 30
    assert [row.name for row in found.layers] == ["0", "2", "5"]
    assert said == ["layer 1 of 3: 0", "layer 2 of 3: 2", "layer 3 of 3: 5"]
    assert all(before[name].equal(value) for name, value in model.state_dict().items())
    whole = evaluate(model, images, device=CPU)
    assert whole is not None
    assert found.accuracy == whole.accuracy
    for row in found.layers:
        for share, reached in zip(found.sparsities, row.accuracies, strict=True):
            other = network()
            weight = other[int(row.name)].weight.data
            weight.view(-1)[weight.abs().view(-1).argsort()[: round(share * weight.numel())]] = 0
            expected = evaluate(other, images, device=CPU)
            assert expected is not None
            assert reached == expected.accuracy
    assert len({value for row in found.layers for value in row.accuracies}) > 1


def test_zeros_that_are_there_count() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight.view(-1)[:108] = 0  # 60% of 180
    found = layer_sensitivity(model, Images(), device=CPU, sparsities=(0.5, 0.6, 0.8))
    row = found.layers[1]
    assert row.sparsity == pytest.approx(0.6)
    assert row.accuracies[:2] == (found.accuracy, found.accuracy)
    assert found.to_json()["layers"][1]["lost"][:2] == [0, 0]


def test_weights_come_back_when_it_is_interrupted() -> None:
    model, images = network(), Images()
    weight = model[0].weight.detach().clone()
    epoch, calls = images.epoch, []

    def stop_later(*arguments: int) -> Iterator[Batch]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch(0)

    images.epoch = stop_later  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        layer_sensitivity(model, images, device=CPU)
    assert model[0].weight.equal(weight)


def test_images_are_spread_evenly() -> None:
    images = Images(30)
    for most, chosen in ((None, range(30)), (99, range(30)), (30, range(30)), (4, [0, 7, 15, 22]), (1, [0])):
        some = SomeImages(images, 30, most)
        assert torch.cat([y for _, y in some.epoch(0)]).equal(images.y[list(chosen)])
        assert torch.cat([x for x, _ in some.epoch(0)]).equal(images.x[list(chosen)])


def test_mistakes() -> None:
    for wrong in ((), (0.0,), (0.5, 1.0)):
        with pytest.raises(UserError, match="shares between 0 and 1 are needed"):
            layer_sensitivity(network(), Images(), device=CPU, sparsities=wrong)
    with pytest.raises(UserError, match="no convolution or linear layer"):
        layer_sensitivity(nn.Sequential(nn.Flatten(), nn.Softmax(1)), Images(), device=CPU)


def test_what_a_layer_tolerates() -> None:
    assert tolerates((0.3, 0.5, 0.9), (0.0, 0.9, 3.0)) == 0.5
    assert tolerates((0.3, 0.5, 0.9), (0.0, 1.1, 0.2)) == 0.3  # what comes after a loss is luck
    assert tolerates((0.3,), (2.0,)) is None


def test_the_page_has_every_layer_and_escapes_names() -> None:
    found = layer_sensitivity(network(), Images(), device=CPU, sparsities=(0.5, 0.9)).to_json()
    found["layers"][0]["name"] = "<b>&"
    text = render_sensitivity(found, "run <1>")
    assert "<b>&" not in text.replace(escape("<b>&"), "")
    assert escape("run <1>") in text
    assert text.count('class="heat"') == 6
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = (
        f"--method dense --model resnet8 --width 0.25 --epochs 1 --threads 1 --no-report --quiet --out {run}"
    )
    data = "synthetic:classes=3,size=8,channels=1,train=32,val=20"
    assert cli.main(["train", *flags.split(), "--data", data, "--batch-size", "16"]) == 0
    capsys.readouterr()
    words = ["sensitivity", str(run), "--sparsities", "0.5", "0.9", "--images", "10"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "on 10 images" in out
    assert out.splitlines()[2].split() == ["layer", "shape", "now", "50%", "90%", "tolerates"]
    assert (run / "sensitivity.html").is_file()
    saved = json.loads((run / "sensitivity.json").read_text())
    assert [len(row["accuracies"]) for row in saved["layers"]] == [2] * 10
    assert cli.main([*words, "--json", "-o", str(tmp_path / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out) == saved
    assert (tmp_path / "page.html").is_file()
    assert cli.main([*words[:2], "--images", "-1"]) == 2
    assert "images is -1: at least 1, or 0 for all" in capsys.readouterr().err
