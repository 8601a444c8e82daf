"""Training FLOPs as sparse training counts them, against the masks of every step, and RigL's formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from short_runs import run
from torch import Tensor, nn

from clicktrain.methods import DSR, GMP, MEST, NM, Campfire, ClickTrain, Method, Pruner, PruneTrain, RigL
from clicktrain.report import write_report
from clicktrain.report.run_data import read_runs
from clicktrain.train.training_cost import TrainingCost

STEPS, EPOCHS, IMAGE = 6, 4, (3, 8, 8)


def network() -> nn.Module:
    """The batch norm in front gives the first convolution a gradient w.r.t. its input, as all others have."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


PLACES = {"1": 64, "3": 64, "7": 1}
"""Uses of each weight in a forward pass of one image."""
SIZES = {"1": 8 * 3 * 9, "3": 8 * 8 * 9, "7": 32 * 4}
DENSE = sum(2 * PLACES[name] * SIZES[name] for name in PLACES)
"""f_D, a dense forward pass."""


def forward_flops(masks: dict[str, Tensor]) -> int:
    """f_S, position by position."""
    flops = 0
    for name, places in PLACES.items():
        kept = SIZES[name]
        if name in masks:
            kept = sum(1 for value in masks[name].flatten().tolist() if value)
        flops += 2 * places * kept
    return flops


def costs(method: Method[Any], packed: bool) -> tuple[list[dict[str, Any]], Pruner]:
    """Of every step: what is counted, and f_S of the masks that its forward pass has."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cost = TrainingCost(model, torch.zeros(1, *IMAGE))
    pruner = method.attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS, packed=packed, example=torch.zeros(1, *IMAGE)
    )
    cost.follow(pruner)
    steps = []
    for number in range(EPOCHS * STEPS):
        steps.append(
            {
                "seen": number + 1,
                "sparse": forward_flops(pruner.masks),
                "nominal": cost.nominal(1),
                "now": cost.now,
                "frozen": pruner.frozen,
            }
        )
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(4, *IMAGE, generator=generator), torch.arange(4)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    return steps, pruner


WHOLE: dict[str, Any] = {"include": ("1",)}


@pytest.mark.parametrize("packed", [True, False])
def test_rigl_counts_as_its_appendix(packed: bool) -> None:
    """(dT * 3 f_S + 2 f_S + f_D) / (dT + 1): a dense gradient in every fifth step, the others sparse."""
    steps, _ = costs(RigL(sparsity=0.75, interval=5, stop=0.9, densities="uniform", **WHOLE), packed)
    f_s = steps[0]["sparse"]
    assert f_s == pytest.approx(0.25 * DENSE, rel=0.02)
    between = 4
    cycle = [step["nominal"] for step in steps[5:10]]
    assert sum(cycle) / (between + 1) == (between * 3 * f_s + 2 * f_s + DENSE) / (between + 1)
    assert [step["seen"] for step in steps if step["nominal"] != 3 * f_s] == [5, 10, 15, 20]
    if packed:  # executed as counted, but for the sparse gradient that is computed beside the dense one
        assert [step["now"] - step["nominal"] for step in steps] == [
            f_s if step["seen"] in (5, 10, 15, 20) else 0 for step in steps
        ]
    else:
        assert [step["now"] for step in steps if not step["frozen"]] == [3 * DENSE] * 22
        assert [step["now"] for step in steps if step["frozen"]] == [3 * f_s] * 2


MASKED: dict[str, tuple[Method[Any], tuple[int, ...]]] = {
    "dsr": (DSR(sparsity=0.7, interval=3, stop=0.8, **WHOLE), ()),
    "dsr, gradients": (DSR(sparsity=0.7, interval=3, stop=0.5, growth="gradient", **WHOLE), (3, 6)),
    "set": (RigL(sparsity=0.7, interval=3, stop=0.8, growth="random", **WHOLE), ()),
    "mest": (MEST(sparsity=0.7, interval=3, **WHOLE), ()),
    "gmp": (GMP(sparsity=0.7, interval=3, **WHOLE), ()),
    "n:m": (NM(include=("3",)), tuple(range(1, 25))),
    "campfire": (Campfire(sparsity=0.6, era=(1, 3), **WHOLE), tuple(range(7, 19))),
    "campfire, zeros stay": (Campfire(sparsity=0.6, era=(1, 3), regrow=False, **WHOLE), ()),
}
"""Methods, and the steps in which pruned weights have a gradient that is used."""


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("packed", [True, False])
def test_every_step_against_its_masks(name: str, packed: bool) -> None:
    method, whole = MASKED[name]
    steps, pruner = costs(method, packed)
    assert steps[-1]["sparse"] < DENSE
    layers = set(pruner.masks)
    rest = sum(2 * PLACES[n] * SIZES[n] for n in PLACES if n not in layers)
    for step in steps:
        f_s = step["sparse"]
        gradient = DENSE if step["seen"] in whole and not step["frozen"] else f_s
        assert rest <= f_s
        assert step["nominal"] == 2 * f_s + gradient, step
        if packed and step["now"] != 3 * DENSE and not step["frozen"]:
            assert step["now"] == 3 * f_s + (DENSE - rest if step["seen"] in whole else 0), step


@pytest.mark.parametrize(
    "method",
    [ClickTrain(compression=3), PruneTrain(coefficient=1.0, interval=1)],
    ids=["clicktrain", "prunetrain"],
)
def test_methods_that_mask_nothing_before_have_what_is_executed(method: Method[Any]) -> None:
    steps, _ = costs(method, True)
    assert [step["nominal"] for step in steps] == [step["now"] for step in steps]
    assert steps[-1]["now"] < steps[0]["now"]


SETTINGS: dict[str, Any] = {
    "model": "tiny_networks:tiny", "method": "rigl", "sparsity": 0.7, "interval": 3, "stop": 0.5, "epochs": 2,
    "threads": 1, "operators": "reference", "learning_rate": 0.05, "accumulate": 2,
}  # fmt: skip


def test_a_run_reports_both(tmp_path: Path) -> None:
    packed = run(tmp_path / "packed", SETTINGS)
    masked = run(tmp_path / "masked", {**SETTINGS, "packed": False})
    assert masked["train_flops_nominal"] == packed["train_flops_nominal"]
    assert masked["train_flops_ratio_nominal"] < packed["train_flops_ratio"] < masked["train_flops_ratio"] < 1
    layers = packed["layers"]
    sparse, dense = ([row[key] for row in layers] for key in ("forward_flops", "forward_flops_dense"))
    passes = [2, *[3] * (len(layers) - 1)]  # nobody needs the gradient of the image
    usual = sum(n * f for n, f in zip(passes, sparse, strict=True))
    more = sum(d - s for d, s in zip(dense, sparse, strict=True))
    # 22 batches of 128 images in twos, 11 an epoch, the last alone: of the steps after 2, 4, 6, 8, 10 and
    # 11 batches those after 4, 6 and 10 (3, 6 and 9 are past) read the gradients of two batches each.
    assert packed["train_flops_nominal"] == 128 * (22 * usual + 6 * more)


def test_what_is_shown_has_both(tmp_path: Path) -> None:
    summary = run(tmp_path / "run", {**SETTINGS, "packed": False, "epochs": 1})
    (shown,) = read_runs([tmp_path / "run"])
    assert shown.train_flops_ratio == summary["train_flops_ratio"]
    assert shown.train_flops_ratio_nominal == pytest.approx(summary["train_flops_ratio_nominal"])
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text("utf-8")
    assert f"{100 * summary['train_flops_ratio_nominal']:.0f}% if zeros cost nothing while masks move" in page
    after = {**summary, "initial_train_flops": summary["train_flops"], "total_train_flops_ratio": 1.5}
    own, executed = summary["train_flops_ratio_nominal"], summary["train_flops_ratio"]
    assert replace(shown, summary=after).train_flops_ratio_nominal == pytest.approx(
        1.5 * (1 + own / executed) / 2
    )
    old = {key: value for key, value in summary.items() if "nominal" not in key}
    assert replace(shown, summary=old).train_flops_ratio_nominal is None
