from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_runs import call

from clicktrain.commands.train import merge, read_recipe
from clicktrain.methods import METHODS
from clicktrain.runs.new_folder import remove_new
from clicktrain.train import config_to_dict, from_dict

RECIPE: dict[str, Any] = {"method": "clicktrain", "epochs": 30, "compression": 6.0, "patterns": 8}


def test_flags_win() -> None:
    values, ignored = merge(RECIPE, {"epochs": 5, "compression": 3.0})
    assert values == {**RECIPE, "epochs": 5, "compression": 3.0}
    assert ignored == []


def test_another_method_takes_what_it_has() -> None:
    values, ignored = merge(RECIPE, {"method": "dense"})
    assert values == {"method": "dense", "epochs": 30}
    assert ignored == ["compression", "patterns"]
    saved = config_to_dict(*from_dict(RECIPE))
    values, ignored = merge(saved, {"method": "dense"})
    from_dict(values)
    assert "compression" in ignored
    assert "loss_slope" not in ignored  # at its default: nobody asked for it
    assert merge({"epochs": 30}, {"method": "dense"}) == ({"epochs": 30, "method": "dense"}, [])


def test_a_recipe_for_the_default_method_need_not_name_it() -> None:
    values, ignored = merge({"compression": 6.0}, {"method": "dense"})
    assert values == {"method": "dense"}
    assert ignored == ["compression"]


def test_another_preset_replaces_what_the_old_one_implied() -> None:
    cls: Any = METHODS["clicktrain"]
    saved = config_to_dict(*from_dict({**RECIPE, "preset": "default", "patterns": 5}))
    values, _ = merge(saved, {"preset": "paper"})
    _, method = from_dict(values)
    assert method == cls(preset="paper", compression=6.0, patterns=5)
    assert method != cls(preset="default", compression=6.0, patterns=5)
    values, _ = merge(saved, {"preset": "default", "epochs": 7})
    assert values == {**saved, "epochs": 7}
    values, _ = merge({**RECIPE, "preset": "paper"}, {"method": "dense"})
    from_dict(values)


def test_read_recipe_gives_only_what_stands_there(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# nothing but this\nepochs: 3\nlearning_rate: 5e-2\n")
    assert read_recipe(str(path)) == {"epochs": 3, "learning_rate": 0.05}
    path.write_text("")
    assert read_recipe(str(path)) == {}


def test_the_method_of_a_recipe_decides_which_flags_there_are(place: Path) -> None:
    (place / "recipe.yaml").write_text("method: dense\n")
    outcome = call("train", "--config", "recipe.yaml", "--loss-margin", "0.2")
    assert outcome.code == 2
    assert "--loss-margin is a setting of method clicktrain, clicktrain-gradual, not of dense" in outcome.err
    text = " ".join(call("train", "--config=recipe.yaml", "--help").out.split())
    assert "settings of method dense" in text


@pytest.mark.parametrize("there", ["", "a", "a/b"])
def test_remove_new_takes_away_what_was_made_and_no_more(there: str, tmp_path: Path) -> None:
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    if there != "a/b":
        (tmp_path / there / "mine.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    path = tmp_path / "a" / "b"
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.yaml").write_text("x")
    remove_new(path, tmp_path / there)
    assert sorted(tmp_path.rglob("*")) == before
    remove_new(path, tmp_path / there)
    assert sorted(tmp_path.rglob("*")) == before
