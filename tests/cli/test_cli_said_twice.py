"""Two settings that say the same thing, given at once."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import pytest
import yaml
from cli_runs import call

from clicktrain.commands.train import settings_of
from clicktrain.errors import UserError
from clicktrain.methods import METHODS
from clicktrain.settings import field_names, to_plain
from clicktrain.train import RunConfig, config_to_dict, from_dict, resolve_method

VALUES = {
    "sparsity": "0.8", "compression": "8", "latency_target": "0.5", "latency_target_ms": "3",
    "prune_ratio": "0.3", "target_flops": "0.6", "target_parameters": "0.6", "penalty_ratio": "0.25",
    "coefficient": "0.001", "hard_prune": "0.5", "regularize_length": "0.2", "val_fraction": "0.2",
    "holdout": "100",
}  # fmt: skip
"""Some of them a setting's default: that it was given is what counts."""

PAIRS = [
    (method, *pair)
    for method, cls in METHODS.items()
    for group in (*cls.alternatives, *(RunConfig.alternatives if method == "dense" else ()))
    for pair in itertools.combinations(group, 2)
]


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@pytest.mark.parametrize(("method", "first", "second"), PAIRS)
def test_flags_that_say_the_same_thing_are_one_sentence(method: str, first: str, second: str) -> None:
    assert {first, second} <= {*field_names(METHODS[method]), *field_names(RunConfig)}
    outcome = call("train", "--method", method, flag(second), VALUES[second], flag(first), VALUES[first])
    assert outcome.code == 2
    assert f"{flag(first)} " in outcome.err
    assert f"{flag(second)} " in outcome.err
    assert outcome.err.endswith("are both given, and say the same thing: give one\n")


@pytest.mark.parametrize(("method", "first", "second"), PAIRS)
def test_arguments_that_say_the_same_thing_are_one_sentence(method: str, first: str, second: str) -> None:
    cls = METHODS[method] if first in field_names(METHODS[method]) else RunConfig
    given = {name: float(VALUES[name]) for name in (first, second)}
    with pytest.raises(UserError, match=f"{second} .* are both given, and say the same thing: give one"):
        cls(**given)
    given[second] = None
    assert getattr(cls(**given), first) == given[first]


def test_copies_and_what_files_spell_out_may_hold_both() -> None:
    method = METHODS["rigl"](compression=8.0)
    assert dataclasses.replace(method, patterns=12) == copy.deepcopy(method) == method
    assert resolve_method("rigl", **to_plain(method)) == method
    older = {name: value for name, value in to_plain(method).items() if name != "drop_rule"}
    assert resolve_method("rigl", **older) == method  # saved by a version with fewer settings


def test_a_length_in_epochs_and_in_minutes() -> None:
    outcome = call("train", "--epochs", "60", "--time-budget", "20min")
    assert outcome.code == 2
    assert "--epochs 60 and --time-budget 20min both say how long the run is: give one" in outcome.err
    config = settings_of(["--epochs", "60", "--time-budget", "0.5"])[0]  # half the time of 60 dense epochs
    assert (config.epochs, config.time_budget) == (60, 0.5)


def test_a_recipe_that_says_it_twice(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: rigl\nsparsity: 0.8\ncompression: 8\n")
    outcome = call("train", "--config", recipe)
    assert outcome.code == 2
    assert f"{recipe}: sparsity 0.8 and compression 8 are both given" in outcome.err
    recipe.write_text("method: rigl\nsparsity: 0.8\ncompression: null\n")
    assert settings_of(["--config", str(recipe)])[1] == METHODS["rigl"](sparsity=0.8)


def test_a_flag_replaces_what_a_recipe_says_in_other_words(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: rigl\nsparsity: 0.9\nholdout: 50\n")
    config, method, _, _ = settings_of(
        ["--config", str(recipe), "--compression", "8", "--val-fraction", "0.1"]
    )
    assert method == METHODS["rigl"](compression=8.0)
    assert (config.holdout, config.val_fraction) == (None, 0.1)


def test_the_saved_settings_of_a_run_spell_out_both(finished: tuple[Path, object], tmp_path: Path) -> None:
    values = {**config_to_dict(*from_dict({"method": "rigl", "compression": 8.0, "epochs": 3}))}
    assert values["sparsity"] == 0.8
    first_line = (finished[0] / "config.yaml").read_text().splitlines()[0]
    saved = tmp_path / "config.yaml"
    saved.write_text(f"{first_line}\n{yaml.safe_dump(values)}")
    assert settings_of(["--config", str(saved)])[1] == METHODS["rigl"](compression=8.0)
