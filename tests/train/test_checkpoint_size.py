"""After pruning a checkpoint, and what a method holds in memory, are smaller by what pruning saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import run
from torch import Tensor

from clicktrain.methods import METHODS, Method
from clicktrain.train import Prepared, RunConfig, RunFolder, Silent
from clicktrain.train.checkpoint import load_checkpoint

BESIDE_WEIGHTS = 24 * 1024
"""Bytes of a checkpoint that pruning does not shrink: events, plans and settings as text, the first layer."""

RUN: dict[str, Any] = {
    "model": "tiny_networks:medium", "epochs": 4, "batch_size": 256, "threads": 1, "learning_rate": 0.02,
    "operators": "reference", "evaluate_every": 4,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {},
    "clicktrain": {"compression": 8},
    "prunetrain": {"target_parameters": 0.5, "interval": 1},
    "campfire": {"sparsity": 0.8},
    "pat": {"prune_ratio": 0.5},
    "dsr": {"sparsity": 0.8},
    "rigl": {"sparsity": 0.9},
    "granet": {"sparsity": 0.8},
    "mest": {"sparsity": 0.9},
    "gmp": {"sparsity": 0.8},
    "nm": {},
    "admm-patterns": {"compression": 8},
    "clicktrain-gradual": {"compression": 8},
    "prunetrain-clicktrain": {"coefficient": 0.03},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, SETTINGS[name]) for name in METHODS},
    "clicktrain-epi-masked": ("clicktrain", {"compression": 8, "trigger": "epi", "packed": False}),
    "campfire-taylor-epi": ("campfire", {"sparsity": 0.8, "criterion": "taylor", "trigger": "epi"}),
    "campfire-masked-average": ("campfire", {"sparsity": 0.8, "packed": False, "ema_decay": 0.9}),
    "rigl-masked-adamw": ("rigl", {"sparsity": 0.9, "packed": False, "optimizer": "adamw"}),
    "clicktrain-adamw-average": ("clicktrain", {"compression": 8, "optimizer": "adamw", "ema_decay": 0.9}),
    "pat-rewind": ("pat", {"prune_ratio": 0.5, "rewind": True}),
}


class Watch(Silent):
    """Keeps the run's own objects."""

    def start(self, config: RunConfig, method: Method[Any], prepared: Prepared) -> None:
        self.prepared = prepared


def held_bytes(value: Any) -> int:
    """Of all tensors in a method's state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            if field.name not in ("found", "latency"):  # views of the network itself
                yield from tensors_in(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def last_checkpoint(path: Path) -> Path:
    return RunFolder(path).checkpoints()[-1]


@pytest.fixture(scope="module")
def dense_bytes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, float], int]:
    """Of the dense network's last checkpoint, by optimizer and moving average."""
    sizes = {}
    for kind in (("sgd", 0.0), ("adamw", 0.0), ("sgd", 0.9), ("adamw", 0.9)):
        path = tmp_path_factory.mktemp("dense") / "run"
        run(path, {**RUN, "method": "dense", "epochs": 1, "optimizer": kind[0], "ema_decay": kind[1]})
        sizes[kind] = last_checkpoint(path).stat().st_size
    return sizes


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a dense run."""
    path = tmp_path_factory.mktemp("trained") / "run"
    run(path, {**RUN, "method": "dense", "epochs": 1})
    return str(path)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_checkpoint_shrinks_with_the_network(
    tmp_path: Path, dense_bytes: Mapping[tuple[str, float], int], trained: str, name: str
) -> None:
    method, settings = VARIANTS[name]
    if METHODS[method]().expects_trained:
        settings = {**settings, "initial_weights": trained}
    watch = Watch()
    summary = run(tmp_path / "run", {**RUN, "method": method, **settings}, watch)
    pruner = watch.prepared.pruner
    share = summary["nonzero_parameters"] / summary["dense_parameters"]
    assert share < 0.75 or method == "dense"
    whole = dense_bytes[settings.get("optimizer", "sgd"), settings.get("ema_decay", 0.0)]
    bits = sum(mask.numel() for mask in pruner.masks.values()) // 8
    assert last_checkpoint(tmp_path / "run").stat().st_size <= share * whole + bits + BESIDE_WEIGHTS
    # Axes of channels that may still go are numbers of channels; nothing is held per weight.
    assert held_bytes(pruner._state) <= 64 * sum(row["shape"][0] for row in summary["layers"])


def test_masks_are_saved_once_and_zeros_not_at_all(tmp_path: Path) -> None:
    settings = {**RUN, "method": "campfire", "sparsity": 0.8, "packed": False, "ema_decay": 0.9}
    run(tmp_path / "run", settings)
    saved = load_checkpoint(last_checkpoint(tmp_path / "run"))
    bits = saved["pruner"]["masks"]
    kept = {name: int((mask[:, None] & 2 ** torch.arange(8)).ne(0).sum()) for name, mask in bits.items()}
    assert len(kept) == 3
    for name, count in kept.items():
        weight = saved["model"][f"{name}.weight"]
        assert weight["masked_by"] == saved["average"][f"module.{name}.weight"]["masked_by"] == name
        assert weight["values"].shape == saved["average"][f"module.{name}.weight"]["values"].shape == (count,)
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    thin = {momentum["masked_by"]: momentum for momentum in momenta if isinstance(momentum, dict)}
    assert {name: len(momentum["values"]) for name, momentum in thin.items()} == kept
    assert saved["pruner"]["state"]["masks"] == {}
