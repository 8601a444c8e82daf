"""Loading a network of a finished run, or that was saved, for inference: nothing of training is imported."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.compiler import accelerate
from clicktrain.deploy.saving import VERSION
from clicktrain.errors import UserError
from clicktrain.files import parse_json
from clicktrain.formats.packed import PackedWeight
from clicktrain.formats.packed_file import read_packed
from clicktrain.formats.tree import load_tree, read_metadata
from clicktrain.kernels.pack_model import pack_model_, pack_refusals
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.models.from_facts import Factory, build_from_facts, choose_factory, load_weights_
from clicktrain.models.user_factory import call_alone
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import read_facts
from clicktrain.surgery import SAVED, apply_plans_, apply_recipe_, plans_in


def load_plain(folder: str | PathLike[str], model: Factory | None = None) -> nn.Module:
    """The network of a finished run with zeros in place; see `clicktrain.load`."""
    run = _opened(folder)
    if not run.model.exists() and run.packed.exists():
        packed, others = read_packed(run.packed)
        weights = {**others, **{name: weight.to_dense() for name, weight in packed.items()}}
        return _network(run.packed, run.surgery, model, weights, run.path)[0]
    read_facts(_metadata(run.model), run.model)  # before the weights: it says best what is wrong
    return _network(run.model, run.surgery, model, load_tree(run.model), run.path)[0]


def load_packed(path: str | PathLike[str], model: Factory | None = None) -> nn.Module:
    """Load a network from its packed weights alone: in eval mode, on the CPU, its pruned layers packed.

    Only kept values are in memory. ``clicktrain.accelerate(net, images)`` makes it fast, `clicktrain.unpack`
    plain.

    Args:
        path: ``packed.safetensors`` of a run, or the run's folder, or that of `clicktrain.save`. Beside the
            file of a run ``surgery.json`` has to lie where channels were removed.
        model: for a network of your own, its factory, as `clicktrain.load`.

    Raises:
        UserError: no such file, damaged, of a newer version, or ``model`` is missing or builds another
            network.

    Example:
        ``net = clicktrain.load_packed("runs/first/packed.safetensors")``
    """
    return _load_packed(path, model)[0]


def load_accelerated(folder: str | PathLike[str], model: Factory | None, batch: int) -> nn.Module:
    """As `load_packed`, accelerated for batches of ``batch`` images."""
    if batch < 1:
        raise UserError(f"batch is {batch}: must be at least 1")
    run = _opened(folder)
    network, facts = _load_packed(run.packed, model)
    if facts["image_shape"] is None:
        if not any(isinstance(layer, PackedLayer) for layer in network.modules()):
            return network
        raise UserError(
            f"{run.packed} does not say how large images are: give image_shape to clicktrain.save, or call "
            "clicktrain.accelerate(net, images)"
        )
    images = torch.randn(batch, *facts["image_shape"], generator=torch.Generator().manual_seed(0))
    return accelerate(network, images).eval()


def _load_packed(path: str | PathLike[str], model: Factory | None) -> tuple[nn.Module, dict[str, Any]]:
    path = Path(path)
    file = RunFolder(path).packed if path.is_dir() else path
    packed, others = read_packed(file)
    weights = {**others, **{name: weight.to_dense() for name, weight in packed.items()}}
    network, facts = _network(file, file.parent / "surgery.json", model, weights, file.parent)
    masks = _masks(packed, network)
    refused = pack_refusals(network, masks)
    pack_model_(network, {name: mask for name, mask in masks.items() if name not in refused})
    return network.eval(), facts


def _masks(packed: dict[str, PackedWeight], network: nn.Module) -> dict[str, Tensor]:
    """Kept positions by layer; of what is no layer's ``weight``, nothing."""
    parameters = dict(network.named_parameters())
    masks = {}
    for name, weight in packed.items():
        if name.endswith(".weight") and name in parameters:
            masks[name.removesuffix(".weight")] = weight.structure.mask().view(parameters[name].shape)
    return masks


def _opened(folder: str | PathLike[str]) -> RunFolder:
    """The folder of a finished run, or of `clicktrain.save`, which has one file."""
    run = RunFolder(Path(folder))
    if not run.config.exists() and run.packed.exists() and SAVED in _metadata(run.packed):
        return run
    run.open()
    run.finished()
    return run


def _metadata(file: Path) -> dict[str, str]:
    try:
        return read_metadata(file)
    except UserError as error:
        raise UserError(f"{file} is missing or damaged: {error}") from None


def _network(
    file: Path, surgery: Path, model: Factory | None, weights: Any, folder: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """The network that a file of weights describes, with these weights, and its facts."""
    metadata = _metadata(file)
    facts = _description(metadata, file) if SAVED in metadata else read_facts(metadata, file)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file} is damaged: it does not hold the weights of a network")
    if SAVED in metadata:
        network = _built(facts, model, folder)
        apply_plans_(plans_in(facts, file), network, file)
    else:
        network = build_from_facts(choose_factory(facts["model"], model, folder), facts)
        apply_recipe_(surgery, network)
    load_weights_(network, weights, file, facts["model"])
    return network.eval(), facts


def _description(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    """What `clicktrain.save` wrote about a network, checked."""
    found = parse_json(metadata[SAVED], f"{file} is damaged: its description is not JSON")
    if not isinstance(found, dict) or not isinstance(found.get("version"), int):
        raise UserError(f"{file} is damaged: its description is no record")
    if found["version"] > VERSION:
        raise UserError(
            f"{file} has version {found['version']}, this reads up to {VERSION}: update clicktrain"
        )
    arguments, shape = found.get("arguments"), found.get("image_shape")
    numbers: dict[str, Any] = {
        "num_classes": int,
        "in_channels": int,
        "width": (int, float),
        "stem": (str, type(None)),
    }
    right = isinstance(found.get("model"), str) and (
        arguments is None
        or (
            isinstance(arguments, dict)
            and all(isinstance(arguments.get(key, ()), kind) for key, kind in numbers.items())
        )
    )
    sizes = shape is None or (
        isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and 0 < n < 2**16 for n in shape)
    )
    if not right or not sizes:
        raise UserError(f"{file} is damaged: it does not say how its network is built")
    return {**found, "image_shape": shape}


def _built(description: dict[str, Any], model: Factory | None, folder: Path) -> nn.Module:
    """The network as it was before channels were removed, with fresh weights."""
    factory = choose_factory(description["model"], model, folder)
    if description["arguments"] is None:
        return call_alone(factory)
    return build_from_facts(factory, description["arguments"])
