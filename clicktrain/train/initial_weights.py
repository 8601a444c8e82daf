"""Initial weights from an earlier run, a file or a package's cache, and what they have cost."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError, shown
from clicktrain.formats.tree import read_tensors
from clicktrain.models.packages import pretrained_weights
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import parse_facts


@dataclass(frozen=True, slots=True)
class EarlierCost:
    """Training FLOPs and time that went into the weights before the run begins."""

    flops: int | None = 0
    """As executed, over all trainings in a row; None if unknown."""
    flops_dense: int = 0
    """Those of the longest of these trainings, if it had been dense."""
    seconds: float | None = 0.0
    """Wall clock of all these trainings; None if unknown."""

    def total_ratio(self, flops: int, flops_dense: int) -> float | None:
        """All FLOPs spent, over those of one dense training: the longer of this run's and the earlier one.

        Without pruning a user would pay for one training: a network that is trained dense, then pruned and
        fine-tuned for as many epochs, has a ratio of up to 2. ``flops`` and ``flops_dense`` are of this run.
        """
        if self.flops is None:
            return None
        return (self.flops + flops) / max(flops_dense, self.flops_dense, 1)

    def total_seconds(self, seconds: float) -> float | None:
        """Wall clock of these trainings and of a run of ``seconds``; None if unknown."""
        return None if self.seconds is None else self.seconds + seconds

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> EarlierCost:
        """From the fields as a checkpoint has them; older ones have no time."""
        return cls(**{"seconds": None if saved["flops"] != 0 else 0.0, **saved})


PRETRAINED = "pretrained"
"""Instead of a path: the weights that the package of the network publishes, from its cache."""


def load_initial_weights_(
    model: nn.Module, source: str | Path, classes: Sequence[str], network: str = "", in_channels: int = 3
) -> EarlierCost:
    """Load the weights of an earlier run, of a safetensors file, or of a package's cache into ``model``.

    A file that no run of this library has written, and a cache, may be of another number of classes: the
    classifier then stays as it is, which a warning says.

    Args:
        model: changed in place; on any device.
        source: folder of a finished run, a .safetensors file with the names of the network's state dict, or
            `PRETRAINED`.
        classes: those of the data that the run is about to train on.
        network, in_channels: what the network was made by, for `PRETRAINED`.

    Returns:
        The cost of the weights: from the summary of a run; unknown for a file.
    """
    if source == PRETRAINED:
        tensors = pretrained_weights(network, num_classes=len(classes), in_channels=in_channels)
        _load_without_classifier_(model, source, tensors, len(classes))
        return EarlierCost(flops=None, seconds=None)
    path = Path(source)
    cost = EarlierCost(flops=None, seconds=None)
    if path.is_dir():
        cost, path = _cost_of(RunFolder(path)), RunFolder(path).model
    elif not path.exists():
        raise UserError(
            f"initial_weights is {str(source)!r}, which does not exist: give the folder of a finished run, a "
            f".safetensors file, or {PRETRAINED} for a network of timm or torchvision"
        )
    try:
        tensors, metadata = read_tensors(path)
        facts = parse_facts(metadata, path)
    except UserError as error:
        raise UserError(f"initial_weights {source} cannot be read: {error}") from None
    _check_classes(source, facts, classes)
    if facts.get("classes") is None:
        _load_without_classifier_(model, source, tensors, len(classes))
    else:
        _check_tensors(source, tensors, model.state_dict())
        model.load_state_dict(tensors)
    return cost


def _load_without_classifier_(
    model: nn.Module, source: str | Path, tensors: dict[str, Tensor], classes: int
) -> None:
    """Load everything, or everything but the layer that has one output for each class."""
    own = model.state_dict()
    others = {
        name for name, now in own.items()
        if name not in tensors or (
            tensors[name].shape != now.shape and tensors[name].shape[1:] == now.shape[1:]
        )
    }  # fmt: skip
    layers = {name.rpartition(".")[0] for name in others}
    sizes = {own[name].shape[:1] for name in others}
    if sizes == {(classes,)} and others >= {f"{layer}.weight" for layer in layers} and len(layers) == 1:
        tensors = {**tensors, **{name: own[name] for name in others}}
        warnings.warn(
            f"initial_weights {source} have no classifier for {classes} classes: {layers.pop()} keeps its "
            "fresh weights",
            stacklevel=3,
        )
    _check_tensors(source, tensors, own)
    model.load_state_dict(tensors)


def _cost_of(folder: RunFolder) -> EarlierCost:
    summary = folder.open().summary()
    if summary is None:
        raise UserError(
            f"initial_weights is the run in {folder.path}, which is not finished: continue it with "
            f"'clicktrain resume {folder.path}', or give another"
        )
    flops, ratio = summary["train_flops"], summary["train_flops_ratio"]
    before = summary.get("initial_train_flops", 0)
    if before is None:
        return EarlierCost(None, seconds=None)
    earlier = summary.get("initial_train_seconds", 0.0 if before == 0 else None)
    seconds = None if earlier is None else summary["train_seconds"] + earlier
    total, total_ratio = flops + before, summary.get("total_train_flops_ratio") or ratio
    return EarlierCost(total, round(total / total_ratio) if total_ratio else 0, seconds)


def _check_classes(source: str | Path, facts: Mapping[str, Any], classes: Sequence[str]) -> None:
    theirs = facts.get("classes")
    if theirs is None:
        return
    if not isinstance(theirs, list):
        raise UserError(f"initial_weights {source} is damaged: its classes are {shown(theirs)}, not a list")
    if theirs == list(classes):
        return
    if len(theirs) != len(classes):
        what = f"for {len(theirs)} classes, this data has {len(classes)}"
    else:
        one = next((a, b) for a, b in zip(theirs, classes, strict=True) if a != b)
        what = f"for other classes ({one[0]!r} where this data has {one[1]!r})"
    raise UserError(f"initial_weights {source} was trained {what}: give weights of the same data")


def _check_tensors(source: str | Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    missing = [name for name in own if name not in tensors]
    surplus = [name for name in tensors if name not in own]
    if missing or surplus:
        what = f"lacks {missing[0]}" if missing else f"has {surplus[0]}, which the network does not"
        raise UserError(f"initial_weights {source} {what}: give weights of the same network")
    for name, tensor in own.items():
        other = tensors[name]
        if other.shape != tensor.shape:
            raise UserError(
                f"initial_weights {source} has {name} of shape {list(other.shape)}, the network has "
                f"{list(tensor.shape)}: give weights of the same network"
            )
        if other.is_floating_point() and not bool(torch.isfinite(other).all()):
            raise UserError(f"initial_weights {source} is damaged: {name} holds values that are no numbers")
