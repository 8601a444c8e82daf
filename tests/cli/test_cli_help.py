from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
from cli_runs import call

from clicktrain.cli import COMMANDS
from clicktrain.commands.arguments import Command, HelpPrinted, Option
from clicktrain.commands.catalog import commands_of, every_command
from clicktrain.commands.models import describe
from clicktrain.commands.shells import completion_script
from clicktrain.commands.shells.table import all_places
from clicktrain.errors import UserError
from clicktrain.methods import METHODS
from clicktrain.models import registry
from clicktrain.settings import field_names


def parsed(line: str) -> None:
    """What the command line would make of an example, without carrying it out."""
    program, name, *argv = shlex.split(line.partition(" > ")[0], comments=True)
    assert program == "clicktrain"
    if name == "train":
        method = argv[argv.index("--method") + 1] if "--method" in argv else "clicktrain"
        candidates = [one for one in commands_of("train") if f"settings of method {method}" in one.groups]
    elif name == "bench":
        candidates = [one for one in commands_of("bench") if one.name == f"bench {argv[0]}"]
        argv = argv[1:]
    else:
        candidates = list(commands_of(name))
    (command,) = candidates
    try:
        command.parse(argv)
    except HelpPrinted:
        assert "--help" in argv


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_examples_that_its_flags_fit(name: str) -> None:
    for command in commands_of(name):
        assert command.examples, command.name
        assert "\nexamples:\n  clicktrain " in command.help(every=False)
        for line in command.examples:
            parsed(line)


@pytest.mark.parametrize("name", METHODS)
def test_the_help_of_a_method_has_its_own_example(name: str) -> None:
    text = call("train", "--method", name, "-h").out
    example = text.partition("examples:\n")[2].splitlines()[0].strip()
    assert f"--method {name} " in example
    parsed(example)


def test_a_recipe_in_an_example_is_there(repository: Path) -> None:
    lines = [line for several in every_command().values() for one in several for line in one.examples]
    recipes = {word for line in lines for word in shlex.split(line) if word.startswith("recipes/")}
    assert recipes
    assert all((repository / recipe).is_file() for recipe in recipes)


def test_headings_of_train() -> None:
    text = call("train", "--help").out
    heads = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads == ["run:", "data:", "model:", "recipe:", "method:", "settings of method clicktrain:",
                     "output:", "examples:"]  # fmt: skip


def test_a_flag_of_several_values_is_given_once() -> None:
    words = Option("log", tuple[Literal["csv", "wandb"], ...], "")
    command = Command("demo", "", {"": (words, Option("rate", float, ""))})
    assert command.parse(["--log", "wandb", "csv"]) == {"log": ("wandb", "csv")}
    assert command.parse(["--rate", "1", "--rate", "2"]) == {"rate": 2.0}  # the last one wins, as in a shell
    with pytest.raises(UserError, match=r"--log is given twice: give all its values after one, --log {csv,"):
        command.parse(["--log", "csv", "--log", "wandb"])


# ---- methods and models -----------------------------------------------------------------------------


def test_methods_are_listed_and_explained() -> None:
    text = call("methods").out
    assert all(f"\n{name} " in text for name in METHODS)
    found = {row["name"]: row for row in json.loads(call("methods", "--json").out)}
    assert list(found) == list(METHODS)
    for name, row in found.items():
        assert [one["name"] for one in row["settings"]] == list(field_names(METHODS[name]))
    assert found["admm-patterns"]["needs_trained_weights"]
    assert found["rigl"]["alternatives"] == [["sparsity", "compression"]]
    policy = next(one for one in found["pat"]["settings"] if one["name"] == "policy")
    assert policy["choices"] == ["epi", "loss_slope", "epoch", "random", "init"]
    assert json.loads(call("methods", "pat", "--json").out) == found["pat"]
    assert "--prune-epoch N" in call("methods", "pat").out
    assert "method is 'rig': use one of dense, " in call("methods", "rig").err


def test_models_have_the_sizes_of_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "list_models", lambda: ("resnet20", "cifarnet"))
    rows = json.loads(call("models", "--image-size", "32", "--json").out)
    assert [row["name"] for row in rows] == ["resnet20", "cifarnet"]
    assert rows[0]["parameters"] == 272_474
    assert rows[0]["convolutions"] == 21
    assert rows[0]["forward_flops"] == pytest.approx(2 * 40.8e6, rel=0.02)  # He et al.: 41M multiply-adds
    assert [row["reason"] for row in describe(4, 10, 0.25)] == [None, "needs images of at least 9 pixels"]
    assert "image_size is 0: 1 to 8192 are possible" in call("models", "--image-size", "0").err


# ---- completion -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash on this machine")
    path = tmp_path_factory.mktemp("completion") / "clicktrain.bash"
    path.write_text(completion_script("bash"))
    return path


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("clicktrain exp", ["export"]),
        ("clicktrain train --method adm", ["admm-patterns"]),
        ("clicktrain train --method pat --pol", ["--policy", "--policy-seed"]),
        ("clicktrain train --pol", []),
        ("clicktrain train --method = pat --policy = e", ["epi", "epoch"]),
        ("clicktrain train --stem ", ["auto", "cifar", "imagenet"]),
        ("clicktrain train --no-nest", ["--no-nesterov"]),
        ("clicktrain train --config rec", ["recipe.yaml"]),
        ("clicktrain evaluate ru", ["runs"]),
        ("clicktrain bench st", ["stages", "step"]),
        ("clicktrain bench step --comp", ["--compression", "--compile"]),
        (
            "clicktrain export runs --format ",
            ["safetensors", "onnx", "torch", "openvino", "executorch", "coreml", "c"],
        ),
        ("clicktrain completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_bash_completes(bash: Path, tmp_path: Path, line: str, offered: list[str]) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "recipe.yaml").touch()
    words = [*line.split(), ""] if line.endswith(" ") else line.split()
    code = (
        f"source {shlex.quote(str(bash))}; COMP_WORDS=({' '.join(map(shlex.quote, words))}); "
        f'COMP_CWORD={len(words) - 1}; _clicktrain; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr == ""
    assert done.stdout.split() == offered


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_the_script(shell: str, tmp_path: Path) -> None:
    text = completion_script(shell)  # type: ignore[arg-type]
    assert all(name in text for name in (*COMMANDS, *METHODS, "prune-epoch", "no-nesterov"))
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} on this machine")
    (tmp_path / "script").write_text(text)
    done = subprocess.run([shell, "-n", tmp_path / "script"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_completion_knows_every_flag() -> None:
    places = {place.name: place for place in all_places()}
    assert len(places) == len(all_places())
    for name, several in every_command().items():
        for command in several:
            words = f"train/{_method(command)}" if name == "train" else command.name.replace(" ", "/")
            at = places[words]
            assert [one.flag for one in at.flags] == [one.flag for one in command.options.values()]
    assert call("completion", "tcsh").err.endswith("shell is 'tcsh': use one of bash, zsh, fish\n")


def _method(command: Command) -> str:
    return next(head for head in command.groups if head.startswith("settings of method ")).split()[-1]
