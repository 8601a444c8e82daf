"""A finished run, read back from its folder: settings, summary and the network with its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.packed_file import read_packed
from clicktrain.formats.tree import load_tree, read_metadata
from clicktrain.methods import Method
from clicktrain.surgery import apply_surgery_, read_recipe
from clicktrain.train.config import RunConfig
from clicktrain.train.prepare import build_model
from clicktrain.train.run_folder import RunFolder


@dataclass(frozen=True, eq=False)
class LoadedRun:
    """A finished run.

    Attributes:
        folder: where it came from.
        config: settings of the run.
        method: settings of the method.
        summary: what it reached, as in summary.json.
        model: plain module on the CPU in eval mode, zeros in place.
        masks: pruned layers, layer name -> bool [F, C, R, S] or [O, I], True = kept.
        facts: see `Prepared.facts`: model, stem, num_classes, image_shape, classes, mean, std ...
    """

    folder: RunFolder
    config: RunConfig
    method: Method[Any]
    summary: dict[str, Any]
    model: nn.Module
    masks: dict[str, Tensor]
    facts: dict[str, Any]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W of the images that the network takes."""
        c, h, w = self.facts["image_shape"]
        return c, h, w


def load_run(path: str | Path) -> LoadedRun:
    """Read a finished run. The network is made by the factory that its settings name.

    Raises:
        UserError: not the folder of a run, not finished, damaged, of a newer version; or the factory no
            longer makes the network that was trained.
    """
    folder = RunFolder(Path(path)).open()
    config, method = folder.load_config()
    summary = folder.summary()
    if summary is None:
        if (user := folder.user) is not None:
            raise UserError(f"the run in {folder.path} is not finished: {user} is training it")
        raise UserError(
            f"the run in {folder.path} is not finished: continue it with 'clicktrain resume {folder.path}'"
        )
    try:
        facts = json.loads(read_metadata(folder.model)["clicktrain"])
        weights = load_tree(folder.model)
    except Exception as error:
        raise UserError(f"{folder.model} is missing or damaged: {error}") from None
    model = build_model(facts)
    if folder.surgery.exists():
        for plan in read_recipe(folder.surgery):
            apply_surgery_(plan, model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder.model} does not fit model {config.model}: {error}") from None
    packed, _ = read_packed(folder.packed)  # a kept weight may happen to be zero: masks are not its zeros
    masks = {
        name.removesuffix(".weight"): weight.structure.mask().view(weights[name].shape)
        for name, weight in packed.items()
    }
    return LoadedRun(folder, config, method, summary, model.eval(), masks, facts)
