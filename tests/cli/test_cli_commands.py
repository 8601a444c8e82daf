from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_runs import DATA, TINY, Outcome, call, files_below, spawn
from safetensors import safe_open
from safetensors.torch import load_file

from clicktrain.cli import COMMANDS
from clicktrain.commands.arguments import options_of
from clicktrain.commands.train import GROUPS
from clicktrain.deploy.file_formats import FILE_FORMATS
from clicktrain.methods import METHODS
from clicktrain.settings import field_names
from clicktrain.sparsity.importance import CRITERIA
from clicktrain.train import RunConfig


def test_help_is_quick_and_needs_no_torch(repository: Path) -> None:
    code = (
        "import sys; from clicktrain.cli import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'numpy', 'rich', 'yaml'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    outcome = call(name, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: clicktrain {name}")
    assert outcome.err == ""


def test_help_of_train_shows_run_and_method_settings() -> None:
    text = " ".join(call("train", "--help").out.split())
    assert "settings of the run" in text
    assert "--learning-rate X Peak learning rate. (type: float, default: 0.1)" in text
    assert "settings of method clicktrain" in text
    assert "--compression X" in text
    text = " ".join(call("train", "--help", "--method=dense").out.split())
    assert "settings of method dense" in text
    assert "--loss-slope" not in text


def test_help_of_train_is_short_and_says_where_the_rest_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = call("train", "--help").out
    assert len(text.splitlines()) < 95
    assert max(map(len, text.splitlines())) <= 100
    assert "--help-all" in text
    rare = {name for *_, few in GROUPS.values() for name in few.split()}
    for option in options_of(RunConfig):
        assert bool(re.search(rf"{option.flag}(?![\w-])", text)) == (option.name not in rare), option.flag
    counted = [int(number) for number in re.findall(r"(\d+) more: --help-all", " ".join(text.split()))]
    assert sum(counted) == len(rare)
    (explained,) = re.findall(r"also (\d+) more: clicktrain train --method clicktrain --help", text)
    assert int(explained) + 2 == len(options_of(METHODS["clicktrain"]))
    assert all(re.search(rf"^  {key} +\S", text, re.M) for key in METHODS)
    every = " ".join(call("train", "--help-all").out.split())
    assert "--gamma X Factor of the step schedule at each milestone. (type: float, default: 0.1)" in every
    assert "--patterns N Size " in every


@pytest.mark.parametrize("name", METHODS)
def test_help_of_one_method_explains_its_settings_alone(name: str) -> None:
    text = " ".join(call("train", "--help", "--method", name).out.split())
    assert "--learning-rate" not in text
    for option in options_of(METHODS[name]):
        assert option.help, f"{name}.{option.name} has no docstring"
        assert f"{option.usage} {option.help}" in text


def test_help_shows_what_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA._entries, "of_a_help_test", lambda weight, grad: weight.abs())
    monkeypatch.setitem(METHODS._entries, "of_a_help_test", METHODS["dense"])
    assert ",of_a_help_test" in call("train", "--help", "--method", "campfire").out
    assert "  of_a_help_test " in call("train", "--help").out


def test_every_setting_of_a_run_has_its_group_in_the_help() -> None:
    grouped = [name for lists in GROUPS.values() for name in " ".join(lists).split()]
    assert sorted(grouped) == sorted(field_names(RunConfig))


def test_version() -> None:
    assert call("--version").out.startswith("clicktrain ")
    assert call().code == 2


# ---------------------------------------------------------------- train


def test_train_leaves_the_files_of_a_run_and_tells_what_it_reached(finished: tuple[Path, Outcome]) -> None:
    folder, outcome = finished
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "config.yaml", "metrics.jsonl", "events.jsonl", "summary.json", "model.safetensors",
        "packed.safetensors", "checkpoints", "report.html",
    }  # fmt: skip
    assert outcome.err == ""
    *before, last = outcome.out.splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    assert last.startswith(f"compression asked 4x, reached {summary['compression_ratio']:.2f}x; accuracy ")
    assert last.endswith(f"; files in {folder}")
    sizes = [(folder / name).stat().st_size for name in ("model.safetensors", "packed.safetensors")]
    assert list(summary["file_bytes"].values()) == sizes
    first, second = (line.split() for line in before[-2:])
    assert [first[0], first[3], second[0]] == ["model.safetensors", "100%", "packed.safetensors"]
    assert second[3] == f"{100 * sizes[1] / sizes[0]:.0f}%"
    epochs = [line for line in before if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/4", "2/4", "3/4", "4/4"]
    record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"loss {record['train_loss']:.4f}" in epochs[-1]
    assert f"val {record['val_accuracy']:5.1f}%" in epochs[-1]
    assert f"sparsity {100 * record['sparsity']:4.1f}%" in epochs[-1]
    assert "waiting for data" in epochs[-1]


def test_a_saved_config_repeats_the_run_and_quiet_is_quiet(
    finished: tuple[Path, Outcome], place: Path
) -> None:
    outcome = call(
        "train", "--config", finished[0] / "config.yaml", "--out", "again", "--quiet", "--no-report"
    )
    assert outcome.code == 0, outcome.err
    assert len(outcome.out.splitlines()) == 1
    assert not (place / "again" / "report.html").exists()
    first, second = (load_file(folder / "model.safetensors") for folder in (finished[0], place / "again"))
    assert all(first[name].equal(second[name]) for name in first)


def test_flags_win_over_a_recipe_and_the_run_gets_a_dated_name(place: Path) -> None:
    recipe = {
        "model": "resnet20",
        "width": 0.25,
        "data": DATA,
        "batch_size": 16,
        "epochs": 50,
        "compression": 3,
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = ("--method", "dense", "--epochs", "1", "--learning-rate", "0.02", "--threads", "1", "--no-report")
    outcome = call("train", "--config", "recipe.yaml", *flags)
    assert outcome.code == 0, outcome.err
    assert "method dense has no compression: those of the recipe are left out" in outcome.out
    assert "no compression asked, reached 1.00x" in outcome.out
    (folder,) = (place / "runs").iterdir()
    assert folder.name.endswith("_resnet20_dense")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["epochs"] == 1
    assert saved["batch_size"] == 16
    assert saved["learning_rate"] == 0.02
    assert "compression" not in saved


def test_dry_run_shows_plan_and_cost_and_writes_nothing(place: Path) -> None:
    outcome = call("train", *TINY, "--compression", "4", "--epochs", "4", "--dry-run", "--out", "run")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert "layer1.0.conv1" in outcome.out
    assert "first convolution: it reads the image" in outcome.out
    assert "4 epochs x 3 batches of 32" in outcome.out
    assert "FLOPs forward per image" in outcome.out
    assert "ms per dense batch on cpu" in outcome.out
    assert files_below(place) == {}


def test_a_network_of_the_users_own(place: Path) -> None:
    (place / "net_of_a_cli_test.py").write_text(
        "from torch import nn\n"
        "def build(num_classes, in_channels):\n"
        "    convolutions = nn.Conv2d(in_channels, 4, 3), nn.Conv2d(4, 8, 3)\n"
        "    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)\n"
        "    return nn.Sequential(*convolutions, *head)\n"
    )
    flags = ("--data", DATA, "--batch-size", "16", "--epochs", "2", "--compression", "2", "--no-report")
    outcome = call("train", "--model", "net_of_a_cli_test:build", *flags, "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "compression asked 2x, reached 2." in outcome.out
    refused = call("evaluate", "run")
    assert refused.code == 2
    assert "name it yourself with --model net_of_a_cli_test:build" in refused.err
    assert call("evaluate", "run", "--model", "net_of_a_cli_test:build").code == 0


# ---------------------------------------------------------------- resume


SIGTERM = pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)


@pytest.mark.long
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_does(place: Path, signum: int, code: int) -> None:
    with spawn("train", *TINY, "--compression", "4", "--epochs", "30", "--out", "run", cwd=place) as process:
        metrics = place / "run" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signum)
        out, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "continue with 'clicktrain resume run'" in err
    assert len(err.splitlines()) == 1
    assert "epoch  1/30" in out
    done = len(metrics.read_text().splitlines())
    assert done < 30
    assert call("evaluate", "run").err == (
        "clicktrain: error: the run in run is not finished: continue it with 'clicktrain resume run'\n"
    )
    outcome = call("resume", "run", "--no-report")
    assert outcome.code == 0, outcome.err
    assert "compression asked 4x, reached 4." in outcome.out
    assert outcome.out.count("epoch ") >= 30 - done
    assert len(metrics.read_text().splitlines()) == 30
    again = call("resume", "run", "--no-report")
    assert again.code == 0
    assert "finished already" in again.out


# ---------------------------------------------------------------- a finished run


def test_evaluate_agrees_with_the_run(finished: tuple[Path, Outcome]) -> None:
    summary = json.loads((finished[0] / "summary.json").read_text())
    found = json.loads(call("evaluate", finished[0], "--json").out)
    assert found["val_accuracy"] == pytest.approx(summary["val_accuracy"])
    assert found["images"] == 33
    small = json.loads(call("evaluate", finished[0], "--json", "--batch-size", "7").out)
    assert small["val_accuracy"] == found["val_accuracy"]
    assert small["val_loss"] == pytest.approx(found["val_loss"], rel=1e-4)
    assert f"accuracy {summary['val_accuracy']:.2f}%" in call("evaluate", finished[0]).out


def test_evaluate_on_other_data(finished: tuple[Path, Outcome]) -> None:
    other = DATA.replace("val=33", "val=60")
    found = json.loads(call("evaluate", finished[0], "--data", other, "--json").out)
    assert found["images"] == 60
    assert found["data"] == other
    outcome = call("evaluate", finished[0], "--data", "digits")
    assert outcome.code == 2
    assert "digits has 10 classes (0, 1, 2, 3, ...): the network was trained on 3" in outcome.err
    outcome = call("evaluate", finished[0], "--data", DATA.replace("channels=1", "channels=3"))
    assert outcome.code == 2
    assert "are 3x8x8 (channels, height, width): the network takes 1x8x8" in outcome.err


def test_inspect_tells_the_truth_about_every_layer(finished: tuple[Path, Outcome]) -> None:
    folder = finished[0]
    weights = load_file(folder / "model.safetensors")
    found = json.loads(call("inspect", folder, "--json").out)
    assert found["compression_asked"] == 4
    table = call("inspect", folder).out
    for row in found["layers"]:
        weight = weights[f"{row['name']}.weight"]
        assert row["shape"] == list(weight.shape)
        assert row["density"] == pytest.approx(float((weight != 0).float().mean()))
        assert row["name"] in table
        if weight.ndim == 4 and row["density"] < 1:
            kept = (weight != 0).flatten(2).any(dim=2)
            assert row["kernels_kept"] == int(kept.sum()) == sum(row["pattern_counts"].values())
            assert row["kernels"] == kept.numel()
            assert row["forward_flops"] < row["forward_flops_dense"]
            f, c = (int(i) for i in kept.nonzero()[0])
            bits = sum(1 << i for i, w in enumerate(weight[f, c].flatten().tolist()) if w)
            assert row["pattern_counts"][str(bits)] >= 1
    assert "compression asked 4x, reached" in table
    assert "patterns of the 3x3 kernels" in table


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("format", ["safetensors", "torch", "onnx"])
def test_export(finished: tuple[Path, Outcome], format: str, place: Path) -> None:
    if format == "onnx" and not all(importlib.util.find_spec(name) for name in FILE_FORMATS["onnx"].needs):
        pytest.skip("pip install onnx onnxscript onnxruntime")
    outcome = call("export", finished[0], "--format", format, "-o", "net.file")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("net.file: ")
    first, second = outcome.out.splitlines()
    assert "of its weights are zeros, which this format stores like others (the run's packed" in first
    assert "on 33 validation images: largest difference to the network" in second
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert second.endswith(f"%, the network's {summary['val_accuracy']:.2f}%")
    assert [path.name for path in place.iterdir()] == ["net.file"]


@pytest.mark.long
def test_export_to_c(copy_of_finished: Callable[[], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -O0")  # compiles fast
    folder = copy_of_finished()
    outcome = call("export", folder, "--format", "c", "--images", "20")
    assert outcome.code == 0, outcome.err
    first, second = outcome.out.splitlines()
    assert first.startswith(f"{folder / 'export-c'}: weights 0.")
    assert "on 20 validation images: largest difference to the network" in second
    assert "accuracy" in second
    config = (
        (folder / "config.yaml")
        .read_text()
        .replace("synthetic:classes=3,size=8", "synthetic:classes=3,size=9")
    )
    (folder / "config.yaml").write_text(config)
    outcome = call("export", folder, "--format", "c", "-o", folder / "other", "--name", "tiny")
    assert "random images (the images of synthetic:classes=3,size=9" in outcome.out, outcome.err
    assert (folder / "other" / "tiny.c").exists()


def test_export_spares_the_runs_own_files(
    copy_of_finished: Callable[[], Path],
) -> None:
    folder = copy_of_finished()
    assert call("export", folder, "--format", "safetensors").code == 0
    with safe_open(folder / "export.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["clicktrain"])
    assert facts["model"] == "resnet20"
    assert facts["image_shape"] == [1, 8, 8]
    assert len(facts["classes"]) == 3
    before = (folder / "model.safetensors").read_bytes()
    outcome = call("export", folder, "--format", "safetensors", "-o", folder / "model.safetensors")
    assert outcome.code == 2
    assert "belongs to the run itself: give another -o" in outcome.err
    assert (folder / "model.safetensors").read_bytes() == before
    assert "--format is missing" in call("export", folder).err
    assert "holds something else than an export" in call("export", folder, "--format", "c", "-o", folder).err
    assert "--name belongs to --format c" in call("export", folder, "--format", "torch", "--name", "x").err
    assert "images is 0" in call("export", folder, "--format", "c", "--images", "0").err


def test_report_compares_runs(
    finished: tuple[Path, Outcome], copy_of_finished: Callable[[], Path], place: Path
) -> None:
    outcome = call("report", finished[0], copy_of_finished(), "-o", "both.html")
    assert outcome.code == 0, outcome.err
    assert "both.html" in outcome.out
    assert "<html" in (place / "both.html").read_text(encoding="utf-8").lower()


# ---------------------------------------------------------------- robustness, Campfire


def test_evaluate_under_attack(copy_of_finished: Callable[[], Path]) -> None:
    folder = copy_of_finished()
    found = json.loads(call("evaluate", folder, "--attack", "fgsm", "--epsilon", "0", "0.3", "--json").out)
    assert found["attack"] == "fgsm"
    assert [row["epsilon"] for row in found["robustness"]] == [0.0, 0.3]
    clean, attacked = (row["accuracy"] for row in found["robustness"])
    assert clean == pytest.approx(found["val_accuracy"])
    assert attacked <= clean
    outcome = call("evaluate", folder, "--attack", "pgd", "--steps", "2")
    assert outcome.code == 0
    assert outcome.out.count("under pgd, epsilon") == 6  # those of the paper's table
    saved = json.loads((folder / "robustness.json").read_text())["attacks"]
    assert saved["fgsm"] == found["robustness"]
    assert [row["epsilon"] for row in saved["pgd"]] == [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    assert call("evaluate", folder, "--data", DATA.replace("val=33", "val=60"), "--attack", "fgsm").code == 0
    assert json.loads((folder / "robustness.json").read_text())["attacks"] == saved  # other images: not kept
    assert call("report", folder, "-o", folder / "report.html").code == 0
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("Accuracy under FGSM, %") == 1
    assert page.count("Accuracy under PGD, %") == 1
    (folder / "robustness.json").write_text("[]")
    outcome = call("report", folder, "-o", folder / "report.html")
    assert "robustness.json is damaged: make it again with 'clicktrain evaluate'" in outcome.err
    for flags, sentence in (
        (("--epsilon", "0.1"), "--epsilon belongs to an attack: add --attack fgsm or --attack pgd"),
        (("--attack", "fgsm", "--steps", "3"), "--steps belongs to --attack pgd: fgsm takes one step"),
        (("--attack", "fgsm", "--epsilon", "8"), "epsilon is 8: must be between 0 and 1, as pixels are"),
        (("--attack", "cw"), "attack is 'cw': use one of fgsm, pgd"),
    ):
        outcome = call("evaluate", folder, *flags)
        assert outcome.code == 2
        assert sentence in outcome.err


def test_campfire_on_the_command_line(place: Path) -> None:
    words = "--method campfire --granularity ck --sparsity 0.6 --epochs 3 --era 1 2 --operators reference"
    flags = words.split()
    outcome = call("train", *TINY, *flags, "--out", "run")
    assert outcome.code == 0, outcome.err
    assert (place / "run" / "report.html").is_file()
    rows = {row["name"]: row for row in json.loads(call("inspect", "run", "--json").out)["layers"]}
    assert rows["fc"]["density"] < 0.5
    assert rows["fc"]["pattern_counts"] == {}
    assert "layer1.0.conv1" in call("inspect", "run").out
    assert call("train", *TINY, *flags, "--era", "2", "9", "--out", "late").err.startswith(
        "clicktrain: error: the era ends at epoch 9 but the run has 3"
    )
    again = call("train", "--config", place / "run" / "config.yaml", "--dry-run")
    assert "target sparsity 0.600" in again.out
