"""What every method of `METHODS` keeps, tested for whatever is registered.

A property that has no meaning for a method is named, with the reason, in the method's ``contract_exempt``; it
has to fail there. `pytest tests/methods/test_contract.py` ends with the matrix of methods and properties.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from contract_loop import EPOCHS, IMAGES, TOTAL, Net, Run, attach, batch, starting_weights, without_times
from safetensors.torch import load_file
from torch import Tensor, nn

import clicktrain
from clicktrain.cli import main
from clicktrain.deploy import export_run
from clicktrain.formats.tree import flatten_tree, load_tree
from clicktrain.methods import METHODS, ClickTrain, Method, PruningPlan, RigL
from clicktrain.methods.base import StepInfo
from clicktrain.methods.outcome import TOLERANCE

MOMENTS = (1, 5, 8, 10, 14)
"""Batches after which a run is killed: in several stages, at an end of an epoch and in the middle of one."""


@functools.cache
def uninterrupted(method: type[Method[Any]]) -> tuple[Run, list[str], Path]:
    """A run that nothing disturbs, the targets that it missed, and the folder of its states at `MOMENTS`."""
    folder = Path(tempfile.mkdtemp(prefix="clicktrain-contract-"))
    run = attach(method.name)

    def save(done: int) -> None:
        if done in MOMENTS:
            run.save(folder / f"{done}.safetensors")

    run.train(after=save)
    return run, run.finish(), folder


def assert_same(first: Any, second: Any) -> None:
    """The same to the last bit: nested states."""
    (tensors, rest), (others, other_rest) = flatten_tree(first), flatten_tree(second)
    assert rest == other_rest
    assert tensors.keys() == others.keys()
    assert [key for key, value in tensors.items() if not value.equal(others[key])] == []


def assert_same_end(run: Run, expected: Run) -> None:
    assert_same(run.weights(), expected.weights())
    assert_same(run.optimizer.state_dict(), expected.optimizer.state_dict())
    assert without_times(run.pruner.events) == without_times(expected.pruner.events)
    assert str(run.pruner.plan()) == str(expected.pruner.plan())


def assert_pruned(run: Run, missed: list[str]) -> None:
    """Zeros are in place, and each target is reached or said to be missed."""
    run.pruner.check_zeros()
    for layer, mask in run.pruner.masks.items():
        weight = run.model.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        assert not weight.detach()[~mask].any()
    outcome = run.pruner.outcome()
    for target in outcome.targets:
        told = any(sentence.startswith(f"{target.what}: asked") for sentence in missed)
        assert target.missed == told, target
        assert target.reason or not target.missed
    assert run.model.eval()(batch(99)[0]).isfinite().all()


# ---- the properties: each raises unless the method has it -------------------------------------------


def plan_before(name: str, folder: Path) -> None:
    """A plan names every layer with a weight before anything is changed; asking for it changes nothing."""
    untouched = Net()
    run = attach(name)
    state = run.pruner.state_dict()
    rows = {row.name: row for row in run.pruner.plan().rows}
    layers = {n: m for n, m in untouched.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert rows.keys() == layers.keys()
    for layer, row in rows.items():
        assert row.shape == tuple(layers[layer].weight.shape)
        assert row.density is None or 0 < row.density <= 1
        assert row.action
    printed = str(run.pruner.plan())
    assert all(layer in printed for layer in layers)
    assert_same(run.pruner.state_dict(), state)


def own_loop(name: str, folder: Path) -> None:
    """Two lines in a loop: the network comes back as a plain module that the optimizer trains on."""
    run, _, _ = uninterrupted(METHODS[name])
    assert type(run.model) is Net
    assert all(type(m) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, Net) for m in run.model.modules())
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}
    assert (run.pruner.density < 1) == run.pruner.method.prunes
    assert run.pruner.events


def target(name: str, folder: Path) -> None:
    """What was asked for is what the weights say, or the miss is a warning with its reason."""
    run, missed, _ = uninterrupted(METHODS[name])
    assert_pruned(run, missed)
    rows = run.pruner.outcome().targets
    assert any(row.asked is not None for row in rows)
    for row in rows:
        if row.what == "sparsity of the pruned layers":
            weights = [run.model.get_submodule(layer).weight for layer in run.pruner.masks]
            kept = sum(int(mask.sum()) for mask in run.pruner.masks.values())
            assert row.reached == pytest.approx(1 - kept / sum(w.numel() for w in weights))
        if row.what == "compression of convolution weights":
            convs = [m.weight for m in run.model.modules() if isinstance(m, nn.Conv2d)]
            nonzero = sum(int(w.count_nonzero()) for w in convs)
            assert row.reached == pytest.approx(sum(w.numel() for w in convs) / nonzero, rel=0.02)


def resumed(name: str, folder: Path) -> None:
    """Killed at any moment and resumed from a file, a run ends as if nothing had happened."""
    expected, _, saved = uninterrupted(METHODS[name])
    for done in MOMENTS[1::2]:
        run = attach(name, seed=done)
        run.load(saved / f"{done}.safetensors")
        run.train(done).finish()
        assert_same_end(run, expected)


def state_file(name: str, folder: Path) -> None:
    """The pruner's state is tensors and JSON, and what is loaded is what was saved."""
    _, _, saved = uninterrupted(METHODS[name])
    for done in MOMENTS[::2]:
        state = load_tree(saved / f"{done}.safetensors")["pruner"]
        run = attach(name, seed=done)
        run.pruner.load_state_dict(state)
        assert_same(run.pruner.state_dict(), state)


@functools.cache
def two_processes() -> tuple[Path, str]:
    """Where two processes that train every method together leave what they end with, and their complaints."""
    folder = Path(tempfile.mkdtemp(prefix="clicktrain-contract-"))
    command = [sys.executable, str(Path(__file__).with_name("contract_loop.py"))]
    started = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        return folder, "".join(process.communicate(timeout=400)[1] for process in started)
    finally:
        for process in started:
            process.kill()


def processes(name: str, folder: Path) -> None:
    """Two processes that see different batches decide alike and end with the same weights."""
    shared, complaints = two_processes()
    assert all((shared / f"{name}-{rank}.safetensors").exists() for rank in range(2)), complaints
    decided = [json.loads((shared / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    assert decided[0] == decided[1]
    mine, others = (load_file(shared / f"{name}-{rank}.safetensors") for rank in range(2))
    statistics = ("running_mean", "running_var")  # of each process's own last batch
    differ = [key for key in mine if not torch.equal(mine[key], others[key]) and not key.endswith(statistics)]
    assert differ == []


def kept_exchange(name: str, folder: Path) -> None:
    """Sending gradients of kept weights only changes nothing; with frozen masks no others travel."""
    shared, complaints = two_processes()
    assert (shared / f"{name}-kept-1.safetensors").exists(), complaints
    decided = [json.loads((shared / f"{name}-{kind}.json").read_text()) for kind in ("0", "kept-0")]
    assert decided[0] == decided[1]
    expected, weights = (load_file(shared / f"{name}-{kind}.safetensors") for kind in ("0", "kept-0"))
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-6, atol=1e-7)
        assert torch.equal(weights[key] != 0, value != 0), key
    sizes = json.loads((shared / f"{name}-kept-0-sizes.json").read_text())
    pruned = sum(numel - kept for numel, kept in sizes["masks"].values())
    hard_prune = [event["step"] for event in decided[0]["events"] if event["event"] == "hard_prune"]
    for done, sent in enumerate(sizes["steps"], 1):
        if hard_prune and done > hard_prune[0]:
            assert sent == 4 * (sizes["weights"] - pruned)
    assert len(sizes["steps"]) == TOTAL


def grad_scaler(name: str, folder: Path) -> None:
    """Scaled gradients, which a fused optimizer is given as they are, decide as plain ones do.

    The scale grows, so that batches would count differently in a sum of scaled gradients.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_factor=8, growth_interval=2)
    run = attach(name).train(scaler=scaler)
    missed = run.finish()
    assert scaler.get_scale() > 2.0**20
    assert_pruned(run, missed)
    expected, _, _ = uninterrupted(METHODS[name])
    assert {k: m.tolist() for k, m in run.pruner.masks.items()} == {
        k: m.tolist() for k, m in expected.pruner.masks.items()
    }
    assert [p.to_json() for p in run.pruner.plans] == [p.to_json() for p in expected.pruner.plans]
    for key, value in expected.weights().items():
        torch.testing.assert_close(run.weights()[key], value, rtol=1e-3, atol=1e-4, msg=key)


def accumulation(name: str, folder: Path) -> None:
    """Several batches to an optimizer step: the target is reached all the same."""
    run = attach(name).train(accumulate=2)
    assert_pruned(run, run.finish())


def compiled(name: str, folder: Path) -> None:
    """The network runs under torch.compile, compiled again when it has other parameters."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    run = attach(name).train(wrap=lambda module: torch.compile(module, backend=backend))
    torch.compiler.reset()
    assert len(graphs) >= 1
    assert_pruned(run, run.finish())
    expected, _, _ = uninterrupted(METHODS[name])
    assert run.pruner.density == pytest.approx(expected.pruner.density, rel=1e-3)


@dataclass
class Finished:
    """What is exported."""

    model: nn.Module
    facts: Mapping[str, Any]
    image_shape: tuple[int, int, int] = (1, 8, 8)


def packed(name: str, folder: Path) -> None:
    """Trained on packed values, unpacked and exported, it is one network."""
    run = attach(name, packed=True).train()
    missed = run.finish(packed=True)
    x = batch(99)[0]
    with torch.no_grad():
        expected = run.model.eval()(x)
        plain = clicktrain.unpack(run.model)
        assert all(type(m) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, Net) for m in plain.modules())
        torch.testing.assert_close(plain.eval()(x), expected)
    for layer, mask in run.pruner.masks.items():
        assert not plain.get_submodule(layer).weight.detach()[~mask].any()  # type: ignore[index,operator,union-attr]
    assert bool(missed) == any(target.missed for target in run.pruner.outcome().targets)
    for format in ("safetensors", "torch"):
        done = export_run(Finished(plain, {}), format, folder / format)  # type: ignore[arg-type]
        assert done.max_difference <= done.tolerance


@functools.cache
def command_line(name: str) -> tuple[str, Path]:
    """What ``train --dry-run`` prints, and the folder of the run that follows it, with its report."""
    folder = Path(tempfile.mkdtemp(prefix="clicktrain-contract-")) / "run"
    data = f"synthetic:classes=4,size=8,channels=1,train={IMAGES * TOTAL // EPOCHS},val=16"
    words = ("--model", "contract_loop:Net", "--data", data, "--method", name, "--epochs", str(EPOCHS))
    more = ("--batch-size", str(IMAGES), "--threads", "1", "--quiet", "--learning-rate", "0.05")
    more += starting_weights(name, folder.parent)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["train", *words, *more, "--operators", "reference", "--dry-run"]) == 0
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", *words, *more, "--operators", "reference", "--out", str(folder)]) == 0
    return printed.getvalue(), folder


def report(name: str, folder: Path) -> None:
    """A run of the command line ends with a page that names the method as people write it."""
    page = (command_line(name)[1] / "report.html").read_text("utf-8")
    assert f"{METHODS[name].title} on " in page


def rows_of(printed: str) -> Iterator[tuple[str, int, float | None]]:
    """(layer, weights, density or None) of each row of a plan's table."""
    head, *lines = printed.splitlines()
    at = {match.group(): match.start() for match in re.finditer(r"\S+(?: \S+)*", head)}
    for line in lines:
        shape = line[at["shape"] : at["what"]].strip()
        if line.startswith("stage ") or not re.fullmatch(r"\d+(x\d+)+", shape):
            return
        density = line[at["density"] : at["per filter"]].strip()
        weights = math.prod(map(int, shape.split("x")))
        yield line[: at["shape"]].strip(), weights, float(density) if density else None


def dry_run(name: str, folder: Path) -> None:
    """What the dry run says of each layer and of all of them is what the run then does."""
    printed, run = command_line(name)
    summary = json.loads((run / "summary.json").read_text())
    nonzero = {row["name"]: row["density"] * math.prod(row["shape"]) for row in summary["layers"]}
    rows = list(rows_of(printed))
    assert {layer for layer, _, _ in rows} == nonzero.keys()
    for layer, weights, density in rows:
        if density is not None:
            assert nonzero[layer] / weights == pytest.approx(density, rel=TOLERANCE, abs=0.002), layer
    reached = [row["reached"] for row in summary["outcome"]]
    for number in map(float, re.findall(r"planned ([\d.]+\d)", printed)):
        assert any(value == pytest.approx(number, rel=0.01) for value in reached), (number, reached)
    for asked in [row["asked"] for row in summary["outcome"] if row["asked"] is not None]:
        assert re.search(rf"(?<![\d.]){asked:g}(?![\d.]*\d)|{100 * asked:g}%", printed), (asked, printed)


PROPERTIES: dict[str, Callable[[str, Path], None]] = {
    "plan before": plan_before,
    "own loop": own_loop,
    "target": target,
    "resumed": resumed,
    "state file": state_file,
    "2 processes": processes,
    "kept exchange": kept_exchange,
    "GradScaler": grad_scaler,
    "accumulation": accumulation,
    "compiled": compiled,
    "packed": packed,
    "report": report,
    "dry run": dry_run,
}


IN_PROCESSES = ("2 processes", "kept exchange")
"""Properties that start processes, which takes a while."""


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "what", [pytest.param(w, marks=pytest.mark.long if w in IN_PROCESSES else ()) for w in PROPERTIES]
)
def test_contract(
    what: str, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    reason = METHODS[name].contract_exempt.get(what)
    record_property("contract", (what, name, reason))
    if what in IN_PROCESSES and not dist.is_available():
        pytest.skip("PyTorch without torch.distributed")
    if reason is None:
        PROPERTIES[what](name, tmp_path)
    elif keeps(what, name, tmp_path):
        pytest.fail(f"{name} is exempt from '{what}' ({reason}) but has it: remove the exemption")


def keeps(what: str, name: str, folder: Path) -> bool:
    try:
        PROPERTIES[what](name, folder)
    except AssertionError:
        return False
    return True


def test_exemptions_name_properties_and_give_reasons() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.title
        assert method.contract_exempt.keys() <= PROPERTIES.keys(), name
        assert all(method.contract_exempt.values()), name


# ---- the contract catches methods that do not keep it ------------------------------------------------


class Forgetful(RigL):
    """Saves its state and starts afresh all the same."""

    name = "forgetful"

    def load_state(self, prunable: Any, length: Any, saved: Mapping[str, Any]) -> Any:
        return self.init(prunable, length)


class Boastful(RigL):
    """Plans a density that it does not end at, as a method does that shows its first masks."""

    name = "boastful"

    def plan(self, prunable: Any, length: Any, state: Any = None) -> PruningPlan:
        plan = super().plan(prunable, length, state)
        rows = [replace(row, density=row.density and row.density / 2) for row in plan.rows]
        return replace(plan, rows=tuple(rows))


@dataclass(frozen=True, kw_only=True)
class Careless(ClickTrain):
    """Reads gradients as they stand, scaled or not."""

    name: ClassVar[str] = "careless"
    criterion: Any = "taylor"
    selection: Any = "accumulated"
    finalize_length: Any = 0.4

    def before_step(self, state: Any, prunable: Any, step: StepInfo) -> None:
        super().before_step(state, prunable, replace(step, grad_scale=None))


class Silent(RigL):
    """Asks for nothing that could be missed."""

    name = "silent"

    def targets_of(self, state: Any, reached: Any) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("method", "what"),
    [
        (Forgetful, "resumed"),
        (Forgetful, "state file"),
        (Boastful, "dry run"),
        (Careless, "GradScaler"),
        (Silent, "target"),
    ],
)
def test_a_method_that_breaks_the_contract_is_caught(
    method: type[Method[Any]], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS._entries, method.name, method)
    assert keeps("plan before", method.name, tmp_path)
    assert not keeps(what, method.name, tmp_path)
