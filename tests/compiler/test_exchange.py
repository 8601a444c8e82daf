"""The plan says of each parameter what several processes exchange of its gradient."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from clicktrain import accelerate, pack
from clicktrain.compiler import Accelerated, LoweringPlan
from clicktrain.compiler.exchange import Exchanged, exchanged_gradients
from clicktrain.errors import UserError


def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    with torch.no_grad():
        model[2].weight[:, ::2] = 0  # type: ignore[index,operator]
    model[4].bias.requires_grad_(False)
    return model


EXPECTED = (
    Exchanged("0.weight", 216, 216),
    Exchanged("0.bias", 8, 8),
    Exchanged("2.values", 576, 288, "kept values"),
    Exchanged("4.weight", 512, 512),
)


def test_packed_parameters_send_their_values_and_masked_ones_kept_positions() -> None:
    model = pruned()
    assert exchanged_gradients(pack(model)) == EXPECTED
    weight = model.get_parameter("2.weight")
    masked = exchanged_gradients(model, {weight: weight != 0})
    assert masked[2] == Exchanged("2.weight", 576, 288, "kept positions")
    assert masked[:2] + masked[3:] == EXPECTED[:2] + EXPECTED[3:]
    assert exchanged_gradients(model)[2] == Exchanged("2.weight", 576, 576)


def test_a_plan_prints_saves_and_reads_it() -> None:
    fast = accelerate(pruned(), torch.zeros(2, 3, 8, 8), rule="density")
    assert isinstance(fast, Accelerated)
    plan = fast.plan
    assert plan.exchange == EXPECTED
    assert [row["exchanged"] for row in plan.table()] == ["all", "288 of 576"]
    assert "the gradients of 1,024 of 1,312 weights (78.0%): of 1 pruned parameters" in str(plan)
    assert LoweringPlan.from_json(plan.to_json()) == plan
    # One of an earlier version has none, and says it again of the network that it is used for.
    data = json.loads(plan.to_json())
    del data["exchange"]
    old = LoweringPlan.from_json(json.dumps(data))
    assert old.exchange == ()
    again = accelerate(pruned(), torch.zeros(2, 3, 8, 8), plan=old)
    assert isinstance(again, Accelerated)
    assert again.plan.exchange == EXPECTED


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"how": "some"}, "what travels of 0.weight is one of"),
        ({"sent": -1}, "sent is a whole number"),
        ({"parameter": 3}, "parameter is a text"),
    ],
)
def test_a_damaged_plan_is_refused(wrong: dict[str, object], message: str) -> None:
    fast = accelerate(pruned(), torch.zeros(2, 3, 8, 8), rule="density")
    assert isinstance(fast, Accelerated)
    data = json.loads(fast.plan.to_json())
    data["exchange"][0] |= wrong
    with pytest.raises(UserError, match=message):
        LoweringPlan.from_json(json.dumps(data))
