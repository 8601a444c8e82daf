"""The JSON schema of recipes agrees with what the command line takes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import call

from clicktrain.commands.config_schema import config_schema
from clicktrain.errors import UserError
from clicktrain.files import read_yaml
from clicktrain.methods import METHODS
from clicktrain.train import RunConfig, config_to_dict, from_dict

KINDS = {"integer": int, "number": (int, float), "string": str, "boolean": bool, "array": list,
         "object": dict, "null": type(None)}  # fmt: skip


USED = {"$schema", "title", "description", "default", "definitions", "then", "enum", "const", "minimum",
        "maximum", "pattern", "anyOf", "not", "required", "properties", "items", "additionalProperties",
        "minItems", "maxItems"}  # fmt: skip


def wrong(value: Any, schema: Any, root: Any, at: str = "") -> Iterator[str]:
    """What of draft 07 the schema uses, word by word from its specification."""
    for key, want in schema.items():
        if key == "$ref":
            yield from wrong(value, root["definitions"][want.rpartition("/")[2]], root, at)
        elif key == "type":
            fits = isinstance(value, KINDS[want]) and not (want != "boolean" and isinstance(value, bool))
            if not fits and not (want == "integer" and isinstance(value, float) and value.is_integer()):
                yield f"{at} is not of type {want}"
        elif key == "enum" and not any(value == one and type(value) is type(one) for one in want):
            yield f"{at} is none of {want}"
        elif key == "const" and value != want:
            yield f"{at} is not {want}"
        elif key == "minimum" and isinstance(value, (int, float)) and value < want:
            yield f"{at} is below {want}"
        elif key == "maximum" and isinstance(value, (int, float)) and value > want:
            yield f"{at} is above {want}"
        elif key == "pattern" and isinstance(value, str) and not re.search(want, value):
            yield f"{at} does not fit {want}"
        elif key == "anyOf" and all([*wrong(value, one, root, at)] for one in want):
            yield f"{at} fits none of {want}"
        elif key == "allOf":
            for one in want:
                yield from wrong(value, one, root, at)
        elif key == "not" and not [*wrong(value, want, root, at)]:
            yield f"{at} fits {want}"
        elif key == "if":
            if not [*wrong(value, want, root, at)]:
                yield from wrong(value, schema["then"], root, at)
        elif key == "required" and isinstance(value, dict):
            yield from (f"{at}.{name} is missing" for name in want if name not in value)
        elif key == "properties" and isinstance(value, dict):
            for name in want.keys() & value.keys():
                yield from wrong(value[name], want[name], root, f"{at}.{name}")
        elif key == "additionalProperties" and isinstance(value, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                if want:
                    yield from wrong(value[name], want, root, f"{at}.{name}")
                else:
                    yield f"{at}.{name} is unknown"
        elif key == "items" and isinstance(value, list):
            for number, item in enumerate(value):
                one = want if isinstance(want, dict) else want[number] if number < len(want) else {}
                yield from wrong(item, one, root, f"{at}[{number}]")
        elif key == "minItems" and isinstance(value, list) and len(value) < want:
            yield f"{at} is too short"
        elif key == "maxItems" and isinstance(value, list) and len(value) > want:
            yield f"{at} is too long"
        else:
            assert key in USED, key


SCHEMA = json.loads(json.dumps(config_schema()))


def mistakes(recipe: Any) -> list[str]:
    return list(wrong(recipe, SCHEMA, SCHEMA))


def recipes() -> list[Path]:
    folder = Path(__file__).resolve().parents[2] / "recipes"
    return [path for path in sorted(folder.glob("*.yaml")) if not path.name.startswith("frontier-")]


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.stem)
def test_the_recipes_fit(path: Path) -> None:
    assert mistakes(read_yaml(path)) == []


@pytest.mark.parametrize("name", METHODS)
def test_the_settings_of_every_method_fit(name: str) -> None:
    values = config_to_dict(*from_dict({"method": name}))
    for group in METHODS[name].alternatives + RunConfig.alternatives:
        for other in group[1:]:
            values.pop(other, None)
    assert mistakes(yaml.safe_load(yaml.safe_dump(values))) == []


@pytest.mark.parametrize(
    "recipe",
    [
        {"epochs": 0},
        {"epochs": "many"},
        {"epoch": 3},
        {"method": "rig"},
        {"method": "rigl", "policy": "epi"},
        {"optimizer": "sgdd"},
        {"nesterov": "yes please"},
        {"method": "rigl", "sparsity": 0.8, "compression": 8},
        {"method": "campfire", "era": [1, 2, 3]},
        {"milestones": [0.5, "half"]},
        {"criterion": "mine"},
        {"layers": {"layer1": "much"}},
    ],
    ids=str,
)
def test_what_the_schema_refuses_is_refused_by_the_command(recipe: dict[str, Any], tmp_path: Path) -> None:
    assert mistakes(recipe)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert call("train", "--config", path, "--dry-run").code == 2


@pytest.mark.parametrize(
    "recipe",
    [
        {"learning_rate": "5e-2"},
        {"criterion": "my_module:score", "compression": 4},
        {"time_budget": "20min"},
        {"time_budget": 1},
        {"second_cycle": "norm"},
        {"method": "rigl", "sparsity": 0.8, "compression": None},
        {"layers": {"layer1": 4}},
    ],
    ids=str,
)
def test_what_is_valid_fits(recipe: dict[str, Any]) -> None:
    assert mistakes(recipe) == []
    try:
        from_dict(recipe)
    except UserError as error:
        pytest.fail(str(error))


def test_the_command_writes_it(place: Path) -> None:
    assert json.loads(call("schema").out) == SCHEMA
    assert call("schema", "--method", "pat", "-o", "pat.json").out == "pat.json\n"
    one = json.loads((place / "pat.json").read_text())
    assert one["definitions"]["run.method"]["enum"] == ["pat"]
    assert list(wrong({"method": "pat", "policy": "epi"}, one, one)) == []
    assert list(wrong({"method": "rigl"}, one, one))
    assert "method is 'x': use one of" in call("schema", "--method", "x").err
    assert one["definitions"]["run.epochs"]["description"] == "Passes over the training images."
