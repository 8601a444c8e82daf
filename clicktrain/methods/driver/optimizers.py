"""The optimizers that `Method.attach` is given: which of them step, which wrap others, which are refused."""

from __future__ import annotations

import inspect
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.graph.exchange import odd_state

STRIKES = 8
"""How often in a row something odd has to happen before it counts as a mistake of the loop."""
_PROBE_SHAPE = (5, 4, 3, 2)
"""Shape of the weight on which an unknown optimizer takes a step: no two sizes alike, so that no entry of its
state has the weight's shape by chance."""


@dataclass(frozen=True, eq=False)
class OptimizerUnit:
    """One optimizer that was attached, followed by those that it wraps (SAM and Lookahead wrap a base).

    Whichever of them steps, it is one step of the unit; a step inside a step counts once.
    """

    optimizers: tuple[Optimizer, ...]

    @property
    def outer(self) -> Optimizer:
        """The optimizer that `attach` was given."""
        return self.optimizers[0]

    def parameters(self) -> Iterator[Tensor]:
        """Its present parameters; one may come more than once."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]


class AttachedOptimizers:
    """All optimizers of a run, as units.

    Attributes:
        units: one for each optimizer that was given, in that order.
        all: every optimizer, wrapped ones included: what has to follow when parameters are replaced.
        unit_of: the unit that each of them belongs to, by its id.
    """

    def __init__(self, optimizers: Optimizer | Sequence[Optimizer]) -> None:
        """Find wrapped optimizers, and make sure that step hooks run.

        Raises:
            UserError: something here is no optimizer, or is given twice.
        """
        given = [optimizers] if isinstance(optimizers, Optimizer) else optimizers
        if not isinstance(given, Sequence) or not given or not all(isinstance(o, Optimizer) for o in given):
            raise UserError(
                f"attach takes a torch.optim.Optimizer or a list of them, not {_described(optimizers)}"
            )
        units: list[OptimizerUnit] = []
        self.unit_of: dict[int, OptimizerUnit] = {}
        for optimizer in given:
            if id(optimizer) in self.unit_of:
                raise UserError(
                    f"attach was given one {type(optimizer).__name__} twice, or together with an optimizer "
                    "that wraps it: name each once, the outermost where one wraps another"
                )
            unit = OptimizerUnit(tuple(_with_wrapped(optimizer)))
            units.append(unit)
            self.unit_of.update({id(o): unit for o in unit.optimizers})
        self.units = tuple(units)
        self._packs = self._shrinks = False
        self.all = tuple(o for unit in self.units for o in unit.optimizers)
        for optimizer in self.all:
            _make_hookable(optimizer)

    def parameters(self) -> list[Tensor]:
        """All trained parameters, each once."""
        return list({id(p): p for unit in self.units for p in unit.parameters()}.values())

    def holders(self, weights: Sequence[Tensor]) -> tuple[OptimizerUnit, ...]:
        """The units that train one of these weights; the first unit if none does."""
        wanted = {id(weight) for weight in weights}
        return tuple(u for u in self.units if any(id(p) in wanted for p in u.parameters())) or self.units[:1]

    def check(self, model: nn.Module, weights: Sequence[Tensor], packs: bool, shrinks: bool) -> None:
        """Raise a UserError for an optimizer that cannot be used, or trains nothing of this network.

        Args:
            model: the network.
            weights: what may be pruned.
            packs: convolutions are to be packed while training.
            shrinks: the method removes channels.
        """
        own = {id(p) for p in model.parameters()}
        for unit in self.units:
            kind = type(unit.outer).__name__
            if not any(id(p) in own for p in unit.parameters()):
                raise UserError(
                    f"the {kind} trains no parameter of this network: make it from the parameters of the "
                    "network that is attached, not from those of a copy"
                )
            for optimizer in unit.optimizers:
                _check_kind(optimizer)
        self._packs, self._shrinks = packs, shrinks
        for unit in self.holders(weights):
            for optimizer in unit.optimizers:
                if packs or shrinks:
                    self._check_state(optimizer, *_state_after_a_step(optimizer))
            self._check_wrapper(unit)

    def scale_with_weights(self, units: Sequence[OptimizerUnit]) -> bool:
        """Whether a step of one of these is as large as the weights are; see `StepInfo.norm_scaled`."""
        return any(_scales_with_weights(unit.optimizers[-1]) for unit in units)

    def check_first_step(self, weights: Sequence[Tensor]) -> None:
        """Raise a UserError after the first step if an optimizer's state cannot follow what will be replaced.

        Not all of them can be tried before.
        """
        for unit in self.holders(weights):
            self._check_wrapper(unit)
            for optimizer in unit.optimizers:
                for weight in weights:
                    self._check_state(optimizer, optimizer.state.get(weight, {}), weight)

    def _check_state(self, optimizer: Optimizer, state: Mapping[str, Any], weight: Tensor) -> None:
        kind = type(optimizer).__name__
        if self._packs and (odd := odd_state(optimizer, state, weight, factors=False)):
            raise UserError(
                f"{kind} keeps {', '.join(odd)} for a weight, which cannot be packed with it: attach with "
                "packed=False, or use another optimizer"
            )
        if self._shrinks and (odd := odd_state(optimizer, state, weight, factors=True)):
            raise UserError(
                f"{kind} keeps {', '.join(odd)} for a weight, which cannot lose channels with it: use "
                "another optimizer, or a method that removes no channels"
            )

    def _check_wrapper(self, unit: OptimizerUnit) -> None:
        """Raise a UserError for a wrapper that keeps copies of the weights out of reach."""
        if not self._packs and not self._shrinks:
            return
        shapes = {tuple(p.shape) for p in unit.parameters() if p.dim() > 1}
        for optimizer in unit.optimizers:
            for name, value in vars(optimizer).items():
                if name in ("state", "param_groups", "defaults"):
                    continue
                if any(tuple(t.shape) in shapes for t in _tensors_in(value)):
                    raise UserError(
                        f"{type(optimizer).__name__} keeps copies of the weights in its attribute {name!r}, "
                        "outside of its state, where they cannot follow when parameters are replaced: "
                        "attach with packed=False and a method that removes no channels"
                    )


def check_loaded_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Raise a UserError for a saved state whose parameters had other shapes; a hook run before loading."""
    numbers = [number for group in saved.get("param_groups", ()) for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(numbers) != len(parameters):
        return  # which PyTorch refuses
    for number, parameter in zip(numbers, parameters, strict=True):
        state = saved["state"].get(number, {})
        if not isinstance(state, dict):
            continue
        own = optimizer.state.get(parameter, {})
        for name, value in state.items():
            now = own.get(name)
            if isinstance(value, Tensor) and isinstance(now, Tensor) and value.shape != now.shape:
                raise UserError(
                    f"this state of {type(optimizer).__name__} does not fit: {name} has shape "
                    f"{tuple(value.shape)} where the network now has {tuple(now.shape)}; load the state of "
                    "the pruner first (pruner.load_state_dict), from the same moment of the run"
                )


def learning_rate_of(unit: OptimizerUnit) -> float:
    """Learning rate of the first parameter group; see `StepInfo.learning_rate`."""
    return _rate(unit.optimizers[-1].param_groups[0])


def relative_rates_of(units: Sequence[OptimizerUnit]) -> dict[int, float]:
    """Learning rates over that of the first group, where they differ; see `StepInfo.relative_rates`."""
    groups = [group for unit in units for group in unit.optimizers[-1].param_groups]
    first = _rate(groups[0])
    others = [(rate / first, group) for group in groups if (rate := _rate(group)) != first] if first else []
    return {id(parameter): ratio for ratio, group in others for parameter in group["params"]}


def _rate(group: Mapping[str, Any]) -> float:
    kept = float(group.get("momentum", 0.0)) * (1 - float(group.get("dampening", 0.0)))
    return float(group["lr"]) / (1 - kept)


def _described(given: Any) -> str:
    if isinstance(given, (list, tuple)):
        odd = next((o for o in given if not isinstance(o, Optimizer)), None)
        return "an empty list" if not given else f"a list with a {type(odd).__name__} in it"
    return f"a {type(given).__name__}"


def _with_wrapped(optimizer: Optimizer) -> Iterator[Optimizer]:
    """An optimizer and those among its attributes, attributes of these, and so on."""
    seen: set[int] = set()
    waiting = [optimizer]
    while waiting:
        current = waiting.pop(0)
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            for value in vars(current).values():
                values = value if isinstance(value, (list, tuple)) else (value,)
                waiting += [v for v in values if isinstance(v, Optimizer)]


def _make_hookable(optimizer: Optimizer) -> None:
    """Step hooks run even where a class has not called ``Optimizer.__init__`` (Lookahead of timm)."""
    for table in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if not hasattr(optimizer, table):
            setattr(optimizer, table, OrderedDict())
    if not getattr(type(optimizer).step, "hooked", False):
        optimizer._patch_step_function()


def _check_kind(optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            f"{kind} cannot train a network that is pruned: it keeps one state for all parameters together; "
            "use another optimizer"
        )
    for option, why in (
        ("maximize", "penalties and the loss slope are of a loss that is minimized: minimize its negative"),
        ("differentiable", "masks are written in place: make the optimizer without it"),
    ):
        if any(group.get(option) for group in optimizer.param_groups):
            raise UserError(f"{kind} with {option}=True cannot be attached: {why}")


def _state_after_a_step(optimizer: Optimizer) -> tuple[dict[str, Any], Tensor]:
    """The state that an optimizer like this one has for a weight after a step; {} if it cannot be tried."""
    weight = nn.Parameter(torch.ones(_PROBE_SHAPE))
    like = _stepped(optimizer, [weight])
    return ({} if like is None else dict(like.state.get(weight, {}))), weight


def _scales_with_weights(optimizer: Optimizer) -> bool:
    """Whether it moves a weight of ten times the size, with the same gradient, much farther."""
    small, large = nn.Parameter(torch.ones(_PROBE_SHAPE)), nn.Parameter(torch.full(_PROBE_SHAPE, 10.0))
    if _stepped(optimizer, [small, large], weight_decay=0.0) is None:
        return False
    return bool((large.detach() - 10).norm() > 3 * (small.detach() - 1).norm() > 0)


def _stepped(optimizer: Optimizer, weights: list[nn.Parameter], **others: Any) -> Optimizer | None:
    """An optimizer like this one after its first step on these weights; None if it cannot be tried.

    ``others``: settings that replace its own, where it has them.
    """
    kind = type(optimizer)
    settings = {**optimizer.defaults, **{k: v for k, v in others.items() if k in optimizer.defaults}}
    for weight in weights:
        weight.grad = torch.full(_PROBE_SHAPE, 0.5)
    try:
        accepted = inspect.signature(kind).parameters
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            like = kind(weights, **{k: v for k, v in settings.items() if takes_all or k in accepted})
            like.step()
        return like
    except Exception:  # anybody's class: whatever it raises here says only that it cannot be tried
        return None


def _tensors_in(value: Any, depth: int = 3) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part, depth - 1)


class OptimizerRound:
    """One step of each optimizer that holds prunable weights; see `Pruner`."""

    def __init__(self) -> None:
        self._stepped: list[OptimizerUnit] = []
        self._seen = -1
        self._broken = 0

    def begins(self, seen: int) -> bool:
        """Whether this is the first step after `Pruner.observe`, with gradients that are new to the method.

        Raises:
            UserError: again and again an optimizer has not stepped between two of these.
        """
        if seen == self._seen:
            return False
        self._broken = self._broken + 1 if self._stepped else 0
        if self._broken >= STRIKES:
            raise UserError(
                "the attached optimizers hold weights to be pruned together but do not step together: after "
                "each backward() and observe(loss) let every one of them step once, or, where networks take "
                "turns (a GAN), attach one method to each network with its own optimizer"
            )
        self._stepped, self._seen = [], seen
        return True

    def ends(self, unit: OptimizerUnit, counted: Sequence[OptimizerUnit]) -> bool:
        """Note a step; whether every optimizer that counts has now stepped."""
        if unit not in self._stepped:
            self._stepped.append(unit)
        if any(other not in self._stepped for other in counted):
            return False
        self._stepped = []
        return True
