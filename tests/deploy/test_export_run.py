from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.deploy import FORMATS, SUFFIXES, export_run, file_formats
from clicktrain.deploy.file_formats import PACKAGES
from clicktrain.models import create_model

torch.set_num_threads(1)
HAS_ONNX = all(importlib.util.find_spec(name) for name in PACKAGES)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="pip install onnx onnxscript onnxruntime")
# What PyTorch's exporters warn about themselves is not ours to fix.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@dataclass(frozen=True)
class Finished:
    model: nn.Module
    image_shape: tuple[int, int, int] = (1, 8, 8)
    facts: dict[str, Any] = field(default_factory=lambda: {"model": "mine", "classes": ["a", "b"]})


def with_statistics(model: nn.Module) -> Finished:
    """Batch norms that are not the identity which they are at first, and some pruned weights."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.Conv2d):
                module.weight[:, ::2] = 0
    return Finished(model)


@pytest.fixture
def finished() -> Finished:
    torch.manual_seed(0)
    first = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
    second = nn.Conv2d(6, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    return with_statistics(
        nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    )


def logits_of_file(path: Path, x: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def facts_of_file(path: Path) -> str:
    if path.suffix == ".pt2":
        extra = {"clicktrain": ""}
        torch.export.load(path, extra_files=extra)
        return extra["clicktrain"]
    import onnx

    return {item.key: item.value for item in onnx.load(path).metadata_props}["clicktrain"]


PROGRAMS = ["torch", pytest.param("onnx", marks=needs_onnx)]


def check_program(finished: Finished, format: str, path: Path) -> None:
    done = export_run(finished, format, path)
    assert done.path == path
    assert done.num_bytes == path.stat().st_size
    assert done.max_difference <= done.tolerance
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(facts_of_file(path)) == finished.facts
    for batch in (1, 2, 5):
        x = torch.randn(batch, *finished.image_shape)
        with torch.no_grad():
            expected = finished.model.eval()(x)
            torch.testing.assert_close(logits_of_file(path, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", PROGRAMS)
def test_program_computes_what_the_network_does_for_any_batch_size(
    finished: Finished, format: str, tmp_path: Path
) -> None:
    check_program(finished, format, tmp_path / f"net{SUFFIXES[format]}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vgg11", "mobilenet_v1"])
@pytest.mark.parametrize("format", PROGRAMS)
def test_networks_of_the_zoo(name: str, format: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, width=0.25, stem="cifar")
    check_program(Finished(model, (3, 32, 32)), format, tmp_path / f"net{SUFFIXES[format]}")


def test_safetensors_hold_the_dense_weights_and_the_facts(finished: Finished, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    assert export_run(finished, "safetensors", path).max_difference == 0
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["clicktrain"]) == finished.facts
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    state = finished.model.state_dict()
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensors[name], tensor)


def test_safetensors_are_read_back_from_the_file(finished: Finished, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    export_run(finished, "safetensors", path)
    other = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(other, path)
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert not torch.allclose(file_formats.read_safetensors(finished.model, path)(x), finished.model(x))


def test_an_older_file_is_replaced(finished: Finished, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_text("old")
    export_run(finished, "safetensors", path)
    assert path.read_bytes()[:3] != b"old"


class Drifting(nn.Module):
    """Gives something else each time: a file can never agree with it."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        Drifting.calls += 1
        return self.linear(x.flatten(1)) + Drifting.calls


class NotANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)
        nn.init.constant_(self.linear.weight, float("nan"))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("model", [Drifting(), NotANumber()])
def test_a_mismatch_is_an_error_and_leaves_what_was_there(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_text("old")
    with pytest.raises(UserError, match="does not compute what the network does"):
        export_run(Finished(model), "safetensors", path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class Branching(nn.Module):
    """Cannot be captured: its course depends on the values of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.flatten(1))
        return x if float(x.sum()) > 0 else -x


def test_a_network_that_cannot_be_captured_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^torch.export cannot capture this network: \w+: .+"):
        export_run(Finished(Branching()), "torch", tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_wrong_places_and_formats(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format is 'tflite': use one of safetensors, onnx, torch"):
        export_run(finished, "tflite", tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"there is no folder .*missing: make it"):
        export_run(finished, "safetensors", tmp_path / "missing" / "x")
    with pytest.raises(UserError, match="is a folder: give the name of a file"):
        export_run(finished, "safetensors", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert set(FORMATS) == set(SUFFIXES)


def test_onnx_without_its_packages_names_the_pip_command(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clicktrain.deploy.file_formats.PACKAGES", ("importlib", "not_there", "nor_this"))
    with pytest.raises(UserError, match="needs not_there, nor_this: run 'pip install not_there nor_this'"):
        export_run(finished, "onnx", tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
