"""A finished run, read back from its folder: settings, summary and the network with its weights."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.packed_file import read_packed
from clicktrain.formats.tree import load_tree, read_metadata
from clicktrain.methods import Method
from clicktrain.models.from_facts import Factory, build_from_facts, choose_factory, load_weights_
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import read_facts
from clicktrain.surgery import apply_recipe_
from clicktrain.train.config import RunConfig, load_run_config


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A finished run.

    Attributes:
        summary: as in summary.json.
        model: plain module on the CPU in eval mode, zeros in place.
        masks: pruned layers, layer name -> bool [F, C, R, S] or [O, I], True = kept.
        facts: see `Prepared.facts`: model, stem, num_classes, image_shape, classes, mean, std ...
        factory: builds the network: a name of the zoo, or what the caller gave.
    """

    folder: RunFolder
    config: RunConfig
    method: Method[Any]
    summary: dict[str, Any]
    model: nn.Module
    masks: dict[str, Tensor]
    facts: dict[str, Any]
    factory: Factory

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W of the images that the network takes."""
        c, h, w = self.facts["image_shape"]
        return c, h, w

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The values that became 0 and 255 in training, for images deeper than 8 bits."""
        values = self.facts.get("value_range")
        return None if values is None else (values[0], values[1])

    def dense_model(self) -> nn.Module:
        """The network before training: nothing removed, fresh weights."""
        return build_from_facts(self.factory, self.facts)


def load_run(path: str | PathLike[str], model: Factory | None = None) -> LoadedRun:
    """Read a finished run with its settings and masks.

    ``packed.safetensors`` is enough; where ``model.safetensors`` is there too, weights are read from it.
    ``model``: factory of a network of the caller's own, or ``package.module:factory``. Nothing is imported
    because a file names it.
    """
    folder = RunFolder(Path(path))
    config, method = load_run_config(folder, own_model_allowed=True)
    summary = folder.finished()
    file = folder.packed if folder.packed.exists() and not folder.model.exists() else folder.model
    try:
        metadata = read_metadata(file)
    except UserError as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None
    facts = read_facts(metadata, file)
    factory = choose_factory(facts["model"], model, folder.path)
    network = build_from_facts(factory, facts)
    apply_recipe_(folder.surgery, network)
    packed, others = read_packed(folder.packed)
    if file == folder.packed:
        weights = {**others, **{name: weight.to_dense() for name, weight in packed.items()}}
    else:
        weights = _weights(folder)
    load_weights_(network, weights, file, facts["model"])
    masks = {}
    for name, weight in packed.items():  # a kept weight may happen to be zero: masks are not its zeros
        shape = weights[name].shape if name in weights else None
        if shape is None or shape.numel() != weight.structure.numel:
            raise UserError(f"{folder.packed} is damaged: {name} is not a weight of {folder.model}")
        masks[name.removesuffix(".weight")] = weight.structure.mask().view(shape)
    return LoadedRun(folder, config, method, summary, network.eval(), masks, facts, factory)


def _weights(folder: RunFolder) -> dict[str, Tensor]:
    weights = load_tree(folder.model)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{folder.model} is damaged: it does not hold the weights of a network")
    return weights
