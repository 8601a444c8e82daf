"""`accelerate`: from a pruned model to one whose sparse layers are faster. ClickTrain section 5.4."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.compiler.fallback import accelerate_layers_
from clicktrain.compiler.module import Accelerated, refusal
from clicktrain.compiler.norm_statistics import check_statistics
from clicktrain.compiler.plan import RULES, LoweringPlan
from clicktrain.compiler.select import make_plan
from clicktrain.compiler.trace import Traced, TraceError, trace
from clicktrain.errors import UserError
from clicktrain.kernels.native import KernelError, keep_memory, toolchain
from clicktrain.kernels.native.failure import report_failure, summary, watch_failures
from clicktrain.kernels.native.folder import take_notice
from clicktrain.kernels.pack_model import pack
from clicktrain.kernels.sparse_conv2d import PackedConv2d

_PRECISIONS = ("fp32", "bf16")


def accelerate(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    rule: str = "measured",
    plan: LoweringPlan | None = None,
    dtypes: Sequence[str] = ("fp32",),
    remember: bool = True,
    verbose: bool = False,
) -> nn.Module:
    """Put the sparse kernels to work where they pay, for the network as a whole: ClickTrain section 5.4.

    The model is traced; each convolution's candidates (dense in each memory format and precision, sparse
    with each tiling) are measured on the example's shapes, forward and backward; and for the graph as a
    whole, with the conversions between layouts, the cheapest choice is taken. In regions that run sparse,
    activations are batch-blocked ``[N/V, C, H, W, V]``, and batch norm, addition and ReLU are one pass, whose
    statistics the convolution before it takes where that is faster. The
    result trains as the model does: the same parameters, ``state_dict``, ``train()`` and ``eval()``.

    Args:
        model: on the CPU, with packed convolutions (`clicktrain.pack`, ``finish(packed=True)``). One without
            any is copied and packed by its zeros: the result then has parameters of its own.
        example: a batch of images [N, C, H, W] as training uses it, or a tuple of the inputs of ``forward``.
            The plan holds for any number of images; another image size is lowered when it first comes.
        rule: ``measured``; ``density``, the paper's: sparse where more than 65% of the weights are zero; or
            ``sparse``: everything that can run blocked does. The latter two measure nothing.
        plan: replay these choices instead; a saved one, perhaps edited.
        dtypes: number types that may be used, whether under autocast or not: ``fp32`` (the parameters' own),
            ``bf16``. Dense convolutions compute in them. Accelerated regions keep their activations in them:
            with both, in what is measured to be faster for the network; unmeasured, in ``bf16``. They
            compute in the parameters' type, or in pairs of bfloat16 numbers summed up in float32 where the
            processor can.
        remember: take the plan that was measured before for such a network on this machine, or keep this one
            for the next time; False measures anew and keeps nothing.
        verbose: print the plan.

    Returns:
        An `Accelerated` view of the model. Where that is impossible the model itself, with a warning that
        says why: without a C compiler that works, or not on the CPU, as it was; if it cannot be traced, with
        those packed layers that pay running sparse one by one. Where some kernels cannot be built, others are
        chosen, with a warning.

    Raises:
        UserError: there is nothing sparse in the model, an unknown rule or number type, or a plan that wants
            statistics where they cannot be taken.
    """
    inputs: tuple[Any, ...] = example if isinstance(example, tuple) else (example,)
    _check_arguments(inputs, rule, dtypes)
    if isinstance(model, Accelerated):
        model = model.base
    if not _packed(model):
        model = pack(model)
        if not _packed(model):
            raise UserError(
                "the model has no pruned convolution: prune it first, there is nothing to accelerate"
            )
    reason = refusal(model, inputs)
    if reason is not None:
        warnings.warn(f"the packed model runs on the reference operator: {reason}", stacklevel=2)
        return model
    keep_memory()
    result: nn.Module | None
    with watch_failures() as failures:
        try:
            result = _accelerate(model, inputs, rule, plan, tuple(dtypes), remember, verbose)
        except KernelError as error:  # of what nothing goes without
            report_failure(error)
            result = None
    if result is None or (failures and not _is_faster(result)):
        warnings.warn(
            f"the packed model runs on the reference operator: {summary(failures)}{_and_notice()}",
            stacklevel=2,
        )
        return model
    if failures:
        warnings.warn(f"{summary(failures)}; other operators were chosen{_and_notice()}", stacklevel=2)
    elif notice := take_notice():
        warnings.warn(notice, stacklevel=2)
    return result


def _is_faster(model: nn.Module) -> bool:
    """Whether any convolution runs on a generated kernel."""
    if isinstance(model, Accelerated):
        return any(one.kind == "conv" for one in model.plan.blocked())
    return any(isinstance(layer, PackedConv2d) and layer.impl != "reference" for layer in model.modules())


def _and_notice() -> str:
    notice = take_notice()
    return f"; {notice}" if notice else ""


def _accelerate(
    model: nn.Module,
    inputs: tuple[Any, ...],
    rule: str,
    plan: LoweringPlan | None,
    dtypes: tuple[str, ...],
    remember: bool,
    verbose: bool,
) -> nn.Module:
    """`accelerate` a packed model where there is a compiler."""
    try:
        traced = trace(model, inputs)
    except TraceError as error:
        chosen = accelerate_layers_(model, inputs, rule)
        warnings.warn(
            f"the model cannot be traced ({error}): {len(chosen)} of its packed layers run sparse one by "
            "one, which converts their activations each time",
            stacklevel=3,
        )
        return model
    if plan is not None:
        check_statistics(traced, plan)
        _warn_of_pairs(plan)
    else:
        # Measuring draws random numbers; training goes on with its own.
        with torch.random.fork_rng(devices=[]):
            plan = make_plan(traced, inputs[0].shape[0], rule, dtypes, remember)
    result = Accelerated(model, plan, len(inputs))
    result.prepare(traced, inputs)
    _accelerate_inside_(model, traced, inputs, rule)
    if verbose:
        print(result.plan)
    return result


def _check_arguments(inputs: tuple[Any, ...], rule: str, dtypes: Sequence[str]) -> None:
    if rule not in RULES:
        raise UserError(f"rule is one of {', '.join(RULES)}, not {rule!r}")
    if unknown := set(dtypes) - set(_PRECISIONS):
        raise UserError(f"dtypes are {' and '.join(_PRECISIONS)}, not {', '.join(sorted(unknown))}")
    if not dtypes:
        raise UserError(f"dtypes are {' and '.join(_PRECISIONS)}, at least one")
    if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].shape[:1] in ((), (0,)):
        raise UserError("the example is a batch of images, at least one")


def _warn_of_pairs(plan: LoweringPlan) -> None:
    """Say so if a plan from elsewhere wants an instruction that this processor lacks."""
    pairs, tools = plan.with_pairs(), toolchain()
    if pairs and tools is not None and not tools.multiplies_pairs:
        warnings.warn(
            f"the plan multiplies pairs of bfloat16 numbers in {len(pairs)} layers, which this processor "
            "has no instruction for: they run, but slowly; measure a plan here",
            stacklevel=4,
        )


def _accelerate_inside_(model: nn.Module, traced: Traced, inputs: tuple[Any, ...], rule: str) -> None:
    """Packed layers inside modules that cannot be traced run one by one."""
    inside = [path for path in traced.opaque if _packed(model.get_submodule(path))]
    for path in inside:
        accelerate_layers_(model, inputs, rule, below=path)
    if inside:
        warnings.warn(
            f"{', '.join(inside)} cannot be traced ({traced.opaque[inside[0]]}): packed layers inside "
            "run one by one",
            stacklevel=4,
        )


def _packed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedConv2d) for module in model.modules())
