"""Adding a kernel backend: the recipe of CONTRIBUTING.md, followed by a third implementation.

1. Write a slow but right version first, or use ``reference``: it is the oracle.
2. Make an `Impl` of it (``kernels/impls.py``): a name; ``reject``, which returns reasons and imports nothing
   heavy; ``prepare``, which computes once what depends on the kept positions and returns `Kernels`; ``run``,
   the layer alone on ``[N, C, H, W]``; its ``tolerance`` by dtype; the ``layout`` of its activations and its
   ``devices``. Add ``candidates`` only if there is something to tune per phase.
3. If its activations have another layout, describe that in a `Layout` (``kernels/layouts.py``): ``enter`` and
   ``leave``, and whichever of batch norm, pooling and averaging can run in it. The rest is converted.
4. ``register("sparse_conv2d", impl)`` and ``register_layout(layout)`` next to the others. No other file
   changes: the compiler offers it where ``reject`` gives no reason, measures it, and chooses among all
   layouts; ``tests/kernels/test_sparse_conv2d.py`` goes through everything that is registered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import assert_same_step
from torch import Tensor, nn

from clicktrain import accelerate
from clicktrain.compiler import Accelerated, LoweringPlan
from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure, pack_values
from clicktrain.kernels.impls import ConvProblem, Impl, Kernels, Phase, candidates_for, register
from clicktrain.kernels.layouts import LAYOUTS, Layout, register_layout
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.kernels.sparse_conv2d import IMPLS, sparse_conv2d
from clicktrain.kernels.sparse_conv2d.api import OPERATOR

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")


def reject(problem: ConvProblem) -> list[str]:
    reasons = []
    if problem.kernel != (1, 1) or problem.stride != (1, 1) or problem.padding != (0, 0):
        reasons.append("it is for 1x1 kernels with stride 1")
    if problem.groups > 1 or not problem.equal_filters:
        reasons.append("it wants one group and equally many weights per filter")
    return reasons


def convolve(x: Tensor, values: Tensor, bias: Tensor | None, channels: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, H, W, F]: for each of a filter's weights, gather the channel that it reads."""
    y = sum(x.index_select(3, channels[:, k]) * values[:, k] for k in range(channels.shape[1]))
    assert isinstance(y, Tensor)
    return y if bias is None else y + bias


def prepare(structure: Structure, problem: ConvProblem, tilings: Mapping[Phase, Any]) -> Kernels:
    f = structure.shape[0]
    return Kernels(convolve, (structure.mask().flatten(1).nonzero()[:, 1].view(f, -1),))


def run(x: Tensor, values: Tensor, structure: Structure, bias: Tensor | None, *options: Any) -> Tensor:
    channels = structure.mask().flatten(1).nonzero()[:, 1].view(structure.shape[0], -1)
    return convolve(x.permute(0, 2, 3, 1), values, bias, channels).permute(0, 3, 1, 2)


NHWC = Layout(
    "nhwc",
    lambda dtype: lambda x: x.permute(0, 2, 3, 1).contiguous(),
    lambda x, n: x.permute(0, 3, 1, 2).contiguous(),
)
GATHER = Impl("gather", reject, prepare, run, {torch.float64: 1e-12, torch.float32: 1e-5}, layout="nhwc")


@pytest.fixture(autouse=True)
def third() -> Iterator[None]:
    """Registered for one test; the built-in kernels refuse 1x1 layers meanwhile."""
    impls, layouts = dict(candidates_and_oracle()), dict(LAYOUTS)
    register(OPERATOR, GATHER)
    register_layout(NHWC)
    blocked = IMPLS["blocked"]

    def no_points(problem: ConvProblem) -> list[str]:
        return ["left to others here"] if problem.kernel == (1, 1) else blocked.reject(problem)

    register(OPERATOR, replace(blocked, reject=no_points))
    yield
    for table, before in ((IMPLS, impls), (LAYOUTS, layouts)):
        table.clear()  # type: ignore[attr-defined]
        table.update(before)  # type: ignore[attr-defined]


def candidates_and_oracle() -> Mapping[str, Impl]:
    return IMPLS


class Points(nn.Module):
    """A 3x3 layer, and two 1x1 layers with an activation between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Conv2d(4, width, 1)
        self.second = nn.Conv2d(width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.relu(self.first(self.body(self.stem(x)))))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))  # type: ignore[no-any-return]


def points(width: int = 12, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Packed, with one weight in each filter of the 1x1 layers."""
    torch.manual_seed(0)
    model = Points(width)
    first, second = (
        F.one_hot(torch.randint(size, (width,)), size).bool()[:, :, None, None] for size in (4, width)
    )
    masks = {"first": first, "second": second, "body": torch.rand(4, 4, 3, 3) < 0.3}
    pack_model_(model, masks)
    return model.to(dtype)


def images(dtype: torch.dtype = torch.float64, n: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8, dtype=dtype), torch.randint(5, (n,))


def fast(model: nn.Module, x: Tensor, **options: Any) -> Accelerated:
    result = accelerate(model, x, **options)
    assert isinstance(result, Accelerated)
    return result


def test_it_computes_what_the_oracle_does() -> None:
    torch.manual_seed(0)
    mask = F.one_hot(torch.randint(6, (4,)), 6).bool()[:, :, None, None]
    structure = Structure.from_mask(mask)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    values = pack_values(structure, torch.randn(4, 6, 1, 1, dtype=torch.float64))
    y, expected = (sparse_conv2d(x, values, structure, impl=name) for name in ("gather", "reference"))
    tolerance = GATHER.tolerance[torch.float64]
    assert float((y - expected).abs().max() / expected.abs().max()) <= tolerance


@pytest.mark.parametrize("rule", ["sparse", "density"])
def test_it_is_offered_refused_with_reasons_lowered_and_right(rule: str) -> None:
    assert [impl.name for impl in candidates_for(OPERATOR)] == [
        "blocked",
        "triton",
        "semi_structured",
        "gather",
    ]
    assert [impl.name for impl in candidates_for(OPERATOR, "cpu")] == ["blocked", "gather"]
    model = points()
    reference = copy.deepcopy(model)
    x, y = images()
    result = fast(model, x, rule=rule)
    choices = result.plan.by_layer()
    assert {name: (choices[name].layout, choices[name].operator) for name in ("body", "first", "second")} == {
        "body": ("blocked", "sparse blocked"),
        "first": ("nhwc", "sparse gather"),
        "second": ("nhwc", "sparse gather"),
    }
    assert "sparse gather: it is for 1x1 kernels with stride 1" in choices["body"].refused
    assert "sparse blocked: left to others here" in choices["first"].refused
    assert choices["norm"].layout in ("plain", "blocked")  # there is no batch norm in nhwc
    code = result.graph(x).code
    assert code.count("self.steps.nhwc_") == 1  # between the two layers nothing is converted
    assert_same_step(result, reference, x, y)
    again = LoweringPlan.from_json(result.plan.to_json())
    assert again == result.plan
    assert_same_step(fast(model, x, plan=again), reference, x, y)


def test_it_is_chosen_where_it_is_cheaper() -> None:
    model = points(256, torch.float32)
    reference = copy.deepcopy(model)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(5, (16,))
    result = fast(model, x, remember=False)
    choices = result.plan.by_layer()
    # One weight of 256: the dense layer does over a hundred times the work.
    assert choices["second"].operator == "sparse gather"
    assert any(reason.startswith("dense nchw fp32: ") for reason in choices["second"].refused)
    reason = "sparse gather: it is for 1x1 kernels with stride 1"
    assert any(one.startswith(reason) for one in choices["body"].refused)
    assert_same_step(result, reference, x, y, 1e-3)


def test_a_plan_names_only_what_is_registered() -> None:
    plan = fast(points(), images()[0], rule="sparse").plan
    first = plan.by_layer()["first"]
    with pytest.raises(UserError, match="blocked runs first in the blocked layout"):
        replace(first, impl="blocked")
    with pytest.raises(UserError, match="first has no implementation 'reference'"):
        replace(first, impl="reference")
    for layer, message, fields in (
        ("norm", "norm cannot run in the nhwc layout", {"layout": "nhwc"}),
        ("body", "gather cannot run body, it is for 1x1 kernels", {"layout": "nhwc", "impl": "gather"}),
    ):
        choices = tuple(replace(c, **fields) if c.layer == layer else c for c in plan.choices)
        with pytest.raises(UserError, match=message):
            accelerate(points(), images()[0], plan=replace(plan, choices=choices))
    with pytest.raises(UserError, match="first has no implementation 'tritium'"):
        replace(first, impl="tritium")
    with pytest.raises(
        UserError,
        match="the layout of first is 'blocked' or 'batch_innermost' or 'nhwc' or 'plain', not 'nchw16'",
    ):
        replace(first, layout="nchw16")


def test_a_problem_is_a_key_and_plain_data() -> None:
    problem = ConvProblem(2, 3, 4, (3, 3), (8, 9), padding=(1, 1), stride=(2, 1))
    assert problem.output == (4, 9)
    assert ConvProblem.from_json(problem.to_json()) == problem
    assert hash(problem) == hash(replace(problem))
    assert str(problem) == "sparse_conv2d 4x3x3x3 @ 2x8x9 float32 1"
    with pytest.raises(UserError, match="a problem has the keys activations, batch"):
        ConvProblem.from_json({"batch": 2})
    elsewhere = replace(problem, device="cuda")
    assert IMPLS["blocked"].refusals(elsewhere)[0] == "it runs on cpu, not on cuda"
    assert IMPLS["reference"].refusals(elsewhere) == []
