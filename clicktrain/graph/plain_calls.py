"""A model as it is written, whatever its calls go to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def plain_calls(model: nn.Module) -> Iterator[None]:
    """``model(x)`` runs the model's own code inside: not what ``model.compile()`` or ``attach`` put there."""
    own = model.__dict__.pop("_compiled_call_impl", None)
    try:
        yield
    finally:
        if own is not None:
            model.__dict__["_compiled_call_impl"] = own
