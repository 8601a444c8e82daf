"""2:4: when it is legal, counted number by number; what the product computes, by a dense one in its place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse.semi_structured import SparseSemiStructuredTensorCUSPARSELT

from clicktrain.formats.packed import Structure, pack_values, unpack_values
from clicktrain.kernels.impls import ConvProblem, candidates_for
from clicktrain.kernels.sparse_conv2d import IMPLS, sparse_conv2d
from clicktrain.kernels.sparse_conv2d.impl import semi_structured

HALF = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def mask_of(filters: int, channels: int, keep: int = 2, of: int = 4) -> Tensor:
    """``keep`` of each ``of`` consecutive channels."""
    scores = torch.rand(filters, -(-channels // of), of)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(keep, 2).indices, True)
    return kept.flatten(1)[:, :channels, None, None].contiguous()


def legal(mask: Tensor, problem: ConvProblem) -> bool:
    """The rule, read off the definition of 2:4 and PyTorch's own table of shapes."""
    f, c, r, s = mask.shape
    constraints = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    limits = constraints.get(problem.activation_dtype)
    if limits is None or problem.activations not in ("bfloat16", "float16"):
        return False
    if (r, s, problem.stride, problem.padding, problem.groups) != (1, 1, (1, 1), (0, 0), 1):
        return False
    for row in range(f):
        for first in range(0, c, 4):
            if sum(bool(mask[row, channel, 0, 0]) for channel in range(first, min(first + 4, c))) > 2:
                return False
    rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
    return f >= rows and c >= columns and f % rows == 0 and c % columns == 0


@pytest.mark.parametrize(
    ("filters", "channels", "keep", "of", "settings"),
    [
        (16, 32, 2, 4, {}),
        (16, 32, 1, 4, {"activations": "float16"}),
        (16, 32, 1, 2, {}),
        (32, 16, 4, 8, {}),
        (16, 32, 3, 4, {}),
        (8, 32, 2, 4, {}),
        (16, 24, 2, 4, {}),
        (16, 30, 2, 4, {}),
        (16, 32, 2, 4, {"activations": "float32"}),
        (16, 32, 2, 4, {"stride": (2, 2)}),
        (16, 32, 2, 4, {"padding": (1, 0)}),
        (16, 32, 2, 4, {"groups": 2}),
    ],
    ids=str,
)
def test_the_rule(filters: int, channels: int, keep: int, of: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mask = mask_of(filters, channels, keep, of)
    given = {"activations": "bfloat16", "device": "cuda", **settings}
    problem = ConvProblem.of_structure(Structure.from_mask(mask), (3, 3), 2, **given)
    reasons = semi_structured.illegal(problem)
    assert (reasons == []) == legal(mask, problem), reasons
    spoiled = mask.clone()
    spoiled[-1, :3] = True
    problem = replace(problem, two_of_four=False)
    assert not legal(spoiled, problem)
    assert "it is not 2:4" in " ".join(semi_structured.illegal(problem))
    assert not ConvProblem.of_structure(Structure.from_mask(spoiled), (3, 3), 2).two_of_four


def test_kernels_of_3x3_and_empty_layers() -> None:
    structure = Structure.from_mask(torch.zeros(16, 16, 3, 3, dtype=torch.bool))
    assert not ConvProblem.of_structure(structure, (3, 3), 2).two_of_four
    nothing = Structure.from_mask(torch.zeros(16, 16, 1, 1, dtype=torch.bool))
    assert ConvProblem.of_structure(nothing, (3, 3), 2).two_of_four


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_product_and_its_gradients(
    dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch compresses on GPUs alone; what it multiplies by is the same matrix."""
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    torch.manual_seed(0)
    mask = mask_of(16, 32)
    structure = Structure.from_mask(mask)
    x = torch.randn(3, 32, 2, 5, dtype=torch.float64).to(dtype)
    values = pack_values(structure, torch.randn(mask.shape)).to(dtype).float()
    added = torch.randn(16) if bias else None
    gy = torch.randn(3, 16, 2, 5, dtype=torch.float64).to(dtype)
    exact = [x.double().requires_grad_(), unpack_values(structure, values.double()).requires_grad_()]
    y = F.conv2d(*exact, None if added is None else added.double())  # type: ignore[misc]
    gx, gw = torch.autograd.grad(y, exact, gy.double())
    mine = [x.permute(1, 2, 3, 0).contiguous().requires_grad_(), values.requires_grad_()]
    kernels = semi_structured.prepare(structure, ConvProblem.of_structure(structure, (2, 5), 3), {})
    got = kernels.convolve(*mine, added, *kernels.arguments)
    own_gx, own_gv = torch.autograd.grad(got, mine, gy.permute(1, 2, 3, 0))
    assert own_gv.dtype is torch.float32
    for one, other in (
        (got.detach().permute(3, 0, 1, 2), y.detach()),
        (own_gx.permute(3, 0, 1, 2), gx),
        (own_gv, pack_values(structure, gw)),
    ):
        assert float((one.double() - other).abs().max() / other.abs().max()) < HALF[dtype]


def test_it_is_one_more_candidate_on_gpus_and_refused_elsewhere() -> None:
    assert IMPLS["semi_structured"] in candidates_for("sparse_conv2d", "cuda")
    assert IMPLS["semi_structured"] not in candidates_for("sparse_conv2d", "cpu")
    structure = Structure.from_mask(mask_of(16, 32))
    values = pack_values(structure, torch.randn(16, 32, 1, 1)).bfloat16()
    with pytest.raises(
        ValueError, match="impl='semi_structured' cannot run this layer: it runs on cuda, not"
    ):
        sparse_conv2d(torch.randn(2, 32, 3, 3).bfloat16(), values, structure, impl="semi_structured")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mask = mask_of(128, 256)
    structure = Structure.from_mask(mask).to("cuda")
    values = pack_values(structure, torch.randn(mask.shape, device="cuda")).to(dtype)
    x = torch.randn(16, 256, 4, 4, device="cuda").to(dtype)
    y = sparse_conv2d(x, values, structure, impl="semi_structured")
    expected = nn.functional.conv2d(x.double(), unpack_values(structure, values.double()))
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < HALF[dtype]
