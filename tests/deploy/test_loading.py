"""`clicktrain.load` and `clicktrain.load_packed`: from a run's small file, without what trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import clicktrain
from clicktrain.cli import main
from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d import PackedConv2d

torch.set_num_threads(1)
DATA = "synthetic:classes=3,size=8,channels=1,train=32,val=8"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "nm"
    line = ["train", "--model", "resnet8", "--width", "0.5", "--data", DATA, "--batch-size", "16"]
    assert (
        main(
            [*line, "--epochs", "1", "--method", "nm", "--threads", "1", "--no-report", "--out", str(folder)]
        )
        == 0
    )
    return folder


def test_packed_weights_are_the_network(run: Path) -> None:
    plain, packed = clicktrain.load(run), clicktrain.load_packed(run / "packed.safetensors")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-4, atol=1e-4)
    assert not packed.training
    assert any(isinstance(module, PackedConv2d) for module in packed.modules())
    assert (run / "packed.safetensors").stat().st_size < 0.6 * (run / "model.safetensors").stat().st_size
    unpacked = clicktrain.unpack(clicktrain.load_packed(run))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(unpacked.state_dict()[name], tensor), name


def test_the_small_file_is_enough(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(clicktrain.load(copy)(x), clicktrain.load(run)(x))


def test_loading_imports_nothing_that_trains(run: Path) -> None:
    code = (
        "import sys, clicktrain; clicktrain.load(sys.argv[1]); clicktrain.load_packed(sys.argv[1]);"
        "names = tuple(f'clicktrain.{name}' for name in ('train', 'methods', 'data'));"
        "print([module for module in sys.modules if module.startswith(names)])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.long
def test_one_line_for_fast_inference(run: Path) -> None:
    fast = clicktrain.load(run, batch=4)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), clicktrain.load(run)(x), rtol=1e-3, atol=1e-3)
    assert not fast.training


def test_what_cannot_be_loaded_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch is 0"):
        clicktrain.load(run, batch=0)
    with pytest.raises(UserError, match=r"missing\.safetensors"):
        clicktrain.load_packed(tmp_path / "missing.safetensors")
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "packed.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"packed\.safetensors"):
        clicktrain.load_packed(copy)
    (copy / "summary.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        clicktrain.load(copy)
    with pytest.raises(UserError, match="needs no model: leave it out"):
        clicktrain.load_packed(run, model=nn.Identity)
    assert json.loads((run / "summary.json").read_text())["model"] == "resnet8"
