"""What is decided, by which rule, and that it can be saved, edited and replayed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pruned_networks import SMALL, assert_same_step, batch, network, prune_, twins

from clicktrain import UserError, accelerate, create_model
from clicktrain.compiler import Accelerated, LoweringPlan, dtypes_worth_measuring
from clicktrain.kernels.native import toolchain

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")


def accelerated(model: torch.nn.Module, x: torch.Tensor, **options: object) -> Accelerated:
    fast = accelerate(model, x, **options)  # type: ignore[arg-type]
    assert isinstance(fast, Accelerated)
    return fast


@pytest.mark.parametrize("rule", ["sparse", "density"])
def test_a_plan_is_saved_and_replayed(rule: str) -> None:
    model, reference = twins("resnet20")
    x, y = batch(5)
    plan = accelerated(model, x, rule=rule).plan
    again = LoweringPlan.from_json(plan.to_json())
    assert again == plan
    fast = accelerated(model, x, plan=again)
    assert fast.plan == plan
    assert_same_step(fast, reference, x, y)


def test_layers_can_be_forced_by_editing_the_file() -> None:
    model, reference = twins("resnet20")
    x, y = batch(5)
    data = json.loads(accelerated(model, x, rule="sparse").plan.to_json())
    for choice in data["choices"]:
        if choice["layer"] in ("layer1.0.conv2", "layer2.0.bn1", "layer3.1.conv1"):
            choice["layout"] = "plain"
        if choice["layer"] == "layer3.1.conv1":
            choice["dense"] = "channels_last fp32"
    fast = accelerated(model, x, plan=LoweringPlan.from_json(json.dumps(data)))
    code = fast.graph(x).code
    assert "self.steps.layer3_1_conv1" in code
    assert "self.steps.layer1_0_conv2" not in code
    assert code.count("unblock(") >= 3
    assert_same_step(fast, reference, x, y)


def test_a_dense_layer_may_run_in_bf16() -> None:
    model, reference = twins("resnet20", torch.float32)
    x, _ = batch(5, dtype=torch.float32)
    plan = accelerated(model, x, rule="sparse").plan
    choices = tuple(
        replace(c, layout="plain", dense="channels_last bf16") if c.layer == "layer3.1.conv1" else c
        for c in plan.choices
    )
    fast = accelerated(model.eval(), x, plan=replace(plan, choices=choices))
    y, expected = fast(x), reference.eval()(x)
    assert y.dtype == torch.float32
    assert not torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


def test_wrong_plans_are_refused() -> None:
    text = accelerated(network("resnet20"), batch(2)[0], rule="sparse").plan.to_json()
    for wrong, message in (
        ("[]", "this is no lowering plan"),
        ("{", "this is no lowering plan"),
        (text.replace('"blocked"', '"sparse"', 1), "layout of conv1 is .* or 'plain', not 'sparse'"),
        (
            text.replace('"nchw fp32"', '"nchw fp8"', 1),
            "conv1 can run dense as nchw fp32, .* not as 'nchw fp8'",
        ),
    ):
        with pytest.raises(UserError, match=message):
            LoweringPlan.from_json(wrong)


def test_the_papers_rule_goes_by_density() -> None:
    model = create_model("resnet20", num_classes=5, **SMALL["resnet20"])  # type: ignore[arg-type]
    sparse = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and "conv1" in name]
    prune_(model, 0.6)
    assert not any(
        c.layout == "blocked" for c in accelerated(model, batch(4)[0].float(), rule="density").plan.choices
    )
    model = prune_(create_model("resnet20", num_classes=5, **SMALL["resnet20"]), 0.2)  # type: ignore[arg-type]
    plan = accelerated(model, batch(16)[0].float(), rule="density").plan
    layouts = {c.layer: c for c in plan.choices}
    assert layouts["conv1"].layout == "plain"
    assert layouts["conv1"].refused == ("sparse blocked: only 0% of the weights are zero",)
    assert all(layouts[name].layout == "blocked" for name in sparse if name != "conv1")
    # Between two of them nothing is converted back and forth.
    assert all(c.layout == "blocked" for c in plan.choices if c.kind == "batch_norm" and c.layer != "bn1")


def test_measured_plans_say_what_was_refused_and_train_the_same() -> None:
    name = "vgg11"
    model, reference = twins(name, torch.float32)
    x, y = batch(4, 8, torch.float32)
    plan = accelerated(model, x).plan
    convs = [c for c in plan.choices if c.kind == "conv"]
    assert all(c.measured_ms is not None and c.measured_ms > 0 for c in convs)
    assert all(any(" ms" in reason for reason in c.refused) for c in convs)
    assert all(len(c.tilings) >= 2 for c in convs if c.layout == "blocked")
    assert len(plan.table()) == len(convs)
    assert {"layer", "shape", "density", "operator", "measured_ms", "refused"} <= set(plan.table()[0])
    assert "features.4" in str(plan)
    fast = accelerated(model, x, plan=LoweringPlan.from_json(plan.to_json()))
    assert_same_step(fast, reference, x, y, 1e-3)


def test_verbose_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    accelerate(network("resnet20"), batch(2)[0], rule="sparse", verbose=True)
    assert "layer1.0.conv1" in capsys.readouterr().out


def test_float32_is_not_measured_for_a_bf16_run_where_pairs_are_multiplied() -> None:
    tools = toolchain()
    pairs = tools is not None and tools.simd.pairs
    assert dtypes_worth_measuring(False) == ("fp32",)
    assert dtypes_worth_measuring(True) == (("bf16",) if pairs else ("fp32", "bf16"))
