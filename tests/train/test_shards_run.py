"""A run on streamed shards, interrupted in the middle of an epoch, is the run that was not."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file
from short_runs import At, assert_same_run, resume, run
from start_processes import run_together

from clicktrain.data import PixelSource, open_data
from clicktrain.errors import UserError
from clicktrain.train import RunFolder, TrainingInterrupted

SETTINGS: dict[str, Any] = {
    "model": "tiny_networks:tiny", "method": "clicktrain", "compression": 4, "epochs": 3, "threads": 1,
    "operators": "reference", "learning_rate": 0.05, "batch_size": 32, "workers": 0, "shuffle_buffer": 40,
    "augment": "digits",
}  # fmt: skip
BATCHES = 10  # of an epoch


def write_digits(kind: str, folder: Path) -> None:
    """Write 400 of the embedded digits in four shards."""
    digits = open_data("digits").train
    assert isinstance(digits, PixelSource)
    folder.mkdir()
    for shard in range(4):
        images, labels = [], digits.labels[100 * shard : 100 * shard + 100].tolist()
        for pixels in digits.images[100 * shard : 100 * shard + 100]:
            file = io.BytesIO()
            Image.fromarray(pixels[0].numpy()).save(file, "PNG")
            images.append(file.getvalue())
        if kind == "parquet-shards":
            table = pa.table({"image": pa.array(images, pa.binary()), "label": labels})
            pq.write_table(table, folder / f"train-{shard}.parquet", row_group_size=20)
            continue
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index, (data, label) in enumerate(zip(images, labels, strict=True)):
                for name, content in ((f"{index}.png", data), (f"{index}.cls", str(label).encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["webdataset", "parquet-shards"])
def test_stopped_in_the_middle_of_an_epoch(kind: str, tmp_path: Path) -> None:
    write_digits(kind, tmp_path / "set")
    settings = {**SETTINGS, "data": f"{kind}:{tmp_path / 'set'}", "cache_dir": str(tmp_path / "cache")}
    run(tmp_path / "whole", settings)
    stop = At(BATCHES + 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match=f"in epoch 2 after batch 4 of {BATCHES}"):
        run(tmp_path / "stopped", settings, stop)
    resume(tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    accuracy = RunFolder(tmp_path / "whole").read_metrics()[-1]["val_accuracy"]
    assert accuracy > 0.2


@pytest.mark.long
@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_are_stopped_and_one_goes_on(tmp_path: Path) -> None:
    """The rest of the epoch has the batches that one process alone sees in it."""
    write_digits("webdataset", tmp_path / "set")
    settings = {
        **SETTINGS, "model": "resnet8", "width": 0.25, "method": "dense", "sync_batch_norm": True,
        "epochs": 2, "workers": 1,
        "data": f"webdataset:{tmp_path / 'set'}", "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    del settings["compression"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    run_together(Path(__file__).parent / "shards_processes.py", 2, tmp_path)
    assert "in epoch 2 after batch 4 of 10" in (tmp_path / "stopped-0.txt").read_text()
    assert not RunFolder(tmp_path / "stopped").summary_path.exists()
    resume(tmp_path / "stopped")
    run(tmp_path / "whole", settings)
    ours, theirs = (RunFolder(tmp_path / name).read_metrics() for name in ("stopped", "whole"))
    for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-3), key
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole")]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight.float(), weights[1][name].float(), rtol=1e-3, atol=2e-3)


def test_a_buffer_without_shards_leaves_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shuffle_buffer is for data in shards"):
        run(tmp_path / "run", {**SETTINGS, "data": "digits"})
    assert not (tmp_path / "run").exists()
