"""The list of the papers' items is complete, and what a row names is there."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from clicktrain.commands import bench, cost, evaluate, train
from clicktrain.commands.arguments import options_of
from clicktrain.errors import UserError
from clicktrain.files import read_yaml
from clicktrain.methods import METHODS
from clicktrain.papers import SCALES, Overrides, Row, read_rows, read_settings, rows_called, steps_of
from clicktrain.papers.figures import names_in
from clicktrain.papers.plan import Step
from clicktrain.papers.rows import KINDS, read_contents
from clicktrain.train.config import RunConfig

ROWS = read_rows()
# As printed: the last number of each, from 1 without a gap. ClickTrain numbers two of its three equations.
PRINTED = {
    "clicktrain": {"eq": 2, "table": 2, "fig": 15},
    "prunetrain": {"alg": 1, "eq": 4, "table": 4, "fig": 12},
    "campfire": {"alg": 4, "eq": 1, "table": 9, "fig": 11},
    "when-to-prune": {"alg": 2, "eq": 6, "table": 3, "fig": 6},
}
NETWORKS_AND_DATA = {
    "clicktrain": "resnet18 resnet34 resnet50 resnet101 vgg11 vgg13 vgg16 cifar10 cifar100 imagenet",
    "prunetrain": "resnet32 resnet50 resnet50-cifar resnet56 vgg11 vgg13 cifar10 cifar100 imagenet",
    "campfire": "resnet50-v1 resnet50-v1.5 tiny-imagenet imagenet",
    "when-to-prune": "resnet34 resnet50 mobilenet-v1 mobilenet-v3 ssd imagenet",
}


@pytest.mark.parametrize("paper", PRINTED)
def test_everything_that_a_paper_numbers_is_an_item(paper: str) -> None:
    items = read_contents()[paper]
    for kind, last in PRINTED[paper].items():
        numbers = sorted(int(m[1]) for item in items if (m := re.fullmatch(rf"{kind}-(\d+)", item)))
        assert numbers == list(range(1, last + 1)), kind
    named = {item.partition("-")[2] for item in items if item.startswith(("net-", "data-"))}
    assert named == set(NETWORKS_AND_DATA[paper].split())
    assert {item.partition("-")[0] for item in items} <= set(KINDS)


def test_every_item_has_a_row_that_says_what_became_of_it() -> None:
    assert len(ROWS) > 90
    assert [row.name for row in ROWS.values() if not (row.runs or row.test or row.not_run)] == []
    assert [row.name for row in ROWS.values() if row.state == "tested" and not row.test] == []
    assert [row.name for row in ROWS.values() if row.runs and not row.figures] == []
    unreasoned = [row.name for row in ROWS.values() if not row.runnable and not row.not_run and not row.test]
    assert unreasoned == []


def test_forty_can_be_run_on_a_cpu_and_each_kind_is_among_them() -> None:
    runnable = Counter(row.kind for row in ROWS.values() if row.runnable)
    assert runnable.total() >= 40
    assert set(runnable) == set(KINDS.values())


def test_forty_have_been_run() -> None:
    assert sum(bool(row.result) for row in ROWS.values()) >= 40


def test_a_result_names_its_setting_and_a_page_that_is_there(repository: Path) -> None:
    for row in ROWS.values():
        if row.result:
            pages = re.findall(r"\]\(([^)#]+)\)", row.result)
            assert pages, row.name
            assert all((repository / "docs" / page).exists() for page in pages), row.name
            assert row.small in read_settings() or row.small is None


def test_numbers_of_a_result_stand_on_its_page(repository: Path) -> None:
    """So that a page which is measured again takes the rows along."""
    stale = []
    for row in ROWS.values():
        text = "".join(
            (repository / "docs" / page).read_text(encoding="utf-8")
            for page in re.findall(r"\]\(([^)#]+)\)", row.result)
        )
        numbers = re.findall(r"\d+\.\d+", re.sub(r"\([^)]*\.md\)", "", row.result))
        stale += [f"{row.name}: {number}" for number in numbers if number not in text]
    assert stale == []


def test_flags_that_rows_speak_of_exist() -> None:
    known = {option.name for cls in (RunConfig, *METHODS.values()) for option in options_of(cls)}
    known |= {"epochs", "data", "seeds", "scale", "rule", "milestones", "dry_run"}
    spoken = {
        (row.name, flag)
        for row in ROWS.values()
        for flag in re.findall(r"--([a-z][a-z-]*)", f"{row.leaves} {row.result} {row.not_run}")
    }
    assert len(spoken) > 5
    assert [(name, flag) for name, flag in spoken if flag.replace("-", "_") not in known] == []


def names_of(path: Path) -> set[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assigned = {
        target.id for node in body if isinstance(node, ast.Assign) for target in node.targets
        if isinstance(target, ast.Name)
    }  # fmt: skip
    return assigned | {node.name for node in body if hasattr(node, "name")}


def missing_pointers(pointers: Iterator[tuple[str, str]]) -> list[str]:
    missing, known = [], dict[Path, set[str]]()
    for root, pointer in pointers:
        file, _, name = pointer.partition("::")
        path = Path(__file__).parents[2] / root / file
        if path.exists() and path not in known:
            known[path] = names_of(path)
        if not path.exists() or (name and name not in known[path]) or (root == "clicktrain" and not name):
            missing.append(f"{root}/{pointer}")
    return missing


def test_code_and_tests_exist() -> None:
    pointers = [("clicktrain", code) for row in ROWS.values() for code in row.code]
    pointers += [("tests", test) for row in ROWS.values() for test in row.test]
    assert len(pointers) > 200
    assert missing_pointers(iter(pointers)) == []
    assert missing_pointers(
        iter([("tests", "papers/test_paper_items.py::test_no_such"), ("clicktrain", "no.py::x")])
    )


def checked(step: Step) -> None:
    """Parse a command line with the command's own code; UserError if it is none."""
    command, *words = step.command
    if command == "train":
        train.settings_of(words)
    elif command == "bench":
        bench.settings_of(words)
    elif command == "cost":
        cost.COMMAND.parse(words)
    else:
        evaluate.COMMAND.parse(words)


def test_no_run_has_settings_that_its_recipe_has_for_another_method(repository: Path) -> None:
    general = {option.name for option in options_of(RunConfig)}
    settings = read_settings()
    recipes = {name: read_yaml(repository / one.recipe) for name, one in settings.items()}
    inherited = []
    for row in ROWS.values():
        recipe = recipes.get(row.small or "", {})
        for run, text in row.runs.items():
            words = f"{text} {settings[row.small].flags}".split() if row.small else text.split()
            method = words[words.index("--method") + 1] if "--method" in words else recipe.get("method")
            if words[0] != "train" or method == recipe.get("method") or not recipe:
                continue
            own = {option.name for option in options_of(METHODS[method])} - general
            given = {word.removeprefix("--").replace("-", "_") for word in words}
            inherited += [(row.name, run, name) for name in own & set(recipe) - given]
    assert inherited == []


@pytest.mark.parametrize("scale", SCALES)
def test_every_command_is_one_of_the_command_line(
    scale: str, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    recipes: dict[str, dict[str, object]] = {}
    read = train.read_recipe  # each recipe once: reading is most of the time
    monkeypatch.setattr(
        train,
        "read_recipe",
        lambda path, argv: dict(recipes.get(path) or recipes.setdefault(path, read(path, argv))),
    )
    seen: set[tuple[str, ...]] = set()
    for row in ROWS.values():
        if not row.runs or (scale != "digits" and row.small is None and row.paper is None):
            continue
        if (scale == "small" and not row.runnable) or (scale == "paper" and row.paper is None):
            continue
        for step in steps_of(row, scale, Path("out")):
            core = tuple(word for word in step.command if not word.startswith("out/"))
            if core in seen:
                continue
            seen.add(core)
            try:
                checked(step)
            except UserError as error:
                pytest.fail(f"{row.name}, {scale}: {step.text}: {error}")
    assert seen


def test_figures_read_runs_of_their_row() -> None:
    for row in ROWS.values():
        for figure in row.figures:
            unknown = names_in(figure.ours) - set(row.runs)
            assert not unknown, f"{row.name}: {figure.ours} reads {unknown}"


def row(**values: object) -> Row:
    return Row("clicktrain/eq-9", "9", "a row of a test", **values)  # type: ignore[arg-type]


def test_shares_of_the_run_and_folders_of_other_runs_are_filled_in(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    example = row(
        small="vgg11-quarter",
        runs={
            "dense": "train --method dense",
            "ck": "train --method campfire --era {30%} {50%} --initial-weights {dense}",
            "attack": "evaluate {ck} --attack fgsm",
            "pack": "bench pack --threads 1",
        },
        digits={"ck": "--epochs 6"},
    )
    steps = steps_of(example, "small", Path("o"), Overrides(seeds=(0, 3)))
    assert [(s.run, s.seed) for s in steps] == [
        ("dense", 0), ("ck", 0), ("attack", 0), ("pack", None), ("dense", 3), ("ck", 3), ("attack", 3)
    ]  # fmt: skip
    folder = "o/clicktrain/eq-9"
    assert steps[1].text == (
        "clicktrain train --config recipes/cifar10-quick.yaml --method campfire --era 4 6 --initial-weights "
        f"{folder}/dense-s0 --seed 0 --out {folder}/ck-s0"
    )
    assert (
        steps[6].text == f"clicktrain evaluate {folder}/ck-s3 --attack fgsm --json > {folder}/attack-s3.json"
    )
    assert steps[3].command == ("bench", "pack", "--threads", "1", "--json", f"{folder}/pack.json")
    text = steps_of(example, "small", Path("o"), Overrides(epochs=100, data="digits"))[1].text
    assert "--era 30 50" in text
    assert "--epochs 100 --data digits --warmup-epochs 25" in text
    steps = steps_of(example, "small", Path("o"), Overrides(flags="--device cuda --epochs 20"))
    assert "--era 6 10" in steps[1].text
    assert "--device cuda --epochs 20 --warmup-epochs 5" in steps[1].text
    assert "--device" not in steps[3].text
    assert "recipes/digits.yaml --method campfire --era 2 3" in steps_of(example, "digits", Path("o"))[1].text


def test_what_cannot_be_run_is_refused_with_the_reason(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    with pytest.raises(UserError, match=r"has no small setting.*use --scale digits"):
        steps_of(row(runs={"dense": "train"}), "small", Path("o"))
    with pytest.raises(UserError, match="not run: no data"):
        steps_of(row(not_run="no data"), "small", Path("o"))
    with pytest.raises(UserError, match="there is no run 'danse'"):
        steps_of(row(small="resnet8", runs={"ck": "train --initial-weights {danse}"}), "small", Path("o"))
    with pytest.raises(UserError, match="did you mean 'campfire/table-2'"):
        rows_called("campfire/tabel-2")
    monkeypatch.chdir("/")  # recipes come with the package
    assert steps_of(row(small="resnet8", runs={"dense": "train"}), "small", Path("o"))
