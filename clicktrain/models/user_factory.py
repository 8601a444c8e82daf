"""A user's own network, named as ``package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import nn

from clicktrain.errors import UserError

HOW_TO_NAME = "a model of your own is named as package.module:factory"


def create_user_model(name: str, *, num_classes: int, in_channels: int, width: float) -> nn.Module:
    """Import ``package.module``, call ``factory`` and return the network that it builds.

    The factory (a function or a class) gets those of ``num_classes``, ``in_channels`` and ``width`` that its
    signature names, all of them if it takes ``**kwargs``. The current directory is searched first, as for
    ``python -m``. What the factory itself raises passes through unchanged.

    Raises:
        UserError: the module or the factory is missing or is not what it has to be, or a width other than 1
            is asked of a factory without ``width``.
    """
    module_name, _, factory_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), factory_name)):
        raise UserError(f"cannot read the model name {name!r}: {HOW_TO_NAME}, for example mynets.small:build")
    with current_directory_importable():
        factory = find_factory(name, import_user_module(module_name), factory_name)
        options = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
        model = factory(**accepted_options(name, factory, options))
    if not isinstance(model, nn.Module):
        raise UserError(f"model {name!r} must return a torch.nn.Module, but it returned {describe(model)}")
    return model


@contextlib.contextmanager
def current_directory_importable() -> Iterator[None]:
    """Have the current directory at the front of ``sys.path`` inside the block."""
    directory = os.getcwd()
    sys.path.insert(0, directory)
    importlib.invalidate_caches()  # the file may be younger than the last look into its directory
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have changed the list itself
            sys.path.remove(directory)


def import_user_module(module_name: str) -> ModuleType:
    """The module, or a UserError that tells a missing module from one that fails while it is imported."""
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module_name == missing or module_name.startswith(missing + ".")):
            raise UserError(
                f"there is no module {missing!r} (looked for {module_name!r} in the current directory "
                f"{os.getcwd()} and in the installed packages): {HOW_TO_NAME}"
            ) from error
        raise UserError(
            f"importing {module_name!r} failed with {type(error).__name__}: {error}{place_of(error)}"
        ) from error


def find_factory(name: str, module: ModuleType, factory_name: str) -> Callable[..., object]:
    """The callable of that name in the module."""
    if not hasattr(module, factory_name):
        place = getattr(module, "__file__", None) or "a namespace package"
        raise UserError(f"module {module.__name__!r} ({place}) has no {factory_name!r}: {HOW_TO_NAME}")
    factory: object = getattr(module, factory_name)
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
    except ValueError as error:
        raise UserError(f"the parameters of model {name!r} cannot be read: wrap it in a function") from error
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {p.name for p in parameters if p.kind in by_keyword}
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    accepted = {key: value for key, value in options.items() if takes_all or key in names}
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
    if options["width"] != 1 and "width" not in accepted:
        raise UserError(f"model {name!r} has no parameter width, so width must stay 1.0")
    return accepted


def describe(value: object) -> str:
    """What a wrong value is, in words."""
    return "None" if value is None else f"of type {type(value).__name__}"


def place_of(error: BaseException) -> str:
    """``" (file, line n)"`` of the statement that raised; nothing where the message names it already."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})"
