"""The accelerated network: a view of the model with another ``forward``."""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

from clicktrain.compiler.believe import LoweringError, believed_lowering, is_operator
from clicktrain.compiler.fallback import accelerate_layers_
from clicktrain.compiler.lower import Lowered
from clicktrain.compiler.plan import LoweringPlan
from clicktrain.compiler.units import packed_type
from clicktrain.errors import UserError
from clicktrain.graph import Inputs, ModelGraph, is_plain
from clicktrain.graph.faithful import Believed, ExampleError, UnfaithfulError, believed_graph
from clicktrain.kernels.impls import candidates_for
from clicktrain.kernels.native import KernelError, missing_toolchain, toolchain
from clicktrain.kernels.native.failure import summary, watch_failures
from clicktrain.kernels.sparse_conv2d import PackedConv2d, PackedLayer
from clicktrain.kernels.sparse_conv2d.api import OPERATOR

_LOCK = threading.RLock()
"""A process lowers one network at a time; calls that need no lowering do not wait."""
_VARIANTS = 8
"""Lowered graphs that are kept for one kind of call: for modes, and values that ``forward`` read."""
_CHANGES = 3
"""Changes of a value after which it is not treated as a constant any more."""
_SHARED = vars(nn.Module()).keys() - {"training", "_is_full_backward_hook"}
"""Tables of parameters, buffers, modules and hooks."""


class Accelerated(nn.Module):
    """A view of a model: its parameters, buffers, layers, hooks and mode, and a lowered ``forward``.

    There is one set of tensors: training either trains both, and ``state_dict`` has the model's keys. The
    forward pass is lowered again, by the same plan, and compared with the model's own again, when the size of
    the images changes, the kind of arguments, the dtype, the layers, the mode if ``forward`` asks for it, or
    a value that ``forward`` reads, wherever it is kept. Where positions of packed layers move, kernels get
    other tables and all else stays. It is the model's own, for that call, while hooks
    watch layers that lowering has fused, when the model is not on the CPU, when its packed layers are of a
    dtype that has no kernels, and under ``torch.jit.trace`` and ``torch.export``; and always where there is
    no C compiler, or where nothing else does what it does (see `accelerate`). Threads may call it at once.

    Attributes:
        plan: what was decided, layer by layer.
    """

    plan: LoweringPlan

    def __init__(
        self, model: nn.Module, plan: LoweringPlan, rule: str = "density", *, lowers: bool = True
    ) -> None:
        """Make a view; `accelerate` makes plans that fit.

        ``rule`` is for layers inside modules that turn out to run as they are written; without ``lowers`` the
        model's own ``forward`` always runs.
        """
        mode = model.training
        object.__setattr__(self, "_base", model)
        super().__init__()
        for table in _SHARED:
            if table in model.__dict__:
                self.__dict__[table] = model.__dict__[table]
        self.training = mode
        own = self.__dict__
        own.update(plan=plan, _rule=rule, _lowers=lowers, _lowered={}, _reported=set(), _left={}, _changes={})
        own["_names"] = [
            name
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]

    @property
    def base(self) -> nn.Module:
        """The model that this is a view of."""
        model: nn.Module = self.__dict__["_base"]
        return model

    @property
    def active(self) -> bool:
        """Whether anything runs otherwise than the model's own code does."""
        return bool(self._lowers) or any(choice.implementation for choice in self.plan.choices)

    @property
    def training(self) -> bool:
        """The model's own flag."""
        return self.base.training

    @training.setter
    def training(self, mode: bool) -> None:
        self.base.training = mode

    def train(self, mode: bool = True) -> Accelerated:
        """As the model does it: it may keep some layers in another mode."""
        self.base.train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the model does."""
        if not self._lowers or _recording():
            # Tracing has sizes that are no numbers, and does not record pointers.
            return self.base.forward(*args, **kwargs)
        inputs = Inputs(*self._positional(args, kwargs))
        key, tensors = _kind_of(inputs)
        if key is None:
            return self.base.forward(*args, **kwargs)
        lowered = self._known(key)
        if lowered is None:
            if self._elsewhere(tensors):
                return self.base.forward(*args, **kwargs)
            lowered = self._lower(inputs, key)
        if lowered is None or lowered.hooked() or not lowered.collects():
            return self.base.forward(*args, **kwargs)
        return lowered.run.forward(*tensors)

    def graph(self, *args: Any, **kwargs: Any) -> fx.GraphModule:
        """The lowered graph of such a call, for looking at; UserError if it runs the model's own code."""
        inputs = Inputs(*self._positional(args, kwargs))
        lowered = self._lower(inputs, _kind_of(inputs)[0]) if self._lowers else None
        if lowered is None:
            raise UserError(
                f"{type(self.base).__name__} runs its own code for these inputs: no graph does the same"
            )
        return lowered.run

    def adopt(self, believed: Believed, inputs: Inputs) -> Lowered:
        """Lower a graph for calls like this one, build kernels, compare; LoweringError if it differs."""
        graph = believed.graph
        inside = [path for path in graph.opaque if holds_packed(self.base.get_submodule(path))]
        for path in inside:
            accelerate_layers_(self.base, graph.inputs, self._rule, below=path)
        if not self._lowered:
            accelerate_layers_(self.base, graph.inputs, self._rule, lowered=PackedConv2d)
        lowered = believed_lowering(believed, self.plan, packed_type(self.base))
        if not self._lowered and lowered.plan is not None:
            self.__dict__["plan"] = lowered.plan
        self._warn_of_opaque(graph)
        key, _ = _kind_of(Inputs(*self._positional(inputs.args, dict(inputs.kwargs))))
        # A new tuple: other threads may be reading the old one.
        self._lowered[key] = (lowered, *(old for old in self._lowered.get(key, ())[: _VARIANTS - 1]))
        return lowered

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Attributes are the model's: its ``forward`` reads them there."""
        if name in self.__dict__ or isinstance(getattr(type(self), name, None), property):
            super().__setattr__(name, value)
        else:
            setattr(self.base, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.base, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the model and the plan; they lower again when they are called."""
        return functools.partial(Accelerated, lowers=self._lowers), (self.base, self.plan, self._rule)

    def _known(self, key: Any) -> Lowered | None:
        lowered: tuple[Lowered, ...] = self._lowered.get(key, ())
        return next((one for one in lowered if one.current()), None)

    def _lower(self, inputs: Inputs, key: Any) -> Lowered | None:
        """Lower for calls of this kind; None where the model's own code has to run, now or always."""
        # The graph of a first call under inference mode has to serve training later.
        with _LOCK, torch.inference_mode(False):
            inputs = inputs.ordinary()
            lowered = self._known(key)
            if lowered is not None or not self._lowers:
                return lowered
            # A pickle may come to where there is no compiler, a model be given another dtype.
            reason = refusal(self.base, inputs.tensors())
            if reason is not None:
                self._warn(f"inputs of {_shapes(inputs)} run without acceleration: {reason}")
                object.__setattr__(self, "_lowers", toolchain() is not None)
                return None  # for this call: the dtype may change back
            self._leave_out_what_changes(key)
            try:
                believed = believed_graph(
                    self.base, inputs, is_operator, all_modes=not self._lowered, own=self._left
                )
                with watch_failures() as failures:
                    lowered = self.adopt(believed, inputs)
                if failures:
                    self._warn(f"inputs of {_shapes(inputs)} run partly unaccelerated: {summary(failures)}")
                return lowered
            except ExampleError:
                return None  # the model's own code says best what is wrong
            except (UnfaithfulError, LoweringError, KernelError) as error:
                lowered_badly = isinstance(error, LoweringError)
                kind = "" if not lowered_badly else "computes something else when it is lowered: "
                self._warn(
                    f"{type(self.base).__name__} {kind}{error}: it runs as it is written from here on, "
                    "its packed layers one by one"
                )
                accelerate_layers_(self.base, inputs, self._rule)
                self.__dict__["_lowers"] = False
                return None

    def _leave_out_what_changes(self, key: Any) -> None:
        """Have modules that read a value which changes at every call run as they are written."""
        for lowered in self._lowered.get(key, ())[:1]:
            for read in lowered.guards.changed():
                name = (read.path, read.name)
                self._changes[name] = self._changes.get(name, 0) + 1
                if self._changes[name] > _CHANGES and read.name != "training":
                    self._left[read.reader] = f"reads {read.name}, which changes between calls"

    def _warn_of_opaque(self, graph: ModelGraph) -> None:
        new = {path: why for path, why in graph.opaque.items() if path not in self._reported}
        self._reported.update(new)
        if not new:
            return
        named = "; ".join(f"{path} {why}" for path, why in new.items())
        self._warn(f"{named}: run as written, and packed layers inside run one by one")

    def _warn(self, message: str) -> None:
        warnings.warn(message, stacklevel=5)

    def _elsewhere(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether there is nothing to lower: another device, or no images to find shapes with."""
        parameter = next(self.base.parameters(), tensors[0])
        devices = {tensors[0].device.type, parameter.device.type}
        return (
            len(devices) > 1
            or bool(_unsupported(devices))
            or any(x.dim() > 0 and x.shape[0] == 0 for x in tensors)
        )

    def _positional(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments in the order of ``forward`` as far as they go."""
        if not kwargs:
            return args, kwargs
        kwargs = dict(kwargs)
        for name in self._names[len(args) :]:
            if name not in kwargs:
                break
            args = (*args, kwargs.pop(name))
        return args, kwargs


def _kind_of(inputs: Inputs) -> tuple[Any, tuple[Tensor, ...]]:
    """The key of calls that can share one lowered graph, None for those that cannot; and their tensors."""
    if not inputs.kwargs and all(type(x) is Tensor and x.dim() for x in inputs.args):
        return tuple((x.shape[1:], x.dtype, _strange(x)) for x in inputs.args), inputs.args
    parts: list[Any] = []
    tensors = []
    for place, leaf in inputs.leaves():
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
            parts.append((place, leaf.shape[1:], leaf.dtype, leaf.dim(), _strange(leaf)))
        elif is_plain(leaf):
            parts.append((place, type(leaf), repr(leaf)))
        else:
            return None, ()
    return (tuple(parts) if tensors else None), tuple(tensors)


def _recording() -> bool:
    """Whether PyTorch records calls: for ``torch.jit.trace`` or ``torch.export``."""
    exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # torch >= 2.7
    return bool(torch.jit.is_tracing() or exporting())  # type: ignore[attr-defined, no-untyped-call]


def _strange(x: Tensor) -> bool:
    """Whether a tensor lies in another memory format: random numbers are drawn in the order of memory."""
    return not x.is_contiguous()


def _shapes(inputs: Inputs) -> list[list[int]]:
    return [list(x.shape) for x in inputs.tensors()]


def holds_packed(model: nn.Module) -> bool:
    """Whether any layer of a model is packed."""
    return any(isinstance(module, PackedLayer) for module in model.modules())


def _unsupported(devices: set[str]) -> list[str]:
    impls = candidates_for(OPERATOR)
    return sorted(one for one in devices if not any(not i.devices or one in i.devices for i in impls))


def refusal(model: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    """Why nothing can be accelerated at all; None if something can."""
    tensors = [x for x in (*inputs, *model.parameters()) if isinstance(x, Tensor)]
    devices = {x.device.type for x in tensors}
    if toolchain() is None and devices <= {"cpu"}:
        return missing_toolchain()
    if elsewhere := _unsupported(devices):
        able = dict.fromkeys(device for impl in candidates_for(OPERATOR) for device in impl.devices)
        names = " and ".join({"cpu": "CPUs", "cuda": "GPUs"}.get(device, device) for device in able)
        return f"it or its example is on {elsewhere[0]}, the sparse kernels are for {names}"
    if len(devices) > 1:
        return f"it and its example are on {' and '.join(sorted(devices))}"
    packed = {m.values.dtype for m in model.modules() if isinstance(m, PackedLayer)}
    wrong = packed - {torch.float32, torch.float64}
    if wrong or len(packed) > 1:
        return "its packed layers are not all float32, or all float64"
    return None
