"""Networks of timm and torchvision by name, and weights from their caches; nothing is downloaded."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from clicktrain.commands.models import run as models_command
from clicktrain.errors import UserError
from clicktrain.models import create_model
from clicktrain.models.packages import list_package_models, pretrained_weights
from clicktrain.own_code import is_own


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="pip install 'clicktrain[models]'")


@pytest.fixture
def torchvision() -> Any:
    return pytest.importorskip("torchvision", reason="pip install 'clicktrain[models]'")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def test_a_name_in_a_package_is_nobodys_own_code() -> None:
    assert not is_own("timm:resnet26")
    assert not is_own("torchvision:resnet18")
    assert is_own("torchvision.models:resnet18")
    assert is_own("timm_nets:resnet26")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_a_package_that_is_not_installed(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{package} cannot be imported .*pip install 'clicktrain\[models\]'"
    ):
        create_model(f"{package}:resnet18", num_classes=3)


def test_sizes_are_checked_before_anything_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm:resnet18 has no width"):
        create_model("timm:resnet18", num_classes=3, width=0.5)
    with pytest.raises(UserError, match="make it smaller"):
        create_model("timm:resnet18", num_classes=10**12)


def test_the_zoo_has_no_pretrained_weights() -> None:
    with pytest.raises(UserError, match="resnet20 has no pretrained weights: they are for networks of timm"):
        pretrained_weights("resnet20", num_classes=3)


def output(model: nn.Module, channels: int, side: int) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(model.train()(torch.randn(2, channels, side, side)).shape)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224", "resnet10t.c3_in1k"])
def test_timm(timm: Any, name: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"timm:{name}", num_classes=7, in_channels=1, image_size=64)
    assert output(model, 1, 64) == (2, 7)
    torch.manual_seed(0)
    again = create_model(f"timm:{name}", num_classes=7, in_channels=1, image_size=64)
    for key, value in model.state_dict().items():
        if value.is_floating_point() and "running" not in key and "num_batches" not in key:
            assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "squeezenet1_1"])
def test_torchvision(torchvision: Any, name: str) -> None:
    model = create_model(f"torchvision:{name}", num_classes=7, in_channels=1, image_size=64)
    assert output(model, 1, 64) == (2, 7)


@pytest.mark.parametrize("name", ["timm:resnet27", "timm:hf-hub:timm/resnet26", "timm:../x", "timm:"])
def test_other_names_are_looked_for_nowhere(timm: Any, no_network: None, name: str) -> None:
    with pytest.raises(UserError, match="timm has no network"):
        create_model(name, num_classes=3)


def test_near_names(torchvision: Any) -> None:
    with pytest.raises(UserError, match=r"did you mean torchvision:resnet18"):
        create_model("torchvision:resnet81", num_classes=3)
    with pytest.raises(UserError, match="torchvision has no network 'ResNet'"):
        create_model("torchvision:ResNet", num_classes=3)  # a class there, no name of a network


def test_sizes_that_a_package_does_not_like(torchvision: Any) -> None:
    with pytest.raises(UserError, match=r"torchvision cannot build vit_b_16 with .*image_size=30"):
        create_model("torchvision:vit_b_16", num_classes=3, image_size=30)


# ---------------------------------------------------------------- pretrained weights


def test_what_is_not_in_a_cache_is_not_fetched(
    timm: Any, torchvision: Any, no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    for name, call in (
        ("timm:resnet10t", "timm.create_model('resnet10t', pretrained=True)"),
        ("torchvision:resnet18", "torchvision.models.get_model('resnet18', weights='DEFAULT')"),
    ):
        with pytest.raises(UserError, match="not in its cache: fetch them where there is a network") as error:
            pretrained_weights(name, num_classes=3)
        assert call in str(error.value)


def test_weights_in_torchs_cache(
    torchvision: Any, no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = torchvision.models.get_model("squeezenet1_1", weights=None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    monkeypatch.setattr("torch.hub._get_torch_home", lambda: str(tmp_path))
    torch.save(published.state_dict(), tmp_path / "checkpoints" / url.rpartition("/")[2])
    loaded = pretrained_weights("torchvision:squeezenet1_1", num_classes=3)
    whole = published.state_dict()
    assert whole.keys() - loaded.keys() == {"classifier.1.weight", "classifier.1.bias"}
    for name, value in loaded.items():
        assert torch.equal(value, whole[name]), name
    assert pretrained_weights("torchvision:squeezenet1_1", num_classes=1000).keys() == whole.keys()
    with pytest.raises(UserError, match="read images of 3 channels, the data has 1"):
        pretrained_weights("torchvision:squeezenet1_1", num_classes=3, in_channels=1)


def test_weights_in_timms_cache(
    timm: Any, no_network: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    published = timm.create_model("resnet10t")
    folder = tmp_path / "models--timm--resnet10t.c3_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    save_file(published.state_dict(), folder / "snapshots" / "abc" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = pretrained_weights("timm:resnet10t", num_classes=3, in_channels=1)
    whole = published.state_dict()
    assert whole.keys() - loaded.keys() == {"fc.weight", "fc.bias"}
    first = whole["conv1.0.weight"].sum(dim=1, keepdim=True)
    torch.testing.assert_close(loaded["conv1.0.weight"], first)
    assert torch.equal(loaded["layer1.0.conv1.weight"], whole["layer1.0.conv1.weight"])


# ---------------------------------------------------------------- the command


def test_the_command_lists_a_package(timm: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert models_command(["timm:*"]) == 0
    assert set(capsys.readouterr().out.split()) == set(list_package_models("timm"))
    assert models_command(["timm:resnet1?", "--image-size", "64", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["timm:resnet18"]["convolutions"] == 20
    assert rows["timm:resnet18"]["reason"] is None


def test_the_command_filters_the_zoo(capsys: pytest.CaptureFixture[str]) -> None:
    assert models_command(["vgg*", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["vgg11", "vgg13", "vgg16"]
    with pytest.raises(UserError, match="no network is called 'nothing'"):
        models_command(["nothing"])
