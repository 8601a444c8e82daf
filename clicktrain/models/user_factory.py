"""A user's own network, built by the factory that ``package.module:factory`` names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from clicktrain.errors import UserError, shortened
from clicktrain.own_code import (
    attribute_of,
    current_directory_importable,
    import_user_module,
    place_of,
    split_name,
)

HOW_TO_NAME = "a model of your own is named as package.module:factory"
_REFUSED = re.compile(r"got an unexpected keyword argument '(\w+)'")


def create_user_model(name: str, *, num_classes: int, in_channels: int, width: float) -> nn.Module:
    """Import ``package.module``, call ``factory`` and return the network that it builds.

    See `call_factory` for what it is called with. The current directory is searched first, as for
    ``python -m``.

    Raises:
        UserError: the module or the factory is missing, is not what it has to be, or raises; or a width other
            than 1 is asked of a factory without ``width``.
    """
    example = f"{HOW_TO_NAME}, for example mynets.small:build"
    module_name, factory_name = split_name(name, example, "model name")
    with current_directory_importable():
        factory = find_factory(name, import_user_module(module_name, HOW_TO_NAME), factory_name)
        return call_factory(name, factory, num_classes=num_classes, in_channels=in_channels, width=width)


def call_factory(
    name: str, factory: Callable[..., object], *, num_classes: int, in_channels: int, width: float
) -> nn.Module:
    """Call a factory (a function or a class) and return the network that it builds.

    It gets those of ``num_classes``, ``in_channels`` and ``width`` that its signature names; all of them if
    it takes ``**kwargs``, without those that whatever it passes them on to refuses.

    Raises:
        UserError: it needs other arguments, raises, or returns something else than a network.
    """
    options: dict[str, int | float] = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    accepted = accepted_options(name, factory, options)
    random_state = torch.get_rng_state()
    while True:
        try:
            model = factory(**accepted)
            break
        except TypeError as error:
            refused = _refused_option(error, accepted)
            if refused is None or not _takes_all(factory):
                raise _failed(name, error) from error
            del accepted[refused]
            torch.set_rng_state(random_state)
        except (Exception, SystemExit) as error:
            raise _failed(name, error) from error
    _check_width(name, accepted, width)
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} must return a torch.nn.Module, but it returned {describe(model)}")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise UserError(f"model {name!r} has weights without memory (on the meta device): give them values")
    return model


def call_alone(factory: Callable[..., object] | str) -> nn.Module:
    """Call a factory, or the one that ``package.module:factory`` names, without arguments.

    Raises:
        UserError: it is missing, needs arguments, raises, or returns something else than a network.
    """
    if isinstance(factory, str):
        module_name, factory_name = split_name(factory, HOW_TO_NAME, "model name")
        with current_directory_importable():
            found = find_factory(factory, import_user_module(module_name, HOW_TO_NAME), factory_name)
            return _built_alone(factory, found)
    if not callable(factory) or isinstance(factory, nn.Module):
        what = "a network that is built already" if isinstance(factory, nn.Module) else describe(factory)
        raise UserError(f"model is {what}: give a class or a function that builds it")
    return _built_alone(getattr(factory, "__qualname__", type(factory).__name__), factory)


def _built_alone(name: str, factory: Callable[..., object]) -> nn.Module:
    try:
        missing = [
            p.name
            for p in inspect.signature(factory).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
    except (ValueError, TypeError):
        missing = []
    if missing:
        raise UserError(
            f"model {name!r} needs {', '.join(missing)}: give a function without arguments that builds "
            "it, such as lambda: MyNetwork(10)"
        )
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        raise _failed(name, error) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} must return a torch.nn.Module, but it returned {describe(model)}")
    return model


def _refused_option(error: TypeError, options: dict[str, Any]) -> str | None:
    """The option that the error says is not taken, if it is one of these."""
    refused = _REFUSED.search(str(error))
    return refused[1] if refused is not None and refused[1] in options else None


def _failed(name: str, error: BaseException) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = shortened(str(error), 160)
    return UserError(f"building model {name!r} failed with {type(error).__name__}: {reason}{place_of(error)}")


def find_factory(name: str, module: ModuleType, factory_name: str) -> Callable[..., object]:
    """The callable of that name in the module."""
    try:
        factory = attribute_of(module, factory_name, HOW_TO_NAME)
    except Exception as error:  # a module may answer for names that it does not have
        raise _failed(name, error) from error
    if isinstance(factory, nn.Module):
        raise UserError(
            f"model {name!r} is a network that is already built: name the class or a function that builds it"
        )
    if not callable(factory):
        raise UserError(f"model {name!r} must be a function or a class, but it is {describe(factory)}")
    return factory


def accepted_options(
    name: str, factory: Callable[..., object], options: dict[str, int | float]
) -> dict[str, int | float]:
    """The options to call the factory with."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (ValueError, TypeError) as error:
        raise UserError(f"the parameters of model {name!r} cannot be read: wrap it in a function") from error
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {p.name for p in parameters if p.kind in by_keyword}
    accepted = {key: value for key, value in options.items() if _takes_all(factory) or key in names}
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind not in variadic
        and not (p.kind in by_keyword and p.name in accepted)
    ]
    if missing:
        raise UserError(
            f"model {name!r} needs {', '.join(missing)}, but a factory is called with num_classes, "
            "in_channels and width by keyword only: give the others a default"
        )
    _check_width(name, accepted, options["width"])
    return accepted


def _takes_all(factory: Callable[..., object]) -> bool:
    """Whether a factory has ``**kwargs``."""
    parameters = inspect.signature(factory).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _check_width(name: str, accepted: dict[str, int | float], width: float) -> None:
    if width != 1 and "width" not in accepted:
        raise UserError(f"model {name!r} has no parameter width, so width must stay 1.0")


def describe(value: object) -> str:
    """What a wrong value is, in words."""
    return "None" if value is None else f"of type {type(value).__name__}"
