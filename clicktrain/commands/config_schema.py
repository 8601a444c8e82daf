"""A JSON schema of the settings of a run, with which editors complete and check YAML recipes.

It is draft 07, which editors' YAML servers know. What depends on several settings at once, as an era that
ends after the run, is not in it: ``clicktrain train --config FILE --dry-run`` checks the rest.
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from clicktrain.commands.arguments import options_of
from clicktrain.methods import METHODS
from clicktrain.settings import choices_in
from clicktrain.train import RunConfig
from clicktrain.train.setting_checks import RANGES

Schema = dict[str, Any]
NUMBER_AS_TEXT = r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$"
"""YAML reads 5e-4 as text, which `clicktrain.settings.build` takes as the number."""
OWN = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
"""``package.module:function``."""


def config_schema(methods: Sequence[str] | None = None) -> Schema:
    """The schema of a recipe: settings of the run, and those of the method that it names.

    Args:
        methods: which to allow; all by default.

    Returns:
        Plain values. ``definitions`` holds every setting once; ``allOf`` has a branch for each method, which
        a recipe that names the method (for the default: or none) has to fit.
    """
    names = list(METHODS if methods is None else methods)
    run = _settings(RunConfig)
    run["method"] = {**run["method"], "enum": names}
    definitions = {f"run.{name}": schema for name, schema in run.items()}
    allowed = {name: {"$ref": f"#/definitions/run.{name}"} for name in run}
    branches = []
    for name in names:
        own = _settings(METHODS[name])
        definitions |= {f"{name}.{key}": schema for key, schema in own.items()}
        here = {**allowed, **{key: {"$ref": f"#/definitions/{name}.{key}"} for key in own}}
        chosen: Schema = {"properties": {"method": {"const": name}}}
        if name != RunConfig.method:  # which a recipe without one means
            chosen["required"] = ["method"]
        fits: Schema = {"properties": here, "additionalProperties": False}
        if clashes := _clashes(RunConfig.alternatives + METHODS[name].alternatives):
            fits["allOf"] = clashes
        branches.append({"if": chosen, "then": fits})
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "clicktrain recipe",
        "description": "Settings of a training run: clicktrain train --config FILE",
        "type": "object",
        "properties": allowed,
        "allOf": branches,
        "definitions": definitions,
    }


def _clashes(groups: Sequence[Sequence[str]]) -> list[Schema]:
    """That of settings which say the same thing no two are given."""
    given: Schema = {"not": {"type": "null"}}
    return [
        {"not": {"required": [*pair], "properties": dict.fromkeys(pair, given)}}
        for group in groups
        for pair in itertools.combinations(group, 2)
    ]


def _settings(cls: type) -> dict[str, Schema]:
    """The schema of each setting of a dataclass, with its documentation, default and range."""
    found = {}
    for option in options_of(cls):
        schema: Schema = {"description": option.help, **_of_type(option.hint)}
        if option.default is not None:
            schema["default"] = list(option.default) if isinstance(option.default, tuple) else option.default
        if cls is RunConfig and option.name in RANGES:
            _set_bounds(schema, *RANGES[option.name])
        found[option.name] = schema
    return found


def _set_bounds(schema: Schema, low: float, most: float) -> None:
    """The smallest and largest value, wherever the schema allows a number."""
    for part in (schema, *schema.get("anyOf", ())):
        if part.get("type") in ("integer", "number"):
            part["minimum"] = low
            if most < math.inf:
                part["maximum"] = most


def _of_type(hint: Any) -> Schema:
    """What YAML values `clicktrain.settings.convert` takes for a type."""
    origin, args = get_origin(hint), get_args(hint)
    if (choices := choices_in(hint)) is not None:
        known: list[Schema] = [{"enum": list(choices)}, {"type": "string", "pattern": OWN}]
        none = origin in (Union, types.UnionType) and type(None) in args
        return {"anyOf": [*known, *([{"type": "null"}] if none else [])]}
    if origin is Annotated:
        return _of_type(args[0])
    if origin in (Union, types.UnionType):
        options = [_of_type(arg) for arg in args]
        return {"anyOf": [part for option in options for part in option.get("anyOf", [option])]}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        if args[1:] == (Ellipsis,):
            return {"type": "array", "items": _of_type(args[0])}
        items = [_of_type(arg) for arg in args]
        return {"type": "array", "items": items, "minItems": len(args), "maxItems": len(args)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_type(args[1])}
    if hint is float:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": NUMBER_AS_TEXT}]}
    words = {bool: "boolean", int: "integer", str: "string", type(None): "null"}
    return {"type": words[hint]} if hint in words else {}
