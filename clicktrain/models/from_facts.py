"""Networks as the facts of a run describe them: of the zoo, or by a factory that the user gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.models.registry import create_model
from clicktrain.models.user_factory import call_factory
from clicktrain.own_code import is_own, require_named

Factory = str | Callable[..., nn.Module]
"""``package.module:factory``, or the factory itself."""


def choose_factory(name: str, given: Factory | None, folder: object) -> Factory:
    """Choose what builds the network ``name`` of a run; a user's own code only if the caller named it.

    UserError if it has to be named, or the run is of a network of the zoo and another one is given.
    """
    if is_own(name):
        require_named(name, folder, given if isinstance(given, str) or given is None else "")
        assert given is not None
        return given
    if given is not None and given != name:
        raise UserError(f"the run in {folder} is of model {name}, which needs no model: leave it out")
    return name


def build_from_facts(factory: Factory, facts: Mapping[str, Any]) -> nn.Module:
    """The network with fresh weights, before anything was removed from it; UserError as `create_model`."""
    if isinstance(factory, str):
        sizes = {name: facts[name] for name in ("num_classes", "in_channels", "width", "stem")}
        return create_model(factory, **sizes, image_size=_side(facts))
    if isinstance(factory, nn.Module):
        raise UserError(
            "model is a network that is built already: give its class, or use "
            "clicktrain.load_pruned(model, folder)"
        )
    if not callable(factory):
        raise UserError(
            f"model is of type {type(factory).__name__}: give a class or a function that builds it"
        )
    numbers = {name: facts[name] for name in ("num_classes", "in_channels", "width")}
    return call_factory(getattr(factory, "__qualname__", type(factory).__name__), factory, **numbers)


def load_weights_(network: nn.Module, weights: Mapping[str, Tensor], file: object, model: str) -> None:
    """Load the weights of a file into the network ``model`` of its facts; UserError unless they fit."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        what = str(error).replace("\t", " ").split("\n")
        raise UserError(f"{file} does not fit model {model}: {what[min(1, len(what) - 1)]}") from None


def _side(facts: Mapping[str, Any]) -> int | None:
    """Side of the images in pixels, where they are square."""
    height, width = (facts.get("image_shape") or [0, 0, 0])[1:]
    return height if height and height == width else None
