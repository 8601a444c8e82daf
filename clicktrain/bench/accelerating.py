"""`accelerate` where only kernels count: what cannot be built is an error there, not another operator."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from clicktrain.compiler import accelerate
from clicktrain.errors import UserError
from clicktrain.kernels.native import missing_toolchain, toolchain
from clicktrain.kernels.native.failure import summary, watch_failures


def accelerated(model: nn.Module, example: Tensor, **settings: Any) -> nn.Module:
    """`accelerate` with the same arguments, its other warnings included.

    Raises:
        UserError: there is no C compiler that works, or it fails on a kernel.
    """
    need_compiler()
    with watch_failures() as failures, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = accelerate(model, example, **settings)
    if failures:
        raise UserError(f"there would be nothing to compare: {summary(failures)}")
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return fast


def need_compiler() -> None:
    """Raise UserError unless kernels can be built."""
    if toolchain() is None:
        raise UserError(f"the sparse kernels cannot be built: {missing_toolchain()}")
