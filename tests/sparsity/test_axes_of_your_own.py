"""A user's own function of an axis that cannot be used is refused in one sentence when a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clicktrain.cli import main
from clicktrain.errors import UserError
from clicktrain.methods import DSR, GMP, METHODS, NM, Campfire, ClickTrain, PaT, RigL
from clicktrain.methods.patterns.axes import Penalty
from clicktrain.settings import choice_fields
from clicktrain.sparsity.importance import checked_criterion
from clicktrain.sparsity.regrowth import DROPS, GROWTHS
from clicktrain.sparsity.units import Unit


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 3)
    )


def attached(method: Any) -> Any:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    example = torch.zeros(2, 4, 6, 6)
    return model, optimizer, method.attach(model, optimizer, epochs=8, steps_per_epoch=2, example=example)


def zeroing(weight: Tensor, grad: Tensor) -> Tensor:
    return weight.zero_()


def everything(now: Any, share: float) -> Any:
    return {name: torch.ones_like(alive) for name, alive in now.alive.items()}


def nothing(now: Any, kept: Any, counts: Any) -> Any:
    return {name: torch.zeros_like(mask) for name, mask in kept.items()}


def fill(now: Any, kept: Any, counts: Any) -> Any:
    return {name: torch.ones_like(mask) for name, mask in kept.items()}


def fails(*args: object) -> Any:
    raise ZeroDivisionError("mine")


def one_argument(only: object) -> Any:
    return only


class Halves(Unit):
    """A unit whose size is wrong."""

    def size(self, view: Any) -> int:
        return 2


AXES: dict[str, tuple[Any, list[tuple[Any, str]]]] = {
    "criterion": (RigL, [
        (lambda w, g: w.abs() * float("nan"), "criterion '.*' gave NaN scores"),
        (lambda w, g: w.abs() / 0, "gave infinite scores"),
        (lambda w, g: -w.abs() - 1, "gave negative scores"),
        (lambda w, g: w > 0, "returned bool"),
        (lambda w, g: 3.0, "returned 3.0, not floating-point"),
        (zeroing, "changed a tensor that it was given in place"),
    ]),
    "densities": (GMP, [
        (lambda shapes, density: dict.fromkeys(shapes, 2.0), "densities .*distribution .*returned 2.0 for 3"),
        (lambda shapes, density: dict.fromkeys(shapes, float("nan")), "returned nan"),
        (lambda shapes, density: dict.fromkeys(shapes, "x"), "returned 'x'"),
        (lambda shapes, density: [density for _ in shapes], r"returned \["),
        (lambda shapes, density: {"0": density}, "returned no layer '3'"),
        (lambda shapes, density: {**dict.fromkeys(shapes, density), "9": 1}, "returned an unknown layer '9'"),
        (lambda shapes, density: dict.fromkeys(shapes, 0.01), "gave 0.01 of all weights, not 0.5"),
    ]),
    "sparsity_schedule": (GMP, [
        (lambda done: 5.0, "sparsity_schedule '.*schedule '.*returned 5.0"),
        (lambda done: float("nan"), "returned nan"),
        (lambda done: "x", "returned 'x'"),
        (lambda done: done, "rises from 0 to 0.99, but says what is left"),
    ]),
    "drop_schedule": (RigL, [(lambda done: -1, "drop_schedule '.*returned -1")]),
    "drop_rule": (DSR, [
        (everything, "keeps pruned units of 5"),
        (lambda now, share: now.scores, "drop rule '.*returned float32"),
        (lambda now, share: None, "returned None"),
    ]),
    "growth": (RigL, [
        (nothing, "dropped units of 5 that were to stay"),
        (fill, r"let \d+ units of 5 grow, not 1"),
        (lambda now, kept, counts: {}, "returned no layer '5'"),
    ]),
    "allocation": (ClickTrain, [
        (lambda layer, scores: scores, r"returned float32 \[.*, not floating-point"),
        (lambda layer, scores: scores.sum(0) / 0, "gave infinite scores"),
        (lambda layer, scores: scores.zero_().sum(0), "changed a tensor"),
    ]),
    "penalty": (ClickTrain, [
        (lambda grad, weight, mask, c: weight * c, "penalty '.*returned float32"),
        (lambda grad, weight, mask, c: grad.fill_(float("nan")), "makes gradients or weights NaN"),
        (lambda grad, weight, mask, c: weight.zero_(), "changed a tensor"),
        (Penalty(step=one_argument), "failed with TypeError"),
    ]),
    "trigger": (Campfire, [(lambda seen: True, "trigger '.*returned True")]),
    "policy": (PaT, [(lambda seen: 3, "policy '.*returned 3")]),
}  # fmt: skip
CASES = [(method, axis, own, text) for axis, (method, bad) in AXES.items() for own, text in bad]
CASES += [
    (method, axis, fails, r"failed with ZeroDivisionError: mine \(") for axis, (method, _) in AXES.items()
]
CASES += [(RigL, "criterion", one_argument, r"failed with TypeError: .*: a criterion is a function \(weight")]
CASES += [(Campfire, "granularity", fails, "granularity '.*failed with Zero")]
CASES += [(Campfire, "granularity", lambda *_: 0.5, r"returned 0.5: a granularity is a function \(shape")]
CASES += [(RigL, "granularity", own, "must be one of weight, kernel, pattern or package.module:unit")
          for own in (fails, Unit, 3)]  # fmt: skip
CASES += [
    (RigL, "granularity", "test_axes_of_your_own:fails", "of type function.*an object with the methods")
]
CASES += [(RigL, "granularity", Halves((3,)), "units do not make up the layer")]


@pytest.mark.parametrize(("method", "axis", "own", "sentence"), CASES)
def test_what_cannot_be_used_is_refused(method: Any, axis: str, own: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        attached(method(**{axis: own}))
    assert axis.replace("_", " ") in str(caught.value).replace("_", " ")


def test_what_can_be_used_still_is() -> None:
    attached(RigL(
        criterion=lambda w, g: w.abs(), densities=lambda shapes, density: dict.fromkeys(shapes, density),
        drop_rule=lambda now, share: DROPS["layer"](now, share), drop_schedule=lambda done: 1 - done,
        growth=lambda now, kept, counts: GROWTHS["random"](now, kept, counts), granularity=Unit((2, 3)),
    ))  # fmt: skip
    attached(ClickTrain(
        compression=2, allocation=lambda layer, scores: scores.sum(0),
        penalty=Penalty(step=lambda weight, mask, left: weight.mul_(mask)),
    ))  # fmt: skip


def test_a_criterion_is_looked_at_in_every_decision() -> None:
    calls: list[int] = []

    def later(weight: Tensor, grad: Tensor) -> Tensor:
        calls.append(1)
        return weight.abs() if len(calls) < 3 else weight * float("nan")

    checked, ones = checked_criterion("later", later), torch.ones(2, 3)
    for _ in range(2):
        checked(ones, ones)
    with pytest.raises(UserError, match="criterion 'later' gave NaN scores"):
        checked(ones, ones)
    checked(ones, ones * float("nan"))  # a run that diverges says so itself


def test_a_dry_run_finds_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "train",
        "--method",
        "gmp",
        "--model",
        "resnet20",
        "--width",
        "0.25",
        "--epochs",
        "4",
        "--dry-run",
    ]
    data = ["--data", "synthetic:classes=3,size=8,channels=1,train=32,val=8", "--batch-size", "8"]
    own = ["--sparsity-schedule", "test_axes_of_your_own:fails", "--out", str(tmp_path / "run")]
    assert main([*words, *data, *own]) == 2
    error = capsys.readouterr().err
    assert "sparsity_schedule 'test_axes_of_your_own:fails'" in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_gradual_pruning_drops_and_regrows_nothing() -> None:
    model, optimizer, pruner = attached(GMP(sparsity=0.5, interval=2))
    for _ in range(16):
        loss = model(torch.randn(2, 4, 6, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
    events = [e for e in pruner.events if e["event"] in ("dropped", "regrown")]
    assert events
    assert {e["event"] for e in events} == {"dropped"}
    assert sum(e["dropped"] for e in events) > 0
    assert [e["sparsity"] for e in events] == sorted(e["sparsity"] for e in events)


def test_a_subscriber_is_a_function() -> None:
    *_, pruner = attached(GMP(sparsity=0.5))
    with pytest.raises(UserError, match=r"subscribe\(\) takes a function of one event, not 3"):
        pruner.subscribe(3)


def test_nm_says_how_few_layers_fit() -> None:
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(72, 24))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match="1 of 2 layers has a multiple of 16 input channels: the others, 60%"
    ):
        NM(n=2, m=16).attach(model, optimizer, epochs=2, steps_per_epoch=2)


@pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name, method in METHODS.items() for axis in choice_fields(method)]
)
@pytest.mark.parametrize("own", [fails, one_argument, lambda *_: object()])
def test_every_axis_of_every_method_is_guarded(name: str, axis: str, own: Any) -> None:
    with pytest.raises(UserError) as caught:
        attached(METHODS[name](**{axis: own}))
    assert axis.replace("_", " ") in str(caught.value).replace("_", " ")
