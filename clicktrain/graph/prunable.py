"""Which layers of a network can be pruned, and why the others are left alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from clicktrain.errors import UserError
from clicktrain.graph.adapters import LayerAdapter, nearest_adapter
from clicktrain.graph.conv_sources import conv_sources
from clicktrain.graph.layer_trial import uses_weight_as_it_is


@dataclass(frozen=True, slots=True, eq=False)
class PrunableLayer:
    """A layer that may be pruned, with the adapter of its type; perhaps packed while its masks still move.

    Attributes:
        name: module path; "" if the network is this layer.
        source: of a linear layer, the prunable convolution whose filters are its inputs, channel after
            channel, if that is known.
        untraced: why no source is known for this network, "" if it could be followed.
    """

    name: str
    module: nn.Module
    adapter: LayerAdapter
    source: str | None = None
    untraced: str = ""

    @property
    def weight(self) -> Tensor:
        """The weight, in its own shape: the parameter.

        Of a packed layer it is built at each access, with zeros in place, and can only be read: its ``grad``
        is that of all weights while the method wants it (`Method.wants_gradients`), else zero outside.
        """
        return self.adapter.weight(self.module)

    @property
    def parameter(self) -> Tensor:
        """What the optimizer trains: the weight, or a packed layer's values."""
        values = self.module._parameters.get("values") if self.packed else None
        return self.weight if values is None else values

    @property
    def packed_mask(self) -> Tensor | None:
        """The mask that a packed layer holds as its index, built at each access; None of another layer."""
        structure = getattr(self.module, "structure", None) if self.packed else None
        return None if structure is None else structure.mask()

    @property
    def whole_gradient(self) -> bool:
        """Whether ``weight.grad`` is the gradient of all weights, not only of those that are packed."""
        collected: Any = getattr(self.module, "dense_gradient", None)
        return not self.packed or (collected is not None and collected.value is not None)

    @property
    def packed(self) -> bool:
        """Whether the layer holds packed values."""
        return hasattr(self.module, "structure") and "values" in self.module._parameters

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own shape, which is that of masks."""
        return self.adapter.weight_shape(self.module)

    @property
    def view_shape(self) -> tuple[int, int, int, int]:
        """(F, C, R, S) of `view`."""
        return self.adapter.view_shape(self.module)

    @property
    def kind(self) -> str:
        """ "conv" or "linear"."""
        return self.adapter.kind

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape (weight, gradient, mask, score) as [F, C, R, S]."""
        return self.adapter.view(self.module, tensor)

    def unview(self, tensor: Tensor) -> Tensor:
        """The inverse of `view`: [F, C, R, S] -> the weight's own shape."""
        return self.adapter.unview(self.module, tensor)

    def unit_refusal(self, unit: str) -> str | None:
        """Why a unit ("weight", "kernel", "pattern", "channel") has no meaning here; None if it has one."""
        return self.adapter.unit_refusal(self.module, unit)


@dataclass(frozen=True, slots=True, eq=False)
class SeenBatch:
    """The last training batch: the inputs of the model as they came, as `as_inputs` reads them, and what
    autocast computed in, None without it."""

    inputs: Any
    autocast: torch.dtype | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PrunableLayers:
    """What a method may touch.

    ``layers`` can be pruned: convolutions, then, for methods that ask for them, linear layers; ``left_alone``
    maps the other weighted modules to (shape, reason). ``order`` has all names as the network lists them.
    ``model`` is what was looked at, ``example`` its inputs (batch of at least one; values do not matter; see
    `clicktrain.graph.as_inputs`), None until they are known; ``seen`` is the last training batch, of methods
    that ask for it (`Method.keeps_inputs`).

    ``other_conv_weights`` counts the convolution weights outside ``convs``; they stay dense and count in the
    compression ratio, which is over all convolution weights (ClickTrain section 6.2). In a network without
    convolutions linear layers take their place: ``counted_kind`` is then "linear".
    """

    layers: tuple[PrunableLayer, ...]
    left_alone: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    other_conv_weights: int = 0
    counted_kind: str = "conv"
    order: tuple[str, ...] = ()
    model: nn.Module | None = None
    example: Any = None
    seen: SeenBatch | None = None

    @property
    def convs(self) -> tuple[PrunableLayer, ...]:
        """The convolutions, of any dimension, among the layers."""
        return tuple(layer for layer in self.layers if layer.kind == "conv")

    @property
    def linears(self) -> tuple[PrunableLayer, ...]:
        """The linear layers among the layers."""
        return tuple(layer for layer in self.layers if layer.kind == "linear")

    @property
    def counted(self) -> tuple[PrunableLayer, ...]:
        """The layers whose weights the compression ratio is over."""
        return tuple(layer for layer in self.layers if layer.kind == self.counted_kind)

    @property
    def conv_weights(self) -> int:
        """All weights that the compression ratio is over."""
        return sum(math.prod(layer.shape) for layer in self.counted) + self.other_conv_weights

    def layer(self, name: str) -> PrunableLayer:
        """The prunable layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)

    def renamed(self, new_name: Callable[[str], str | None]) -> PrunableLayers:
        """The same layers of the smaller model; ``new_name`` maps module paths, removed ones to None."""
        assert self.model is not None
        modules = dict(self.model.named_modules())

        def moved(name: str | None) -> str | None:
            """The new path, None where a layer without weights or nothing at all has taken the place."""
            now = None if name is None else new_name(name)
            return now if now in modules and nearest_adapter(modules[now]) is not None else None

        layers = tuple(
            replace(layer, name=now, module=modules[now], source=moved(layer.source))
            for layer in self.layers
            if (now := moved(layer.name)) is not None
        )
        left, other = {}, {}
        for name, (_, reason) in self.left_alone.items():
            if (now := moved(name)) is not None:
                weight = modules[now].weight
                assert isinstance(weight, Tensor)
                left[now] = (tuple(weight.shape), reason)
                if _kind_of(modules[now]) == self.counted_kind:
                    other[id(weight)] = weight.numel()
        return replace(
            self,
            layers=layers,
            left_alone=left,
            other_conv_weights=sum(other.values()),
            order=tuple(now for name in self.order if (now := moved(name)) is not None),
        )


def _kind_of(module: nn.Module) -> str | None:
    """What a layer counts as, whatever its own forward does."""
    adapter = nearest_adapter(module)
    return None if adapter is None else adapter.kind


def check_convolutions(prunable: PrunableLayers, who: str) -> None:
    """UserError where the network has convolutions, but none that a method may prune, or no layer at all.

    What a method would prune then, if anything, is the classifier: not what a sparsity is asked for. ``who``
    is the method, in the sentence.
    """
    convs = [name for name, (shape, _) in prunable.left_alone.items() if len(shape) > 2]
    if prunable.convs or (prunable.linears and not convs):
        return
    named = convs or list(prunable.left_alone)
    # A network that is a layer itself has the name "".
    reasons = "; ".join(": ".join(filter(None, (name, prunable.left_alone[name][1]))) for name in named[:3])
    skipped = any("reads the image" in prunable.left_alone[name][1] for name in named)
    hint = ", or name some with include" if skipped else ""
    raise UserError(
        f"this network has no convolution that {who} can prune ({reasons or 'none at all'}): "
        f"use a network with more convolutions{hint}"
    )


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a module path matches one of the shell-style patterns."""
    return any(fnmatchcase(name, glob) for glob in globs)


def find_prunable(
    model: nn.Module,
    trained: Iterable[Tensor] | None = None,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    linear: bool = False,
) -> PrunableLayers:
    """Look at every weighted module of a network; nothing that is unknown is touched.

    Left alone unless ``include`` names them: the first convolution (it reads the image and is small) and
    depthwise convolutions (one kernel per filter; little to gain).

    Args:
        trained: the optimizer's parameters; layers that it does not train are left alone.
        include: module paths (shell-style) to prune although the defaults would leave them alone.

    Raises:
        UserError: an entry of ``exclude`` or ``include`` matches no layer of those kinds.
    """
    trained_ids = None if trained is None else {id(p) for p in trained}
    adapters = {name: a for name, m in model.named_modules() if (a := nearest_adapter(m)) is not None}
    convs = [name for name, adapter in adapters.items() if adapter.kind == "conv"]
    counted = "conv" if convs else "linear"
    known, kind = (convs, "convolution") if not linear else (list(adapters), "layer")
    for glob in (*exclude, *include):
        if glob != "*" and not any(fnmatchcase(name, glob) for name in known):
            shown = ", ".join(known[:8]) + (f", ... ({len(known)} in all)" if len(known) > 8 else "")
            raise UserError(f"no {kind} is called {glob!r}; the {kind}s are {shown}")
    uses: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            uses[id(weight)] = uses.get(id(weight), 0) + 1
    layers: list[PrunableLayer] = []
    left: dict[str, tuple[tuple[int, ...], str]] = {}
    other: dict[int, int] = {}  # by identity: a shared weight counts once
    for name, adapter in adapters.items():
        module = model.get_submodule(name)
        reason = _reason(module, adapter, uses, trained_ids, linear)
        if reason is None and matches(name, exclude):
            reason = "excluded"
        if reason is None and not matches(name, include):
            if name in convs[:1]:
                reason = "first convolution: it reads the image"
            elif adapter.depthwise(module):
                reason = "depthwise: one kernel per filter"
        if reason is None:
            layers.append(PrunableLayer(name, module, adapter))
            continue
        weight = adapter.weight(module)
        sized = not isinstance(weight, UninitializedParameter)
        left[name] = (tuple(weight.shape) if sized else (), reason)
        if sized and adapter.kind == counted:
            own = module._parameters.get("weight")  # None: computed at each access
            other[id(module if own is None else own)] = weight.numel()
    prunable = PrunableLayers(tuple(layers), left, sum(other.values()), counted, tuple(adapters), model)
    return _with_sources(prunable, model) if prunable.linears else prunable


def _with_sources(prunable: PrunableLayers, model: nn.Module) -> PrunableLayers:
    """Note which prunable convolution each linear layer reads; convolutions come first from here on."""
    sources, untraced = conv_sources(model)
    names = {layer.name for layer in prunable.convs}
    linears = [
        replace(layer, source=s if (s := sources.get(layer.name)) in names else None, untraced=untraced)
        for layer in prunable.linears
    ]
    return replace(prunable, layers=(*prunable.convs, *linears))


def _reason(
    module: nn.Module, adapter: LayerAdapter, uses: dict[int, int], trained_ids: set[int] | None, linear: bool
) -> str | None:
    """Why a module cannot be pruned whatever the settings, or None."""
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module, "weight") or weight is None:
        return "its weight is computed by a parametrization"
    if isinstance(weight, UninitializedParameter):
        return "lazy: run one batch through the network before attaching"
    name = type(module).__name__
    if adapter.kind == "linear" and not linear:
        return "linear: this method prunes convolutions"
    if adapter.own_forward(module) and not uses_weight_as_it_is(module):
        return f"{name}: its own forward does not use its weight as it is"
    if not weight.is_floating_point() or not weight.requires_grad:
        return "its weight is not trained (requires_grad is False)"
    if uses.get(id(weight), 0) > 1:
        return "its weight is shared with another layer"
    if trained_ids is not None and id(weight) not in trained_ids:
        return "its weight is not in the optimizer"
    return None
