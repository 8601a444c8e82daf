"""The accelerated network: the model itself, seen with another ``forward``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from clicktrain.compiler.lower import Lowered, lower
from clicktrain.compiler.plan import LoweringPlan
from clicktrain.compiler.trace import Traced, TraceError, trace
from clicktrain.compiler.units import packed_type
from clicktrain.kernels.native import KernelError, missing_toolchain, toolchain
from clicktrain.kernels.native.failure import summary, watch_failures
from clicktrain.kernels.sparse_conv2d import PackedConv2d

_NONE = Lowered(fx.GraphModule(nn.Module(), fx.Graph()), ())
"""Stands for inputs that cannot be lowered."""
_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class Accelerated(nn.Module):
    """A view of a model: its parameters, buffers, layers, hooks and mode, and a lowered ``forward``.

    There is one set of tensors: training either trains both, and ``state_dict`` has the model's keys. The
    forward pass is lowered anew when the size of the images, the number type or the layers change, always by
    the same plan. It is the model's own, for that call, while hooks watch layers that lowering has fused,
    when the model is not on the CPU, when its packed layers are of a type that has no kernels, under
    ``torch.jit.trace``, and when it is called in another way than the example was; and always where there is
    no C compiler.

    Attributes:
        plan: what was decided, layer by layer.
    """

    plan: LoweringPlan

    def __init__(self, model: nn.Module, plan: LoweringPlan, inputs: int = 1) -> None:
        """Make a view; `accelerate` makes plans that fit.

        Args:
            model: with packed convolutions.
            plan: choices by layer; layers that it does not name run as they were.
            inputs: positional arguments of a call that is lowered.
        """
        mode = model.training
        object.__setattr__(self, "_base", model)
        super().__init__()
        for table in _SHARED:
            if table in model.__dict__:
                self.__dict__[table] = model.__dict__[table]
        self.training = mode
        self.plan = plan
        self._inputs = inputs
        self._lowered: dict[Any, Lowered] = {}
        self._entered: Sequence[nn.Module] = ()
        self._names = list(inspect.signature(model.forward).parameters)

    @property
    def base(self) -> nn.Module:
        """The model that this is a view of."""
        model: nn.Module = self.__dict__["_base"]
        return model

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
        """What the model computes."""
        if kwargs:
            args, kwargs = self._positional(args, kwargs)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self.base.forward(
                *args, **kwargs
            )  # its sizes are no numbers, and pointers are not recorded
        if kwargs or len(args) != self._inputs or not all(isinstance(x, Tensor) and x.dim() for x in args):
            return self.base.forward(*args, **kwargs)
        lowered = self._lowered.get(self._key(args))
        if lowered is None or not lowered.current():
            if self._elsewhere(args):
                return self.base.forward(*args)
            lowered = self._lower(args)
        if lowered is _NONE or lowered.hooked():
            return self.base.forward(*args)
        return lowered.run.forward(*args)

    def graph(self, *args: Tensor) -> fx.GraphModule:
        """The lowered graph that a call with these inputs runs, for looking at."""
        return self._lower(args).run

    def prepare(self, traced: Traced, args: tuple[Tensor, ...]) -> None:
        """Lower, and build all kernels, for calls with inputs as they were traced."""
        if traced.by_mode:
            self._entered = [self.base.get_submodule(path) for path in traced.entered]
        lowered = lower(traced, self.plan, self._dtype())
        if not self._lowered and lowered.plan is not None:
            self.plan = lowered.plan
        self._lowered[self._key(args)] = lowered

    def __getattr__(self, name: str) -> Any:
        """What the view does not have itself is the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the model and the plan; they lower again when they are called."""
        return Accelerated, (self.base, self.plan, self._inputs)

    def _lower(self, args: tuple[Tensor, ...]) -> Lowered:
        shapes = [list(x.shape) for x in args]
        try:
            # A pickle may come to where there is no compiler, a model be given another number type.
            reason = refusal(self.base, args)
            if reason and toolchain() is not None:
                warnings.warn(f"inputs of {shapes} run without acceleration: {reason}", stacklevel=4)
                return _NONE  # for this call: the type may change back
            if reason:
                raise TraceError(reason)
            with watch_failures() as failures:
                self.prepare(trace(self.base, args), args)
            if failures:
                text = f"inputs of {shapes} run partly without acceleration: {summary(failures)}"
                warnings.warn(text, stacklevel=4)
        except (TraceError, KernelError) as error:
            warnings.warn(f"inputs of {shapes} run without acceleration: {error}", stacklevel=4)
            self._lowered[self._key(args)] = _NONE
        return self._lowered[self._key(args)]

    def _key(self, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (*((x.shape[1:], x.dtype) for x in args), *(module.training for module in self._entered))

    def _dtype(self) -> torch.dtype:
        return packed_type(self.base)

    def _elsewhere(self, args: tuple[Tensor, ...]) -> bool:
        """Whether there is nothing to lower: another device, or no images to find shapes with."""
        parameter = next(self.base.parameters(), args[0])
        return {args[0].device.type, parameter.device.type} != {"cpu"} or args[0].shape[0] == 0

    def _positional(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments in the order of ``forward`` as far as they go."""
        kwargs = dict(kwargs)
        for name in self._names[len(args) : self._inputs]:
            if name not in kwargs:
                break
            args = (*args, kwargs.pop(name))
        return args, kwargs


def refusal(model: nn.Module, inputs: tuple[Any, ...]) -> str | None:
    """Why nothing can be accelerated at all."""
    if toolchain() is None:
        return missing_toolchain()
    tensors = [x for x in (*inputs, *model.parameters()) if isinstance(x, Tensor)]
    elsewhere = [x.device for x in tensors if x.device.type != "cpu"]
    if elsewhere:
        return f"it or its example is on {elsewhere[0]}, the sparse kernels are for CPUs"
    packed = {m.values.dtype for m in model.modules() if isinstance(m, PackedConv2d)}
    wrong = packed - {torch.float32, torch.float64}
    if wrong or len(packed) > 1:
        return "its packed layers are not all float32, or all float64"
    return None
