"""Every mistake of the user's: exit code 2, one line on stderr that tells it, nothing left behind."""

from __future__ import annotations

import io
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_runs import DATA, TINY, Outcome, call, files_below, spawn
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FLAGS_THAT_FIT = (*TINY, "--compression", "4", "--epochs", "4")
PREFIX = "clicktrain: error: "


def check_told(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.err.startswith(PREFIX)
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    for part in parts:
        assert part in outcome.err


@pytest.mark.parametrize(
    ("line", "part"),
    [
        # fields
        ("train --epoch 3", "unknown flag --epoch: did you mean --epochs?"),
        ("train --epochs three", "epochs is 'three': a value of type int is needed"),
        ("train --epochs 0", "epochs is 0: must be at least 1"),
        ("train --method prunetrain --round-to foo", "round_to is 'foo': use a whole number or auto"),
        ("train --precision fp8", "precision is 'fp8': use one of fp32, bf16, fp16"),
        ("train --schedule step --milestones 0.7 0.2", "milestones is [0.7, 0.2]: rising shares"),
        (
            "train --method dense --compression 8",
            "--compression is a setting of method clicktrain, dsr, rigl, granet, mest, gmp, "
            "clicktrain-gradual, admm-patterns, not of dense",
        ),
        ("train --method prune-it", "method is 'prune-it': use one of dense, clicktrain"),
        ("train digits", "'digits' is out of place: write 'clicktrain train [--flag value ...]'"),
        ("train --config missing.yaml", "there is no file missing.yaml"),
        ("train --config", "--config needs a value"),
        ("trian", "unknown command 'trian': did you mean 'train'?"),
        ("prune", "unknown command 'prune': use one of demo, train, resume"),
        # what cannot be done
        ("train --model resnet21", "unknown model 'resnet21' (did you mean resnet"),
        ("train --model no_such_package:build", "there is no module 'no_such_package'"),
        ("train --compression 0.5", "compression must be more than 1"),
        ("train --compression 100000", "100000"),
        (
            "train --model resnet18 --width 0.125 --batch-size 1",
            "of model resnet18 has one value per channel for each image, and needs two: set batch_size to at "
            "least 2",
        ),
        ("train --exclude nothing", "no convolution is called 'nothing'"),
        ("train --layers nothing=2", "'nothing'"),
        ("train --device mps", "device is 'mps', which PyTorch does not find here"),
        ("train --keep-checkpoints 1000000000000", "MB are free: free some space, lower keep_checkpoints"),
        # data
        ("train --data parket:/images", "did you mean parquet:/images?"),
        ("train --data parquet:missing", "missing"),
        ("train --data synthetic:colour=1", "synthetic data has no setting 'colour'"),
        # runs
        ("resume missing", "missing is not the folder of a run: it has no config.yaml"),
        ("resume", "RUN is missing: write 'clicktrain resume RUN [--flag value ...]'"),
        ("evaluate missing", "missing is not the folder of a run"),
        ("inspect missing", "missing is not the folder of a run"),
        ("inspect missing --jsn", "unknown flag --jsn: did you mean --json?"),
        ("export missing --format onnx", "missing is not the folder of a run"),
        (
            "export missing --format tflite",
            "format is 'tflite': use one of safetensors, onnx, torch, openvino, executorch, coreml, c",
        ),
        ("report missing -o x.html", "missing"),
        ("schema -o no/schema.json", "--output no/schema.json: there is no folder no"),
        ("schema -o .", "--output . is a folder: give the name of a file"),
        ("sensitivity missing", "missing is not the folder of a run"),
        ("sensitivity missing -o .", "--output . is a folder: give the name of a file"),
        ("list", "there is no folder runs: give the folder that your runs are in"),
        ("train --log nosuch", "log is 'nosuch': use one of csv, tensorboard, wandb, mlflow"),
        ("train --initial-weights pretrained", "has no pretrained weights: they are for networks of timm"),
        ("models zzz*", "no network is called 'zzz*': try 'resnet*', 'timm:*' or 'torchvision:*'"),
    ],
)
@pytest.mark.skipif(sys.platform == "darwin", reason="mps is there")
def test_mistake(line: str, part: str, place: Path) -> None:
    command, *rest = line.split()
    flags = [*TINY, "--out", "runs/new"] if command == "train" else []
    check_told(call(command, *flags, *rest), part)
    assert files_below(place) == {}


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("epoch: 3\n", "recipe.yaml: unknown setting 'epoch': did you mean 'epochs'?"),
        ("method: dense\npatterns: 8\n", "recipe.yaml: unknown setting 'patterns'"),
        ("epochs: many\n", "recipe.yaml: epochs is 'many': a value of type int is needed"),
        ("epochs: [1\n", "recipe.yaml is not valid YAML (line 2)"),
        ("- epochs\n", "recipe.yaml holds no settings"),
        ("compression: 0.1\n", "recipe.yaml: compression must be more than 1"),
        ("method: [1]\n", "recipe.yaml: method is [1]"),
        ("1: 2\n", "recipe.yaml: settings need names"),
        ("\x00", "recipe.yaml is not valid YAML"),
    ],
)
def test_mistake_in_a_recipe(text: str, part: str, place: Path) -> None:
    recipe = place.parent / "recipe.yaml"
    recipe.write_text(text)
    check_told(call("train", "--config", recipe, "--out", "run"), part)
    assert files_below(place) == {}


# ---------------------------------------------------------------- data sets


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(buffer, "JPEG")
    return buffer.getvalue()


def image_folder(root: Path) -> Path:
    for split, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpeg").write_bytes(jpeg(20 * number))
    return root


def test_a_class_folder_with_a_broken_jpeg(place: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    flags = ("--data", f"imagefolder:{root}", "--batch-size", "4", "--epochs", "1", "--out", "runs/new")
    broken = root / "train" / "dog" / "3.jpeg"
    broken.write_bytes(jpeg(60)[:200])
    check_told(call("train", *TINY, *flags, "--method", "dense"), str(broken))
    assert files_below(place) == {}
    broken.write_bytes(jpeg(60))
    assert call("train", *TINY, *flags, "--method", "dense", "--no-report").code == 0


def test_an_empty_class_folder_and_an_empty_data_set(place: Path, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images")
    for path in (root / "train" / "dog").iterdir():
        path.unlink()
    check_told(call("train", *TINY, "--data", f"imagefolder:{root}", "--out", "run"), "dog")
    empty = tmp_path / "empty"
    empty.mkdir()
    for kind in ("imagefolder", "parquet", "cifar10"):
        check_told(call("train", *TINY, "--data", f"{kind}:{empty}", "--out", "run"), str(empty))
    assert files_below(place) == {}


def test_a_corrupt_parquet_file(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "parquet"
    folder.mkdir()
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    check_told(call("train", *TINY, "--data", f"parquet:{folder}", "--out", "run"), str(folder))
    assert files_below(place) == {}


# ---------------------------------------------------------------- places


def test_folders_that_are_taken(finished: tuple[Path, Outcome], place: Path) -> None:
    before = files_below(finished[0])
    outcome = call("train", *TINY, "--out", finished[0])
    check_told(outcome, "already holds a run: continue it with 'clicktrain resume")
    assert files_below(finished[0]) == before
    (place / "notes").mkdir()
    (place / "notes" / "mine.txt").write_text("mine")
    before = files_below(place)
    check_told(call("train", *TINY, "--out", "notes"), "notes is not empty: give another --out")
    check_told(call("train", *TINY, "--out", "notes/mine.txt"), "notes/mine.txt is a file")
    check_told(call("train", *FLAGS_THAT_FIT, "--out", "notes/mine.txt/run"), "notes/mine.txt/run")
    assert files_below(place) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(place: Path) -> None:
    place.chmod(0o500)
    try:
        check_told(call("train", *FLAGS_THAT_FIT, "--out", "run"), "run")
    finally:
        place.chmod(0o700)
    assert files_below(place) == {}


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource limits")
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_is_full_at_the_first_checkpoint(place: Path, existing: bool) -> None:
    """A limit on the size of files acts as a full disk does: the write fails half-way."""
    if existing:
        (place / "runs" / "new").mkdir(parents=True)
    before = set(files_below(place))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        outcome = call("train", *FLAGS_THAT_FIT, "--quiet", "--out", "runs/new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_told(outcome, "runs/new")
    assert set(files_below(place)) == before


def test_a_run_that_diverges_leaves_its_last_good_checkpoint(place: Path) -> None:
    flags = (*FLAGS_THAT_FIT, "--learning-rate", "1e30", "--momentum", "0", "--no-nesterov")
    check_told(call("train", *flags, "--out", "run"), "training diverged", "the last good checkpoint is run")
    assert list((place / "run" / "checkpoints").iterdir())
    assert not (place / "run" / "summary.json").exists()


def test_a_disk_that_is_too_small(place: Path) -> None:
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    small = place / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        outcome = call("train", *FLAGS_THAT_FIT, "--out", small / "run")
        check_told(outcome, "the run needs about", "MB are free: free some space")
        assert files_below(small) == {}
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ---------------------------------------------------------------- damaged runs


@pytest.mark.parametrize("command", ["resume", "evaluate", "inspect"])
def test_a_damaged_config(command: str, copy_of_finished: Callable[[], Path]) -> None:
    folder = copy_of_finished()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("epochs: 4", "epochs: [4"))
    check_told(call(command, folder), "config.yaml is not valid YAML (line")
    settings = yaml.safe_load(config.read_text().replace("epochs: [4", "epochs: 4"))
    config.write_text(yaml.safe_dump({**settings, "epoks": 4}))
    check_told(call(command, folder), "config.yaml: unknown setting 'epoks': did you mean 'epochs'?")
    config.write_text("# clicktrain run folder, format 99\n")
    check_told(call(command, folder), "has format 99")


@pytest.mark.parametrize("name", ["model.safetensors", "summary.json"])
@pytest.mark.parametrize("command", [["evaluate"], ["inspect", "--json"], ["export", "--format", "torch"]])
def test_damaged_files(name: str, command: list[str], copy_of_finished: Callable[[], Path]) -> None:
    folder = copy_of_finished()
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = files_below(folder)
    check_told(call(*command, folder), str(path), "damaged")
    assert files_below(folder) == before


def test_a_message_of_several_lines_is_told_in_one(copy_of_finished: Callable[[], Path]) -> None:
    path = copy_of_finished() / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["fc.bias"] = tensors["fc.bias"].repeat(2)
    save_file(tensors, path, metadata)
    check_told(call("evaluate", path.parent), "model.safetensors", "fc.bias")


def test_an_unfinished_run_is_neither_evaluated_nor_exported(copy_of_finished: Callable[[], Path]) -> None:
    folder = copy_of_finished()
    (folder / "summary.json").unlink()
    before = files_below(folder)
    for command in (["evaluate"], ["inspect"], ["export", "--format", "onnx"]):
        check_told(call(*command, folder), "is not finished: continue it with 'clicktrain resume")
    assert files_below(folder) == before


# ---------------------------------------------------------------- the process


@pytest.mark.long
def test_in_a_process_of_its_own(place: Path) -> None:
    with spawn("train", "--model", "resnet21", "--out", "run", cwd=place) as process:
        out, err = process.communicate(timeout=120)
    check_told(Outcome(process.returncode, out, err), "unknown model 'resnet21'")
    assert out.count("\n") <= 1  # the data set had been opened
    assert files_below(place) == {}


def test_a_network_with_a_bug(place: Path) -> None:
    (place / "net_with_a_bug.py").write_text("def build(num_classes):\n    return 1 / 0\n")
    flags = ("--model", "net_with_a_bug:build", "--data", DATA, "--out", "run")
    check_told(call("train", *flags), "failed with ZeroDivisionError", "net_with_a_bug.py, line 2")
    assert not (place / "run").exists()


def test_what_is_not_the_users_mistake_keeps_its_traceback(place: Path) -> None:
    code = "import clicktrain.commands.train as t, clicktrain.cli as c; t.from_dict = None; c.main(['train'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=place, text=True, capture_output=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "TypeError" in done.stderr
