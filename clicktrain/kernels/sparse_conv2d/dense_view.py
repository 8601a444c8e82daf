"""The dense weight of a packed layer, for code of the user's that reads ``conv.weight``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clicktrain.errors import UserError

READ_ONLY = (
    "the weight of a packed layer can be read but not written: change its values, or unpack the model "
    "first (clicktrain.unpack)"
)
_KEEP = ("__get__", "detach")
_WRITES = ("__setitem__", "__set__", "__delete__", "__delitem__")


class DenseView(Tensor):
    """A dense weight with zeros in place; gradients of what is computed with it flow to the packed values.

    Each access builds one, so that writing into it would be lost: that is a UserError. What is computed from
    it is a plain tensor.
    """

    dense_gradient: Callable[[], Tensor | None] | None = None

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """The dense gradient of the packed values, zero where there are none; None if there is none."""
        return None if self.dense_gradient is None else self.dense_gradient()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return _plain(self).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what writes into the view; compute everything else with plain tensors."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if _writes(name, args, kwargs):
            raise UserError(READ_ONLY)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            same = name in _KEEP and isinstance(result, Tensor) and isinstance(args[0], DenseView)
            return result.as_subclass(DenseView) if same and result.shape == args[0].shape else result


def _plain(view: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return view.detach().as_subclass(Tensor)


def _writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if isinstance(kwargs.get("out"), DenseView):
        return True
    into = bool(args) and isinstance(args[0], DenseView)
    in_place = name.endswith("_") and not name.endswith("__") and not name.startswith("_")
    assigned = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return into and (in_place or assigned or name in _WRITES)
