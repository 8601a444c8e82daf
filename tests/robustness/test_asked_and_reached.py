"""Whatever is asked of whatever method: the outcome agrees with the weights, and no miss is silent."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.accounting import count
from clicktrain.errors import MissedTarget, UserError
from clicktrain.methods import METHODS, Pruner
from clicktrain.methods.outcome import TOLERANCE, Target
from clicktrain.surgery import channel_groups

EPOCHS, STEPS = 3, 4
EXAMPLE = torch.zeros(1, 1, 8, 8)


class Small(nn.Module):
    """A stem, a residual block and a head; widths that no method divides evenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.one = nn.Conv2d(width, width + 3, 3, padding=1, bias=False)
        self.between = nn.BatchNorm2d(width + 3)
        self.two = nn.Conv2d(width + 3, width, 3, padding=1)
        self.after = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.after(self.two(F.relu(self.between(self.one(x))))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def run(name: str, settings: dict[str, Any], width: int = 11, batches: int = EPOCHS * STEPS) -> tuple[
    nn.Module, nn.Module, Pruner, list[str]
]:  # fmt: skip
    """The network before and after, its pruner, and the warnings of `finish`."""
    torch.manual_seed(0)
    model = Small(width)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    pruner = METHODS[name](**settings).attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS, example=EXAMPLE
    )
    for number in range(batches):
        y = torch.arange(6) % 3
        x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(number)) + y.view(6, 1, 1, 1)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.finish()
    return before, model, pruner, [str(w.message) for w in caught if w.category is MissedTarget]


def convolutions(model: nn.Module) -> list[Tensor]:
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d)]


def recomputed(row: Target, before: nn.Module, model: nn.Module, pruner: Pruner) -> float:
    """What a row says was reached, from the weights alone."""
    convs = convolutions(model)
    match row.what:
        case "inference FLOPs left":
            return count(model, EXAMPLE, {}).forward_flops / count(before, EXAMPLE, {}).forward_flops
        case "parameters left":
            sizes = [sum(p.numel() for p in m.parameters()) for m in (model, before)]
            return sizes[0] / sizes[1]
        case "convolution weights left":
            return sum(w.numel() for w in convs) / sum(w.numel() for w in convolutions(before))
        case "sparsity of the pruned layers":
            living = total = 0
            for layer, mask in pruner.masks.items():
                weight = model.get_submodule(layer).weight
                assert isinstance(weight, Tensor)
                assert not weight.detach()[~mask].any()  # a living weight may be zero: it has just grown
                living, total = living + int(mask.sum()), total + weight.numel()
            return 1 - living / total
        case "filters removed":
            return 1 - sum(w.shape[0] for w in convs) / sum(w.shape[0] for w in convolutions(before))
        case "neurons removed":
            sizes = [
                sum(g.size for g in channel_groups(m, EXAMPLE) if g.fixed is None) for m in (model, before)
            ]
            return 1 - sizes[0] / sizes[1]
        case what if what.startswith("compression of convolution weights"):
            return sum(w.numel() for w in convs) / sum(int(w.count_nonzero()) for w in convs)
    raise AssertionError(f"an unknown row: {row}")


def check(name: str, settings: dict[str, Any], **how: Any) -> Pruner:
    before, model, pruner, told = run(name, settings, **how)
    outcome = pruner.outcome()
    for row in outcome.targets:
        truth = recomputed(row, before, model, pruner)
        assert row.reached == pytest.approx(truth, abs=1e-6), row
        far = row.asked is not None and abs(truth - row.asked) > TOLERANCE * row.asked + 1e-9
        assert row.missed == far, row
        assert row.what in str(outcome)
        if far:
            assert any(sentence.startswith(f"{row.what}: asked") for sentence in told)
            assert row.reason, row
    assert told == list(outcome.warnings)
    (event,) = [event for event in pruner.events if event["event"] == "outcome"]
    assert event["targets"] == outcome.to_json()
    return pruner


@pytest.mark.parametrize("name", METHODS)
def test_the_outcome_is_what_the_weights_say(name: str) -> None:
    width = 12 if name == "nm" else 11  # groups of 4 input channels
    pruner = check(name, {"compression": 4} if name.startswith("clicktrain") else {}, width=width)
    assert bool(pruner.outcome().targets) == (name != "dense")


@pytest.mark.parametrize("name", ["clicktrain", "campfire", "prunetrain", "rigl", "dsr", "pat"])
def test_a_run_that_is_cut_short_ends_at_what_was_asked_or_says_so(name: str) -> None:
    check(name, {"compression": 4} if name == "clicktrain" else {}, batches=2)


def request(generator: random.Random) -> tuple[str, dict[str, Any]]:
    """A method with settings that may be odd, but not ill-formed."""
    name = generator.choice([n for n in METHODS if n != "dense"])
    share = generator.choice([0.01, 0.07, 0.3, 0.5, 0.77, 0.95, 0.995])
    choices: dict[str, list[dict[str, Any]]] = {
        "clicktrain": [{"compression": 1 / share, "entries": generator.choice([1, 2, 4, 9])}],
        "clicktrain-gradual": [{"compression": 1 / share, "entries": generator.choice([1, 2, 4, 8])}],
        "admm-patterns": [{"compression": 1 / share, "entries": generator.choice([1, 2, 4, 8])}],
        "campfire": [{"sparsity": share, "granularity": generator.choice(["window", "ck", "combined"])},
                     {"sparsity": share, "linear": "none", "era": (0, generator.choice([0, 1, 3]))}],
        "prunetrain": [{"target_flops": share, "floor": generator.choice([0.0, 0.1, 0.5])},
                       {"target_parameters": share, "round_to": generator.choice([1, 4, 8])},
                       {"penalty_ratio": share}, {"target_flops": share, "reconfigure": "end"},
                       {"target_flops": share, "coefficient": 10.0}],
        "prunetrain-clicktrain": [{"target_flops": share, "pattern_compression": 3.0, "switch_at": 1}],
        "nm": [{"n": generator.choice([1, 2, 3]), "m": generator.choice([4, 8])}],
        "pat": [{"prune_ratio": share, "round_to": generator.choice([1, 3])},
                {"prune_ratio": share, "prune_ratio_of": "neurons"}],
    }  # fmt: skip
    moving = [{"sparsity": share, "granularity": generator.choice(["weight", "kernel", "pattern"])}]
    return name, generator.choice(choices.get(name, moving))


def check_request(seed: int) -> None:
    generator = random.Random(seed)
    name, settings = request(generator)
    width = generator.choice([3, 8, 11])
    try:
        check(name, settings, width=width)
    except UserError as refusal:
        sentence = str(refusal)
    else:
        return
    assert len(sentence) > 20
    assert "\n" not in sentence


@pytest.mark.parametrize("seed", range(16))
def test_odd_requests(seed: int) -> None:
    check_request(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_many_odd_requests(seed: int) -> None:
    check_request(seed)
