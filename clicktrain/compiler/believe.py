"""Comparison of a lowered network with the model, before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from clicktrain.compiler.layout_choice import PLAIN
from clicktrain.compiler.lower import Lowered, lower
from clicktrain.compiler.plan import LoweringPlan, activation_dtype
from clicktrain.graph import Inputs
from clicktrain.graph.faithful import Believed, copy_in_modes, original_calls
from clicktrain.graph.observe import Observation, observe, placed_tensors
from clicktrain.graph.random_state import same_random_state
from clicktrain.graph.trace import one_line, outside_autocast
from clicktrain.kernels.sparse_conv2d import PackedLayer

_FLOOR = {torch.float64: 1e-6, torch.float32: 1e-2, torch.bfloat16: 0.5}
"""Relative errors of sums in another order, or of activations that are rounded to the dtype."""
_INPUT = {torch.float64: 1e-14, torch.float32: 1e-6}
_AMPLIFIED = {torch.float64: 50, torch.float32: 50, torch.bfloat16: 8}
"""How much worse a lowered network may be than one whose inputs are rounded: it rounds in every layer. In
bfloat16 the model under autocast, which rounds as often, is the measure."""


class LoweringError(Exception):
    """Why a lowered network cannot be used, in a clause."""


def is_operator(module: nn.Module) -> bool:
    """Whether the compiler takes a module as one operation.

    Packed layers, and modules of the user's own that have parameters and no children. Those that only
    call functions are part of the graph.
    """
    own = next(module.parameters(recurse=False), None) is not None and not any(module.children())
    return own or isinstance(module, PackedLayer)


def believed_lowering(believed: Believed, plan: LoweringPlan, dtype: torch.dtype) -> Lowered:
    """Lower a graph, compare it with the model in each mode that it allows; LoweringError if it differs."""
    graph = believed.graph
    lowered = lower(graph, plan, dtype)
    with outside_autocast():
        _compare(believed, lowered, plan, dtype)
    return lowered


def _compare(believed: Believed, lowered: Lowered, plan: LoweringPlan, dtype: torch.dtype) -> None:
    graph, few = believed.graph, believed.few
    paths = [path for path, _ in graph.model.named_modules()]
    for flags, expected in believed.originals.items():
        if not lowered.guards.allows(dict(zip(paths, flags, strict=True))):
            continue
        twin = copy_in_modes(graph.model, flags)
        trial = lower(replace(graph, model=twin), lowered.plan or plan, dtype)
        try:
            observed = observe(twin, _on_tensors(trial), few)
        except Exception as error:  # the user's code and hooks run here: whatever fails is the reason
            raise LoweringError(one_line(error)) from error
        finally:
            trial.run._modules.clear()  # graph and module refer to each other: the copy would stay in memory
        kept = _coarsest(plan, dtype)
        noise = _rounded(graph.model, flags, few, kept, expected)
        compare = _Comparison(_FLOOR.get(kept, 1e-2), _AMPLIFIED.get(kept, 50), kept is not torch.bfloat16)
        difference = compare.of(observed, expected, noise)
        if difference:
            raise LoweringError(difference)


def _coarsest(plan: LoweringPlan, dtype: torch.dtype) -> torch.dtype:
    """The dtype with the fewest digits that a plan computes in."""
    dense = any(c.layout == PLAIN and c.dense.endswith("bf16") for c in plan.choices)
    return torch.bfloat16 if dense else activation_dtype(plan.activations, dtype)


def _on_tensors(lowered: Lowered) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        return lowered.run.forward(*Inputs(args, kwargs).tensors())

    return call


def _rounded(
    model: nn.Module, flags: tuple[bool, ...], few: Inputs, kept: torch.dtype, expected: Sequence[Observation]
) -> Sequence[Observation]:
    """Run the model with less accurate numbers, to see how sensitive it is."""
    generator = torch.Generator().manual_seed(0)

    def disturb(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
        return x + x.abs().amax() * _INPUT.get(kept, 1e-6) * noise

    try:
        if kept is torch.bfloat16:
            device = next(model.parameters()).device.type
            with torch.autocast(device, torch.bfloat16):
                return original_calls(model, flags, few)
        return original_calls(model, flags, few.map(disturb))
    except Exception:
        # The model ran on these inputs before: it refuses bfloat16, or checks the values of its inputs. Its
        # sensitivity is unknown then, and only the floor is allowed, which is stricter.
        return expected


@dataclass(frozen=True)
class _Comparison:
    """Allows relative errors up to ``floor``, and up to ``amplified`` times the model's sensitivity.

    Without ``gradients``, these only have to be there: in bfloat16 and on few images they are noise.
    """

    floor: float
    amplified: float
    gradients: bool

    def of(
        self, observed: Sequence[Observation], expected: Sequence[Observation], rounded: Sequence[Observation]
    ) -> str:
        """Name the first difference that rounding does not explain; "" if there is none."""
        for mine, theirs, near in zip(observed, expected, rounded, strict=True):
            if not same_random_state(mine.random, theirs.random):
                return "it draws other random numbers"
            ours, original, other = (
                dict(placed_tensors(one.output, "output")) for one in (mine, theirs, near)
            )
            difference = (
                self._apart(ours, original, other)
                or self._apart(mine.buffers, theirs.buffers, near.buffers, "buffer ")
                or self._apart(
                    mine.gradients,
                    theirs.gradients if self.gradients else _instead(theirs.gradients, mine.gradients),
                    near.gradients,
                    "gradient of ",
                )
            )
            if difference:
                return difference
        return ""

    def _apart(
        self,
        mine: Mapping[str, Tensor | None],
        theirs: Mapping[str, Tensor | None],
        near: Mapping[str, Tensor | None],
        what: str = "",
    ) -> str:
        if mine.keys() != theirs.keys():
            return f"{what}other values"
        total = sum(_norm(tensor) ** 2 for tensor in theirs.values()) ** 0.5
        wrong = (
            n for n, expected in theirs.items() if not self._close(mine[n], expected, near.get(n), total)
        )
        name = next(wrong, None)
        return "" if name is None else f"{what}{name}"

    def _close(self, mine: Tensor | None, expected: Tensor | None, near: Tensor | None, total: float) -> bool:
        if expected is None or mine is None:
            return expected is mine
        if mine.shape != expected.shape or mine.dtype != expected.dtype:
            return False
        if not expected.is_floating_point():
            return torch.equal(mine, expected)
        if not bool(expected.isfinite().all()):
            return True
        # Values near zero consist of rounding errors: the gradient of a bias before a batch norm.
        size = max(_norm(expected), 1e-2 * total) + 1e-30
        noise = 0.0 if near is None or near.shape != mine.shape else _norm(near - expected) / size
        return _norm(mine - expected) / size <= max(self.floor, self.amplified * noise)


def _instead(
    expected: Mapping[str, Tensor | None], own: Mapping[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """Our own gradients where some were expected and all of their numbers are finite."""
    return {
        name: mine if theirs is not None and mine is not None and bool(mine.isfinite().all()) else theirs
        for name, theirs in expected.items()
        for mine in (own.get(name),)
    }


def _norm(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.is_floating_point():
        return 0.0
    return float(torch.linalg.vector_norm(tensor.double()))
