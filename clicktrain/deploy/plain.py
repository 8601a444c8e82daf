"""The network itself, out of whatever holds it: unpacked, without its fast view, on the CPU."""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

from clicktrain.compiler import Accelerated
from clicktrain.errors import UserError
from clicktrain.kernels.pack_model import unpack


def plain_copy(model: nn.Module, what: str) -> nn.Module:
    """A copy in evaluation mode on the CPU; the network that was given stays as it is.

    Raises:
        UserError: it is a wrapper around the network; ``what`` names the function for the message.
    """
    return unpack(itself(model, what)).cpu().eval()


def itself(model: nn.Module, what: str) -> nn.Module:
    """The network without its fast view; errors as `plain_copy`."""
    if isinstance(model, Accelerated):
        model = model.base
    if hasattr(model, "_orig_mod"):
        raise UserError(f"{what} takes the network itself, not a compiled one: give model._orig_mod")
    if isinstance(model, AveragedModel) or type(model).__module__.startswith("torch.nn.parallel"):
        raise UserError(
            f"{what} takes the network itself, not the {type(model).__name__} around it: give model.module"
        )
    if not isinstance(model, nn.Module):
        raise UserError(f"{what} takes a network, not a {type(model).__name__}")
    return model
