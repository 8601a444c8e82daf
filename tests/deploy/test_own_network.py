"""`clicktrain.export`, `clicktrain.save` and what loads it: networks of a loop of one's own."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from c_builds import alive, needs_compiler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import clicktrain
from clicktrain.deploy import Exported, ExportedC
from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.surgery import apply_surgery_, plans_of
from clicktrain.surgery.planning import plans_from_zeros

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Own(nn.Module):
    """Somebody's own class."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 24, 3, stride=2)
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


def own(density: float = 0.25) -> nn.Module:
    torch.manual_seed(0)
    return alive(Own(), density)


def images(count: int = 5) -> Tensor:
    return torch.randn(count, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def shrunken(model: nn.Module) -> nn.Module:
    """Without a quarter of the channels between the convolutions."""
    with torch.no_grad():
        for name in ("first", "norm"):
            for parameter in model.get_submodule(name).parameters():
                parameter[::4] = 0
        model.get_submodule("second").weight[:, ::4] = 0  # type: ignore[index,operator]
    apply_surgery_(plans_from_zeros(model, images(2), threshold=0.0)[1], model)
    return model


# ---------------------------------------------------------------- export


def test_the_ending_says_the_format_and_the_network_stays_as_it_is(tmp_path: Path) -> None:
    model = own().train()
    before = copy.deepcopy(model.state_dict())
    done = clicktrain.export(model, images(), tmp_path / "net.pt2", facts={"classes": ["a", "b", "c", "d"]})
    assert isinstance(done, Exported)
    assert (done.format, done.images, done.accuracy) == ("torch", 5, None)
    extra = {"clicktrain": ""}
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    assert json.loads(extra["clicktrain"]) == {"model": "Own", "classes": ["a", "b", "c", "d"]}
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(program(images(7)), model.eval()(images(7)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("held", [clicktrain.pack, lambda model: model.double()])
def test_what_holds_the_network_is_of_no_matter(
    held: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    done = clicktrain.export(held(own()), images().double(), tmp_path / "net.safetensors")
    expected = own().state_dict()
    for name, tensor in load_file(tmp_path / "net.safetensors").items():
        torch.testing.assert_close(tensor, expected[name])
    assert done.max_difference == 0


def test_images_of_a_loader_give_an_accuracy(tmp_path: Path) -> None:
    model, x = own(), images(40)
    y = torch.randint(4, (40,), generator=torch.Generator().manual_seed(2))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 16)
    done = clicktrain.export(model, x[:1], tmp_path / "net.pt2", images=loader, count=30)
    with torch.no_grad():
        right = float((model(x[:30]).argmax(1) == y[:30]).float().mean()) * 100
    assert (done.images, done.accuracy) == (30, pytest.approx(right))
    alone = clicktrain.export(model, x[:1], tmp_path / "net.pt2", images=[x[:8], (x[8:12],)])
    assert (alone.images, alone.accuracy) == (12, None)


@needs_compiler
@pytest.mark.long
def test_a_folder_in_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -O0")
    done = clicktrain.export(own(), images(), tmp_path / "net", name="tiny")
    assert isinstance(done, ExportedC)
    assert (tmp_path / "net" / "tiny.c").exists()
    assert f"built and run ({done.isa}) on 5 images" in str(done)


def test_what_cannot_be_exported_is_said(tmp_path: Path) -> None:
    model, x = own(), images()
    with pytest.raises(UserError, match=r"net\.tflite: names of files end in \.safetensors, \.onnx"):
        clicktrain.export(model, x, tmp_path / "net.tflite")
    with pytest.raises(UserError, match="format is 'tflite': use one of safetensors"):
        clicktrain.export(model, x, tmp_path / "net", format="tflite")
    with pytest.raises(UserError, match="at least one image"):
        clicktrain.export(model, x[:0], tmp_path / "net.pt2")
    with pytest.raises(UserError, match=r"not the AveragedModel around it: give model\.module"):
        clicktrain.export(AveragedModel(model), x, tmp_path / "net.pt2")
    with pytest.raises(UserError, match="takes a network, not a str"):
        clicktrain.export("net", x, tmp_path / "net.pt2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="gives batches of 'dict'"):
        clicktrain.export(model, x, tmp_path / "net.safetensors", images=[{"x": x}])
    with pytest.raises(UserError, match="the network gives a tuple"):
        clicktrain.export(Two(), x, tmp_path / "net.safetensors")
    with pytest.raises(UserError, match=r"inputs of shape \[N, 3\]: C has images"):
        clicktrain.export(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


# ---------------------------------------------------------------- save and load


def same(one: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(images()), other.eval()(images()), rtol=1e-5, atol=1e-6)


def test_a_network_whose_channels_went_is_saved_and_loaded(tmp_path: Path) -> None:
    model = shrunken(own())
    assert model.get_submodule("first").weight.shape[0] == 12
    path = clicktrain.save(model, tmp_path / "saved")
    assert [one.name for one in path.parent.iterdir()] == ["packed.safetensors"]
    same(clicktrain.load(tmp_path / "saved", model=Own), model)
    same(clicktrain.load_pruned(Own(), tmp_path / "saved"), model)
    packed = clicktrain.load_packed(tmp_path / "saved", model=Own)
    assert any(isinstance(layer, PackedConv2d) for layer in packed.modules())
    same(packed, model)
    again = clicktrain.load(clicktrain.save(packed, tmp_path / "again").parent, model=Own)
    assert len(plans_of(again)) == len(plans_of(model)) > 0
    same(again, model)


def test_the_file_is_small_and_has_what_is_packed(tmp_path: Path) -> None:
    model = own(0.1)
    path = clicktrain.save(clicktrain.pack(model), tmp_path)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert "first.values" in names
    assert "second.weight" not in names
    dense = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert path.stat().st_size < 0.5 * dense
    for name, tensor in clicktrain.load(tmp_path, model=Own).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_network_of_the_zoo_needs_no_class(tmp_path: Path) -> None:
    model = clicktrain.create_model("resnet8", num_classes=4, width=0.25).eval()
    clicktrain.save(copy.deepcopy(model), tmp_path, image_shape=(3, 10, 10))
    same(clicktrain.load(tmp_path), model)
    same(clicktrain.load(tmp_path, batch=2), model)  # nothing is sparse: as it is
    with pytest.raises(UserError, match="which needs no model"):
        clicktrain.load(tmp_path, model=Own)


def test_accelerating_needs_the_size_of_images(tmp_path: Path) -> None:
    clicktrain.save(own(), tmp_path)
    with pytest.raises(UserError, match="does not say how large images are: give image_shape"):
        clicktrain.load(tmp_path, model=Own, batch=2)


def test_what_cannot_be_saved_or_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give model\.module"):
        clicktrain.save(AveragedModel(own()), tmp_path)
    outer = nn.Sequential(shrunken(own()))
    with pytest.raises(
        UserError, match="channels were removed from a part of the network, 0: save that part"
    ):
        clicktrain.save(outer, tmp_path)
    with pytest.raises(UserError, match=r"image_shape is \[3, 10\]"):
        clicktrain.save(own(), tmp_path, image_shape=(3, 10))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(UserError, match="is the folder of a run"):
        clicktrain.save(own(), tmp_path / "run")
    path = clicktrain.save(own(), tmp_path / "saved")
    with pytest.raises(UserError, match="whose code would run"):
        clicktrain.load(path.parent)
    with pytest.raises(UserError, match="needs classes, shape: give a function without arguments"):
        clicktrain.load(path.parent, model=lambda classes, shape: Own(classes))
    with pytest.raises(UserError, match="is a network that is built already"):
        clicktrain.load(path.parent, model=Own())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="does not fit model"):
        clicktrain.load(path.parent, model=lambda: Own(7))
    with pytest.raises(UserError, match="not the folder of a run"):
        clicktrain.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda document: "{", "is not JSON"),
        (lambda document: "[]", "is no record"),
        (lambda document: json.dumps({**document, "version": 99}), "has version 99"),
        (lambda document: json.dumps({**document, "model": 3}), "does not say how its network is built"),
        (lambda document: json.dumps({**document, "image_shape": [1, 2]}), "how its network is built"),
        (lambda document: json.dumps({**document, "plans": 3}), "no list of plans"),
        (lambda document: json.dumps({**document, "plans": [{}]}), "not a surgery plan"),
    ],
)
def test_a_damaged_description_is_one_sentence(
    change: Callable[[dict], str], problem: str, tmp_path: Path
) -> None:  # type: ignore[type-arg]
    path = clicktrain.save(own(), tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(
        tensors, path, {**metadata, "clicktrain.network": change(json.loads(metadata["clicktrain.network"]))}
    )
    with pytest.raises(UserError, match=problem):
        clicktrain.load(tmp_path, model=Own)
