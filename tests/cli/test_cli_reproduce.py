"""``clicktrain reproduce``: the list, and one item of each kind on the handwritten digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from cli_runs import call, files_below

from clicktrain.papers import read_rows

QUICK = {
    "algorithm": "clicktrain/alg-pool",
    "equation": "campfire/eq-1",
    "table": "campfire/table-9",
    "figure": "clicktrain/fig-3",
    "network": "prunetrain/net-resnet32",
    "data set": "clicktrain/data-cifar10",
    "text": "clicktrain/text-conversion",
}


@pytest.fixture
def place(place: Path, repository: Path) -> Path:
    """An empty current folder with the recipes in it."""
    shutil.copytree(repository / "recipes", place / "recipes")
    return place


def test_every_item_is_a_line(place: Path) -> None:
    outcome = call("reproduce", "--json", "items.json")
    *lines, last = outcome.out.splitlines()
    assert [line.split()[0] for line in lines] == list(read_rows())
    assert lines[0].endswith("sum of (gradient x weight)^2 over what it keeps  [can be run]")
    assert f"{len(lines)} items: " in last
    items = json.loads((place / "items.json").read_text())
    assert {item["kind"] for item in items} == set(QUICK)
    state = next(item["state"] for item in items if item["name"] == "campfire/table-5")
    assert state == "not run: needs ImageNet and a GPU"


@pytest.mark.parametrize("kind", QUICK)
def test_one_item_of_each_kind_on_digits(kind: str, place: Path) -> None:
    item = QUICK[kind]
    assert read_rows()[item].kind == kind
    outcome = call("reproduce", item, "--scale", "digits", "--epochs", "2", "--json", "figures.json")
    assert outcome.code == 0, outcome.err
    result = json.loads((place / "figures.json").read_text())
    assert result["item"] == item
    assert all(isinstance(figure["ours"], (int, float)) for figure in result["figures"]), result["figures"]
    assert [f["paper"] for f in result["figures"]] == [f.paper for f in read_rows()[item].figures]
    smaller = (
        "on this machine" if kind == "text" else "a smaller setting than the paper's: handwritten digits"
    )
    assert smaller in outcome.out


def test_what_is_done_is_skipped_and_what_was_stopped_goes_on(place: Path) -> None:
    words = ("reproduce", "clicktrain/fig-3", "--scale", "digits", "--epochs", "1", "--out", "kept")
    first = call(*words, "--seeds", "0", "1", "--json", "a.json")
    assert first.code == 0, first.err
    assert "sd " in first.out
    run = place / "kept" / "digits" / "clicktrain" / "fig-3" / "dense-s1"
    (run / "summary.json").unlink()  # as if it had been killed before its last line
    before = files_below(run.parent / "dense-s0")
    again = call(*words, "--seeds", "0", "1", "--json", "b.json")
    assert again.code == 0, again.err
    assert "dense: done before, in kept/digits/clicktrain/fig-3/dense-s0" in again.out
    assert f"dense: clicktrain resume {run.relative_to(place)}" in again.out
    assert files_below(run.parent / "dense-s0") == before
    assert json.loads((place / "a.json").read_text()) == json.loads((place / "b.json").read_text())
    other = call("reproduce", "clicktrain/fig-3", "--scale", "digits", "--epochs", "3", "--out", "kept")
    assert other.code == 2
    assert "comes of another command than 'clicktrain train --config recipes/digits.yaml" in other.err


def test_a_dry_run_prints_commands_and_writes_nothing(place: Path) -> None:
    before = files_below(place)
    outcome = call("reproduce", "prunetrain/table-*", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert files_below(place) == before
    assert (
        "clicktrain train --config recipes/cifar10-small-resnet.yaml --method prunetrain "
        "--penalty-ratio 0.25 --seed 0 --out runs/reproduce/small/prunetrain/table-1/prunetrain-s0"
    ) in outcome.out
    heads = [line for line in outcome.out.splitlines() if line.startswith("#")]
    assert [line.split()[1] for line in heads] == [f"prunetrain/table-{n}:" for n in (1, 2, 3, 4)]
    own = call("reproduce", "prunetrain/table-1", "--dry-run", "--scale", "paper").out
    assert "(the paper's own setting: ResNet-32 on CIFAR-10, 182 epochs)" in own


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("campfire/tabel-2",), "did you mean 'campfire/table-2'"),
        (("campfire/table-7",), "campfire/table-7 has no command; not run: a comparison in words"),
        (("campfire/fig-2",), "it is held by tests: papers/test_campfire.py::test_window"),
        (
            ("campfire/table-5",),
            "has no small setting (needs ImageNet and a GPU): use --scale digits or paper",
        ),
        (("clicktrain/fig-5", "--epochs", "0"), "epochs is 0: must be at least 1"),
        (("clicktrain/fig-5", "--seeds", "1", "1"), "seeds are 1 1: different numbers are needed"),
        (("clicktrain/fig-5", "--json", "no/such.json"), "there is no folder no"),
        (("clicktrain/fig-5", "--scale", "tiny"), "scale"),
        (("clicktrain/fig-5", "clicktrain/fig-6"), "'clicktrain/fig-6' is out of place"),
    ],
)
def test_mistakes(words: tuple[str, ...], sentence: str, place: Path) -> None:
    outcome = call("reproduce", *words)
    assert outcome.code == 2
    assert sentence in outcome.err
