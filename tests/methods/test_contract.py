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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contract_loop import EPOCHS, IMAGES, TOTAL, Net, Run, attach, batch
from safetensors.torch import load_file
from torch import Tensor, nn

import clicktrain
from clicktrain.cli import main
from clicktrain.export import export_run
from clicktrain.formats.tree import flatten_tree, load_tree, save_tree
from clicktrain.methods import METHODS, Method
from clicktrain.methods.outcome import TOLERANCE

MOMENTS = (1, 5, 8, 10, 14)
"""Batches after which a run is killed: in several stages, at an end of an epoch and in the middle of one."""


@functools.cache
def uninterrupted(method: type[Method[Any]]) -> tuple[Run, list[str]]:
    """A run that nothing disturbs, and the targets that it missed."""
    run = attach(method.name).train()
    return run, run.finish()


def assert_same(first: Any, second: Any) -> None:
    """The same to the last bit: nested states."""
    (tensors, rest), (others, other_rest) = flatten_tree(first), flatten_tree(second)
    assert rest == other_rest
    assert tensors.keys() == others.keys()
    assert [key for key, value in tensors.items() if not value.equal(others[key])] == []


def without_times(events: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in event.items() if "seconds" not in k and "_ms" not in k} for event in events]


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
    run, _ = uninterrupted(METHODS[name])
    assert type(run.model) is Net
    assert all(type(m) in (nn.Conv2d, nn.Linear, nn.BatchNorm2d, Net) for m in run.model.modules())
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.model.parameters()}
    assert (run.pruner.density < 1) == run.pruner.method.prunes
    assert run.pruner.events


def target(name: str, folder: Path) -> None:
    """What was asked for is what the weights say, or the miss is a warning with its reason."""
    run, missed = uninterrupted(METHODS[name])
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
    whole = attach(name)

    def save(done: int) -> None:
        if done in MOMENTS:
            whole.save(folder / f"{done}.safetensors")

    whole.train(after=save).finish()
    expected, _ = uninterrupted(METHODS[name])
    assert_same_end(whole, expected)
    for done in MOMENTS:
        run = attach(name, seed=done)
        run.load(folder / f"{done}.safetensors")
        run.train(done).finish()
        assert_same_end(run, expected)


def state_file(name: str, folder: Path) -> None:
    """The pruner's state goes through a file of tensors and JSON unchanged, and back into a pruner."""
    run = attach(name)

    def save(done: int) -> None:
        if done not in MOMENTS:
            return
        state = run.pruner.state_dict()
        save_tree(folder / "state.safetensors", state, {})
        loaded = load_tree(folder / "state.safetensors")
        assert_same(loaded, state)
        again = attach(name, seed=done)
        again.pruner.load_state_dict(loaded)
        assert_same(again.pruner.state_dict(), state)
        assert again.pruner.stage == run.pruner.stage

    run.train(after=save)


@functools.cache
def two_processes() -> tuple[Path, str]:
    """Where two processes that train every method together leave what they end with, and their complaints."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="clicktrain-contract-"))
    command = [sys.executable, str(Path(__file__).with_name("contract_loop.py"))]
    started = [
        subprocess.Popen([*command, str(rank), "2", str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        return folder, "".join(process.communicate(timeout=240)[1] for process in started)
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


def grad_scaler(name: str, folder: Path) -> None:
    """Scaled gradients, which a fused optimizer is given as they are, decide as plain ones do."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    run = attach(name).train(scaler=scaler)
    missed = run.finish()
    assert scaler.get_scale() == 2.0**10
    assert_pruned(run, missed)
    expected, _ = uninterrupted(METHODS[name])
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
    expected, _ = uninterrupted(METHODS[name])
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
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="clicktrain-contract-")) / "run"
    data = f"synthetic:classes=4,size=8,channels=1,train={IMAGES * TOTAL // EPOCHS},val=16"
    words = ("--model", "contract_loop:Net", "--data", data, "--method", name, "--epochs", str(EPOCHS))
    more = ("--batch-size", str(IMAGES), "--threads", "1", "--quiet", "--learning-rate", "0.05")
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


def dry_run(name: str, folder: Path) -> None:
    """What the dry run says of each layer and of all of them is what the run then does."""
    printed, run = command_line(name)
    table, _, _ = printed.partition("\nmodel: ")
    summary = json.loads((run / "summary.json").read_text())
    after = {row["name"]: row for row in summary["layers"]}
    head, *lines = table.splitlines()
    columns = {m.group(): m.start() for m in re.finditer(r"\S+(?: \S+)*", head)}
    kept = total = 0.0
    for line in lines[: len(after)]:
        layer = line[: columns["shape"]].strip()
        shape = [int(n) for n in line[columns["shape"] : columns["what"]].strip().split("x")]
        said = line[columns["density"] : columns["per filter"]].strip()
        now = after[layer]["density"] * math.prod(after[layer]["shape"]) / math.prod(shape)
        if said:
            assert now == pytest.approx(float(said), rel=TOLERANCE, abs=0.002), line
    planned = [float(number) for number in re.findall(r"planned ([\d.]+)", table)]
    reached = [target["reached"] for target in summary["outcome"]]
    for number in planned:
        assert any(number == pytest.approx(value, rel=0.01) for value in reached), (number, reached)
    for asked in [target["asked"] for target in summary["outcome"] if target["asked"] is not None]:
        assert re.search(rf"(?<![\d.]){asked:g}(?![\d.]*\d)|{100 * asked:g}%", table), (asked, table)
    del kept, total


PROPERTIES: dict[str, Callable[[str, Path], None]] = {
    "plan before": plan_before,
    "own loop": own_loop,
    "target": target,
    "resumed": resumed,
    "state file": state_file,
    "2 processes": processes,
    "GradScaler": grad_scaler,
    "accumulation": accumulation,
    "compiled": compiled,
    "packed": packed,
    "report": report,
    "dry run": dry_run,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", PROPERTIES)
def test_contract(
    what: str, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    reason = METHODS[name].contract_exempt.get(what)
    record_property("contract", (what, name, reason))
    if what == "2 processes" and not dist.is_available():
        pytest.skip("PyTorch without torch.distributed")
    if reason is None:
        PROPERTIES[what](name, tmp_path)
        return
    with pytest.raises(AssertionError):
        PROPERTIES[what](name, tmp_path)
        pytest.fail(f"{name} is exempt from '{what}' ({reason}) but has it: remove the exemption")


def test_exemptions_name_properties() -> None:
    for name, method in METHODS.items():
        assert method.contract_exempt.keys() <= PROPERTIES.keys(), name
        assert all(method.contract_exempt.values()), name
        assert method.name == name
        assert method.title
