"""2:4 on the tensor cores of NVIDIA GPUs: 1x1 convolutions and linear layers, in ``[C, H, W, N]``.

There such a layer is one product, ``[F, C]`` times ``[C, H W N]``, and cuSPARSELt multiplies a first operand
of which two in four consecutive numbers are zero at up to twice the dense rate. Weights change in each step
and are compressed again. The backward pass is dense: transposed, the weight is not 2:4, and the gradient of
the weight is taken at all positions, of which the kept ones are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clicktrain.formats.packed import Structure, pack_values, unpack_values
from clicktrain.kernels.impls import ConvProblem, Impl, Kernels, Phase
from clicktrain.kernels.sparse_conv2d.impl.alone import run_alone

MULTIPLES: Mapping[str, tuple[int, int]] = {"bfloat16": (16, 16), "float16": (16, 16)}
"""By dtype, what filters and channels have to be multiples of for cuSPARSELt."""
CAPABILITY = (8, 0)
"""The first GPUs whose tensor cores skip zeros."""


def reject(problem: ConvProblem) -> list[str]:
    """Why a problem is no product with a 2:4 weight on the GPU here."""
    reasons = illegal(problem)
    if not reasons and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability < CAPABILITY:
            reasons.append(f"2:4 wants compute capability 8.0, this GPU has {capability[0]}.{capability[1]}")
    return reasons


def illegal(problem: ConvProblem) -> list[str]:
    """Why cuSPARSELt has no product for a problem, whatever the GPU."""
    reasons = []
    if (
        problem.kernel != (1, 1)
        or problem.stride != (1, 1)
        or problem.padding not in ((0, 0), "valid", "same")
    ):
        reasons.append("2:4 is for 1x1 kernels with stride 1 and without padding")
    if problem.groups != 1:
        reasons.append("2:4 is for one group of channels")
    if not problem.two_of_four:
        reasons.append("of four consecutive channels some filter keeps more than two: it is not 2:4")
    multiples = MULTIPLES.get(problem.activations)
    if multiples is None:
        reasons.append(f"2:4 is for activations in {' or '.join(MULTIPLES)}, not {problem.activations}")
    else:
        for what, size, multiple in zip(
            ("filters", "channels"), (problem.filters, problem.channels), multiples, strict=True
        ):
            if size % multiple:
                reasons.append(f"2:4 wants {what} in multiples of {multiple}, not {size}")
    if problem.dtype not in ("float32", problem.activations):
        reasons.append(f"it does not keep activations in {problem.activations} beside {problem.dtype}")
    return reasons


class _Product(torch.autograd.Function):
    """``weight [F, C] @ x [C, columns]``, by the 2:4 product forward and dense ones back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, structure: Structure) -> Tensor:
        weight = unpack_values(structure, values).flatten(1).to(x.dtype)
        ctx.structure = structure
        ctx.save_for_backward(x, values)
        result: Tensor = torch.mm(torch.sparse.to_sparse_semi_structured(weight), x)
        return result

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        x, values = ctx.saved_tensors
        structure: Structure = ctx.structure
        gy = gy.to(x.dtype).contiguous()
        gx = gv = None
        if ctx.needs_input_grad[0]:
            gx = unpack_values(structure, values).flatten(1).to(x.dtype).t() @ gy
        if ctx.needs_input_grad[1]:
            gv = pack_values(structure, (gy @ x.t()).view(structure.shape)).to(values.dtype)
        return gx, gv, None


def convolve(x: Tensor, values: Tensor, bias: Tensor | None, structure: Structure) -> Tensor:
    """[C, H, W, N] -> [F, H, W, N], differentiable in x, values and bias."""
    y: Tensor = _Product.apply(x.reshape(x.shape[0], -1), values, structure)  # type: ignore[no-untyped-call]
    if bias is not None:
        y = y + bias.to(y.dtype)[:, None]
    return y.view(-1, *x.shape[1:])


def prepare(structure: Structure, problem: ConvProblem, tilings: Mapping[Phase, Any]) -> Kernels:
    """Bind the product to a layer; there is nothing to tune."""
    del problem, tilings
    return Kernels(convolve, (structure,))


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    structure: Structure,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Run a layer alone, between two conversions; arguments as in `Impl.run`.

    Raises:
        ValueError: what `reject` says, or it is not on a GPU.
    """

    def product(problem: ConvProblem, inside: Tensor) -> Tensor:
        del problem
        return convolve(inside, values, bias, structure)

    return run_alone(
        "semi_structured", IMPL.refusals, product, x, structure, values.dtype, stride, padding, dilation,
        groups,
    )  # fmt: skip


IMPL = Impl(
    "semi_structured",
    reject,
    prepare,
    sparse_conv2d,
    {torch.bfloat16: 1e-2, torch.float16: 2e-3},
    layout="batch_innermost",
    devices=("cuda",),
)
