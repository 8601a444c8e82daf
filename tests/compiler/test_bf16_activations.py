"""Networks whose blocked regions keep activations in bfloat16: as accurate as autocast, half the memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pruned_networks import batch, network
from torch import Tensor, nn

from clicktrain import UserError, accelerate
from clicktrain.compiler import Accelerated, LoweringPlan
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, Tiling

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")
PAIRS = Tiling((2, 4), (1, 2), code="indexed", sources=16, pairs=True)


def test_unmeasured_plans_keep_what_the_run_is_in() -> None:
    x, _ = batch(4, 8, torch.float32)
    for dtypes, kept in ((("fp32",), "parameters"), (("fp32", "bf16"), "bf16"), (("bf16",), "bf16")):
        fast = accelerate(network("vgg11", torch.float32), x, rule="density", dtypes=dtypes)
        assert isinstance(fast, Accelerated)
        assert fast.plan.activations == kept


def in_bf16(model: nn.Module, x: Tensor, rule: str = "sparse") -> Accelerated:
    fast = accelerate(model, x, rule=rule, dtypes=("bf16",))
    assert isinstance(fast, Accelerated)
    assert fast.plan.activations == "bf16"
    return fast


def with_pairs(fast: Accelerated, x: Tensor) -> Accelerated:
    """The same network, every convolution of more than one column multiplying pairs in all phases."""
    choices = tuple(
        replace(c, tilings=tuple((phase, PAIRS) for phase in PHASES)) if c.kind == "conv" else c
        for c in fast.plan.choices
    )
    plan = LoweringPlan.from_json(replace(fast.plan, choices=choices).to_json())
    tools = toolchain()
    assert tools is not None
    slow = nullcontext() if tools.simd.pairs else pytest.warns(UserWarning, match="run, but slowly")
    with slow:
        paired = accelerate(fast, x, plan=plan)
    assert isinstance(paired, Accelerated)
    return paired


def step(model: nn.Module, x: Tensor, y: Tensor, autocast: bool = False) -> tuple[float, Tensor]:
    """Loss and all gradients of parameters."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat([g.double().flatten() for g in gradients])


@pytest.mark.long
@pytest.mark.parametrize(("name", "pairs"), [("resnet20", False), ("vgg11", True), ("mobilenet_v1", True)])
def test_as_accurate_as_autocast(name: str, pairs: bool) -> None:
    model = network(name, torch.float32)
    x, y = batch(24, 32, torch.float32)
    exact, cast = copy.deepcopy(model).double(), copy.deepcopy(model)
    fast = in_bf16(model, x)
    if pairs:
        fast = with_pairs(fast, x)
    true_loss, truth = step(exact, x.double(), y)
    errors, losses = [], []
    for m, autocast in ((fast, False), (fast, True), (cast, True)):
        loss, gradients = step(m, x, y, autocast)
        losses.append(abs(loss - true_loss))
        errors.append(float((gradients - truth).norm() / truth.norm()))
    assert errors[2] > 1e-3, "autocast is expected to round"
    assert max(errors[:2]) < 1.3 * errors[2]
    assert max(losses[:2]) < 0.02 * true_loss
    buffers = dict(fast.named_buffers())
    assert all(b.dtype is not torch.bfloat16 for b in buffers.values())
    outputs = []
    for m, autocast in ((fast, False), (cast, True)):
        m.load_state_dict(exact.state_dict())
        m.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            outputs.append(m(x))
    assert outputs[0].dtype is torch.float32
    want = exact.eval()(x.double())
    assert (outputs[0] - want).norm() < 1.3 * (outputs[1] - want).norm() + 1e-3 * want.norm()


def test_a_training_goes_down_as_in_float32() -> None:
    model = network("resnet20", torch.float32)
    x, y = batch(32, 16, torch.float32)
    fast, plain = in_bf16(model, x), accelerate(copy.deepcopy(model), x, rule="sparse")
    last = []
    for m in (fast, plain):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            loss = F.cross_entropy(m(x), y)
            loss.backward()
            optimizer.step()
        last.append(loss.item())
    assert last[0] == pytest.approx(last[1], rel=0.1, abs=0.02)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert all(p.dtype is torch.float32 for p in fast.parameters())


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Of activations that are kept for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dim() == 5:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    output.sum().backward()
    return sum(kept.values())


def test_activations_take_half_the_memory() -> None:
    model = network("resnet20", torch.float32)
    x, _ = batch(16, 16, torch.float32)
    full = accelerate(copy.deepcopy(model), x, rule="sparse")
    assert saved_bytes(in_bf16(model, x), x) * 2 == saved_bytes(full, x) > 0


def test_the_measured_plan_says_what_it_keeps() -> None:
    model = network("vgg11", torch.float32)
    x, y = batch(8, 8, torch.float32)
    fast = accelerate(model, x, dtypes=("fp32", "bf16"), remember=False)
    assert isinstance(fast, Accelerated)
    plan = fast.plan
    assert any("activations kept in" in note and "bf16" in note for note in plan.notes)
    other = "bf16" if plan.activations == "parameters" else "fp32"
    blocked = [c for c in plan.choices if c.kind == "conv" and c.layout == "blocked"]
    assert all(any(f"activations in {other}" in r for r in c.refused) for c in blocked)
    for kept in ("parameters", "bf16"):
        tilings = () if any(t.pairs for c in plan.choices for _, t in c.tilings) else None
        choices = plan.choices if tilings is None else tuple(replace(c, tilings=()) for c in plan.choices)
        text = replace(plan, activations=kept, choices=choices).to_json()
        again = LoweringPlan.from_json(text)
        assert again.activations == kept
        assert ("activations in bf16" in str(again).splitlines()[0]) == (kept == "bf16")
        loss, _ = step(accelerate(model, x, plan=again), x, y)
        assert loss == pytest.approx(step(copy.deepcopy(model).double(), x.double(), y)[0], rel=0.02)


def test_float64_keeps_its_own_type() -> None:
    model = network("vgg11")
    x, y = batch(4, 8)
    fast = accelerate(model, x, rule="sparse", dtypes=("bf16",))
    assert isinstance(fast, Accelerated)
    assert fast.plan.activations == "parameters"
    single = network("vgg11", torch.float32)
    paired = with_pairs(in_bf16(single, x.float()), x.float())
    exact = step(copy.deepcopy(single).double(), x, y)
    loss, gradients = step(paired.double(), x, y)
    assert loss == pytest.approx(exact[0], rel=1e-9)
    torch.testing.assert_close(gradients, exact[1], rtol=1e-6, atol=1e-9)


def test_wrong_plans_are_refused() -> None:
    model = network("resnet20", torch.float32)
    x, _ = batch(4, 16, torch.float32)
    plan = with_pairs(in_bf16(model, x), x).plan
    with pytest.raises(UserError, match="activations of a plan are parameters or bf16, not 'fp8'"):
        LoweringPlan.from_json(plan.to_json().replace('"activations": "bf16"', '"activations": "fp8"'))
    for wrong, message in (
        ('"pairs": "false"', "pairs of a tiling is true or false, not 'false'"),
        ('"code": "tap"', "the code of a tiling is unrolled, cache_blocked or indexed, not 'tap'"),
        ('"code": "cache_blocked"', "conv1 cannot multiply pairs in forward with cache_blocked code"),
    ):
        key = wrong.split(":")[0]
        right = '"pairs": true' if key == '"pairs"' else '"code": "indexed"'
        with pytest.raises(UserError, match=message):
            LoweringPlan.from_json(plan.to_json().replace(right, wrong))
    text = (
        plan.to_json()
        .replace('"pairs": true', '"pairs": false')
        .replace('"code": "indexed"', '"code": "cache_blocked"')
    )
    with pytest.raises(
        UserError, match="conv1 has no cache_blocked wgrad: set the tiling's code to unrolled or"
    ):
        LoweringPlan.from_json(text)
    with pytest.raises(UserError, match="dtypes are fp32 and bf16, at least one"):
        accelerate(model, x, dtypes=())
    with pytest.raises(UserError, match="conv1 multiplies pairs of bfloat16 numbers"):
        LoweringPlan.from_json(plan.to_json().replace('"activations": "bf16"', '"activations": "parameters"'))
