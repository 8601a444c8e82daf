"""A convolution layer whose parameter is its packed values."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure, pack_values, unpack_values
from clicktrain.kernels.native.failure import KernelError
from clicktrain.kernels.sparse_conv2d.api import Padding, Pair, implementation, padding_pair, pair
from clicktrain.kernels.sparse_conv2d.dense_view import READ_ONLY, DenseView

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class PackedConv2d(nn.Module):
    """What a pruned ``nn.Conv2d`` becomes once its positions are fixed (ClickTrain stage 5).

    Its ``state_dict`` holds ``values``, ``bias`` if there is one, and ``keep_bits`` (one bit a weight), so
    that what is loaded always brings its own positions with it.

    Attributes:
        values: parameter, shape ``structure.values_shape``.
        bias: parameter [F] or None.
        structure: positions of the values in [F, C, R, S]; moves with the module.
        impl: name of the operator's implementation.
    """

    transposed = False
    output_padding = (0, 0)
    impl: str
    _otherwise: str | None = None
    values: nn.Parameter
    bias: nn.Parameter | None
    keep_bits: Tensor

    def __init__(
        self,
        structure: Structure,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        impl: str = "reference",
    ) -> None:
        """Take tensors over; those that are Parameters stay the same objects.

        Raises:
            ValueError: values and structure do not fit, or there is no such implementation.
        """
        super().__init__()
        if tuple(values.shape) != structure.values_shape:
            raise ValueError(f"values have to be {structure.values_shape}, got {tuple(values.shape)}")
        self.structure = structure
        self.values = _parameter(values)
        self.register_parameter("bias", None if bias is None else _parameter(bias))
        self.register_buffer("keep_bits", structure.bits())
        self.out_channels = structure.shape[0]
        self.in_channels = structure.shape[1] * groups
        self.kernel_size = structure.shape[2:]
        self.stride = pair(stride)
        self.padding = padding_pair(padding)
        self.dilation = pair(dilation)
        self.groups = groups
        self.padding_mode = "zeros"
        self.use(impl)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mask: Tensor, name: str = "the convolution") -> PackedConv2d:
        """Pack a convolution; what its weight has outside the mask is left out.

        Bias, hooks (their handles go on working), ``requires_grad``, dtype, device and mode are taken over,
        the gradient is packed if there is one; the convolution is not to be used any more.

        Args:
            conv: the layer.
            mask: bool [F, C, R, S], True = kept.
            name: of the layer, for messages.

        Raises:
            UserError: the layer cannot be packed, or the mask does not fit.
        """
        reason = refusal(conv) or mask_refusal(conv, mask)
        if reason is not None:
            raise UserError(f"{name} cannot be packed: {reason}")
        weight = conv.weight
        structure = Structure.from_mask(mask.to(weight.device))
        values = nn.Parameter(pack_values(structure, weight.detach()), requires_grad=weight.requires_grad)
        values.__dict__.update(weight.__dict__)
        if weight.grad is not None:
            values.grad = pack_values(structure, weight.grad.detach())
        packed = cls(
            structure,
            values,
            conv.bias,
            stride=pair(conv.stride),
            padding=padding_pair(conv.padding),
            dilation=pair(conv.dilation),
            groups=conv.groups,
        )
        _take_over(conv, packed)
        return packed

    def to_conv(self) -> nn.Conv2d:
        """The dense convolution with zeros in place; the inverse of `from_conv`, with the same care."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            (self.kernel_size[0], self.kernel_size[1]),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=self.bias is not None,
            device="meta",
            dtype=self.values.dtype,
        )
        weight = nn.Parameter(self.dense_weight().detach(), requires_grad=self.values.requires_grad)
        weight.__dict__.update(self.values.__dict__)
        if self.values.grad is not None:
            weight.grad = unpack_values(self.structure, self.values.grad.detach())
        conv.weight = weight
        conv.bias = self.bias
        _take_over(self, conv)
        return conv

    @property
    def weight(self) -> Tensor:
        """[F, C, R, S] with zeros in place, made at each access; gradients flow to ``values``.

        For networks and losses that read a layer's weight. It is no parameter and not in ``state_dict``;
        writing into it, like setting it, is a UserError: the parameter is ``values``.
        """
        if not isinstance(self.values, Tensor):
            raise TypeError("it reads the weight of a packed convolution")  # in a symbolic trace
        view = self.dense_weight().as_subclass(DenseView)
        view.dense_gradient = self._dense_gradient
        return view

    def _dense_gradient(self) -> Tensor | None:
        gradient = self.values.grad
        return None if gradient is None else unpack_values(self.structure, gradient)

    def dense_weight(self) -> Tensor:
        """[F, C, R, S] with zeros in place; differentiable."""
        return unpack_values(self.structure, self.values)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in any module; ``weight`` cannot be set."""
        if name == "weight":
            raise UserError(READ_ONLY)
        super().__setattr__(name, value)

    def use(self, impl: str, otherwise: str | None = None) -> None:
        """Choose the implementation that `forward` calls from now on.

        Args:
            impl: key of `IMPLS`.
            otherwise: the one to go on with, after a warning, once a kernel of the first cannot be built;
                without one the KernelError is raised.

        Raises:
            ValueError: there is no such implementation.
        """
        self._run = implementation(impl).run
        self.impl, self._otherwise = impl, otherwise

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, F, H', W']."""
        try:
            return self._compute(x)
        except KernelError as error:
            if self._otherwise is None:
                raise
            warnings.warn(f"a packed layer runs on the {self._otherwise} operator: {error}", stacklevel=2)
            self.use(self._otherwise)
            return self._compute(x)

    def _compute(self, x: Tensor) -> Tensor:
        return self._run(
            x, self.values, self.structure, self.bias, self.stride, self.padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        """What is printed between the brackets."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={tuple(self.kernel_size)}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, groups={self.groups}, "
            f"bias={self.bias is not None}, density={self.structure.density:.3g}, impl={self.impl}"
        )

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedConv2d:
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
                structure = Structure.from_bits(bits.to(self.keep_bits.device), self.structure.shape)
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
        """A dense weight in this layer's positions; a sentence if it has others, or another shape."""
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
            return (
                f"{layer}: these weights are not zero where this packed layer has no values: load weights "
                "that were saved after the hard prune, or unpack the network first (clicktrain.unpack)"
            ), state_dict
        packed = {key: value for key, value in state_dict.items() if key != f"{prefix}weight"}
        packed |= {f"{prefix}values": values, f"{prefix}keep_bits": self.keep_bits}
        return "", packed


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot become a `PackedConv2d`, as far as the module itself tells; None if it can."""
    if "weight" not in module._parameters and isinstance(module, nn.Conv2d):
        return "its weight is computed by a parametrization: remove that first"
    if not isinstance(module, nn.Conv2d):
        return f"it is a {type(module).__name__}, not a Conv2d"
    own = type(module)
    if own.forward is not nn.Conv2d.forward or own._conv_forward is not nn.Conv2d._conv_forward:
        return f"its class {own.__name__} has a forward of its own"
    if isinstance(module.weight, UninitializedParameter):
        return "it is lazy and not initialized: run one batch through the network first"
    if set(module._parameters) != {"weight", "bias"} or module._buffers or module._modules:
        return "it holds more than a weight and a bias"
    if module.padding_mode != "zeros":
        return f"padding_mode={module.padding_mode!r}: only 'zeros' can be packed"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}"
    if module.weight._backward_hooks or getattr(module.weight, "_post_accumulate_grad_hooks", None):
        return "there are hooks on its weight, which they would lose"
    return None


def mask_refusal(conv: nn.Conv2d, mask: Tensor) -> str | None:
    """Why a mask does not fit a convolution; None if it does."""
    if mask.dtype != torch.bool or mask.shape != conv.weight.shape:
        return f"its mask is {mask.dtype} {list(mask.shape)}, a mask for it is bool {list(conv.weight.shape)}"
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
