"""A criterion of a user's own works with every method that scores: registered, named, installed or given."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_loop import EPOCHS, IMAGES, PER_EPOCH, Net, batch, starting_weights
from torch import Tensor, nn

from clicktrain.cli import main
from clicktrain.errors import UserError
from clicktrain.methods import METHODS, Campfire, GraNet, RigL
from clicktrain.settings import choice_fields, field_names
from clicktrain.sparsity import registry
from clicktrain.sparsity.distributions import DISTRIBUTIONS
from clicktrain.sparsity.granularity import GRANULARITIES, Cut
from clicktrain.sparsity.importance import CRITERIA, magnitude_importance
from clicktrain.sparsity.regrowth import DROPS, GROWTHS
from clicktrain.sparsity.schedules import SCHEDULES
from clicktrain.sparsity.triggers import TRIGGERS
from clicktrain.sparsity.units import UNITS, Unit
from clicktrain.train import config_to_dict, from_dict, load_config, load_run
from clicktrain.train.config import RunConfig

SCORING = [name for name, method in METHODS.items() if "criterion" in choice_fields(method)]
DATA = f"synthetic:classes=4,size=8,channels=1,train={IMAGES * PER_EPOCH},val=8"
OWN = "test_user_criteria:signed"
CALLS: list[str] = []


def signed(weight: Tensor, grad: Tensor) -> Tensor:
    """How much the loss grows if a weight goes, and a little of its size."""
    CALLS.append("signed")
    assert grad.shape == weight.shape
    return (-weight * grad).clamp_min(0) + 1e-3 * weight.abs()


def weights_only(weight: Tensor, grad: Tensor) -> Tensor:
    """Far from what magnitudes choose: the smallest stay."""
    del grad
    CALLS.append("weights_only")
    return 1 / (1 + weight.abs())


weights_only.reads_gradient = False  # type: ignore[attr-defined]


def negative(weight: Tensor, grad: Tensor) -> Tensor:
    del grad
    return -weight.abs() - 1


def too_few(weight: Tensor, grad: Tensor) -> Tensor:
    return (weight * grad).sum(dim=0)


def broken(weight: Tensor, grad: Tensor) -> Tensor:
    raise ZeroDivisionError("mine")


NOT_A_FUNCTION = 3
ROWS = Unit((3,))


@pytest.fixture
def registered() -> Iterator[str]:
    """A criterion that is added while the library runs."""
    CALLS.clear()
    CRITERIA.register("signed")(signed)
    yield "signed"
    CRITERIA.remove("signed")


@pytest.fixture(scope="module", autouse=True)
def trained(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Weights to begin with, for methods that prune a trained network."""
    folder = tmp_path_factory.mktemp("trained")
    TRAINED.update({name: starting_weights(name, folder) for name in METHODS})


TRAINED: dict[str, tuple[str, ...]] = {}


def words(method: str, *more: str) -> list[str]:
    line = ("train", "--model", "contract_loop:Net", "--data", DATA, "--epochs", str(EPOCHS), "--quiet")
    fixed = ("--batch-size", str(IMAGES), "--threads", "1", "--operators", "reference")
    return [*line, *fixed, *TRAINED[method], "--method", method, *more]


def kept(folder: Path) -> dict[str, list[Any]]:
    """What a finished run has left: weights, and masks where it has some."""
    run = load_run(folder, Net)
    weights = {name: p.tolist() for name, p in run.model.named_parameters()}
    return {**weights, **{name: mask.tolist() for name, mask in run.masks.items()}}


def test_no_setting_of_a_method_hides_one_of_the_run() -> None:
    """Both are flags of one command and keys of one file."""
    run = set(field_names(RunConfig))
    assert [name for name, method in METHODS.items() if run & set(field_names(method))] == []


def test_the_methods_that_score() -> None:
    assert {"clicktrain", "campfire", "pat", "rigl", "dsr", "granet", "mest", "gmp", "nm"} <= set(SCORING)
    assert set(METHODS) - set(SCORING) == {"dense", "prunetrain"}  # the lasso decides, not a score


@pytest.mark.parametrize("method", SCORING)
def test_a_registered_criterion(
    method: str, registered: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In help, plan, run and report of every method that scores, in this very process."""
    assert main(["train", "--method", method, "--help"]) == 0
    assert ",signed" in capsys.readouterr().out
    assert main(words(method, "--criterion", registered, "--dry-run")) == 0
    assert f"by {registered}" in capsys.readouterr().out
    assert main(words(method, "--criterion", registered, "--out", str(tmp_path / "run"))) == 0
    assert CALLS
    assert f"criterion: {registered}" in (tmp_path / "run" / "config.yaml").read_text("utf-8")
    assert registered in (tmp_path / "run" / "report.html").read_text("utf-8")
    assert load_config(tmp_path / "run" / "config.yaml", OWN_MODEL)[1].criterion == registered  # type: ignore[attr-defined]
    assert main(words(method, "--criterion", "no-such", "--dry-run")) == 2
    assert "criterion must be one of taylor" in (error := capsys.readouterr().err)
    assert "signed" in error


OWN_MODEL = "contract_loop:Net"


@pytest.mark.parametrize("method", SCORING)
def test_what_a_named_criterion_decides(method: str, tmp_path: Path) -> None:
    """``package.module:function`` of the user's own: other weights stay than by magnitude."""
    CALLS.clear()
    name = "test_user_criteria:weights_only"
    assert main(words(method, "--criterion", name, "--no-report", "--out", str(tmp_path / "own"))) == 0
    assert "weights_only" in CALLS
    assert (
        main(words(method, "--criterion", "magnitude", "--no-report", "--out", str(tmp_path / "usual"))) == 0
    )
    own, usual = kept(tmp_path / "own"), kept(tmp_path / "usual")
    assert own != usual


def test_a_file_that_names_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither resuming nor a recipe nor loading imports what only the folder names."""
    run = tmp_path / "run"
    assert main(words("gmp", "--criterion", OWN, "--no-report", "--out", str(run))) == 0
    (run / "summary.json").unlink()
    config = run / "config.yaml"
    evil = tmp_path / "evil_criterion.py"
    evil.write_text("open('code_was_run', 'w').close()\ndef signed(w, g): return w.abs()\n")
    config.write_text(config.read_text("utf-8").replace(OWN, "evil_criterion:signed"), "utf-8")
    monkeypatch.chdir(tmp_path)
    for line in (
        ["resume", str(run), "--model", OWN_MODEL],
        ["train", "--config", str(config), "--model", OWN_MODEL, "--out", str(tmp_path / "new")],
    ):
        assert main(line) == 2
        error = capsys.readouterr().err
        assert "names the criterion 'evil_criterion:signed', whose code would run" in error
        assert "--criterion evil_criterion:signed" in error
    with pytest.raises(UserError, match="whose code would run"):
        load_config(config, OWN_MODEL)
    assert not (tmp_path / "code_was_run").exists()
    assert main(["resume", str(run), "--model", OWN_MODEL, "--criterion", OWN]) == 2
    assert "has criterion 'evil_criterion:signed', not" in capsys.readouterr().err
    named = ["--criterion", "evil_criterion:signed"]
    assert main(["train", "--config", str(config), "--model", OWN_MODEL, "--dry-run", *named]) == 0
    assert (tmp_path / "code_was_run").exists()


def test_resuming_and_loading_a_run_with_a_criterion_of_ones_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(words("rigl", "--criterion", OWN, "--no-report", "--out", str(run))) == 0
    whole = kept(run)
    (run / "summary.json").unlink()
    assert main(["resume", str(run), "--model", OWN_MODEL, "--criterion", OWN, "--quiet", "--no-report"]) == 0
    assert kept(run) == whole
    method = load_run(run, Net).method
    assert method.criterion == OWN  # type: ignore[attr-defined]
    model = Net()
    with pytest.raises(UserError, match="a file names the criterion"):  # the folder alone runs no code
        method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=4, steps_per_epoch=4)


def attached(method: Any) -> Any:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = method.attach(model, optimizer, epochs=EPOCHS, steps_per_epoch=PER_EPOCH)
    for number in range(EPOCHS * PER_EPOCH):
        x, y = batch(number)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
    return pruner


def test_a_function_is_saved_under_its_name() -> None:
    method = RigL(criterion=signed, interval=2)
    assert method.criterion == OWN
    run = RunConfig(method="rigl")
    assert from_dict(config_to_dict(run, method)) == (run, method)
    assert Campfire(criterion=magnitude_importance).criterion == "magnitude"
    CALLS.clear()
    attached(method)
    assert CALLS
    lambda_ = RigL(criterion=lambda w, g: w.abs(), interval=2)
    assert "lambda" in str(attached(lambda_).plan())  # works in one's own loop ...
    with pytest.raises(
        UserError, match=r"criterion is .*lambda.*, which no file can name"
    ):  # ... but not in a file
        config_to_dict(run, lambda_)


@pytest.mark.parametrize(
    ("criterion", "sentence"),
    [
        ("no_such_module:f", "there is no module 'no_such_module'"),
        (
            "test_user_criteria:none",
            "has no 'none': a criterion of your own is named as package.module:function",
        ),
        ("test_user_criteria:NOT_A_FUNCTION", "is of type int"),
        ("1:2", "cannot read the name '1:2'"),
        ("magnitud", "criterion must be one of taylor, magnitude, mixed or package.module:function"),
        (3, "criterion must be one of"),
        ("test_user_criteria:negative", "gave negative scores"),
        ("test_user_criteria:too_few", r"returned float32 \[.*one floating-point score per weight"),
        ("test_user_criteria:broken", r"failed with ZeroDivisionError: mine \("),
    ],
)
def test_criteria_that_cannot_be(criterion: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        attached(RigL(criterion=criterion, interval=2))


def test_an_installed_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry point of the group ``clicktrain.criteria`` is a choice like any other."""
    point = EntryPoint("installed", OWN, "clicktrain.criteria")
    monkeypatch.setattr(registry, "_installed", lambda group: {"installed": point})
    assert "installed" in CRITERIA
    CALLS.clear()
    attached(RigL(criterion="installed", interval=2))
    assert CALLS


@pytest.mark.parametrize("granularity", ["test_user_criteria:ROWS", ROWS, Unit((2,))])
def test_a_unit_of_ones_own(granularity: Any) -> None:
    method = RigL(granularity=granularity, interval=2, sparsity=0.5)
    pruner = attached(method)
    dim = 2 if granularity == Unit((2,)) else 3
    for name, mask in pruner.masks.items():
        assert name == "head" or bool((mask.any(dim) == mask.all(dim)).all())
    if isinstance(granularity, str):
        assert config_to_dict(RunConfig(), method)["granularity"] == granularity
    else:
        with pytest.raises(UserError, match="granularity is Unit, which no file can name"):
            config_to_dict(RunConfig(), method)


def test_every_axis_is_open() -> None:
    """A rule of each axis, added at run time, is a choice of the methods that have the axis."""
    added = {
        DISTRIBUTIONS: lambda shapes, density: dict.fromkeys(shapes, density),
        SCHEDULES: lambda done: (1 - done) ** 2,
        TRIGGERS: lambda seen: "now" if seen.epoch >= 1 else None,
        DROPS: lambda now, share: DROPS["layer"](now, share),
        GROWTHS: lambda now, stay, counts: GROWTHS["random"](now, stay, counts),
        GRANULARITIES: lambda shape, threshold, rule: Cut(0, 1),
        UNITS: Unit((3,)),
    }
    for axis, rule in added.items():
        axis.register("mine")(rule)  # type: ignore[attr-defined]
    try:
        pruner = attached(
            GraNet(
                densities="mine", sparsity_schedule="mine", drop_rule="mine", growth="mine",
                granularity="mine", interval=2, sparsity=0.5, initial_sparsity=0.2,
            )
        )  # fmt: skip
        assert pruner.outcome().targets[0].reached == pytest.approx(0.5, abs=0.02)
        for name, mask in pruner.masks.items():  # rows of three
            assert name == "head" or bool((mask.any(3) == mask.all(3)).all())
        early = attached(Campfire(trigger="mine", granularity="mine", sparsity_schedule="mine", era=(2, 3)))
        assert [e["reason"] for e in early.events if e["event"] == "stage"][:1] == ["now"]
        plan = str(early.plan())
        assert "mine by magnitude" in plan
        assert "mine says so" in plan
    finally:
        for axis in added:
            axis.remove("mine")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="cannot be a new criterion"):
        CRITERIA.register("taylor")
