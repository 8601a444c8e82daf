"""Loading runs no code that a file names: only what the user names in the call at hand."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import DENSE, run
from tiny_networks import tiny

import clicktrain
from clicktrain.cli import main
from clicktrain.errors import UserError
from clicktrain.train import RunFolder, load_config, load_run

NAME = "tiny_networks:tiny"
ZOO = {"model": "resnet8", "width": 0.1, "method": "dense", "epochs": 1, "threads": 1}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "run"
    run(path, {**DENSE, "epochs": 1})
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zoo") / "run"
    run(path, ZOO)
    return path


@pytest.fixture
def foreign(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's folder as somebody else sends it: modules beside it, the current folder."""
    shutil.copytree(own, tmp_path / "got")
    monkeypatch.chdir(tmp_path / "got")
    evil = "open('code_was_run', 'w').close()\n"
    for name in ("tiny_networks", "yaml", "rich", "safetensors", "sidecar"):
        (tmp_path / "got" / f"{name}.py").write_text(evil)
    return tmp_path / "got"


@pytest.mark.parametrize(
    "line",
    ["inspect .", "evaluate .", "export . --format safetensors", "bench runs --runs .", "resume ."],
)
def test_a_folder_that_names_code_is_refused_with_what_to_type(
    foreign: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if line.startswith("resume"):
        (foreign / "summary.json").unlink()
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert f"names the model '{NAME}', whose code would run: if you trust it" in err
    assert f"--model {NAME}" in err
    assert not (foreign / "code_was_run").exists()


def test_no_module_of_the_current_folder_runs(foreign: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clicktrain", "inspect", "."], cwd=foreign, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "whose code would run" in done.stderr
    assert not (foreign / "code_was_run").exists()
    assert not list(foreign.glob("__pycache__"))


def test_a_config_file_counts_with_a_model_beside_it_only(
    tmp_path: Path, own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(own / "config.yaml")
    line = ["train", "--config", config, "--epochs", "1", "--out", str(tmp_path / "new"), "--no-report"]
    assert main(line) == 2
    assert f"--model {NAME}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main([*line, "--model", NAME]) == 0
    other = ["--out", str(tmp_path / "other"), "--model", "resnet8", "--width", "0.1"]
    assert main([*line[:5], "--no-report", *other]) == 0
    with pytest.raises(UserError, match="whose code would run"):
        load_config(config)
    assert load_config(config, NAME)[0].model == NAME


@pytest.mark.parametrize("command", [("inspect",), ("evaluate",), ("export", "--format", "safetensors")])
def test_commands_read_a_run_of_ones_own_network_when_it_is_named(
    own: Path, tmp_path: Path, command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("-o", str(tmp_path / "x")) if command[0] == "export" else ()
    assert main([command[0], str(own), *command[1:], *more, "--model", NAME]) == 0, capsys.readouterr().err


def test_load(own: Path, zoo: Path) -> None:
    x = torch.zeros(2, 1, 8, 8)
    assert clicktrain.load(zoo)(x).shape == (2, 10)
    by_name, by_factory = clicktrain.load(own, model=NAME), clicktrain.load(str(own), model=tiny)
    assert torch.equal(by_name(x), by_factory(x))
    assert not by_name.training
    assert clicktrain.load(zoo, model="resnet8")(x).shape == (2, 10)
    assert load_run(own, tiny).dense_model()(x).shape == (2, 10)


def wrong_number(num_classes: int) -> torch.nn.Module:
    return torch.nn.Linear(3, num_classes)


def failing(**options: Any) -> torch.nn.Module:
    raise LookupError("mine")


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (None, "whose code would run"),
        (wrong_number, r"model.safetensors does not fit model"),
        (failing, "building model 'failing' failed with LookupError: mine"),
        (torch.nn.Identity(), "is a network that is built already: .*load_pruned"),
        (3, "is of type int"),
        ("resnet8", "does not fit model"),
        ("no_such_module:build", "there is no module 'no_such_module'"),
    ],
)
def test_load_refuses(own: Path, model: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        clicktrain.load(own, model=model)
    assert "\n" not in str(caught.value)


def test_a_run_of_the_zoo_takes_no_other_model(zoo: Path) -> None:
    for model in (NAME, tiny, "resnet20"):
        with pytest.raises(UserError, match="is of model resnet8, which needs no model: leave it out"):
            clicktrain.load(zoo, model=model)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda facts: {**facts, "num_classes": 10**9}, "num_classes 1000000000"),
        (lambda facts: {**facts, "num_classes": True}, "num_classes True"),
        (lambda facts: {**facts, "image_shape": [1, 2**40, 8]}, "image_shape"),
        (lambda facts: {**facts, "image_shape": [3, 8, 8]}, "its image_shape is of 3, its in_channels is 1"),
        (lambda facts: {**facts, "classes": ["a"]}, "its classes is of 1, its num_classes is 10"),
        (
            lambda facts: {**facts, "width": 1000},
            "would take about .* and this machine has .*: make it smaller",
        ),
        (lambda facts: {**facts, "width": float("nan")}, "width nan"),
        (lambda facts: {**facts, "std": [0.0]}, "std"),
        (lambda facts: {**facts, "value_range": [1]}, "value_range"),
        (lambda facts: [], "not a mapping"),
        (lambda facts: None, "not a mapping"),
        (lambda facts: {}, "model None"),
    ],
)
def test_what_a_file_says_of_its_network_is_checked_first(
    zoo: Path, tmp_path: Path, change: Callable[[Any], Any], problem: str
) -> None:
    import json

    from clicktrain.formats.tree import load_tree, read_metadata, save_tree

    folder = RunFolder(shutil.copytree(zoo, tmp_path / "run"))
    metadata = read_metadata(folder.model)
    metadata["clicktrain"] = json.dumps(change(json.loads(metadata["clicktrain"])))
    save_tree(folder.model, load_tree(folder.model), metadata)
    with pytest.raises(UserError, match=problem):
        clicktrain.load(folder.path)
