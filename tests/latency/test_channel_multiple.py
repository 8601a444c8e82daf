"""Which multiple of channels pays: on made-up times, and on the networks that pruning would leave."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clicktrain import create_model
from clicktrain.graph.inputs import first_tensor
from clicktrain.graph.prunable import SeenBatch
from clicktrain.latency import channel_multiple as fast_widths
from clicktrain.latency.channel_multiple import (
    MULTIPLES,
    BatchForm,
    Rounding,
    WidthChoice,
    best,
    fastest_multiple,
    step_ms,
)
from clicktrain.surgery import SurgeryPlan, apply_surgery_, plan_from_zeros


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fewest rounds: these tests are not about how well is measured."""
    monkeypatch.setattr(fast_widths, "SECONDS", 0.0)


def up(width: int, multiple: int) -> int:
    while width % multiple:
        width += 1
    return width


@pytest.mark.parametrize(
    ("name", "widths", "cost", "chosen"),
    [
        ("proportional: every channel counts", (11, 21, 30), lambda w: w, 1),
        ("as slow as the multiple above: nothing to gain", (11, 21, 30), lambda w: up(w, 16), 1),
        ("a slow path unless a multiple of 8", (11, 21, 30), lambda w: w * (1 if w % 8 == 0 else 2), 8),
        ("these widths are multiples already", (16, 24, 32), lambda w: w * (1 if w % 8 == 0 else 2), 1),
        ("a slow path unless a multiple of 16", (11, 21, 30), lambda w: w * (1 if w % 16 == 0 else 3), 16),
        ("hardly slower: not worth it", (11, 21, 30), lambda w: 100 + (2 if w % 4 else 0), 1),
    ],
)
def test_which_multiple_pays(
    name: str, widths: tuple[int, ...], cost: Callable[[int], float], chosen: int
) -> None:
    rows = []
    for multiple in MULTIPLES:
        rounded = [up(width, multiple) for width in widths]
        rows.append(Rounding(multiple, float(sum(map(cost, rounded))), sum(rounded)))
    assert best(rows) == chosen, name


def pruned_plans(dead: int = 5) -> tuple[nn.Module, dict[int, SurgeryPlan]]:
    """A network of 16 channels whose middle layers have lost some, and what each multiple removes of them."""
    torch.manual_seed(0)
    model = create_model("resnet8", num_classes=4, in_channels=3, stem="cifar")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and name.endswith("conv1") and "layer" in name:
                module.weight[:dead] = 0
            if isinstance(module, nn.BatchNorm2d) and name.endswith("bn1") and "layer" in name:
                module.weight[:dead] = 0
                module.bias[:dead] = 0
            if isinstance(module, nn.Conv2d) and name.endswith("conv2"):
                module.weight[:, :dead] = 0
    example = torch.zeros(1, 3, 8, 8)
    return model, {m: plan_from_zeros(model, example, round_to=m, sides="readers") for m in MULTIPLES}


def batch(images: int = 4) -> Tensor:
    return torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_network_is_measured_once_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plans = pruned_plans()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    choice = fastest_multiple(model, SeenBatch(batch()), plans, folder=tmp_path)
    assert choice is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [row.multiple for row in choice.rows] == list(MULTIPLES)
    for row in choice.rows:
        smaller = copy.deepcopy(model)
        apply_surgery_(plans[row.multiple], smaller)
        convs = [module for module in smaller.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
        assert row.channels == sum(module.weight.shape[0] for module in convs)
        assert row.ms > 0
    assert choice.chosen == best(choice.rows)
    assert (choice.images, choice.dtype) == (4, "float32")
    assert WidthChoice.from_json(json.loads(json.dumps(choice.to_json()))) == choice

    asked: list[int] = []

    def again(model: nn.Module, x: Any, autocast: Any, plans: Mapping[str, Any]) -> dict[str, float]:
        asked.append(len(first_tensor(x)))
        return {name: 1.0 + number for number, name in enumerate(plans)}

    monkeypatch.setattr(fast_widths, "step_ms", again)
    assert fastest_multiple(model, SeenBatch(batch()), plans, folder=tmp_path) == choice
    assert not asked
    fastest_multiple(model, SeenBatch(batch(2)), plans, folder=tmp_path)  # another batch, other times
    assert asked == [2]
    for damaged in ("{", "[1]", '{"chosen": 1}', "[" * 100_000):
        for path in tmp_path.iterdir():
            path.write_text(damaged, encoding="utf-8")
        asked.clear()
        fastest_multiple(model, SeenBatch(batch()), plans, folder=tmp_path)
        assert asked == [4], "measured again"
    fastest_multiple(model, SeenBatch(batch(1000)), plans, folder=tmp_path)  # of a CPU's batch a part will do
    assert asked[-1] == fast_widths.CPU_IMAGES * torch.get_num_threads()


def test_equal_networks_have_one_time(tmp_path: Path) -> None:
    model, plans = pruned_plans(dead=8)  # 8, 24, 56 channels are left of 16, 32, 64
    choice = fastest_multiple(model, SeenBatch(batch(), torch.bfloat16), plans, folder=tmp_path)
    assert choice is not None
    ms = {row.multiple: row.ms for row in choice.rows}
    assert ms[1] == ms[2] == ms[4] == ms[8]
    assert len(set(ms.values())) == 2  # 16 and 32 leave the whole network
    assert choice.chosen in (1, 16, 32)
    assert choice.dtype == "bfloat16"


def test_nothing_to_choose(tmp_path: Path) -> None:
    model, plans = pruned_plans(dead=0)
    assert fastest_multiple(model, SeenBatch(batch()), plans, folder=tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_network_whose_output_is_a_dictionary() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.idle = nn.Conv2d(3, 4, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": self.conv(x), "b": x.mean()}

    times = step_ms(Two(), batch(), None, {"whole": SurgeryPlan()})
    assert times["whole"] > 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_resumed_run_decides_on_a_blank_batch_of_the_same_form(
    memory_format: torch.memory_format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plans = pruned_plans()
    seen = SeenBatch(batch().to(memory_format=memory_format), torch.bfloat16)
    choice = fastest_multiple(model, seen, plans, folder=tmp_path)
    monkeypatch.setattr(fast_widths, "step_ms", None)  # what was measured is found again
    saved = json.loads(json.dumps(list(BatchForm.of(seen))))
    form = BatchForm(tuple(saved[0]), tuple(saved[1]), saved[2])
    assert form == BatchForm.of(seen)
    blank = form.blank(torch.zeros(1, 3, 8, 8))
    assert first_tensor(blank.inputs).is_contiguous(memory_format=memory_format)
    assert fastest_multiple(model, blank, plans, folder=tmp_path) == choice


def test_synchronised_norms_do_not_wait_for_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4), nn.Flatten(), nn.Linear(144, 2), nn.SyncBatchNorm(2)
    )
    model.eval()(batch())
    assert step_ms(model, batch(), None, {"whole": SurgeryPlan()})["whole"] > 0
    assert type(model[1]) is nn.SyncBatchNorm
