"""Which layers of a network can be pruned, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from clicktrain.errors import UserError
from clicktrain.graph.conv_sources import ConvSources, conv_sources
from clicktrain.sparsity.patterns import MAX_POSITIONS


@dataclass(frozen=True, slots=True, eq=False)
class ConvLayer:
    """A convolution that may be pruned."""

    name: str
    module: nn.Conv2d

    @property
    def weight(self) -> Tensor:
        """[F, C, R, S], C = in_channels / groups."""
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(F, C, R, S)."""
        f, c, r, s = self.module.weight.shape
        return f, c, r, s


@dataclass(frozen=True, slots=True, eq=False)
class LinearLayer:
    """A fully connected layer that may be pruned.

    ``source`` is the prunable convolution whose filters are its inputs, channel after channel, if that is
    known; ``untraced`` says why nothing can be known about this network, "" if it could be followed.
    """

    name: str
    module: nn.Linear
    source: str | None = None
    untraced: str = ""

    @property
    def weight(self) -> Tensor:
        """[O, I]."""
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        o, i = self.module.weight.shape
        return o, i


@dataclass(frozen=True, slots=True, eq=False)
class SeenBatch:
    """The last training batch: the inputs of the model as they came, as `as_inputs` reads them, and what
    autocast computed in, None without it."""

    inputs: Any
    autocast: torch.dtype | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PrunableLayers:
    """What a method may touch.

    ``convs`` are the convolutions that can be pruned, ``linears`` the fully connected layers, for methods
    that ask for them; ``left_alone`` maps the other weighted modules to (shape, reason).
    ``order`` has all names as the network lists them. ``model`` is what was looked at, ``example`` its
    inputs (batch of at least one; values do not matter; see `clicktrain.graph.as_inputs`), None until they
    are known;
    ``measure`` times it with masks, None if nobody can; ``seen`` is the last training batch, of methods that
    ask for it (`Method.keeps_inputs`).
    ``other_conv_weights`` counts the convolution weights outside ``convs``; they stay dense and count in
    the compression ratio, which is over all convolution weights (ClickTrain section 6.2).
    """

    convs: tuple[ConvLayer, ...]
    left_alone: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)
    other_conv_weights: int = 0
    order: tuple[str, ...] = ()
    linears: tuple[LinearLayer, ...] = ()
    model: nn.Module | None = None
    example: Any = None
    measure: Any = None
    seen: SeenBatch | None = None

    @property
    def layers(self) -> tuple[ConvLayer | LinearLayer, ...]:
        """Everything that can be pruned."""
        return (*self.convs, *self.linears)

    @property
    def conv_weights(self) -> int:
        """All convolution weights of the network."""
        return sum(layer.weight.numel() for layer in self.convs) + self.other_conv_weights

    def layer(self, name: str) -> ConvLayer:
        """The prunable layer of that name."""
        return next(layer for layer in self.convs if layer.name == name)

    def renamed(self, new_name: Callable[[str], str | None]) -> PrunableLayers:
        """The same layers of the smaller model, without those that were removed.

        Args:
            new_name: old module path -> new one, None for a removed module.
        """
        assert self.model is not None
        modules = dict(self.model.named_modules())

        def now(name: str | None) -> tuple[str, nn.Module] | None:
            moved = None if name is None else new_name(name)
            module = modules.get(moved) if moved is not None else None
            return None if moved is None or not isinstance(module, (_ConvNd, nn.Linear)) else (moved, module)

        layers, linears, left = [], [], {}
        for layer in self.convs:
            if (place := now(layer.name)) is not None and isinstance(place[1], nn.Conv2d):
                layers.append(ConvLayer(place[0], place[1]))
        for linear in self.linears:
            if (place := now(linear.name)) is not None and isinstance(place[1], nn.Linear):
                source = now(linear.source)
                known = None if source is None else source[0]
                linears.append(LinearLayer(place[0], place[1], known, linear.untraced))
        other: dict[int, int] = {}
        for name, (_, reason) in self.left_alone.items():
            if (place := now(name)) is not None:
                weight = place[1].weight
                assert isinstance(weight, Tensor)
                left[place[0]] = (tuple(weight.shape), reason)
                if isinstance(place[1], _ConvNd):
                    other[id(weight)] = weight.numel()
        order = tuple(place[0] for name in self.order if (place := now(name)) is not None)
        return replace(
            self,
            convs=tuple(layers),
            linears=tuple(linears),
            left_alone=left,
            other_conv_weights=sum(other.values()),
            order=order,
        )


def check_convolutions(prunable: PrunableLayers, who: str) -> None:
    """UserError where the network has convolutions, but none that a method may prune, or no layer at all.

    What a method would prune then, if anything, is the classifier: not what a sparsity is asked for.

    Args:
        prunable: what the method may touch.
        who: the method, in the sentence.
    """
    convs = [name for name, (shape, _) in prunable.left_alone.items() if len(shape) > 2]
    if prunable.convs or (prunable.linears and not convs):
        return
    told = convs or list(prunable.left_alone)
    # A network that is a layer itself has the name "".
    reasons = "; ".join(": ".join(filter(None, (name, prunable.left_alone[name][1]))) for name in told[:3])
    hint = (
        ", or name some with include"
        if any("reads the image" in prunable.left_alone[n][1] for n in told)
        else ""
    )
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
        model: any module.
        trained: the optimizer's parameters; layers that it does not train are left alone.
        exclude: module paths (shell-style) to leave alone.
        include: module paths (shell-style) to prune although the defaults would leave them alone.
        linear: whether fully connected layers may be pruned too.

    Raises:
        UserError: an entry of ``exclude`` or ``include`` matches no layer of those kinds.
    """
    trained_ids = None if trained is None else {id(p) for p in trained}
    named = [(name, m) for name, m in model.named_modules() if isinstance(m, (_ConvNd, nn.Linear))]
    convs = [name for name, m in named if isinstance(m, _ConvNd)]
    known, kind = (convs, "convolution") if not linear else ([name for name, _ in named], "layer")
    for glob in (*exclude, *include):
        if glob != "*" and not any(fnmatchcase(name, glob) for name in known):
            raise UserError(f"no {kind} is called {glob!r}; the {kind}s are {_some(known)}")
    uses: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            uses[id(weight)] = uses.get(id(weight), 0) + 1
    layers: list[ConvLayer] = []
    linears: list[tuple[str, nn.Linear]] = []
    left: dict[str, tuple[tuple[int, ...], str]] = {}
    other = 0
    counted: set[int] = set()
    for name, module in named:
        reason = _reason(module, uses, trained_ids, linear)
        if reason is None and matches(name, exclude):
            reason = "excluded"
        if reason is None and not matches(name, include):
            if name in convs[:1]:
                reason = "first convolution: it reads the image"
            elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels and module.groups > 1:
                reason = "depthwise: one kernel per filter"
        if reason is None and isinstance(module, nn.Conv2d):
            layers.append(ConvLayer(name, module))
            continue
        if reason is None and isinstance(module, nn.Linear):
            linears.append((name, module))
            continue
        sized = not isinstance(module.weight, UninitializedParameter)
        left[name] = (tuple(module.weight.shape) if sized else (), reason or "")
        if sized and isinstance(module, _ConvNd):
            own = module._parameters.get("weight")  # None: computed anew at each access
            if own is None or id(own) not in counted:
                other += module.weight.numel()
            counted.add(id(own))  # a shared weight counts once
    convs_found = {layer.name for layer in layers}
    known_sources = conv_sources(model) if linears else ConvSources({})
    sources = {name: conv for name, conv in known_sources.sources.items() if conv in convs_found}
    return PrunableLayers(
        tuple(layers),
        left,
        other,
        tuple(name for name, _ in named),
        tuple(
            LinearLayer(name, module, sources.get(name), known_sources.untraced) for name, module in linears
        ),
        model,
    )


def _reason(
    module: _ConvNd | nn.Linear, uses: dict[int, int], trained_ids: set[int] | None, linear: bool
) -> str | None:
    """Why a module cannot be pruned whatever the settings, or None."""
    weight = module._parameters.get("weight")
    if parametrize.is_parametrized(module, "weight") or weight is None:
        return "its weight is computed by a parametrization"
    if isinstance(weight, UninitializedParameter):
        return "lazy: run one batch through the network before attaching"
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        if not linear:
            return "linear: this method prunes convolutions"
        own_forward = type(module).forward is not nn.Linear.forward
    elif isinstance(module, nn.Conv2d):
        kind = type(module)
        own_forward = (kind.forward, kind._conv_forward) != (nn.Conv2d.forward, nn.Conv2d._conv_forward)
    else:
        return f"{name}: only Conv2d is pruned"
    if own_forward:
        return f"{name}: a layer with a forward of its own may not use its weight as it is"
    if not weight.is_floating_point() or not weight.requires_grad:
        return "its weight is not trained (requires_grad is False)"
    if uses.get(id(weight), 0) > 1:
        return "its weight is shared with another layer"
    if trained_ids is not None and id(weight) not in trained_ids:
        return "its weight is not in the optimizer"
    if weight.dim() == 4 and weight.shape[2] * weight.shape[3] > MAX_POSITIONS:
        return f"its kernels have more than {MAX_POSITIONS} positions"
    return None


def _some(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown
