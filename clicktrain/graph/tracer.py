"""The one symbolic tracer: ``torch.fx``, with a record of what a forward pass did that no graph holds."""

from __future__ import annotations

import builtins
import contextlib
import inspect
import operator
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from clicktrain.graph.inputs import Inputs
from clicktrain.graph.random_state import random_state, same_random_state
from clicktrain.graph.watch import Watch

IsLeaf = Callable[[nn.Module], bool]
FX_LOCK = threading.RLock()
"""``torch.fx`` and `Watch` patch classes of PyTorch while they trace: one trace at a time in a process."""


def _recorded(assignment: Callable[..., Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(proxy: fx.Proxy, other: Any) -> fx.Proxy:
        return proxy.tracer.create_proxy("call_function", assignment, (proxy, other), {})

    return record


class Proxy(fx.Proxy):
    """Augmented assignments are recorded as such: ``x += y`` writes into x, unlike ``x + y``."""

    __iadd__ = _recorded(operator.iadd)
    __isub__ = _recorded(operator.isub)
    __imul__ = _recorded(operator.imul)
    __itruediv__ = _recorded(operator.itruediv)

    def __len__(self) -> int:
        """Length of a parameter or buffer, whose shape is known; the graph shows that it was read."""
        if self.node.op != "get_attr":
            return super().__len__()
        self.tracer.create_proxy("call_method", "size", (self, 0), {})
        module: Any = self.tracer.root  # type: ignore[attr-defined]
        *path, name = str(self.node.target).split(".")
        for part in path:
            module = module._modules[part]
        # From the tables: an attribute would be a stand-in again.
        return len(module._parameters[name] if name in module._parameters else module._buffers[name])


class Tracer(fx.Tracer):
    """Traces one call of a model; without inputs, a call with stand-ins for all arguments.

    Attributes:
        failed: path of the innermost module whose ``forward`` raised, "" for the model's own.
        entered: paths of the modules that were traced through, in the order in which they returned.
        watch: what ``forward`` read and did; there once tracing has begun.
    """

    proxy_buffer_attributes = True
    watch: Watch

    def __init__(self, inputs: Inputs | None, leaves: IsLeaf, opaque: Iterable[str]) -> None:
        super().__init__()
        self._inputs, self._leaves, self._opaque = inputs, leaves, frozenset(opaque)
        self._thread = threading.get_ident()
        self._running: list[str] = [""]
        self.failed = ""
        self.entered: list[str] = [""]

    def trace_call(self, model: nn.Module) -> fx.Graph:
        """The graph of ``model(*args, **kwargs)``: one placeholder for each tensor of the inputs.

        The model is a working copy; its ``forward`` runs once on stand-ins for tensors.
        """
        with FX_LOCK:
            paths = {module: path for path, module in model.named_modules()}
            self.watch = Watch(paths, lambda: self._running[-1])
            self._surroundings = _surroundings()
            self._random = random_state()
            with self.watch.watching(), _lengths_recorded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                graph = self.trace(model)
            self._look_at_random()
        return graph

    def release(self) -> None:
        """Forget the copy that was traced: tracer, watch and stand-ins refer to each other."""
        self.root = nn.Module()
        self.tensor_attrs = {}
        self.watch.forget()

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the tensors, and ``forward`` as a function of them."""
        if self._inputs is None:
            return self._stand_ins()
        names: set[str] = set()
        proxies = []
        forward: Any = self.root.forward
        parameters = list(inspect.signature(forward).parameters)
        for place, leaf in self._inputs.leaves():
            if isinstance(leaf, torch.Tensor):
                first, _, rest = place.partition(".")
                first = parameters[int(first)] if first.isdigit() and int(first) < len(parameters) else first
                name = "_".join(part for part in (first, *rest.split(".")) if part)
                name = name if name.isidentifier() and name not in names else f"input_{len(names)}"
                names.add(name)
                proxies.append(self.create_proxy("placeholder", name, (), {}))
        inputs = self._inputs

        def run(root: nn.Module, *tensors: Any) -> Any:
            return inputs.with_tensors(tensors).call(root.forward)

        return run, [self.root, *proxies]

    def _stand_ins(self) -> tuple[Any, list[Any]]:
        """One placeholder for each argument that has no default."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        root: Any = self.root
        given = inspect.signature(root.forward).parameters.values()
        names = [one.name for one in given if one.kind in kinds and one.default is one.empty]
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def run(root: Any, *tensors: Any) -> Any:
            return root.forward(*tensors)

        return run, [self.root, *proxies]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A stand-in for a value."""
        return Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Layers of PyTorch's, what the caller named, and what has to run as it is."""
        return (
            module_qualified_name in self._opaque
            or self._leaves(m)
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A node for a leaf, else its ``forward``; other threads' calls go their own way."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._look_at_random()
        self._running.append(path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        finally:
            self._look_at_random()
            self._running.pop()
        self.entered.append(path)
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Stand-ins for parameters and buffers, in the thread that traces."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def get_fresh_qualname(self, prefix: str) -> str:
        """The attribute for a tensor that ``forward`` made."""
        name = super().get_fresh_qualname(prefix)
        self.watch.unnoticed.add(name)
        return name

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A node; notes regions in which operations mean something else."""
        if kind not in ("placeholder", "output", "get_attr"):
            for reason, now, before in zip(_REASONS, _surroundings(), self._surroundings, strict=True):
                if now != before:
                    self.watch.note(reason)
        return super().create_node(kind, target, *args, **kwargs)

    def _look_at_random(self) -> None:
        """Whatever was drawn since the last look is a constant in the graph: the module that runs drew it."""
        now = random_state()
        if not same_random_state(self._random, now):
            self.watch.note("draws random numbers in forward")
        self._random = now


@contextlib.contextmanager
def _lengths_recorded() -> Iterator[None]:
    """``len(x)`` of a stand-in is its size, which ``Proxy.__len__`` could not return: it is no number."""
    plain = builtins.len

    def length(x: Any, /) -> Any:
        return x.size(0) if isinstance(x, Proxy) and x.node.op != "get_attr" else plain(x)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = plain


_REASONS = (
    "runs under torch.no_grad, or sets whether gradients are computed",
    "runs under torch.inference_mode",
    "runs under its own autocast",
    "uses torch.utils.checkpoint or other hooks on saved tensors",
)


def _surroundings() -> tuple[Any, ...]:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        top(True) is not None,
    )
