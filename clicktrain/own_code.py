"""Code of a user's own, named as ``package.module:name``: networks, criteria and other choices.

Importing a module runs it, so a name is imported only where the user gives it in the call at hand: never
because a file names it (`require_named`, `FromFile`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from types import ModuleType

from clicktrain.errors import UserError, shortened

PACKAGES = ("timm", "torchvision")
"""Prefixes of models that are looked up in a package's own list: ``timm:resnet26`` is nobody's own code."""


class FromFile(str):
    """A name of code that only a file gives: kept and shown, but never imported."""

    __slots__ = ()


def is_own(name: object) -> bool:
    """Whether a setting names a user's own code, which is imported, rather than a choice of the library."""
    return isinstance(name, str) and ":" in name and name.partition(":")[0] not in PACKAGES


def require_named(name: object, source: object, given: object, setting: str = "model") -> None:
    """Raise a `UserError` where a file (``source``) names code of somebody's own and the user did not.

    ``given`` is what the user named for the ``setting`` in this call, or None.
    """
    if is_own(name) and given is None:
        short = shortened(str(name), 120)
        raise UserError(
            f"{source} names the {setting} {short!r}, whose code would run: if you trust it, name it "
            f"yourself with --{setting.replace('_', '-')} {short} (in Python, {setting}={short!r})"
        )


def import_own(name: str, how: str) -> object:
    """Import ``package.module:name``; the current directory is searched first.

    ``how`` says in the messages how such a thing is named.

    Raises:
        UserError: the name cannot be read, the module is missing or fails, or it has no such name.
    """
    module_name, attribute = split_name(name, how)
    with current_directory_importable():
        module = import_user_module(module_name, how)
        return attribute_of(module, attribute, how)


def split_name(name: str, how: str, what: str = "name") -> tuple[str, str]:
    """Module and attribute of ``package.module:name``; UserError where it cannot be read."""
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), attribute)):
        raise UserError(f"cannot read the {what} {shortened(name, 120)!r}: {how}")
    return module_name, attribute


def attribute_of(module: ModuleType, attribute: str, how: str) -> object:
    """The attribute of a user's module; UserError if it has none of that name."""
    try:
        value: object = getattr(module, attribute)
    except AttributeError:
        place = getattr(module, "__file__", None) or "a namespace package"
        raise UserError(
            f"module {module.__name__!r} ({place}) has no {shortened(attribute, 80)!r}: {how}"
        ) from None
    return value


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


def import_user_module(module_name: str, how: str) -> ModuleType:
    """The module; the UserError distinguishes a missing module from one that fails as it is imported."""
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and (module_name == missing or module_name.startswith(missing + ".")):
            raise UserError(
                f"there is no module {shortened(missing, 80)!r} (looked for {shortened(module_name, 80)!r} "
                f"in the current directory {os.getcwd()} and in the installed packages): {how}"
            ) from error
        raise UserError(
            f"importing {module_name!r} failed with {type(error).__name__}: {shortened(str(error), 160)}"
            f"{place_of(error)}"
        ) from error


def place_of(error: BaseException) -> str:
    """``" (file, line n)"`` of the statement that raised; nothing where the message names it already."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) or not frames:
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})"
