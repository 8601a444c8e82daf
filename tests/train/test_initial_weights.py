"""Runs that start from the weights of another: what they take, what they refuse, what they account for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_runs import DENSE, At, Killed, assert_same_run, kill, resume, run, weights

from clicktrain.errors import UserError
from clicktrain.report import write_report
from clicktrain.report.run_data import read_runs
from clicktrain.train import RunFolder, from_dict
from clicktrain.train.initial_weights import EarlierCost, _cost_of
from clicktrain.train.prepare import prepare

AFTER: dict[str, Any] = {**DENSE, "method": "campfire", "preset": "after-training", "sparsity": 0.7,
                         "operators": "reference", "learning_rate": 0.02}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "run"
    run(path, {**DENSE, "epochs": 3})
    return path


def start(source: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """The network of a run that has not taken a step."""
    prepared = prepare(*from_dict({**DENSE, "initial_weights": str(source), **settings}))
    return dict(prepared.model.state_dict())


@pytest.mark.parametrize("as_file", [False, True])
def test_a_run_starts_from_them(trained: Path, tmp_path: Path, as_file: bool) -> None:
    source = trained / "model.safetensors" if as_file else trained
    earlier = weights(trained)
    model = start(source, seed=5)
    assert model.keys() == earlier.keys()
    assert all(torch.equal(model[name], earlier[name]) for name in earlier)
    foreign = tmp_path / "foreign.safetensors"  # of another program: no word about what it is
    save_file(load_file(trained / "model.safetensors"), foreign)
    assert all(torch.equal(value, earlier[name]) for name, value in start(foreign).items())


def test_pruning_after_training(trained: Path, tmp_path: Path) -> None:
    """The masks are those of the trained weights, chosen before the first step; the cost is that of both."""
    settings = {**AFTER, "initial_weights": str(trained), "granularity": "ck", "within": "filter"}
    summary = run(tmp_path / "run", settings)
    folder = RunFolder(tmp_path / "run")
    assert summary["hard_prune_epoch"] == pytest.approx(1 / 11)  # fixed at the first step
    earlier = weights(trained)
    for name in ("3", "7"):  # keeps the kernels with the largest maxima: 1 - (floor(0.7 * c) + 1) / c
        scores = earlier[f"{name}.weight"].abs().amax(dim=(2, 3))
        keep = scores.shape[1] - (int(0.7 * scores.shape[1]) + 1)
        best = scores.topk(keep, dim=1).indices
        expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)
        assert torch.equal(weights(tmp_path / "run")[f"{name}.weight"].ne(0).any(-1).any(-1), expected)
    before = RunFolder(trained).summary()
    assert before is not None
    assert before["initial_train_flops"] == 0
    assert before["total_train_flops_ratio"] == before["train_flops_ratio"] == 1.0
    assert summary["initial_train_flops"] == before["train_flops"]
    # Compared with one dense training, the longer of the two: three epochs.
    assert summary["total_train_flops_ratio"] == pytest.approx(
        (before["train_flops"] + summary["train_flops"]) / before["train_flops"]
    )
    assert before["initial_train_seconds"] == 0
    assert before["total_train_seconds"] == before["train_seconds"]
    assert summary["initial_train_seconds"] == before["train_seconds"]
    assert summary["total_train_seconds"] == before["train_seconds"] + summary["train_seconds"]
    assert folder.read_metrics()[0]["sparsity"] > 0.6
    run(tmp_path / "again", {**settings, "initial_weights": str(tmp_path / "run"), "epochs": 1})
    again = RunFolder(tmp_path / "again").summary()
    assert again is not None
    assert again["initial_train_flops"] == before["train_flops"] + summary["train_flops"]
    total = again["initial_train_flops"] + again["train_flops"]
    assert again["total_train_flops_ratio"] == pytest.approx(total / before["train_flops"])
    assert again["initial_train_seconds"] == summary["total_train_seconds"]
    run(tmp_path / "file", {**AFTER, "initial_weights": str(trained / "model.safetensors"), "epochs": 1})
    file = RunFolder(tmp_path / "file").summary()
    assert file is not None
    assert file["initial_train_flops"] is file["total_train_flops_ratio"] is None  # nobody knows
    assert file["initial_train_seconds"] is file["total_train_seconds"] is None


def test_runs_of_versions_that_did_not_add_up_time(trained: Path, tmp_path: Path) -> None:
    """Their own time is known, that of the weights that they started from is not."""
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    facts = json.loads((old / "summary.json").read_text())
    del facts["initial_train_seconds"], facts["total_train_seconds"]
    for spent, known in ((0, facts["train_seconds"]), (7, None)):
        (old / "summary.json").write_text(json.dumps({**facts, "initial_train_flops": spent}))
        assert _cost_of(RunFolder(old)).seconds == known
    saved = {"flops": 0, "flops_dense": 0}
    assert EarlierCost.from_state(saved) == EarlierCost()
    assert EarlierCost.from_state({**saved, "flops": 7}).seconds is None
    assert EarlierCost.from_state(dataclasses.asdict(EarlierCost(7, 7, 3.0))) == EarlierCost(7, 7, 3.0)


def test_a_longer_run_is_compared_with_itself(trained: Path, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", {**DENSE, "initial_weights": str(trained), "epochs": 4})
    assert summary["total_train_flops_ratio"] == pytest.approx(7 / 4)


def test_resumed_without_the_file(trained: Path, tmp_path: Path) -> None:
    """The weights are read when the run begins, and only then."""
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    settings = {**AFTER, "initial_weights": str(source)}
    run(tmp_path / "whole", settings)
    for batch in (1, 15):
        with pytest.raises(Killed):
            run(tmp_path / f"run{batch}", settings, At(batch, kill))
    for path in RunFolder(tmp_path / "run1").checkpoints():
        path.unlink()
    resume(tmp_path / "run1")  # nothing was saved yet: it begins, and reads them
    assert_same_run(tmp_path / "run1", tmp_path / "whole")
    shutil.rmtree(source)
    resume(tmp_path / "run15")
    assert_same_run(tmp_path / "run15", tmp_path / "whole")


def refused(source: Path, sentence: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=sentence) as error:
        start(source, **settings)
    assert "\n" not in str(error.value)


def test_what_is_refused(trained: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "which does not exist: give the folder of a finished run")
    refused(tmp_path, "is not the folder of a run")
    refused(trained, r"lacks 0.bias", model="tiny_networks:plain")
    file = tmp_path / "weights.safetensors"
    content = (trained / "model.safetensors").read_bytes()
    file.write_bytes(content[:-7])
    refused(file, "cannot be read: .* is not a whole safetensors file")
    good = load_file(trained / "model.safetensors")
    save_file({**good, "3.weight": good["3.weight"][:, :4].contiguous()}, file)
    refused(file, r"has 3.weight of shape \[16, 4, 3, 3\], the network has \[16, 8, 3, 3\]")
    save_file({**good, "extra": torch.zeros(1)}, file)
    refused(file, "has extra, which the network does not")
    save_file({**good, "7.weight": good["7.weight"] * float("nan")}, file)
    refused(file, "damaged: 7.weight holds values that are no numbers")
    save_file(good, file, {"clicktrain": json.dumps({"classes": [str(n) for n in range(9, -1, -1)]})})
    refused(file, "trained for other classes .'9' where this data has '0'.")
    save_file(good, file, {"clicktrain": json.dumps({"classes": ["cat", "dog"]})})
    refused(file, "trained for 2 classes, this data has 10")
    with pytest.raises(Killed):
        run(tmp_path / "unfinished", DENSE, At(2, kill))
    refused(tmp_path / "unfinished", "which is not finished: continue it")


def test_a_file_of_other_classes(trained: Path, tmp_path: Path) -> None:
    """Published weights are of 1000 classes: the classifier stays fresh, and a warning says so."""
    good, file = load_file(trained / "model.safetensors"), tmp_path / "weights.safetensors"
    head = next(name.rpartition(".")[0] for name, value in good.items() if value.dim() == 2)
    fresh = prepare(*from_dict(DENSE)).model.state_dict()
    weight, bias = torch.zeros(1000, good[f"{head}.weight"].shape[1]), torch.zeros(1000)
    save_file({**good, f"{head}.weight": weight, f"{head}.bias": bias}, file)
    with pytest.warns(UserWarning, match=f"no classifier for 10 classes: {head} keeps its fresh weights"):
        model = start(file)
    for name, value in model.items():
        assert torch.equal(value, (fresh if name.startswith(f"{head}.") else good)[name]), name


def test_pruning_after_training_needs_a_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give initial_weights, the folder of a finished run"):
        run(tmp_path / "run", AFTER)
    assert not (tmp_path / "run").exists()


def test_what_is_shown_counts_both(trained: Path, tmp_path: Path) -> None:
    """The report compares a fine-tuned network by all that it has cost."""
    run(tmp_path / "run", {**AFTER, "initial_weights": str(trained), "epochs": 1})
    (shown,) = read_runs([tmp_path / "run"])
    assert shown.train_flops_ratio is not None
    assert shown.train_flops_ratio > 1
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text("utf-8")
    assert "of one dense training, initial weights included" in page
    assert "wall clock, whole run, initial weights included" in page
    assert shown.seconds is not None
    assert shown.total_seconds is not None
    assert shown.total_seconds > shown.seconds
    assert "Campfire (after-training)" in page
