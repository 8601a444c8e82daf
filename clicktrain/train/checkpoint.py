"""Checkpoints: whole, without the zeros outside masks, checked when read; reading executes nothing."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.formats.tree import flatten_tree, load_tree, read_metadata, save_tree
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import FORMAT_VERSION, check_version
from clicktrain.train.config import RunConfig


class DamagedCheckpoint(UserError):  # noqa: N818 - reads as a sentence to the user
    """A checkpoint that cannot be read: truncated, changed, or not a checkpoint."""


def save_checkpoint(folder: RunFolder, epoch: int, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint atomically, then remove all but the newest ``keep``; if the disk is full all stay.

    ``state`` is nested dicts and lists of tensors, numbers, strings and None; ``epoch`` (from 1, of the last
    step) and ``step`` (of the optimizer) are for the file's name.
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
    """Read a checkpoint, tensors on the CPU; UserError if it is damaged or was written by another version."""
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
    """Content of the newest checkpoint that can be read, with a message for each that cannot.

    None if no checkpoint has been written yet; UserError if none can be read or one is of another version.
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
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


_SPARE_BYTES = 20 * 2**20
"""Logs, summary and report."""
_CHANNEL_BYTES = 9
"""Length of a number of three digits, as text."""


def bytes_needed(model: nn.Module, config: RunConfig) -> int:
    """Upper estimate of the bytes in the folder of a run.

    A checkpoint holds the weights, one (sgd) or two (adam, adamw, lamb) moments, an average of them, the
    dense ones that teach, and the importance that a method collects; one more than ``keep_checkpoints`` is on
    disk while the newest is written. Two numbers per channel and epoch are in channels.jsonl, if a method
    pushes channels to zero.
    """
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    moments = 1 if config.optimizer == "sgd" else 2
    copies = sum((bool(config.ema_decay), config.lookahead, config.distill > 0 and config.teacher is None))
    per_checkpoint = weights * (1 + moments + copies + 2)
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


Masks: TypeAlias = Mapping[str, Tensor]
"""Layer name -> bool, of the weight's shape, True = kept."""

_MASKED_BY = "masked_by"
"""Key of a tensor's replacement: ``{"masked_by": layer name, "values": elements inside the mask}``."""
_BITS = "keep_bits"
"""Entry of a packed layer's ``state_dict`` that repeats the layer's mask."""
_AVERAGE = "module."
"""Prefix of the network's entries in the state of a moving average."""


def thin_weights(model: nn.Module, masks: Masks) -> dict[str, Any]:
    """The ``state_dict`` of a network or average, without zeros outside frozen masks and packed indices."""
    repeated = set(_bits_names(model))
    state = {name: value for name, value in model.state_dict().items() if name not in repeated}
    return {name: _thin(value, _layer_of(name), masks) for name, value in state.items()}


def full_weights(model: nn.Module, saved: Mapping[str, Any], masks: Masks) -> dict[str, Tensor]:
    """Inverse of `thin_weights`, for a model that is packed as it was when it was saved."""
    own = model.state_dict()
    positions = {name: own[name] for name in _bits_names(model)}
    return {name: _full(value, masks) for name, value in saved.items()} | positions


def thin_optimizer(optimizer: Optimizer, model: nn.Module, masks: Masks) -> dict[str, Any]:
    """The ``state_dict`` of an optimizer, without the zeros of pruned weights."""
    state: dict[str, Any] = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    layers = [_layer_of(names.get(id(parameter), "")) for parameter in parameters]
    held = {
        number: {key: _thin(value, layers[number], masks) for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": held}


def full_optimizer(saved: Mapping[str, Any], masks: Masks) -> dict[str, Any]:
    """Inverse of `thin_optimizer`."""
    held = saved["state"].items()
    return {**saved, "state": {n: {k: _full(v, masks) for k, v in entries.items()} for n, entries in held}}


def _thin(value: Any, layer: str | None, masks: Masks) -> Any:
    """A tensor's elements inside its layer's mask, if all others are zero; else the value as it is."""
    mask = masks.get(layer) if layer is not None else None
    if mask is None or not isinstance(value, Tensor) or value.shape != mask.shape or not len(mask):
        return value
    mask = mask.to(value.device)
    if bool((value.detach() != 0).logical_and_(~mask).any()):
        return value
    return {_MASKED_BY: layer, "values": value.detach()[mask]}


def _full(value: Any, masks: Masks) -> Any:
    if not (isinstance(value, dict) and value.keys() == {_MASKED_BY, "values"}):
        return value
    mask, values = masks[value[_MASKED_BY]], value["values"]
    full = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    full[mask.to(values.device)] = values
    return full


def _layer_of(name: str) -> str | None:
    """The layer whose weight an entry is, in the network or in an average of it."""
    stem, _, leaf = name.removeprefix(_AVERAGE).rpartition(".")
    return stem if leaf == "weight" else None


def _bits_names(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLayer):
            yield f"{name}.{_BITS}" if name else _BITS
