from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clicktrain.deploy import FILE_FORMATS, FORMATS, SUFFIXES, export_run, file_formats
from clicktrain.errors import UserError
from clicktrain.models import create_model

torch.set_num_threads(1)
HAS_ONNX = all(importlib.util.find_spec(name) for name in FILE_FORMATS["onnx"].needs)
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


def test_real_images_give_an_accuracy(finished: Finished, tmp_path: Path) -> None:
    """Of the file and of the network; the first image is run alone, so that any number of images can be."""
    x, y = torch.randn(30, 1, 8, 8), torch.randint(2, (30,))
    done = export_run(finished, "torch", tmp_path / "net.pt2", [(x[:20], y[:20]), (x[20:], y[20:])])
    with torch.no_grad():
        right = float((finished.model(x).argmax(1) == y).float().mean()) * 100
    assert done.images == 30
    assert done.accuracy == done.network_accuracy == pytest.approx(right)
    assert f"on 30 images: largest difference to the network {done.max_difference:.2g}" in str(done)
    assert f"accuracy {right:.2f}%, the network's {right:.2f}%" in str(done)
    assert export_run(finished, "torch", tmp_path / "net.pt2").accuracy is None
    with pytest.raises(
        UserError, match=r"images are of shape \[2, 3, 8, 8\], the network's are \[N, 1, 8, 8\]"
    ):
        export_run(finished, "safetensors", tmp_path / "x", [(torch.randn(2, 3, 8, 8), None)])


def test_zeros_in_a_file_are_said_to_be_there(finished: Finished, tmp_path: Path) -> None:
    done = export_run(finished, "safetensors", tmp_path / "net.safetensors")
    weights = [finished.model[place].weight for place in (0, 3, 8)]  # type: ignore[index]
    assert done.weights == sum(weight.numel() for weight in weights)
    share = 100 * sum(int((weight == 0).sum()) for weight in weights) / done.weights
    assert f"{share:.0f}% of its weights are zeros, which this format stores like others" in str(done)
    dense = export_run(Finished(NotPruned(), (64,)), "safetensors", tmp_path / "dense.safetensors")
    assert "of its weights" not in str(dense)


class NotPruned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def installed(format: str) -> bool:
    try:
        FILE_FORMATS[format].check(format)
    except UserError:
        return False
    return True


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", ["openvino", "executorch", "coreml"])
def test_other_engines_run_what_is_written(finished: Finished, format: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{SUFFIXES[format]}"
    if not installed(format):
        with pytest.raises(UserError, match=f"export to {format} (needs|cannot be checked here)"):
            export_run(finished, format, path)
        assert list(tmp_path.iterdir()) == []
        pytest.skip(f"what export to {format} needs is not installed")
    path.with_suffix(".bin").write_text("of an older export")
    done = export_run(finished, format, path)
    assert done.max_difference <= done.tolerance
    assert done.num_bytes > 4 * done.weights
    written = {"openvino": {"net.xml", "net.bin"}}.get(format, {path.name, "net.bin"})
    assert {one.name for one in tmp_path.iterdir()} == written
    run = FILE_FORMATS[format].read(finished.model, path)
    x = torch.randn(5, *finished.image_shape)
    with torch.no_grad():
        torch.testing.assert_close(run(x), finished.model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(importlib.util.find_spec("coremltools") is None, reason="coremltools is not installed")
def test_a_core_ml_program_is_written_anywhere(finished: Finished, tmp_path: Path) -> None:
    """Only macOS runs it: elsewhere the command refuses, but what it would write can be made."""
    path = tmp_path / "net.mlpackage"
    with torch.no_grad():
        file_formats.write_coreml(finished.model.eval(), torch.zeros(2, *finished.image_shape), path, "{}")
    assert (path / "Manifest.json").exists()


def test_openvino_weights_lie_beside_a_name_with_its_ending(finished: Finished, tmp_path: Path) -> None:
    if not installed("openvino"):
        pytest.skip("openvino is not installed")
    with pytest.raises(UserError, match=r"net has to end in \.xml: the weights go into the \.bin file"):
        export_run(finished, "openvino", tmp_path / "net")


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
    needing = replace(FILE_FORMATS["onnx"], needs=("importlib", "not_there", "nor_this"))
    monkeypatch.setitem(FILE_FORMATS, "onnx", needing)
    with pytest.raises(UserError, match="needs not_there, nor_this: run 'pip install not_there nor_this'"):
        export_run(finished, "onnx", tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
