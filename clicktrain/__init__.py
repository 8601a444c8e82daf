"""clicktrain: train and prune convolutional networks in one run.

Two lines in an existing loop::

    pruner = clicktrain.ClickTrain(compression=10).attach(model, optimizer, epochs=90, steps_per_epoch=n)
    ...
    loss.backward()
    pruner.observe(loss)
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from clicktrain.accounting import ModelCost, compression_ratio, count
    from clicktrain.compiler import accelerate
    from clicktrain.deploy.loading import load_packed
    from clicktrain.deploy.own_network import export
    from clicktrain.deploy.saving import save
    from clicktrain.errors import UserError
    from clicktrain.kernels.pack_model import pack, unpack
    from clicktrain.methods import *  # noqa: F403 - every method, as `__getattr__` finds them
    from clicktrain.models import create_model
    from clicktrain.surgery import load_pruned

__version__ = "0.1.0"

__all__ = [
    "ModelCost",
    "UserError",
    "accelerate",
    "compression_ratio",
    "count",
    "create_model",
    "export",
    "load",
    "load_packed",
    "load_pruned",
    "pack",
    "save",
    "unpack",
]

_HOME = {
    "ModelCost": "clicktrain.accounting",
    "UserError": "clicktrain.errors",
    "accelerate": "clicktrain.compiler",
    "compression_ratio": "clicktrain.accounting",
    "count": "clicktrain.accounting",
    "create_model": "clicktrain.models",
    "export": "clicktrain.deploy.own_network",
    "load_packed": "clicktrain.deploy.loading",
    "load_pruned": "clicktrain.surgery",
    "pack": "clicktrain.kernels.pack_model",
    "save": "clicktrain.deploy.saving",
    "unpack": "clicktrain.kernels.pack_model",
}


def load(
    folder: str | PathLike[str],
    model: str | Callable[..., nn.Module] | None = None,
    *,
    batch: int | None = None,
) -> nn.Module:
    """Load the network of a finished run or of `save`: a plain module on the CPU, in eval mode.

    With ``batch`` it is ready for fast inference: its kept weights alone are loaded, and it is accelerated
    for batches of this size (`accelerate`) where there is something sparse in it. Of the folder's two files
    of weights one is enough; ``packed.safetensors`` is the small one.

    Loading runs no code that a file names. A network of the zoo needs nothing; one of your own is built by
    the factory that you give here.

    Args:
        folder: of the run, or the one that was given to `save`.
        model: for a network of your own, its factory, or ``package.module:factory``; it is called with those
            of num_classes, in_channels and width that it takes, for the folder of `save` without any.
        batch: images of a call, at which operators are measured.

    Raises:
        UserError: not such a folder, damaged, of a newer version; or the run is of a network
            of somebody's own and ``model`` is missing or builds another network.

    Example:
        ``net = clicktrain.load("runs/first")``, ``net = clicktrain.load("runs/mine", model=MyNetwork)``,
        ``net = clicktrain.load("runs/first", batch=64)``
    """
    from clicktrain.deploy.loading import load_accelerated, load_plain

    return load_plain(folder, model) if batch is None else load_accelerated(folder, model, batch)


def __getattr__(name: str) -> Any:
    """Load public names when they are first used, so that ``import clicktrain`` stays light."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    # ``from clicktrain import wording`` asks here first, and must not bring torch.
    module = name.startswith("_") or find_spec(f"clicktrain.{name}") is not None
    if not module and name in (methods := import_module("clicktrain.methods")).__all__:
        return getattr(methods, name)
    raise AttributeError(f"module 'clicktrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, those of the methods among them."""
    return sorted({*globals(), *__all__, *import_module("clicktrain.methods").__all__})
