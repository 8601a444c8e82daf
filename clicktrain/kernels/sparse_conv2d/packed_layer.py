"""Layers whose parameter is their packed values: what all kinds of them have in common."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.formats.packed import Patterns, Structure, pack_values, places_in, unpack_values
from clicktrain.graph.adapters import nearest_adapter
from clicktrain.graph.exchange import exchange_, exchanged
from clicktrain.kernels.native.failure import KernelError
from clicktrain.kernels.sparse_conv2d.api import implementation
from clicktrain.kernels.sparse_conv2d.dense_gradient import DenseGradient
from clicktrain.kernels.sparse_conv2d.dense_view import READ_ONLY, DenseView

_HOOKS = [name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name]

P = TypeVar("P", bound="PackedLayer")

_COLLECTING: WeakKeyDictionary[PackedLayer, DenseGradient] = WeakKeyDictionary()
"""What collects the gradients of all weights of layers, while these are wanted. Not with the layers, where it
would be something that a forward pass changes, and be copied with them."""

PACKED_FORMS: dict[type[nn.Module], type[PackedLayer]] = {}
"""Dense layer class -> what it becomes when it is packed."""


class PackedLayer(nn.Module):
    """A pruned layer once its masks are frozen (ClickTrain stage 5), or while they move.

    Its ``state_dict`` holds ``values``, ``bias`` if there is one, and ``keep_bits`` (one bit a weight), so
    that what is loaded always brings its own positions with it. A subclass names the class of the ``dense``
    layer, which registers it, and the ``settings`` that both have as attributes and constructor arguments; it
    says how to ``_compute``, and whether the implementations of `sparse_conv2d` can (``runs_as_conv2d``).

    Attributes:
        values: parameter, shape ``structure.values_shape``.
        bias: parameter [F] or None.
        structure: positions of the values in the dense weight; moves with the module.
        impl: name of the implementation that computes.
    """

    dense: ClassVar[type[nn.Module]]
    settings: ClassVar[tuple[str, ...]] = ()
    runs_as_conv2d: ClassVar[bool] = False
    impl: str
    values: nn.Parameter
    bias: nn.Parameter | None
    keep_bits: Tensor
    _otherwise: str | None = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "dense" in cls.__dict__:
            PACKED_FORMS[cls.dense] = cls

    def __init__(self, structure: Structure, values: Tensor, bias: Tensor | None, impl: str) -> None:
        super().__init__()
        if tuple(values.shape) != structure.values_shape:
            raise ValueError(f"values have to be {structure.values_shape}, got {tuple(values.shape)}")
        self.structure = structure
        self.values = _parameter(values)
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        self.register_buffer("keep_bits", structure.bits())
        self.use(impl)

    @classmethod
    def from_dense(
        cls: type[P],
        layer: nn.Module,
        mask: Tensor,
        name: str = "the layer",
        patterns: Patterns | None = None,
    ) -> P:
        """Pack a layer; what its weight has outside the mask (bool of its shape, True = kept) is left out.

        Bias, hooks (their handles go on working), ``requires_grad``, dtype, device and mode are taken over,
        the gradient is packed if there is one; the dense layer is not to be used any more. ``patterns``, if
        positions will move: see `Structure.from_mask`.

        Raises:
            UserError: the layer, ``name`` in messages, cannot be packed, or the mask does not fit.
        """
        reason = refusal(layer) or mask_refusal(layer, mask)
        if reason is None and packed_form(layer) is not cls:
            reason = f"it is a {type(layer).__name__}, not a {cls.dense.__name__}"
        if reason is not None:
            raise UserError(f"{name} cannot be packed: {reason}")
        source: Any = layer
        structure = Structure.from_mask(mask.to(source.weight.device), patterns)
        values = exchanged(source.weight, lambda dense: pack_values(structure, dense))
        packed = cls(structure, values, source.bias, **{key: getattr(layer, key) for key in cls.settings})
        _take_over(layer, packed)
        return packed

    def to_dense(self) -> nn.Module:
        """The dense layer with zeros in place; the inverse of `from_dense`, with the same care."""
        settings = {key: getattr(self, key) for key in self.settings}
        layer: Any = self.dense(
            *self._sizes(), bias=self.bias is not None, device="meta", dtype=self.values.dtype, **settings
        )
        layer.weight = exchanged(self.values, lambda values: unpack_values(self.structure, values))
        layer.bias = self.bias
        _take_over(self, layer)
        return layer  # type: ignore[no-any-return]

    def as_conv2d(self, shape: Sequence[int]) -> tuple[Any, tuple[int, ...]] | None:
        """The same layer as a `PackedConv2d` that shares its tensors, and the shape of its images.

        ``shape`` is that of the layer's input. None if it is no 2-D convolution of a batch.
        """
        return None

    def _sizes(self) -> tuple[Any, ...]:
        """Arguments of the dense class without a name: channels, and the kernel's size."""
        raise NotImplementedError

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight with zeros in place, built at each access; gradients flow to ``values``.

        For networks and losses that read a layer's weight. It is no parameter and not in ``state_dict``;
        writing into it, like setting it, is a UserError: the parameter is ``values``.
        """
        if not isinstance(self.values, Tensor):
            raise TypeError("it reads the weight of a packed layer")  # in a symbolic trace
        view = self.dense_weight().as_subclass(DenseView)
        view.dense_gradient = self._dense_gradient_now
        return view

    def _dense_gradient_now(self) -> Tensor | None:
        """That of all weights if it was collected, else that of the values with zeros in place."""
        collected = None if self.dense_gradient is None else self.dense_gradient.value
        gradient = self.values.grad
        if collected is not None or gradient is None:
            return collected
        return unpack_values(self.structure, gradient)

    def dense_weight(self) -> Tensor:
        """The dense weight with zeros in place; differentiable."""
        weight = unpack_values(self.structure, self.values)
        if self.dense_gradient is not None and weight.requires_grad:
            self.collect_from(weight, lambda gradient: gradient)
        return weight

    def collect_from(self, tensor: Tensor, weight_gradient: Callable[[Tensor], Tensor]) -> None:
        """While a gradient is wanted, have this call of the layer add its part to it.

        ``weight_gradient`` maps the gradient of ``tensor`` to that of the dense weight.
        """
        collecting = self.dense_gradient
        if collecting is not None and tensor.requires_grad and self.values.requires_grad:

            def collect(gradient: Tensor) -> None:
                collecting.add(weight_gradient(gradient), self.values.grad)

            tensor.register_hook(collect)  # type: ignore[no-untyped-call]

    @property
    def dense_gradient(self) -> DenseGradient | None:
        """While the gradient of all weights is wanted, what collects it; else None, as in copies."""
        return _COLLECTING.get(self) if _COLLECTING else None

    @property
    def collecting(self) -> bool:
        """Whether a forward pass now has to go through the dense weight, for its gradient."""
        return self.dense_gradient is not None and torch.is_grad_enabled()

    def want_dense_gradient(self, wanted: bool) -> None:
        """Collect the gradient of all weights from the next forward pass on, or forget it."""
        if not wanted:
            _COLLECTING.pop(self, None)
        elif self.dense_gradient is None:
            _COLLECTING[self] = DenseGradient()

    def move_(self, structure: Structure, optimizers: Sequence[Optimizer] = ()) -> bool:
        """Keep other positions: values, their gradient and what optimizers hold for them move along.

        A position that was kept already takes its numbers with it, another begins at zero.

        Returns:
            Whether ``values`` is another parameter now: where the number of kept weights has changed.

        Raises:
            ValueError: the structure is of another weight.
        """
        old = self.structure
        if structure.shape != old.shape:
            raise ValueError(f"positions in a weight {structure.shape} do not fit one of {old.shape}")
        source = places_in(old, structure)

        def moved(tensor: Tensor) -> Tensor:
            filled = torch.cat([tensor.reshape(-1), tensor.new_zeros(1)])
            return filled[source.to(tensor.device)].view(structure.values_shape)

        values = self.values
        replaced = structure.values_shape != tuple(values.shape)
        with torch.no_grad():
            if replaced:
                self.values = exchanged(values, moved)
                exchange_(optimizers, {values: self.values}, lambda _, tensor: moved(tensor))
            else:
                kept = (v for o in optimizers for v in o.state.get(values, {}).values())
                for tensor in (values.detach(), values.grad, *kept):
                    if isinstance(tensor, Tensor) and tensor.shape == values.shape:
                        tensor.copy_(moved(tensor))
            self.keep_bits.copy_(structure.bits())
        self.structure = structure
        if self.dense_gradient is not None:  # what it holds was of the old positions' step
            _COLLECTING[self] = DenseGradient()
        return replaced

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise UserError(READ_ONLY)
        super().__setattr__(name, value)

    def use(self, impl: str, otherwise: str | None = None) -> None:
        """Choose the implementation that `forward` calls from now on; ValueError if there is none.

        ``otherwise`` is the one to continue with, after a warning, once a kernel of the first cannot be
        built; without one the KernelError is raised.
        """
        if self.runs_as_conv2d:
            self._run = implementation(impl).run
        elif impl != "reference":
            raise ValueError(f"a {type(self).__name__} has no implementation {impl!r}, only 'reference'")
        self.impl, self._otherwise = impl, otherwise

    def forward(self, x: Tensor) -> Tensor:
        """What the dense layer with zeros in place computes."""
        try:
            return self._compute(x)
        except KernelError as error:
            if self._otherwise is None:
                raise
            warnings.warn(f"a packed layer runs on the {self._otherwise} operator: {error}", stacklevel=2)
            self.use(self._otherwise)
            return self._compute(x)

    def extra_repr(self) -> str:
        """The text in the brackets of the printed layer."""
        settings = "".join(f", {key}={getattr(self, key)}" for key in self.settings)
        sizes = ", ".join(str(size) for size in self._sizes())
        return (
            f"{sizes}{settings}, bias={self.bias is not None}, density={self.structure.density:.3g}, "
            f"impl={self.impl}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.structure = self.structure.to(self.keep_bits.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if f"{prefix}values" not in state_dict and f"{prefix}weight" in state_dict:
            problem, state_dict = self._packed_here(state_dict, prefix)
            if problem:
                error_msgs.append(problem)
                return
        bits = state_dict.get(f"{prefix}keep_bits")
        if bits is not None and not _equal(bits, self.keep_bits):
            try:
                shape, patterns = self.structure.shape, self.structure.patterns
                structure = Structure.from_bits(bits.to(self.keep_bits.device), shape, patterns)
            except ValueError as error:
                error_msgs.append(f"{prefix}keep_bits: {error}")
                return
            if structure.values_shape != tuple(self.values.shape):
                error_msgs.append(
                    f"{prefix}keep_bits keep values of shape {structure.values_shape}, this layer has "
                    f"{tuple(self.values.shape)}"
                )
                return
            self.structure = structure
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _packed_here(self, state_dict: dict[str, Any], prefix: str) -> tuple[str, dict[str, Any]]:
        """Pack a dense weight at this layer's positions; a reason if it has others, or another shape."""
        weight = state_dict[f"{prefix}weight"]
        layer = prefix.rstrip(".") or "the layer"
        if tuple(weight.shape) != tuple(self.structure.shape):
            return (
                f"{layer}: a weight of shape {tuple(weight.shape)} does not fit this packed layer of "
                f"{tuple(self.structure.shape)}"
            ), state_dict
        structure = self.structure.to(weight.device)
        values = pack_values(structure, weight)
        if int((weight != 0).sum()) > int((values != 0).sum()):
            moving = self.structure.patterns is not None
            what = "before a method is attached" if moving else "that were saved after the hard prune"
            return (
                f"{layer}: these weights are not zero where this packed layer has no values: load weights "
                f"{what}, or unpack the network first (clicktrain.unpack)"
            ), state_dict
        packed = {key: value for key, value in state_dict.items() if key != f"{prefix}weight"}
        packed |= {f"{prefix}values": values, f"{prefix}keep_bits": self.keep_bits}
        return "", packed


def packed_form(module: nn.Module) -> type[PackedLayer] | None:
    """The class that a dense layer becomes when it is packed; None if its type has none."""
    adapter = nearest_adapter(module)
    return None if adapter is None else PACKED_FORMS.get(adapter.layer)


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot become a `PackedLayer`, as far as the module itself shows; None if it can."""
    adapter, own = nearest_adapter(module), type(module)
    if adapter is None or packed_form(module) is None:
        return f"it is a {own.__name__}, which has no packed form"
    if "weight" not in module._parameters:
        return "its weight is computed by a parametrization: remove that first"
    if adapter.own_forward(module):
        return f"its class {own.__name__} has a forward of its own"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "it belongs to an attention, which reads its weight"
    weight = adapter.weight(module)
    if isinstance(weight, UninitializedParameter):
        return "it is lazy and not initialized: run one batch through the network first"
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias"
    if (mode := getattr(module, "padding_mode", "zeros")) != "zeros":
        return f"padding_mode={mode!r}: only 'zeros' can be packed"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "there are hooks on its weight, which they would lose"
    return None


def mask_refusal(layer: nn.Module, mask: Tensor) -> str | None:
    """Why a mask does not fit a layer; None if it does."""
    weight: Any = layer.weight
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        return f"its mask is {mask.dtype} {list(mask.shape)}, a mask for it is bool {list(weight.shape)}"
    return None


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _equal(bits: Any, own: Tensor) -> bool:
    if not isinstance(bits, Tensor) or bits.shape != own.shape or bits.dtype != own.dtype:
        return False
    return torch.equal(bits.to(own.device), own)


def _take_over(old: nn.Module, new: nn.Module) -> None:
    """Mode and hooks. The hook tables themselves move, so that handles can still remove their hooks."""
    new.training = old.training
    for table in _HOOKS:
        setattr(new, table, getattr(old, table))
