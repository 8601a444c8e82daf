"""Whether a plan does what it says: the smaller network is run against the one with silenced channels.

Both are copies, in float64 where the model's code allows it, in training and in evaluation mode. Random draws
are replaced by constants: dropout over fewer channels would draw other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.copying import working_copy
from clicktrain.graph.inputs import Inputs, batch_size, first_of_batch, owned, resized
from clicktrain.graph.observe import tensors_in
from clicktrain.graph.trace import force_eager, one_line
from clicktrain.surgery.apply import apply_surgery_, zero_
from clicktrain.surgery.plan import SurgeryPlan
from clicktrain.surgery.steady import norm_alone_, steadily

IMAGES = 3
"""Images of a batch that is compared: batch norm trains on more than one."""
_MOST_IMAGES = 8
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest difference that is rounding, as a share of the largest output, by dtype; 0.05 for others."""


def difference(plan: SurgeryPlan, model: nn.Module, inputs: Inputs) -> str | None:
    """How the network after a plan differs from the one whose cut channels are zero; None if it does not.

    The model stays as it is. See `sample` for inputs.

    Raises:
        Exception: whatever the model itself raises on these inputs.
    """
    for dtype in (torch.float64, None):
        reference, smaller = working_copy(model), working_copy(model)
        zero_(plan, reference)
        apply_surgery_(plan, smaller)
        try:
            wanted = _outputs(reference, inputs, dtype)
        except Exception:
            if dtype is None:
                raise
            continue  # its forward computes in a dtype that it names
        try:
            outputs = _outputs(smaller, inputs, dtype)
        except Exception as error:
            return f"it stops with {one_line(error)}"
        return _difference(outputs, wanted)
    return None


def check_repeats(model: nn.Module, inputs: Inputs) -> None:
    """A UserError for a model whose output is another one each time, which nothing can be compared with."""
    reason = difference(SurgeryPlan(), model, inputs)
    if reason is not None:
        raise UserError(
            f"channels of {type(model).__name__} cannot be removed, because it gives other outputs each time "
            f"for the same inputs and random numbers ({reason}): what a removal changes cannot be seen"
        )


def sample(inputs: Inputs) -> Inputs:
    """A few inputs that differ from each other: those given, or noise in their form if they are alike."""
    few = first_of_batch(inputs, _MOST_IMAGES).map(Tensor.detach)
    if batch_size(few) > 1 and not any(map(_alike, few.tensors())):
        return few
    generator = torch.Generator().manual_seed(0)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        spread = float(tensor.float().std()) if tensor.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator) * (spread or 1.0)
        return tensor + noise.to(tensor)

    return resized(few, max(batch_size(few), IMAGES)).map(noisy)


def _outputs(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> list[list[Tensor]]:
    """Tensors that a model returns in each mode; the model is used up."""
    norm_alone_(model)
    if dtype is not None:
        model.to(dtype)
        inputs = inputs.map(lambda t: t.to(dtype) if t.is_floating_point() else t)
    outputs = []
    kind = inputs.tensors()[0].device.type
    for training in (True, False):
        for module in model.modules():
            module.training = training
        with steadily(inputs.tensors()), torch.no_grad(), torch.autocast(kind, enabled=False), force_eager():
            outputs.append(tensors_in(owned(inputs).call(model)))
    return outputs


def _difference(tried: list[list[Tensor]], wanted: list[list[Tensor]]) -> str | None:
    for mode, outputs, expected in zip(("while training", "in evaluation mode"), tried, wanted, strict=True):
        if len(outputs) != len(expected):
            return f"it returns {len(outputs)} tensors instead of {len(expected)} {mode}"
        for output, right in zip(outputs, expected, strict=True):
            if output.shape != right.shape:
                return f"it returns {list(output.shape)} instead of {list(right.shape)} {mode}"
            if (share := distance(output, right)) > _CLOSE.get(output.dtype, 0.05):
                return f"its output differs by {share:.2g} of the largest {mode}"
    return None


def distance(output: Tensor, right: Tensor) -> float:
    """Largest difference over the largest value; not-a-number at the same places is the same."""
    if output.numel() == 0:
        return 0.0
    if not (right.is_floating_point() or right.is_complex()):
        return float((output != right).float().mean())
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (output.detach(), right.detach()))
    a, b = a.double().nan_to_num(1e300), b.double().nan_to_num(1e300)
    if torch.equal(a, b):
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))


def _alike(tensor: Tensor) -> bool:
    """Whether a tensor of floating-point numbers says nothing: all its numbers are one."""
    return tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all())


MOST_TRIALS = 200
"""After this many, the rest is blamed without a look."""

T = TypeVar("T", bound=Hashable)
Check = Callable[[Sequence[T]], str | None]
"""What is wrong with some of the parts; None if nothing is."""


def blamed(parts: Sequence[T], wrong: Check[T]) -> dict[T, str]:
    """The parts of a plan that have to be left out so that the others are right, with the reasons.

    Halves are tried, so that one bad part among n takes about 2 log n trials.
    """
    trials = 0

    def tried(some: Sequence[T]) -> str | None:
        nonlocal trials
        trials += 1
        return wrong(some)

    def search(some: Sequence[T], reason: str) -> dict[T, str]:
        if len(some) == 1 or trials > MOST_TRIALS:
            return dict.fromkeys(some, reason)
        half = len(some) // 2
        reasons: dict[T, str] = {}
        for side in (some[:half], some[half:]):
            if (own := tried(side)) is not None:
                reasons |= search(side, own)
        # Neither is wrong alone: one of them has to give way.
        return reasons or dict.fromkeys(some[half:], reason)

    bad: dict[T, str] = {}
    while (rest := [part for part in parts if part not in bad]) and (reason := tried(rest)) is not None:
        bad |= search(rest, reason)
    return bad
