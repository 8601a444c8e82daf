"""A shrunken network as a file: its surgery plans rebuild it, one by one, from the class of the user."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from clicktrain.comm.agreement import agreed_text, several_processes
from clicktrain.errors import UserError, shortened
from clicktrain.files import parse_json, read_json
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.formats.packed_file import load_packed
from clicktrain.formats.tree import load_tree, read_metadata
from clicktrain.surgery.apply import apply_surgery_
from clicktrain.surgery.plan import SurgeryPlan

SAVED = "clicktrain.network"
"""Key in the metadata of a file of `clicktrain.save`: how the network is built, and the plans, as JSON."""


def write_recipe(path: str | Path, plans: Iterable[SurgeryPlan]) -> None:
    """Write plans as JSON, in the order in which they were carried out."""
    write_text_atomic(Path(path), json.dumps([plan.to_json() for plan in plans]) + "\n")


def read_recipe(path: str | Path) -> list[SurgeryPlan]:
    """Read plans back.

    Raises:
        UserError: no such file, not a list of plans, or of a newer version.
    """
    try:
        documents = read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"there is no file {path}: a recipe of surgery plans (surgery.json) is needed"
        ) from None
    if not isinstance(documents, list):
        raise UserError(f"{path} is not a list of surgery plans")
    return [SurgeryPlan.from_json(document) for document in documents]


def apply_recipe_(path: str | Path, model: nn.Module) -> None:
    """Carry out the plans of a file, if there is one, on the network that they were made for.

    Raises:
        UserError: the file is damaged, or its plans do not fit the network.
    """
    if os.path.lexists(path):
        apply_plans_(read_recipe(path), model, path)


def apply_plans_(plans: Iterable[SurgeryPlan], model: nn.Module, path: str | Path) -> None:
    """Carry out plans that a file has; errors as `apply_recipe_`."""
    for plan in plans:
        try:
            apply_surgery_(plan, model)
        except UserError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = shortened(" ".join(str(error).split()), 120)
            raise UserError(f"{path} is damaged: a plan cannot be carried out ({reason})") from error


def plans_in(document: object, path: str | Path) -> list[SurgeryPlan]:
    """Plans of the description that `clicktrain.save` puts into its file; errors as `read_recipe`."""
    plans = document.get("plans") if isinstance(document, dict) else None
    if not isinstance(plans, list):
        raise UserError(f"{path} is damaged: its description has no list of plans")
    return [SurgeryPlan.from_json(plan) for plan in plans]


def load_pruned(model: nn.Module, folder: str | Path) -> nn.Module:
    """Make a fresh model of the user's own class into the shrunken one, weights included.

    Args:
        folder: of a run (``model.safetensors`` or ``packed.safetensors`` and, if channels were removed,
            ``surgery.json``), or of `clicktrain.save`.

    Returns:
        The same model.

    Raises:
        UserError: a file is missing or damaged, or they belong to another network.

    Example:
        ``model = clicktrain.load_pruned(MyNetwork(), "runs/mine")``
    """
    folder = Path(folder)
    path = folder / "model.safetensors"
    if not path.exists() and (folder / "packed.safetensors").exists():
        path = folder / "packed.safetensors"
    try:
        weights = load_packed(path) if path.stem == "packed" else load_tree(path)
        metadata = read_metadata(path)
    except Exception as error:
        raise UserError(f"{path} is missing or damaged: {error}") from None
    if SAVED in metadata:
        document = parse_json(metadata[SAVED], f"{path} is damaged: its description is not JSON")
        apply_plans_(plans_in(document, path), model, path)
    else:
        apply_recipe_(folder / "surgery.json", model)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = shortened(" ".join(str(error).split()), 300)
        raise UserError(f"{path} does not fit {type(model).__name__}: {reason}") from None
    return model


def agreed_plans(plans: Mapping[int, SurgeryPlan], device: torch.device) -> dict[int, SurgeryPlan]:
    """The first process's plans, in all of them: the statistics of batch norms may differ in the others."""
    if not several_processes():
        return dict(plans)
    text = json.dumps([[key, plan.to_json()] for key, plan in plans.items()])
    return {key: SurgeryPlan.from_json(plan) for key, plan in json.loads(agreed_text(text, device))}
