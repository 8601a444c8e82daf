"""Settings: from YAML and back, and one clear sentence for each mistake."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain, Dense
from clicktrain.train import RunConfig, config_to_dict, from_dict, load_config, resolve_method
from clicktrain.train import config as config_module


def write(path: Path, text: str) -> Path:
    file = path / "recipe.yaml"
    file.write_text(text)
    return file


def test_every_field_says_what_it_is() -> None:
    body = next(
        node
        for node in ast.parse(inspect.getsource(config_module)).body
        if isinstance(node, ast.ClassDef) and node.name == "RunConfig"
    ).body
    described = {
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }
    assert described == {field.name for field in dataclasses.fields(RunConfig)}


@pytest.mark.parametrize(
    ("run", "method"),
    [
        (RunConfig(), ClickTrain()),
        (RunConfig(method="dense", milestones=(0.3, 0.6), threads=2), Dense()),
        (RunConfig(width=0.5), ClickTrain(compression=10, exclude=("a", "b"), layers={"c": 2.0})),
    ],
)
def test_settings_survive_a_file(tmp_path: Path, run: RunConfig, method: Any) -> None:
    file = write(tmp_path, yaml.safe_dump(config_to_dict(run, method)))
    assert load_config(file) == (run, method)


def test_a_recipe_gives_what_it_says_and_defaults_for_the_rest(tmp_path: Path) -> None:
    file = write(tmp_path, "weight_decay: 1e-4\nlearning_rate: 1\nmilestones: [0.4]\nmethod: dense\n")
    run, method = load_config(file)
    assert run == RunConfig(weight_decay=1e-4, learning_rate=1.0, milestones=(0.4,), method="dense")
    assert isinstance(run.learning_rate, float)
    assert method == Dense()


def test_an_empty_recipe_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing\n")) == (RunConfig(), ClickTrain())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"epocs": 3}, "unknown setting 'epocs': did you mean 'epochs'?"),
        ({"compresion": 3}, "unknown setting 'compresion': did you mean 'compression'?"),
        ({"xyzzy": 3}, "unknown setting 'xyzzy': 'clicktrain train --help' lists the settings"),
        ({"method": "magic"}, "method is 'magic': use one of dense, clicktrain"),
        ({"method": "dense", "compression": 4}, "unknown setting 'compression'"),
        ({"epochs": 0}, "epochs is 0: must be at least 1"),
        ({"epochs": "many"}, "epochs is 'many': a value of type int is needed"),
        ({"epochs": 2.5}, "epochs is 2.5: a value of type int is needed"),
        ({"epochs": True}, "epochs is True: a value of type int is needed"),
        ({"nesterov": "yes please"}, "nesterov is 'yes please': a value of type bool is needed"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast': a number is needed"),
        ({"learning_rate": 0}, "learning_rate is 0.0: must be above 0"),
        ({"learning_rate": "nan"}, "learning_rate is 'nan': a number is needed"),
        ({"label_smoothing": 1}, "label_smoothing is 1.0: must be at least 0 and below 1"),
        ({"precision": "fp8"}, "precision is 'fp8': use one of fp32, bf16, fp16"),
        ({"warmup_epochs": 60}, "warmup_epochs is 60.0: must be less than epochs (60)"),
        ({"milestones": [0.7, 0.5]}, "milestones is [0.7, 0.5]: rising shares"),
        ({"milestones": 0.5}, "milestones is 0.5: a list is needed"),
        ({"momentum": 0}, "nesterov is true but momentum is 0"),
        ({"layers": 3}, "layers is 3: a mapping is needed"),
        ({"compression": "big"}, "compression is 'big': a number is needed"),
        ({"image_size": 0}, "image_size is 0: must be at least 1"),
        ({"val_fraction": 0}, "val_fraction is 0.0: must be above 0"),
        ({3: 4}, "settings need names, 3 is none"),
    ],
)
def test_mistakes(values: dict[Any, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        from_dict(values)
    assert str(error.value).startswith(sentence)


def test_a_config_made_in_python_is_checked_too() -> None:
    with pytest.raises(UserError, match="schedule is 'straight': use one of cosine, linear, triangular"):
        RunConfig(schedule="straight")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown setting 'patern'"):
        resolve_method("clicktrain", patern=3)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs: [1", "is not valid YAML"),
        ("- 1\n- 2\n", "holds no settings"),
        ("epochs: 0\n", "recipe.yaml: epochs is 0"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_config(write(tmp_path, text))
    with pytest.raises(UserError, match="there is no file"):
        load_config(tmp_path / "other.yaml")
