"""Reads untrusted files: regular files of bounded size, as plain data.

A FIFO or a device is never opened (it could block for ever or have no end), JSON and YAML become plain
values and cannot run code, and every defect is a `UserError` of one sentence.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from clicktrain.errors import UserError, shortened, shown

LARGEST_TEXT = 256 * 2**20
"""Bytes of the largest JSON or text file that is read; settings are far below `LARGEST_YAML`."""
LARGEST_YAML = 2**20
MOST_NODES = 10_000
"""Values in a YAML file, with those that aliases repeat counted each time."""
DEEPEST = 32
"""Levels of lists and mappings in a YAML file."""


def cache_folder(part: str = "", variable: str = "") -> Path | None:
    """``$VARIABLE`` if it is set, else ``clicktrain/PART`` in the user's cache.

    That is ``$XDG_CACHE_HOME``, else the platform's own (``~/.cache`` on Linux); None without a home folder.
    """
    if named := os.environ.get(variable):
        return Path(named).absolute()
    try:
        if named := os.environ.get("XDG_CACHE_HOME"):
            home = Path(named)
        elif sys.platform == "darwin":
            home = Path.home() / "Library" / "Caches"
        elif os.name == "nt" and os.environ.get("LOCALAPPDATA"):
            home = Path(os.environ["LOCALAPPDATA"])
        else:
            home = Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry for this user
        return None
    return home.absolute() / "clicktrain" / part


def read_regular(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Read a regular file (or a link to one) whole.

    Raises:
        UserError: a FIFO, a device, a socket or a folder; larger than ``most_bytes``.
        OSError: it does not exist or cannot be read.
    """
    # O_NONBLOCK: opening a FIFO without a writer would wait for one. What is opened is what is looked at.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        check_regular(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > most_bytes:
            raise UserError(
                f"{path} has {status.st_size:,} bytes: files of its kind are read up to {most_bytes:,} bytes"
            )
        data = file.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise UserError(f"{path} grew beyond {most_bytes:,} bytes while it was read")
    return data


def check_regular(path: str | os.PathLike[str], status: os.stat_result | None = None) -> None:
    """Raise a `UserError` for a FIFO, a device, a socket or a folder; OSError if there is nothing."""
    mode = (os.stat(path) if status is None else status).st_mode
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise UserError(f"{path} is {kind}: a regular file is needed")


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file; UserError for a path that is too long for the file system."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{shortened(str(path), 200)} cannot be read: {reason}") from None


def read_text(path: str | os.PathLike[str], most_bytes: int = LARGEST_TEXT) -> str:
    """Read a UTF-8 text file; errors as `read_regular`, and a UserError for bytes that are not UTF-8."""
    try:
        return read_regular(path, most_bytes).decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8 text") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; errors as `read_text`, and a UserError for text that is not JSON."""
    return parse_json(read_text(path), f"{path} is damaged: it is not JSON")


def parse_json(text: str | bytes, problem: str) -> Any:
    """Values of a JSON text; a UserError with the sentence ``problem`` where it is none.

    Also where it is nested deeper than Python can read, or has numbers of thousands of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(problem) from None


def find_recipe(path: str | os.PathLike[str]) -> Path:
    """The path as given; of a ``recipes/NAME.yaml`` that is not there, the file that the package brings.

    So commands of the documentation work in a checkout, on its files, and where only the package is.
    """
    given = Path(path)
    brought = Path(__file__).parent / given
    is_ours = len(given.parts) == 2 and given.parts[0] == "recipes" and brought.is_file()
    return brought if is_ours and not given.exists() else given


class YamlError(UserError):
    """A text is not YAML, or uses what a settings file may not."""


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Read a YAML file of settings: see `parse_yaml`; errors as `read_text`, which name the file."""
    try:
        return parse_yaml(read_text(path, LARGEST_YAML))
    except YamlError as error:
        raise UserError(f"{path} {error}") from None


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text: null, booleans, numbers, texts, lists and mappings; None for no text.

    Stricter than YAML 1.1 where that reads a value as something else in silence: ``1:30:00`` (5400 there), a
    date and ``010`` (8 there) are texts, and a key that is given twice is an error.

    Raises:
        YamlError: not YAML, a key given twice, more than `MOST_NODES` values or `DEEPEST` levels (an "alias
            bomb"), a value that contains itself. The sentence begins with a verb: put the file's name first.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f" (line {mark.line + 1})" if mark is not None else ""
        raise YamlError(f"is not valid YAML{line}: write one 'setting: value' a line") from None
    except YamlError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError):  # a tag and a value that do not go together
        raise YamlError("has a value that its tag does not allow: write plain values without tags") from None
    except RecursionError:
        raise YamlError(
            f"is nested deeper than {DEEPEST} levels: write one 'setting: value' a line"
        ) from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader that composes a graph of nodes to be checked before values are made of it."""

    def __init__(self, text: str) -> None:
        try:
            super().__init__(text)
        except yaml.YAMLError:
            raise YamlError("is not valid YAML: it holds characters that YAML does not allow") from None


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    """A mapping whose keys are all different; YAML's ``<<`` is a key like any other."""
    values: dict[Hashable, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, Hashable):
            raise YamlError(f"has a key that is no name (line {line}): write one 'setting: value' a line")
        if key in values:
            raise YamlError(f"gives {shown(key)} twice (line {line}): leave one of them out")
        values[key] = loader.construct_object(value_node, deep=True)
    return values


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    try:
        return int(str(loader.construct_scalar(node)).replace("_", ""), 0)
    except ValueError:  # ``!!int word``, or more digits than Python reads
        line = node.start_mark.line + 1
        text = shown(node.value, 20)
        raise YamlError(f"has {text} (line {line}), which is no number that can be read") from None


def _construct_plain(loader: _Loader, node: yaml.Node) -> Any:
    """Refuse what YAML can tag and settings do not have: dates, sets, binary data, Python objects."""
    line = node.start_mark.line + 1
    raise YamlError(f"has a value with the tag {shown(node.tag)} (line {line}): write plain values")


_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is not None and tag.endswith((":null", ":bool", ":float", ":str", ":seq"))
}
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor(None, _construct_plain)


def _check_size(root: yaml.Node) -> None:
    """Count values and levels of a graph of nodes, aliases as often as they are used, in linear time."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, level: int) -> int:
        known = sizes.get(id(node))
        if known is not None:
            return known
        if id(node) in open_nodes:
            raise YamlError("has a value that contains itself: write plain values")
        if level > DEEPEST:
            raise YamlError(f"is nested deeper than {DEEPEST} levels: write one 'setting: value' a line")
        open_nodes.add(id(node))
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        total = 1 + sum(size(child, level + 1) for child in children)
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        if total > MOST_NODES:
            raise YamlError(
                f"holds more than {MOST_NODES:,} values, with those that aliases repeat: "
                "write one 'setting: value' a line"
            )
        return total

    size(root, 0)
