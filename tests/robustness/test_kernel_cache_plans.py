"""Remembered plans: one that was damaged, edited or copied is not believed, and never stops anything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_faults import DAMAGES, pruned_network

import clicktrain
from clicktrain.compiler import Accelerated, LoweringPlan, plan_cache
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.kernels.native import toolchain

pytestmark = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of `pruned_network` as it is kept; libraries stay where they are."""
    folder = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clicktrain.compiler.plan_cache.cache_folder", lambda: folder)
        accelerated(folder)
    assert len(list(folder.iterdir())) == 1
    return next(folder.iterdir())


@pytest.fixture
def kept(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, where it is looked for."""
    monkeypatch.setattr("clicktrain.compiler.plan_cache.cache_folder", lambda: tmp_path)
    return Path(shutil.copy(measured, tmp_path))


def accelerated(folder: Path) -> Accelerated:
    """Measured, and right."""
    model, x = pruned_network()
    expected = model.eval()(x)
    fast = clicktrain.accelerate(model, x)
    assert isinstance(fast, Accelerated)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
    return fast


def believed(path: Path, marker: str) -> bool:
    """Whether `accelerate` takes the plan that is kept there, as its notes tell."""
    return marker in accelerated(path.parent).plan.notes


def marked(path: Path) -> dict[str, Any]:
    """The file's document, its plan told apart from one that is measured."""
    document: dict[str, Any] = json.loads(path.read_text())
    plan = json.loads(document["plan"])
    plan["notes"] = ["kept"]
    return sealed(document, plan)


def sealed(document: dict[str, Any], plan: Any) -> dict[str, Any]:
    text = json.dumps(plan)
    return {**document, "plan": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def test_a_plan_is_believed_as_it_was_written(kept: Path) -> None:
    kept.write_text(json.dumps(marked(kept)))
    assert believed(kept, "kept")


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if "another kernel" not in kind])
def test_damage(kept: Path, kind: str) -> None:
    kept.write_text(json.dumps(marked(kept)))
    DAMAGES[kind](kept)
    assert plan_cache.read(kept) is None or (kind == "unreadable" and os.geteuid() == 0)


def test_a_damaged_plan_is_measured_again(kept: Path) -> None:
    kept.write_text(json.dumps(marked(kept))[:-9])
    assert not believed(kept, "kept")
    assert plan_cache.read(kept) is not None  # kept once more


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "7", '"x"', "{}", "[" * 100_000, "9" * 5000, "NaN", '{"plan": {}}']
)
def test_valid_or_invalid_json_that_is_no_plan(kept: Path, text: str) -> None:
    kept.write_text(text)
    assert plan_cache.read(kept) is None


DOCUMENTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another version": lambda d: {**d, "version": 1},
    "a version of words": lambda d: {**d, "version": "x"},
    "no version": lambda d: {key: value for key, value in d.items() if key != "version"},
    "another network's name": lambda d: {**d, "name": f"plan-{0:032x}.json"},
    "an edited plan": lambda d: {**d, "plan": d["plan"].replace("blocked", "plain")},
    "a plan that is no text": lambda d: {**d, "plan": json.loads(d["plan"])},
    "no hash": lambda d: {**d, "sha256": None},
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_that_was_not_written_so(kept: Path, name: str) -> None:
    kept.write_text(json.dumps(DOCUMENTS[name](marked(kept))))
    assert plan_cache.read(kept) is None


def _first(plan: dict[str, Any], **changes: Any) -> dict[str, Any]:
    choices = [{**plan["choices"][0], **changes}, *plan["choices"][1:]]
    return {**plan, "choices": choices}


MISFITS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another rule": lambda p: {**p, "rule": "sparse"},
    "another batch": lambda p: {**p, "batch": 9},
    "another processor": lambda p: {**p, "machine": {**p["machine"], "cpu": "another"}},
    "other threads": lambda p: {**p, "machine": {**p["machine"], "threads": 99}},
    "another precision": lambda p: {**p, "activations": "bf16"},
    "a dense type that was not allowed": lambda p: _first(p, dense="channels_last bf16"),
    "no layers": lambda p: {**p, "choices": []},
    "a layer too few": lambda p: {**p, "choices": p["choices"][1:]},
    "a layer too many": lambda p: {**p, "choices": [*p["choices"], {**p["choices"][0], "layer": "more"}]},
    "another layer": lambda p: _first(p, layer="another"),
    "another weight": lambda p: _first(p, weight=[8, 4, 3, 3]),
    "another image": lambda p: _first(p, image=[3, 5, 5]),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_plan_that_does_not_fit_the_network(kept: Path, name: str) -> None:
    """Sealed as if it had been written so: only the network can tell."""
    document = marked(kept)
    kept.write_text(json.dumps(sealed(document, MISFITS[name](json.loads(document["plan"])))))
    assert plan_cache.read(kept) is not None
    assert not believed(kept, "kept")


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda p: [p],
    "choices that are none": lambda p: {**p, "choices": {"a": 1}},
    "a choice that is none": lambda p: {**p, "choices": [7]},
    "batch of words": lambda p: {**p, "batch": "8"},
    "batch beyond all bounds": lambda p: {**p, "batch": 10**30},
    "batch of 0": lambda p: {**p, "batch": 0},
    "an unknown rule": lambda p: {**p, "rule": "guessed"},
    "a rule that is a list": lambda p: {**p, "rule": []},
    "unknown activations": lambda p: {**p, "activations": []},
    "notes that are numbers": lambda p: {**p, "notes": [1]},
    "no machine": lambda p: {**p, "machine": None},
    "a machine without lanes": lambda p: {**p, "machine": {"cpu": "x", "threads": 1}},
    "an unknown kind": lambda p: _first(p, kind="magic"),
    "a layer that is a number": lambda p: _first(p, layer=4),
    "a weight of words": lambda p: _first(p, weight=["8", "3", "3", "3"]),
    "a weight below 0": lambda p: _first(p, weight=[8, -3, 3, 3]),
    "a density of words": lambda p: _first(p, density="half"),
    "a density that is no number": lambda p: _first(p, density=float("nan")),
    "a density of 2": lambda p: _first(p, density=2),
    "milliseconds of words": lambda p: _first(p, measured_ms="fast"),
    "milliseconds without end": lambda p: _first(p, predicted_ms=float("inf")),
    "a field that is none": lambda p: _first(p, colour="red"),
    "a phase that is none": lambda p: _first(p, tilings=[["sideways", {"tile": [1, 1], "region": [1, 1]}]]),
    "tilings that are none": lambda p: _first(p, tilings=[["forward", 3]]),
    "a tile of 0": lambda p: _first(p, tilings=[["forward", {"tile": [0, 1], "region": [1, 1]}]]),
    "a tile that never ends": lambda p: _first(
        p, tilings=[["forward", {"tile": [10**9, 1], "region": [1, 1]}]]
    ),
    "a region of three": lambda p: _first(p, tilings=[["forward", {"tile": [1, 1], "region": [1, 1, 1]}]]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_inside_valid_json(kept: Path, name: str) -> None:
    """In a remembered plan they are not believed; in a plan that a user gives, one sentence says so."""
    document = marked(kept)
    wrong = WRONG[name](json.loads(document["plan"]))
    kept.write_text(json.dumps(sealed(document, wrong)))
    assert plan_cache.read(kept) is None
    with pytest.raises(UserError) as refused:
        LoweringPlan.from_json(json.dumps(wrong))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    model, x = pruned_network()
    plan = clicktrain.accelerate(model, x, rule="sparse").plan
    assert isinstance(plan, LoweringPlan)
    plan_cache.keep(tmp_path / "missing" / "plan.json", plan)
    (tmp_path / "folder").mkdir()
    plan_cache.keep(tmp_path / "folder", plan)
    assert plan_cache.read(tmp_path / "missing" / "plan.json") is None
    assert plan_cache.read(tmp_path / "folder") is None
    write_text_atomic(tmp_path / "file", "x")
    plan_cache.keep(tmp_path / "file" / "plan.json", plan)
