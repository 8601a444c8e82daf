"""Checkpoints: written whole, checked when read, the oldest removed; reading one executes nothing."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.tree import flatten_tree, load_tree, read_metadata, save_tree
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import FORMAT_VERSION, check_version
from clicktrain.train.config import RunConfig


class DamagedCheckpoint(UserError):  # noqa: N818 - reads as a sentence to the user
    """A checkpoint that cannot be read: truncated, changed, or not a checkpoint."""


def save_checkpoint(folder: RunFolder, epoch: int, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint atomically, then remove all but the newest ``keep``.

    Args:
        folder: of the run.
        epoch: epoch (from 1) of the last step, for the file's name.
        step: optimizer steps done.
        state: nested dicts and lists of tensors, numbers, strings and None.
        keep: how many checkpoints may stay.

    Raises:
        UserError: the disk is full; older checkpoints stay.
        OSError: anything else that the file system refuses.
    """
    path = folder.checkpoint(epoch, step)
    path.parent.mkdir(exist_ok=True)  # not its parents: a run's folder that was deleted stays away
    metadata = {"format_version": str(FORMAT_VERSION), "kind": "checkpoint", "crc32": _checksum(state)}
    save_tree(path, state, metadata)
    there = folder.checkpoints()
    newest = there.index(path)
    # Later ones were damaged, and training went on from an older one.
    for old in (*there[: max(newest + 1 - keep, 0)], *there[newest + 1 :]):
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint, tensors on the CPU.

    Raises:
        DamagedCheckpoint: the file cannot be read, or is not what was written.
        UserError: it was written by another version.
    """
    try:
        metadata = read_metadata(path)
        version = int(metadata["format_version"])
    except (UserError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is damaged or not a checkpoint of clicktrain: {error}") from None
    check_version(version, path)
    try:
        state = load_tree(path)
        right = isinstance(state, dict) and _checksum(state) == metadata.get("crc32")
    except (UserError, SafetensorError, ValueError) as error:
        raise DamagedCheckpoint(f"{path} is damaged: {error}") from None
    if not right:
        raise DamagedCheckpoint(f"{path} is damaged: its checksum is wrong")
    assert isinstance(state, dict)
    return state


def newest_good(folder: RunFolder, message: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read; reports each that cannot.

    Returns:
        Its content, or None when no checkpoint has been written yet.

    Raises:
        UserError: there are checkpoints and none can be read, or one is of another version.
    """
    paths = folder.checkpoints()
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except DamagedCheckpoint as error:
            message(f"{error}; going back to the one before it")
    if paths:
        raise UserError(f"no checkpoint in {folder.checkpoint_folder} can be read: start the run again")
    return None


def _checksum(state: dict[str, Any]) -> str:
    """CRC-32 over all tensors, which the file format itself does not check, and the other values."""
    tensors, rest = flatten_tree(state)
    value = zlib.crc32(repr(rest).encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(_bytes(tensors[name]), value)
    return f"{value:08x}"


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().data


_SPARE_BYTES = 20 * 2**20
"""Logs, summary and report."""
_CHANNEL_BYTES = 9
"""Length of a number of three digits, as text."""


def bytes_needed(model: nn.Module, config: RunConfig) -> int:
    """Upper estimate of the bytes in the folder of a run.

    A checkpoint holds the weights, one (sgd) or two (adam, adamw) moments, the moving average and the
    importance that a method collects; one more than ``keep_checkpoints`` is on disk while the newest is
    written. Two numbers per channel and epoch are in channels.jsonl, if a method pushes channels to zero.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    moments = 1 if config.optimizer == "sgd" else 2
    per_checkpoint = weights * (1 + moments + (1 if config.ema_decay else 0) + 2)
    channels = sum(p.shape[0] + p.shape[1] for p in model.parameters() if p.dim() > 2)
    logs = channels * config.epochs * _CHANNEL_BYTES + _SPARE_BYTES
    return per_checkpoint * (config.keep_checkpoints + 1) + 2 * weights + logs


def check_disk(path: Path, needed: int, free: int | None = None) -> None:
    """Raise UserError if the disk of ``path`` (which need not exist) has less than ``needed`` bytes free."""
    if free is None:
        there = path.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"the run needs about {needed / 2**20:,.0f} MB at {path} and {free / 2**20:,.0f} MB are free: "
            "free some space, lower keep_checkpoints, or give another --out"
        )
