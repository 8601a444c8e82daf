"""A copy of a model to experiment with: whatever is done to it, the model does not notice.

``copy.deepcopy`` is not that copy: it fails on stored activations, and it would copy a trainer, a data set or
a pruner that a module happens to refer to. Here parameters, buffers, tensors, plain values, containers and
random generators are copied; other objects are shared; hooks of the user are left out.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from dataclasses import fields, is_dataclass
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("torch.", "clicktrain.")
_BUDGET = 1000
"""Objects that one attribute of a module may hold to be copied."""


def working_copy(model: nn.Module, *, tensors: bool = True) -> nn.Module:
    """The same network with tensors, attributes and modes of its own, and without hooks of the user.

    Class and paths are the same; objects that are not values (a trainer, a logger) are the model's own.
    ``tensors=False`` shares parameters and buffers with the model.
    """
    memo: dict[int, Any] = {}
    modules = list(model.modules())
    for module in modules:
        # A scripted module keeps its state in C++ and stays the same object.
        scripted = isinstance(module, torch.jit.ScriptModule)
        memo[id(module)] = module if scripted else type(module).__new__(type(module))
    # Tensors first: an attribute may refer to a parameter.
    for module in modules:
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None and id(tensor) not in memo:
                    memo[id(tensor)] = _tensor(tensor) if tensors else tensor
    for module in modules:
        if not isinstance(module, torch.jit.ScriptModule):
            memo[id(module)].__dict__.update(_attributes(module, memo))
    result: nn.Module = memo[id(model)]
    return result


def users_hook(hook: Any) -> bool:
    """Whether a hook is the user's own, not part of how PyTorch or this package compute something."""
    return not _home(hook).startswith(_OWN)


def _home(hook: Any) -> str:
    return f"{getattr(hook, '__module__', None) or type(hook).__module__}."


def users_hooks(module: nn.Module) -> bool:
    """Whether the user watches or changes what a module gets or gives."""
    tables = (getattr(module, name, None) for name in HOOK_TABLES)
    return any(users_hook(hook) for table in tables if table for hook in table.values())


def _attributes(module: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            attributes[name] = type(value)((key, memo.get(id(item), item)) for key, item in value.items())
        elif name in HOOK_TABLES:
            # PyTorch's own compute weights (weight norm); this package's watch the model, not its copies.
            attributes[name] = OrderedDict(
                (k, hook) for k, hook in value.items() if _home(hook).startswith("torch.")
            )
        else:
            attributes[name] = copied(value, memo)
    return attributes


def _tensor(tensor: Tensor) -> Tensor:
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        return tensor
    with torch.no_grad():
        twin = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
    else:
        twin.requires_grad_(tensor.requires_grad)
    twin.__dict__.update(tensor.__dict__)
    return twin


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A value with contents of its own where it consists of plain things, else the value itself."""
    if id(value) in memo:
        return memo[id(value)]
    budget = [_BUDGET]
    if not _plain(value, memo, budget):
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # whatever a user's __deepcopy__ does
        return value


def _plain(value: Any, memo: dict[int, Any], budget: list[int]) -> bool:
    """Whether all inside can be copied; fills in the copies of tensors and modules on the way."""
    budget[0] -= 1
    if budget[0] < 0:
        return False
    if id(value) in memo or value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return True
    if isinstance(value, Tensor):
        memo[id(value)] = _tensor(value)
        return True
    if isinstance(value, torch.Generator):
        memo[id(value)] = value.clone_state()
        return True
    if isinstance(value, (type, FunctionType, torch.dtype, torch.device, torch.Size, random.Random)):
        return True
    if type(value).__module__.partition(".")[0] == "numpy":
        return True
    if isinstance(value, MethodType):
        return id(value.__self__) in memo
    if isinstance(value, dict):
        return all(_plain(k, memo, budget) and _plain(v, memo, budget) for k, v in list(value.items()))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return all(_plain(item, memo, budget) for item in list(value))
    known = is_dataclass(value) or isinstance(value, SimpleNamespace) or _is_record(value)
    return known and all(_plain(item, memo, budget) for item in contents(value).values())


def contents(value: Any) -> dict[str, Any]:
    """Attributes of an object by name, those in slots of a dataclass included."""
    slots = fields(value) if is_dataclass(value) else ()
    return {
        **{field.name: getattr(value, field.name) for field in slots if hasattr(value, field.name)},
        **getattr(value, "__dict__", {}),
    }


def _is_record(value: Any) -> bool:
    """An instance of a plain class of the user's: all its state is in ``__dict__``."""
    kind = type(value)
    special = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__deepcopy__", "__slots__")
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, nn.Module)
        and all(getattr(kind, name, None) is getattr(object, name, None) for name in special)
        and not f"{kind.__module__}.".startswith((*_OWN, "builtins.", "logging.", "threading."))
    )
