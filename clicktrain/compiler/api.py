"""`accelerate`: from a pruned model to one whose sparse layers are faster. ClickTrain section 5.4."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.compiler.believe import LoweringError, is_operator
from clicktrain.compiler.exchange import exchanged_gradients
from clicktrain.compiler.fallback import accelerate_layers_, plan_by_layer
from clicktrain.compiler.module import Accelerated, holds_packed, refusal
from clicktrain.compiler.norm_statistics import check_plan
from clicktrain.compiler.plan import RULES, LoweringPlan
from clicktrain.compiler.select import make_plan
from clicktrain.errors import UserError
from clicktrain.graph import Inputs, as_inputs, own_random_numbers
from clicktrain.graph.faithful import ExampleError, UnfaithfulError, believed_graph
from clicktrain.graph.inputs import blank
from clicktrain.graph.plain_calls import plain_calls
from clicktrain.kernels.native import KernelError, keep_memory
from clicktrain.kernels.native.failure import report_failure, summary, watch_failures
from clicktrain.kernels.native.folder import take_notice
from clicktrain.kernels.pack_model import pack, pack_model_, pack_refusals
from clicktrain.latency.network_times import Measured, Timed, bare_copy, network_times

_PRECISIONS = ("fp32", "bf16")


def accelerate(
    model: nn.Module,
    example: Any,
    *,
    rule: str = "measured",
    plan: LoweringPlan | None = None,
    dtypes: Sequence[str] = ("fp32",),
    remember: bool = True,
    verbose: bool = False,
) -> Accelerated:
    """Run the layers of a pruned model on sparse kernels where that is faster: ClickTrain section 5.4.

    The model is traced; each convolution's candidates (dense in each memory format and precision, sparse
    with each tiling) are measured on the example's shapes, forward and backward; and for the graph as a
    whole, with the conversions between layouts, the cheapest choice is taken. In the blocked layout,
    activations are ``[N/V, C, H, W, V]``, and batch norm, addition and ReLU are one pass, whose statistics
    the convolution before it takes where that is faster. The result trains
    as the model does: the same parameters, ``state_dict``, ``train()`` and ``eval()``.

    Args:
        model: on the CPU, with packed convolutions (`clicktrain.pack`, ``finish(packed=True)``). One without
            any is copied and packed by its zeros: the result then has parameters of its own. Where nothing
            can be packed (channels were removed, as PruneTrain and PaT do, or nothing was), the dense
            convolutions are measured and lowered alike, as a view of the model itself.
        example: a batch of images [N, C, H, W] as training uses it; a tuple of positional arguments of
            ``forward``, a dict of keyword arguments, or `clicktrain.graph.Inputs` with both. The plan holds
            for any number of images; another image size, and a call with other arguments, is lowered when it
            first comes.
        rule: ``measured``; ``density``, the paper's: sparse where more than 65% of the weights are zero; or
            ``sparse``: everything that can run blocked does. The latter two measure nothing.
        plan: replay these choices instead; a saved one, perhaps edited.
        dtypes: that may be used, whether under autocast or not: ``fp32`` (the parameters' own), ``bf16``.
            Dense convolutions compute in them, accelerated regions keep their activations in them: with both,
            in what is measured to be faster for the network; unmeasured, in ``bf16``. Regions compute in the
            parameters' type, or in pairs of bfloat16 numbers summed up in float32 where the processor can.
        remember: take the plan that was measured before for such a network on this machine, or keep this one
            for the next time; False measures again and keeps nothing.
        verbose: print the plan.

    Returns:
        An `Accelerated` view of the model, with its ``plan``. Without a C compiler that works, or not on the
        CPU, it calls the model as it is, and is not ``active``. Where some kernels cannot be built, others
        are chosen. Warnings say why.

        The lowered network has been run beside the model, in training and in evaluation mode, twice each and
        under the same random numbers: outputs, gradients, buffers, attributes and random numbers drawn are
        the same. The smallest modules that would differ (they count calls, draw random numbers, recompute
        activations, cannot be traced) run as they are written, with those packed layers inside that pay
        running sparse one by one; a warning says which and why.

    Raises:
        UserError: a part of the model is accelerated already, it does not run on the example, an unknown rule
            or dtype, or a plan that wants what cannot run.
    """
    inputs = as_inputs(example, model)
    _check_arguments(inputs, rule, dtypes)
    if isinstance(model, Accelerated):
        model = model.base
    if nested := [path for path, part in model.named_modules() if isinstance(part, Accelerated)]:
        raise UserError(
            f"{nested[0]} is accelerated already: accelerate the network as a whole, with {nested[0]}.base "
            "there"
        )
    if not holds_packed(model):
        packed = pack(model)
        model = packed if holds_packed(packed) else model
    reason = refusal(model, inputs.tensors())
    if reason is not None:
        message = f"{_unaccelerated(model)}: {reason}"
        warnings.warn(message, stacklevel=2)
        return _as_it_is(model, inputs, rule, message)
    keep_memory()
    result: Accelerated | None = None
    # The result has to serve training, whatever mode this is called in.
    with watch_failures() as failures, torch.inference_mode(False), plain_calls(model):
        try:
            result = _accelerated(model, inputs, rule, plan, tuple(dtypes), remember)
            result.plan = replace(result.plan, exchange=exchanged_gradients(result.base))
        except KernelError as error:  # of a kernel that every region needs
            report_failure(error)
    if result is None or (failures and not any(choice.implementation for choice in result.plan.choices)):
        message = f"{_unaccelerated(model)}: {summary(failures)}{_and_notice()}"
        warnings.warn(message, stacklevel=2)
        return _as_it_is(model, inputs, rule, message)
    if failures:
        message = f"{summary(failures)}; other operators were chosen{_and_notice()}"
        warnings.warn(message, stacklevel=2)
    elif notice := take_notice():
        warnings.warn(notice, stacklevel=2)
    if verbose:
        print(result.plan)
    return result


def _unaccelerated(model: nn.Module) -> str:
    packed = holds_packed(model)
    return "the packed model runs on the reference operator" if packed else "the model runs as it is written"


def _as_it_is(model: nn.Module, inputs: Inputs, rule: str, note: str) -> Accelerated:
    """A view that calls the model's own code, with a plan that says why."""
    batch = inputs.tensors()[0].shape[0]
    return Accelerated(model, plan_by_layer(model, [], rule, batch, note), rule, lowers=False)


def _and_notice() -> str:
    notice = take_notice()
    return f"; {notice}" if notice else ""


def _accelerated(
    model: nn.Module,
    inputs: Inputs,
    rule: str,
    plan: LoweringPlan | None,
    dtypes: tuple[str, ...],
    remember: bool,
) -> Accelerated:
    inputs = inputs.ordinary()
    batch = inputs.tensors()[0].shape[0]
    try:
        believed = believed_graph(model, inputs, is_operator)
    except ExampleError as error:
        raise UserError(f"the model does not run on the example: {error}") from error
    except UnfaithfulError as error:
        return _by_its_own_code(model, inputs, rule, plan, str(error))
    if plan is not None:
        check_plan(believed.graph, plan)
        _warn_if_slow(plan)
    else:
        # Measuring draws random numbers; training must not notice.
        with own_random_numbers():
            plan = make_plan(believed.graph, batch, rule, dtypes, remember)
    result = Accelerated(model, plan, rule)
    try:
        result.adopt(believed, inputs)
    except LoweringError as error:
        reason = f"computes something else when it is lowered ({error})"
        return _by_its_own_code(model, inputs, rule, None, reason)
    return result


def _by_its_own_code(
    model: nn.Module, inputs: Inputs, rule: str, plan: LoweringPlan | None, reason: str
) -> Accelerated:
    chosen = accelerate_layers_(model, inputs, rule, plan=plan)
    message = (
        f"{type(model).__name__} {reason}: {len(chosen)} of its packed layers run sparse one by one, which "
        "converts their activations each time; all else runs as it is written"
    )
    warnings.warn(message, stacklevel=4)
    if plan is not None:
        plan = plan.without(dict.fromkeys({*plan.by_layer()} - {*chosen}, "its kernels cannot be built"))
    batch = inputs.tensors()[0].shape[0]
    return Accelerated(model, plan or plan_by_layer(model, chosen, rule, batch, message), rule, lowers=False)


def _check_arguments(inputs: Inputs, rule: str, dtypes: Sequence[str]) -> None:
    if rule not in RULES:
        raise UserError(f"rule is one of {', '.join(RULES)}, not {rule!r}")
    if unknown := set(dtypes) - set(_PRECISIONS):
        raise UserError(f"dtypes are {' and '.join(_PRECISIONS)}, not {', '.join(sorted(unknown))}")
    if not dtypes:
        raise UserError(f"dtypes are {' and '.join(_PRECISIONS)}, at least one")
    tensors = inputs.tensors()
    if not tensors or tensors[0].shape[:1] in ((), (0,)):
        raise UserError("the example is a batch of images, at least one")


def _warn_if_slow(plan: LoweringPlan) -> None:
    clauses = plan.slow_here()
    if clauses:
        warnings.warn(
            f"{len(clauses)} layers of the plan run, but slowly: {next(iter(clauses))} "
            f"{next(iter(clauses.values()))}; measure a plan here",
            stacklevel=4,
        )


class MaskedLatency:
    """Measures copies of a network, one dense and one pruned, packed and accelerated (ClickTrain 5.4).

    For ``attach(..., measure=MaskedLatency(model, example))``: a latency target is then met as measured. The
    model is on the CPU and has no packed convolutions; sizes of the example [N, C, H, W] count.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        self.model, self.example = model, example

    def __call__(self, masks: Mapping[str, Tensor], batch: int, timed: Timed) -> Measured:
        """Milliseconds of a batch of the dense copy and of the accelerated one, taking turns.

        ``masks`` are layer name -> bool of the weight's shape, True = kept. Others stay dense.
        """
        dense, pruned = bare_copy(self.model), bare_copy(self.model)
        refused = pack_refusals(pruned, masks)
        pack_model_(pruned, {name: mask for name, mask in masks.items() if name not in refused})
        inputs = blank(as_inputs(self.example, self.model), batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run warns when it accelerates the real network
            fast = accelerate(pruned, inputs)
        return Measured.of(*network_times([dense, fast], inputs, batch, timed))
