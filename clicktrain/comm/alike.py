"""Whether all processes run the same code, with the same settings, on the same data."""

from __future__ import annotations

import hashlib
import platform
import zlib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clicktrain.comm.agreement import gathered, several_processes
from clicktrain.errors import FailedElsewhere, UserError, shown

OWN_SETTINGS = frozenset(("threads", "workers", "cache_dir"))
"""Settings in which processes may differ."""
_SOURCES = (".py", ".c", ".h")


def check_same_code() -> None:
    """UserError unless all processes run the same clicktrain, PyTorch and Python.

    Names the process and what differs; `FailedElsewhere` in all but the first one, here and below.
    """
    if not several_processes():
        return
    own = {
        "clicktrain": f"{_version()} (sources {sources_digest()})",
        "PyTorch": torch.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }
    different = _first_difference(own)
    if different is not None:
        rank, name, here, there = different
        _refuse(f"process {rank} runs {name} {there}, the first one {here}: install the same for all of them")


def check_same_settings(settings: Mapping[str, Any]) -> None:
    """UserError unless all processes have the same settings, but for `OWN_SETTINGS`."""
    if not several_processes():
        return
    shared = {name: value for name, value in settings.items() if name not in OWN_SETTINGS}
    different = _first_difference(shared)
    if different is not None:
        rank, name, here, there = different
        _refuse(
            f"process {rank} has {name} {shown(there)}, the first one {shown(here)}: give the same settings "
            "to all of them"
        )


def check_same_data(spec: str, facts: Mapping[str, Any]) -> None:
    """UserError unless all processes have the same images; ``facts`` are short, as counts and checksums."""
    if not several_processes():
        return
    different = _first_difference(facts)
    if different is not None:
        rank, name, here, there = different
        _refuse(
            f"process {rank} has other data of {spec} than the first one: {name} {shown(there)} instead of "
            f"{shown(here)}; give the same files to all of them"
        )


def check_same_weights(weights: Iterable[Tensor], when: str) -> None:
    """UserError unless all processes have the same numbers, bit for bit; ``when`` begins the sentence."""
    if not several_processes():
        return
    digest = 0
    for weight in weights:
        numbers = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = zlib.crc32(numbers.numpy().data, digest)
    different = _first_difference({"checksum": digest})
    if different is not None:
        _refuse(
            f"{when} process {different[0]} has other weights than the first one: do all of them run the "
            "same version on the same data?"
        )


def sources_digest() -> str:
    """Eight hexadecimal digits that stand for all source files of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(p for p in package.rglob("*") if p.suffix in _SOURCES):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _version() -> str:
    try:
        return version("clicktrain")
    except PackageNotFoundError:
        return "without version"


def _first_difference(own: Mapping[str, Any]) -> tuple[int, str, Any, Any] | None:
    """The first process with another value: its rank, what differs, the first one's value and its own."""
    first, *others = gathered(dict(own))
    for rank, other in enumerate(others, start=1):
        for name in {**first, **other}:
            if other.get(name) != first.get(name):
                return rank, name, first.get(name), other.get(name)
    return None


def _refuse(sentence: str) -> None:
    raise UserError(sentence) if dist.get_rank() == 0 else FailedElsewhere(sentence)
